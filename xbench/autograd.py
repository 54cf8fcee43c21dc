"""The only file with hooks or ``torch.autograd``; everything temporary leaves by ``with``.

The network is found again as it was: mode, ``requires_grad``, in-place flags and hooks, also after
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from .errors import Unsupported, UsageError
from .features import FeatureLayout

_UNSEEN = "takes no part in the forward"
_RECTIFIERS = {"ReluBackward0", "HardtanhBackward0"}
_UNGUIDED = {
    "LeakyReluBackward0": "a leaky ReLU",
    "PreluKernelBackward0": "a parametric ReLU",
    "RreluWithNoiseBackward0": "a randomised ReLU",
    "ClampBackward0": "a clamp",
    "ClampBackward1": "a clamp",
    "ClampMinBackward0": "a clamp",
    "MaximumBackward0": "a maximum",
    "ThresholdBackward0": "a threshold",
}
_SOFTMAXES = {"SoftmaxBackward0", "SafeSoftmaxBackward0"}


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
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.matmul.allow_tf32 = False
    # nn.MultiheadAttention takes it without a graph alone, and rounds otherwise there
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
            # the fused kernels for float32 on a GPU do not add up in one order on the way back
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def prepared(net: nn.Module) -> Iterator[Meter]:
    """The network as every entry may expect it: evaluation mode, frozen, nothing in place, counted.

    In-place activations would overwrite recorded feature maps, and full backward hooks refuse them.
    On a GPU, convolutions and products keep full float32 precision and the same algorithm.
    Attention rounds alike with and without a graph.
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
    logits: Tensor, target: Tensor, wrt: Sequence[Tensor] | Sequence[GradientEdge]
) -> tuple[Tensor, ...]:
    """Gradient of each image's own target logit towards each tensor of ``wrt``, same shapes.

    A tensor without influence on the logit gets zeros.
    """
    chosen = logits.gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, wrt, allow_unused=True, materialize_grads=True)


@dataclass
class GuidedRule:
    """Springenberg et al. (2015): only positive signals pass a ReLU or ReLU6 on their way back."""

    guided: set[Any] = field(default_factory=set)

    def check(self, logits: Tensor, *, allow_no_relu: bool = False) -> None:
        """Compares the graph behind the logits with the nodes that were guided.

        Raises:
            Unsupported: if a rectifier escaped, or if there is none.
        """
        nodes = _graph_nodes(logits)
        rectifiers = {node for node in nodes if node.name() in _RECTIFIERS}
        escaped = rectifiers - self.guided
        if escaped:
            raise Unsupported(
                f"{len(escaped)} of {len(rectifiers)} ReLUs are functional calls (F.relu, "
                "torch.relu), which the guided rule cannot reach; use nn.ReLU modules built in "
                "__init__"
            )
        names = {node.name() for node in nodes}
        for name, words in _UNGUIDED.items():
            if name in names:
                raise Unsupported(f"the guided rule is defined for ReLU and ReLU6, not for {words}")
        if not rectifiers and not allow_no_relu:
            raise Unsupported(
                "the network has no ReLU or ReLU6 module, so the guided gradient would be the "
                "plain one; allow_no_relu: true accepts that"
            )


@contextmanager
def guided_relu(net: nn.Module) -> Iterator[GuidedRule]:
    """The guided rule for forwards inside, acting per call, so that reused modules are right."""
    rule = GuidedRule()

    def guide(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            rule.guided.add(output.grad_fn)
            # the whole signal that arrives at the output, from all its consumers
            _on_gradient(output, lambda gradient: gradient.clamp_min(0))

    handles = [
        module.register_forward_hook(guide)
        for module in net.modules()
        if isinstance(module, nn.ReLU | nn.ReLU6)
    ]
    try:
        yield rule
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


# --- attention ------------------------------------------------------------------------------------


@contextmanager
def attention_in_graph() -> Iterator[None]:
    """Inside, fused attention is computed in steps, so that its softmax stands in the graph."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def attention_weights(logits: Tensor) -> list[tuple[Tensor, GradientEdge]]:
    """Weights of every attention behind the logits, each with its edge for :func:`class_gradient`.

    In the order of the forward, shapes as the network has them: (N, heads, T, T) mostly. However a
    network writes attention, its weights are a softmax over the last axis; one that ran inside
    :func:`attention_in_graph` is found in the graph.
    """
    return [
        (node._saved_result.detach(), GradientEdge(node, 0)) for node in _attention_nodes(logits)
    ]


def _attention_nodes(logits: Tensor) -> list[Any]:
    """The graph's softmaxes over the last of three or more axes, in the order of the forward."""
    found = [
        node
        for node in _graph_nodes(logits)
        if node.name() in _SOFTMAXES
        and (axes := node._saved_result.ndim) >= 3
        and node._saved_dim in (axes - 1, 2**64 - 1)  # the axis -1, stored without a sign
    ]
    return sorted(found, key=_time)


def _time(node: Any) -> int:
    """When a node came into the graph."""
    time: int = node._sequence_nr()
    return time


def _now() -> int:
    with torch.enable_grad():
        return _time(torch.ones((), requires_grad=True).clone().grad_fn)


# --- the last feature map -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One call of a module in a dry run, with the times of its graph."""

    path: str
    module: nn.Module
    entered: int
    left: int
    shape: tuple[int, ...]


def last_feature_map(net: nn.Module, inputs: Tensor) -> str | None:
    """Path of the last module that returns feature maps larger than 1 x 1, pooling layers aside.

    It is what Grad-CAM's authors and users mean by the last convolutional layer, with what follows
    it up to the pooling. Tokens are feature maps where as many attend to each other. After the last
    attention the logits may read the class token alone, and no other token has a gradient; so where
    there are such prefix tokens, it is the last layer before that attention, which in a vision
    transformer is the last block's first norm. A dry run finds it; on the meta device it computes
    nothing.
    """
    with torch.no_grad():
        calls, attentions = _dry_run(net, inputs)
    if any(len(call.shape) == 3 for call in calls):  # tokens, perhaps: a graph shows attention
        with torch.enable_grad():
            calls, attentions = _dry_run(net, inputs)
    tokens = {count for weights, _, _ in attentions for count in weights[-2:]}
    pooling = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Dropout2d)
    found: list[tuple[_Call, FeatureLayout]] = []
    for call in calls:
        is_loose = len(call.shape) == 3 and call.shape[1] not in tokens
        if is_loose or isinstance(call.module, pooling):
            continue
        try:
            layout = FeatureLayout.of(call.shape, inputs.shape)
        except Unsupported:
            continue
        if layout.positions > 1:
            found.append((call, layout))
    if not found:
        return None
    last, layout = found[-1]
    for _, entered, left in attentions[-1:]:
        inside = entered < last.entered and last.left < left
        before = [call for call, _ in found if call.left <= entered]
        if before and (layout.prefix or inside):
            last = before[-1]
    return last.path


def _dry_run(
    net: nn.Module, inputs: Tensor
) -> tuple[list[_Call], list[tuple[tuple[int, ...], int, int]]]:
    """All calls as they ended, and of each attention in the graph its weights' shape, and when the
    module around it was entered and left.
    """
    calls: list[_Call] = []
    entered: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(_now())

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            calls.append(_Call(path, module, entered.pop(), _now(), shape))

        return hook

    handles: list[RemovableHandle] = []
    try:
        for path, module in net.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave(path)))
        with attention_in_graph():
            # a copy of a copy, as a network may work on its input in place, but on no leaf
            logits = net(inputs.detach().clone().requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    attentions = []
    for node in _attention_nodes(logits):
        time, shape = _time(node), tuple(node._saved_result.shape)
        # a module that returns the weights is the softmax itself, not the attention around it
        around = [c for c in calls if c.entered < time < c.left and c.shape != shape]
        inner = max(around, key=lambda call: call.entered, default=None)
        attentions.append((shape, inner.entered, inner.left) if inner else (shape, time, time))
    return calls, attentions
