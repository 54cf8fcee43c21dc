"""One picture explained: maps of some methods over it, as a figure, and its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .api import Given
from .datasets.pictures import File, Transform, load_image
from .errors import BadImage, Unsupported, UsageError
from .files import atomic_write
from .models.loading import describe_layers, load_model
from .probe import Explanation
from .scoring import evaluated
from .suite import Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("gradient", "guided_absolute_grad", "integrated_gradients", "grad_cam")
FORMS = (".png", ".svg", ".pdf")
CLASSES_SHOWN = 3
LARGEST = 256
"""Short side where neither model nor user names a size: it bounds what a photograph costs."""


@dataclass(frozen=True)
class Explained:
    """What was found for one picture.

    Args:
        image: (1, 3, H, W) in [0, 1], as the network saw it before its normalisation.
        classes: the most probable classes with their probabilities.
        target: the class that the maps explain.
        maps: by method, (1, H, W), raw.
        scores: by method and metric, value and status.
        skipped: methods that do not work on this network, with the reason.
    """

    image: Tensor
    classes: tuple[tuple[int, float], ...]
    target: int
    maps: dict[str, Tensor]
    scores: dict[tuple[str, str], tuple[float, str]]
    skipped: dict[str, str]


def explain(
    picture: Path,
    model: Choice,
    methods: Sequence[Choice],
    metrics: Sequence[Choice] = (),
    *,
    data: Path | None = None,
    target: int | None = None,
    side: int | None = None,
    seed: int = 0,
) -> Explained:
    """Maps, and scores if metrics are asked for, of one picture.

    Args:
        picture: JPEG, PNG, WebP or BMP file.
        model, methods, metrics: as :func:`~xbench.suite.read_choices` gives them.
        data: where weights are.
        target: class to explain; None means the predicted one.
        side: pixels of the centre square that the network sees; None takes the size of the model's
            training where it is known, else the whole picture with a short side of 256.
        seed: of all noise.

    Raises:
        UsageError: if the picture cannot be read or a class is out of range.
    """
    network = model.make().describe(data)
    wanted = (side, side) if side else getattr(network, "size", None)
    try:
        file = File(picture.name, picture.parent.resolve())
        image, _ = load_image(file, _transform(wanted))
    except BadImage as error:
        raise UsageError(f"{error}; expected a JPEG, PNG, WebP or BMP file") from None
    size = (image.shape[1], image.shape[2])
    _, layers, classes = describe_layers(network, size)
    if target is not None and not 0 <= target < classes:
        raise UsageError(
            f"class {target} does not exist; {model.label!r} tells {classes} classes apart, "
            f"0 to {classes - 1}"
        )
    loaded = load_model(network, model.label, layers, "cpu")
    images = image[None]
    with torch.inference_mode():
        probabilities = loaded.logits(loaded.normalise(images)).double().softmax(1)[0]
    best = probabilities.topk(min(CLASSES_SHOWN, classes))
    shown = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    explained = shown[0][0] if target is None else target
    layer = layers.get("last_conv")
    given = Given(
        loaded.net, images, [explained], None, layer, loaded.mean, loaded.std, seed, None, None
    )
    maps: dict[str, Tensor] = {}
    scores: dict[tuple[str, str], tuple[float, str]] = {}
    skipped: dict[str, str] = {}
    made = {metric.label: metric.make() for metric in metrics}
    for method in methods:
        chosen = method.make()
        try:
            with given.probes([chosen], list(made.values())) as probes:
                explanation = next(probes).explain(chosen)
                maps[method.label] = explanation.raw[:1]
                scores |= {
                    (method.label, label): _score(metric, explanation)
                    for label, metric in made.items()
                }
        except Unsupported as error:
            skipped[method.label] = str(error)
    return Explained(images, shown, explained, maps, scores, skipped)


def _transform(size: tuple[int, int] | None) -> Transform:
    """The centre of the picture at the model's size, cut as torchvision does."""
    if size is None:
        return Transform(LARGEST, None)
    height, width = size
    return Transform(height, height) if height == width else Transform((height, width), None)


def _score(metric: Any, explanation: Explanation) -> tuple[float, str]:
    try:
        return evaluated(metric, explanation)[0]
    except Unsupported as error:
        return math.nan, f"skipped: {error}"


def figure(explained: Explained, metrics: Sequence[Choice] = ()) -> Figure:
    """The picture and its maps in a row, each with its bar and, if there are any, its scores."""
    from .plot import saliency

    captions = {
        name: ["\n".join(_words(explained, name, metric) for metric in metrics)]
        for name in explained.maps
    }
    return saliency(
        explained.image,
        explained.maps,
        titles=[predicted(explained).replace("; ", "\n")],
        captions=captions if metrics else None,
        size=2.2,
    )


def _words(explained: Explained, method: str, metric: Choice) -> str:
    value, status = explained.scores[method, metric.label]
    symbol = getattr(metric.make(), "symbol", metric.label)
    return f"{symbol} {value:.4g}" if status in ("ok", "degenerate") else f"{symbol} {status}"


def predicted(explained: Explained) -> str:
    """The most probable classes, and the explained one where it is another."""
    words = "; ".join(f"class {index}: {100 * p:.1f} %" for index, p in explained.classes)
    is_best = explained.target == explained.classes[0][0]
    return words if is_best else f"{words}; explained: class {explained.target}"


def report(explained: Explained, metrics: Sequence[Choice]) -> str:
    """Classes, a table of scores, and what was skipped, as text."""
    lines = [predicted(explained)]
    if metrics:
        width = max(map(len, explained.maps), default=0)
        for name in explained.maps:
            words = "  ".join(_words(explained, name, metric) for metric in metrics)
            lines.append(f"{name:{width}}  {words}")
    lines += [f"skipped {name}: {reason}" for name, reason in explained.skipped.items()]
    return "\n".join(lines)


def check_form(path: Path) -> None:
    """Before anything is computed.

    Raises:
        UsageError: if the suffix is of no form that figures are written in.
    """
    if path.suffix.lower() not in FORMS:
        raise UsageError(f"figure {str(path)!r} must end in one of {', '.join(FORMS)}")


def save(drawn: Figure, path: Path) -> None:
    """Writes the figure as its suffix says."""
    import io

    out = io.BytesIO()
    drawn.savefig(out, format=path.suffix.lower()[1:], dpi=150, bbox_inches="tight")
    atomic_write(path, out.getvalue())
