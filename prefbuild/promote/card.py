"""The model card: what a published model is, what it was measured to do, and how to use, check and rebuild it.

Every number is read from the files that are published; the template says what is left out when there is nothing to say.
The same facts give the same bytes. Not covered: whether the Hub knows the licence that the base states.
"""

import json
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

from prefbuild.compare import compare_samples
from prefbuild.errors import PromotionRefused, StageError
from prefbuild.gates import titles
from prefbuild.promote.plots import is_number
from prefbuild.recipe import Columns
from prefbuild.sources import title

CONFIDENCE = 0.95
TUNED_ON = {
    "pairs": "preferences",
    "answers": "answers",
    "labelled": "answers marked good or bad",
    "prompts": "prompts, whose completions rewards scored,",
}
LABELS = (("true", "good"), ("false", "bad"))


def render_card(
    root: Path,
    *,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    metrics: dict[str, Any],
    facts: dict[str, Any],
    plots: dict[str, str],
) -> str:
    """README.md of a published version, with YAML front matter.

    `metrics` is {"prepare", "train", "merge", "evaluate", "baseline"}, as metrics.json keeps it; `facts` are what
    provenance gathered; `plots` is what each picture below prefbuild/ shows, by file name.
    Raises PromotionRefused when the text that `promote.card` names can't be read.
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
    environment.filters |= {
        "cell": cell,
        "alt": lambda text: cell(text).replace("[", "\\[").replace("]", "\\]"),
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "shell": shlex.quote,
        "short": short,
        "value": lambda value: number(value) if is_number(value) else cell(value),
    }
    settings = resolved["promote"]["settings"]
    inputs = resolved["promote"]["inputs"]
    target = settings["promote"]
    train = resolved["train"]["settings"]
    base = _base(resolved, gate, facts)
    where = _where(target, gate["recipe"], facts["version"])
    text = environment.get_template("card.md.jinja").render(
        front=_front_matter(root, resolved, gate, metrics, facts, base),
        name=gate["recipe"],
        version=facts["version"],
        description=" ".join(settings["description"].split()),
        own_text=_own_text(root, target["card"]),
        base=base,
        method=train["train"]["method"],
        tuned_on=TUNED_ON[_data(resolved)["shape"]],
        adapter=target["adapter"],
        merged=target["merged"],
        where=where,
        chat=_has_chat_template(root / inputs["merged"]),
        scores=_scores(root, resolved, metrics),
        confidence=CONFIDENCE,
        tools=facts["evaluated_with"],
        gate=gate,
        plots=plots,
        trained=_flatten({key: value for key, value in metrics["train"].items() if key != "machine"}),
        settings=_settings(resolved),
        sources=_sources(resolved, facts),
        columns=_columns(resolved),
        rows=_rows(metrics["prepare"]),
        facts=facts,
        remote=facts.get("git_remote"),
        images=facts.get("images", []),
        reference=_reference(resolved, gate),
    )
    return text.rstrip("\n") + "\n"


def cell(value: Any) -> str:
    """A value as text that can't break a Markdown table: one line, bars and backticks escaped, nothing unprintable."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;")


def number(value: float) -> str:
    """Four significant digits, no exponent for what people read as plain numbers."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def short(digest: str) -> str:
    """The first twelve hex digits of a digest, as on the report."""
    return digest.removeprefix("sha256:")[:12]


def stated_license(model: Path) -> str | None:
    """The licence the base's own card states, as the Hub names it; None when there is no card, or it states none."""
    return _stated(model).get("license")


# ---- front matter


def _front_matter(
    root: Path,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    metrics: dict[str, Any],
    facts: dict[str, Any],
    base: dict[str, Any],
) -> str:
    from huggingface_hub import ModelCardData

    target = resolved["promote"]["settings"]["promote"]
    results = _eval_results(resolved, metrics)
    data = [facts["lock"]["entries"][path]["source"] for path in resolved["prepare"]["inputs"]["data"]]
    relation = ("finetune" if target["merged"] else "adapter") if base["hub"] else None
    return ModelCardData(
        base_model=base["hub"],
        base_model_relation=relation,
        datasets=list(dict.fromkeys(source["repo"] for source in data if source["source"] == "hub")) or None,
        library_name="transformers" if target["merged"] else "peft",
        pipeline_tag="text-generation",
        **_license(root, resolved, base),
        tags=["prefbuild", "preference-tuning", resolved["train"]["settings"]["train"]["method"], "trl"],
        model_name=gate["recipe"] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _eval_results(resolved: dict[str, Any], metrics: dict[str, Any]) -> list[Any]:
    """What was measured, for the model-index. It has no place for standard errors, or for what the base reached."""
    from huggingface_hub import EvalResult

    measurements = resolved["gate"]["settings"]["measurements"]
    asked = {measurement["key"]: measurement for measurement in measurements}
    results = []
    for key, task in titles(measurements).items():
        settings = {"num_few_shot": asked[key]["num_fewshot"], "limit": asked[key]["limit"]}
        for metric, value in sorted(metrics["evaluate"].get(task, {}).items()):
            if metric != "n" and not metric.endswith("_stderr") and is_number(value):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=task,
                        dataset_args={name: number for name, number in settings.items() if number is not None} or None,
                        metric_type=metric,
                        metric_name=f"{task} {metric}",
                        metric_value=value,
                    )
                )
    return results


def _license(root: Path, resolved: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """license, and for `other` its name and a link that leads somewhere from where this card lies."""
    inputs = resolved["promote"]["inputs"]
    stated = _stated(root / inputs["base_model"])
    if stated.get("license") != "other":
        return {"license": stated["license"]} if "license" in stated else {}
    link = stated.pop("license_link", "")
    merged = root / inputs["merged"] if resolved["promote"]["settings"]["promote"]["merged"] else None
    if "://" in link or (link and merged and (merged / link).is_file()):
        stated["license_link"] = link
    elif link and base["source"] == "hub":
        from huggingface_hub import constants

        stated["license_link"] = f"{constants.ENDPOINT}/{base['hub']}/blob/{base['commit']}/{link}"
    return stated


def _stated(model: Path) -> dict[str, str]:
    """What the front matter of a model's card says about its licence."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    card = model / "README.md"
    if not card.exists():
        return {}
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        front = YAML(typ="safe").load(rest.partition("\n---")[0])
    except YAMLError:
        return {}
    found = front if isinstance(front, dict) else {}
    keys = ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if isinstance(found.get(key), str)}


# ---- where it comes from, and where it is


def _base(resolved: dict[str, Any], gate: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What people know the base by, its exact revision, its id on the Hub or None, and what it is loaded by."""
    path = resolved["train"]["inputs"]["model"]
    pinned = facts["lock"]["entries"].get(path)
    found = {"source": "recipe", "hub": None, "commit": None, "load": path, "digest": gate["judged"][path]}
    found["note"] = "  # where a build of its recipe leaves it"
    if pinned is None:
        recipe = Path(path).parent.name  # build/<recipe>/merged
        return found | {"name": f"recipe {recipe}", "title": f"recipe {recipe}", "revision": "its merged model"}
    source = pinned["source"]
    # Not the pin's own name: recipes share a pin, and each may call it something else.
    named = resolved["train"]["settings"]["base"]["name"]
    name = named if named != title(source) else None
    hub = source["repo"] if source["source"] == "hub" else name if name and _is_hub_id(name) else None
    if hub:
        found["note"] = "" if source["source"] == "hub" else "  # trained on the bytes named under Provenance"
    return found | {
        "source": source["source"],
        "hub": hub,
        "commit": pinned.get("commit"),
        "load": hub or path,
        "name": hub or (_without_folders(name) if name else _title(source)),
        "title": _title(source),
        "revision": _revision(pinned),
    }


def _reference(resolved: dict[str, Any], gate: dict[str, Any]) -> dict[str, str] | None:
    """The recipe whose model was the reference, and that model's digest; None where it was the base."""
    path = resolved["train"]["inputs"].get("reference")
    return {"name": Path(path).parent.name, "digest": gate["judged"][path]} if path else None


def _sources(resolved: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, str]]:
    pins = [facts["lock"]["entries"][path] for path in resolved["prepare"]["inputs"]["data"]]
    return [{"title": _title(pin["source"]), "revision": _revision(pin)} for pin in pins]


def _title(source: dict[str, Any]) -> str:
    """The name people know a source by, and no path of the machine it was read on."""
    if source["source"] == "hub":
        return str(source["repo"])
    return _without_folders(title(source))


def _without_folders(name: str) -> str:
    """The last part of an absolute path; other names as they are."""
    return PurePosixPath(name).name if PurePosixPath(name).is_absolute() else name


def _revision(pinned: dict[str, Any]) -> str:
    files = pinned["files"]
    if pinned.get("commit"):
        return f"commit {short(pinned['commit'])}"
    return f"sha256 {short(files[0]['sha256'])}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # without an owner are only a few old ones


def _where(target: dict[str, Any], name: str, version: str) -> dict[str, Any]:
    """The arguments of from_pretrained, and what `prefbuild verify` is asked for."""
    if target["to"] == "hub":
        revision = f", revision={json.dumps(version)}"
        repo = json.dumps(target["repo"])
        adapter = f'{repo}{revision}, subfolder="adapter"' if target["merged"] else f"{repo}{revision}"
        return {"merged": f"{repo}{revision}", "adapter": adapter, "verify": f"{target['repo']}@{version}"}
    folder = f"{target['path'].rstrip('/')}/{name}/{version}"
    adapter = f"{folder}/adapter" if target["merged"] else folder
    quoted = {role: json.dumps(path, ensure_ascii=False) for role, path in (("merged", folder), ("adapter", adapter))}
    return quoted | {"verify": folder}


def _own_text(root: Path, card: str | None) -> str:
    """What the recipe's owner has to say, as it is."""
    if card is None:
        return ""
    try:
        return (root / card).read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise PromotionRefused(f"{card}: is missing; promote.card names it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromotionRefused(f"{card}: can't be read as text ({error}); promote.card names it") from None


# ---- numbers


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
    if not is_number(value):
        return ""
    return number(value) + (f" ± {stderr:.2g}" if is_number(stderr) else "")


def _rows(prepare: dict[str, Any]) -> list[tuple[str, Any]]:
    """What became of the rows of data: what is 0 is left out, but rows in and out."""
    rows = prepare["rows"]
    found = [("read", rows["in"])]
    found += [(f"dropped: {reason.replace('_', ' ')}", count) for reason, count in prepare["dropped"].items() if count]
    found.append(("trained on", rows["train"]))
    found += [(f"trained on: {kind} answers", prepare["labels"][key]) for key, kind in LABELS if "labels" in prepare]
    found += [("held out", rows["held_out"])] if rows["held_out"] else []
    found += [(f"{side} answers cut", count) for side, count in prepare.get("truncated", {}).items() if count]
    found += [
        (f"{side} answers that lost their end of turn", count)
        for side, count in prepare.get("end_of_turn_lost", {}).items()
        if count
    ]
    return found


def _settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """Settings of training, and those of the data that decide what is trained on."""
    train = resolved["train"]["settings"]
    data = {key: value for key, value in _data(resolved).items() if key != "columns"}
    flat = {**_flatten(train["train"]), "seed": train["seed"], **_flatten({"data": data})}
    return {key: value for key, value in flat.items() if value is not None and value != []}


def _columns(resolved: dict[str, Any]) -> list[tuple[str, str]]:
    columns = _data(resolved)["columns"]
    return [(role, columns[role]) for role in Columns.model_fields if columns.get(role) is not None]


def _data(resolved: dict[str, Any]) -> dict[str, Any]:
    return dict(resolved["prepare"]["settings"]["data"])


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _has_chat_template(merged: Path) -> bool:
    config = merged / "tokenizer_config.json"
    if (merged / "chat_template.jinja").exists():
        return True
    return config.exists() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
