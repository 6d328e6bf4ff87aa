"""Gates: every way a metric can be missing, wrong, stale or another's fails, and says so."""

import json
import math
import shutil
from pathlib import Path

import pytest

from prefbuild.artifact import canonical_json, write_json, write_manifest
from prefbuild.gates import judge, verdict_table
from tests import built
from tests.built import BASE, BASELINE, KEYS, edit, edit_lines, gate, seal

CONCISE, SENSE = KEYS["concise"], KEYS["sense"]
EXACT = "evaluate.concise.exact_match"


def rules(root: Path, *gates: dict) -> list[dict]:
    return judge(built.gate_settings(list(gates)), built.INPUTS, "x", root)["rules"]


def only(root: Path, metric: str, **asked: object) -> dict:
    (rule,) = rules(root, gate(metric, **asked))
    return rule


def set_metric(root: Path, value: object, task: str = "concise", metric: str = "exact_match") -> None:
    """Change a metric everywhere but in the samples, with all digests made anew."""
    edit(root / "build/x/evaluate.json", lambda scores: scores[task].update({metric: value}))
    edit(root / f"build/x/evaluate/{KEYS[task]}.json", lambda record: record["metrics"].update({metric: value}))
    seal(root, "build/x/evaluate")


def test_an_honest_build_passes(root):
    verdict = judge(built.gate_settings(), built.INPUTS, "x", root)
    assert verdict["passed"], verdict_table(verdict)
    assert verdict["artifact"] == built.digest(root, "build/x/merged")
    assert verdict["adapter"] == built.digest(root, "build/x/adapter")
    assert [rule["rule"] for rule in verdict["rules"]] == ["min", "min_delta", "max_drop", "min_delta", "max"]


def test_every_file_is_judged_by_its_digest(root):
    judged = judge(built.gate_settings(), built.INPUTS, "x", root)["judged"]
    roles = ("samples", "prepared", "reference_log_probs", "adapter", "merged", "base_model", "baseline")
    folders = [built.INPUTS[role] for role in roles]
    files = [built.INPUTS[stage] for stage in ("prepare", "train", "merge", "evaluate")]
    for folder in [*folders, "build/y/evaluate"]:
        assert judged.pop(folder) == built.digest(root, folder)
        assert judged.pop(f"{folder}/manifest.json").startswith("sha256:")
    assert sorted(judged) == sorted(files)
    assert all(value.startswith("sha256:") for value in judged.values())


def test_a_build_that_measures_nothing_is_judged_without_it_and_a_rule_on_it_fails(root):
    inputs = {role: path for role, path in built.INPUTS.items() if role not in ("evaluate", "samples", "baseline")}
    settings = built.gate_settings([gate("train.loss", max=0.6), gate(EXACT, min=0.0), gate(EXACT, min_delta=0.0)])
    first, *others = judge({**settings, "measurements": []}, inputs, "x", root)["rules"]
    assert first["passed"] and first["says"] == "train.loss is 0.5, at most 0.6"
    says = f"{EXACT} is not there: the recipe measures nothing, as it makes a reward model"
    assert [(rule["passed"], rule["says"]) for rule in others] == [(False, says)] * 2


def test_a_reward_model_that_was_built_anew_since_is_told(root):
    path, adapter = "build/y/merged", root / "build/x/adapter"
    built.checkpoint(root / path, seed=5)
    write_manifest(root / path, stage="merge", name="y", inputs={})
    manifest = json.loads((adapter / "manifest.json").read_text())
    inputs = {**built.INPUTS, "reward_models": [path]}

    def verdict(trained_by: str) -> dict:
        asked = {**manifest["inputs"], "reward_models": {path: trained_by}}
        write_manifest(adapter, stage="train", name="x", inputs=asked)
        return judge(built.gate_settings([gate("train.loss", max=0.6)]), inputs, "x", root)

    assert verdict(built.digest(root, path))["passed"]
    stale = verdict("sha256:" + "9" * 64)
    assert not stale["passed"]
    assert (
        "build/x/adapter: was trained by reward model sha256:999999999999, but build/y/merged is sha256:"
        in (stale["rules"][0]["says"])
    )
    shutil.rmtree(root / path)
    assert "build/y/merged" in verdict("sha256:" + "9" * 64)["rules"][0]["says"]


# ---- min and max


@pytest.mark.parametrize(
    ("metric", "asked", "passed", "says"),
    [
        (EXACT, {"min": 0.75}, True, "evaluate.concise.exact_match is 0.75, at least 0.75"),
        (EXACT, {"min": 0.8}, False, "evaluate.concise.exact_match is 0.75, below the min of 0.8"),
        (EXACT, {"max": 0.75}, True, "evaluate.concise.exact_match is 0.75, at most 0.75"),
        (EXACT, {"max": 0.7}, False, "evaluate.concise.exact_match is 0.75, above the max of 0.7"),
        (EXACT, {"min": 0.75 * (1 + 1e-9)}, False, "evaluate.concise.exact_match is 0.75, below the min of 0.75"),
        (EXACT, {"min": 0.75 * (1 + 1e-14)}, True, "evaluate.concise.exact_match is 0.75, at least 0.75"),
        ("prepare.dropped.empty", {"max": 0}, False, "prepare.dropped.empty is 1, above the max of 0"),
        ("prepare.dropped.empty", {"max": 1}, True, "prepare.dropped.empty is 1, at most 1"),
        ("train.rewards.margins", {"min": 1}, True, "train.rewards.margins is 1.25, at least 1"),
        ("merge.kl", {"max": 0.00001}, False, "merge.kl is 0.0001, above the max of 1e-05"),
        ("evaluate.concise.n", {"min": 40}, True, "evaluate.concise.n is 40, at least 40"),
        ("evaluate.sense.acc@strict", {"min": 0.5}, True, "evaluate.sense.acc@strict is 0.5, at least 0.5"),
        ("evaluate.concise.corpus", {"min": 0.6}, False, "evaluate.concise.corpus is 0.5, below the min of 0.6"),
    ],
)
def test_min_and_max(root, metric, asked, passed, says):
    rule = only(root, metric, **asked)
    assert (rule["passed"], rule["says"]) == (passed, says)
    assert rule["against"] is None


def test_a_gate_with_two_bounds_is_two_rules(root):
    low, high = rules(root, gate(EXACT, min=0.8, max=0.9))
    assert (low["rule"], low["bound"], low["passed"]) == ("min", 0.8, False)
    assert (high["rule"], high["bound"], high["passed"]) == ("max", 0.9, True)


def test_metric_names_may_have_dots_and_slashes(root):
    edit(
        root / "build/x/train.json", lambda m: m.update({"rewards/margins": 2, "a.b": {"c": 3}, "a": {"b": {"c.d": 4}}})
    )
    assert only(root, "train.rewards/margins", min=2)["value"] == 2
    assert only(root, "train.a.b.c", min=2)["value"] == 3
    assert only(root, "train.a.b.c.d", min=2)["value"] == 4


# ---- a metric that is no number


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (
            "evaluate.concise.exact_mach",
            "evaluate.concise.exact_mach is not in build/x/evaluate.json: did you mean evaluate.concise.exact_match?",
        ),
        (
            "evaluate.conicse.exact_match",
            "evaluate.conicse.exact_match is not in build/x/evaluate.json: did you mean evaluate.concise.exact_match?",
        ),
        (
            "merge.something",
            "merge.something is not in build/x/merge.json: there is merge.greedy_agreement, merge.kl, merge.tolerance.max_kl",
        ),
        (
            "train.rewards",
            "train.rewards is a group of metrics: name one of train.rewards.accuracies, train.rewards.margins",
        ),
        ("train.machine.cpu", 'train.machine.cpu is "test", not a number'),
        ("train.steps.x", "train.steps.x is not in build/x/train.json: did you mean train.steps?"),
        ("evalaute.concise.acc", "evalaute.concise.acc is no metric: did you mean evaluate?"),
    ],
)
def test_a_metric_that_is_not_there_fails(root, metric, says):
    for asked in ({"min": -1e9}, {"max": 1e9}):
        rule = only(root, metric, **asked)
        assert (rule["passed"], rule["value"], rule["says"]) == (False, None, says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "train.loss is null, not a number"),
        (True, "train.loss is true, not a number"),
        ("0.1", 'train.loss is "0.1", not a number'),
        ([0.1], "train.loss is [0.1], not a number"),
        (math.nan, "train.loss is NaN, not a number"),
        (math.inf, "train.loss is infinite, not a number"),
        (-math.inf, "train.loss is infinite, not a number"),
        (10**400, "train.loss is infinite, not a number"),
        ({}, "train.loss is a group of metrics: name one of "),
    ],
)
def test_a_value_that_is_no_number_fails(root, value, says):
    edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=value))
    for asked in ({"min": -1e9}, {"max": 1e9}):
        rule = only(root, "train.loss", **asked)
        assert (rule["passed"], rule["value"], rule["says"]) == (False, None, says)
        canonical_json(rule)  # a verdict is JSON, whatever the metrics hold


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf])
def test_an_evaluation_that_is_no_number_fails(root, value):
    set_metric(root, value)
    rule = only(root, EXACT, min=-1e9)
    assert not rule["passed"]
    assert rule["says"].endswith("not a number")


@pytest.mark.parametrize("content", ["", "{", "[]", "7", None])
def test_a_metrics_file_that_is_missing_or_broken_fails_every_rule(root, content):
    path = root / "build/x/train.json"
    path.unlink() if content is None else path.write_text(content)
    artifact, loss, exact = rules(root, gate("train.loss", max=1e9), gate(EXACT, min=0))
    assert artifact["metric"] == "artifact"
    assert artifact["says"].startswith("build/x/train.json: ")
    assert loss["says"] == "train.loss is not there: build/x/train.json can't be read"
    assert exact["says"].startswith("evaluate.concise.exact_match is not judged: build/x/train.json: ")
    assert not (artifact["passed"] or loss["passed"] or exact["passed"])


# ---- compared with another model


@pytest.mark.parametrize(
    ("asked", "passed", "says"),
    [
        ({"min_delta": 0.3}, True, "is 0.75, 0.3 above base's 0.45, which min_delta 0.3 allows"),
        ({"min_delta": 0.31}, False, "is 0.75, 0.3 above base's 0.45, which min_delta 0.31 does not allow"),
        ({"max_drop": 0.0}, True, "is 0.75, 0.3 above base's 0.45, which max_drop 0 allows"),
        ({"min_delta": 0.1, "against": "y"}, True, "is 0.75, 0.15 above y's 0.6, which min_delta 0.1 allows"),
        ({"min_delta": 0.2, "against": "y"}, False, "is 0.75, 0.15 above y's 0.6, which min_delta 0.2 does not allow"),
    ],
)
def test_differences(root, asked, passed, says):
    rule = only(root, EXACT, **asked)
    assert (rule["passed"], rule["says"]) == (passed, f"{EXACT} {says}")
    assert rule["against"] == asked.get("against", "base")
    assert rule["reference"] in (0.45, 0.6)


def test_a_drop_beyond_the_bound_fails(root):
    shutil.rmtree(root / BASELINE)
    built.RIGHT["better"] = 36
    try:
        built.evaluate(
            root, BASELINE, model=built.digest(root, BASE), who="better", stage="baseline", name=Path(BASELINE).name
        )
    finally:
        del built.RIGHT["better"]
    rule = only(root, EXACT, max_drop=0.1)
    assert not rule["passed"]
    assert rule["says"] == f"{EXACT} is 0.75, 0.15 below base's 0.9, which max_drop 0.1 does not allow"
    assert only(root, EXACT, max_drop=0.15)["passed"]


def test_confidence_asks_the_lower_bound_and_not_the_difference(root):
    rule = only(root, EXACT, min_delta=0.1, confidence=0.95)
    assert rule["passed"]
    assert 0.1 < rule["lower_bound"] < 0.3
    unsure = only(root, EXACT, min_delta=0.29, confidence=0.95)
    assert only(root, EXACT, min_delta=0.29)["passed"]
    assert not unsure["passed"]
    assert unsure["says"] == (
        f"{EXACT} is 0.75, 0.3 above base's 0.45; by 40 paired samples at least {rule['lower_bound']:.4g} "
        "with 0.95 confidence, which min_delta 0.29 does not allow"
    )


def test_confidence_is_of_the_difference_only(root):
    low, delta = rules(root, gate(EXACT, min=0.1, min_delta=0.1, confidence=0.9))
    assert (low["confidence"], low["lower_bound"]) == (None, None)
    assert delta["confidence"] == 0.9


@pytest.mark.parametrize("metric", ["prepare.rows.out", "train.loss", "merge.kl"])
@pytest.mark.parametrize("against", ["base", "y"])
def test_only_evaluations_can_be_compared(root, metric, against):
    rule = only(root, metric, min_delta=-1e9, against=against)
    assert not rule["passed"]
    assert rule["says"] == (
        f"{metric} can't be compared with {against}: only evaluate.* is measured on two models; give min or max"
    )


def test_an_unknown_recipe_to_compare_with_fails(root):
    assert only(root, EXACT, min_delta=-1, against="bass")["says"] == (
        f"{EXACT} can't be compared with bass: did you mean base?"
    )
    assert not only(root, EXACT, min_delta=-1, against="x")["passed"]


def test_another_measurement_is_no_comparison(root):
    for kind in ("json", "jsonl"):
        (root / f"build/y/evaluate/{CONCISE}.{kind}").unlink()
    seal(root, "build/y/evaluate")
    rule = only(root, EXACT, min_delta=-1, against="y")
    assert not rule["passed"]
    assert rule["says"] == (
        f"{EXACT} can't be compared with y: build/y/evaluate has no measurement {CONCISE}, "
        "so concise was not measured the same way"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task_digest": "sha256:edited"}, "the task's files were others"),
        ({"versions": {"lm_eval": "0.4.0"}}, "lm_eval was another version"),
        ({"task": "sense"}, f"is sense by measurement {CONCISE}, not concise by {CONCISE}"),
        ({"n": 39}, f"says n is 39, build/y/evaluate/{CONCISE}.jsonl has 40 samples"),
    ],
)
def test_a_comparison_with_something_else_fails(root, change, says):
    edit(root / f"build/y/evaluate/{CONCISE}.json", lambda record: record.update(change))
    seal(root, "build/y/evaluate")
    rule = only(root, EXACT, min_delta=-1, against="y")
    assert not rule["passed"]
    assert rule["says"] == f"{EXACT} can't be compared with y: build/y/evaluate/{CONCISE}.json: {says}"


def test_the_other_recipes_metric_must_be_its_samples_mean(root):
    edit(root / f"build/y/evaluate/{CONCISE}.json", lambda record: record["metrics"].update(exact_match=0.1))
    seal(root, "build/y/evaluate")
    rule = only(root, EXACT, min_delta=0.5, against="y")
    assert not rule["passed"]
    assert rule["says"] == (
        f"{EXACT} can't be compared with y: is 0.1 by build/y/evaluate/{CONCISE}.json, "
        "but the mean of its 40 samples is 0.6"
    )


def test_a_folder_of_another_recipe_is_no_comparison(root):
    manifest = root / "build/y/evaluate/manifest.json"
    edit(manifest, lambda m: m.update(name="z"))
    rule = only(root, EXACT, min_delta=-1, against="y")
    assert rule["says"] == f"{EXACT} can't be compared with y: build/y/evaluate is evaluate of z"


def test_confidence_with_other_documents_fails(root):
    edit_lines(root / f"{BASELINE}/{CONCISE}.jsonl", lambda rows: rows[3].update(doc_hash="edited"))
    seal(root, BASELINE)
    assert only(root, EXACT, min_delta=-1)["passed"]
    rule = only(root, EXACT, min_delta=-1, confidence=0.95)
    assert not rule["passed"]
    assert rule["says"].startswith(
        f"{EXACT} can't be compared with base by its samples: build/x/evaluate/{CONCISE}.jsonl"
    )
    assert "are not of the same documents: 1 only in the first, 1 only in the second" in rule["says"]


def test_confidence_without_samples_of_the_metric_fails(root):
    rule = only(root, "evaluate.concise.corpus", min_delta=-1, confidence=0.95)
    assert not rule["passed"]
    assert rule["says"].endswith(f"build/x/evaluate/{CONCISE}.jsonl:1: document 0 has no corpus")


def test_confidence_on_what_is_no_mean_fails(root):
    for folder, value in (("build/x/evaluate", 0.9), (BASELINE, 0.1)):
        edit(root / f"{folder}/{CONCISE}.json", lambda r, v=value: r["metrics"].update(exact_match=v))
        edit(root / f"{folder}/{CONCISE}.json", lambda r: r.update(aggregation={"exact_match": "median"}))
        seal(root, folder)
    edit(root / "build/x/evaluate.json", lambda scores: scores["concise"].update(exact_match=0.9))
    assert only(root, EXACT, min_delta=0.7)["passed"]
    rule = only(root, EXACT, min_delta=0.1, confidence=0.95)
    assert not rule["passed"]
    assert rule["says"] == (
        f"{EXACT} is not the mean of its samples, so that confidence can't be had from a paired test: leave it out"
    )


# ---- a stale or foreign baseline fails what compares with it, and nothing else


def base_rules(root: Path) -> tuple[dict, dict]:
    delta, low = rules(root, gate(EXACT, min_delta=-1), gate(EXACT, min=0.1))
    return delta, low


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "no manifest",
        "edited",
        "other base",
        "evaluated on another base",
        "other model in the record",
        "report",
    ],
)
def test_a_bad_baseline_fails_comparisons_only(root, damage):
    if damage == "missing":
        shutil.rmtree(root / BASELINE)
    elif damage == "no manifest":
        (root / BASELINE / "manifest.json").unlink()
    elif damage == "edited":
        edit(root / f"{BASELINE}/{CONCISE}.json", lambda record: record["metrics"].update(exact_match=0.0))
    elif damage == "other base":
        edit(root / BASELINE / "manifest.json", lambda manifest: manifest["inputs"].update(model="sha256:" + "2" * 64))
    elif damage == "evaluated on another base":
        shutil.rmtree(root / BASELINE)
        built.evaluate(
            root, BASELINE, model="sha256:" + "2" * 64, who="base", stage="baseline", name=Path(BASELINE).name
        )
    elif damage == "other model in the record":
        edit(root / f"{BASELINE}/{CONCISE}.json", lambda record: record.update(model_digest="sha256:" + "2" * 64))
        seal(root, BASELINE)
    elif damage == "report":
        edit(root / BASELINE / "manifest.json", lambda manifest: manifest.update(stage="evaluate"))
    delta, low = base_rules(root)
    assert not delta["passed"]
    assert delta["says"].startswith(f"{EXACT} can't be compared with base: ")
    assert BASELINE in delta["says"]
    assert low["passed"]


# ---- files that do not belong together


def chain(root: Path, folder: str, key: str) -> None:
    edit(root / folder / "manifest.json", lambda manifest: manifest["inputs"].update({key: "sha256:" + "3" * 64}))


@pytest.mark.parametrize(
    ("folder", "key", "source"),
    [
        ("build/x/prepared", "model", BASE),
        ("build/x/adapter", "prepared", "build/x/prepared"),
        ("build/x/adapter", "model", BASE),
        ("build/x/merged", "adapter", "build/x/adapter"),
        ("build/x/merged", "model", BASE),
        ("build/x/evaluate", "model", "build/x/merged"),
    ],
)
def test_an_artifact_made_from_something_else_fails_every_rule(root, folder, key, source):
    chain(root, folder, key)
    artifact, exact, loss = rules(root, gate(EXACT, min=0), gate("train.loss", max=9))
    says = (
        f"{folder}: was made from {key} sha256:333333333333, but {source} is {built.digest(root, source)[:19]}: "
        "stale, run `dvc repro`"
    )
    assert (artifact["metric"], artifact["passed"], artifact["says"]) == ("artifact", False, says)
    assert exact["says"] == f"{EXACT} is not judged: {says}"
    assert not exact["passed"]
    assert not loss["passed"]


@pytest.mark.parametrize(
    ("folder", "key", "source"),
    [
        ("build/x/adapter", "prepared", "build/x/prepared"),
        ("build/x/adapter", "reference", "build/y/evaluate"),
        ("build/x/adapter", "reference_log_probs", "build/x/reference"),
        ("build/x/reference", "reference", "build/y/evaluate"),
        ("build/x/reference", "prepared", "build/x/prepared"),
        ("build/x/reference", "model", built.BASE),
        ("build/x/merged", "trained", "build/x/adapter"),
        (None, None, None),
    ],
)
def test_all_weights_and_a_reference_are_in_the_chain(root, folder, key, source):
    # The small build's folders, as if its adapter were all weights and y's samples a model.
    inputs = {"trained" if role == "adapter" else role: path for role, path in built.INPUTS.items()}
    inputs["reference"] = "build/y/evaluate"
    digests = {path: built.digest(root, path) for path in (inputs["trained"], inputs["reference"])}
    edit(root / "build/x/merged/manifest.json", lambda m: m["inputs"].update(trained=digests[inputs["trained"]]))
    for holds_on in ("adapter", "reference"):
        manifest = root / f"build/x/{holds_on}/manifest.json"
        edit(manifest, lambda m: m["inputs"].update(reference=digests[inputs["reference"]]))
    if folder:
        chain(root, folder, key)
    verdict = judge(built.gate_settings(), inputs, "x", root)
    assert verdict["passed"] == (folder is None)
    assert verdict["trained"] == digests[inputs["trained"]] and "adapter" not in verdict
    if folder:
        stale = [rule["says"] for rule in verdict["rules"] if rule["metric"] == "artifact"]
        assert len(stale) == 1 and stale[0].startswith(
            f"{folder}: was made from {key} sha256:333333333333, but {source} is"
        )


def test_a_retrained_adapter_makes_the_rest_stale(root):
    built.weights(root / "build/x/adapter/adapter_model.safetensors", seed=9)
    seal(root, "build/x/adapter")
    (artifact, _) = rules(root, gate(EXACT, min=0))
    assert artifact["says"].startswith("build/x/merged: was made from adapter sha256:")


def test_another_merged_model_makes_the_evaluation_stale(root):
    built.weights(root / "build/x/merged/model.safetensors", seed=9)
    seal(root, "build/x/merged")
    verdict = judge(built.gate_settings(), built.INPUTS, "x", root)
    says = [rule["says"] for rule in verdict["rules"] if rule["metric"] == "artifact"]
    assert says[0].startswith("build/x/evaluate: was made from model sha256:")
    assert says[1].startswith(f"build/x/evaluate/{CONCISE}.json: was measured on model sha256:")
    assert not any(rule["passed"] for rule in verdict["rules"])


@pytest.mark.parametrize("folder", ["prepared", "reference", "adapter", "merged", "evaluate"])
def test_another_recipes_artifact_fails(root, folder):
    edit(root / f"build/x/{folder}/manifest.json", lambda manifest: manifest.update(name="y"))
    stage = {"prepared": "prepare", "adapter": "train", "merged": "merge"}.get(folder, folder)
    (artifact, _) = rules(root, gate(EXACT, min=0))
    assert artifact["says"] == f"build/x/{folder}: is {stage} of y, not {stage} of x"


@pytest.mark.parametrize("role", ["prepared", "adapter", "merged", "samples", "base_model"])
def test_a_missing_manifest_fails_every_rule(root, role):
    (root / built.INPUTS[role] / "manifest.json").unlink()
    verdict = judge(built.gate_settings(), built.INPUTS, "x", root)
    assert verdict["rules"][0]["says"] == (
        f"{built.INPUTS[role]}/manifest.json: is missing; run `dvc repro` to build it"
    )
    assert not any(rule["passed"] for rule in verdict["rules"])
    assert verdict["judged"][built.INPUTS[role]] is None


def test_the_other_models_evaluation_put_in_place_fails(root):
    shutil.rmtree(root / "build/x/evaluate")
    shutil.copytree(root / "build/y/evaluate", root / "build/x/evaluate")
    verdict = judge(built.gate_settings(), built.INPUTS, "x", root)
    says = [rule["says"] for rule in verdict["rules"]]
    assert "build/x/evaluate: is evaluate of y, not evaluate of x" in says
    assert f"build/x/evaluate.json: concise is not what build/x/evaluate/{CONCISE}.json measured" not in says[:2]
    assert not any(rule["passed"] for rule in verdict["rules"])


@pytest.mark.parametrize("what", ["samples", "record", "prepared"])
def test_an_edited_file_under_an_old_manifest_fails(root, what):
    path = {
        "samples": f"build/x/evaluate/{CONCISE}.jsonl",
        "record": f"build/x/evaluate/{CONCISE}.json",
        "prepared": "build/x/prepared/train.jsonl",
    }[what]
    (root / path).write_bytes((root / path).read_bytes().replace(b"0", b"1", 1))
    (artifact, exact) = rules(root, gate(EXACT, min=0))
    assert artifact["says"].startswith(f"{path}: sha256 is ")
    assert not exact["passed"]


# ---- numbers that do not follow from what they are said to follow from


def test_a_forged_evaluate_json_fails(root):
    edit(root / "build/x/evaluate.json", lambda scores: scores["concise"].update(exact_match=0.99))
    (artifact, exact) = rules(root, gate(EXACT, min=0.9))
    assert artifact["says"] == f"build/x/evaluate.json: concise is not what build/x/evaluate/{CONCISE}.json measured"
    assert not exact["passed"]


def test_a_forged_count_in_evaluate_json_fails(root):
    edit(root / "build/x/evaluate.json", lambda scores: scores["concise"].update(n=4000))
    (artifact, count) = rules(root, gate("evaluate.concise.n", min=1000))
    assert artifact["says"] == f"build/x/evaluate.json: concise is not what build/x/evaluate/{CONCISE}.json measured"
    assert not count["passed"]


@pytest.mark.parametrize(
    "asked", [{"min": 0.9}, {"max": 1.0}, {"min_delta": 0.1}, {"min_delta": 0.1, "confidence": 0.9}]
)
def test_a_metric_forged_everywhere_but_in_the_samples_fails(root, asked):
    set_metric(root, 0.99)
    rule = only(root, EXACT, **asked)
    assert not rule["passed"]
    assert rule["says"] == (
        f"{EXACT} is 0.99 by build/x/evaluate/{CONCISE}.json, but the mean of its 40 samples is 0.75"
    )


def test_a_metric_without_a_sample_fails(root):
    edit_lines(root / f"build/x/evaluate/{CONCISE}.jsonl", lambda rows: rows[5]["metrics"].pop("exact_match"))
    seal(root, "build/x/evaluate")
    rule = only(root, EXACT, min=0)
    assert rule["says"] == (
        f"{EXACT} has no samples to show that it is right: "
        f"build/x/evaluate/{CONCISE}.jsonl:6: document 5 has no exact_match"
    )


@pytest.mark.parametrize("change", ["fewer samples", "n", "no samples", "missing"])
def test_a_count_that_is_not_that_of_the_samples_fails(root, change):
    record, samples = (root / f"build/x/evaluate/{CONCISE}.{kind}" for kind in ("json", "jsonl"))
    if change == "fewer samples":
        edit_lines(samples, lambda rows: rows.pop())
    elif change == "n":
        edit(record, lambda r: r.update(n=True))
    elif change == "no samples":
        samples.write_text("")
        edit(record, lambda r: r.update(n=0))
    else:
        samples.unlink()
    seal(root, "build/x/evaluate")
    (artifact, exact) = rules(root, gate(EXACT, min=0))
    stem = f"build/x/evaluate/{CONCISE}"
    says = {
        "fewer samples": f"{stem}.json: says n is 40, {stem}.jsonl has 39 samples",
        "n": f"{stem}.json: says n is true, {stem}.jsonl has 40 samples",
        "no samples": f"{stem}.json: says n is 0, {stem}.jsonl has 0 samples",
        "missing": f"{stem}.jsonl: is missing, so that nothing shows the metrics are right",
    }
    assert artifact["says"] == says[change]
    assert not exact["passed"]


def test_a_measurement_the_recipe_does_not_have_fails(root):
    settings = built.gate_settings([gate(EXACT, min=0)])
    settings["measurements"][0]["key"] = "cccccccccccc"
    verdict = judge(settings, built.INPUTS, "x", root)
    says = [rule["says"] for rule in verdict["rules"]]
    assert says[0] == f"build/x/evaluate/{CONCISE}.json: is no measurement of the recipe: stale, run `dvc repro`"
    assert says[1] == "build/x/evaluate/cccccccccccc.json: is missing; run `dvc repro` to build it"
    assert not verdict["passed"]


def test_a_task_the_recipe_does_not_have_fails(root):
    edit(root / "build/x/evaluate.json", lambda scores: scores.update(extra={"acc": 1.0}))
    (artifact, extra) = rules(root, gate("evaluate.extra.acc", min=0))
    assert artifact["says"] == "build/x/evaluate.json: extra is no task of the recipe"
    assert not extra["passed"]


def test_a_task_measured_in_two_ways_is_called_by_its_key(root):
    settings = built.gate_settings(
        [gate(f"evaluate.concise-{CONCISE}.exact_match", min=0.7, min_delta=0.2), gate(EXACT, min=0)]
    )
    settings["measurements"][1]["name"] = "concise"
    edit(root / f"build/x/evaluate/{SENSE}.json", lambda record: record.update(task="concise"))
    seal(root, "build/x/evaluate")

    def rename(scores: dict) -> None:
        scores[f"concise-{CONCISE}"], scores[f"concise-{SENSE}"] = scores.pop("concise"), scores.pop("sense")

    edit(root / "build/x/evaluate.json", rename)
    one, delta, unclear = judge(settings, built.INPUTS, "x", root)["rules"]
    assert one["passed"]
    assert delta["passed"]
    assert delta["reference"] == 0.45
    assert unclear["says"].startswith(f"{EXACT} is not in build/x/evaluate.json: did you mean evaluate.concise-")
    assert not unclear["passed"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"rows": {"in": 13, "out": 10, "train": 8, "held_out": 2}},
            "build/x/prepare.json: 13 rows in are not 10 out (8 train, 2 held out) and 2 dropped",
        ),
        (
            {"rows": {"in": 12, "out": 10, "train": 9, "held_out": 1}},
            "build/x/prepare.json: says 9 train rows, build/x/prepared/train.jsonl has 8",
        ),
        ({"rows": {"in": 12}}, "build/x/prepare.json: rows and dropped are not counts"),
        ({"dropped": {"empty": 1.5}}, "build/x/prepare.json: rows and dropped are not counts"),
        ({"dropped": None}, "build/x/prepare.json: rows and dropped are not counts"),
    ],
)
def test_rows_that_are_not_accounted_for_fail(root, change, says):
    edit(root / "build/x/prepare.json", lambda metrics: metrics.update(change))
    artifact, *_, loss = rules(root, gate("train.loss", max=9))
    assert artifact["says"] == says
    assert not loss["passed"]


# ---- no rule at all


def test_no_gates_do_not_pass(root):
    verdict = judge(built.gate_settings([]), built.INPUTS, "x", root)
    assert not verdict["passed"]
    assert [rule["says"] for rule in verdict["rules"]] == ["there are no gates, and what is not judged does not pass"]


def test_a_gate_that_asks_nothing_does_not_pass(root):
    verdict = judge(built.gate_settings([gate(EXACT), gate(EXACT, min=0)]), built.INPUTS, "x", root)
    assert not verdict["passed"]
    assert verdict["rules"][0]["says"] == (
        f"the gate on {EXACT} asks for nothing: give min, max, min_delta or max_drop"
    )


def test_nothing_there_fails_and_does_not_crash(tmp_path):
    verdict = judge(built.gate_settings(), built.INPUTS, "x", tmp_path)
    assert not verdict["passed"]
    assert not any(rule["passed"] for rule in verdict["rules"])
    assert set(verdict["judged"].values()) == {None}
    assert verdict["artifact"] is None
    assert str(tmp_path) not in canonical_json(verdict)


def test_a_verdict_has_the_same_bytes_anywhere(template, root, monkeypatch):
    monkeypatch.chdir(template)
    here = judge(built.gate_settings(), built.INPUTS, "x")
    assert canonical_json(here) == canonical_json(judge(built.gate_settings(), built.INPUTS, "x", root))
    monkeypatch.chdir(root)
    write_json(root / "build/x/train.json", [])
    (root / BASELINE / CONCISE).with_suffix(".jsonl").unlink()
    failed = judge(built.gate_settings(), built.INPUTS, "x")
    assert canonical_json(failed) == canonical_json(judge(built.gate_settings(), built.INPUTS, "x", root))


# ---- the table


def test_the_table_says_what_passed_and_why(root):
    verdict = judge(built.gate_settings([gate(EXACT, min=0.8), gate("train.loss", max=1)]), built.INPUTS, "x", root)
    assert verdict_table(verdict, colour=False) == (
        "x: FAIL, 1 of 2 rules hold\n"
        f"  FAIL  {EXACT} min 0.8  {EXACT} is 0.75, below the min of 0.8\n"
        "  PASS  train.loss max 1                      train.loss is 0.5, at most 1"
    )
    coloured = verdict_table(verdict, colour=True)
    assert "\033[31mFAIL\033[0m" in coloured
    assert "\033[32mPASS\033[0m" in coloured


def test_the_table_lets_no_control_characters_of_a_file_through(root):
    edit(root / "build/x/train.json", lambda metrics: metrics.update({"lo\033[2Jss": 1}))
    table = verdict_table(judge(built.gate_settings([gate("train.los", max=1)]), built.INPUTS, "x", root), colour=False)
    assert "\033" not in table
    assert json.dumps("did you mean")[1:-1] in table
