"""The report: what it shows, that it is safe to open, and that it never lacks something in silence."""

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prefbuild.artifact import write_json
from prefbuild.errors import StageError
from prefbuild.methods import METHODS, PARTS, SHAPES
from prefbuild.report import page, pictures
from prefbuild.rows import reasons
from prefbuild.stages import report

REASONS = ("broken", "duplicate", "empty", "filtered", "identical_pair", "prompt_too_long", "special_token", "too_long")
KEY = "0a1b2c3d4e5f"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


class Page(HTMLParser):
    """Text by section, tags and attributes of a page."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes).get("id") or "verdicts"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.sections[self.section] = " ".join((self.sections.get(self.section, "") + data).split()) + " "


def write_samples(folder: Path, responses: list[str], model: str) -> dict[str, float]:
    """A measurement as stage `evaluate` leaves it; documents answered with their target are right."""
    n = len(responses)
    lines = [
        {
            "doc_id": number,
            "doc_hash": f"{number:064x}",
            "prompt": f"<|im_start|>user\nWhat is the capital of country {number}?<|im_end|>\n<|im_start|>assistant\n",
            "target": f"City {number}",
            "response": response,
            "metrics": {"exact_match": float(response == f"City {number}")},
        }
        for number, response in enumerate(responses)
    ]
    mean = sum(line["metrics"]["exact_match"] for line in lines) / n  # type: ignore[index]
    metrics = {"exact_match": mean, "exact_match_stderr": math.sqrt(mean * (1 - mean) / (n - 1)), "n": n}
    record = {
        "key": KEY,
        "task": "concise",
        "model_digest": model,
        "task_digest": "sha256:" + "7" * 64,
        "measurement": {"key": KEY, "name": "concise"},
        "metrics": metrics,
        "higher_is_better": {"exact_match": True},
        "n": n,
        "versions": {"lm_eval": "0.4.13"},
    }
    write_json(folder / f"{KEY}.json", record)
    (folder / f"{KEY}.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    write_json(folder / "manifest.json", {"digest": "sha256:" + "0" * 64, "files": {}})
    return metrics


def write_recipe(root: Path, name: str, *, right: int, passed: bool, steps: int = 60) -> None:
    """build/<name>/ as the stages leave it, of a model that gets `right` of 40 documents right."""
    out, noise = root / "build" / name, random.Random(name)
    wrong = [f"The capital of country {number} is City {number}." for number in range(40)]
    metrics = write_samples(
        out / "evaluate", [f"City {n}" if n < right else wrong[n] for n in range(40)], "sha256:" + "a" * 64
    )
    write_samples(
        root / "build/baselines/smol-1c0ffe",
        [f"City {n}" if n % 10 == 9 else wrong[n] for n in range(40)],
        "sha256:" + "b" * 64,
    )
    write_json(out / "evaluate.json", {"concise": metrics})
    nothing = {"against": None, "reference": None, "confidence": None, "lower_bound": None}
    value = metrics["exact_match"]
    says = f"evaluate.concise.exact_match is {value:g}, {'at least' if passed else 'below the min of'} 0.5"
    least = {"metric": "evaluate.concise.exact_match", "rule": "min", "bound": 0.5, "value": value, "says": says}
    empty = {"metric": "prepare.dropped.empty", "rule": "max", "bound": 0.0, "value": 0.0}
    gate = {
        "recipe": name,
        "passed": passed,
        "artifact": "sha256:" + "a1" * 32,
        "adapter": "sha256:" + "c2" * 32,
        "judged": {},
        "rules": [
            {**least, **nothing, "passed": passed},
            {**empty, **nothing, "passed": True, "says": "prepare.dropped.empty is 0, at most 0"},
        ],
    }
    write_json(out / "gate.json", gate)
    tokens = {"prompt": (21.5, 20, 34, 41), "chosen": (3.2, 3, 6, 9), "rejected": (12.75, 12, 21, 30)}
    write_json(
        out / "prepare.json",
        {
            "rows": {"in": 240, "out": 221, "train": 200, "held_out": 21},
            "dropped": {reason: {"duplicate": 12, "too_long": 7}.get(reason, 0) for reason in REASONS},
            "truncated": {"chosen": 0, "rejected": 3},
            "end_of_turn_lost": {"chosen": 0, "rejected": 2},
            "tokens": {
                part: dict(zip(("mean", "p50", "p95", "max"), four, strict=True)) for part, four in tokens.items()
            },
            "boundary_differs": 0,
        },
    )
    lines = ["part,tokens,rows"]
    for part, (mean, _, _, longest) in tokens.items():
        lines += [
            f"{part},{edge},{round(60 * math.exp(-(((edge - mean) / (longest / 4)) ** 2)))}" for edge in range(0, 42, 2)
        ]
    (out / "lengths.csv").write_text("\n".join(lines) + "\n")
    curves = {
        "loss": lambda s: 0.6931 * math.exp(-s / 25) + 0.02,
        "rewards/margins": lambda s: 3.2 * (1 - math.exp(-s / 25)),
        "rewards/accuracies": lambda s: min(1.0, 0.5 + s / 60),
        "rewards/chosen": lambda s: 0.9 * (1 - math.exp(-s / 25)),
        "rewards/rejected": lambda s: -2.3 * (1 - math.exp(-s / 25)),
    }
    for curve, value_at in curves.items():
        path = out / f"live/plots/metrics/train/{curve}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [value_at(step) * (1 + noise.uniform(-0.08, 0.08)) for step in range(steps)]
        rows = [
            f"{step}\t{min(value, 1.0) if 'accuracies' in curve else value}" for step, value in enumerate(values, 1)
        ]
        path.write_text(f"step\t{path.stem}\n" + "\n".join(rows) + "\n")
    write_json(
        out / "train.json",
        {
            "steps": steps,
            "epochs": 2.4,
            "loss": 0.0812,
            "grad_norm": {"last": 0.41, "max": 7.9},
            "rewards": {"accuracies": 1.0, "chosen": 0.81, "margins": 2.91, "rejected": -2.1},
            "step_0": {"loss": 0.6931, "margins": 0.0},
            "held_out": {"loss": 0.11, "rewards": {"margins": 2.5}},
            "tokens": 34210,
            "seconds": 312.4,
            "machine": {"device": "x86_64 AVX512", "torch": "2.13.0"},
        },
    )
    write_json(
        out / "merge.json",
        {
            "kl": 3.2e-05,
            "max_logit_difference": 0.0625,
            "greedy_agreement": 1.0,
            "tolerance": {"max_kl": 0.01},
            "bytes": 269060552,
        },
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_recipe(tmp_path, "concise", right=33, passed=True)
    write_recipe(tmp_path, "too-short", right=5, passed=False, steps=20)
    return tmp_path


def make(root: Path, *names: str, method: str = "dpo") -> str:
    """Run the stage as the worker would; returns the page."""
    recipes = list(names or ("concise", "too-short"))
    files = (
        "gate.json",
        "prepare.json",
        "train.json",
        "merge.json",
        "evaluate.json",
        "lengths.csv",
        "live/plots/metrics",
    )
    baseline = root / "build/baselines/smol-1c0ffe"
    inputs: dict[str, Any] = {name: [root / "build" / name / file for file in files] for name in recipes} | {
        "baselines": [baseline]
    }
    settings = {
        "recipes": recipes,
        "methods": dict.fromkeys(recipes, method),
        "baselines": {} if method == "reward" else {name: str(baseline) for name in recipes},
    }
    report.run(settings, inputs, {"report": root / "build/report"}, root / "work", "report")
    return (root / "build/report/index.html").read_text(encoding="utf-8")


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def edit_sample(path: Path, number: int, **values: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("\n".join(lines) + "\n")


# ---- what it shows


def test_the_verdict_table_has_every_recipe_with_model_base_and_change(project: Path) -> None:
    shown = Page(make(project)).sections["verdicts"]
    assert "2 recipes: 1 passed, 1 failed" in Page(make(project)).sections[""]
    assert (
        "concise PASS 2 of 2 rules hold concise exact_match 0.100 ± 0.048 0.825 ± 0.061 +0.725 ± 0.080 p < 0.001"
        in shown
    )
    assert "too-short FAIL 1 of 2 rules hold concise exact_match 0.100 ± 0.048 0.125 ± 0.053 +0.025 ± 0.076" in shown
    assert "within noise (p = 1)" in shown


def test_every_rule_is_there_with_its_sentence(project: Path) -> None:
    shown = Page(make(project)).sections["too-short"]
    assert "FAIL evaluate.concise.exact_match is 0.125, below the min of 0.5" in shown
    assert "PASS prepare.dropped.empty is 0, at most 0" in shown


def test_rows_are_accounted_for(project: Path) -> None:
    shown = Page(make(project)).sections["concise"]
    assert "240 in, 19 dropped, 221 out." in shown
    assert "to train on 200 held out 21 broken 0 duplicate 12" in shown
    assert "rejected cut to length 3 rejected without end of turn 2" in shown


def test_merge_proof_training_and_lengths_are_there(project: Path) -> None:
    shown = Page(make(project)).sections["concise"]
    assert "KL divergence, nats a token 3.2e\u221205 (at most 0.01)" in shown
    assert "60 steps, 34,210 tokens, 312.4 seconds." in shown
    assert "machine.torch 2.13.0" in shown
    assert "rejected 12.75 12 21 30" in shown


def test_samples_are_of_documents_that_got_better_worse_and_stayed_alike(project: Path) -> None:
    shown = Page(make(project)).sections["concise"]
    assert "the model is better on 30 of 40 documents, worse on 1, alike on 9" in shown
    for document in (
        "document 0: better",
        "document 1: better",
        "document 39: worse",
        "document 9: alike",
        "document 19: alike",
    ):
        assert document in shown
    assert "document 2:" not in shown
    assert "base: 0 The capital of country 0 is City 0. model: 1 City 0 target City 0" in shown


def test_every_picture_has_a_name_for_those_who_can_not_see_it(project: Path) -> None:
    html = make(project, "concise")
    assert html.count("<svg") == html.count('role="img" aria-label="')
    for name in (
        "Loss by step",
        "Rewards by step",
        "Rows by length in tokens",
        "240 rows in: 200 to train on, 21 held out, 12 duplicate",
    ):
        assert f'aria-label="{name}' in html


def test_a_task_measured_in_two_ways_is_shown_twice(project: Path) -> None:
    for folder in (project / "build/concise/evaluate", project / "build/baselines/smol-1c0ffe"):
        for suffix in ("json", "jsonl"):
            (folder / f"ffffffffffff.{suffix}").write_bytes((folder / f"{KEY}.{suffix}").read_bytes())
    metrics = json.loads((project / "build/concise/evaluate.json").read_text())["concise"]
    write_json(project / "build/concise/evaluate.json", {f"concise-{KEY}": metrics, "concise-ffffffffffff": metrics})
    shown = Page(make(project, "concise")).sections["concise"]
    assert f"concise-{KEY} exact_match" in shown and "concise-ffffffffffff exact_match" in shown


def test_a_metric_that_is_no_mean_of_samples_gets_no_p_value(project: Path) -> None:
    for folder in (project / "build/concise/evaluate", project / "build/baselines/smol-1c0ffe"):
        edit(folder / f"{KEY}.json", lambda record: record["metrics"].update(bleu=31.5))
    edit(project / "build/concise/evaluate.json", lambda metrics: metrics["concise"].update(bleu=31.5))
    shown = Page(make(project, "concise")).sections["concise"]
    assert "concise bleu 40 documents 31.5 31.5 0 concise bleu: base 31.5, model 31.5" in shown


# ---- safe to open, the same bytes


def test_nothing_from_files_becomes_markup(project: Path) -> None:
    clean = Page(make(project)).tags
    for folder in (project / "build/concise/evaluate", project / "build/baselines/smol-1c0ffe"):
        edit_sample(folder / f"{KEY}.jsonl", 0, prompt=EVIL, target=EVIL, response=EVIL)
        edit(folder / f"{KEY}.json", lambda record: record.update(task=EVIL))
    edit(project / "build/concise/gate.json", lambda gate: gate["rules"][0].update(says=EVIL, metric=EVIL))
    edit(project / "build/concise/train.json", lambda train: train["machine"].update({EVIL: EVIL}))
    edit(
        project / "build/concise/prepare.json",
        lambda rows: rows["dropped"].update({EVIL: rows["dropped"].pop("too_long")}),
    )
    lengths = project / "build/concise/lengths.csv"
    lengths.write_text(lengths.read_text().replace("prompt,", f'"{EVIL.replace(chr(34), chr(34) * 2)}",'))
    html = make(project)
    dirty = Page(html)
    assert EVIL in dirty.sections["concise"]
    assert set(dirty.tags) == set(clean)
    assert not {"script", "img", "link", "iframe"} & set(dirty.tags)


def test_the_page_asks_nobody_for_anything(project: Path) -> None:
    shown = Page(make(project))
    assert not {name for name, _ in shown.attributes} & {"src", "srcset", "xlink:href", "onclick", "onload"}
    assert all((value or "").startswith("#") for name, value in shown.attributes if name == "href")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes


def test_the_same_build_gives_the_same_bytes(project: Path) -> None:
    html = make(project)
    assert html == make(project)
    assert str(project) not in html


# ---- nothing missing, nothing contradicting


FILES = (
    "concise/gate.json", "concise/prepare.json", "concise/train.json", "concise/merge.json", "concise/evaluate.json",
    "concise/lengths.csv", "concise/live/plots/metrics/train/loss.tsv",
    "concise/live/plots/metrics/train/rewards/margins.tsv",
    "concise/evaluate/manifest.json", "concise/evaluate/{key}.jsonl", "baselines/smol-1c0ffe/{key}.json",
    "baselines/smol-1c0ffe/{key}.jsonl", "baselines/smol-1c0ffe/manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("path", [path.format(key=KEY) for path in FILES])
def test_a_missing_file_is_named(project: Path, path: str) -> None:
    (project / "build" / path).unlink()
    with pytest.raises(StageError) as error:
        make(project)
    assert str(error.value) == f"{project / 'build' / path}: missing, so the report would lack it; run `dvc repro`"
    assert not (project / "build/report").exists()


def test_a_measurement_that_is_gone_is_noticed(project: Path) -> None:
    for suffix in ("json", "jsonl"):
        (project / f"build/concise/evaluate/{KEY}.{suffix}").unlink()
    with pytest.raises(StageError, match=r"evaluate\.json: is not what .*evaluate holds; run `dvc repro`"):
        make(project)


def test_rows_that_do_not_add_up_are_refused(project: Path) -> None:
    edit(project / "build/concise/prepare.json", lambda rows: rows["dropped"].update(duplicate=11))
    with pytest.raises(StageError, match=r"prepare\.json: 1 rows are neither kept nor counted as dropped"):
        make(project)


def test_another_recipes_verdict_is_refused(project: Path) -> None:
    (project / "build/concise/gate.json").write_bytes((project / "build/too-short/gate.json").read_bytes())
    with pytest.raises(StageError, match=r"gate\.json: is the verdict on too-short, not concise"):
        make(project)


def test_a_base_measured_on_other_documents_is_refused(project: Path) -> None:
    edit_sample(project / f"build/baselines/smol-1c0ffe/{KEY}.jsonl", 3, doc_hash="other")
    with pytest.raises(StageError, match="are not of the same documents; run `dvc repro`"):
        make(project)


def test_a_metric_the_base_lacks_is_refused(project: Path) -> None:
    edit(project / f"build/baselines/smol-1c0ffe/{KEY}.json", lambda record: record["metrics"].pop("exact_match"))
    with pytest.raises(StageError, match=f"measurement {KEY} of concise: the base has no exact_match; run `dvc repro`"):
        make(project)


def test_a_curve_without_numbers_is_named_with_its_line(project: Path) -> None:
    path = project / "build/concise/live/plots/metrics/train/loss.tsv"
    path.write_text("step\tloss\n1\t0.69\n2\t\n")
    with pytest.raises(StageError) as error:
        make(project)
    assert str(error.value) == f"{path}:3: has no numbers for step and loss"


def test_points_that_are_no_finite_numbers_are_counted(project: Path) -> None:
    path = project / "build/concise/live/plots/metrics/train/loss.tsv"
    path.write_text("step\tloss\n1\t0.69\n2\tnan\n3\t0.5\n")
    html = make(project)
    assert "1 points are no finite numbers" in html and "nan" not in html


# ---- texts and pictures


def test_long_texts_are_cut_and_say_so(project: Path) -> None:
    edit_sample(
        project / f"build/concise/evaluate/{KEY}.jsonl", 0, prompt="A" * 2000 + "the question", response="R" * 5000
    )
    shown = Page(make(project)).sections["concise"]
    assert "812 characters before … AAA" in shown and "Athe question" in shown
    assert "R … 3,800 characters more" in shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "missing"),
        (0, "0"),
        (-0.5, "\u22120.5"),
        (34210, "34,210"),
        (34210.4, "34,210"),
        (1.23456789, "1.235"),
        (True, "True"),
        ("a-b", "a-b"),
    ],
)
def test_numbers_are_written_to_be_read(value: Any, said: str) -> None:
    assert page.number(value) == said


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.02, 0.69, [0, 0.2, 0.4, 0.6, 0.8]),
        (-2.3, 0.9, [-3, -2, -1, 0, 1]),
        (5, 5, [4.5, 4.75, 5, 5.25, 5.5]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert pictures.nice_ticks(low, high) == ticks


def test_long_curves_become_means_of_neighbours() -> None:
    thinned = pictures.thin([(float(step), float(step % 2)) for step in range(1000)])
    assert len(thinned) <= pictures.MAX_POINTS
    assert thinned[0] == (4.0, 4 / 9)


def test_a_count_of_one_in_a_million_can_be_seen() -> None:
    svg = pictures.stacked_bar("rows", [("train", 999_999), ("drop0", 1), ("drop1", 0)])
    assert 'class="drop0" x="99.4" y="0" width="0.6"' in svg
    assert "drop1" not in svg


def test_a_single_point_is_drawn() -> None:
    assert "<circle" in pictures.line_chart("t", {"loss": [(1.0, 0.5)]}, "step")


# ---- other methods


def as_method(root: Path, method: str) -> Path:
    """Make the build of `concise` one of another method, by what its stages write then; returns its folder."""
    out = root / "build/concise"
    shape = SHAPES[method]
    tokens = {part: {"mean": 21.5, "p50": 20, "p95": 34, "max": 41} for part in PARTS[shape]}
    answers = dict.fromkeys(PARTS[shape][1:], 0)

    def prepared(metrics: dict[str, Any]) -> None:
        metrics.update(tokens=tokens, truncated=answers, end_of_turn_lost=answers)
        metrics["dropped"] = {reason: metrics["dropped"][reason] for reason in reasons(shape)}
        metrics["rows"]["in"] = metrics["rows"]["out"] + sum(metrics["dropped"].values())
        if shape == "labelled":
            metrics["labels"] = {"true": 120, "false": 80}
        if not answers:
            del metrics["boundary_differs"]

    edit(out / "prepare.json", prepared)
    lines = [f"{part},{edge},10" for part in PARTS[shape] for edge in (0, 16, 32)]
    (out / "lengths.csv").write_text("\n".join(["part,tokens,rows", *lines]) + "\n")
    shutil.rmtree(out / "live/plots/metrics/train")
    for curve in page.curve_names(method):
        path = out / f"live/plots/metrics/train/{curve}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"step\t{path.stem}\n" + "".join(f"{step}\t{step / 4}\n" for step in range(1, 9)))
    edit(out / "train.json", lambda metrics: [metrics.pop("rewards"), metrics.pop("step_0")])
    if method == "reward":  # which is measured on no task
        shutil.rmtree(out / "evaluate")
        (out / "evaluate.json").unlink()
        edit(out / "train.json", lambda metrics: metrics["held_out"].update(accuracy=0.8125))
        rewards = {"max_reward_difference": 0.0123, "mean_reward_difference": 0.004, "bytes": 269060552}
        write_json(out / "merge.json", rewards | {"tolerance": {"max_reward_difference": 0.1}})
    return out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_of_its_own_parts_and_curves(project: Path, method: str) -> None:
    as_method(project, method)
    shown = Page(make(project, "concise", method=method)).sections["concise"]
    for title in page.CURVES[method]:
        assert re.search(rf"{title} 0\.25( / 0\.25)* → 2", shown)
    parts = PARTS[SHAPES[method]]
    table = shown[shown.index("Tokens mean") : shown.index("Merge ")]
    assert table == "Tokens mean median 95 % longest " + "".join(f"{part} 21.5 20 34 41 " for part in parts)
    assert ("identical pair" in shown) == (parts[-1] == "rejected")
    assert ("No answer was cut" in shown) == (len(parts) > 1)
    assert ("To train on: 120 good answers, 80 bad ones." in shown) == (method == "kto")


def test_a_reward_model_is_shown_by_its_held_out_pairs(project: Path) -> None:
    as_method(project, "reward")
    found = Page(make(project, "concise", method="reward")).sections
    assert "concise PASS 2 of 2 rules hold a reward model: train.held_out.accuracy 0.8125" in found["verdicts"]
    shown = found["concise"]
    assert "largest difference 0.0123 (at most 0.1)" in shown
    assert not any(word in shown for word in ("Metrics", "Samples", "KL", "from smol"))


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_is_needed_unless_a_run_may_lack_it(project: Path, method: str) -> None:
    out = as_method(project, method)
    for curve in page.curve_names(method):
        path = out / f"live/plots/metrics/train/{curve}.tsv"
        kept = path.read_bytes()
        path.unlink()
        if curve in page.MAY_LACK.get(method, ()):
            make(project, "concise", method=method)
        else:
            with pytest.raises(StageError, match=f"{curve}.tsv: missing"):
                make(project, "concise", method=method)
        path.write_bytes(kept)
    assert "loss" not in page.MAY_LACK.get(method, ())


def test_a_picture_without_a_curve_is_left_out(project: Path) -> None:
    out = as_method(project, "kto")
    for curve in page.MAY_LACK["kto"]:
        (out / f"live/plots/metrics/train/{curve}.tsv").unlink()
    shown = Page(make(project, "concise", method="kto")).sections["concise"]
    assert "Loss 0.25 → 2" in shown and not any(title in shown for title in ("Reward margin", "Rewards 0", "KL 0"))
