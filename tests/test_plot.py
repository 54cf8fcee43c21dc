"""Figures: they show what they are given, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from xbench import plot

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAPS = {"a": IMAGES.sum(1), "b": IMAGES[:, 0] - 0.5}


def colour_ranges(figure: Figure) -> list[tuple[float, float]]:
    """Ends of the colour scale of each map; pictures have none."""
    drawn = [image for ax in figure.axes for image in ax.images if image.get_alpha() is not None]
    return [(image.norm.vmin or 0.0, image.norm.vmax or 0.0) for image in drawn]


def test_each_picture_has_a_row_and_each_method_a_column_with_its_bar() -> None:
    figure = plot.saliency(IMAGES, MAPS, titles=["one", "two"])
    panels = [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]
    assert len(panels) == 2 * 3
    assert len(figure.axes) == 2 * 3 + 2 * 2  # a bar for each map


def test_a_signed_map_is_drawn_symmetrically_about_zero_and_an_unsigned_one_from_its_least() -> (
    None
):
    ranges = colour_ranges(plot.saliency(IMAGES[:1], {name: m[:1] for name, m in MAPS.items()}))
    assert ranges[0][0] == pytest.approx(float(MAPS["a"][0].min()))
    assert ranges[1][0] == -ranges[1][1]


def test_a_shared_scale_is_one_for_the_row() -> None:
    maps = {"small": IMAGES[:1, 0], "large": 5 * IMAGES[:1, 0]}
    apart, shared = (
        colour_ranges(plot.saliency(IMAGES[:1], maps, shared_scale=flag)) for flag in (False, True)
    )
    assert apart[0] != apart[1]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_constant_and_missing_maps_can_be_drawn(value: float) -> None:
    plot.saliency(IMAGES, {"flat": torch.full((2, 8, 8), value)}, masks=torch.ones(2, 8, 8))


def test_maps_of_another_size_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="maps of 'a' have the shape"):
        plot.saliency(IMAGES, {"a": torch.zeros(2, 4, 4)})


FIGURES: dict[str, Callable[[], Figure]] = {
    "saliency": lambda: plot.saliency(IMAGES, MAPS),
    "intervals": lambda: plot.intervals({"a": 1.0}, {"a": (0.5, 1.5)}, title="RCAP"),
    "curves": lambda: plot.curves(
        {"a": [0, 0.5, 1], "b": [0, 0.5, 1]},
        {"a": [[0, 0.2, 1], [np.nan] * 3], "b": [[np.nan] * 3]},
        title="insertion",
    ),
    "agreement": lambda: plot.agreement([[1, np.nan], [np.nan, 1]], ["x", "y"]),
    "cost": lambda: plot.cost(
        pd.DataFrame({"method": ["a", "b"], "passes": [1.0, np.nan], "value": [1.0, 2.0]}),
        better="higher",
        title="RCAP",
    ),
    "scatter": lambda: plot.scatter([1.0, np.nan], [2.0, 1.0], ("a", "b"), title="RCAP"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_saved(name: str, tmp_path: Path) -> None:
    FIGURES[name]().savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size > 1000


@pytest.mark.parametrize("name", ["intervals", "agreement"])
def test_svg_is_one_element_and_the_same_each_time(name: str) -> None:
    first, second = (plot.svg(FIGURES[name]()) for _ in range(2))
    assert first == second
    assert first.startswith("<svg")


def test_names_are_escaped_in_svg() -> None:
    name = "<script>alert(1)</script>"
    text = plot.svg(plot.intervals({name: 1.0}, {name: (0.5, 1.5)}, title=name))
    assert "<script" not in text


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_holds_whatever_nothing_beats(entries: list[tuple[int, int]]) -> None:
    front = plot.pareto([c for c, _ in entries], [v for _, v in entries], "higher")
    for (cost, value), is_best in zip(entries, front, strict=True):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in entries)
        assert is_best == (not beaten)
