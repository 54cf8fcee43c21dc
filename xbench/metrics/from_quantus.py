"""Metrics of Quantus: ``quantus/<Class>``.

Functions have names here, where Quantus offers a choice of its own.

Quantus sees one image at a time, in the network's input space. So a maximum over a batch is the
image's own. What Quantus is known to get wrong is mended by the way it is called, or refused with a
reason:

* absent pixels are a baseline of xbench, fixed and defined in pixel space; Quantus' "black" is the
  least value of the image as it stands, perturbed and normalised;
* a curve is given as its area over the share of its steps; Quantus adds up, by a function that
  NumPy 2.4 no longer has;
* pixels without a label are not shown to metrics that read masks; an image without a usable mask is
  ``failed: mask``, where some of Quantus' count a hit;
* constant and negative maps are scored; Quantus stops at the first of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from .. import adapters, registry
from ..adapters import Count, NotNegative, Parameter, Positive, one_by_one, signature
from ..autograd import module_at
from ..baselines import BaselineImage, BaselineName
from ..errors import Unpriced, Unsupported
from ..probe import Again, Explanation, Logits, Need, Probe
from ..types import Model, Passes

_Several = Annotated[int, Field(ge=2)]
_Correlation = Literal["correlation_pearson", "correlation_spearman", "correlation_kendall_tau"]
_Array = NDArray[Any]

CHANNELS = 3


@dataclass(frozen=True)
class Facts(adapters.Facts):
    """Of a metric of Quantus.

    Args:
        forwards: of the network per image, of a metric and a model.
        again: how often the method runs again per image, of a metric.
        range: of the score.
        masks: whether it reads object masks.
        curve: whether Quantus gives a curve.
        fill: what becomes of the features that Quantus perturbs: they go to the baseline, one after
            another ("gone"), each time from the image on ("afresh"), or they come back from the
            image ("back").
        reads: whether the score may be of logits or of probabilities.
        better: where Quantus has the wrong direction.
        fixed: what parameters that are not offered are given as, where it is not their default.
    """

    forwards: Callable[[Any, Model], int] = lambda metric, model: 0
    _: KW_ONLY
    again: Callable[[Any], int] | None = None
    range: tuple[float, float] = (0.0, math.inf)
    masks: bool = False
    curve: bool = False
    fill: Literal["gone", "afresh", "back"] | None = None
    reads: bool = False
    better: Literal["higher", "lower"] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _way_out(error: Exception) -> str:
    if "libGL" in str(error) or "cv2" in str(error):
        return (
            "; this is OpenCV without a display: install libGL (Debian's libgl1), or "
            "opencv-python-headless in the place of opencv-python"
        )
    return "; install quantus>=0.6"


_COMPARED = "how the two are compared"

LIBRARY = adapters.Library(
    kind="metrics",
    prefix="quantus",
    title="Quantus",
    module="quantus",
    handled=(
        *("self", "normalise_func_kwargs", "perturb_func_kwargs", "return_aggregate", "kwargs"),
        *("aggregate_func", "default_plot_func", "disable_warnings", "display_progressbar"),
        *("norm_numerator", "norm_denominator"),
    ),
    types={
        "abs": (bool, "take the map's absolute values"),
        "concept_influence": (bool, "divide by the mask's share of the image"),
        "eps": (NotNegative, "smaller values count as none"),
        "eps_min": (Positive, "in the place of zeros that would divide"),
        "features_in_step": (Count, "values of the image, three per pixel, that change together"),
        "k": (Count, "pixels at the top of the map"),
        "layer_names": (tuple[str, ...] | None, "module paths; None compares all layers"),
        "lower_bound": (
            Positive,
            "noise is uniform up to it, or from it where there is an upper one",
        ),
        "normalise": (
            bool,
            "scale the map by normalise_func, before its absolute values are taken",
        ),
        "normalise_func": (
            # its third, normalise_by_negative, reads memory that it never wrote
            Literal["normalise_by_max", "normalise_by_average_second_moment_estimate"],
            "how a map is scaled",
        ),
        "nr_runs": (_Several, "subsets"),
        "nr_samples": (Count, "samples per image"),
        "nr_steps": (Count, "translations, each explained again"),
        "patch_size": (Count, "side of the square patches, which must divide the image's sides"),
        "perturb_baseline": (BaselineName, "what absent pixels are"),
        "perturb_mean": (float, "of the noise, in the network's input space"),
        "perturb_patch_sizes": (
            Annotated[tuple[Count, ...], Field(min_length=1)],
            "sides of the square patches, which must divide the image's sides",
        ),
        "perturb_std": (Positive, "standard deviation of the noise, in the network's input space"),
        "regions_evaluation": (_Several, "patches that go, at most"),
        "return_nan_when_prediction_changes": (
            bool,
            "no score for an image where noise changes the predicted class",
        ),
        "segmentation_method": (Literal["slic", "felzenszwalb"], "how superpixels are found"),
        "similarity_func": (_Correlation, _COMPARED),
        "softmax": (bool, "read the target's probability, not its logit"),
        "subset_size": (Count, "values of the image, three per pixel, that change together"),
        "upper_bound": (Positive | None, "noise is uniform between both bounds, if there is one"),
    },
    way_out=_way_out,
)

_PEARSON = Parameter(_Correlation, "correlation_pearson", _COMPARED)
_SPEARMAN = Parameter(_Correlation, "correlation_spearman", _COMPARED)
_SSIM = Parameter(Literal["ssim", "correlation_spearman", "correlation_pearson"], "ssim", _COMPARED)
_GREY = Parameter(
    Literal["uniform", BaselineName],
    "uniform",
    "what absent pixels are; uniform is a random grey, another one for each sample",
)
_ANY = (-math.inf, math.inf)
_PER_CHANNEL = (
    "A feature is a channel's value, not a pixel: the map stands for each of its three channels."
)


def _sides(model: Model) -> tuple[int, int]:
    if model.size is None:
        raise Unpriced(f"the number of steps depends on the size of {model.name!r}'s images")
    return model.size


def _steps(metric: Any, model: Model) -> int:
    each: int = metric.features_in_step
    return math.ceil(CHANNELS * math.prod(_sides(model)) / each)


def _patches(side: int, model: Model) -> int:
    return math.prod(length // side for length in _sides(model))


def _segments(metric: Any, model: Model) -> int:
    raise Unpriced("the number of superpixels depends on the image")


def _checks(forwards: int) -> Callable[[Any, Model], int]:
    """Of a metric that adds noise: more where it looks whether the prediction stays."""

    def count(metric: Any, model: Model) -> int:
        looks = 2 if metric.return_nan_when_prediction_changes else 0
        fixed = forwards * (1 + metric.nr_samples)
        return int(fixed + looks * metric.nr_samples)

    return count


def _samples(metric: Any) -> int:
    return int(metric.nr_samples)


_BHATT = "Bhatt et al. 2020, arXiv:2005.00631"
_NGUYEN = "Nguyen and Martinez 2020, arXiv:2007.07584"
_YEH = "Yeh et al. 2019, arXiv:1901.09392"
_AGARWAL = "Agarwal et al. 2022, arXiv:2203.06877"
_MONTAVON = "Montavon et al. 2018, doi:10.1016/j.dsp.2017.10.011"
_ARRAS = "Arras et al. 2020, arXiv:2003.07258"
_RELATIVE = "Noise is uniform between 0.02 and 0.2 in the network's input space: no value shrinks."

CLASSES: dict[str, Facts] = {
    "FaithfulnessCorrelation": Facts(
        "correlation of attributions with drops, by subsets",
        _BHATT,
        lambda metric, model: 1 + metric.nr_runs,
        range=(-1.0, 1.0),
        fill="gone",
        reads=True,
        fields={"similarity_func": _PEARSON},
        remark=_PER_CHANNEL,
    ),
    "FaithfulnessEstimate": Facts(
        "correlation of attributions with drops, by steps",
        "Alvarez-Melis and Jaakkola 2018, arXiv:1806.07538",
        lambda metric, model: 1 + _steps(metric, model),
        range=(-1.0, 1.0),
        fill="gone",
        reads=True,
        fields={"similarity_func": _PEARSON},
        remark=_PER_CHANNEL,
    ),
    "PixelFlipping": Facts(
        "area of the score as features go, most relevant first",
        "Bach et al. 2015, doi:10.1371/journal.pone.0130140",
        _steps,
        curve=True,
        range=_ANY,
        fill="gone",
        reads=True,
        without=("return_auc_per_sample",),
        remark=f"{_PER_CHANNEL} The metric morf, preset quantus-0.6, has the same area of pixels.",
    ),
    "RegionPerturbation": Facts(
        "area of the score's drop as patches go, most relevant first",
        "Samek et al. 2017, arXiv:1509.06321",
        lambda metric, model: (
            1 + min(metric.regions_evaluation, _patches(metric.patch_size, model))
        ),
        curve=True,
        range=_ANY,
        fill="gone",
        reads=True,
        better="higher",
        without=("order",),
        remark="Quantus calls a lower score better, though it is the drop that is measured.",
    ),
    "Monotonicity": Facts(
        "whether the score never falls as features come, least relevant first",
        "Arya et al. 2019, arXiv:1909.03012",
        _steps,
        range=(0.0, 1.0),
        fill="back",
        reads=True,
        remark=(
            f"{_PER_CHANNEL} In Quantus itself features are replaced by the baseline that they are "
            "already, so that every map scores 1; here they come back from the image."
        ),
    ),
    "MonotonicityCorrelation": Facts(
        "rank correlation of attributions with spreads",
        _NGUYEN,
        lambda metric, model: 1 + metric.nr_samples * _steps(metric, model),
        range=(-1.0, 1.0),
        fill="gone",
        reads=True,
        fields={"similarity_func": _SPEARMAN, "perturb_baseline": _GREY},
        remark=_PER_CHANNEL,
    ),
    "Selectivity": Facts(
        "area of the score as patches go, most relevant first",
        _MONTAVON,
        lambda metric, model: _patches(metric.patch_size, model),
        curve=True,
        range=_ANY,
        fill="gone",
        reads=True,
    ),
    "IROF": Facts(
        "area over the score as superpixels go, most relevant first",
        "Rieger and Hansen 2020, arXiv:2003.08747",
        _segments,
        range=_ANY,
        fill="gone",
        reads=True,
        remark=(
            "The unit is superpixels, of which images have different numbers. An image that is one "
            "superpixel has no score."
        ),
    ),
    "Infidelity": Facts(
        "squared error of the map's account of what patches contribute",
        _YEH,
        lambda metric, model: 1 + sum(_patches(side, model) for side in metric.perturb_patch_sizes),
        fill="afresh",
        reads=True,
        without=("loss_func", "n_perturb_samples"),
        fixed={"n_perturb_samples": 1},
        remark=(
            "Each patch goes by itself, as published; in Quantus itself all the earlier ones stay "
            "away. Its samples do not differ and so are one. The score depends on the map's scale."
        ),
    ),
    "Continuity": Facts(
        "largest change of the map, relative to the image's, as the image moves",
        _MONTAVON,
        lambda metric, model: metric.nr_steps,
        again=lambda metric: 1 + int(metric.nr_steps),
        # the first two are not read, the last fails on NumPy 2
        without=("perturb_func", "perturb_baseline", "return_nan_when_prediction_changes"),
        remark=(
            "The map is the method's own, also where another one is scored. What moves in has the "
            "least value of the image: Quantus has no choice there."
        ),
    ),
    "LocalLipschitzEstimate": Facts(
        "largest change of the map relative to the noise",
        "Alvarez-Melis and Jaakkola 2018, arXiv:1806.08049",
        _checks(0),
        again=_samples,
        without=("similarity_func",),
    ),
    "MaxSensitivity": Facts(
        "largest change of the map under noise, relative to the map",
        _YEH,
        _checks(0),
        again=_samples,
        without=("similarity_func",),
    ),
    "AvgSensitivity": Facts(
        "mean change of the map under noise, relative to the map",
        _YEH,
        _checks(0),
        again=_samples,
        without=("similarity_func",),
    ),
    "RelativeInputStability": Facts(
        "largest relative change by that of the image",
        _AGARWAL,
        _checks(0),
        again=_samples,
        remark=_RELATIVE,
    ),
    "RelativeOutputStability": Facts(
        "largest relative change by that of the logits",
        _AGARWAL,
        _checks(1),
        again=_samples,
        reads=True,
        remark=_RELATIVE,
    ),
    "RelativeRepresentationStability": Facts(
        "largest relative change by that of layers",
        _AGARWAL,
        _checks(1),
        again=_samples,
        without=("layer_indices",),
        remark=_RELATIVE,
    ),
    "PointingGame": Facts(
        "whether a maximum of the map lies on the object",
        "Zhang et al. 2018, arXiv:1608.00507",
        range=(0.0, 1.0),
        masks=True,
        without=("weighted",),  # written into an array of truth values
    ),
    "TopKIntersection": Facts(
        "share of the top pixels that lie on the object",
        "Theiner et al. 2022, arXiv:2108.01335",
        masks=True,
    ),
    "RelevanceMassAccuracy": Facts(
        "share of the map's sum that lies on the object",
        _ARRAS,
        range=_ANY,
        masks=True,
        remark=(
            "The sum of a signed map may be anything; abs: true makes it a share. A map without a "
            "sum scores 0."
        ),
    ),
    "RelevanceRankAccuracy": Facts(
        "share of the object among as many top pixels",
        _ARRAS,
        range=(0.0, 1.0),
        masks=True,
    ),
    "AttributionLocalisation": Facts(
        "share of the map's magnitude that lies on the object",
        "Kohlbrenner et al. 2020, arXiv:1910.09840",
        range=(0.0, 1.0),
        masks=True,
        # the first two take the batch for the image, the others need or make signs
        without=("weighted", "max_size", "abs", "positive_attributions"),
    ),
    "AUC": Facts(
        "area under the curve of hits over false alarms",
        "Fawcett 2006, doi:10.1016/j.patrec.2005.10.010",
        range=(0.0, 1.0),
        masks=True,
    ),
    "Sparseness": Facts(
        "Gini index of the map",
        "Chalasani et al. 2020, arXiv:1810.06583",
        range=_ANY,
    ),
    "Complexity": Facts("entropy of the map", _BHATT, range=_ANY),
    "EffectiveComplexity": Facts("number of pixels above a threshold", _NGUYEN),
    "RandomLogit": Facts(
        "similarity to the map of a random other class",
        "Sixt et al. 2020, arXiv:1912.09818",
        again=lambda metric: 1,
        range=(-1.0, 1.0),
        without=("num_classes", "seed"),
        fields={"similarity_func": _SSIM},
        remark=(
            "Every image has a class of its own; Quantus draws one place in the list of classes "
            "for all. Its structural similarity is that of the pixels in a row."
        ),
    ),
    "NonSensitivity": Facts(
        "number of features that either the map or the network ignores",
        _NGUYEN,
        lambda metric, model: 1 + CHANNELS * math.prod(_sides(model)),
        fill="gone",
        reads=True,
        without=("features_in_step",),  # fails but for one
        remark=f"{_PER_CHANNEL} A forward for each of them: for small images.",
    ),
}

_BATCH = "compares the images of a batch, so that no image has a score of its own"
_COPIES = (
    "randomises copies of the network that nobody can count or seed per image; use "
    "model_randomisation"
)

REFUSED: dict[str, str] = {
    "BatchSufficiency": _BATCH,
    "Completeness": (
        "asks two sums of floats to be equal to the last bit, which rounding alone decides"
    ),
    "Consistency": _BATCH,
    "EfficientMPRT": _COPIES,
    "Focus": "needs mosaics of four images, which no data set here has",
    "InputInvariance": (
        "rewrites the bias of the module that stands first, and is right only where that is a "
        "convolution without padding; no test of xbench's takes its place"
    ),
    "MPRT": f"counts the unchanged network's similarity of 1 into the mean, and {_COPIES}",
    "ModelParameterRandomisation": f"is the old name of MPRT, which {_COPIES}",
    "ROAD": (
        "counts three channels of pixels that it has one of, and takes the first batch for all; "
        "use road, road_morf or road_lerf"
    ),
    "SensitivityN": (
        "correlates over the images of a batch, step by step, so that no image has a score of its "
        "own; use quantus/FaithfulnessCorrelation"
    ),
    "SmoothMPRT": f"explains with captum whatever method is to be scored, and {_COPIES}",
    "Sufficiency": _BATCH,
}
"""Classes that cannot serve, and why."""


# --- one image ------------------------------------------------------------------------------------


class _Network(nn.Module):
    """A network as Quantus may call it: arrays of float32 in, whatever its own type, logits out.

    Its modules are out of sight, since Quantus would take a softmax inside for the last layer, but
    where ``layers`` shows them to a metric that reads them.
    """

    def __init__(self, model: Model, like: Tensor, layers: bool) -> None:
        super().__init__()
        self.training = False
        self._given = (model, like)
        if layers:
            for name, module in model.net.named_children():
                self.add_module(name, module)

    def forward(self, inputs: Tensor) -> Tensor:
        model, like = self._given
        return model.logits(inputs.to(like))


@dataclass(frozen=True)
class Scores(Again[Tensor]):
    """(N,) float64 scores of maps by a class of Quantus; NaN where it finds none.

    Args:
        metric: the entry; the method is known to those that run it again.
    """

    metric: Any

    @property
    def facts(self) -> Facts:
        facts: Facts = self.metric.facts
        return facts

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        baseline: Any = getattr(self.metric, "perturb_baseline", "uniform")
        return (Logits(), *([] if baseline == "uniform" else [BaselineImage(baseline)]))

    def for_method(self, method: Any) -> Scores:
        return replace(self, method=method) if self.facts.again else self

    def times(self, model: Model) -> int:
        return self.facts.again(self.metric) if self.facts.again else 0

    def passes(self, model: Model) -> Passes:
        """What Quantus forwards, and what the method costs each time that it runs again.

        Raises:
            Unpriced: if that depends on the image, or its size is not known.
            Unsupported: if a parameter does not fit the size.
        """
        if model.size is not None:
            self.metric.fit(model.size)
        own = Passes(self.facts.forwards(self.metric, model), 0)
        return own.plus(super().passes(model))

    def compute(self, on: Explanation) -> Tensor:
        """The scores.

        Raises:
            Unsupported: if there are no masks, or maps were given without their method, where the
                class needs those; if a parameter does not fit the images.
        """
        probe, name = on.probe, self.metric.name
        if self.facts.masks and probe.batch.masks is None:
            raise Unsupported("the data set has no object masks")
        if self.facts.again and self.method is None:
            raise Unsupported(
                f"{name} runs the method again, but the maps were given without it; use "
                "xbench.evaluate, or a suite"
            )
        height, width = probe.inputs.shape[-2:]
        self.metric.fit((height, width))
        scores = torch.full_like(on.finite, torch.nan, dtype=torch.float64)
        with _mended():
            return one_by_one(name, probe, on.finite, lambda at: self.score(on, at), scores)

    def score(self, on: Explanation, at: int) -> float:
        """Of one image; NaN where Quantus finds none, or one that is infinite."""
        given = self.object(on, at) if self.facts.masks else self.image(on, at)
        if given is None:
            return math.nan
        params = dict(self.metric.constructor())
        if self.facts.fill:
            params["perturb_func"] = self.perturbation(on.probe, at)
            params["perturb_baseline"] = self.baseline(on.probe, at).reshape(1, -1)
        if self.metric.name == "quantus/RandomLogit":
            params["num_classes"] = on.probe[Logits()].shape[1]
            params["seed"] = int(np.random.randint(1 << 31))  # noqa: NPY002
        if "layer_names" in params:
            params["layer_names"] = self.modules(on.probe.model)
        scorer = self.metric.theirs()(**params)
        try:
            (score,) = scorer(channel_first=True, device="cpu", batch_size=1, **given)
        except AssertionError:  # parameters fit: it is this image that Quantus has no score for
            return math.nan
        if self.facts.curve:
            score = np.trapezoid(score, dx=1 / len(score))
        if self.facts.masks and np.isnan(score):
            score = 0.0  # a map without a sum; there is a mask
        return float(score) if np.isfinite(score) else math.nan

    def object(self, on: Explanation, at: int) -> dict[str, Any] | None:
        """Map and mask of the pixels with a label, in a row; None where they are too few."""
        masks = on.probe.batch.masks
        assert masks is not None
        mask, saliency = masks[at].flatten(), on.saliency[at].flatten()
        known = mask.isfinite()
        marked = mask[known] == 1
        if not marked.any() or marked.all() or len(marked) <= getattr(self.metric, "k", 0):
            return None
        row = (1, 1, 1, len(marked))
        return {
            "model": None,
            "x_batch": np.zeros(row),
            "y_batch": np.zeros(1, dtype=np.int64),
            "a_batch": _array(saliency[known].double()).reshape(row),
            "s_batch": _array(marked.double()).reshape(row),
        }

    def modules(self, model: Model) -> list[str]:
        """Paths of the layers that are compared.

        Raises:
            UsageError: if the network has no module of a path.
            Unsupported: if it has no modules.
        """
        asked = self.metric.layer_names
        if asked is None:
            asked = [path for path, _ in model.net.named_modules() if path]
        if not asked:
            raise Unsupported(f"{self.metric.name} compares layers, and the network has none")
        paths = [model.layer(name) for name in asked]
        for path in paths:
            module_at(model.net, path)
        return paths

    def image(self, on: Explanation, at: int) -> dict[str, Any]:
        """Everything else that a class may ask for."""
        probe = on.probe
        given: dict[str, Any] = {
            "model": _Network(probe.model, probe.inputs[:0], hasattr(self.metric, "layer_names")),
            "x_batch": _array(probe.inputs[at : at + 1]),
            "y_batch": _array(probe.target[at : at + 1]),
            "a_batch": _array(on.saliency[at : at + 1, None].double()),
        }
        if self.facts.again:
            given["explain_func"] = self.explainer(probe, at)
        if self.facts.reads:
            given["softmax"] = self.metric.softmax
        return given

    def explainer(self, probe: Probe, at: int) -> Callable[..., _Array]:
        """The method under test, of other images and classes, with this image's noise."""
        one = probe.batch.part(slice(at, at + 1))

        def explain(model: Any, inputs: Any, targets: Any, **kwargs: Any) -> _Array:
            images = probe.model.pixels(torch.as_tensor(inputs).to(probe.inputs))
            again = Probe(
                probe.model,
                replace(one, images=images),
                seed=probe.seed,
                target=torch.as_tensor(targets).to(probe.inputs.device),
                meter=probe.meter,
            )
            return _array(self.explained(again).raw[:, None].double())

        return explain

    def baseline(self, probe: Probe, at: int) -> _Array:
        """What absent pixels are, (3, H, W) in network space; one grey from the global stream if
        it is uniform.
        """
        inputs, name = probe.inputs, self.metric.perturb_baseline
        if name == "uniform":
            grey = torch.full_like(inputs[:1], float(np.random.random()))  # noqa: NPY002
            return _array(probe.model.normalise(grey)[0])
        return _array(probe[BaselineImage(name)].expand_as(inputs)[at])

    def perturbation(self, probe: Probe, at: int) -> Callable[..., _Array]:
        """In the place of Quantus' own: sets features by index, or by mask, as ``fill`` says."""
        image, fill = _array(probe.inputs[at]), self.facts.fill
        draws = self.metric.perturb_baseline == "uniform"
        fixed = image if fill == "back" else self.baseline(probe, at)

        def perturb(
            arr: _Array, indices: _Array | None = None, mask: _Array | None = None, **_: Any
        ) -> _Array:
            values = self.baseline(probe, at) if draws else fixed
            begun = image if fill == "afresh" else arr
            if mask is not None:
                return np.where(mask, values, begun)
            changed: _Array = begun.reshape(arr.shape).copy()
            changed[:, indices] = values.reshape(-1)[indices]
            return changed

        return perturb


def _array(values: Tensor) -> _Array:
    """A copy, since Quantus changes some of what it is given."""
    return values.detach().cpu().numpy().copy()


@contextlib.contextmanager
def _mended() -> Iterator[None]:
    """Quantus without a word, on maps of any sign and on current NumPy; found again as it was."""
    asserts = importlib.import_module("quantus.helpers.asserts")
    utils = importlib.import_module("quantus.helpers.utils")
    warn = importlib.import_module("quantus.helpers.warn")
    models = importlib.import_module("quantus.helpers.model.pytorch_model")
    mended: tuple[tuple[Any, str, Any], ...] = (
        (asserts, "assert_attributions", lambda **given: None),
        (utils, "calculate_auc", _area),
        (warn, "warn_perturbation_caused_no_change", lambda **given: None),
    )
    with contextlib.ExitStack() as stack:
        for module, name, function in mended:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        # a cache would keep every network that it has seen
        stack.callback(models.PyTorchModel._get_last_softmax_layer_index.cache_clear)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _alone(similarity: Callable[..., Any], a: _Array, b: _Array, **_: Any) -> _Array:
    """Of the one image there is; Quantus' way through a batch fails on constant maps."""
    return np.array([similarity(a[0], b[0])])


def _area(values: _Array, dx: int = 1, batched: bool = False) -> Any:
    return np.trapezoid(np.array(values), dx=dx, axis=1 if batched else -1)


# --- from a name to a class -----------------------------------------------------------------------


class Quantus(adapters.Adapter):
    """A class of Quantus as a metric."""

    library = LIBRARY
    facts: ClassVar[Facts]

    def __post_init__(self) -> None:
        low, high = getattr(self, "lower_bound", 0.0), getattr(self, "upper_bound", None)
        if high is not None and high <= low:
            raise ValueError(f"upper_bound {high} must be above lower_bound {low}")

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Scores(self),)

    def __call__(self, explanation: Explanation) -> Tensor:
        return explanation[Scores(self)]

    def constructor(self) -> dict[str, Any]:
        """What the class of Quantus is made with."""
        takes = signature(self.theirs().__init__)
        given = {
            "return_aggregate": False,
            "disable_warnings": True,
            "display_progressbar": False,
            **self.facts.fixed,
        }
        for key, value in registry.parameters(self).items():
            if key not in takes:
                continue
            if key in ("normalise_func", "similarity_func"):
                value = getattr(importlib.import_module(f"quantus.functions.{key}"), value)
            if key == "similarity_func":
                value = functools.partial(_alone, value)
            given[key] = list(value) if isinstance(value, tuple) else value
        return given

    def fit(self, size: tuple[int, int]) -> None:
        """Checks the parameters that depend on the size of images.

        Raises:
            Unsupported: if one does not fit.
        """
        pixels, words = math.prod(size), f"images of {size[0]} x {size[1]}"
        step = getattr(self, "features_in_step", 1)
        if pixels % step:
            raise Unsupported(
                f"features_in_step = {step} must divide the {pixels} pixels of {words}"
            )
        for key in ("subset_size", "k"):
            if getattr(self, key, 0) >= pixels:
                raise Unsupported(
                    f"{key} = {getattr(self, key)} must be below the {pixels} pixels of {words}"
                )
        for side in getattr(self, "perturb_patch_sizes", (getattr(self, "patch_size", 1),)):
            if size[0] % side or size[1] % side:
                raise Unsupported(f"patches of {side} x {side} do not divide {words}")
            if self.facts.curve and (side, side) == size:
                raise Unsupported(f"{words} are a single patch, which gives no curve")
        steps, span = getattr(self, "nr_steps", None), 2 * size[1] + 1
        if steps is not None and (steps > span or span % steps == 0):
            raise Unsupported(
                f"nr_steps = {steps} must neither exceed nor divide {span}, twice the width of "
                f"{words} and 1: Quantus would move them beyond their side, or not at all"
            )
        if getattr(self, "similarity_func", "") == "ssim" and pixels < 7:
            raise Unsupported(f"{words} have fewer than the 7 pixels of a window of ssim")


_FAMILIES = {"Randomisation": "sanity"}


def _metric(name: str) -> type:
    """The registered class behind a name."""
    facts, theirs = CLASSES[name], LIBRARY.theirs(name)
    category = theirs.evaluation_category.value
    better = facts.better or theirs.score_direction.value
    takes = signature(theirs.__init__)
    parameters = LIBRARY.parameters(_defaults(theirs, takes, facts), facts)
    again = " It runs the method again, and cannot score maps that are given without it."
    unlabelled = " Pixels without a label are left out."
    words = (
        LIBRARY.summary(name, facts),
        f"It is {theirs.__module__}.{name}, of one image at a time; {better} is better."
        + (again if facts.again else "")
        + (unlabelled if facts.masks else ""),
        "Quantus' curve is given as its area over the share of its steps." if facts.curve else "",
        facts.remark,
        LIBRARY.absent(takes, parameters),
    )
    known: dict[str, Any] = {
        "facts": facts,
        "symbol": f"Q-{name}",
        "better": better,
        "family": _FAMILIES.get(category, category.lower()),
        "range": facts.range,
        "undefined": "failed: mask" if facts.masks else "undefined: Quantus gives no number",
    }
    if facts.masks:
        known["needs_masks"] = True
    if facts.again:
        known["needs_method"] = True
    lines = adapters.docstring(words, parameters, f"Source: {facts.source}.")
    return adapters.declared(name, Quantus, lines, parameters, **known)


def _defaults(theirs: Any, takes: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Of the parameters that may be offered; functions are, by their names."""
    hidden = {*LIBRARY.handled, "perturb_func", *facts.fields}
    found = {name: default for name, default in takes.items() if name not in hidden}
    if facts.reads:
        found["softmax"] = signature(theirs.__call__)["softmax"]
    relative = theirs.__name__.startswith("Relative") and facts.again
    found["normalise_func"] = (
        "normalise_by_average_second_moment_estimate" if relative else "normalise_by_max"
    )
    if "perturb_patch_sizes" in found:
        found["perturb_patch_sizes"] = (4,)
    return found


LIBRARY.offer(CLASSES, _metric, REFUSED, __name__)
