"""`prefbuild status`: its forecast against what `dvc repro` then really does, in a project whose stages are cheap."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project import RECIPE, ROOT, TASK, git, run, write_rows

from prefbuild import resolve as resolving
from prefbuild.errors import GraphError, UsageError
from prefbuild.lock import lock
from prefbuild.pipeline import sync
from prefbuild.recipe import load_recipes
from prefbuild.resolve import load_project
from prefbuild.status import Change, differences, status, status_json, status_text

# DVC and `prefbuild resolve` are the real ones. The other stages leave outputs that follow from what they read, as the
# real ones do, but in milliseconds; `logging_steps` is no part of it, so that a stage can run and change nothing.
STAGE = """\
#!{python}
import hashlib, json, os, pathlib, sys
command, *rest = sys.argv[1:]
if command == "resolve":
    os.execv(sys.executable, [sys.executable, "-m", "prefbuild", "resolve"])
stage, name = [*rest, "report"][:2]
folder = {{"model": "models/", "data": "data/", "baseline": "baselines/"}}.get(stage, "")
section = json.loads(pathlib.Path(f"build/.resolved/{{folder}}{{name}}.json").read_text())[stage]
section["settings"].get("train", {{}}).pop("logging_steps", None)
digest = hashlib.sha256(json.dumps(section, sort_keys=True).encode())
for value in section["inputs"].values():
    for path in map(pathlib.Path, value if isinstance(value, list) else [value]):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"")
for role, path in section["outputs"].items():
    path = pathlib.Path(path)
    text = json.dumps({{"role": role, "digest": digest.hexdigest()}})
    if path.suffix == ".csv":
        text = "tokens,rows\\n1," + str(int(digest.hexdigest()[:6], 16))
    elif path.suffix != ".json":
        path = path / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
"""


def make(folder: Path, recipes: dict[str, str]) -> None:
    """A DVC project with a dummy checkpoint and cheap stages, locked and synced."""
    for name in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "models/tiny").mkdir(parents=True)
    (folder / "models/tiny/config.json").write_text('{"model_type": "llama"}')
    write_rows(folder / "recipes/rows/train.jsonl", 10)
    (folder / "recipes/rows/sums.yaml").write_text(TASK)
    (folder / "recipes/rows/held_out.jsonl").write_text('{"question": "1 plus 5?", "answer": "6"}\n')
    for name, text in recipes.items():
        (folder / f"recipes/{name}.yaml").write_text(text)
    (folder / ".fake").mkdir()
    (folder / ".fake/prefbuild").write_text(STAGE.format(python=sys.executable))
    (folder / ".fake/prefbuild").chmod(0o755)
    git(folder, "init", "-q")
    relock(folder)


def relock(folder: Path) -> None:
    lock(folder, load_recipes(folder))
    sync(load_project(folder))


def repro(folder: Path) -> tuple[set[str], set[str]]:
    """Run `dvc repro`; the stages that ran, and those that were restored from the cache."""
    path = f"{folder / '.fake'}:{os.environ['PATH']}"
    output = run(folder, sys.executable, "-m", "dvc", "repro", PATH=path, PYTHONPATH=str(ROOT))
    lines = output.splitlines()
    ran = {line.split("'")[1] for line in lines if line.startswith("Running stage '")}
    restored = {line.split("'")[1] for line in lines if "is cached - skipping run" in line}
    return {label(stage) for stage in ran}, {label(stage) for stage in restored}


def label(address: str) -> str:
    """`pipelines/a/dvc.yaml:train` as `a train`; `model-tiny-1a2b3c` as `model`."""
    if ":" in address:
        return f"{address.split('/')[1]} {address.partition(':')[2]}"
    return address.partition("-")[0]


def forecast(changes: list[Change], state: str) -> set[str]:
    return {
        f"{change.name} {change.stage}" if change.name in ("a", "b", "c") else change.stage
        for change in changes
        if change.state == state
    }


def reasons(changes: list[Change], stage: str, name: str = "a") -> list[str]:
    return next(change.reasons for change in changes if change.stage == stage and change.name == name)


def check_against_dvc(folder: Path, changes: list[Change]) -> set[str]:
    """What is forecast to run runs, nothing else but what may run does, and then all is up to date."""
    ran, restored = repro(folder)
    runs, may = forecast(changes, "runs"), forecast(changes, "may run")
    assert runs <= ran <= runs | may
    assert forecast(changes, "restores") <= restored <= forecast(changes, "restores") | may
    assert status(folder) == []
    return ran


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


A = RECIPE
B = RECIPE.replace("limit: 4", "limit: 6").replace("    min: 0.0\n", "    min_delta: 0.0\n    against: a\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "project"
    make(folder, {"a": A, "b": B})
    before = status(folder)
    assert {change.state for change in before} == {"runs"}
    ran, _ = repro(folder)
    assert ran == forecast(before, "runs")
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    """A copy of the built project, to change."""
    return Path(shutil.copytree(built, tmp_path / "project", symlinks=True))


# ---- forecasts


def test_after_a_build_nothing_is_left_and_the_answer_comes_soon(built: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = run(built, sys.executable, "-m", "prefbuild", "status", PYTHONPATH=str(ROOT))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert output == "up to date: a build would run nothing\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # seconds of computing
    assert status_json(status(built)) == "[]"


def test_status_writes_nothing(project: Path) -> None:
    edit(project / "recipes/a.yaml", "learning_rate: 1.0e-3", "learning_rate: 5.0e-4")

    def snapshot() -> dict[str, float]:
        files = [path for path in project.rglob("*") if path.is_file() and ".dvc/tmp" not in str(path)]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = snapshot()
    assert status(project)
    assert snapshot() == before


def test_a_comment_runs_only_resolve(project: Path) -> None:
    edit(project / "recipes/a.yaml", "description:", "# A comment.\ndescription:")
    changes = status(project)
    assert status_text(changes) == (
        "up to date: only resolve would run (recipes changed on disk), and no stage sees a difference"
    )
    assert check_against_dvc(project, changes) == {"resolve"}


def test_a_learning_rate_runs_train_and_maybe_what_follows(project: Path) -> None:
    edit(project / "recipes/a.yaml", "learning_rate: 1.0e-3", "learning_rate: 5.0e-4")
    changes = status(project)
    assert reasons(changes, "train") == ["train.learning_rate 0.001 -> 0.0005"]
    assert reasons(changes, "merge") == reasons(changes, "gate") == ["because train runs"]
    assert reasons(changes, "gate", "b") == ["because train of a runs"]
    assert forecast(changes, "runs") == {"resolve", "a train"}
    assert forecast(changes, "may run") == {"a merge", "a evaluate", "a gate", "b gate", "report"}
    check_against_dvc(project, changes)


def test_a_stage_that_makes_the_same_again_stops_the_chain(project: Path) -> None:
    edit(project / "recipes/a.yaml", "save_steps: 2", "save_steps: 2\n  logging_steps: 3")
    changes = status(project)
    assert reasons(changes, "train") == ["train.logging_steps 1 -> 3"]
    assert "a merge" in forecast(changes, "may run")
    assert check_against_dvc(project, changes) == {"resolve", "a train"}


def test_a_limit_runs_evaluation_baseline_and_gate_but_no_training(project: Path) -> None:
    edit(project / "recipes/a.yaml", "limit: 4", "limit: 2")
    changes = status(project)
    assert reasons(changes, "evaluate") == ["evaluate.tasks[sums].limit 4 -> 2"]
    assert reasons(changes, "gate") == ["evaluate.tasks[sums].limit 4 -> 2"]
    (baseline,) = [change for change in changes if change.stage == "baseline"]
    assert baseline.reasons == ["evaluate.tasks[sums].limit 4 -> 2"]
    assert forecast(changes, "runs") == {"resolve", "baseline", "a evaluate", "a gate"}
    check_against_dvc(project, changes)


def test_what_all_recipes_inherit_is_traced_to_each(project: Path) -> None:
    edit(project / "params.yaml", "seed: 42", "seed: 43")
    changes = status(project)
    assert forecast(changes, "runs") == {"resolve"} | {
        f"{name} {stage}" for name in "ab" for stage in ("prepare", "reference", "train")
    }
    assert reasons(changes, "prepare") == reasons(changes, "train", "b") == ["seed 42 -> 43"]
    assert reasons(changes, "reference") == ["seed 42 -> 43"]  # which says what rows a run of a few steps uses
    check_against_dvc(project, changes)


def test_changed_code_is_said_as_such(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resolving.STAGE_VERSIONS, "merge", 2)
    changes = status(built)
    assert reasons(changes, "merge") == ["prefbuild's own merge changed (version 1 -> 2)"]
    assert forecast(changes, "runs") == {"a merge", "b merge"}


@pytest.mark.parametrize("what", ["deleted", "tampered"])
def test_a_lost_output_is_restored_and_nothing_runs(project: Path, what: str) -> None:
    file = project / "build/a/adapter/metrics.json"
    good = file.read_text()
    file.unlink()
    if what == "deleted":
        file.parent.rmdir()
    else:
        file.write_text("other")
    changes = status(project)
    happened = {"deleted": "is gone", "tampered": "changed on disk"}[what]
    assert [(change.stage, change.state, change.reasons) for change in changes] == [
        ("train", "restores", [f"build/a/adapter {happened}; DVC puts its own copy back"])
    ]
    assert check_against_dvc(project, changes) == set()
    assert file.read_text() == good


def test_an_output_written_through_its_hard_link_is_not_taken_for_good(project: Path) -> None:
    shutil.rmtree(project / "build/a/adapter")
    repro(project)  # links it anew: the copied project's files are no links
    file = project / "build/a/adapter/metrics.json"
    assert file.stat().st_nlink == 2
    file.chmod(0o644)
    file.write_text("other")
    file.chmod(0o444)
    (reason,) = reasons(status(project), "train")
    assert reason.startswith("build/a/adapter changed on disk, and through a hard link in DVC's cache; remove ")
    Path(reason.split()[-4]).unlink()
    changes = status(project)
    assert "a train" in forecast(changes, "runs")
    check_against_dvc(project, changes)


def test_an_output_that_the_cache_lacks_too_is_made_again(project: Path) -> None:
    shutil.rmtree(project / "build/a/adapter")
    shutil.rmtree(project / ".dvc/cache")
    for path in ("merged", "evaluate"):
        assert (project / "build/a" / path).is_dir()
    changes = status(project)
    assert reasons(changes, "train")[0] == "build/a/adapter is gone, but DVC's cache lacks it"
    assert "build/a/train.json is there, but DVC's cache lacks it" in reasons(changes, "train")
    check_against_dvc(project, changes)


def test_a_stage_that_ran_alone_is_seen_below_it(project: Path) -> None:
    edit(project / "recipes/a.yaml", "learning_rate: 1.0e-3", "learning_rate: 5.0e-4")
    path = f"{project / '.fake'}:{os.environ['PATH']}"
    for target in ("resolve", "pipelines/a/dvc.yaml:train"):
        run(project, sys.executable, "-m", "dvc", "repro", "-s", target, PATH=path, PYTHONPATH=str(ROOT))
    changes = status(project)
    assert reasons(changes, "merge") == ["build/a/adapter was made anew since"]
    assert "a train" not in forecast(changes, "runs")
    check_against_dvc(project, changes)


def test_a_new_recipe_is_never_built_and_the_graph_out_of_date(project: Path) -> None:
    (project / "recipes/c.yaml").write_text(A)
    changes = status(project)
    assert changes[0].reasons == [
        "the DVC files are out of date: run `prefbuild sync` (dvc.yaml, pipelines/c/dvc.yaml)"
    ]
    assert status_text(changes).splitlines()[0] == changes[0].reasons[0]
    stages = {f"c {stage}" for stage in ("prepare", "reference", "train", "merge", "evaluate", "gate")}
    assert forecast(changes, "runs") == {"resolve", "report"} | stages
    assert all(reasons(changes, stage.split()[1], "c") == ["never built"] for stage in stages)
    sync(load_project(project))
    check_against_dvc(project, status(project))


def test_a_base_that_is_another_recipes_model_is_followed(project: Path) -> None:
    (project / "recipes/c.yaml").write_text(
        A.replace("source: file\n  path: models/tiny", "source: recipe\n  recipe: a")
    )
    sync(load_project(project))
    repro(project)
    assert status(project) == []
    edit(project / "recipes/a.yaml", "max_kl: 0.5", "max_kl: 0.4")
    changes = status(project, ["c"])
    assert reasons(changes, "prepare", "c") == ["because merge of a runs"]
    assert {change.name for change in changes if change.state == "may run"} == {"c", "recipe-a"}
    check_against_dvc(project, status(project))


def test_what_is_not_pinned_stops_its_recipe(project: Path) -> None:
    shutil.copy(project / "recipes/rows/train.jsonl", project / "recipes/rows/other.jsonl")
    edit(project / "recipes/a.yaml", "path: recipes/rows/train.jsonl", "path: recipes/rows/other.jsonl")
    changes = status(project)
    (stop,) = [change for change in changes if change.stage == "lock"]
    assert (stop.name, stop.state) == ("a", "stops")
    assert "not pinned; run `prefbuild lock" in stop.reasons[0]
    added, removed = reasons(changes, "prepare")
    assert added.startswith("reads build/data/rows-other-")
    assert removed.startswith("reads build/data/rows-train-")
    assert removed.endswith(" no more")
    assert "first put right what stops the build" in status_text(changes)
    relock(project)
    check_against_dvc(project, status(project))


def test_rows_that_changed_since_the_lock_stop_the_build(project: Path) -> None:
    with open(project / "recipes/rows/train.jsonl", "a") as file:
        file.write('{"question": "?", "chosen": "1", "rejected": "2", "kind": "sum"}\n')
    changes = status(project)
    for name in ("a", "b"):
        says = f"recipes/rows/train.jsonl changed since it was locked; run `prefbuild lock {name}`"
        assert reasons(changes, "lock", name) == [says]
    (data,) = [change for change in changes if change.stage == "data"]
    assert data.reasons == ["recipes/rows/train.jsonl changed on disk"]
    run(project, sys.executable, "-m", "prefbuild", "resolve", code=4, PYTHONPATH=str(ROOT))
    relock(project)
    changes = status(project)
    (data,) = [change for change in changes if change.stage == "data"]
    assert data.reasons[0].startswith("files: train.jsonl is another (")
    check_against_dvc(project, changes)


def test_a_gate_runs_only_the_gate(project: Path) -> None:
    edit(project / "recipes/a.yaml", "    min: 0.0\n", "    min: 0.25\n")
    changes = status(project)
    assert reasons(changes, "gate") == ["gates[evaluate.sums.exact_match].min 0.0 -> 0.25"]
    assert forecast(changes, "runs") == {"resolve", "a gate"}
    check_against_dvc(project, changes)


# ---- what is asked


def test_only_the_named_recipes_and_what_they_need_are_told(project: Path) -> None:
    for name in "ab":
        edit(project / f"recipes/{name}.yaml", "learning_rate: 1.0e-3", "learning_rate: 5.0e-4")
    changes = status(project, ["a"])
    assert forecast(changes, "runs") == {"resolve", "a train"}
    assert {change.name for change in changes} == {"", "a"}
    # b is judged against a
    assert {change.name for change in status(project, ["b"])} == {"", "a", "b"}


def test_an_unknown_recipe_is_refused(built: Path) -> None:
    with pytest.raises(UsageError, match="^there is no recipe 'x'; "):
        status(built, ["x"])


def test_a_folder_without_dvc_is_refused(project: Path) -> None:
    shutil.rmtree(project / ".dvc")
    with pytest.raises(UsageError, match="is no DVC repository; run `git init` and `dvc init` there$"):
        status(project)


def test_dvc_files_that_dvc_cannot_read_are_an_error_of_the_graph(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: [\n")
    with pytest.raises(GraphError, match="^DVC cannot read the graph: .*`prefbuild sync` writes dvc.yaml anew$"):
        status(project)


def test_where_one_stands_does_not_matter(project: Path) -> None:
    edit(project / "recipes/a.yaml", "limit: 4", "limit: 2")
    here = status(project)
    code = "from pathlib import Path; from prefbuild.status import *; print(status_json(status(Path('..'))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project / "recipes",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == json.loads(status_json(here))


# ---- text


CHANGES = [
    Change(stage="model", name="tiny-1a2b3c", state="runs", reasons=["never built"]),
    Change(stage="train", name="a", state="runs", reasons=["train.beta 0.1 -> 0.2", "seed 1 -> 2"]),
    Change(stage="merge", name="a", state="may run", reasons=["because train runs"]),
]


def test_text_is_aligned_and_grouped_by_recipe() -> None:
    assert status_text(CHANGES) == (
        "shared\n"
        "  model tiny-1a2b3c  runs      never built\n"
        "\n"
        "a\n"
        "  train              runs      train.beta 0.1 -> 0.2\n"
        "                               seed 1 -> 2\n"
        "  merge              may run   because train runs\n"
        "\n"
        "2 stages would run; 1 more if what they read comes out different"
    )


def test_colors_are_for_terminals() -> None:
    assert "\x1b[" not in status_text(CHANGES)
    assert "\x1b[33mruns    \x1b[0m" in status_text(CHANGES, color=True)


def test_the_text_ends_long_lists_and_the_json_does_not() -> None:
    many = [Change(stage="train", name="a", state="runs", reasons=[f"train.x{i} 0 -> 1" for i in range(20)])]
    assert status_text(many).splitlines()[-3].strip() == "and 12 more"
    assert len(json.loads(status_json(many))[0]["reasons"]) == 20


# ---- sections compared


def test_another_image_and_other_gpus_are_told() -> None:
    old = {**section(), "image": None, "gpus": 0}
    new = {**section(), "image": "sha256:" + "ab" * 32, "gpus": 1}
    assert differences("train", old, new) == [
        "compute.gpus 0 -> 1",
        "the image it runs in none -> sha256:abababababab",
    ]


def section(**settings: Any) -> dict[str, Any]:
    return {"version": 1, "inputs": {"model": "build/m"}, "outputs": {}, "settings": settings}


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"data": {"filters": [{"column": "n", "min": 1}]}}, {"data": {"filters": [{"column": "n", "min": 2}]}},
         ["data.filters[n].min 1 -> 2"]),
        ({"train": {"loss_type": ["sigmoid"]}}, {"train": {"loss_type": ["sigmoid", "sft"]}},
         ["train.loss_type + 'sft'"]),
        ({"train": {"loss_type": ["sft", "ipo"]}}, {"train": {"loss_type": ["ipo", "sft"]}},
         ["train.loss_type: another order"]),
        ({"train": {"lora": {"r": 4}}}, {"train": {"lora": {"r": 8}}}, ["train.lora.r 4 -> 8"]),
        ({"train": {"max_steps": None}}, {"train": {"max_steps": 5}}, ["train.max_steps null -> 5"]),
        ({"train": {}}, {"train": {"beta": 0.1}}, ["train.beta 0.1 (new)"]),
        ({"train": {"beta": 0.1}}, {"train": {}}, ["train.beta 0.1 (gone)"]),
        ({"batch_size": 8}, {"batch_size": 4}, ["evaluate.batch_size 8 -> 4"]),
        ({"gates": [{"metric": "evaluate.t.acc", "against": "base", "min": 0.1},
                    {"metric": "evaluate.t.acc", "against": "x", "min": 0.1}]},
         {"gates": [{"metric": "evaluate.t.acc", "against": "base", "min": 0.1},
                    {"metric": "evaluate.t.acc", "against": "x", "min": 0.2}]},
         ["gates[evaluate.t.acc against x].min 0.1 -> 0.2"]),
        ({"measurements": [{"key": "1", "name": "t", "files": [{"path": "t.yaml", "size": 5, "sha256": "a"}]}]},
         {"measurements": [{"key": "2", "name": "t", "files": [{"path": "t.yaml", "size": 5, "sha256": "b"}]}]},
         ["evaluate.tasks[t].files: t.yaml is another (same size)"]),
        ({"measurements": [{"key": "1", "name": "t"}]}, {"measurements": [{"key": "2", "name": "u"}]},
         ["evaluate.tasks + u", "evaluate.tasks - t"]),
        ({"commit": "0a" * 20}, {"commit": "1b" * 20}, ["commit 0a0a0a0a -> 1b1b1b1b"]),
    ],
)  # fmt: skip
def test_a_difference_is_called_as_in_a_recipe(old: dict[str, Any], new: dict[str, Any], lines: list[str]) -> None:
    assert differences("train", section(**old), section(**new)) == lines


def test_a_long_value_is_never_printed_whole() -> None:
    (line,) = differences("train", section(train={"x": "a" * 1000}), section(train={"x": ["b"] * 1000}))
    assert len(line) < 120


def test_something_that_could_be_a_token_is_not_printed() -> None:
    token = "hf_" + "abcdefghij" * 3 + "1234"
    (line,) = differences("train", section(base={"name": token}), section(base={"name": "x"}))
    assert token not in line
