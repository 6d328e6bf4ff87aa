"""The pictures of a model card: SVG files that lie beside the records, drawn from the files of the build.

Covered: training curves, the metrics against the base's, lengths in tokens. What has no numbers has no picture.
Not covered: whether the files are this build's.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from prefbuild.gates import titles
from prefbuild.report.page import curve_names, curve_pictures, measured_number, number, standard_error
from prefbuild.report.pictures import Panel, comparison, figure, histogram, nice_ticks
from prefbuild.stages.report import read_curve, read_lengths

Drawn = tuple[str, str]  # an SVG file's text, and what it shows in words


def write_plots(root: Path, folder: Path, *, resolved: dict[str, Any], metrics: dict[str, Any]) -> dict[str, str]:
    """Draw what there is into a folder. Returns what each picture shows, by file name, in the order of a card.

    `metrics` is {"prepare", "train", "merge", "evaluate", "baseline"}, as metrics.json keeps it. StageError for a file
    of the build that can't be read.
    """
    drawn = {
        "training.svg": _training(
            resolved["train"]["settings"]["train"]["method"], root / resolved["train"]["outputs"]["plots"] / "train"
        ),
        "measured.svg": _measured(resolved, metrics),
        "lengths.svg": _lengths(root / resolved["prepare"]["outputs"]["lengths"]),
    }
    shown = {}
    for name, found in drawn.items():
        if found is not None:
            svg, shown[name] = found
            (folder / name).write_text(svg, encoding="utf-8")
    return shown


def _training(method: str, folder: Path) -> Drawn | None:
    paths = {curve: folder / f"{curve}.tsv" for curve in curve_names(method)}
    curves = {curve: read_curve(path) for curve, path in paths.items() if path.exists()}
    panels, says = [], []
    for curve in curve_pictures(method, curves):
        if not curve["picture"]:
            continue
        heading = curve["title"] + (f" ({curve['note']})" if curve["note"] else "")
        legend = [(f"dot c{place}", name) for place, name in enumerate(curve["legend"], 1)]
        panels.append(Panel(heading=heading, svg=str(curve["picture"]), legend=legend))
        says.append(f"{curve['title'].lower()} from {curve['first']} to {curve['last']}")
    if not panels:
        return None
    title = f"Training by step: {', '.join(says)}"
    return figure(title, panels), title


def _measured(resolved: dict[str, Any], metrics: dict[str, Any]) -> Drawn | None:
    panels, says = [], []
    for task in titles(resolved["gate"]["settings"]["measurements"]).values():
        model, base = metrics["evaluate"].get(task, {}), metrics["baseline"].get(task, {})
        for metric in sorted(model.keys() & base.keys() - {"n"}):
            if metric.endswith("_stderr") or not (is_number(model[metric]) and is_number(base[metric])):
                continue
            both = [(scores[metric], _stderr(scores, metric)) for scores in (base, model)]
            ends = [value + sign * error for value, error in both for sign in (-1, 1)]
            in_one = all(0 <= value <= 1 for value, _ in both)
            ticks = [0.0, 1.0] if in_one else nice_ticks(min(0.0, *ends), max(0.0, *ends))
            title = f"{task} {metric}: base {number(base[metric])}, this model {number(model[metric])}"
            marks = zip(("ring", "disc"), ("base", "this model"), both, strict=True)
            panels.append(
                Panel(
                    heading=f"{task} {metric}",
                    svg=comparison(title, both[0], both[1], ticks[0], ticks[-1]),
                    legend=[(mark, f"{who} {_with_error(*value)}") for mark, who, value in marks],
                    ends=(number(ticks[0]), number(ticks[-1])),
                )
            )
            says.append(title)
    return (figure("; ".join(says), panels), "; ".join(says)) if panels else None


def _lengths(path: Path) -> Drawn | None:
    if not path.exists():
        return None
    parts = read_lengths(path)
    width = min((b - a for bins in parts.values() for (a, _), (b, _) in pairwise(sorted(bins))), default=1)
    over = {part: max((edge for edge, rows in bins if rows), default=0) + width for part, bins in parts.items()}
    title = "Rows by length in tokens: " + ", ".join(f"{part} all under {edge}" for part, edge in over.items())
    legend = [(f"dot c{place}", part) for place, part in enumerate(parts, 1)]
    panel = Panel(heading="Rows by length in tokens", svg=histogram(title, parts, "tokens"), legend=legend)
    return figure(title, [panel]), title


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stderr(scores: dict[str, Any], metric: str) -> float:
    found = scores.get(f"{metric}_stderr")
    return float(found) if is_number(found) else 0.0


def _with_error(value: float, stderr: float) -> str:
    return measured_number(value, stderr) + (f" ± {standard_error(stderr)}" if stderr else "")
