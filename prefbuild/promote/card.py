"""The model card: what a published model is, what it was measured to do, and how to use and rebuild it.

Every number is read from the files that are published; the template says what is left out when there is nothing to say.
"""

import json
from pathlib import Path
from typing import Any

from prefbuild.compare import compare_samples
from prefbuild.errors import StageError
from prefbuild.gates import titles

CONFIDENCE = 0.95


def render_card(
    root: Path, *, resolved: dict[str, Any], gate: dict[str, Any], metrics: dict[str, Any], provenance: dict[str, Any]
) -> str:
    """README.md of a published version, with YAML front matter.

    `metrics` is {"prepare", "train", "merge", "evaluate", "baseline"}, as metrics.json keeps it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; cells are escaped below
    )
    environment.filters |= {"cell": cell, "number": number, "json": lambda value: json.dumps(value, ensure_ascii=False)}
    settings = resolved["promote"]["settings"]
    inputs = resolved["promote"]["inputs"]
    target = settings["promote"]
    train = resolved["train"]["settings"]
    text = environment.get_template("card.md.jinja").render(
        name=gate["recipe"],
        version=provenance["version"],
        description=" ".join(settings["description"].split()),
        base=train["base"]["name"],
        method=train["train"]["method"],
        license=_license(root / inputs["base_model"]),
        adapter=target["adapter"],
        merged=target["merged"],
        folder=f"{target['path']}/{gate['recipe']}/{provenance['version']}",
        chat=_has_chat_template(root / inputs["merged"]),
        scores=_scores(root, resolved, metrics),
        confidence=CONFIDENCE,
        rows=_rows(metrics["prepare"]),
        settings=_settings(resolved),
        gate=gate,
        provenance=provenance,
    )
    return text.rstrip("\n") + "\n"


def cell(value: Any) -> str:
    """A value as text that can't break a Markdown table: one line, bars and backticks escaped, nothing unprintable."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;")


def number(value: float) -> str:
    """Four significant digits, no exponent for what people read as plain numbers."""
    return f"{value:.4g}"


def _scores(root: Path, resolved: dict[str, Any], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a metric: base and model with standard errors, and the paired difference where samples allow it."""
    inputs = resolved["promote"]["inputs"]
    rows = []
    for key, task in titles(resolved["gate"]["settings"]["measurements"]).items():
        model, base = metrics["evaluate"].get(task, {}), metrics["baseline"].get(task, {})
        ours, theirs = root / inputs["samples"], root / inputs["baseline"]
        for metric in sorted(key for key in model if key != "n" and not key.endswith("_stderr")):
            row = {
                "task": task,
                "metric": metric,
                "n": model.get("n"),
                "model": _with_stderr(model, metric),
                "base": _with_stderr(base, metric),
                "difference": "",
            }
            try:
                test = compare_samples(ours, theirs, key, metric, CONFIDENCE)
                row["difference"] = f"{test.mean_difference:+.4g} [{test.lower_bound:+.4g}, {test.upper_bound:+.4g}]"
            except StageError:
                pass  # a score of the whole corpus has no samples to pair
            rows.append(row)
    return rows


def _with_stderr(metrics: dict[str, Any], metric: str) -> str:
    value, stderr = metrics.get(metric), metrics.get(f"{metric}_stderr")
    if not isinstance(value, int | float):
        return ""
    return number(value) + (f" ± {stderr:.2g}" if isinstance(stderr, int | float) else "")


def _rows(prepare: dict[str, Any]) -> list[tuple[str, Any]]:
    """What became of the rows of data: what is 0 is left out, but rows in and out."""
    rows = prepare["rows"]
    found = [("read", rows["in"])]
    found += [(f"dropped: {reason.replace('_', ' ')}", count) for reason, count in prepare["dropped"].items() if count]
    found.append(("trained on", rows["train"]))
    found += [("held out", rows["held_out"])] if rows["held_out"] else []
    found += [(f"{side} answers cut", count) for side, count in prepare.get("truncated", {}).items() if count]
    found += [
        (f"{side} answers that lost their end of turn", count)
        for side, count in prepare.get("end_of_turn_lost", {}).items()
        if count
    ]
    return found


def _settings(resolved: dict[str, Any]) -> list[tuple[str, Any]]:
    train = resolved["train"]["settings"]
    data = resolved["prepare"]["settings"]["data"]
    flat = {key: value for key, value in train["train"].items() if not isinstance(value, dict) and value is not None}
    for group, values in train["train"].items():
        if isinstance(values, dict):
            flat |= {f"{group}.{key}": value for key, value in values.items()}
    flat["seed"] = train["seed"]
    flat |= {f"data.{key}": data[key] for key in ("max_prompt_length", "max_length") if key in data}
    return list(flat.items())


def _has_chat_template(merged: Path) -> bool:
    config = merged / "tokenizer_config.json"
    if (merged / "chat_template.jinja").exists():
        return True
    return config.exists() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


def _license(model: Path) -> str | None:
    """The licence the base's own card states; None when there is no card, or it states none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    card = model / "README.md"
    if not card.exists():
        return None
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        front = YAML(typ="safe").load(rest.partition("\n---")[0])
    except YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None
