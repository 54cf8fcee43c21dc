"""What the layers of a network are, told by a dry run: which is last, and what depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .autograd import (
    ModuleCall,
    attention_in_graph,
    attention_nodes,
    dry_run,
    graph_nodes,
    recording,
    uncounted,
)
from .errors import Unpriced, Unsupported
from .features import FeatureLayout
from .types import Model


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
        calls, attentions = dry_run(net, inputs)
    if any(len(call.shape) == 3 for call in calls):  # tokens, perhaps: a graph shows attention
        with torch.enable_grad():
            calls, attentions = dry_run(net, inputs)
    tokens = {count for weights, _, _ in attentions for count in weights[-2:]}
    pooling = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Dropout2d)
    found: list[tuple[ModuleCall, FeatureLayout]] = []
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


def layout_of(
    path: str, kept: Mapping[str, Tensor], refused: Mapping[str, str], images: Sequence[int]
) -> FeatureLayout:
    """How to read what :func:`xbench.autograd.recording` tells of a layer.

    Args:
        kept, refused: outputs, and reasons why there are none, by path.
        images: shape (N, C, H, W) of what was forwarded.

    Raises:
        Unsupported: if there is no output, or none with a grid of positions.
    """
    if path in refused:
        raise Unsupported(f"layer {path!r} {refused[path]}")
    try:
        return FeatureLayout.of(kept[path].shape, images)
    except Unsupported as error:
        raise Unsupported(f"layer {path!r} {error}") from None


def _found_facts(net: nn.Module, path: str, shape: tuple[int, ...]) -> LayerFacts:
    with recording(net, [path]) as (kept, refused):
        logits = _without_weights(net, shape)
    layout = layout_of(path, kept, refused, shape)
    affine = layout.kind != "tokens" and _is_affine(logits)
    return LayerFacts(kept[path].shape[layout.channel_axis], affine)


def attention_shapes(model: Model) -> list[tuple[int, ...]]:
    """Shapes of the weights of every attention for one image, in the order of the forward.

    Found as :func:`layer_facts` are, with the same errors.
    """
    image = _image_shape(model)
    with attention_in_graph():
        logits = _without_weights(model.net, (1, *image), requires_grad=True)
    return [tuple(node._saved_result.shape) for node in attention_nodes(logits)]


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
        uncounted(net),
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
    for node in graph_nodes(output):
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name in _FACTORS:
            inputs = [parent for parent, _ in node.next_functions]
            if sum(inputs[at] is not None for at in _FACTORS[name]) > 1:
                return False
        elif name not in _AFFINE:
            return False
    return True
