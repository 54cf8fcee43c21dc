"""Calls as modules: for libraries that explain a network by hooking its modules.

captum's DeepLift, LRP, guided backpropagation and deconvolution do. They are wrong, mostly in
silence, where an activation is a function such as ``F.relu``, where one module is called twice, as
in torchvision's ResNets, where hooked modules follow one another directly, where the windows of a
max pooling overlap, and where something is not linear that they take for linear (captum#1082 and
pull request 1843).

:class:`Separated` runs the network as it is, while every call in question is answered by a module
that exists for this call alone. Nothing is traced, so that any network will do whose calls do not
depend on the image; what no module answers is looked up in the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .autograd import module_at, operations_behind, rerouted
from .errors import Unsupported

_MOVES = {
    "AccumulateGrad", "Alias", "AsStrided", "Cat", "Clone", "ConstantPadNd", "Expand", "Flip",
    "Index", "IndexSelect", "Permute", "PixelShuffle", "PixelUnshuffle", "Repeat", "ReshapeAlias",
    "Roll", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy",
    "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View",
}  # fmt: skip
"""Operations that move numbers from place to place."""

_SUMS = {
    "Add", "Mean", "Neg", "Rsub", "Sub", "Sum",
}  # fmt: skip
_PRODUCTS = {
    "AdaptiveAvgPool2D", "Addmm", "AvgPool2D", "Baddbmm", "Bmm", "Convolution", "CudnnBatchNorm",
    "Div", "MiopenBatchNorm", "Mm", "Mul", "Mv", "NativeBatchNorm", "ReflectionPad2D",
    "ReplicationPad2D", "UpsampleBicubic2D", "UpsampleBilinear2D", "UpsampleNearest2D",
}  # fmt: skip
"""Linear as long as one factor alone depends on the image, as in evaluation mode."""

_RECTIFIERS = {
    "Clamp", "ClampMax", "ClampMin", "Hardtanh", "LeakyRelu", "Maximum", "PreluKernel", "Relu",
    "RreluWithNoise", "Threshold",
}  # fmt: skip

_WORDS = {"Hardtanh": "Hardtanh (as of ReLU6)", "Relu": "Relu (compiled)"}


@dataclass(frozen=True)
class Kind:
    """Which calls become modules, and what may stand beside them.

    Args:
        words: what asks for it, for messages.
        modules: name of a torch function to what builds its module, from the call's arguments after
            the first.
        ruled: functions whose calls become a :class:`Call`, for a rule to be set on it.
        allows: whether an operation that no module answers, by name and graph node, is harmless.
        needs_one: whether a network without any of ``modules`` is refused.
    """

    words: str
    modules: Mapping[str, Callable[..., nn.Module]]
    allows: Callable[[str, Any], bool]
    ruled: frozenset[str] = frozenset()
    needs_one: bool = False


class Windows(nn.Module):
    """Max pooling whose windows may overlap or be padded: they are laid out as tiles first.

    captum credits a pixel that is the maximum of two windows with one of them.
    """

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        if return_indices:
            raise Unsupported("max pooling that returns indices is not covered")
        self.geometry = tuple(
            zip(*map(_pair, (kernel_size, stride or kernel_size, padding, dilation)), strict=True)
        )
        self.ceil_mode = ceil_mode
        self.pool = nn.MaxPool2d(_pair(kernel_size))

    def forward(self, inputs: Tensor) -> Tensor:
        tiles = inputs
        for axis, (size, stride, before, dilation) in zip((2, 3), self.geometry, strict=True):
            side, reach = inputs.shape[axis], dilation * (size - 1) + 1
            count, rest = divmod(side + 2 * before - reach, stride)
            if self.ceil_mode and rest and (count + 1) * stride < side + before:
                count += 1  # one more window, unless it began beyond the image
            first = torch.arange(count + 1, device=inputs.device) * stride
            places = first[:, None] + torch.arange(size, device=inputs.device) * dilation
            after = max(0, count * stride + reach - before - side)
            ends = (before, after, 0, 0) if axis == 3 else (0, 0, before, after)
            # the lowest number, since differences of minus infinity are not a number
            tiles = functional.pad(tiles, ends, value=torch.finfo(inputs.dtype).min)
            tiles = tiles.index_select(axis, places.flatten())
        pooled: Tensor = self.pool(tiles)
        return pooled


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class Call(nn.Module):
    """One call of a function, as a module of the tensors that depend on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Callable[..., Tensor] = torch.clone

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


def _is_linear(name: str, node: Any) -> bool:
    parents = [parent for parent, _ in node.next_functions]
    if name in _PRODUCTS:
        is_divisor = name == "Div" and any(parents[1:])
        return sum(parent is not None for parent in parents) <= 1 and not is_divisor
    return name in _MOVES or name in _SUMS


_ELEMENTWISE: dict[str, Callable[..., nn.Module]] = {
    "relu": lambda inplace=False: nn.ReLU(),
    "leaky_relu": lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    "elu": lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
}

GUIDED = Kind(
    "the guided rule",
    {"relu": _ELEMENTWISE["relu"]},
    lambda name, node: name not in _RECTIFIERS,
    needs_one=True,
)
RESCALE = Kind("the rescale rule", {**_ELEMENTWISE, "max_pool2d": Windows}, _is_linear)
RELEVANCE = Kind(
    "relevance propagation",
    {name: _ELEMENTWISE[name] for name in ("relu", "tanh")},
    lambda name, node: name in _MOVES,
    ruled=frozenset(
        (
            "adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "conv2d", "iadd", "linear",
            "max_pool2d", "mean", "radd",
        )
    ),
)  # fmt: skip
"""Gradients pass ReLU by a rule of its own; multipliers are differences' quotients; relevance is
shared out among inputs."""


class Separated(nn.Module):
    """A network in which every call of a kind is a module of its own, called once in a forward.

    Who walks over its modules finds these alone; the network's own stay as they are, so that one of
    them can be hooked as well.

    Args:
        net: prepared network.
        example: (1, 3, H, W), forwarded twice to find the calls.
        kind: which calls.
        layer: path of a module whose output gets a :class:`Call` of its own, ``marked``.

    Raises:
        Unsupported: if an operation is not covered, or the calls differ between two forwards.
    """

    def __init__(self, net: nn.Module, example: Tensor, kind: Kind, layer: str = "") -> None:
        super().__init__()
        self._net = (net,)  # modules by themselves would be registered and walked over
        self._kind = kind
        self._layer = layer
        self._found: list[tuple[str, nn.Module | None, tuple[bool, ...]]] = []
        self._answered: set[Any] = set()
        self._cut: dict[int, Tensor] = {}  # kept alive, so that no other has the same id
        self._hidden: set[str] = set()
        self._is_built = False
        self._at = 0
        self.calls = nn.ModuleList()
        self._marked: tuple[Call, ...] = ()
        with torch.enable_grad():
            plain = net(example)
            logits = self(example.detach().clone().requires_grad_())
        self._check(logits, plain)
        self._answered.clear()
        self._cut.clear()
        self._is_built = True

    def forward(self, inputs: Tensor) -> Tensor:
        (net,) = self._net
        self._at = 0
        mark = rerouted(module_at(net, self._layer), self._mark) if self._layer else nullcontext()
        with mark, _Answering(self._answer):
            logits: Tensor = net(inputs)
        if self._at != len(self._found):
            raise self._changed()
        return logits

    @property
    def marked(self) -> Call | None:
        return self._marked[0] if self._marked else None

    def _check(self, logits: Tensor, plain: Tensor) -> None:
        words = self._kind.words
        uncovered = {
            _WORDS.get(name, name)
            for node, name in operations_behind(logits).items()
            if node not in self._answered and not self._kind.allows(name, node)
        }
        if uncovered:
            raise Unsupported(f"{words} does not cover {', '.join(sorted(uncovered))}")
        if self._hidden:
            raise Unsupported(
                f"{words} does not cover {', '.join(sorted(self._hidden))} of values of the image "
                "that have no gradient, such as a comparison"
            )
        if self._kind.needs_one and not len(self.calls):
            raise Unsupported(f"{words} needs a ReLU; the map would be the plain gradient's")
        if (logits - plain).abs().max() > 1e-4 * plain.abs().max():
            raise Unsupported(
                f"{words} needs activations as modules, with which the network gives other "
                "logits: it relies on what an activation changes in place"
            )

    def _changed(self) -> Unsupported:
        return Unsupported(
            f"{self._kind.words} needs the same calls in every forward, and this network's change"
        )

    def _mark(self, output: Tensor) -> Tensor:
        answer: Tensor = self._ruled("mark", torch.clone, (output,), {})
        return answer

    def _answer(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        if name in self._kind.modules:
            return self._module(name, function, args, kwargs)
        if name in self._kind.ruled:
            return self._ruled(name, function, args, kwargs)
        output = function(*args, **kwargs)
        if not self._is_built:
            self._watch(name, tuple(_tensors((args, kwargs))), output)
        return output

    def _watch(self, name: str, given: Sequence[Tensor], output: Any) -> None:
        """Notes where a value of the image comes back that the graph does not show.

        ``x * (x > 0)`` is a ReLU, and the graph says that it is linear.
        """
        has_gradient = any(tensor.requires_grad for tensor in given)
        is_cut = any(id(tensor) in self._cut for tensor in given)
        if has_gradient and is_cut:
            self._hidden.add(name)
        if (has_gradient or is_cut) and not name.endswith(("_like", "zeros", "ones", "full")):
            for tensor in _tensors(output):
                if not tensor.requires_grad:
                    self._cut[id(tensor)] = tensor

    def _module(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        inputs, *rest = args if args else (kwargs["input"],)
        named = {key: value for key, value in kwargs.items() if key != "input"}
        module, _ = self._next(name, (inputs,), lambda: self._kind.modules[name](*rest, **named))
        if module is None:
            return function(*args, **kwargs)
        return self._through(module, (inputs,))

    def _ruled(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        if name in ("add", "iadd", "radd"):
            function = torch.add  # not in place
        tensors = tuple(_tensors((args, kwargs)))
        module, depends = self._next(name, tensors, Call)
        if module is None:
            return function(*args, **kwargs)
        assert isinstance(module, Call)
        if name == "mark":
            self._marked = (module,)

        def run(*given: Tensor) -> Any:
            dependent = iter(given)
            every = iter(
                [next(dependent) if mine else t for t, mine in zip(tensors, depends, strict=True)]
            )
            new_args, new_kwargs = _replaced((tuple(args), dict(kwargs)), every)
            return function(*new_args, **new_kwargs)

        module.run = run
        return self._through(
            module, tuple(t for t, mine in zip(tensors, depends, strict=True) if mine)
        )

    def _next(
        self, name: str, tensors: Sequence[Tensor], build: Callable[[], nn.Module]
    ) -> tuple[nn.Module | None, tuple[bool, ...]]:
        """The module of the call that comes next, and on which tensors it depends."""
        if not self._is_built:
            depends = tuple(tensor.requires_grad for tensor in tensors)
            module = build() if any(depends) else None
            self._found.append((name, module, depends))
            if module is not None:
                self.calls.append(module)
        elif self._at == len(self._found) or self._found[self._at][0] != name:
            raise self._changed()
        _, module, depends = self._found[self._at]
        self._at += 1
        return module, depends

    def _through(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        # as clones, since hooks of two neighbours on one tensor would act in the wrong order
        output = module(*(tensor.clone() for tensor in tensors))
        if not self._is_built and isinstance(output, Tensor):
            behind = {node for tensor in tensors for node in operations_behind(tensor)}
            self._answered |= operations_behind(output).keys() - behind
        return output


class _Answering(TorchFunctionMode):
    """Hands every torch function that is called inside to ``answer``."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.answer(func, args, kwargs or {})


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Nested arguments with their tensors replaced, in the order of :func:`_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: _replaced(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, tensors) for item in value)
    return value
