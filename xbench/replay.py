"""What follows a layer, run again for other feature maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import module_at
from .errors import Unsupported
from .types import Model


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
