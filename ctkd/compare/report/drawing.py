"""The look of pictures: colors, labels, and SVG that a page can take in.

Pictures are drawn without a display. Their text stays text. Equal data give equal files.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ctkd.distill.printable import printable

__all__ = [
    "ALARM",
    "DARK",
    "FAINT",
    "GRID",
    "INK",
    "METHOD_COLORS",
    "PAPER",
    "Label",
    "colors_of",
    "dress",
    "for_page",
    "label_at_right",
    "new_figure",
    "short_names",
    "spread",
    "svg_text",
    "tell",
]

INK = "#1f2430"
FAINT = "#667085"
GRID = "#e5e7eb"
PAPER = "#ffffff"
ALARM = "#b42318"

# Chosen by search: 3:1 on paper at least, and apart with any of the three color blindnesses.
METHOD_COLORS = (
    "#022d6c",
    "#e17017",
    "#08a979",
    "#cb28e8",
    "#77652e",
    "#1b709b",
    "#61091a",
    "#535a59",
)
"""One per method, in order; a ninth method has the first one's."""

_DARK_COLORS = (
    "#0268fd",
    "#b05001",
    "#15faad",
    "#9c4e91",
    "#dec750",
    "#03adfc",
    "#dc325d",
    "#b6bfd8",
)

DARK = {
    INK: "#e6e8ee",
    FAINT: "#a3aab8",
    GRID: "#333844",
    PAPER: "#15181e",
    ALARM: "#ff8a7a",
    **dict(zip(METHOD_COLORS, _DARK_COLORS, strict=True)),
}
"""Each color of a picture and its counterpart on a dark page."""

WIDTH = 7.4
_LONGEST_NAME = 26
_LINE_OF_TEXT = 0.17
_HASHED = re.compile(r"#([0-9a-f]{6})\b")


def colors_of(methods: Sequence[str]) -> dict[str, str]:
    """Each method's color, the same in every picture."""
    return {
        method: METHOD_COLORS[place % len(METHOD_COLORS)] for place, method in enumerate(methods)
    }


def short_names(methods: Sequence[str], longest: int = _LONGEST_NAME) -> dict[str, str]:
    """Names that fit into a picture, still different from each other.

    Example:
        >>> short_names(["uld", "multilevelot kd_weight=0.15"], longest=17)
        {'uld': 'uld', 'multilevelot kd_weight=0.15': 'multilev…ght=0.15'}
    """
    names: dict[str, str] = {}
    for place, method in enumerate(methods, 1):
        name = _cut(printable(method), longest)
        if name in names.values():
            name = _cut(f"{place}: {printable(method)}", longest)
        names[method] = name
    return names


def _cut(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    # The end often is what tells two settings of a method apart.
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def new_figure(height: float) -> Any:
    """A figure as wide as a page's text and so many inches high."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(WIDTH, height),
        facecolor=PAPER,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.06, wspace=0.06),
    )
    FigureCanvasSVG(figure)
    return figure


def dress(
    axes: Any, title: str, *, note: str = "", alarm: bool = False, across: str = "", up: str = ""
) -> None:
    """Give a panel its titles and a quiet frame.

    Args:
        axes: The panel.
        title: What it shows.
        note: What a reader must know, below the title; may be empty.
        alarm: Whether the note tells of something wrong.
        across: Title of the horizontal axis.
        up: Title of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(PAPER)
    axes.set_title(
        title,
        loc="left",
        color=INK,
        fontsize=11,
        fontweight="bold",
        pad=20 if note else 7,
        parse_math=False,
    )
    if note:
        axes.annotate(
            note,
            (0, 1),
            (0, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            color=ALARM if alarm else FAINT,
            fontsize=9,
            annotation_clip=False,
            parse_math=False,
        )
    axes.set_xlabel(across, color=FAINT, fontsize=9.5, parse_math=False)
    axes.set_ylabel(up, color=FAINT, fontsize=9.5, parse_math=False)
    axes.tick_params(colors=FAINT, labelsize=9, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
        axis.set_major_formatter(_tick)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _tick(value: float, _: int) -> str:
    return f"{value:.6g}"


def tell(figure: Any, text: str) -> None:
    """Write in an empty picture why it is empty."""
    figure.text(0.5, 0.5, text, color=FAINT, fontsize=13, ha="center", va="center")


@dataclass(frozen=True, slots=True)
class Label:
    """A text beside the right end of a panel, at a height of its vertical axis."""

    height: float
    text: str
    color: str


def label_at_right(axes: Any, labels: Iterable[Label], *, inches: float) -> None:
    """Write labels beside a panel, none over another, each with a line from its height.

    Args:
        axes: The panel, its limits final.
        labels: In any order.
        inches: The panel's height, roughly.
    """
    from matplotlib.lines import Line2D

    ordered = sorted(labels, key=lambda label: label.height)
    bottom, top = axes.get_ylim()
    wished = [min(max((one.height - bottom) / (top - bottom), 0.0), 1.0) for one in ordered]
    for label, at, placed in zip(
        ordered, wished, spread(wished, _LINE_OF_TEXT / inches), strict=True
    ):
        line = Line2D(
            (1.005, 1.04),
            (at, placed),
            transform=axes.transAxes,
            color=label.color,
            linewidth=1.4,
            marker="o",
            markersize=5.5,
            markevery=[1],
            clip_on=False,
        )
        # The text keeps the room; a line that is measured as well would only widen it.
        line.set_in_layout(False)
        axes.add_line(line)
        axes.text(
            1.06,
            placed,
            label.text,
            transform=axes.transAxes,
            # Small text needs more contrast than a line's color has.
            color=INK,
            fontsize=9,
            fontweight="bold",
            va="center",
            parse_math=False,
        )


def spread(wished: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart to a least distance, each as little as it may.

    Example:
        >>> spread([0.0, 0.5, 0.5, 1.0], 0.25)
        [0.0, 0.375, 0.625, 1.0]
    """
    # Groups of touching labels; each sits where the mean of its wishes is met, above 0.
    groups: list[tuple[float, float, int]] = []
    for wish in wished:
        mean, size = wish, 1
        while True:
            middle = max(mean, gap * (size - 1) / 2)
            if not groups or middle - groups[-1][1] >= gap * (size + groups[-1][2]) / 2 - 1e-12:
                break
            earlier, _, count = groups.pop()
            mean = (earlier * count + mean * size) / (count + size)
            size += count
        groups.append((mean, middle, size))
    return [
        middle + gap * (place - (size - 1) / 2)
        for _, middle, size in groups
        for place in range(size)
    ]


def svg_text(figure: Any, name: str) -> str:
    """Draw a figure as SVG that is the same for the same data.

    Args:
        figure: From `new_figure`.
        name: Of the picture; goes in front of every id, so that several fit into one page.
    """
    import matplotlib

    buffer = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that the font lacks is measured wrongly; the page finds a font for it.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _plain_tags(root)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    _prefix_ids(root, name)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("xmlns:xlink", "http://www.w3.org/1999/xlink")
    # What matplotlib asks of every element of a page, for the picture alone.
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _plain_tags(root: ElementTree.Element) -> None:
    """Write names as a page does: without the namespace, only ``xlink:`` kept."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            if key.startswith("{"):
                space, _, plain = key[1:].partition("}")
                value = element.attrib.pop(key)
                element.set(f"xlink:{plain}" if space.endswith("xlink") else plain, value)


def _prefix_ids(root: ElementTree.Element, name: str) -> None:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))


def for_page(picture: str, label: str) -> str:
    """Make a picture part of a page: scalable, named, in colors that the page may change.

    Args:
        picture: From `svg_text`.
        label: What someone hears who cannot see it.
    """
    root = ElementTree.fromstring(picture)
    _plain_tags(root)
    for element in root.iter():
        style = element.get("style")
        if style:
            element.set("style", _HASHED.sub(_variable, style))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", printable(label))
    return ElementTree.tostring(root, encoding="unicode")


def _variable(match: re.Match[str]) -> str:
    color = match.group()
    return f"var(--c{match.group(1)}, {color})" if color in DARK else color
