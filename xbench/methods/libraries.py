"""Methods of libraries: ``captum/<Class>`` and ``gradcam/<Class>`` (pytorch-grad-cam).

A library is imported when a suite names a class of it. What an adapter must know of a class beyond
its signature stands in two tables; the class behind a name is made on first use. Its parameters are
the library's own, with their defaults, where a suite can write them down: numbers, words, yes or
no. What the library takes as a tensor has a name here: a ``baseline``, a ``layer``, a grid of
``patches``. Functions cannot be given. Nothing of a library's result is changed but its shape.

A map depends on its own image: a class that draws random numbers, or that would mix the images of a
batch, explains them one by one, from each image's own stream.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import math
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import noise, registry
from ..autograd import module_at, recording, rerouted, untouched
from ..calls import GUIDED, RELEVANCE, RESCALE, Call, Kind, Separated, Windows
from ..errors import Unpriced, Unsupported, UsageError
from ..features import FeatureLayout
from ..layers import layer_facts
from ..maps import CamSign, Channels, Upsampling, cam_map, reduced
from ..masking import BaselineImage, BaselineName
from ..probe import Logits, Probe, filled
from ..types import Model, Passes

_Count = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]

SAMPLES_AT_ONCE = 32
"""Rows of one forward where captum lets nobody choose: more samples are explained in portions."""


@dataclass(frozen=True)
class Facts:
    """What the signature of a library's class does not tell.

    Args:
        what: the map in words, for the first line of the docstring.
        source: who published it.
        passes: forward and backward passes per image, of a method and a model.
        at_most: whether ``passes`` are an upper bound.
        alone: whether images are explained one by one.
        kind: calls of the network that must be modules.
        without: parameters that have no effect here, or that another one covers.
        fields: parameters of the adapter's, or with another type or default than the library's, by
            name: (type, default, words).
        is_signed: whether maps have both signs by default.
        maps_only: whether a layer must return feature maps, not tokens.
        class_agnostic: whether all classes get the same map.
        target: class of pytorch-grad-cam that chooses what is differentiated.
        tolerance: between batch sizes, where the library computes in float32.
        remark: a paragraph of the docstring.
    """

    what: str
    source: str
    passes: Callable[[Any, Model], tuple[int, int]]
    at_most: bool = False
    alone: bool = False
    kind: Kind | None = None
    without: tuple[str, ...] = ()
    fields: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    is_signed: bool = False
    maps_only: bool = False
    class_agnostic: bool = False
    target: str = "ClassifierOutputTarget"
    tolerance: float | None = None
    remark: str = ""


_METHOD = Literal[
    "gausslegendre", "riemann_left", "riemann_middle", "riemann_right", "riemann_trapezoid"
]
_CAMS = Literal[
    "GradCAM", "GradCAMElementWise", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM"
]
_Several = Annotated[tuple[BaselineName, ...], Field(min_length=2)]
_EVERY: tuple[BaselineName, ...] = ("black", "mean", "white", "blur")
_MEAN = "images that are averaged over"
_GRID = "side of the grid of superpixels, which partition the image"

PARAMETERS: dict[str, tuple[Any, str]] = {
    # the libraries'
    "alpha": (_NotNegative, "weight of the similar classes' logits"),
    "attribute_to_layer_input": (bool, "explain what enters the layer, not what leaves it"),
    "aug_smooth": (bool, "mean over the image and its mirror image at three contrasts"),
    "base_method": (_CAMS, "the library's class that makes each map"),
    "eigen_smooth": (bool, "principal component of the weighted maps, of arbitrary sign, not sum"),
    "eps": (_Positive, "smaller differences are taken for none"),
    "gamma": (_Positive | None, "of the kernel; None is 1 / number of channels"),
    "interpolate_mode": (
        Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"],
        "how Grad-CAM's map grows",
    ),
    "k": (_NotNegative, "standard deviations above the mean from which a pixel counts"),
    "kernel": (Literal["linear", "poly", "rbf", "sigmoid", "cosine"], "of the components"),
    "method": (_METHOD, "rule of the integral"),
    "multiply_by_inputs": (bool, "multiply by the difference to the baseline"),
    "n_samples": (_Count, "samples per image"),
    "n_steps": (_Count, "points of the integral"),
    "num_scales": (_Count, "sizes of the image"),
    "pool": (Literal["mean", "max"], "how windows are joined"),
    "pre_filter_ratio": (Annotated[float, Field(ge=0, lt=1)], "share of windows left out"),
    "ratio_channels_to_ablate": (Annotated[float, Field(gt=0, le=1)], "share of channels ablated"),
    "scales": (tuple[_Count, ...] | None, "sizes of the image; None takes the next two"),
    "scale_step_ratio": (_Positive, "from one size to the next, as a share of the window"),
    "smooth": (bool, "blur the joined map"),
    "stdevs": (_NotNegative, "standard deviation of noise in the network's input space"),
    "step_size": (_Count | None, "between windows; None is the window's size"),
    "theta": (_NotNegative, "values below are left out of the mean"),
    "use_softmax_scores": (bool, "weigh windows by probability, not by logit"),
    "window_size": (_Count | None, "of the windows; None is the image's shorter side"),
    # the adapters'
    "baseline": (BaselineName, "what absent pixels are"),
    "baselines": (
        Annotated[tuple[BaselineName, ...], Field(min_length=1)],
        "images to draw the path's beginning from",
    ),
    "channels": (Channels, "how colour channels become one map"),
    "layer": (str, "role or module path"),
    "patches": (_Count, _GRID),
    "sign": (CamSign, "what is kept of the sum over the layer's channels"),
    "stride": (_Count, "pixels from one window to the next"),
    "upsampling": (Upsampling, "how the layer's map grows"),
    "window": (_Count, "side of the occluding square"),
}
"""Types, with the bounds outside which a library would fail, and words for the docstrings."""


def _fixed(forward: int, backward: int) -> Callable[[Any, Model], tuple[int, int]]:
    return lambda method, model: (forward, backward)


def _steps(forward: int, backward: int) -> Callable[[Any, Model], tuple[int, int]]:
    return lambda method, model: (forward * method.n_steps, backward * method.n_steps)


def _cams(forward: int, backward: int) -> Callable[[Any, Model], tuple[int, int]]:
    return _viewed(_fixed(forward, backward))


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


def _channels(method: Any, model: Model) -> tuple[int, int]:
    """Of Score-CAM: a forward for the maps, and one for each."""
    return 1 + layer_facts(model, method.layer).channels, 0


def _ablations(method: Any, model: Model) -> tuple[int, int]:
    """Of Ablation-CAM: two forwards to begin with; the top and the low channels are ablated."""
    channels, share = layer_facts(model, method.layer).channels, method.ratio_channels_to_ablate
    return 2 + (channels if share == 1 else 2 * int(channels * share)), 0


def _windows(method: Any, model: Model) -> tuple[int, int]:
    """Of SESS: every window is scored, and those that are kept are explained."""
    if model.size is None:
        raise Unpriced(f"the number of windows depends on the size of {model.name!r}'s images")
    short, long = sorted(model.size)
    window = method.window_size or short
    step = method.step_size or window
    growth = round(window * method.scale_step_ratio)
    scales = method.scales or [window + growth * at for at in range(method.num_scales)]
    count = 0
    for scale in scales:
        sides = (scale, int(scale * long / short))
        count += math.prod(-(-max(0, side - window) // step) + 1 for side in sides)
    kept = count - int(count * method.pre_filter_ratio)
    return count + kept, kept


def _viewed(
    passes: Callable[[Any, Model], tuple[int, int]],
) -> Callable[[Any, Model], tuple[int, int]]:
    """Of a class of pytorch-grad-cam, which may look at six views of the image."""

    def viewed(method: Any, model: Model) -> tuple[int, int]:
        views = 6 if method.aug_smooth else 1
        forward, backward = passes(method, model)
        return views * forward, views * backward

    return viewed


_DEEPLIFT = "Shrikumar et al. 2017, arXiv:1704.02685"
_SHAP = "Lundberg and Lee 2017, arXiv:1705.07874"
_GRADIENT_SHAP = "Erion et al. 2021, arXiv:1906.10670"
_IG = "Sundararajan et al. 2017, arXiv:1703.01365"
_GRAD_CAM = "Selvaraju et al. 2017, arXiv:1610.02391"
_LRP = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"
_SHAPLEY = "Castro et al. 2009, doi:10.1016/j.cor.2008.04.004"

CAPTUM: dict[str, Facts] = {
    "Saliency": Facts(
        "gradient of the logit",
        "Simonyan et al. 2014, arXiv:1312.6034",
        _fixed(1, 1),
        without=("abs",),
    ),
    "InputXGradient": Facts(
        "input times gradient", "Shrikumar et al. 2016, arXiv:1605.01713", _fixed(1, 1)
    ),
    "Deconvolution": Facts(
        "only positive gradients pass a ReLU",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        _fixed(1, 1),
        kind=GUIDED,
    ),
    "GuidedBackprop": Facts(
        "guided backpropagation",
        "Springenberg et al. 2015, arXiv:1412.6806",
        _fixed(1, 1),
        kind=GUIDED,
    ),
    "GuidedGradCam": Facts(
        "guided backpropagation times Grad-CAM",
        _GRAD_CAM,
        _fixed(2, 2),
        kind=GUIDED,
        maps_only=True,
    ),
    "IntegratedGradients": Facts("integrated gradients", _IG, _steps(1, 1)),
    "DeepLift": Facts("contributions by the rescale rule", _DEEPLIFT, _fixed(2, 2), kind=RESCALE),
    "DeepLiftShap": Facts(
        "DeepLift, mean over baselines",
        _SHAP,
        lambda method, model: (2 * len(method.baselines), 2 * len(method.baselines)),
        kind=RESCALE,
        alone=True,
        fields={"baselines": (_Several, _EVERY, _MEAN)},
    ),
    "GradientShap": Facts(
        "expected gradients at random points",
        _GRADIENT_SHAP,
        lambda method, model: (method.n_samples, method.n_samples),
        alone=True,
    ),
    "LRP": Facts("relevance by the epsilon rule", _LRP, _fixed(2, 1), kind=RELEVANCE),
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
        fields={"patches": (Annotated[int, Field(ge=1, le=2)], 2, _GRID)},
        tolerance=1e-6,
        is_signed=True,
    ),
    "Lime": Facts(
        "weights of a local linear model of superpixels",
        "Ribeiro et al. 2016, arXiv:1602.04938",
        lambda method, model: (method.n_samples, 0),
        alone=True,
        fields={"alpha": (_Positive, 0.01, "weight of the Lasso's penalty")},
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
        _fixed(1, 1),
        without=("relu_attributions", "attr_dim_summation"),
        maps_only=True,
    ),
    "LayerGradientXActivation": Facts(
        "gradient times activation of a layer",
        "Ancona et al. 2018, arXiv:1711.06104",
        _fixed(1, 1),
        without=("memory_efficient",),
    ),
    "LayerActivation": Facts(
        "sum of a layer's activations",
        "Captum (Kokhlikyan et al. 2020), arXiv:2009.07896",
        _fixed(1, 0),
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
        "the rescale rule down to a layer", _DEEPLIFT, _fixed(2, 2), kind=RESCALE
    ),
    "LayerDeepLiftShap": Facts(
        "DeepLift of a layer, mean over baselines",
        _SHAP,
        lambda method, model: (2 * len(method.baselines), 2 * len(method.baselines)),
        kind=RESCALE,
        alone=True,
        fields={"baselines": (_Several, _EVERY, _MEAN)},
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
        _fixed(2, 1),
        kind=RELEVANCE,
        without=("attribute_to_layer_input",),
    ),
    "LayerFeatureAblation": Facts(
        "drop of the logit without a patch of a layer",
        "Zeiler and Fergus 2014, arXiv:1311.2901",
        lambda method, model: (method.patches**2 + 2, 0),
        at_most=True,
        maps_only=True,
        fields={"layer_baselines": (float, 0.0, "what absent patches of the layer are")},
    ),
}

_NO_SMOOTH = ("eigen_smooth",)
_SIGN = "The component's sign is the library's choice, which rounding can turn."

GRADCAM: dict[str, Facts] = {
    "GradCAM": Facts("Grad-CAM", _GRAD_CAM, _cams(1, 1)),
    "HiResCAM": Facts(
        "gradient times activation", "Draelos and Carin 2020, arXiv:2011.08891", _cams(1, 1)
    ),
    "GradCAMElementWise": Facts(
        "positive part of gradient times activation", "pytorch-grad-cam", _cams(1, 1)
    ),
    "GradCAMPlusPlus": Facts(
        "Grad-CAM++", "Chattopadhay et al. 2018, arXiv:1710.11063", _cams(1, 1)
    ),
    "XGradCAM": Facts("XGrad-CAM", "Fu et al. 2020, arXiv:2008.02312", _cams(1, 1)),
    "LayerCAM": Facts("LayerCAM", "Jiang et al. 2021, doi:10.1109/TIP.2021.3089943", _cams(1, 1)),
    "EigenCAM": Facts(
        "principal component of the feature maps",
        "Muhammad and Yeasin 2020, arXiv:2008.00299",
        _cams(1, 0),
        without=_NO_SMOOTH,
        remark=_SIGN,
        class_agnostic=True,
    ),
    "EigenGradCAM": Facts(
        "principal component of gradient times activation",
        "pytorch-grad-cam",
        _cams(1, 1),
        without=_NO_SMOOTH,
        remark=_SIGN,
    ),
    "SegEigenCAM": Facts(
        "principal part of |gradient| times activation",
        "Chung and Ying 2025, doi:10.3390/app15137562",
        _cams(1, 1),
        without=_NO_SMOOTH,
    ),
    "KPCA_CAM": Facts(
        "kernel principal component of the feature maps",
        "Karmani et al. 2024, arXiv:2410.00267",
        _cams(1, 0),
        without=_NO_SMOOTH,
        remark=_SIGN,
        alone=True,
        class_agnostic=True,
    ),
    "FEM": Facts(
        "feature maps by how rare their peaks are",
        "Fuad et al. 2020, hal-02963298",
        _cams(1, 0),
        without=_NO_SMOOTH,
        class_agnostic=True,
    ),
    "RandomCAM": Facts(
        "feature maps at random weights",
        "pytorch-grad-cam",
        _cams(1, 1),
        alone=True,
        class_agnostic=True,
    ),
    "ScoreCAM": Facts(
        "feature maps by the logit under their mask",
        "Wang et al. 2020, arXiv:1910.01279",
        _viewed(_channels),
        alone=True,
    ),
    "AblationCAM": Facts(
        "feature maps by the logit's drop without them",
        "Desai and Ramaswamy 2020, WACV",
        _viewed(_ablations),
        alone=True,
    ),
    "FullGrad": Facts(
        "gradients times input and times biases",
        "Srinivas and Fleuret 2019, arXiv:1905.00780",
        _cams(1, 1),
        without=("layer",),
    ),
    "ShapleyCAM": Facts(
        "second-order Grad-CAM of logit and log-probability",
        "Cai 2025, arXiv:2501.06261",
        _cams(1, 2),
        maps_only=True,
        target="ClassifierOutputReST",
        remark=(
            "What is differentiated is the logit plus the log-probability, as published; of the "
            "logit alone, the library fails where the head is linear."
        ),
    ),
    "FinerCAM": Facts(
        "Grad-CAM against similar classes",
        "Zhang et al. 2025, arXiv:2501.11309",
        _fixed(1, 1),
        fields={
            "comparison_categories": (
                Annotated[tuple[_Count, ...], Field(min_length=1)],
                (1, 2, 3),
                "classes to be told from, by place in the order of similar logits, from 1",
            ),
        },
    ),
    "RefineCAM": Facts(
        "product of several layers' maps",
        "arXiv:2605.14641",
        lambda method, model: (len(method.layers), len(method.layers)),
        without=("layer", *_NO_SMOOTH),  # the library hands eigen_smooth on as aug_smooth
        fields={
            "layers": (
                Annotated[tuple[str, ...], Field(min_length=1)],
                ("last_conv",),
                "roles or module paths",
            ),
        },
    ),
    "SESS": Facts(
        "maps of windows at several sizes, joined",
        "Tursun et al. 2022, arXiv:2207.01769",
        _windows,
        alone=True,
        maps_only=True,
    ),
}

_NEURON = "explains a neuron of a layer, not the target class; captum/Layer... explain layers"
_PERMUTES = "mixes the images of a batch, so that a map would depend on its neighbours"
_BASIS = "is a base class of other methods"

REFUSED: dict[str, dict[str, str]] = {
    "captum": {
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
            "wraps another method; over the gradient it is smooth_grad, smooth_grad_squared or "
            "var_grad"
        ),
        "PerturbationAttribution": _BASIS,
        "RemoteLLMAttribution": "explains text",
    },
    "gradcam": {
        "DeepFeatureFactorization": "finds concepts of several images, not a map of a class",
        "GuidedBackpropReLUModel": (
            "replaces all ReLUs of the network; use guided_backprop or captum/GuidedBackprop"
        ),
    },
}
"""What the libraries export that cannot serve, and why."""

_MODULES = {"captum": "captum.attr", "gradcam": "pytorch_grad_cam"}
_LIBRARIES = {"captum": "captum", "gradcam": "pytorch-grad-cam"}


@functools.cache
def _library_class(package: str, name: str) -> Any:
    """A class of a library, which is imported here.

    Raises:
        UsageError: if the library cannot be imported, or is of a version without the class.
    """
    try:
        module = importlib.import_module(_MODULES[package])
    except (ImportError, OSError) as error:
        raise UsageError(
            f"{package}/{name} needs {_LIBRARIES[package]}, which cannot be imported: {error}"
        ) from error
    if not hasattr(module, name):
        raise UsageError(f"the installed version of {_LIBRARIES[package]} has no class {name}")
    return getattr(module, name)


# --- what both libraries share --------------------------------------------------------------------


class _Adapter:
    """A library's class as a method; :func:`_method` adds the parameters and the facts.

    Attributes:
        name: such as "captum/DeepLift".
        facts: from the tables.
        made: parameters here that the library's constructor takes.
        called: parameters here that its call takes.
        takes: all parameters of both.
    """

    name: ClassVar[str]
    facts: ClassVar[Facts]
    made: ClassVar[tuple[str, ...]]
    called: ClassVar[tuple[str, ...]]
    takes: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        stride, window = getattr(self, "stride", 1), getattr(self, "window", math.inf)
        if stride > window:
            raise ValueError(f"stride {stride} leaves gaps between windows of {window}")

    def theirs(self) -> Any:
        """The library's class."""
        return _library_class(*self.name.split("/"))

    def layout(self, probe: Probe, path: str) -> FeatureLayout:
        """How to read the output of a layer.

        Raises:
            Unsupported: if the library's class cannot.
        """
        layout = _layout(probe, path)
        if self.facts.maps_only and layout.kind != "maps":
            raise Unsupported(
                f"{self.name} reads feature maps (N, C, h, w), and layer {path!r} returns "
                f"{'tokens' if layout.kind == 'tokens' else '(N, h, w, C)'}"
            )
        return layout

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def explained(self, probe: Probe, explain: Callable[[slice], Tensor], alone: bool) -> Tensor:
        """Maps of the whole batch at once, or one by one, each from its image's random stream.

        One by one, an image without finite logits gets a map of NaN, and the library never sees it.
        """
        if not alone:
            return explain(slice(None)).detach()
        streams = noise.stream_keys(probe.seed, probe.batch.keys[: probe.real], self.name)
        finite = probe[Logits()].isfinite().all(1).tolist()
        maps = torch.full_like(probe.inputs[:, 0], torch.nan)
        for at, stream in enumerate(streams.tolist()):
            if finite[at]:
                with noise.seeded(stream, probe.inputs.device), probe.meter.padded(1, 1):
                    maps[at] = explain(slice(at, at + 1)).detach()[0]
        return filled(maps[: probe.real], probe.rows)

    @contextlib.contextmanager
    def at_work(self, probe: Probe) -> Iterator[None]:
        """The library with gradients, without a word, on a network that is left as it was.

        Raises:
            Unsupported: where the library refuses the network, in its own words.
        """
        with (
            untouched(probe.model.net),
            torch.enable_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            _without_bars(self.theirs()),
        ):
            warnings.simplefilter("ignore")
            try:
                yield
            except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
                raise Unsupported(f"{self.name} refuses: {error}") from error
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                raise Unsupported(
                    f"{self.name} needs a layer that the network does not change in place "
                    f"afterwards; name one before it ({error})"
                ) from error


@contextlib.contextmanager
def _without_bars(theirs: Any) -> Iterator[None]:
    """No bar of progress from the module of a library's class; standard error stays as it is."""
    module = sys.modules[theirs.__module__]
    before = getattr(module, "tqdm", None)
    if before is not None:
        module.tqdm = types.SimpleNamespace(tqdm=iter)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is not None:
            module.tqdm = before  # type: ignore[attr-defined]


def _layout(probe: Probe, path: str) -> FeatureLayout:
    """How to read a layer's output; the first image's forward that tells counts as padding.

    Raises:
        Unsupported: if the layer does not run exactly once, or holds no grid of positions.
    """
    with (
        recording(probe.model.net, [path]) as (kept, refused),
        probe.meter.padded(0, 1),
        torch.no_grad(),
    ):
        probe.model.logits(probe.inputs[:1])
    if path in refused:
        raise Unsupported(f"layer {path!r} {refused[path]}")
    try:
        return FeatureLayout.of(kept[path].shape, probe.inputs[:1].shape)
    except Unsupported as error:
        raise Unsupported(f"layer {path!r} {error}") from None


# --- captum ---------------------------------------------------------------------------------------


class _Captum(_Adapter):
    """A class of ``captum.attr``."""

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


# --- pytorch-grad-cam -----------------------------------------------------------------------------


class _Front(nn.Module):
    """A network as pytorch-grad-cam may handle it.

    Gradients begin at the image, if nowhere else; those of parameters are not cleared; the first
    parameter tells the device.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.net = model.net
        self.logits = model.logits

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()
        return self.logits(inputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class _GradCAM(_Adapter):
    """A class of ``pytorch_grad_cam``; its maps are positive, scaled and upsampled as it does."""

    def __call__(self, probe: Probe) -> Tensor:
        model = probe.model
        paths = [model.layer(name) for name in getattr(self, "layers", ())]
        kinds = {self.layout(probe, path).kind for path in paths}
        if "ablation_layer" in self.takes and "maps_last" in kinds:
            raise Unsupported(
                f"{self.name} ablates the second axis of maps or the last of tokens, but layer "
                f"{paths[0]!r} returns (N, h, w, C); ablation_cam works there"
            )
        are_maps = kinds <= {"maps"}
        if not paths:
            _check_biases(probe)
        modules = [module_at(model.net, path) for path in paths]
        targets = self.targets(probe)
        with self.at_work(probe), contextlib.ExitStack() as stack:
            cam = self.explainer(probe, modules, are_maps)
            stack.callback(_forget, cam)
            for module in modules:  # what cam keeps must not be changed in place by what follows
                stack.enter_context(rerouted(module, torch.clone))
            differentiate = getattr(cam, "uses_gradients", True)

            def explain(part: slice) -> Tensor:
                inputs = probe.inputs[part].detach().clone()
                with torch.set_grad_enabled(differentiate):
                    maps = cam(inputs, targets[part], **self.given(self.called))
                return torch.from_numpy(maps).to(inputs)

            return self.explained(probe, explain, self.facts.alone)

    def explainer(self, probe: Probe, modules: list[nn.Module], are_maps: bool) -> Any:
        given = self.given(self.made)
        if not are_maps:
            image = probe.inputs.shape[1:]
            given["reshape_transform"] = lambda output: FeatureLayout.of(
                output.shape, (len(output), *image)
            ).grid(output)
        if "base_method" in given:
            given["base_method"] = _library_class("gradcam", given["base_method"])
        if "ablation_layer" in self.takes:  # the default is one object for all, with a memory
            name = "AblationLayer" if are_maps else "AblationLayerVit"
            given["ablation_layer"] = _library_class("gradcam", name)()
        if "batch_size" in self.takes:
            given["batch_size"] = probe.chunk
        cam = self.theirs()(_Front(probe.model, probe.inputs.device), modules, **given)
        cam.batch_size = probe.chunk  # ScoreCAM reads it, though its constructor has none
        return cam

    def targets(self, probe: Probe) -> list[Any]:
        """What is differentiated, one per image."""
        made = importlib.import_module("pytorch_grad_cam.utils.model_targets")
        classes = probe.target.tolist()
        if "comparison_categories" not in self.facts.fields:
            return [getattr(made, self.facts.target)(category) for category in classes]
        own: Any = self
        logits = probe[Logits()]
        places = [at for at in own.comparison_categories if at < logits.shape[1]]
        if not places:
            raise Unsupported(f"the network has {logits.shape[1]} classes, none of which compares")
        gaps = (logits - logits.gather(1, probe.target[:, None])).abs()
        order = gaps.argsort(dim=1, stable=True).tolist()
        return [
            made.FinerWeightedTarget(category, [row[at] for at in places], own.alpha)
            for category, row in zip(classes, order, strict=True)
        ]


def _forget(cam: Any) -> None:
    """Lets go of a CAM's records, which it would detach when it dies, and cannot where it looks at
    a part of a tensor.
    """
    for part in getattr(cam, "base_cam_per_layer", [getattr(cam, "base_cam", cam)]):
        part.activations_and_grads.activations = []
        part.activations_and_grads.gradients = []


def _check_biases(probe: Probe) -> None:
    """FullGrad pairs biases with gradients by order, so modules must run in the order they stand.

    Raises:
        Unsupported: if they do not.
    """
    paths = [
        path
        for path, module in probe.model.net.named_modules()
        if type(module) in (nn.Conv2d, nn.BatchNorm2d) and module.bias is not None
    ]
    with (
        recording(probe.model.net, paths) as (kept, _),
        probe.meter.padded(0, 1),
        torch.no_grad(),
    ):
        probe.model.logits(probe.inputs[:1])
    if list(kept) != paths:
        raise Unsupported(
            "pytorch-grad-cam's FullGrad pairs biases with gradients by their order, and this "
            "network's layers do not run once each in the order in which they stand"
        )


# --- from a name to a class -----------------------------------------------------------------------


_GIVEN = {
    "self", "model", "forward_func", "layer", "target_layers", "inputs", "input_tensor", "target",
    "targets", "baselines", "feature_mask", "layer_mask", "sliding_window_shapes", "strides",
    "internal_batch_size", "perturbations_per_eval", "batch_size", "show_progress", "verbose",
    "return_convergence_delta", "return_input_shape", "ablation_layer", "device_ids",
    "additional_forward_args", "kwargs",
}  # fmt: skip
"""Parameters that an adapter fills in, or that change no map."""


def _signatures(theirs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name to default of the constructor's parameters and of the call's."""
    call = getattr(theirs, "attribute", None) or theirs.__call__
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(call).parameters.values()):
        call = theirs.forward
    made, called = (
        {name: p.default for name, p in inspect.signature(function).parameters.items()}
        for function in (theirs.__init__, call)
    )
    return made, called


def _fields(package: str, theirs: Any, facts: Facts) -> dict[str, tuple[Any, Any, str]]:
    """Parameters of a method: name to type, default and words."""
    made, called = _signatures(theirs)
    takes = {**made, **called}
    fields: dict[str, Any] = {}
    if {"layer", "target_layers"} & takes.keys():
        fields["layer"] = "last_conv"
    if takes.get("baselines", ...) is inspect.Parameter.empty:
        fields["baselines"] = ("black", "mean", "white", "blur")
    elif "baselines" in takes:
        fields["baseline"] = "black"
    if "sliding_window_shapes" in takes:
        fields |= {"window": 15, "stride": 8}
    if {"feature_mask", "layer_mask"} & takes.keys():
        fields["patches"] = 7
    plain = (bool, int, float, str)
    offered = takes.keys() - _GIVEN
    fields |= {
        name: default.__name__ if isinstance(default, type) else default
        for name, default in takes.items()
        if name in offered and (name in PARAMETERS or type(default) in plain)
    }
    if package == "captum":
        if issubclass(theirs, _library_class("captum", "LayerAttribution")):
            fields |= {"sign": "positive", "upsampling": "bilinear"}
        elif "window" not in fields and "patches" not in fields:
            fields["channels"] = "absolute_sum"
    words = f"as in {_LIBRARIES[package]}"
    typed = {
        name: (*PARAMETERS.get(name, (type(default), words)), default)
        for name, default in fields.items()
        if name not in facts.without
    }
    found = {name: (kind, default, text) for name, (kind, text, default) in typed.items()}
    return {**found, **facts.fields}


def _summary(package: str, name: str) -> str:
    facts = TABLES[package][name]
    sign = "" if facts.is_signed else ", >= 0"
    return f"{name} of {_LIBRARIES[package]}: {facts.what}; (N, H, W){sign}."


def _docstring(package: str, name: str, fields: Mapping[str, Any], theirs: Any) -> str:
    facts, library = TABLES[package][name], _LIBRARIES[package]
    made, called = _signatures(theirs)
    absent = sorted((made.keys() | called.keys()) - fields.keys() - _GIVEN)
    parts = [_summary(package, name)]
    parts.append(f"It is {theirs.__module__}.{name}, whose results are not changed but in shape.")
    if package == "gradcam":
        parts[-1] += " The library scales them to [0, 1] and upsamples them, in float32."
    if facts.kind is not None:
        parts.append(
            "Activations that are functions, or that the network uses twice, are modules of their "
            "own to the library; what it would get wrong all the same is refused."
        )
    if facts.remark:
        parts.append(facts.remark)
    if facts.alone:
        parts.append("Images are explained one by one, random numbers being each image's own.")
    if absent:
        parts.append(f"Not offered: {', '.join(absent)}.")
    text = "\n\n".join(textwrap.fill(part, 100) for part in parts)
    arguments = "\n".join(f"    {key}: {words}." for key, (_, _, words) in fields.items())
    if arguments:
        text += f"\n\nArgs:\n{arguments}"
    layered = ", or a layer has no feature maps" if {"layer", "layers"} & fields.keys() else ""
    text += f"\n\nRaises:\n    Unsupported: if {library} cannot explain the network{layered}."
    return f"{text}\n\nSource: {facts.source}."


@functools.cache
def _method(package: str, name: str) -> type:
    """The registered class behind a name."""
    facts, theirs = TABLES[package][name], _library_class(package, name)
    fields = _fields(package, theirs, facts)
    made, called = _signatures(theirs)
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"{package}_{name}",
        "__doc__": _docstring(package, name, fields, theirs),
        "__annotations__": {key: kind for key, (kind, _, _) in fields.items()},
        **{key: default for key, (_, default, _) in fields.items()},
        "facts": facts,
        "made": tuple(fields.keys() & made.keys()),
        "called": tuple(fields.keys() & called.keys()),
        "takes": frozenset({**made, **called}),
        "needs": property(lambda self: (Logits(),)),
        "passes": lambda self, model: Passes(*facts.passes(self, model)),
    }
    if "layer" in fields:
        namespace["layers"] = property(lambda self: (self.layer,))
    if facts.at_most:
        namespace["passes_bound"] = True
    if facts.class_agnostic:
        namespace["class_agnostic"] = True
    if package == "gradcam" or facts.tolerance:
        namespace["tolerance"] = facts.tolerance or 1e-6
    base = _Captum if package == "captum" else _GradCAM
    made_class = type(f"{package}_{name}", (base,), namespace)
    return registry.declared(f"{package}/{name}", made_class)


TABLES = {"captum": CAPTUM, "gradcam": GRADCAM}

for _package, _table in TABLES.items():
    for _name in _table:
        registry.provide(
            "methods",
            f"{_package}/{_name}",
            functools.partial(_method, _package, _name),
            origin=__name__,
            summary=_summary(_package, _name),
        )
    for _name, _reason in REFUSED[_package].items():
        registry.refuse("methods", f"{_package}/{_name}", _reason)


def __getattr__(name: str) -> type:
    """The classes by their own names, such as ``captum_DeepLift``, as unpickling asks for them."""
    package, _, theirs = name.partition("_")
    if theirs not in TABLES.get(package, ()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _method(package, theirs)
