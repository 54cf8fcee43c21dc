"""The only file with hooks or ``torch.autograd``; everything temporary leaves by ``with``.

The network is found again as it was: mode, ``requires_grad``, in-place flags and hooks, also after
an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from .errors import Unpriced, Unsupported, UsageError
from .features import FeatureLayout
from .types import Model

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
_SOFTMAXES = {"SoftmaxBackward0", "SafeSoftmaxBackward0"}

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
) -> tuple[Tensor, ...]:
    """Gradient of each image's own objective towards each tensor of ``wrt``, same shapes.

    A tensor without influence on the objective gets zeros.
    """
    scores = logits if objective == "logit" else -logits.log_softmax(1)
    chosen = scores.gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, wrt, allow_unused=True, materialize_grads=True)


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


# --- libraries ------------------------------------------------------------------------------------


def operations_behind(output: Tensor) -> dict[Any, str]:
    """Each node of the graph behind a tensor, with the name of its operation, such as ``Relu``.

    A function of the network's own, defined in Python, has its class's name.
    """
    return {
        node: re.sub(r"Backward\d*$", "", node.name()).rpartition("::")[2]
        for node in _graph_nodes(output)
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


# --- facts about layers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerFacts:
    """What the cost of a method depends on.

    Args:
        channels: of the layer's feature maps.
        affine: whether the logits are an affine function of the feature maps, as behind average
            pooling and a linear layer. A change of the maps then moves a logit by exactly its
            product with the gradient. Never claimed of tokens, of which some are no part of a map.
    """

    channels: int
    affine: bool


_AFFINE = {
    *("torch::autograd::AccumulateGrad", "Clone", "ToCopy", "Add", "Sub", "Neg", "Sum", "Mean"),
    *("AdaptiveAvgPool2D", "AvgPool2D", "ConstantPadNd", "Cat", "Stack"),
    *("View", "UnsafeView", "ReshapeAlias", "Alias", "T", "Transpose", "Permute", "Expand"),
    *("Squeeze", "Unsqueeze", "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "AsStrided"),
}
"""Nodes that are affine in all their inputs together."""

_FACTORS = {"Mm": (0, 1), "Bmm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Convolution": (0, 1)}
"""Nodes that are affine as long as only one of these inputs depends on the layer.

Elementwise products are not among them: ``x * (x > 0)`` is a ReLU whose graph does not show it.
"""

_known_facts: WeakKeyDictionary[
    nn.Module, dict[Any, LayerFacts | tuple[type[Unsupported], str]]
] = WeakKeyDictionary()


def layer_facts(model: Model, layer: str, image: Sequence[int] | None = None) -> LayerFacts:
    """Facts about a layer, a role or a module path.

    A dry run on the meta device tells them, without a look at the weights, so that a plan's sketch
    and the loaded network give the same answer. It is not counted, and done once for each network.

    Args:
        image: shape (C, H, W) of the images; by default one channel for each of the model's means
            and the model's size.

    Raises:
        Unpriced: if the model does not know the size of its images, or if the network cannot run on
            the meta device.
        Unsupported: if the layer cannot be recorded, or has no feature maps.
    """
    if image is None:
        image = _image_shape(model)
    path, shape = model.layer(layer), (1, *image)
    known = _known_facts.setdefault(model.net, {})
    if (path, shape) not in known:
        try:
            known[path, shape] = _found_facts(model.net, path, shape)
        except Unsupported as error:
            # the error itself would keep the network alive
            known[path, shape] = type(error), str(error)
    found = known[path, shape]
    if isinstance(found, tuple):
        kind, words = found
        raise kind(words)
    return found


def _found_facts(net: nn.Module, path: str, shape: tuple[int, ...]) -> LayerFacts:
    with recording(net, [path]) as (kept, refused):
        logits = _without_weights(net, shape)
    if path in refused:
        raise Unsupported(f"layer {path!r} {refused[path]}")
    output = kept[path]
    try:
        layout = FeatureLayout.of(output.shape, shape)
    except Unsupported as error:
        raise Unsupported(f"layer {path!r} {error}") from None
    affine = layout.kind != "tokens" and _is_affine(logits)
    return LayerFacts(output.shape[layout.channel_axis], affine)


def attention_shapes(model: Model) -> list[tuple[int, ...]]:
    """Shapes of the weights of every attention for one image, in the order of the forward.

    Found as :func:`layer_facts` are, with the same errors.
    """
    image = _image_shape(model)
    with attention_in_graph():
        logits = _without_weights(model.net, (1, *image), requires_grad=True)
    return [tuple(node._saved_result.shape) for node in _attention_nodes(logits)]


def _image_shape(model: Model) -> tuple[int, ...]:
    if model.size is None:
        raise Unpriced(
            f"model {model.name!r} does not know the size of its images, on which this cost "
            "depends; give it: Model(..., size=(height, width))"
        )
    return (len(model.mean), *model.size)


def _without_weights(
    net: nn.Module, shape: tuple[int, ...], *, requires_grad: bool = False
) -> Tensor:
    """Logits on the meta device, with their graph; nothing is computed, counted or changed."""
    state = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*net.named_parameters(), *net.named_buffers())
    }
    floating = [value.dtype for value in state.values() if value.is_floating_point()]
    with (
        torch.device("meta"),
        torch.inference_mode(False),
        torch.enable_grad(),
        _uncounted(net),
    ):
        example = torch.empty(shape, dtype=floating[0] if floating else None)
        example.requires_grad_(requires_grad)
        try:
            # a copy of a copy, as a network may work on its input in place, but on no leaf
            logits: Tensor = torch.func.functional_call(net, state, (example.clone(),))
        except Exception as error:  # whatever the network's own forward raises
            raise Unpriced(
                f"the network cannot run without its weights, which tells the cost of a layer "
                f"({type(error).__name__}: {str(error)[:200]}); tensors that its forward uses must "
                "be parameters or buffers"
            ) from error
    return logits


def _is_affine(output: Tensor) -> bool:
    """Whether the graph behind a tensor holds nothing but affine steps."""
    for node in _graph_nodes(output):
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name in _FACTORS:
            inputs = [parent for parent, _ in node.next_functions]
            if sum(inputs[at] is not None for at in _FACTORS[name]) > 1:
                return False
        elif name not in _AFFINE:
            return False
    return True


@contextmanager
def _uncounted(net: nn.Module) -> Iterator[None]:
    """What runs inside does not show on the network's meters."""
    owners = (getattr(hook, "__self__", None) for hook in net._forward_hooks.values())
    meters = [(owner, dict(vars(owner))) for owner in owners if isinstance(owner, Meter)]
    try:
        yield
    finally:
        for meter, before in meters:
            vars(meter).update(before)


# --- what follows a layer -------------------------------------------------------------------------


class Replay:
    """What follows a layer, run again with other feature maps in the layer's place.

    One forward records what the modules before the layer return. In a replay they give their
    records instead of running, and the layer gives the feature maps; all else runs as ever, so that
    by-passes around the layer and modules that are called before and after it stay right.

    Args:
        model, layer: as in :func:`layer_facts`.
        inputs: (N, 3, H, W), recorded. That is one forward, and another replays it as a check.

    Attributes:
        output: the layer's output, (N, ...).

    Raises:
        Unsupported: if the layer is not called just once, for a tensor, or if the replay does not
            find the logits again, as where rows depend on one another.
    """

    def __init__(self, model: Model, layer: str, inputs: Tensor) -> None:
        self._model, self._path, self._inputs = model, model.layer(layer), inputs
        *above, self._layer = _modules_along(model.net, self._path)
        passed = set(_passed_by(model.net, above, self._layer))
        own = {*above, self._layer}
        self._before = {
            module: None if module in passed else list[Any]()
            for parent in above
            for module in _called(parent.children())
            if module not in own
        }
        with torch.no_grad():
            logits, images = self._recorded(), torch.arange(len(inputs), device=inputs.device) // 2
            again = self(self.output[images], images)
        near = 1e-3 * float(logits.nan_to_num(0, 0, 0).abs().amax())  # far above any rounding
        if not torch.allclose(again, logits[images], rtol=0, atol=near, equal_nan=True):
            raise Unsupported(
                f"what follows layer {self._path!r} cannot be run alone: other images or chance "
                "take part in its forward; choose another layer"
            )

    def __call__(self, features: Tensor, images: Tensor) -> Tensor:
        """Logits (R, K) of feature maps (R, ...) in place of the output for images (R,)."""
        count = len(self._inputs)
        if _channels_are_last(self.output):  # one layout, on which rounding depends
            features = features.contiguous(memory_format=torch.channels_last)

        def again(module: nn.Module, records: list[Any] | None) -> Callable[..., Any]:
            if records is None:
                return lambda first, *rest, **named: first
            left, usual = iter(records), module.forward
            nothing = object()

            def forward(*args: Any, **named: Any) -> Any:
                record = next(left, nothing)
                if record is nothing:
                    return usual(*args, **named)
                return _each_tensor(record, lambda value: _rows_of(value, images, count))

            return forward

        forwards = {module: again(module, records) for module, records in self._before.items()}
        with _forwards({**forwards, self._layer: lambda *args, **named: features}):
            return self._model.logits(self._inputs[images])

    def _recorded(self) -> Tensor:
        """The logits, while records are taken."""
        busy = False
        outputs: list[Any] = []

        def record(module: nn.Module, records: list[Any] | None) -> Callable[..., Any]:
            usual = module.forward

            def forward(*args: Any, **named: Any) -> Any:
                nonlocal busy
                if busy or (outputs and module is not self._layer):
                    return usual(*args, **named)  # within a recorded module, or after the layer
                busy = True
                try:
                    output = usual(*args, **named)
                finally:
                    busy = False
                if records is None:
                    return output
                records.append(output)
                # a later in-place step would overwrite what we keep
                return _each_tensor(output, Tensor.clone)

            return forward

        called = {**self._before, self._layer: outputs}
        with _forwards({module: record(module, records) for module, records in called.items()}):
            logits = self._model.logits(self._inputs)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            raise Unsupported(f"layer {self._path!r} is not called just once, for one tensor")
        self.output = outputs[0]
        return logits


def _modules_along(net: nn.Module, path: str) -> list[nn.Module]:
    """The network, the modules around a module, and itself."""
    module_at(net, path)
    parts = path.split(".")
    return [net.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _called(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules that are called; those without a forward, such as lists, stand for theirs."""
    for module in modules:
        if type(module).forward is nn.Module.forward:
            yield from _called(module.children())
        else:
            yield module


def _passed_by(net: nn.Module, above: Sequence[nn.Module], layer: nn.Module) -> Iterator[nn.Module]:
    """Modules whose output only their successor in a Sequential sees, which gives a record itself.

    They need no record; those of a whole VGG would fill the memory.
    """
    times = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    for parent, following in zip(above, (*above[1:], layer), strict=True):
        if type(parent).forward is nn.Sequential.forward:
            children = list(parent.children())
            place = children.index(following)
            last = place if following is layer else place - 1
            yield from (child for child in children[: max(last, 0)] if times[id(child)] == 1)


@contextmanager
def _forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in place of the modules' own ``forward``."""
    before = [(module, vars(module).get("forward")) for module in replaced]
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


def _each_tensor(value: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with each tensor in it changed."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, dict):
        return type(value)((key, _each_tensor(item, act)) for key, item in value.items())
    if isinstance(value, list | tuple):
        items = [_each_tensor(item, act) for item in value]
        return items if isinstance(value, list) else tuple.__new__(type(value), items)
    return value


def _rows_of(value: Tensor, images: Tensor, count: int) -> Tensor:
    """The rows of these images, of a tensor with one row for each, or one for all."""
    if not value.ndim or len(value) != count:
        return value.clone()
    if _channels_are_last(value):
        return value.movedim(1, -1)[images].movedim(-1, 1)  # indexing alone would lay them out anew
    return value[images]


def _channels_are_last(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
