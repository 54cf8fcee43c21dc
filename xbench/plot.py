"""Figures: maps over pictures, scores with their intervals, curves, agreement, cost.

Each function takes plain tensors, arrays or frames and returns a matplotlib ``Figure``, to be shown
in a notebook or saved as PNG, SVG or PDF. Colours are told apart without red and green; every
colour map has its bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor

BLUE, ORANGE, GREY = "#3b6fb6", "#d1701f", "#8a8a8a"
CYCLE = ("#3b6fb6", "#d1701f", "#5b9e7a", "#a05195", "#8c6d31", "#17a2b8", "#444444")
UNSIGNED, SIGNED = "viridis", "RdBu_r"
CLIPPED = 0.995
SHOWN = 0.65
"""Opacity of a map over its picture, in grey: shapes are recognised, colours can be read off."""


def saliency(
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    masks: Tensor | None = None,
    titles: Sequence[str] = (),
    captions: Mapping[str, Sequence[str]] | None = None,
    shared_scale: bool = False,
    size: float = 1.9,
) -> Figure:
    """Pictures beside their maps: a row per picture, a column per method.

    A map with negative values is drawn on a scale that is symmetric about zero, any other from its
    smallest value up. Each panel has its bar, with the map's own values. The half per cent of
    pixels that is largest shares one colour, since a single pixel would leave all others dark; the
    bar's pointed end says so.

    Args:
        images: (N, 3, H, W) in [0, 1].
        maps: by title of the column, (N, H, W) each, raw.
        masks: (N, H, W) object masks; their outline is drawn where they are known.
        titles: of the rows, such as predicted class and probability.
        captions: by column, a line beneath each panel, such as scores.
        shared_scale: one scale for all columns of a row, for maps that are to be compared in size,
            such as gradients of two trainings.
        size: side of a panel in inches.

    Raises:
        ValueError: if numbers of pictures or sizes differ.
    """
    count, height, width = len(images), *images.shape[-2:]
    for name, values in maps.items():
        if tuple(values.shape) != (count, height, width):
            raise ValueError(
                f"maps of {name!r} have the shape {tuple(values.shape)}, expected "
                f"{(count, height, width)} like the pictures"
            )
    columns = 1 + len(maps)
    figure = Figure(figsize=(columns * size * 1.2, count * size * 1.12 + 0.4), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    for row, picture in enumerate(_array(images).transpose(0, 2, 3, 1)):
        outline = None if masks is None else _array(masks)[row]
        drawn = {name: _array(values)[row] for name, values in maps.items()}
        scale = _scale(np.stack(list(drawn.values()))) if shared_scale and drawn else None
        axes[row, 0].imshow(np.clip(picture, 0, 1))
        if len(titles) > row:
            axes[row, 0].set_title(titles[row], fontsize=7)
        for ax, (name, values) in zip(axes[row, 1:], drawn.items(), strict=True):
            _overlay(figure, ax, picture, values, scale or _scale(values))
            if row == 0:
                ax.set_title(name, fontsize=8)
            if captions and name in captions:
                ax.set_xlabel(captions[name][row], fontsize=6)
        for ax in axes[row]:
            ax.set_xticks([])
            ax.set_yticks([])
            if outline is not None and np.isfinite(outline).all():
                ax.contour(outline, levels=[0.5], colors=["white"], linewidths=1.6)
                ax.contour(outline, levels=[0.5], colors=["black"], linewidths=0.7)
    return figure


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


def _scale(values: NDArray[np.float64]) -> tuple[str, float, float]:
    """Colour map and ends for one or several maps."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0:
        reach = float(np.quantile(np.abs(finite), CLIPPED)) or max(-low, high)
        return SIGNED, -reach, reach
    top = float(np.quantile(finite, CLIPPED)) if finite.size else high
    top = top if top > low else high
    return UNSIGNED, low, top if top > low else low + 1


def _overlay(
    figure: Figure,
    ax: Axes,
    picture: NDArray[np.float64],
    values: NDArray[np.float64],
    scale: tuple[str, float, float],
) -> None:
    colours, low, high = scale
    grey = np.clip(
        picture @ (0.299, 0.587, 0.114) if picture.shape[2] == 3 else picture[..., 0], 0, 1
    )
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    drawn = ax.imshow(values, cmap=colours, vmin=low, vmax=high, alpha=SHOWN)
    beyond = bool((values > high).any()), bool((values < low).any())
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}.get(
        beyond, "neither"
    )
    bar = figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.02, extend=extend)
    bar.set_ticks([low, high], labels=[f"{low:.2g}", f"{high:.2g}"])
    bar.ax.tick_params(labelsize=5, length=2)
    bar.solids.set_alpha(1)  # type: ignore[union-attr]


def blend(
    picture: NDArray[np.float64],
    values: NDArray[np.float64],
    over: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.uint8], tuple[str, float, float]]:
    """A map over its grey picture as pixels, and its colour map with the values at its ends.

    Args:
        picture: (H, W, 3) in [0, 1].
        values: (H, W), raw; without colour where they are not finite.
        over: the values that decide the scale, where several maps share one.

    Returns:
        (H, W, 3), coloured as in :func:`saliency`; name of the colour map, lowest, highest value.
    """
    from matplotlib import colormaps

    name, low, high = _scale(values if over is None else over)
    place = np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1)
    colours = colormaps[name](place)[..., :3]
    grey = np.clip(picture @ (0.299, 0.587, 0.114), 0, 1)[..., None]
    shown = np.where(np.isfinite(values)[..., None], SHOWN, 0.0)
    pixels = (shown * colours + (1 - shown) * grey) * 255
    return pixels.round().astype(np.uint8), (name, low, high)


def intervals(
    means: Mapping[str, float],
    ends: Mapping[str, tuple[float, float]],
    *,
    title: str,
    controls: Sequence[str] = (),
) -> Figure:
    """Means with their 95 % intervals, best first as given; controls apart and in grey.

    Args:
        means: by method, in the order to draw, the first on top.
        ends: lower and upper end by method.
        title: metric with its arrow, and unit.
        controls: methods that explain nothing.
    """
    figure = Figure(figsize=(5.2, 0.6 + 0.22 * len(means)), layout="constrained")
    ax = figure.subplots()
    for at, (name, mean) in enumerate(means.items()):
        colour = GREY if name in controls else BLUE
        low, high = ends[name]
        ax.plot([low, high], [at, at], color=colour, lw=2, solid_capstyle="butt")
        ax.plot([mean], [at], "o", color=colour, ms=4)
    ax.set_yticks(range(len(means)), labels=list(means), fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=9)
    ax.tick_params(axis="x", labelsize=7)
    return _plain(figure)


def curves(
    fractions: Mapping[str, ArrayLike],
    values: Mapping[str, ArrayLike],
    *,
    title: str,
    xlabel: str = "share of pixels",
    ylabel: str = "probability of the target",
) -> Figure:
    """Mean probability against share of pixels, with bands of two standard errors over images.

    Args:
        fractions: by method, (S,).
        values: by method, (N, S), images by points; NaN where an image has no curve.
        title: metric.
        xlabel, ylabel: of the axes.
    """
    figure = Figure(figsize=(4.0, 3.5), layout="constrained")
    ax = figure.subplots()
    for at, (name, points) in enumerate(values.items()):
        table = np.asarray(points, dtype=np.float64)
        table = table[np.isfinite(table).all(1)]
        if not len(table):
            continue
        mean = table.mean(0)
        error = table.std(0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else 0 * mean
        x = np.asarray(fractions[name], dtype=np.float64)
        style = ("-", "--", "-.", ":")[at % 4]
        colour = CYCLE[at % len(CYCLE)]
        # lines with gaps on top, so that equal ones are seen to lie upon one another
        ax.plot(x, mean, style, color=colour, lw=1.4, label=name, zorder=2 + at % 4 / 10)
        ax.fill_between(x, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.15, lw=0)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=7)
    columns = max(1, min(3, 74 // (max(map(len, values), default=0) + 7)))  # as many as fit
    figure.legend(fontsize=7, frameon=False, ncols=columns, loc="outside lower center")
    return _plain(figure)


def agreement(tau: ArrayLike, names: Sequence[str]) -> Figure:
    """Kendall's tau between metrics' rankings as a heat map with its numbers.

    Args:
        tau: (K, K) in [-1, 1]; NaN where a metric has no ranking.
        names: of the K metrics.
    """
    matrix = np.asarray(tau, dtype=np.float64)
    side = 1.6 + 0.38 * len(names)
    figure = Figure(figsize=(side, side * 0.9), layout="constrained")
    ax = figure.subplots()
    drawn = ax.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.75 else "black"
            ax.text(
                column, row, f"{value:.2f}",
                ha="center", va="center", fontsize=6, color=colour,
            )  # fmt: skip
    ax.set_xticks(range(len(names)), labels=list(names), rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(names)), labels=list(names), fontsize=7)
    bar = figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.02)
    bar.set_label("Kendall's tau", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return _plain(figure)


def cost(frame: pd.DataFrame, *, better: str, title: str) -> Figure:
    """Quality against cost, with the methods that no cheaper one beats joined by a line.

    Args:
        frame: columns ``method``, ``passes`` (forwards plus backwards per image) and ``value``.
        better: "higher" or "lower": which end of ``value`` is good.
        title: metric with its arrow.
    """
    figure = Figure(figsize=(4.2, 3.5), layout="constrained")
    ax = figure.subplots()
    known = frame.dropna(subset=["passes", "value"])
    front = pareto(known["passes"], known["value"], better)
    ax.scatter(known["passes"], known["value"], s=18, color=[
        BLUE if is_best else GREY for is_best in front
    ])  # fmt: skip
    best = known[front].sort_values("passes")
    ax.plot(best["passes"], best["value"], color=BLUE, lw=1, ls="--")
    span = float(np.ptp(known["value"])) or 1.0
    groups: list[tuple[float, float, list[str]]] = []
    for row in known.sort_values(["passes", "value"]).itertuples():
        price, value = float(row.passes), float(row.value)  # type: ignore[arg-type]
        if groups and groups[-1][0] == price and abs(groups[-1][1] - value) < 0.05 * span:
            groups[-1][2].append(str(row.method))  # its own label would cover the last one
        else:
            groups.append((price, value, [str(row.method)]))
    middle = float(np.sqrt(known["passes"].min() * known["passes"].max()))
    for price, value, names in groups:
        words = "\n".join(", ".join(names[at : at + 2]) for at in range(0, len(names), 2))
        is_right = price > middle
        ax.annotate(
            words, (price, value), xytext=(-5 if is_right else 5, 0), textcoords="offset points",
            fontsize=7, va="center", ha="right" if is_right else "left",
        )  # fmt: skip
    ax.margins(y=0.12)
    ax.set_xscale("log")
    ticks: list[float] = []
    for price in sorted(known["passes"].unique().tolist()):
        if not ticks or price > 1.35 * ticks[-1]:
            ticks.append(price)
    ax.set_xticks(ticks, labels=[f"{price:,g}" for price in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(known["passes"].min() / 1.3, known["passes"].max() * 1.3)
    ax.set_xlabel("passes per image, forward + backward", fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=7)
    return _plain(figure)


def pareto(cost: ArrayLike, value: ArrayLike, better: str) -> NDArray[np.bool_]:
    """Which entries no other beats in both cost and value; equal ones all count.

    Args:
        cost: (M,), lower is better.
        value: (M,).
        better: "higher" or "lower", of ``value``.
    """
    price = np.asarray(cost, dtype=np.float64)
    loss = np.asarray(value, dtype=np.float64) * (-1 if better == "higher" else 1)
    cheaper = price[None] <= price[:, None]
    finer = loss[None] <= loss[:, None]
    strictly = (price[None] < price[:, None]) | (loss[None] < loss[:, None])
    beaten = np.any(cheaper & finer & strictly, axis=1)
    return np.asarray(~beaten, dtype=np.bool_)


def scatter(first: ArrayLike, second: ArrayLike, names: tuple[str, str], *, title: str) -> Figure:
    """Scores of two methods on the same images, with the line where they are equal.

    Args:
        first, second: (N,) each.
        names: of the two methods.
        title: metric.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (first, second))
    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.scatter(x, y, s=7, color=BLUE, alpha=0.5, lw=0)
    known = np.concatenate([x, y])
    known = known[np.isfinite(known)]
    ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    ax.plot(ends, ends, color=GREY, lw=0.8)
    ax.set_xlabel(names[0], fontsize=8)
    ax.set_ylabel(names[1], fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=7)
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    """Without the box around each plot."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Figure, **options: Any) -> str:
    """The figure as one ``<svg>`` element, the same text for the same figure."""
    import io

    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "xbench", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, **options)
    text = out.getvalue()
    return text[text.index("<svg") :]
