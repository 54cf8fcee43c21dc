"""Methods of captum: ``captum/<Class>``.

What captum takes as a tensor has a name here: a ``baseline``, a ``layer``, a grid of ``patches``.
Nothing of its result is changed but its shape.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import adapters
from ..adapters import Cost, Count, NotNegative, Parameter, Positive, fixed, signature
from ..autograd import module_at
from ..baselines import BaselineImage, BaselineName
from ..calls import GUIDED, RELEVANCE, RESCALE, Call, Kind, Separated, Windows
from ..errors import Unpriced, Unsupported
from ..features import FeatureLayout
from ..maps import CamSign, Channels, Upsampling, cam_map, reduced
from ..probe import Probe
from ..types import Model

SAMPLES_AT_ONCE = 32
"""Rows of one forward where captum lets nobody choose: more samples are explained in portions."""

_RULES = Literal[
    "gausslegendre", "riemann_left", "riemann_middle", "riemann_right", "riemann_trapezoid"
]
_EVERY: tuple[BaselineName, ...] = ("black", "mean", "white", "blur")
_GRID = "side of the grid of superpixels, which partition the image"

LIBRARY = adapters.Library(
    kind="methods",
    prefix="captum",
    title="captum",
    module="captum.attr",
    handled=(
        *("self", "forward_func", "model", "layer", "inputs", "target", "baselines", "kwargs"),
        *("feature_mask", "layer_mask", "sliding_window_shapes", "strides", "device_ids"),
        *("internal_batch_size", "perturbations_per_eval", "additional_forward_args"),
        *("return_convergence_delta", "return_input_shape", "show_progress", "verbose"),
    ),
    types={
        # captum's
        "attribute_to_layer_input": (bool, "explain what enters the layer, not what leaves it"),
        "eps": (Positive, "smaller differences are taken for none"),
        "interpolate_mode": (
            Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"],
            "how Grad-CAM's map grows",
        ),
        "method": (_RULES, "rule of the integral"),
        "multiply_by_inputs": (bool, "multiply by the difference to the baseline"),
        "n_samples": (Count, "samples per image"),
        "n_steps": (Count, "points of the integral"),
        "stdevs": (NotNegative, "standard deviation of noise in the network's input space"),
        # the adapter's
        "baseline": (BaselineName, "what absent pixels are"),
        "baselines": (
            Annotated[tuple[BaselineName, ...], Field(min_length=1)],
            "images to draw the path's beginning from",
        ),
        "channels": (Channels, "how colour channels become one map"),
        "layer": (str, "role or module path"),
        "patches": (Count, _GRID),
        "sign": (CamSign, "what is kept of the sum over the layer's channels"),
        "stride": (Count, "pixels from one window to the next"),
        "upsampling": (Upsampling, "how the layer's map grows"),
        "window": (Count, "side of the occluding square"),
    },
)


@dataclass(frozen=True)
class Facts(adapters.MethodFacts):
    """Of a method of captum.

    Args:
        kind: calls of the network that must be modules.
    """

    _: KW_ONLY
    kind: Kind | None = None


def _steps(forward: int, backward: int) -> Cost:
    return lambda method, model: (forward * method.n_steps, backward * method.n_steps)


def _averages(method: Any, model: Model) -> tuple[int, int]:
    """Of DeepLift's, over baselines."""
    return 2 * len(method.baselines), 2 * len(method.baselines)


def _fit(side: int, size: Sequence[int], words: str) -> None:
    """Checks that so many pixels, or patches, fit along each side.

    Raises:
        Unsupported: if they do not.
    """
    if side > min(size):
        raise Unsupported(f"{words} of {side} does not fit {size[0]} x {size[1]}")


def _occlusions(method: Any, model: Model) -> tuple[int, int]:
    if model.size is None:
        raise Unpriced(f"the number of windows depends on the size of {model.name!r}'s images")
    _fit(method.window, model.size, "a window")
    places = (-(-(side - method.window) // method.stride) + 1 for side in model.size)
    return math.prod(places) + 1, 0


def _superpixels(method: Any, model: Model) -> int:
    """How many there are."""
    side: int = method.patches
    if model.size is not None:
        _fit(side, model.size, "a grid")
    return side * side


def _shapley_values(method: Any, model: Model) -> tuple[int, int]:
    count = _superpixels(method, model)
    return math.factorial(count) * count + 1, 0


_AVERAGED = {
    "baselines": Parameter(
        Annotated[tuple[BaselineName, ...], Field(min_length=2)],
        _EVERY,
        "images that are averaged over",
    )
}
_DEEPLIFT = "Shrikumar et al. 2017, arXiv:1704.02685"
_SHAP = "Lundberg and Lee 2017, arXiv:1705.07874"
_GRADIENT_SHAP = "Erion et al. 2021, arXiv:1906.10670"
_IG = "Sundararajan et al. 2017, arXiv:1703.01365"
_GRAD_CAM = "Selvaraju et al. 2017, arXiv:1610.02391"
_LRP = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"
_SHAPLEY = "Castro et al. 2009, doi:10.1016/j.cor.2008.04.004"

CLASSES: dict[str, Facts] = {
    "Saliency": Facts(
        "gradient of the logit",
        "Simonyan et al. 2014, arXiv:1312.6034",
        fixed(1, 1),
        without=("abs",),
    ),
    "InputXGradient": Facts(
        "input times gradient", "Shrikumar et al. 2016, arXiv:1605.01713", fixed(1, 1)
    ),
    "Deconvolution": Facts(
        "only positive gradients pass a ReLU",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        fixed(1, 1),
        kind=GUIDED,
    ),
    "GuidedBackprop": Facts(
        "guided backpropagation",
        "Springenberg et al. 2015, arXiv:1412.6806",
        fixed(1, 1),
        kind=GUIDED,
    ),
    "GuidedGradCam": Facts(
        "guided backpropagation times Grad-CAM",
        _GRAD_CAM,
        fixed(2, 2),
        kind=GUIDED,
        maps_only=True,
    ),
    "IntegratedGradients": Facts("integrated gradients", _IG, _steps(1, 1)),
    "DeepLift": Facts("contributions by the rescale rule", _DEEPLIFT, fixed(2, 2), kind=RESCALE),
    "DeepLiftShap": Facts(
        "DeepLift, mean over baselines",
        _SHAP,
        _averages,
        kind=RESCALE,
        alone=True,
        fields=_AVERAGED,
    ),
    "GradientShap": Facts(
        "expected gradients at random points",
        _GRADIENT_SHAP,
        lambda method, model: (method.n_samples, method.n_samples),
        alone=True,
    ),
    "LRP": Facts("relevance by the epsilon rule", _LRP, fixed(2, 1), kind=RELEVANCE),
    "FeatureAblation": Facts(
        "drop of the logit without a superpixel",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        lambda method, model: (_superpixels(method, model) + 1, 0),
        is_signed=True,
    ),
    "Occlusion": Facts(
        "drop of the logit under a sliding square",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        _occlusions,
        is_signed=True,
        tolerance=1e-6,
    ),
    "ShapleyValueSampling": Facts(
        "sampled Shapley values of superpixels",
        _SHAPLEY,
        lambda method, model: (method.n_samples * _superpixels(method, model) + 1, 0),
        alone=True,
        tolerance=1e-6,
        is_signed=True,
    ),
    "ShapleyValues": Facts(
        "exact Shapley values of superpixels",
        _SHAPLEY,
        _shapley_values,
        # 3 x 3 would take 3.3 million forwards an image
        fields={"patches": Parameter(Annotated[int, Field(ge=1, le=2)], 2, _GRID)},
        tolerance=1e-6,
        is_signed=True,
    ),
    "Lime": Facts(
        "weights of a local linear model of superpixels",
        "Ribeiro et al. 2016, arXiv:1602.04938",
        lambda method, model: (method.n_samples, 0),
        alone=True,
        fields={"alpha": Parameter(Positive, 0.01, "weight of the Lasso's penalty")},
        tolerance=1e-6,
        is_signed=True,
    ),
    "KernelShap": Facts(
        "Shapley values of superpixels by regression",
        _SHAP,
        lambda method, model: (method.n_samples, 0),
        alone=True,
        tolerance=1e-6,
        is_signed=True,
    ),
    "LayerGradCam": Facts(
        "Grad-CAM of a layer",
        _GRAD_CAM,
        fixed(1, 1),
        without=("relu_attributions", "attr_dim_summation"),
        maps_only=True,
    ),
    "LayerGradientXActivation": Facts(
        "gradient times activation of a layer",
        "Ancona et al. 2018, arXiv:1711.06104",
        fixed(1, 1),
        without=("memory_efficient",),
    ),
    "LayerActivation": Facts(
        "sum of a layer's activations",
        "Captum (Kokhlikyan et al. 2020), arXiv:2009.07896",
        fixed(1, 0),
        class_agnostic=True,
    ),
    "LayerConductance": Facts(
        "conductance of a layer", "Dhamdhere et al. 2018, arXiv:1805.12233", _steps(2, 2)
    ),
    "InternalInfluence": Facts(
        "integrated gradients of a layer",
        "Leino et al. 2018, arXiv:1802.03788",
        _steps(1, 1),
    ),
    "LayerIntegratedGradients": Facts(
        "integrated gradients times a layer's change",
        _IG,
        lambda method, model: (method.n_steps + 2, method.n_steps),
    ),
    "LayerDeepLift": Facts(
        "the rescale rule down to a layer", _DEEPLIFT, fixed(2, 2), kind=RESCALE
    ),
    "LayerDeepLiftShap": Facts(
        "DeepLift of a layer, mean over baselines",
        _SHAP,
        _averages,
        kind=RESCALE,
        alone=True,
        fields=_AVERAGED,
    ),
    "LayerGradientShap": Facts(
        "expected gradients of a layer at random points",
        _GRADIENT_SHAP,
        lambda method, model: (3 * method.n_samples, method.n_samples),
        alone=True,
    ),
    "LayerLRP": Facts(
        "relevance of a layer by the epsilon rule",
        _LRP,
        fixed(2, 1),
        kind=RELEVANCE,
        without=("attribute_to_layer_input",),
    ),
    "LayerFeatureAblation": Facts(
        "drop of the logit without a patch of a layer",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        lambda method, model: (method.patches**2 + 2, 0),
        at_most=True,
        maps_only=True,
        fields={"layer_baselines": Parameter(float, 0.0, "what absent patches of the layer are")},
    ),
}

_NEURON = "explains a neuron of a layer, not the target class; captum/Layer... explain layers"
_PERMUTES = "mixes the images of a batch, so that a map would depend on its neighbours"
_BASIS = "is a base class of other methods"

REFUSED: dict[str, str] = {
    "Attribution": _BASIS,
    "DataLoaderAttribution": "explains a whole data set at once",
    "FeaturePermutation": _PERMUTES,
    "GradientAttribution": _BASIS,
    "LLMAttribution": "explains text",
    "LLMGradientAttribution": "explains text",
    "LayerAttribution": _BASIS,
    "LayerFeaturePermutation": _PERMUTES,
    "LimeBase": "is given by functions, which no suite can hold; captum/Lime uses captum's own",
    "NeuronAttribution": _NEURON,
    "NeuronConductance": _NEURON,
    "NeuronDeconvolution": _NEURON,
    "NeuronDeepLift": _NEURON,
    "NeuronDeepLiftShap": _NEURON,
    "NeuronFeatureAblation": _NEURON,
    "NeuronGradient": _NEURON,
    "NeuronGradientShap": _NEURON,
    "NeuronGuidedBackprop": _NEURON,
    "NeuronIntegratedGradients": _NEURON,
    "NoiseTunnel": (
        "wraps another method; over the gradient it is smooth_grad, smooth_grad_squared or var_grad"
    ),
    "PerturbationAttribution": _BASIS,
    "RemoteLLMAttribution": "explains text",
}
"""What captum exports that cannot serve, and why."""


class Captum(adapters.MethodAdapter):
    """A class of ``captum.attr``."""

    library = LIBRARY
    facts: ClassVar[Facts]

    def __post_init__(self) -> None:
        stride, window = getattr(self, "stride", 1), getattr(self, "window", math.inf)
        if stride > window:
            raise ValueError(f"stride {stride} leaves gaps between windows of {window}")

    def __call__(self, probe: Probe) -> Tensor:
        path = probe.model.layer(getattr(self, "layer", ""))
        layout = self.layout(probe, path) if path else None
        network = self.network(probe, path)
        target = probe.target

        def explain(part: slice) -> Tensor:
            given = self.arguments(probe, part, layout)
            if "target" in self.takes:
                given["target"] = target[part]
            inputs = probe.inputs[part].detach().clone()
            # captum hooks what is before a layer too, and can do so only where gradients flow
            inputs.requires_grad_(isinstance(network, Separated))
            portions = [
                share * _only(explainer.attribute(inputs, **{**given, **samples}))
                for samples, share in self.portions()
            ]
            return self.map(torch.stack(portions).sum(0).to(inputs.dtype), inputs, layout)

        with self.at_work(probe):
            explainer = self.explainer(network, probe, path)
            return self.explained(probe, explain, self.facts.alone or _pools(network))

    def network(self, probe: Probe, path: str) -> Any:
        """What is explained: the network, or its calls as modules where captum hooks modules."""
        kind = self.facts.kind
        if kind is None:
            return probe.model.logits
        try:
            with probe.meter.padded(0, 1):
                return Separated(
                    probe.model.net, probe.inputs[:1], kind, path if kind is RELEVANCE else ""
                )
        except Unsupported as error:
            raise Unsupported(f"{self.name}: {error}") from error

    def explainer(self, network: Any, probe: Probe, path: str) -> Any:
        own: Any = self
        given = self.given(self.made)
        if path:
            given["layer"] = getattr(network, "marked", None) or module_at(probe.model.net, path)
        if "interpretable_model" in self.takes and "alpha" in self.facts.fields:
            models = importlib.import_module("captum._utils.models.linear_model")
            given["interpretable_model"] = models.SkLearnLasso(alpha=own.alpha)
        if self.facts.kind is RELEVANCE:
            rules = importlib.import_module("captum.attr._utils.lrp_rules")
            for call in network.calls:
                if isinstance(call, Call):
                    call.rule = rules.EpsilonRule()
        return self.theirs()(network, **given)

    def arguments(self, probe: Probe, part: slice, layout: FeatureLayout | None) -> dict[str, Any]:
        """What captum's call takes besides inputs and target."""
        own: Any = self
        inputs, given = probe.inputs[part], self.given(self.called)
        if "abs" in self.takes:
            given["abs"] = False  # channels says what becomes of signs
        if "baselines" in self.takes:
            names = own.baselines if hasattr(self, "baselines") else (own.baseline,)
            images = (probe[BaselineImage(name)].expand_as(probe.inputs) for name in names)
            given["baselines"] = torch.cat([image[part] for image in images])
        if "feature_mask" in self.takes:
            given["feature_mask"] = _grid(own.patches, inputs.shape[2:], inputs.device)
        if "layer_mask" in self.takes and layout:
            side = min(own.patches, *layout.size)
            given["layer_mask"] = _grid(side, layout.size, inputs.device)
        if "sliding_window_shapes" in self.takes:
            channels = inputs.shape[1]
            _fit(own.window, inputs.shape[2:], "a window")
            given["sliding_window_shapes"] = (channels, own.window, own.window)
            given["strides"] = (channels, own.stride, own.stride)
        if "internal_batch_size" in self.takes:
            given["internal_batch_size"] = probe.chunk
        if "perturbations_per_eval" in self.takes:
            given["perturbations_per_eval"] = max(1, probe.chunk // len(inputs))
        return given

    def portions(self) -> list[tuple[dict[str, int], float]]:
        """Samples of each call, with their share, where captum forwards them all at once."""
        if "n_samples" not in self.called or "perturbations_per_eval" in self.takes:
            return [({}, 1.0)]
        own: Any = self
        starts = range(0, own.n_samples, SAMPLES_AT_ONCE)
        counts = [min(SAMPLES_AT_ONCE, own.n_samples - start) for start in starts]
        return [({"n_samples": count}, count / own.n_samples) for count in counts]

    def map(self, attribution: Tensor, inputs: Tensor, layout: FeatureLayout | None) -> Tensor:
        own: Any = self
        if layout and hasattr(self, "upsampling"):
            return cam_map(layout.grid(attribution).sum(1), inputs, own.sign, own.upsampling)
        if hasattr(self, "channels"):
            return reduced(attribution, own.channels)
        return attribution[:, 0]  # the same in each channel


def _only(attribution: Any) -> Tensor:
    """Of the layer's one tensor; captum sometimes returns a tuple of it."""
    found: Tensor = attribution[0] if isinstance(attribution, tuple | list) else attribution
    return found


def _pools(network: Any) -> bool:
    """Whether captum's rule for max pooling is at work, which reads the batch's first image."""
    return isinstance(network, Separated) and any(isinstance(c, Windows) for c in network.calls)


def _grid(side: int, size: Sequence[int], device: torch.device) -> Tensor:
    """Patches of a grid of side x side over H x W, numbered from 0, (1, 1, H, W).

    Raises:
        Unsupported: if there are more patches than pixels along a side.
    """
    _fit(side, size, "a grid")
    rows, columns = (torch.arange(n, device=device) * side // n for n in size)
    return (rows[:, None] * side + columns)[None, None]


def _method(name: str) -> type:
    """The registered class behind a name."""
    facts, theirs = CLASSES[name], LIBRARY.theirs(name)
    made, called = signature(theirs.__init__), signature(theirs.attribute)
    words = [f"It is {theirs.__module__}.{name}, whose results are not changed but in shape."]
    if facts.kind is not None:
        words.append(
            "Activations that are functions, or that the network uses twice, are modules of their "
            "own to the library; what it would get wrong all the same is refused."
        )
    defaults = _defaults(theirs, {**made, **called})
    return adapters.method(name, Captum, facts, defaults, (made, called), words)


def _defaults(theirs: Any, takes: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a method, the adapter's among them."""
    found: dict[str, Any] = {}
    if "layer" in takes:
        found["layer"] = "last_conv"
    if takes.get("baselines") is adapters.REQUIRED:
        found["baselines"] = _EVERY
    elif "baselines" in takes:
        found["baseline"] = "black"
    if "sliding_window_shapes" in takes:
        found |= {"window": 15, "stride": 8}
    if {"feature_mask", "layer_mask"} & takes.keys():
        found["patches"] = 7
    found |= LIBRARY.plain(takes)
    if issubclass(theirs, LIBRARY.theirs("LayerAttribution")):
        found |= {"sign": "positive", "upsampling": "bilinear"}
    elif not {"window", "patches"} & found.keys():
        found["channels"] = "absolute_sum"
    return found


LIBRARY.offer(CLASSES, _method, REFUSED, __name__)
