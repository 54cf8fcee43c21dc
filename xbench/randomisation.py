"""The network with some of its layers drawn anew, and what a method's maps keep of it.

A map that stays as it was is not about the weights. Layers are drawn in place, inside a ``with``,
and their own weights come back as the very same memory; at no time is there more than one network
beside the original.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .autograd import untouched
from .errors import Unsupported
from .maps import Sign, with_sign
from .noise import normal, seeded, stream_keys
from .probe import Again, Explanation, Logits
from .similarity import SIMILARITIES, similarities
from .types import Model

Order = Literal["top_down", "bottom_up", "independent"]
"""From the output downwards or from the image upwards, each group of layers drawn in addition to
those before (cascading); or each group by itself, in a network that is otherwise as it was."""

Stages = Annotated[int, Field(ge=1)] | Literal["all"]
"""How many groups of layers; "all" makes every layer a group."""

_RESETS = ("reset_parameters", "_reset_parameters")  # the latter in attention


def layers_of(net: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Modules that have parameters of their own, with these by name, in the network's own order.

    A parameter that several modules share belongs to the first.
    """
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in net.named_parameters():
        path, _, own = name.rpartition(".")
        found.setdefault(path, []).append((own, parameter))
    return {path: found[path] for path, _ in net.named_modules() if path in found}


def stage_groups(net: nn.Module, order: Order, stages: Stages) -> list[list[str]]:
    """Paths of the layers that each stage draws anew: groups of neighbours, as equal as possible.

    There are fewer stages where there are fewer layers.
    """
    layers = list(layers_of(net))
    count = len(layers) if stages == "all" else min(stages, len(layers))
    edges = [at * len(layers) // count for at in range(count + 1)] if count else []
    groups = [layers[start:end] for start, end in pairwise(edges)]
    return groups[::-1] if order == "top_down" else groups


@contextmanager
def drawn_anew(net: nn.Module, paths: Sequence[str], seed: int) -> Iterator[None]:
    """Inside, these layers have random weights; then their own again, also after an error.

    A layer draws as when it was made, by its ``reset_parameters``; a batch normalisation then does
    nothing, and one that was folded into a convolution is drawn with that. What no such function
    fills (class tokens, positional embeddings, scales, weights behind a parametrisation) is normal
    with the parameter's own mean and standard deviation, so that one whose values are all equal
    stays. Buffers change only with their layer's own function. The stream hangs on the seed and the
    layer's path alone; drawn in float32 on the CPU, weights are equal on every device.

    Raises:
        Unsupported: if a layer's own function fails.
    """
    before: list[tuple[Tensor, Tensor]] = []
    layers = layers_of(net)
    try:
        for path in paths:
            module = net.get_submodule(path)
            fresh = _reset(module, path, seed)
            for name, parameter in layers[path]:
                drawn = fresh.pop(name, None)
                if drawn is None:
                    drawn = _like(parameter, f"{path}.{name}", seed)
                before.append((parameter, parameter.data))
                parameter.data = drawn.to(parameter)
            for name, drawn in fresh.items():
                buffer = module._buffers.get(name)
                if buffer is not None:
                    before.append((buffer, buffer.data))
                    buffer.data = drawn.to(buffer)
        yield
    finally:
        for tensor, data in reversed(before):
            tensor.data = data


def _reset(module: nn.Module, path: str, seed: int) -> dict[str, Tensor]:
    """What a module's own function makes of its floating tensors, by name."""
    reset = next((getattr(module, name) for name in _RESETS if hasattr(module, name)), None)
    if reset is None:
        return {}
    (stream,) = stream_keys(seed, [path], "random weights").tolist()
    with untouched(module), torch.no_grad(), seeded(stream, torch.device("cpu")):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(_unfilled(parameter), False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = _unfilled(buffer)
        try:
            reset()
        except Exception as error:
            raise Unsupported(
                f"layer {path!r} cannot be drawn anew: its {reset.__name__} fails "
                f"({type(error).__name__}: {error})"
            ) from error
        own = {**module._parameters, **module._buffers}
    return {
        name: value.detach()
        for name, value in own.items()
        if value is not None and value.is_floating_point() and not value.isnan().any()
    }


def _unfilled(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu().clone()
    return torch.full(tensor.shape, torch.nan, dtype=torch.float32)


def _like(parameter: Tensor, name: str, seed: int) -> Tensor:
    values = parameter.cpu().double()  # a mean is rounded alike on every device
    noise = normal(stream_keys(seed, [name], "random weights"), values.numel())
    drawn = noise.view(values.shape).to(values)
    return values.mean() + values.std(correction=0) * drawn


@dataclass(frozen=True)
class Compared(Again[Tensor]):
    """How alike a method's map is to those that it makes of the same image in other ways.

    Args:
        sign: how both are read.
    """

    sign: Sign

    def again(self, on: Explanation) -> Generator[Explanation, None, None]:
        """One map after the other."""
        raise NotImplementedError

    def compute(self, on: Explanation) -> Tensor:
        """(N, S, 3): for each of S maps all similarities; NaN where that map is not finite."""
        maps, found = with_sign(on.saliency, self.sign), []
        with closing(self.again(on)) as others:  # whose weights must not outlive an error here
            for again in others:
                alike = similarities(maps, with_sign(again.saliency, self.sign))
                found.append(alike.where(again.finite[:, None], torch.nan))
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Randomised(Compared):
    """Similarities to the maps of the network with layers drawn anew, (N, stages, 3).

    Target and noise are those of the map itself. Weights differ with the seed alone, so that all
    images and methods meet the same networks.

    Args:
        order, stages: as in :func:`stage_groups`.
    """

    order: Order
    stages: Stages

    def times(self, model: Model) -> int:
        return len(stage_groups(model.net, self.order, self.stages))

    def again(self, on: Explanation) -> Generator[Explanation, None, None]:
        probe = on.probe
        net, _ = probe.model.net, probe.target  # which must be known before weights change
        groups = stage_groups(net, self.order, self.stages)
        if not groups:
            raise Unsupported("the network has no parameters that could be drawn anew")
        with ExitStack() as drawn:
            for group in groups:
                if self.order == "independent":
                    drawn.close()
                drawn.enter_context(drawn_anew(net, group, probe.seed))
                yield self.explained(probe.at(probe.inputs))


@dataclass(frozen=True)
class OtherClass(Compared):
    """Similarities to the map of another class, drawn from the image's own stream, (N, 1, 3).

    NaN where the network has one class alone.
    """

    def again(self, on: Explanation) -> Generator[Explanation, None, None]:
        probe = on.probe
        others = probe[Logits()].shape[1] - 1
        step = (probe.uniform("other class")[:, 0, 0].double() * others).long()
        target = (probe.target + 1 + step) % (others + 1)
        again = self.explained(probe.towards(target))
        again.finite &= others > 0
        yield again


def column(name: str) -> int:
    """Where a similarity stands among all."""
    return list(SIMILARITIES).index(name)  # type: ignore[arg-type]
