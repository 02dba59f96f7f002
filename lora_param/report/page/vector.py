"""A Matplotlib figure as SVG inside a page: the page's fonts and colours, tooltips, no addresses.

Colours stand for CSS variables: `ink("heat3")` gives Matplotlib a colour, and where that colour is
in the drawing the page finds `var(--heat3)`. One drawing serves light and dark mode and paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

__all__ = ["STEPS", "figure", "ink", "style", "to_svg"]

STEPS = 16
"""Steps of a colour ramp."""

_NAMES = ("ink", "muted", "faint", "surface", "line", *(f"depth{i}" for i in range(STEPS)))
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}
_STAND_IN = re.compile(r"#fe([0-9a-f]{4})")
_XLINK = "{http://www.w3.org/1999/xlink}"
_SVG = "{http://www.w3.org/2000/svg}"


def ink(name: str) -> str:
    """The colour that stands for a CSS variable of the page."""
    return f"#fe{_NUMBERS[name]:04x}"


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user has set, for drawings that go into a page."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # the page's fonts draw the text, and they have what Matplotlib's may lack
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "lora_param",
                "font.size": 11,
                "text.color": ink("ink"),
                "axes.edgecolor": ink("faint"),
                "axes.labelcolor": ink("muted"),
                "axes.linewidth": 1,
                "xtick.color": ink("muted"),
                "ytick.color": ink("muted"),
                "figure.dpi": 72,
            }
        )
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many CSS pixels."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)


def to_svg(drawn: Figure, label: str, tooltips: Mapping[str, str]) -> str:
    """The figure as an `<svg>` element.

    Args:
        drawn: what to show; artists with a URL become links.
        label: what a screen reader says of it.
        tooltips: URL → what is shown where the pointer rests on the link.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    _, _, width, height = root.attrib["viewBox"].split()
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", file.getvalue()))
    for element in root.iter():
        _tidy(element, used)
        if element.tag == "a":
            _explain(element, tooltips)
    for defs in root.findall("defs"):
        for sheet in defs.findall("style"):
            defs.remove(sheet)
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
        | {"role": "img", "aria-label": label}
    )
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(element: ElementTree.Element, used: set[str]) -> None:
    """No namespaces, no addresses, no identifiers that nothing refers to, no fonts."""
    element.tag = element.tag.removeprefix(_SVG)
    element.text, element.tail = (element.text or "").strip(), ""
    attributes = {name.removeprefix(_XLINK): value for name, value in element.attrib.items()}
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if element.tag == "text" and attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for name in ("style", "fill", "stroke"):
        if name in attributes:
            kept = [p for p in attributes[name].split("; ") if not p.startswith("font-family")]
            attributes[name] = _STAND_IN.sub(_variable, "; ".join(kept))
    if "d" in attributes:
        attributes["d"] = " ".join(
            f"{float(word):.2f}".rstrip("0").rstrip(".") if word[-1].isdigit() else word
            for word in attributes["d"].split()
        )
    element.attrib.clear()
    element.attrib.update(attributes)


def _variable(match: re.Match[str]) -> str:
    return f"var(--{_NAMES[int(match[1], 16)]})"


def _explain(link: ElementTree.Element, tooltips: Mapping[str, str]) -> None:
    link.attrib.pop("target", None)
    link.attrib["tabindex"] = "-1"  # the table below has the same, one stop instead of hundreds
    title = ElementTree.Element("title")
    title.text = tooltips.get(link.attrib["href"], "")
    link.insert(0, title)
