"""Methods of pytorch-grad-cam: ``gradcam/<Class>``.

The library scales its maps to [0, 1] and upsamples them; nothing of its result is changed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import adapters
from ..adapters import Cost, Count, NotNegative, Parameter, Positive, fixed, signature
from ..autograd import module_at, recording, rerouted
from ..errors import Unpriced, Unsupported
from ..features import FeatureLayout
from ..layers import layer_facts
from ..probe import Logits, Probe
from ..types import Model

_CAMS = Literal[
    "GradCAM", "GradCAMElementWise", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM"
]

LIBRARY = adapters.Library(
    kind="methods",
    prefix="gradcam",
    title="pytorch-grad-cam",
    module="pytorch_grad_cam",
    handled=(
        *("self", "model", "target_layers", "input_tensor", "targets", "ablation_layer"),
        *("batch_size", "kwargs"),
    ),
    types={
        "alpha": (NotNegative, "weight of the similar classes' logits"),
        "aug_smooth": (bool, "mean over the image and its mirror image at three contrasts"),
        "base_method": (_CAMS, "the library's class that makes each map"),
        "eigen_smooth": (
            bool,
            "principal component of the weighted maps, of arbitrary sign, not sum",
        ),
        "gamma": (Positive | None, "of the kernel; None is 1 / number of channels"),
        "k": (NotNegative, "standard deviations above the mean from which a pixel counts"),
        "kernel": (Literal["linear", "poly", "rbf", "sigmoid", "cosine"], "of the components"),
        "num_scales": (Count, "sizes of the image"),
        "pool": (Literal["mean", "max"], "how windows are joined"),
        "pre_filter_ratio": (Annotated[float, Field(ge=0, lt=1)], "share of windows left out"),
        "ratio_channels_to_ablate": (
            Annotated[float, Field(gt=0, le=1)],
            "share of channels ablated",
        ),
        "scales": (tuple[Count, ...] | None, "sizes of the image; None takes the next two"),
        "scale_step_ratio": (Positive, "from one size to the next, as a share of the window"),
        "smooth": (bool, "blur the joined map"),
        "step_size": (Count | None, "between windows; None is the window's size"),
        "theta": (NotNegative, "values below are left out of the mean"),
        "use_softmax_scores": (bool, "weigh windows by probability, not by logit"),
        "window_size": (Count | None, "of the windows; None is the image's shorter side"),
        "layer": (str, "role or module path"),
    },
)


@dataclass(frozen=True)
class Facts(adapters.MethodFacts):
    """Of a method of pytorch-grad-cam.

    Args:
        target: class that chooses what is differentiated.
    """

    _: KW_ONLY
    tolerance: float | None = 1e-6
    target: str = "ClassifierOutputTarget"


def _viewed(passes: Cost) -> Cost:
    """Of a class that may look at six views of the image."""

    def viewed(method: Any, model: Model) -> tuple[int, int]:
        views = 6 if method.aug_smooth else 1
        forward, backward = passes(method, model)
        return views * forward, views * backward

    return viewed


def _cams(forward: int, backward: int) -> Cost:
    return _viewed(fixed(forward, backward))


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


_NO_SMOOTH = ("eigen_smooth",)
_SIGN = "The component's sign is the library's choice, which rounding can turn."

CLASSES: dict[str, Facts] = {
    "GradCAM": Facts("Grad-CAM", "Selvaraju et al. 2017, arXiv:1610.02391", _cams(1, 1)),
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
        fixed(1, 1),
        fields={
            "comparison_categories": Parameter(
                Annotated[tuple[Count, ...], Field(min_length=1)],
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
            "layers": Parameter(
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

REFUSED: dict[str, str] = {
    "DeepFeatureFactorization": "finds concepts of several images, not a map of a class",
    "GuidedBackpropReLUModel": (
        "replaces all ReLUs of the network; use guided_backprop or captum/GuidedBackprop"
    ),
}
"""What pytorch-grad-cam exports that cannot serve, and why."""


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


class GradCAM(adapters.MethodAdapter):
    """A class of ``pytorch_grad_cam``; its maps are positive, scaled and upsampled as it does."""

    library = LIBRARY
    facts: ClassVar[Facts]

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
        with self.at_work(probe), _without_bars(self.theirs()), contextlib.ExitStack() as stack:
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
            given["base_method"] = LIBRARY.theirs(given["base_method"])
        if "ablation_layer" in self.takes:  # the default is one object for all, with a memory
            name = "AblationLayer" if are_maps else "AblationLayerVit"
            given["ablation_layer"] = LIBRARY.theirs(name)()
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


def _method(name: str) -> type:
    """The registered class behind a name."""
    facts, theirs = CLASSES[name], LIBRARY.theirs(name)
    call = theirs.__call__
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(call).parameters.values()):
        call = theirs.forward
    made, called = signature(theirs.__init__), signature(call)
    takes = {**made, **called}
    words = (
        f"It is {theirs.__module__}.{name}, whose results are not changed but in shape. The "
        f"library scales them to [0, 1] and upsamples them, in float32."
    )
    layer = {"layer": "last_conv"} if "target_layers" in takes else {}
    defaults = {**layer, **LIBRARY.plain(takes)}
    return adapters.method(name, GradCAM, facts, defaults, (made, called), [words])


LIBRARY.offer(CLASSES, _method, REFUSED, __name__)
