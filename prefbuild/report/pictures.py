"""Draw pictures as SVG text: the same numbers give the same bytes, the colours are the page's CSS classes.

Written by hand and not with matplotlib, whose colours are fixed in the file: a page that follows light and dark needs
`currentColor` and classes. Every function returns one `<svg>` element; texts are escaped. `figure` puts several into
one file that needs no page.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 280, 170
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 8, 34  # margins for the axes' numbers
MAX_POINTS = 120  # more would be a smear: points are then means of neighbours

# Of a figure: the page's colours, light and dark, and how its classes look.
COLOURS = {
    "#ffffff": "#171c23", "#1c2128": "#e4e8ed", "#5c6670": "#98a2ad", "#dde1e6": "#2c343e",
    "#1f6feb": "#6aa8ff", "#c2570c": "#f2994a", "#7a3fc4": "#b794f6",
}  # fmt: skip
GROUND, INK, SOFT, LINE, *SERIES = COLOURS
LOOKS = {
    "grid": f'stroke="{LINE}"',
    "zero": f'stroke="{SOFT}" stroke-opacity="0.7"',
    "axis": f'stroke="{LINE}" stroke-width="2"',
    "whisker base": f'stroke="{SOFT}" stroke-width="2"',
    "whisker model": f'stroke="{SERIES[0]}" stroke-width="2"',
    "ring": f'fill="{GROUND}" stroke="{SOFT}" stroke-width="2"',
    "disc": f'fill="{SERIES[0]}"',
}
for _number, _colour in enumerate(SERIES, 1):
    LOOKS |= {
        f"line c{_number}": f'fill="none" stroke="{_colour}" stroke-width="1.8" stroke-linejoin="round"',
        f"area c{_number}": f'fill="{_colour}" fill-opacity="0.13" stroke="{_colour}" stroke-width="1.5"',
        f"dot c{_number}": f'fill="{_colour}"',
    }
PANEL, GAP, MARGIN = 340, 28, 20  # of a figure: the width of a picture in it, and what is left free
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

Points = list[tuple[float, float]]
Place = Callable[[float, float], str]


def line_chart(title: str, series: dict[str, Points], x_label: str) -> str:
    """Lines over a common x axis, one colour a series. Every series has points, and all of them finite."""
    thinned = {name: thin(points) for name, points in series.items()}
    x_ticks, y_ticks, place = _frame(thinned)
    lines = []
    for number, points in enumerate(thinned.values(), 1):
        path = " ".join(place(x, y) for x, y in points)
        lines.append(f'<polyline class="line c{number}" points="{path}"/>')
        if len(points) == 1:
            x, y = path.split(",")
            lines.append(f'<circle class="dot c{number}" cx="{x}" cy="{y}" r="3"/>')
    return _svg(title, _axes(x_ticks, y_ticks, place, x_label) + "".join(lines))


def histogram(title: str, series: dict[str, list[tuple[int, int]]], x_label: str) -> str:
    """Steps over a common x axis; a series is (lower edge, count) of bins of equal width."""
    edges = sorted({edge for bins in series.values() for edge, _ in bins})
    width = min((b - a for a, b in pairwise(edges)), default=1)
    # Only where there are rows: the last bins of a long tail are one row each, and all parts have the same bins.
    last = max((edge for bins in series.values() for edge, rows in bins if rows), default=0) + width
    outlines = {}
    for name, bins in series.items():
        corners = [(float(x), float(rows)) for edge, rows in sorted(bins) if edge < last for x in (edge, edge + width)]
        outlines[name] = [(corners[0][0], 0.0), *corners, (corners[-1][0], 0.0)]
    x_ticks, y_ticks, place = _frame(outlines)
    shapes = [
        f'<polygon class="area c{number}" points="{" ".join(place(x, y) for x, y in outline)}"/>'
        for number, outline in enumerate(outlines.values(), 1)
    ]
    return _svg(title, _axes(x_ticks, y_ticks, place, x_label) + "".join(shapes))


def stacked_bar(title: str, parts: list[tuple[str, int]]) -> str:
    """One bar as wide as its box, cut in proportion; a part is (CSS class, count), and visible unless it is 0."""
    total = sum(count for _, count in parts) or 1
    least = 0.6  # percent
    widths = [max(least, 100 * count / total) if count else 0.0 for _, count in parts]
    scale = 100 / (sum(widths) or 1)
    x, shapes = 0.0, []
    for (kind, count), width in zip(parts, widths, strict=True):
        if count:
            shapes.append(f'<rect class="{escape(kind)}" x="{_n(x)}" y="0" width="{_n(width * scale)}" height="10"/>')
            x += width * scale
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(shapes)}</svg>"
    )


def comparison(title: str, base: tuple[float, float], model: tuple[float, float], low: float, high: float) -> str:
    """Two values with their standard errors on one axis from low to high: a ring for the base, a dot for the model."""
    span = (high - low) or 1.0

    def x(value: float) -> str:
        return _n(8 + 144 * (min(max(value, low), high) - low) / span)

    def whisker(kind: str, value: float, stderr: float) -> str:
        return f'<line class="{kind}" x1="{x(value - stderr)}" x2="{x(value + stderr)}" y1="12" y2="12"/>'

    shapes = (
        '<line class="axis" x1="8" x2="152" y1="12" y2="12"/>'
        + whisker("whisker base", *base)
        + whisker("whisker model", *model)
        + f'<circle class="ring" cx="{x(base[0])}" cy="12" r="4"/>'
        + f'<circle class="disc" cx="{x(model[0])}" cy="12" r="4"/>'
    )
    return (
        f'<svg class="comparison" viewBox="0 0 160 24" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{shapes}</svg>"
    )


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a figure, with what stands around it."""

    heading: str
    svg: str
    legend: list[tuple[str, str]]  # (class of the mark, text)
    ends: tuple[str, str] | None = None  # of the axis, where the picture has no numbers


def figure(title: str, panels: list[Panel]) -> str:
    """Panels in two columns as a file of its own, which looks the same wherever it is an image, in light and dark.

    It has its own ground, since a dark page may be shown to a reader whose system is set to light. Light colours are
    attributes: some hosts forbid a style, and then all would be black.
    """
    columns = min(2, len(panels))
    shapes, y = [], MARGIN
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        drawn = [_panel(panel, MARGIN + place * (PANEL + GAP), y) for place, panel in enumerate(row)]
        shapes += [text for text, _ in drawn]
        y += max(height for _, height in drawn) + GAP
    width, height = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP, y - GAP + MARGIN
    dark = "".join(
        f'[{kind}="{light}"]{{{kind}:{colour}}}' for light, colour in COLOURS.items() for kind in ("fill", "stroke")
    )
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="{FONTS}" font-size="10.5">'
        f"<style>@media (prefers-color-scheme:dark){{{dark}}}</style><title>{escape(title)}</title>"
        f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>{"".join(shapes)}</svg>'
    )
    return "".join(c for c in text if c.isprintable()) + "\n"  # control characters are no XML, escaped or not


def _panel(panel: Panel, x: int, y: int) -> tuple[str, int]:
    """A panel with its upper left corner at x, y; and its height."""
    heading = panel.heading if len(panel.heading) <= 46 else f"{panel.heading[:45]}…"
    parts, top = [_text(heading, x, y + 11, f'font-size="13" font-weight="600" fill="{INK}"')], y + 20
    if panel.legend:
        step = PANEL // len(panel.legend)
        for place, (mark, text) in enumerate(panel.legend):
            left = x + place * step
            parts.append(f'<circle {LOOKS[mark]} cx="{left + 5}" cy="{top + 7}" r="4"/>')
            parts.append(_text(text, left + 14, top + 11, f'font-size="12" fill="{SOFT}"'))
        top += 20
    _, _, wide, high = re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', panel.svg)[0]
    height = round(PANEL * int(high) / int(wide))
    drawn = re.sub(r'class="([^"]+)"', lambda found: LOOKS.get(found[1], ""), panel.svg)
    drawn = drawn.replace("<text ", f'<text fill="{SOFT}" ').replace(' role="img"', "", 1)
    parts.append(drawn.replace("<svg ", f'<svg x="{x}" y="{top}" width="{PANEL}" height="{height}" ', 1))
    top += height
    if panel.ends:
        for end, at, anchor in zip(panel.ends, (x + 17, x + PANEL - 17), ("start", "end"), strict=True):
            parts.append(_text(end, at, top + 2, f'font-size="11" text-anchor="{anchor}" fill="{SOFT}"'))
        top += 6
    return "".join(parts), top - y


def _text(text: str, x: int, y: int, look: str) -> str:
    return f'<text x="{x}" y="{y}" {look}>{escape(text)}</text>'


def thin(points: Points) -> Points:
    """At most MAX_POINTS points: means of as many neighbours as that takes."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span low to high: the first is at most low, the last at least high."""
    if high <= low:
        reach = abs(low) * 0.1 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _frame(series: dict[str, Points]) -> tuple[list[float], list[float], Place]:
    """Ticks of both axes, and the function that places a point as "x,y"."""
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high]
    y_ticks = nice_ticks(min(ys), max(ys))

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / (x_high - x_low)
        up = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{_n(across)},{_n(up)}"

    return x_ticks, y_ticks, place


def _axes(x_ticks: list[float], y_ticks: list[float], place: Place, x_label: str) -> str:
    parts = []
    for tick in y_ticks:
        y = place(0, tick).split(",")[1]
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_label(tick)}</text>')
    middle = _n(LEFT + (WIDTH - LEFT - RIGHT) / 2)
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _svg(title: str, content: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def _label(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212").replace("e+0", "e").replace("e\u22120", "e\u2212")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
