"""Draw pictures as SVG text: the same numbers give the same bytes, the colours are the page's CSS classes.

Written by hand and not with matplotlib, whose colours are fixed in the file: a page that follows light and dark needs
`currentColor` and classes. Every function returns one `<svg>` element; texts are escaped.
"""

import math
from collections.abc import Callable
from html import escape
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 280, 170
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 8, 34  # margins for the axes' numbers
MAX_POINTS = 120  # more would be a smear: points are then means of neighbours

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
