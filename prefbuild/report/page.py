"""Put what a build made on one HTML page.

Covered: everything shown is escaped, nothing is loaded from elsewhere, and there are no scripts. Not covered: reading
the files, which is the stage's.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.compare import paired
from prefbuild.errors import StageError
from prefbuild.methods import PARTS
from prefbuild.report import pictures

MAX_TEXT = 1200  # characters of a prompt or an answer
NUM_EACH = 2  # samples shown of those the model got better, got worse, and answered alike
SURE = 0.95  # what p-values are held against
MINUS = "\u2212"

# The curves that are drawn, by method: a picture's title, and what TRL calls the lines in it.
_REWARDS = {
    "Reward margin": ["rewards/margins"],
    "Reward accuracy": ["rewards/accuracies"],
    # In one picture: both may fall while the margin grows.
    "Rewards": ["rewards/chosen", "rewards/rejected"],
}
_COMPLETIONS = {
    "Reward": ["reward"],
    "Spread of rewards in a group": ["reward_std"],
    "Mean length of completions, tokens": ["completions/mean_length"],
    "KL": ["kl"],
    "Loss": ["loss"],
}
CURVES: dict[str, dict[str, list[str]]] = {
    "dpo": {"Loss": ["loss"], **_REWARDS},
    "orpo": {"Loss": ["loss"], **_REWARDS},
    "simpo": {"Loss": ["loss"], **_REWARDS},
    "sft": {"Loss": ["loss"], "Token accuracy": ["mean_token_accuracy"], "Entropy": ["entropy"]},
    "kto": {"Loss": ["loss"], "Reward margin": ["rewards/margins"], "Rewards": _REWARDS["Rewards"], "KL": ["kl"]},
    "grpo": _COMPLETIONS,
    "rloo": _COMPLETIONS,
}
# Curves that a run may lack: KTO logs rewards of the answers that a step has, and KL is measured with some settings.
MAY_LACK = {
    "kto": ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl"),
    "grpo": ("kl",),
    "rloo": ("kl",),
}

Metrics = dict[str, float]
PART_NAMES = list(dict.fromkeys(part for parts in PARTS.values() for part in parts))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement of the model and of its base: <key>.json of both, and the samples in pairs."""

    key: str
    model: dict[str, Any]
    base: dict[str, Any]
    samples: list[tuple[dict[str, Any], dict[str, Any]]]  # (model's, base's) of the same document


@dataclass(frozen=True, kw_only=True)
class Built:
    """All that is shown of one recipe, as its files have it."""

    name: str
    method: str
    base: str  # the baseline's name
    gate: dict[str, Any]
    prepare: dict[str, Any]
    train: dict[str, Any]
    merge: dict[str, Any]
    lengths: dict[str, list[tuple[int, int]]]  # by part: (lower edge of a bin in tokens, rows)
    curves: dict[str, list[tuple[float, float]]]  # by TRL's name: (step, value)
    measured: list[Measured]


def render(builds: list[Built]) -> str:
    """The page. StageError when the base lacks a metric that the model has."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "short": short,
        "measured": measured_number,
        "error": standard_error,
    }
    return environment.get_template("page.html.jinja").render(recipes=[view(built) for built in builds]) + "\n"


def view(built: Built) -> dict[str, Any]:
    """A recipe as the template shows it: texts, numbers and pictures."""
    metrics = [row for measured in built.measured for row in metric_rows(measured, _title(measured, built.measured))]
    judged = {rule["metric"] for rule in built.gate["rules"]}
    firsts = [
        row for place, row in enumerate(metrics) if row["task"] not in {other["task"] for other in metrics[:place]}
    ]
    return {
        "built": built,
        "passed": built.gate["passed"] is True,
        "holding": sum(rule["passed"] is True for rule in built.gate["rules"]),
        "metrics": metrics,
        # What the gates judge, or where they judge nothing that is measured, each task's first metric.
        "headlines": [row for row in metrics if f"evaluate.{row['task']}.{row['metric']}" in judged] or firsts,
        "curves": curve_pictures(built.method, built.curves),
        "rows": row_accounting(built.prepare),
        "lengths": _markup(pictures.histogram("Rows by length in tokens", built.lengths, "tokens")),
        "facts": flatten(built.train),
        "samples": [chosen_samples(measured, _title(measured, built.measured)) for measured in built.measured],
    }


def metric_rows(measured: Measured, task: str) -> list[dict[str, Any]]:
    """A row for every metric of a measurement: model, base, change, and whether the change is more than noise."""
    ours, theirs = measured.model["metrics"], measured.base["metrics"]
    rows = []
    for metric, value in sorted(ours.items()):
        if metric == "n" or metric.endswith("_stderr"):
            continue
        if metric not in theirs:
            raise StageError(f"{built_from(measured)}: the base has no {metric}; run `dvc repro`")
        base = theirs[metric]
        better_if = measured.model.get("higher_is_better", {}).get(metric)
        change = value - base
        p_value, error = _paired(measured, metric, change)
        low, high = _range(value, base, ours.get(f"{metric}_stderr"), theirs.get(f"{metric}_stderr"))
        title = f"{task} {metric}: base {number(base)}, model {number(value)}"
        rows.append(
            {
                "task": task,
                "metric": metric,
                "n": measured.model["n"],
                "model": value,
                "model_stderr": ours.get(f"{metric}_stderr"),
                "base": base,
                "base_stderr": theirs.get(f"{metric}_stderr"),
                "change": change,
                "change_stderr": error,
                "better_if": {True: "higher is better", False: "lower is better", None: ""}[better_if],
                "verdict": ""
                if better_if is None or change == 0
                else "better"
                if (change > 0) == better_if
                else "worse",
                "noise": p_value is not None and p_value > 1 - SURE,
                "says": "" if p_value is None else significance(p_value),
                "picture": _markup(
                    pictures.comparison(
                        title,
                        (base, theirs.get(f"{metric}_stderr", 0.0)),
                        (value, ours.get(f"{metric}_stderr", 0.0)),
                        low,
                        high,
                    )
                ),
                "low": low,
                "high": high,
            }
        )
    return rows


def curve_names(method: str) -> list[str]:
    """All curves that are drawn of a method."""
    return [name for names in CURVES[method].values() for name in names]


def curve_pictures(method: str, curves: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A picture for each title in CURVES that the run has a curve for."""
    shown = []
    for title, wanted in CURVES[method].items():
        names = [name for name in wanted if name in curves]
        if not names:
            continue
        finite = {name: [point for point in curves[name] if all(map(math.isfinite, point))] for name in names}
        lost = sum(len(curves[name]) - len(points) for name, points in finite.items())
        size = math.ceil(max(len(points) for points in finite.values()) / pictures.MAX_POINTS)
        notes = [f"each point is the mean of {size}"] if size > 1 else []
        notes += [f"{lost} points are no finite numbers"] if lost else []
        drawn = {name.rpartition("/")[2]: points for name, points in finite.items() if points}
        shown.append(
            {
                "title": title,
                "legend": list(drawn) if len(names) > 1 else [],
                "first": " / ".join(number(points[0][1]) for points in drawn.values()),
                "last": " / ".join(number(points[-1][1]) for points in drawn.values()),
                "note": "; ".join(notes),
                "picture": _markup(pictures.line_chart(f"{title} by step", drawn, "step")) if drawn else "",
            }
        )
    return shown


def row_accounting(prepare: dict[str, Any]) -> dict[str, Any]:
    """Every row that came in: trained on, held out, or dropped for a reason."""
    rows, dropped = prepare["rows"], prepare["dropped"]
    parts = [("train", "to train on", rows["train"]), ("held", "held out", rows["held_out"])]
    parts += [
        (f"drop{place % 8}", reason.replace("_", " "), count)
        for place, (reason, count) in enumerate(sorted(dropped.items()))
    ]
    says = ", ".join(f"{count:,} {label}" for _, label, count in parts if count)
    return {
        "in": rows["in"],
        "out": rows["out"],
        "dropped": sum(dropped.values()),
        "parts": [{"kind": kind, "label": label, "count": count} for kind, label, count in parts],
        "picture": _markup(
            pictures.stacked_bar(f"{rows['in']:,} rows in: {says}", [(kind, count) for kind, _, count in parts])
        ),
        "truncated": prepare["truncated"],
        "end_of_turn_lost": prepare["end_of_turn_lost"],
        "boundary_differs": prepare.get("boundary_differs", 0),  # of prompts alone there is no boundary
        "labels": prepare.get("labels"),
        "tokens": {part: prepare["tokens"][part] for part in PART_NAMES if part in prepare["tokens"]},
    }


def chosen_samples(measured: Measured, task: str) -> dict[str, Any]:
    """A few documents: the first that the model got better, got worse, and answered as well as its base."""
    metric = next((name for name in sorted(measured.samples[0][0]["metrics"]) if _per_sample(measured, name)), None)
    higher = measured.model.get("higher_is_better", {}).get(metric, True)
    groups: dict[str, list[dict[str, Any]]] = {"better": [], "worse": [], "alike": []}
    for mine, theirs in measured.samples:
        apart = (mine["metrics"][metric] - theirs["metrics"][metric]) if metric else 0
        kind = "alike" if apart == 0 else "better" if (apart > 0) == higher else "worse"
        groups[kind].append(
            {
                "kind": kind,
                "doc": mine["doc_id"],
                "prompt": _tail(as_text(mine["prompt"])),
                "target": _head(as_text(mine["target"])),
                "base": _head(as_text(theirs["response"])),
                "model": _head(as_text(mine["response"])),
                "base_score": theirs["metrics"][metric] if metric else None,
                "model_score": mine["metrics"][metric] if metric else None,
            }
        )
    return {
        "task": task,
        "metric": metric,
        "n": len(measured.samples),
        "counts": {kind: len(members) for kind, members in groups.items()},
        "shown": [sample for members in groups.values() for sample in members[:NUM_EACH]],
    }


# ---- texts


def number(value: Any) -> str:
    """A number to read: thousands separated, four digits that matter, a true minus sign. "missing" for None."""
    if value is None:
        return "missing"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    value = value or 0  # no negative zero
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return text.replace("-", MINUS)


def signed(value: float, stderr: float | None = None) -> str:
    """A change: with its sign."""
    return ("+" if value > 0 else "") + measured_number(value, stderr)


def measured_number(value: float, stderr: float | None) -> str:
    """A value with as many decimals as its standard error has two digits that matter."""
    if not stderr or not math.isfinite(stderr):
        return number(value)
    return f"{value:,.{_decimals(stderr)}f}".replace("-", MINUS)


def standard_error(stderr: float) -> str:
    """A standard error with two digits that matter."""
    return f"{stderr:,.{_decimals(stderr)}f}" if stderr and math.isfinite(stderr) else number(stderr)


def short(digest: str | None) -> str:
    """The first twelve hex digits of a digest."""
    return (digest or "none").removeprefix("sha256:")[:12]


def significance(p_value: float) -> str:
    """What a two-sided p-value says, in words."""
    said = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    return said if p_value <= 1 - SURE else f"within noise ({said})"


def as_text(value: Any) -> str:
    """A prompt, target or response, which a task may also keep as a list or a number."""
    return (
        value if isinstance(value, str) else "\n".join(map(as_text, value)) if isinstance(value, list) else str(value)
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def built_from(measured: Measured) -> str:
    """Where a measurement came from, for an error."""
    return f"measurement {measured.key} of {measured.model['task']}"


# ---- numbers


def _title(measured: Measured, others: list[Measured]) -> str:
    """The task's name in evaluate.json: with the key where it is measured in two ways."""
    task = str(measured.model["task"])
    return task if sum(other.model["task"] == task for other in others) == 1 else f"{task}-{measured.key}"


def _paired(measured: Measured, metric: str, change: float) -> tuple[float | None, float | None]:
    """p-value and standard error of a change; None for a metric that is no mean over samples."""
    if not _per_sample(measured, metric) or len(measured.samples) < 2:
        return None, None
    test = paired(
        [float(mine["metrics"][metric]) for mine, _ in measured.samples],
        [float(theirs["metrics"][metric]) for _, theirs in measured.samples],
        SURE,
    )
    if not math.isclose(test.mean_difference, change, rel_tol=1e-6, abs_tol=1e-9):
        return None, None
    return test.p_value, test.stderr


def _per_sample(measured: Measured, metric: str) -> bool:
    return all(
        isinstance(sample["metrics"].get(metric), int | float) and math.isfinite(sample["metrics"][metric])
        for pair in measured.samples
        for sample in pair
    )


def _range(value: float, base: float, value_stderr: float | None, base_stderr: float | None) -> tuple[float, float]:
    """The axis a metric is shown on: 0 to 1 where it fits, else what is needed."""
    ends = [
        at + sign * (error or 0.0) for at, error in ((value, value_stderr), (base, base_stderr)) for sign in (-1, 1)
    ]
    if min(value, base) >= 0 and max(value, base) <= 1:
        return 0.0, 1.0
    errors = (value_stderr or 0.0, base_stderr or 0.0)
    ends = [value - errors[0], value + errors[0], base - errors[1], base + errors[1]]
    ticks = pictures.nice_ticks(min(0.0, *ends), max(0.0, *ends))
    return ticks[0], ticks[-1]


def _decimals(stderr: float) -> int:
    return min(8, max(0, 1 - math.floor(math.log10(stderr))))


def _head(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … {len(text) - MAX_TEXT:,} characters more"


def _tail(text: str) -> str:
    """The end of a prompt: where the question is, after the examples."""
    return text if len(text) <= MAX_TEXT else f"{len(text) - MAX_TEXT:,} characters before … {text[-MAX_TEXT:]}"


def _markup(svg: str) -> Any:
    """Our own pictures, whose texts are escaped already."""
    from markupsafe import Markup

    return Markup(svg)
