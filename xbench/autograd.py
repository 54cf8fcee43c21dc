"""The only file with hooks or ``torch.autograd``; everything temporary leaves by ``with``.

The network is found again as it was: mode, ``requires_grad``, in-place flags and hooks, also after
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import Unsupported, UsageError

_UNSEEN = "takes no part in the forward"
_UNGUIDED = {
    "LeakyReluBackward0": "a leaky ReLU",
    "PreluKernelBackward0": "a parametric ReLU",
    "RreluWithNoiseBackward0": "a randomised ReLU",
    "HardtanhBackward0": "a hard tanh",  # but for ReLU6, which is one
    "ClampBackward0": "a clamp",
    "ClampBackward1": "a clamp",
    "ClampMinBackward0": "a clamp",
    "MaximumBackward0": "a maximum",
    "ThresholdBackward0": "a threshold",
    "CheckpointFunctionBackward": "the inside of a checkpointed block, which it cannot see",
    "CompiledFunctionBackward": "the inside of a compiled block, which it cannot see",
    "DifferentiableGraphBackward": "the inside of a scripted block, which it cannot see",
}

Objective = Literal["logit", "nll"]
"""What is differentiated: the target's logit (the default), or the negative logarithm of its
softmax probability."""

Passing = Literal["positive", "negative", "absolute"]
"""The part of a signal that passes a ReLU on its way back under the guided rule."""


@dataclass
class Meter:
    """Rows that went through a network, forward and backward, whoever sent them.

    Args:
        forward: rows forwarded, without padding.
        backward: rows differentiated, without padding.
        padding: rows forwarded only to fill the fixed shape.
        retried: rows forwarded again after running out of memory.
    """

    forward: int = 0
    backward: int = 0
    padding: int = 0
    retried: int = 0
    _share: tuple[int, int, int] = field(default=(1, 1, 0), repr=False)

    @contextmanager
    def padded(self, real: int, rows: int) -> Iterator[None]:
        """Inside, of every ``rows`` rows only ``real`` count; the others are padding."""
        before, self._share = self._share, (real, rows, 0)
        try:
            yield
        finally:
            self._share = before

    def reset(self) -> None:
        """Forget what was counted, such as a dry run."""
        self.forward = self.backward = self.padding = self.retried = 0

    def _count(self, module: nn.Module, args: Any, logits: Any) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise Unsupported(
                f"the network returns {shape}, not logits of shape (images, classes); "
                "wrap it in a module that returns the logits alone"
            )
        real, rows, seen = self._share
        after = seen + logits.shape[0]
        counted = after * real // rows - seen * real // rows  # exact for rows in any portions
        self._share = (real, rows, after % rows)
        self.forward += counted
        self.padding += logits.shape[0] - counted
        if logits.requires_grad:
            _on_gradient(logits, lambda gradient: self._count_backward(counted))

    def _count_backward(self, counted: int) -> None:
        self.backward += counted


def _on_gradient(tensor: Tensor, act: Callable[[Tensor], Tensor | None]) -> None:
    tensor.register_hook(act)  # type: ignore[no-untyped-call]


@contextmanager
def _exactly() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def prepared(net: nn.Module) -> Iterator[Meter]:
    """The network as every entry may expect it: evaluation mode, frozen, nothing in place, counted.

    In-place activations would overwrite recorded feature maps, and full backward hooks refuse them.
    On a GPU, convolutions and products keep full float32 precision and the same algorithm.
    """
    meter = Meter()
    modes = [(module, module.training) for module in net.modules()]
    frozen = [parameter for parameter in net.parameters() if parameter.requires_grad]
    in_place = [module for module in net.modules() if getattr(module, "inplace", False) is True]
    handle = net.register_forward_hook(meter._count)
    try:
        net.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        with _exactly():
            yield meter
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]


def module_at(net: nn.Module, path: str) -> nn.Module:
    """The module at a path such as ``layer4.1.conv2``.

    Raises:
        UsageError: if there is none.
    """
    try:
        return net.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in net.named_children())
        raise UsageError(
            f"the network has no module {path!r}; its children are {children}"
        ) from None


@contextmanager
def recording(
    net: nn.Module, paths: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Keeps the outputs of modules of the forward that runs inside: (kept, refused), by path.

    A layer that cannot be kept is refused with the reason, so that it costs only those who ask for
    it. Where nothing before requires a gradient, the graph begins at the first recorded output: a
    Grad-CAM of the last layer then costs the head's backward, not the whole network's.
    """
    kept: dict[str, Tensor] = {}
    refused = dict.fromkeys(paths, _UNSEEN)
    handles: list[RemovableHandle] = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                refused[path] = f"returns {type(output).__name__}, not a tensor"
                return None
            if refused.pop(path, None) != _UNSEEN:
                kept.pop(path, None)
                refused[path] = "is called more than once in a forward; name the module around it"
                return None
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()
            kept[path] = output
            passed: Tensor = output.clone()  # a later in-place step would overwrite what we keep
            return passed

        return hook

    try:
        for path in paths:
            try:
                module = module_at(net, path)
            except UsageError as error:
                refused[path] = f"does not exist: {error}"
            else:
                handles.append(module.register_forward_hook(keep(path)))
        yield kept, refused
    finally:
        for handle in handles:
            handle.remove()


def class_gradient(
    logits: Tensor, target: Tensor, wrt: Sequence[Tensor], objective: Objective = "logit"
) -> tuple[Tensor, ...]:
    """Gradient of each image's own objective towards each tensor of ``wrt``, same shapes.

    A tensor without influence on the objective gets zeros.
    """
    scores = logits if objective == "logit" else -logits.log_softmax(1)
    chosen = scores.gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, tuple(wrt), allow_unused=True, materialize_grads=True)


@contextmanager
def guided_relu(
    logits: Tensor, passing: Passing = "positive", *, allow_no_relu: bool = False
) -> Iterator[None]:
    """Inside, gradients of these logits follow the guided rule of Springenberg et al. (2015).

    A signal that returns to the output of a ReLU or ReLU6, the sum over all its consumers, goes on
    with its positive part alone (or the negative part, or the absolute value). The rule acts on the
    graph behind the logits, so that it is the same for modules and functions, in place or not,
    called once or often; the network is not touched.

    Raises:
        Unsupported: if there is a rectifier that the rule is not defined for, or none at all and
            ``allow_no_relu`` is false.
    """
    rectifiers = []
    for node in _graph_nodes(logits):
        kind = node.name().rpartition("::")[2]
        if kind == "ReluBackward0" or (kind == "HardtanhBackward0" and node._saved_min_val == 0):
            rectifiers.append(node)
        elif kind in _UNGUIDED:
            raise Unsupported(
                f"the guided rule is defined for ReLU and ReLU6, not for {_UNGUIDED[kind]}"
            )
    if not rectifiers and not allow_no_relu:
        raise Unsupported(
            "the network has no ReLU or ReLU6, so the guided gradient would be the plain one; "
            "allow_no_relu: true accepts that"
        )
    parts: dict[Passing, Callable[[Tensor], Tensor]] = {
        "positive": lambda signal: signal.clamp_min(0),
        "negative": lambda signal: signal.clamp_max(0),
        "absolute": torch.abs,
    }

    def guide(signals: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if signal is None else parts[passing](signal) for signal in signals)

    handles = [node.register_prehook(guide) for node in rectifiers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _graph_nodes(output: Tensor) -> set[Any]:
    """The nodes of the graph behind a tensor."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return seen


def last_feature_map(net: nn.Module, inputs: Tensor) -> str | None:
    """Path of the last module that returns feature maps larger than 1 x 1, pooling layers aside.

    It is what Grad-CAM's authors and users mean by the last convolutional layer, with what follows
    it up to the pooling. A dry run finds it; on the meta device it computes nothing.
    """
    found: list[str] = []
    pooling = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Dropout2d)

    def look(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (
                isinstance(output, Tensor)
                and output.ndim == 4
                and output.shape[-1] * output.shape[-2] > 1
            ):
                found.append(path)

        return hook

    handles = [
        module.register_forward_hook(look(path))
        for path, module in net.named_modules()
        if path and not isinstance(module, pooling)
    ]
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None
