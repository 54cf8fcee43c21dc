"""The only file with hooks or ``torch.autograd``; everything temporary leaves by ``with``.

The network is found again as it was: mode, ``requires_grad``, in-place flags and hooks, also after
an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
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
    "WhereBackward0": "a torch.where, which may rectify",
    "MaskedFillBackward0": "a masked_fill, which may rectify",
    "CheckpointFunctionBackward": "the inside of a checkpointed block, which it cannot see",
    "CompiledFunctionBackward": "the inside of a compiled block, which it cannot see",
    "DifferentiableGraphBackward": "the inside of a scripted block, which it cannot see",
}
_SMOOTH = {
    "EluBackward0": "ELU",
    "GeluBackward0": "GELU",
    "HardswishBackward0": "hard-swish",
    "MishBackward0": "Mish",
    "SiluBackward0": "SiLU",
    "SoftplusBackward0": "softplus",
}
_SOFTMAXES = {"SoftmaxBackward0", "SafeSoftmaxBackward0"}
_BATCH_NORM = "_BatchNormBackward"

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
    logits: Tensor,
    target: Tensor,
    wrt: Sequence[Tensor] | Sequence[GradientEdge],
    objective: Objective = "logit",
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradient of each image's own objective towards each tensor of ``wrt``, same shapes.

    A tensor without influence on the objective gets zeros. With ``create_graph`` the gradients can
    be differentiated again, and the graph behind the logits stays.
    """
    scores = logits if objective == "logit" else -logits.log_softmax(1)
    chosen = scores.gather(1, target[:, None]).sum()
    return torch.autograd.grad(
        chosen, wrt, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def loss_gradient(losses: Tensor, inputs: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of the sum of losses (N,) towards the inputs, same shape; the graph stays.

    Of each image's own loss, but for what an image does to the others through the statistics of a
    batch normalisation in training. With ``create_graph`` it can be differentiated again.
    """
    return torch.autograd.grad(losses.sum(), inputs, create_graph=create_graph, retain_graph=True)[
        0
    ]


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode: no statistics move, and nothing drops out."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def guided_relu(
    logits: Tensor, passing: Passing = "positive", *, allow_no_relu: bool = False
) -> Iterator[None]:
    """Inside, gradients of these logits follow the guided rule of Springenberg et al. (2015).

    A signal that returns to the output of a ReLU or ReLU6, the sum over all its consumers, goes on
    with its positive part alone (or the negative part, or the absolute value). The rule acts on the
    graph behind the logits, so that it is the same for modules and functions, in place or not,
    called once or often; the network is not touched. A product such as ``x * (x > 0)`` does not
    show in a graph.

    Raises:
        Unsupported: if there is a rectifier that the rule is not defined for, or a function whose
            inside the graph does not show; also, unless ``allow_no_relu``, if there is no ReLU at
            all, or a smooth activation in the place of one, which keeps its own gradient.
    """
    rectifiers, smooth = [], set()
    for node in graph_nodes(logits):
        kind = node.name().rpartition("::")[2]
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if own and kind != _BATCH_NORM and kind not in _UNGUIDED:
            raise Unsupported(
                f"the guided rule cannot see inside {kind.removesuffix('Backward')}, an autograd "
                "function of the network's own"
            )
        if kind in _SMOOTH:
            smooth.add(_SMOOTH[kind])
        if kind == "ReluBackward0" or (kind == "HardtanhBackward0" and node._saved_min_val == 0):
            rectifiers.append(node)
        elif kind in _UNGUIDED:
            raise Unsupported(
                f"the guided rule is defined for ReLU and ReLU6, not for {_UNGUIDED[kind]}"
            )
    if not allow_no_relu and (smooth or not rectifiers):
        found = " and ".join(sorted(smooth)) + (" beside its ReLUs" if rectifiers else "")
        words = found if rectifiers else f"no ReLU or ReLU6{' but ' if smooth else ''}{found}"
        raise Unsupported(
            f"the network has {words}, so the guided gradient would be "
            f"{'partly ' if rectifiers else ''}the plain one; allow_no_relu: true accepts that"
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


@contextmanager
def bias_terms(net: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands over bias times gradient, layer by layer, while a backward runs inside.

    A term (N, C, ...) has its channels second, also where a linear layer has them last. It is
    computed inside the backward, and only one is alive at a time unless ``receive`` keeps it. A
    layer that is called several times gives a term for each call. Biases are those of convolutions,
    linear layers, and of batch normalisation in evaluation mode, whose implicit bias is
    beta - gamma mean / sqrt(variance + eps).

    Raises:
        Unsupported: if a batch normalisation does more in its forward than normalise, so that the
            gradient at its output is not that of its bias.
    """

    def hook_for(module: nn.Module) -> Any:
        bias = _bias(module)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if bias is None or not output.requires_grad:
                return

            def hand_over(gradient: Tensor) -> None:
                if isinstance(module, nn.Linear):
                    gradient = gradient.movedim(-1, 1)
                receive(bias.view(-1, *(1,) * (gradient.ndim - 2)) * gradient)

            _on_gradient(output, hand_over)

        return hook

    handles: list[RemovableHandle] = []
    try:
        for path, module in net.named_modules():
            if isinstance(module, _BIASED):
                if isinstance(module, _NORMS) and type(module).forward is not _NORMS[0].forward:
                    raise Unsupported(
                        f"the implicit bias of {path!r} cannot be read: "
                        f"{type(module).__name__} does more than normalise"
                    )
                handles.append(module.register_forward_hook(hook_for(module)))
        yield
    finally:
        for handle in handles:
            handle.remove()


_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
_BIASED = (nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d, nn.Linear, *_NORMS)


def _bias(module: nn.Module) -> Tensor | None:
    """(C,) the layer's output where its input is zero, if that does not depend on the position."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if not isinstance(module, _NORMS) or module.running_mean is None:
        return bias
    assert module.running_var is not None
    shift = -module.running_mean / (module.running_var + module.eps).sqrt()
    if module.affine:
        shift = shift * module.weight + module.bias
    return shift


def graph_nodes(output: Tensor) -> set[Any]:
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


# --- double backward of batch normalisation -------------------------------------------------------


@contextmanager
def fused_batch_norm() -> Iterator[None]:
    """Inside, batch normalisation in training gets a double backward of fused kernels on a CPU.

    The generic one takes a dozen passes over the feature map, each with a broadcast that a CPU does
    not vectorise: most of the time of a regularised step of a narrow network. Values agree with the
    generic one up to rounding. The network is not touched, and other devices keep theirs.
    """
    with _FusedBatchNorm():
        yield


class _FusedBatchNorm(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # noqa: A002  (the name that torch.nn.functional uses)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    fits = training and input.is_cpu and input.requires_grad
    if fits and weight is not None and bias is not None:
        fused: Tensor = _BatchNorm.apply(
            input, weight, bias, running_mean, running_var, momentum, eps
        )
        return fused
    return nn.functional.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


class _BatchNorm(torch.autograd.Function):
    """y = gamma (x - mu) r + beta, over all axes but the channels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Any, var: Any, momentum: Any,
        eps: float,
    ) -> Tensor:  # fmt: skip
        y, mu, r = torch.ops.aten.native_batch_norm(x, gamma, beta, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, gamma, mu, r)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dgamma, dbeta = _BatchNormGradient.apply(dy, *ctx.saved_tensors)
        return dx, dgamma, dbeta, None, None, None, None


class _BatchNormGradient(torch.autograd.Function):
    """dx = gamma r P(dy) with P(v) = v - m(v) - m(v z) z, where z = (x - mu) r and m is the mean.

    P is symmetric, so a signal v that returns to dx returns to dy as gamma r P(v), which is the
    same kernel; to gamma as n r c with c = m(v dy) - m(v) m(dy) - m(v z) m(dy z); and, since both
    z and r depend on x, to x as -r (m(dy z) gamma r P(v) + m(v z) dx + c gamma r z).
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, gamma: Tensor, mu: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dgamma, dbeta = _projected(dy, x, gamma, mu, r)
        ctx.save_for_backward(dy, x, gamma, mu, r, dx, dgamma, dbeta)
        ctx.set_materialize_grads(False)
        return dx, dgamma, dbeta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, *others: Tensor | None) -> Any:
        if any(signal is not None for signal in others):
            raise Unsupported(
                "a regulariser that differentiates the gradient of weights is not supported; one "
                "of the gradient of inputs is"
            )
        if v is None:
            return None, None, None, None, None
        dy, x, gamma, mu, r, dx, sum_dy_z, sum_dy = ctx.saved_tensors
        n = x.numel() // len(gamma)
        to_dy, sum_v_z, sum_v = _projected(v, x, gamma, mu, r)
        zero, one = torch.zeros_like(mu), torch.ones_like(mu)
        _, sum_v_dy, _ = _projected(v, dy, one, zero, one, (False, True, False))
        c = (sum_v_dy - sum_v * sum_dy / n - sum_v_z * sum_dy_z / n) / n
        slope = -c * gamma * r**3
        to_x = _affine(x, slope, -slope * mu)
        to_x += _affine(to_dy, -r * sum_dy_z / n, zero)
        to_x += _affine(dx, -r * sum_v_z / n, zero)
        return to_dy, to_x, n * r * c, None, None


def _projected(
    v: Tensor, x: Tensor, gamma: Tensor, mu: Tensor, r: Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """gamma r P(v), and the sums of v z and of v for each channel."""
    return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
        v, x, gamma, None, None, mu, r, True, 0.0, wanted
    )


def _affine(x: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Slope times x plus shift, each per channel, by the kernel of normalisation in evaluation."""
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    return torch.ops.aten.native_batch_norm(  # type: ignore[no-any-return]
        x, slope, shift, zero, one, False, 0.0, 0.0
    )[0]


# --- libraries ------------------------------------------------------------------------------------


def operations_behind(output: Tensor) -> dict[Any, str]:
    """Each node of the graph behind a tensor, with the name of its operation, such as ``Relu``.

    A function of the network's own, defined in Python, has its class's name.
    """
    return {
        node: re.sub(r"Backward\d*$", "", node.name()).rpartition("::")[2]
        for node in graph_nodes(output)
    }


@contextmanager
def rerouted(module: nn.Module, through: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module whose output passes through a function on its way into the rest of the network."""
    handle = module.register_forward_hook(lambda module, args, output: through(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every module has its attributes, children and hooks again.

    Libraries that hook modules or replace them do not always clean up after an error.
    """
    kept = [
        (module, dict(vars(module)), {k: v.copy() for k, v in vars(module).items() if _holds(v)})
        for module in net.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, contents in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()  # the same object, which handles of hooks refer to
                vars(module)[name].update(content)


def _holds(value: object) -> bool:
    return isinstance(value, dict | set)


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
        (node._saved_result.detach(), GradientEdge(node, 0)) for node in attention_nodes(logits)
    ]


def attention_nodes(logits: Tensor) -> list[Any]:
    """The graph's softmaxes over the last of three or more axes, in the order of the forward."""
    found = [
        node
        for node in graph_nodes(logits)
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


# --- dry runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module in a dry run, with the times of its graph."""

    path: str
    module: nn.Module
    entered: int
    left: int
    shape: tuple[int, ...]


def dry_run(
    net: nn.Module, inputs: Tensor
) -> tuple[list[ModuleCall], list[tuple[tuple[int, ...], int, int]]]:
    """All calls as they ended, and of each attention in the graph its weights' shape, and when the
    module around it was entered and left.
    """
    calls: list[ModuleCall] = []
    entered: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(_now())

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            calls.append(ModuleCall(path, module, entered.pop(), _now(), shape))

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
    for node in attention_nodes(logits):
        time, shape = _time(node), tuple(node._saved_result.shape)
        # a module that returns the weights is the softmax itself, not the attention around it
        around = [c for c in calls if c.entered < time < c.left and c.shape != shape]
        inner = max(around, key=lambda call: call.entered, default=None)
        attentions.append((shape, inner.entered, inner.left) if inner else (shape, time, time))
    return calls, attentions


@contextmanager
def uncounted(net: nn.Module) -> Iterator[None]:
    """What runs inside does not show on the network's meters."""
    owners = (getattr(hook, "__self__", None) for hook in net._forward_hooks.values())
    meters = [(owner, dict(vars(owner))) for owner in owners if isinstance(owner, Meter)]
    try:
        yield
    finally:
        for meter, before in meters:
            vars(meter).update(before)
