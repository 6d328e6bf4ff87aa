"""Rules on metrics, judged from the files of a build: fail closed.

    judge(settings, inputs, name) -> the verdict, as gate.json keeps it

A rule holds only when its metric is there, is a finite number, and is this model's. What belongs together is read
from the manifests: adapter (or all weights) from prepared, base and reward models, merged from it and base,
evaluation of merged, baseline of base; evaluate.json repeats evaluate/<key>.json, whose metrics are the means of the
samples in evaluate/<key>.jsonl. Where that breaks, an `artifact` rule says so and no rule holds.

A recipe without evaluate (a reward model's) has no `evaluate`, `samples` and `baseline` among its inputs; a rule on
them fails.

Covered: bytes of the folders read here (prepared, samples, baseline, others), manifests of the rest. Not covered: the
bytes of the weights, which promote hashes, and a forger who rewrites samples and every digest above them.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST, input_digest, read_json, read_manifest, sha256_file, verify_artifact
from prefbuild.compare import compare_samples, read_samples
from prefbuild.errors import StageError

RULES = ("min", "max", "min_delta", "max_drop")
METRICS = ("prepare", "train", "merge", "evaluate")
# Another recipe's model as the reference, and what the reference says to the rows, where a build has them.
REFERENCE = ("reference", "reference_log_probs")
# Two sums of the same numbers in another order; far below what any metric can resolve.
SUM_TOLERANCE = 1e-9
# 0.8 - 0.7 is not 0.1 in binary: a rule is not failed over the last bit of a number.
TOLERANCE = 1e-12


def trained_role(known: Any) -> str:
    """The role of what was trained in a build's inputs, a verdict or facts: `adapter`, or `trained` for all weights."""
    return "trained" if "trained" in known else "adapter"


def folders(inputs: dict[str, Any]) -> tuple[str, ...]:
    """The roles of the folders that a verdict rests on."""
    roles = ("prepared", trained_role(inputs), "merged", "samples", "base_model", "baseline", *REFERENCE)
    return tuple(role for role in roles if role in inputs)  # a reward model has no samples and baseline


class _Unfit(Exception):
    """Why a rule can't hold: one sentence."""


@dataclass
class _Build:
    """The files of one build, read once, and what is wrong with them as a whole."""

    root: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)  # by role
    problems: list[str] = field(default_factory=list)

    def path(self, role: str) -> Path:
        return self.root / str(self.inputs[role])

    def digest(self, role: str) -> str | None:
        return self.manifests[role]["digest"] if role in self.manifests else None

    def say(self, error: Exception | str) -> str:
        """The sentence with paths relative to the project, so that a verdict has the same bytes anywhere."""
        return str(error) if self.root == Path() else str(error).replace(f"{self.root}/", "")


def judge(settings: dict[str, Any], inputs: dict[str, Any], name: str, root: Path = Path()) -> dict[str, Any]:
    """Judge a build by its gates. Returns the verdict; raises nothing for bad metrics, which fail their rules.

    `settings` and `inputs` are those of the resolved section `gate`; paths are relative to `root`.
    """
    build = _Build(root=root, name=name, settings=settings, inputs=inputs)
    judged = _read(build)
    _check_chain(build)
    _check_rows(build)
    _check_evaluation(build)
    rules = [_artifact_rule(problem) for problem in build.problems]
    for gate in settings["gates"]:
        asked = [rule for rule in RULES if gate.get(rule) is not None]
        rules += [_judge_rule(build, gate, rule) for rule in asked]
        if not asked:
            nothing = f"the gate on {gate.get('metric')} asks for nothing: give min, max, min_delta or max_drop"
            rules.append(_artifact_rule(nothing))
    if not rules:
        rules.append(_artifact_rule("there are no gates, and what is not judged does not pass"))
    return {
        "recipe": name,
        "passed": all(rule["passed"] for rule in rules),
        "artifact": build.digest("merged"),
        trained_role(inputs): build.digest(trained_role(inputs)),
        "judged": judged,
        "rules": rules,
    }


def metric_stages(inputs: dict[str, Any]) -> list[str]:
    """The stages whose metrics a recipe's gates judge: those of METRICS that it has."""
    return [stage for stage in METRICS if stage in inputs]


def titles(measurements: list[dict[str, Any]]) -> dict[str, str]:
    """What evaluate.json calls each measurement, by key: its task's name, or name-key where two are of one task."""
    names = [measurement["name"] for measurement in measurements]
    return {m["key"]: m["name"] if names.count(m["name"]) == 1 else f"{m['name']}-{m['key']}" for m in measurements}


def verdict_table(gate: dict[str, Any], colour: bool | None = None) -> str:
    """A verdict as lines to read. Colour: yes, no, or (None) only where stdout is a terminal."""
    colour = sys.stdout.isatty() if colour is None else colour
    rules = gate["rules"]
    holding = sum(rule["passed"] for rule in rules)
    lines = [f"{gate['recipe']}: {_mark(gate['passed'], colour)}, {holding} of {len(rules)} rules hold"]
    asked = [f"{r['metric']} {r['rule']}" + ("" if r["bound"] is None else f" {r['bound']:g}") for r in rules]
    width = max(map(len, asked), default=0)
    for words, rule in zip(asked, rules, strict=True):
        lines.append(f"  {_mark(rule['passed'], colour)}  {words:<{width}}  {rule['says']}")
    # Metric names come from files: no control characters on a terminal but the colours above.
    return "".join(c for c in "\n".join(lines) if c.isprintable() or c in "\n\033")


def _mark(passed: bool, colour: bool) -> str:
    word = "PASS" if passed else "FAIL"
    return f"\033[{32 if passed else 31}m{word}\033[0m" if colour else word


# ---- the files, and whether they belong together


def _read(build: _Build) -> dict[str, str | None]:
    """Read metrics and manifests; returns the digest of every file and folder judged, null for what is not there."""
    judged: dict[str, str | None] = {}
    for stage in metric_stages(build.inputs):
        judged[build.inputs[stage]] = None
        try:
            metrics = read_json(build.path(stage))
            judged[build.inputs[stage]] = "sha256:" + sha256_file(build.path(stage))
            if not isinstance(metrics, dict):
                raise StageError(f"{build.path(stage)}: holds no metrics")
            build.metrics[stage] = metrics
        except StageError as error:
            build.problems.append(build.say(error))
    for role in folders(build.inputs):
        # The folders whose files are read below are hashed; the weights' own bytes are promote's to hash.
        read = verify_artifact if role in ("prepared", "samples") else read_manifest
        judged[build.inputs[role]] = None
        try:
            build.manifests[role] = read(build.path(role))
        except StageError as error:
            # A broken baseline fails the rules that compare with it, no others.
            if role != "baseline":
                build.problems.append(build.say(error))
    for path in [build.inputs[role] for role in folders(build.inputs)] + list(build.inputs.get("others", [])):
        try:
            judged[path] = input_digest(build.root / path) if (build.root / path).exists() else None
            judged[f"{path}/{MANIFEST}"] = "sha256:" + sha256_file(build.root / path / MANIFEST)
        except (StageError, FileNotFoundError):
            judged[path] = judged[f"{path}/{MANIFEST}"] = None
    return judged


def _check_chain(build: _Build) -> None:
    """Every artifact was made from the one before it, and is this recipe's."""
    trained = trained_role(build.inputs)
    for role, stage in (
        ("prepared", "prepare"),
        ("reference_log_probs", "reference"),
        (trained, "train"),
        ("merged", "merge"),
        ("samples", "evaluate"),
    ):
        manifest = build.manifests.get(role)
        if manifest is not None and (manifest.get("stage"), manifest.get("name")) != (stage, build.name):
            made = f"{manifest.get('stage')} of {manifest.get('name')}"
            build.problems.append(f"{build.inputs[role]}: is {made}, not {stage} of {build.name}")
    for role, source, key in (
        ("prepared", "base_model", "model"),
        (trained, "prepared", "prepared"),
        (trained, "base_model", "model"),
        (trained, "reference", "reference"),
        (trained, "reference_log_probs", "reference_log_probs"),
        ("reference_log_probs", "prepared", "prepared"),
        ("reference_log_probs", "base_model", "model"),
        ("reference_log_probs", "reference", "reference"),
        ("merged", trained, trained),
        ("merged", "base_model", "model"),
        ("samples", "merged", "model"),
    ):
        if role not in build.manifests or source not in build.manifests:
            continue  # said already
        made_from = (build.manifests[role].get("inputs") or {}).get(key)
        if made_from != build.digest(source):
            build.problems.append(
                f"{build.inputs[role]}: was made from {key} {_short(made_from)}, but {build.inputs[source]} is "
                f"{_short(build.digest(source))}: stale, run `dvc repro`"
            )
    asked = (build.manifests.get(trained, {}).get("inputs") or {}).get("reward_models", {})
    for path in build.inputs.get("reward_models", []):
        try:
            now = read_manifest(build.root / path)["digest"]
        except StageError as error:
            build.problems.append(build.say(error))
            continue
        if trained in build.manifests and asked.get(path) != now:
            build.problems.append(
                f"{build.inputs[trained]}: was trained by reward model {_short(asked.get(path))}, but {path} is "
                f"{_short(now)}: stale, run `dvc repro`"
            )


def _check_rows(build: _Build) -> None:
    """prepare.json counts every row, and the rows that are there."""
    where = build.inputs["prepare"]
    if "prepare" not in build.metrics or "prepared" not in build.manifests:
        return
    rows, dropped = build.metrics["prepare"].get("rows"), build.metrics["prepare"].get("dropped")
    if not _counts(rows, ("in", "out", "train", "held_out")) or not _counts(dropped, ()):
        build.problems.append(f"{where}: rows and dropped are not counts")
        return
    lost = rows["in"] - rows["out"] - sum(dropped.values())
    if lost or rows["out"] != rows["train"] + rows["held_out"]:
        build.problems.append(
            f"{where}: {rows['in']} rows in are not {rows['out']} out ({rows['train']} train, {rows['held_out']} held "
            f"out) and {sum(dropped.values())} dropped"
        )
    for part in ("train", "held_out"):
        path = build.path("prepared") / f"{part}.jsonl"
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        if lines != rows[part]:
            build.problems.append(f"{where}: says {rows[part]} {part} rows, {build.say(str(path))} has {lines}")


def _counts(value: Any, keys: tuple[str, ...]) -> bool:
    return (
        isinstance(value, dict)
        and all(key in value for key in keys)
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value.values())
    )


def _check_evaluation(build: _Build) -> None:
    """The evaluation is of the merged model, by the recipe's measurements, and evaluate.json repeats it."""
    if not {"samples", "merged"} <= build.manifests.keys() or "evaluate" not in build.metrics:
        return
    folder, where = build.inputs["samples"], build.inputs["evaluate"]
    names = titles(build.settings["measurements"])
    there = {path.stem for path in build.path("samples").glob("*.json")} - {Path(MANIFEST).stem}
    for key in sorted(there - names.keys()):
        build.problems.append(f"{folder}/{key}.json: is no measurement of the recipe: stale, run `dvc repro`")
    for task in sorted(build.metrics["evaluate"].keys() - set(names.values())):
        build.problems.append(f"{where}: {task} is no task of the recipe")
    for key, task in names.items():
        try:
            measured = _measured(build, folder, key, str(build.digest("merged")))
            repeated = build.metrics["evaluate"].get(task)
            if not isinstance(repeated, dict):
                raise _Unfit(f"{where}: has no {task}, which {folder}/{key}.json measured")
            if repeated.get("n", measured["n"]) != measured["n"] or not _same(repeated, measured["metrics"]):
                raise _Unfit(f"{where}: {task} is not what {folder}/{key}.json measured")
        except _Unfit as unfit:
            build.problems.append(str(unfit))


def _measured(build: _Build, folder: str, key: str, model: str) -> dict[str, Any]:
    """One measurement's record, or why it is not one of this task on this model."""
    where = f"{folder}/{key}.json"
    task = next(m["name"] for m in build.settings["measurements"] if m["key"] == key)
    try:
        record = read_json(build.root / where)
    except StageError as error:
        raise _Unfit(build.say(error)) from None
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise _Unfit(f"{where}: holds no metrics")
    if record.get("key") != key or record.get("task") != task:
        raise _Unfit(f"{where}: is {record.get('task')} by measurement {record.get('key')}, not {task} by {key}")
    if record.get("model_digest") != model:
        other = _short(record.get("model_digest"))
        raise _Unfit(f"{where}: was measured on model {other}, not on {_short(model)}: stale, run `dvc repro`")
    try:
        lines = (build.root / folder / f"{key}.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        raise _Unfit(f"{folder}/{key}.jsonl: is missing, so that nothing shows the metrics are right") from None
    if isinstance(record.get("n"), bool) or record.get("n") != lines or not lines:
        raise _Unfit(f"{where}: says n is {json.dumps(record.get('n'))}, {folder}/{key}.jsonl has {lines} samples")
    return record


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    # As text, because NaN, which a rule of its own refuses, is not equal to itself.
    text = [json.dumps({key: m[key] for key in m if key != "n"}, sort_keys=True) for m in (a, b)]
    return text[0] == text[1]


# ---- one rule


def _judge_rule(build: _Build, gate: dict[str, Any], rule: str) -> dict[str, Any]:
    compares = rule in ("min_delta", "max_drop")
    verdict: dict[str, Any] = {
        "metric": gate["metric"],
        "rule": rule,
        "bound": gate[rule],
        "value": None,
        "against": gate["against"] if compares else None,
        "reference": None,
        "confidence": gate.get("confidence") if compares else None,
        "lower_bound": None,
        "passed": False,
    }
    try:
        keys, value = _find(build, gate["metric"])
        verdict["value"] = value
        if keys[0] == "evaluate":
            _check_mean(build, build.inputs["samples"], keys, value)
        says = _judge_difference(build, verdict, keys) if compares else _judge_value(verdict)
        if build.problems:
            raise _Unfit(f"is not judged: {build.problems[0]}")
        return {**verdict, "passed": True, "says": says}
    except _Unfit as unfit:
        return {**verdict, "says": f"{gate['metric']} {unfit}"}


def _judge_value(verdict: dict[str, Any]) -> str:
    value, bound, rule = verdict["value"], verdict["bound"], verdict["rule"]
    holds = _at_least(value, bound) if rule == "min" else _at_least(bound, value)
    if not holds:
        raise _Unfit(f"is {value:.6g}, {'below the min' if rule == 'min' else 'above the max'} of {bound:g}")
    return f"{verdict['metric']} is {value:.6g}, at {'least' if rule == 'min' else 'most'} {bound:g}"


def _judge_difference(build: _Build, verdict: dict[str, Any], keys: list[str]) -> str:
    """min_delta and max_drop: the difference to the reference's value, or its lower confidence bound."""
    value, against, confidence = verdict["value"], verdict["against"], verdict["confidence"]
    folder, key, reference = _reference(build, keys, against)
    verdict["reference"] = reference
    least = verdict["bound"] if verdict["rule"] == "min_delta" else -verdict["bound"]
    asked = f"min_delta {verdict['bound']:g}" if verdict["rule"] == "min_delta" else f"max_drop {verdict['bound']:g}"
    apart = value - reference
    says = f"is {value:.6g}, {abs(apart):.4g} {'below' if apart < 0 else 'above'} {against}'s {reference:.6g}"
    if confidence is None:
        if not _at_least(value, reference + least, scale=reference):
            raise _Unfit(f"{says}, which {asked} does not allow")
        return f"{verdict['metric']} {says}, which {asked} allows"
    try:
        test = compare_samples(build.path("samples"), build.root / folder, key, keys[2], confidence)
    except StageError as error:
        raise _Unfit(f"can't be compared with {against} by its samples: {build.say(error)}") from None
    if not math.isclose(test.mean_difference, apart, rel_tol=SUM_TOLERANCE, abs_tol=SUM_TOLERANCE * abs(value)):
        raise _Unfit("is not the mean of its samples, so that confidence can't be had from a paired test: leave it out")
    # Twelve digits: another version of scipy may differ in the last bits, and promote compares this file's bytes.
    lower = verdict["lower_bound"] = float(f"{test.lower_bound:.12g}")
    says += f"; by {test.n} paired samples at least {lower:.4g} with {confidence:.4g} confidence"
    if not _at_least(lower, least):
        raise _Unfit(f"{says}, which {asked} does not allow")
    return f"{verdict['metric']} {says}, which {asked} allows"


def _reference(build: _Build, keys: list[str], against: str) -> tuple[str, str, float]:
    """Folder, measurement key and value of the metric on the model compared with."""
    if keys[0] != "evaluate":
        raise _Unfit(f"can't be compared with {against}: only evaluate.* is measured on two models; give min or max")
    if against == "base":
        folder, stage = build.inputs["baseline"], "baseline"
    elif against in build.settings["others"]:
        folder, stage = build.settings["others"][against], "evaluate"
    else:
        raise _Unfit(f"can't be compared with {against}: {_known(against, ['base', *build.settings['others']])}")
    try:
        manifest = verify_artifact(build.root / folder)
    except StageError as error:
        raise _Unfit(f"can't be compared with {against}: {build.say(error)}") from None
    if manifest.get("stage") != stage or (against != "base" and manifest.get("name") != against):
        raise _Unfit(f"can't be compared with {against}: {folder} is {manifest.get('stage')} of {manifest.get('name')}")
    model = (manifest.get("inputs") or {}).get("model")
    if against == "base" and model != build.digest("base_model"):
        raise _Unfit(
            f"can't be compared with base: {folder} was measured on {_short(model)}, but "
            f"{build.inputs['base_model']} is {_short(build.digest('base_model'))}: stale, run `dvc repro`"
        )
    key = _key(build, keys[1])
    if not (build.root / folder / f"{key}.json").exists():
        raise _Unfit(
            f"can't be compared with {against}: {folder} has no measurement {key}, so {keys[1]} was not measured the "
            "same way"
        )
    try:
        theirs = _measured(build, folder, key, str(model))
        ours = _measured(build, build.inputs["samples"], key, str(build.digest("merged")))
        if theirs.get("task_digest") != ours.get("task_digest"):
            raise _Unfit(f"{folder}/{key}.json: the task's files were others")
        if (theirs.get("versions") or {}).get("lm_eval") != (ours.get("versions") or {}).get("lm_eval"):
            raise _Unfit(f"{folder}/{key}.json: lm_eval was another version")
        values = {**theirs["metrics"], "n": theirs["n"]}
        if keys[2] not in values:
            raise _Unfit(f"{folder}/{key}.json: has no {keys[2]}")
        reference = _number(values[keys[2]], f"{folder}/{key}.json: {keys[2]}")
        _check_mean(build, folder, keys, reference)
    except _Unfit as unfit:
        raise _Unfit(f"can't be compared with {against}: {unfit}") from None
    return folder, key, reference


def _check_mean(build: _Build, folder: str, keys: list[str], value: float) -> None:
    """A metric that is a mean is the mean of the samples. Corpus scores and standard errors have no such check."""
    try:
        key = _key(build, keys[1])
        record = read_json(build.root / folder / f"{key}.json")
        first = (build.root / folder / f"{key}.jsonl").open(encoding="utf-8").readline()
        if keys[2] not in json.loads(first)["metrics"]:
            return
        if record.get("aggregation", {}).get(keys[2], "mean") != "mean" or keys[2] == "perplexity":
            return
        samples = list(read_samples(build.root / folder, key, keys[2]).values())
    except (StageError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Unfit(f"has no samples to show that it is right: {build.say(error)}") from None
    mean = math.fsum(samples) / len(samples)
    if not math.isclose(mean, value, rel_tol=SUM_TOLERANCE, abs_tol=SUM_TOLERANCE * max(map(abs, samples))):
        raise _Unfit(f"is {value:.6g} by {folder}/{key}.json, but the mean of its {len(samples)} samples is {mean:.6g}")


# ---- a metric by its path


def _find(build: _Build, metric: str) -> tuple[list[str], float]:
    """Keys and value of `<stage>.<key>...`; a key may itself have dots, the longest that is there is taken."""
    stage, _, rest = metric.partition(".")
    if stage not in METRICS:
        raise _Unfit(f"is no metric: {_known(stage, list(METRICS))}")
    if stage not in build.inputs:
        raise _Unfit("is not there: the recipe measures nothing, as it makes a reward model")
    if stage not in build.metrics:
        raise _Unfit(f"is not there: {build.inputs[stage]} can't be read")
    keys = _walk(build.metrics[stage], rest.split("."))
    if keys is None:
        there = [f"{stage}.{leaf}" for leaf in _leaves(build.metrics[stage])]
        raise _Unfit(f"is not in {build.inputs[stage]}: {_known(metric, there)}")
    value = build.metrics[stage]
    for key in keys:
        value = value[key]
    if isinstance(value, dict):
        members = ", ".join(f"{metric}.{leaf}" for leaf in _leaves(value)[:8])
        raise _Unfit(f"is a group of metrics: name one of {members}")
    number = _number(value, "")
    if stage == "evaluate" and len(keys) != 2:
        raise _Unfit("is no evaluate.<task>.<metric>")
    return [stage, *keys], number


def _walk(tree: Any, parts: list[str]) -> list[str] | None:
    if not parts:
        return []
    if not isinstance(tree, dict):
        return None
    for length in range(len(parts), 0, -1):
        key = ".".join(parts[:length])
        if key in tree:
            rest = _walk(tree[key], parts[length:])
            if rest is not None:
                return [key, *rest]
    return None


def _leaves(tree: dict[str, Any]) -> list[str]:
    found = []
    for key, value in tree.items():
        found += [f"{key}.{leaf}" for leaf in _leaves(value)] if isinstance(value, dict) else [key]
    return found


def _known(wrong: str, known: list[str]) -> str:
    close = get_close_matches(wrong, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there is {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else "there is none"


def _number(value: Any, where: str) -> float:
    """A finite number, or why it is none. JSON as Python reads it may hold NaN and Infinity."""
    start = f"{where} is " if where else "is "
    if value is None:
        raise _Unfit(f"{start}null, not a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unfit(f"{start}{json.dumps(value, ensure_ascii=False)[:60]}, not a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond floats
        finite = False
    if not finite:
        raise _Unfit(f"{start}{'NaN' if value != value else 'infinite'}, not a number")
    return value


def _key(build: _Build, title: str) -> str:
    for key, named in titles(build.settings["measurements"]).items():
        if named == title:
            return key
    raise _Unfit(f"is not judged: {title} is no task of the recipe")


def _at_least(value: float, bound: float, scale: float = 0.0) -> bool:
    return value >= bound - TOLERANCE * max(abs(value), abs(bound), abs(scale))


def _artifact_rule(problem: str) -> dict[str, Any]:
    numbers = ("bound", "value", "against", "reference", "confidence", "lower_bound")
    return {"metric": "artifact", "rule": "whole", **dict.fromkeys(numbers), "passed": False, "says": problem}


def _short(digest: Any) -> str:
    return str(digest)[:19] if digest else "nothing"
