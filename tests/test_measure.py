"""prefbuild/measure.py and prefbuild/localtask.py: lm-eval's numbers, checked, kept, and of pinned files only."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefbuild import measure as measuring
from prefbuild.artifact import read_manifest, sha256_file
from prefbuild.errors import RecipeError, StageError
from prefbuild.localtask import check_files, load_task, stock_yaml, task_digest
from prefbuild.measure import check_metrics, flatten, load_model, machine, measure, run_task, sample_lines

SUMS = """\
task: sums
include: common
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: digits
    filter: [{function: regex, regex_pattern: "([0-9]+)", group_select: -1}, {function: take_first}]
  - name: none
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
test_split: test
"""
ENDINGS = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {test: endings.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
CODED = SUMS.replace("task: sums", "task: coded").replace(
    "filter_list", "process_results: !function code.NAME\nother_list"
)
CODED = (
    CODED[: CODED.index("other_list")]
    + "metric_list:\n  - {metric: length, aggregation: mean, higher_is_better: false}\n"
)
CODE = """\
import math

def length(doc, results):
    return {"length": len(results[0])}

def nan(doc, results):
    return {"length": math.nan if doc["answer"] == "7" else 1.0}

def other(doc, results):
    return {"size": len(results[0])}

def some(doc, results):
    return {"length": 1.0} if doc["answer"] == "7" else {}

def word(doc, results):
    return {"length": "long"}
"""
ARC = [
    ("What do plants need to grow?", ["sunlight", "sand", "plastic", "steel"], "A"),
    ("Which animal can fly?", ["snake", "fish", "eagle", "cow"], "C"),
    ("What is ice made of?", ["wood", "water", "iron", "salt"], "B"),
    ("What gives us light by day?", ["the moon", "a stone", "a lamp", "the sun"], "D"),
]
TEXTS = [
    ("When you leave ice in the sun, it", ["melts", "sings", "grows"]),
    ("To cut paper you can use", ["scissors", "a pillow"]),
    ("Birds fly with their", ["wings", "shoes", "hats"]),
    ("At night the sky is", ["dark", "edible"]),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with task YAMLs and their data."""
    root = tmp_path_factory.mktemp("project")
    sums = [{"question": f"What is {a} plus 4? Answer with a number.", "answer": str(a + 4)} for a in range(12)]
    endings = [{"text": text, "choices": choices, "answer": 0} for text, choices in TEXTS]
    arc = [
        {"question": question, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": key}
        for question, texts, key in ARC
    ]
    for name, rows in {"sums": sums, "endings": endings, "arc": arc}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"sums.yaml": SUMS, "common": COMMON, "endings.yaml": ENDINGS, "code.py": CODE}.items():
        (root / name).write_text(text)
    for name in ("length", "nan", "other", "some", "word"):
        (root / f"{name}.yaml").write_text(CODED.replace("NAME", name))
    return root


@pytest.fixture(autouse=True)
def _in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def measurement(task: str, name: str, /, *files: str, **changes: Any) -> dict[str, Any]:
    """As the resolved recipe holds it; `files` are pinned as they are now."""
    pinned = [{"path": f, "size": Path(f).stat().st_size, "sha256": sha256_file(Path(f))} for f in files]
    asked = {"task": task, "name": name, "data": None, "files": pinned, "num_fewshot": None, "limit": None}
    return {"key": f"{name[:6]:k<12}", **asked, "apply_chat_template": False, "fewshot_as_multiturn": False, **changes}


def sums(**changes: Any) -> dict[str, Any]:
    return measurement(
        "sums.yaml", "sums", "sums.yaml", "common", "sums.jsonl", **{"apply_chat_template": True, **changes}
    )


def endings(**changes: Any) -> dict[str, Any]:
    return measurement("endings.yaml", "endings", "endings.yaml", "endings.jsonl", **changes)


def arc(**changes: Any) -> dict[str, Any]:
    return measurement("arc_easy", "arc_easy", "arc.jsonl", **{"data": {"test": "arc.jsonl"}, **changes})


def coded(name: str) -> dict[str, Any]:
    return measurement(
        f"{name}.yaml", "coded", f"{name}.yaml", "common", "sums.jsonl", "code.py", limit=4, apply_chat_template=True
    )


def settings() -> dict[str, Any]:
    return {"measurements": [sums(), endings(), arc()], "batch_size": 4, "seed": 1234}


@pytest.fixture(scope="module")
def measured(smollm2: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the folder of the first run, what it returned): samples, and the cache it kept them in."""
    folder = tmp_path_factory.mktemp("measured")
    with contextlib.chdir(project):
        metrics = measure(smollm2, settings(), folder / "samples", folder / "work", folder / "cache")
    return folder, metrics


@pytest.fixture(scope="module")
def lm(smollm2: Path) -> Any:
    return load_model(smollm2, 4, *machine())


def lines(folder: Path, key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{key}.jsonl").read_text().splitlines()]


# ---- results


def test_every_measurement_has_its_metrics(measured: Any) -> None:
    _, metrics = measured
    assert list(metrics) == ["sums", "endings", "arc_easy"]
    matches = {"exact_match", "exact_match_stderr", "exact_match@digits", "exact_match@digits_stderr", "n"}
    assert set(metrics["sums"]) == matches
    assert (
        set(metrics["endings"]) == set(metrics["arc_easy"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    )
    assert [m["n"] for m in metrics.values()] == [12, 4, 4]
    # The model knows more than chance, and it is the model that was asked.
    assert metrics["sums"]["exact_match@digits"] >= 0.5
    assert metrics["endings"]["acc"] >= 0.75


def test_record_says_what_was_measured_on_what(measured: Any, smollm2: Path) -> None:
    folder, metrics = measured
    for asked in settings()["measurements"]:
        record = json.loads((folder / "samples" / f"{asked['key']}.json").read_text())
        assert record["measurement"] == asked
        assert record["task"] == asked["name"]
        assert record["metrics"] == metrics[asked["name"]]
        assert record["n"] == metrics[asked["name"]]["n"] == len(lines(folder, asked["key"]))
        assert record["model_digest"] == read_manifest(smollm2)["digest"]
        assert record["task_digest"] == task_digest(asked)
        assert set(record["versions"]) == {"lm_eval", "transformers", "torch"}
        assert (record["dtype"], record["device"]) == machine()
        assert record["scorer"] == measuring.SCORER
        assert set(record["higher_is_better"].values()) == {True}
    assert set(record["higher_is_better"]) == {"acc", "acc_norm"}


def test_samples_hold_prompt_target_and_response(measured: Any) -> None:
    folder, metrics = measured
    first, *_ = rows = lines(folder, sums()["key"])
    assert [row["doc_id"] for row in rows] == list(range(12))
    assert set(first) == {"doc_id", "doc_hash", "prompt", "target", "response", "metrics"}
    assert first["prompt"].startswith("<|im_start|>system")
    assert first["prompt"].endswith("What is 0 plus 4? Answer with a number.<|im_end|>\n<|im_start|>assistant\n")
    assert first["target"] == "4"
    for metric in ("exact_match", "exact_match@digits"):
        assert math.fsum(row["metrics"][metric] for row in rows) / 12 == pytest.approx(metrics["sums"][metric])
    for row, (text, choices) in zip(lines(folder, endings()["key"]), TEXTS, strict=True):
        assert (row["prompt"], row["target"]) == (text, choices[0])
        assert row["response"] in choices
        assert row["metrics"]["acc"] == (row["response"] == choices[0])
    assert [row["target"] for row in lines(folder, arc()["key"])] == ["sunlight", "eagle", "water", "the sun"]


# ---- kept measurements


def test_second_run_has_the_same_bytes_and_loads_no_model(
    measured: Any, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = measured
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")}
    monkeypatch.setattr(measuring, "load_model", lambda *arguments: pytest.fail("the model was loaded"))
    assert measure(smollm2, settings(), tmp_path / "samples", tmp_path / "work", folder / "cache") == metrics
    files = sorted(path.name for path in (folder / "samples").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "samples").iterdir())
    for name in files:
        assert (tmp_path / "samples" / name).read_bytes() == (folder / "samples" / name).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")} == kept


def test_measuring_again_gives_the_same_bytes(measured: Any, lm: Any, smollm2: Path, tmp_path: Path) -> None:
    folder, _ = measured
    result, rows = run_task(lm, endings(), 1234, tmp_path / "work")
    record = json.loads((folder / "samples" / f"{endings()['key']}.json").read_text())
    assert {key: record[key] for key in result} == result
    assert rows == lines(folder, endings()["key"])


@pytest.mark.parametrize("what", ["samples", "record", "seed", "model", "scorer"])
def test_what_was_kept_of_something_else_is_not_used(
    measured: Any, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, _ = measured
    cache, model, asked = tmp_path / "cache", smollm2, {**settings(), "measurements": [endings()]}
    shutil.copytree(folder / "cache", cache)
    for kept in cache.iterdir():
        if what == "samples":
            for path in kept.glob("*.jsonl"):
                path.write_text(path.read_text().replace('"acc": 0.0', '"acc": 1.0') + "\n")
        if what == "record":
            for path in kept.glob("*k.json"):
                path.unlink()
    if what == "seed":
        asked["seed"] = 1
    if what == "scorer":
        monkeypatch.setattr(measuring, "SCORER", "another way")
    if what == "model":
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        from prefbuild.artifact import write_manifest

        write_manifest(model, stage="merge", name="other", inputs={})

    class Loaded(Exception):
        pass

    def load(*arguments: Any) -> None:
        raise Loaded

    monkeypatch.setattr(measuring, "load_model", load)
    with pytest.raises(Loaded):
        measure(model, asked, tmp_path / "samples", tmp_path / "work", cache)


def test_same_task_measured_in_two_ways_keeps_both(
    measured: Any, smollm2: Path, tmp_path: Path, lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = measured
    few = endings(key="f" * 12, limit=2)
    monkeypatch.setattr(measuring, "load_model", lambda *arguments: lm)
    asked = {**settings(), "measurements": [endings(), few]}
    both = measure(smollm2, asked, tmp_path / "samples", tmp_path / "work", folder / "cache")
    assert both[f"endings-{endings()['key']}"] == metrics["endings"]
    assert both["endings-ffffffffffff"]["n"] == 2


def test_cache_that_can_not_be_written_is_not_needed(
    smollm2: Path, tmp_path: Path, lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(measuring, "load_model", lambda *arguments: lm)
    asked = {**settings(), "measurements": [endings(limit=1)]}
    measure(smollm2, asked, tmp_path / "samples", tmp_path / "work", tmp_path / "file" / "cache")
    assert len(list((tmp_path / "work/evaluations").iterdir())) == 1


# ---- what is refused


def test_changed_task_file_is_refused(smollm2: Path, tmp_path: Path) -> None:
    asked = sums()
    asked["files"][2]["sha256"] = "0" * 64
    with pytest.raises(StageError, match=r"^sums.jsonl: sha256 is \w{64}, the lock says 0{64}; .*prefbuild lock"):
        measure(smollm2, {**settings(), "measurements": [asked]}, tmp_path / "samples", tmp_path, tmp_path)


def test_changed_model_is_refused(smollm2: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(smollm2, copy, ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(StageError, match=r"model.safetensors: is in the manifest but not on disk"):
        measure(copy, settings(), tmp_path / "samples", tmp_path, tmp_path)


@pytest.mark.parametrize("file", ["common", "code.py", "sums.jsonl"])
def test_file_that_is_read_but_not_pinned_is_refused(file: str) -> None:
    asked = coded("length")
    asked["files"] = [pinned for pinned in asked["files"] if pinned["path"] != file]
    with pytest.raises(StageError, match=rf"^{file}: read by task coded but not pinned; run `prefbuild lock`"):
        check_files(asked)


def test_code_from_elsewhere_is_refused(project: Path) -> None:
    (project / "system.yaml").write_text(CODED.replace("code.NAME", "os.system"))
    with pytest.raises(RecipeError, match=r"system.yaml:\d+: .*os.system"):
        check_files(measurement("system.yaml", "coded", "system.yaml", "common", "sums.jsonl"))


def test_function_beside_the_yaml_is_used(lm: Any, tmp_path: Path) -> None:
    result, rows = run_task(lm, coded("length"), 1, tmp_path)
    assert result["higher_is_better"] == {"length": False}
    assert [row["metrics"]["length"] for row in rows] == [len(row["response"]) for row in rows]
    assert result["metrics"]["length"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"^coded: length,none is nan; look at the task's metric"),
        ("other", r"^coded: gave no length over 4 documents"),
        ("some", r"^coded: only 1 of 4 documents have a number for length"),
        ("word", r"length.yaml|word.yaml: lm-eval failed: TypeError"),
    ],
)
def test_metric_that_no_gate_can_judge_is_refused(lm: Any, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        run_task(lm, coded(name), 1, tmp_path)


def test_chat_template_is_asked_for_but_not_there(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(
        StageError, match=r"apply_chat_template is true, but the model's tokenizer has no chat template"
    ):
        run_task(lm, sums(), 1, tmp_path)


def test_prompts_with_two_bos_tokens_are_refused(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ bos_token }}{{ bos_token }}x")
    with pytest.raises(StageError, match=r"prompts begin with '<\|im_start\|>' twice"):
        run_task(lm, sums(), 1, tmp_path)


def test_bos_of_tokenizer_and_template_is_one(smollm2: Path, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    monkeypatch.setattr(lm, "tokenizer", tokenizer)
    assert tokenizer("x")["input_ids"][0] == bos[1]
    text = lm.apply_chat_template([{"role": "user", "content": "x"}])
    assert text.startswith(bos[0])
    measuring._check_template(lm, sums())
    assert lm.tok_encode(text)[:2] != [bos[1]] * 2


# ---- stock tasks


def test_stock_task_is_found_by_its_own_name() -> None:
    assert stock_yaml("arc_easy").name == "arc_easy.yaml"
    for name in ("arc_hard", "ai2_arc", "mmlu"):  # none, a tag, a group
        with pytest.raises(StageError, match=rf"^{name}: lm-eval 0.4.\d+ has no task of that name"):
            stock_yaml(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, r"reads allenai/ai2_arc from the Hub, which no stage can reach; give the task its data"),
        ({"data": {"train": "arc.jsonl"}}, r"has nothing to measure on; give data.test or data.validation"),
        ({"num_fewshot": 2}, r"takes its 2 examples from split train, for which there is no local file"),
        ({"data": {"test": "code.py"}}, r"data must be files of one kind, of .json.*; got .py"),
        ({"name": "arc"}, r"is no single task named arc"),
        ({"task": "piqa", "name": "piqa"}, r"has no test split, so data.test would be ignored; it has train"),
        ({"task": "truthfulqa_mc1", "name": "truthfulqa_mc1", "data": {"validation": "arc.jsonl"}, "num_fewshot": 3},
         r"sets num_fewshot: 0 itself and takes no other"),
        ({"task": "humaneval", "name": "humaneval"}, r"runs code that the model writes"),
    ],
)  # fmt: skip
def test_stock_task_that_would_not_do_what_is_asked_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        load_task(arc(**changes), tmp_path)


def test_few_shot_examples_come_from_their_split(lm: Any, tmp_path: Path) -> None:
    data = {"test": "arc.jsonl", "train": "arc.jsonl"}
    _, rows = run_task(lm, arc(data=data, num_fewshot=2, limit=1), 1, tmp_path)
    assert rows[0]["prompt"].count("Question:") == 3


# ---- arithmetic


def test_flatten_names_metrics_plainly() -> None:
    found = {
        "name": "t", "alias": "t", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1,
        "f1,strict-match": 1, "f1_stderr,strict-match": "N/A", "x_stderr,none": 0.25,
    }  # fmt: skip
    assert flatten(found) == {"acc": 0.5, "acc_stderr": 0.1, "f1@strict-match": 1.0, "x_stderr": 0.25}
    with pytest.raises(StageError, match=r"^t: acc,none is 'N/A', which is no number"):
        flatten({"name": "t", "acc,none": "N/A"})
    with pytest.raises(StageError, match=r"^t: acc,none is inf"):
        flatten({"name": "t", "acc,none": math.inf})


def test_mean_that_is_not_of_the_samples_is_refused() -> None:
    from lm_eval.api.metrics import mean

    rows = [{"metrics": {"acc": value}} for value in (1.0, 0.0, 0.0)]
    check_metrics("t", {"acc": 1 / 3}, rows, {"acc": mean})
    with pytest.raises(StageError, match=r"^t: lm-eval says acc is 0.34, but the mean of its 3 samples is 0.33"):
        check_metrics("t", {"acc": 0.34}, rows, {"acc": mean})
    with pytest.raises(StageError, match=r"^t: gave no acc_norm over 3 documents"):
        check_metrics("t", {"acc": 1 / 3}, rows, {"acc": mean, "acc_norm": mean})


def test_choice_between_contexts_is_shown_as_context() -> None:
    sample = {
        "doc_id": 0, "doc_hash": "h", "filter": "none", "metrics": ["acc"], "acc": 1.0, "target": 1,
        "arguments": [("The cat", " sat"), ("The dog", " sat")], "resps": [[(-3.0, False)], [(-1.0, False)]],
    }  # fmt: skip
    (line,) = sample_lines("t", [sample], "multiple_choice")
    assert (line["response"], line["target"]) == ("The dog", "The dog")
