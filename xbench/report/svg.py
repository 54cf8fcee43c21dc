"""Figures as part of a page: no inline style, ids of their own, a name to be read out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import count
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"^(?:(?:normal|bold|italic)\s+)*([\d.]+)px\s+(.*)$")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


class Drawn:
    """Draws figures for one page, so that no id of one is an id of another."""

    def __init__(self) -> None:
        self._numbers = count()

    def __call__(self, draw: Callable[[], Figure], description: str) -> Markup:
        """The figure as one ``<svg>`` element.

        Args:
            draw: makes it; text is taken as it is, not as a formula between dollar signs.
            description: what a reader who does not see it is told.
        """
        settings: Any = {
            "svg.hashsalt": "xbench",
            "svg.fonttype": "none",
            "text.parse_math": False,
            "axes.formatter.use_mathtext": False,
        }
        out = io.StringIO()
        with mpl.rc_context(settings):
            figure = draw()
            if engine := figure.get_layout_engine():  # else saving draws twice, for layout's sake
                engine.execute(figure)
                figure.set_layout_engine(None)
            figure.savefig(
                out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        root = ElementTree.fromstring(out.getvalue())  # noqa: S314  # written just above
        return Markup(_inlined(root, f"f{next(self._numbers)}-", description))  # noqa: S704


def _inlined(root: ElementTree.Element, prefix: str, description: str) -> str:
    """Style attributes become presentation attributes, which a page's policy lets pass and its
    style sheet can recolour.
    """
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        for name, value in list(element.attrib.items()):
            if name == "style":
                del element.attrib["style"]
                for key, said in _declarations(value):
                    element.set(key, _REFERENCE.sub(rf"url(#{prefix}\1)", said))
            elif name == "id":
                element.set("id", prefix + value)
            elif name == LINK:
                del element.attrib[LINK]
                element.set("href", f"#{prefix}{value[1:]}" if value.startswith("#") else value)
            else:
                text = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
                if name in ("d", "x", "y", "transform"):
                    text = _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}", text)
                element.set(name, " ".join(text.split()))
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    # the rule for all elements that was in <style>; both properties are inherited
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt"})
    root.attrib.update({"role": "img", "aria-label": description})
    root.attrib.pop("version", None)
    width, height = (root.attrib.pop(key).removesuffix("pt") for key in ("width", "height"))
    # a point is 4/3 of a pixel; without this, text would be smaller than it was drawn to be
    root.set("width", f"{float(width) * 4 / 3:.0f}")
    root.set("height", f"{float(height) * 4 / 3:.0f}")
    return ElementTree.tostring(root, encoding="unicode")


def _declarations(style: str) -> list[tuple[str, str]]:
    """Of an inline style; the shorthand ``font`` has no attribute and is taken apart."""
    found = []
    for declaration in style.split(";"):
        key, colon, value = (part.strip() for part in declaration.partition(":"))
        if not colon:
            continue
        if key == "font":
            if font := _FONT.match(value):
                found.append(("font-size", font[1]))
        elif key not in ("font-family", "font-style", "font-weight"):
            found.append((key, value))
    return found
