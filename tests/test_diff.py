"""`prefbuild diff` on real git and DVC: what differs, what is noise, and what can't be compared."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefbuild import cli, diff
from prefbuild.artifact import write_json
from prefbuild.errors import StageError, UsageError

N = 40
KEYS = {"concise": "aaaaaaaaaaaa", "sense": "bbbbbbbbbbbb"}
STAGES = ("prepare", "train", "merge", "evaluate", "gate")
MODEL, DATA = "build/models/smol-1c0ffe", "build/data/rows-0a0a0a"


def command(root: Path, *words: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@t",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@t",
    }
    env = {**os.environ, **identity, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def git(root: Path, *arguments: str) -> None:
    command(root, "git", *arguments)


def dvc(root: Path, *arguments: str) -> None:
    command(root, sys.executable, "-m", "dvc", *arguments)


def measured(folder: Path, key: str, metric: str, right: int, seed: int) -> dict[str, float]:
    """Samples of one task in a random order of right and wrong; returns its metrics."""
    scores = [1.0] * right + [0.0] * (N - right)
    random.Random(seed).shuffle(scores)
    lines = [{"doc_id": i, "doc_hash": f"h{i}", "metrics": {metric: score}} for i, score in enumerate(scores)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {metric: right / N, f"{metric}_stderr": 0.07, "n": N, "corpus_score": right / 3}


def write_recipe(
    root: Path,
    name: str,
    *,
    right: int,
    learning_rate: float = 5e-5,
    dropped: int = 0,
    keys: dict[str, str] = KEYS,
    data: str = DATA,
) -> None:
    """A recipe resolved, and under made/<name> what its stages will leave."""
    measurements = [
        {
            "key": key,
            "task": f"recipes/{task}.yaml",
            "name": task,
            "files": [{"path": f"{task}.jsonl", "sha256": key * 5}],
            "limit": None if key in KEYS.values() else 20,
        }
        for task, key in keys.items()
    ]
    gate = {"metric": "evaluate.concise.exact_match", "min": 0.6, "against": "base"}
    inputs = {"model": MODEL, "data": [data]}
    settings: dict[str, Any] = {
        "prepare": {"data": {"max_length": 64, "filters": []}, "seed": 42},
        "train": {"train": {"learning_rate": learning_rate, "lora": {"r": 8}}, "seed": 42, "base": {"name": "smol"}},
        "merge": {"merge": {"max_kl": 0.01}},
        "evaluate": {"measurements": measurements, "batch_size": 8, "seed": 1234},
        "gate": {"gates": [gate], "measurements": measurements, "others": {}},
    }
    sections = {
        stage: {"version": 1, "inputs": inputs, "outputs": {"x": f"build/{name}"}, "settings": settings[stage]}
        for stage in STAGES
    }
    write_json(root / f"build/.resolved/{name}.json", sections)
    for kind, path in (("model", MODEL), ("data", data)):
        pins = {"settings": {"files": [{"path": "file", "size": 1, "sha256": "0" * 64}]}}
        write_json(root / "build/.resolved" / f"{path.removeprefix('build/')}.json", {kind: pins})
    (root / "recipes").mkdir(exist_ok=True)
    (root / f"recipes/{name}.yaml").write_text(f"description: {name}\n")

    made = root / "made" / name
    rows = {"in": 100, "out": 100 - dropped, "train": 90 - dropped, "held_out": 10}
    write_json(made / "prepare.json", {"rows": rows, "dropped": {"duplicate": dropped, "empty": 0}})
    write_json(
        made / "train.json", {"loss": 0.7 - right / 100, "rewards": {"margins": 1.5}, "machine": {"torch": "2.13"}}
    )
    write_json(made / "merge.json", {"kl": 0.001, "bytes": 269060552})
    metrics = {
        task: measured(made / "evaluate", key, "exact_match", right if task == "concise" else 20, seed=3)
        for task, key in keys.items()
    }
    write_json(made / "evaluate.json", metrics)
    passed = right / N >= 0.6
    rule = {
        "metric": "evaluate.concise.exact_match",
        "rule": "min",
        "bound": 0.6,
        "against": None,
        "passed": passed,
        "says": ".",
    }
    write_json(made / "gate.json", {"recipe": name, "passed": passed, "rules": [rule]})
    outputs = {stage: ("metrics" if stage != "gate" else "outs", [f"{stage}.json"]) for stage in STAGES}
    lines = ["stages:"]
    for stage, (kind, files) in outputs.items():
        copied = [f"made/{name}/{file}" for file in (*files, *(["evaluate"] if stage == "evaluate" else []))]
        lines += [
            f"  {stage}:",
            "    wdir: ../..",
            f"    cmd: mkdir -p build/{name} && cp -r {' '.join(copied)} build/{name}/",
            f"    deps: [{', '.join(copied)}]",
            f"    params: [{{build/.resolved/{name}.json: [{stage}]}}]",
            f"    {kind}: [{', '.join(f'build/{name}/{file}' for file in files)}]",
        ]
        if stage == "evaluate":
            lines.append(f"    outs: [build/{name}/evaluate]")
    pipeline = root / f"pipelines/{name}/dvc.yaml"
    pipeline.parent.mkdir(parents=True, exist_ok=True)
    pipeline.write_text("\n".join(lines) + "\n")


def build(root: Path) -> None:
    dvc(root, "repro", "-q", "-P")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: the second trains x better, drops rows of it, and adds z. y asks its tasks otherwise than x."""
    root = tmp_path_factory.mktemp("history") / "project"
    root.mkdir()
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "remote", "add", "-q", "-d", "store", str(root.parent / "store"))
    (root / ".gitignore").write_text("/build/*\n!/build/.resolved\n")
    (root / "params.yaml").write_text("seed: 42\n")
    write_recipe(root, "x", right=18)
    write_recipe(
        root, "y", right=19, keys={"concise": KEYS["concise"], "sense": "cccccccccccc"}, data="build/data/more-1b1b1b"
    )
    build(root)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    git(root, "tag", "v1")
    write_recipe(root, "x", right=33, learning_rate=1e-4, dropped=5)
    write_recipe(root, "z", right=33)
    build(root)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "second")
    return root


@pytest.fixture
def project(history: Path, tmp_path: Path) -> Path:
    return shutil.copytree(history, tmp_path / "project", symlinks=True)


def compare(root: Path, a: str, b: str | None, name: str | None = None) -> dict[str, Any]:
    """The one recipe, or pair of recipes, that is compared."""
    (recipe,) = diff.diff_json(root, a, b, name)["recipes"]
    return recipe


def row(recipe: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    (found,) = [row for row in recipe[part] if row["name"] == name]
    return {key: value for key, value in found.items() if key != "name"}


# ---- revisions


def test_two_revisions_of_a_recipe(project: Path) -> None:
    recipe = compare(project, "v1", "HEAD", "x")
    assert (recipe["name"], recipe["a"], recipe["b"]) == ("x", "v1", "HEAD")
    assert recipe["settings"] == [{"name": "train.learning_rate", "a": 5e-5, "b": 1e-4, "change": 5e-5}]
    assert row(recipe, "data", "rows.train") == {"a": 90, "b": 85, "change": -5}
    assert row(recipe, "data", "dropped.duplicate") == {"a": 0, "b": 5, "change": 5}
    assert row(recipe, "metrics", "train.loss")["change"] == pytest.approx(-0.15)
    assert recipe["gates"] == {
        "a": False,
        "b": True,
        "rules": [{"name": "evaluate.concise.exact_match min 0.6", "a": False, "b": True}],
    }
    assert recipe["notes"] == []


def test_a_change_of_a_measured_metric_is_held_against_noise(project: Path) -> None:
    recipe = compare(project, "v1", "HEAD", "x")
    found = row(recipe, "metrics", "evaluate.concise.exact_match")
    # 15 documents right that were wrong, none the other way: McNemar's exact test gives 2 / 2^15.
    assert found["p_value"] == pytest.approx(2 / 2**15)
    assert found["change"] == pytest.approx(15 / N)
    assert (found["n"], found["says"], found["comparable"]) == (N, "p < 0.001", True)
    assert row(recipe, "metrics", "evaluate.sense.exact_match")["says"] == "equal"
    assert row(recipe, "metrics", "evaluate.concise.corpus_score")["says"] == "not tested: it is no mean of samples"


def test_the_files_as_they_are_are_the_default(project: Path) -> None:
    write_recipe(project, "x", right=34, learning_rate=2e-4, dropped=5)
    build(project)
    recipe = compare(project, "HEAD", None, "x")
    assert recipe["b"] == "working tree"
    assert row(recipe, "settings", "train.learning_rate")["b"] == 2e-4
    found = row(recipe, "metrics", "evaluate.concise.exact_match")
    assert found["change"] == pytest.approx(1 / N)
    assert found["says"] == "within noise (p = 1)"
    assert recipe["notes"] == []


def test_a_recipe_and_a_revision_compare_it_with_itself(project: Path) -> None:
    assert compare(project, "v1", "x") == compare(project, "v1", None, "x")
    assert (compare(project, "x", "v1")["a"], compare(project, "x", "v1")["b"]) == ("working tree", "v1")


def test_all_recipes_by_default_and_those_of_one_side_are_said(project: Path) -> None:
    recipes = {recipe["name"]: recipe for recipe in diff.diff_json(project, "v1", "HEAD", None)["recipes"]}
    assert set(recipes) == {"x", "y", "z"}
    assert recipes["z"] == {"name": "z", "a": "v1", "b": "HEAD", "only_in": "b"}
    text = diff.diff(project, "v1", "HEAD", None)
    assert "z: v1 -> HEAD\n  only in HEAD" in text
    assert "y: v1 -> HEAD\n  no difference" in text


def test_results_older_than_the_settings_are_noted(project: Path) -> None:
    path = project / "build/.resolved/x.json"
    sections = json.loads(path.read_text())
    sections["train"]["settings"]["train"]["lora"]["r"] = 16
    write_json(path, sections)
    recipe = compare(project, "HEAD", None, "x")
    assert row(recipe, "settings", "train.lora.r") == {"a": 8, "b": 16, "change": 8}
    assert recipe["notes"] == ["x in working tree: train changed since these results; run `dvc repro`"]


def test_a_pin_that_changed_is_a_setting(project: Path) -> None:
    path = project / f"build/.resolved/{DATA.removeprefix('build/')}.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    found = row(compare(project, "HEAD", None, "x"), "settings", "rows-0a0a0a[file].sha256")
    assert found == {"a": "0" * 64, "b": "1" * 64}


# ---- recipes


def test_two_recipes_of_the_working_tree(project: Path) -> None:
    recipe = compare(project, "x", "y")
    assert (recipe["name"], recipe["a"], recipe["b"]) == ("x and y", "x", "y")
    assert row(recipe, "settings", "data.sources") == {"a": ["rows-0a0a0a"], "b": ["more-1b1b1b"]}
    assert row(recipe, "settings", "evaluate.tasks[sense].limit") == {"a": None, "b": 20}
    assert not [r for r in recipe["settings"] if "build/" in json.dumps(r) or "key" in r["name"]]
    assert row(recipe, "metrics", "evaluate.concise.exact_match")["change"] == pytest.approx(-14 / N)


def test_what_was_measured_otherwise_is_not_compared(project: Path) -> None:
    found = row(compare(project, "x", "y"), "metrics", "evaluate.sense.exact_match")
    assert found == {"a": 0.5, "b": 0.5, "comparable": False, "says": "not comparable: measured with other settings"}


def test_other_documents_are_not_compared(project: Path) -> None:
    path = project / f"build/x/evaluate/{KEYS['concise']}.jsonl"
    path.write_text(path.read_text().replace('"h7"', '"other"'))
    found = row(compare(project, "HEAD", None, "x"), "metrics", "evaluate.concise.exact_match")
    assert found["says"] == "equal"
    write_json(project / "build/x/evaluate.json", {"concise": {"exact_match": 0.5, "n": N}})
    found = row(compare(project, "HEAD", None, "x"), "metrics", "evaluate.concise.exact_match")
    assert found["comparable"] is False
    assert "are not of the same documents: 1 only in the first, 1 only in the second" in found["says"]
    assert "/tmp" not in found["says"]


def test_a_recipe_name_wins_over_a_revision(project: Path) -> None:
    git(project, "tag", "y", "v1")
    assert compare(project, "x", "y")["name"] == "x and y"


# ---- what is not there


def test_a_result_that_the_cache_lacks_is_named(project: Path) -> None:
    shutil.rmtree(project / ".dvc/cache")
    recipe = compare(project, "v1", "HEAD", "x")
    assert row(recipe, "settings", "train.learning_rate")["b"] == 1e-4
    files = [f"build/x/{stage}.json" for stage in STAGES]
    of = f"not in DVC's cache here: {', '.join(files)} of"
    fetch = f"run `dvc fetch --all-commits {' '.join(files)}`"
    assert recipe["notes"] == [f"{of} v1; {fetch}", f"{of} HEAD; {fetch}"]
    assert recipe["metrics"] == [] and "a" not in recipe["gates"]


def test_samples_that_the_cache_lacks_leave_the_change_untested(project: Path) -> None:
    for path in (project / ".dvc/cache").rglob("*.dir"):
        path.unlink()
    recipe = compare(project, "v1", "HEAD", "x")
    found = row(recipe, "metrics", "evaluate.concise.exact_match")
    assert (found["a"], found["b"], found["says"]) == (0.45, 0.825, "not tested: samples are missing")
    files = ", ".join(f"build/x/evaluate/{key}.jsonl" for key in KEYS.values())
    fetch = "run `dvc fetch --all-commits build/x/evaluate`"
    assert recipe["notes"][0] == f"not in DVC's cache here: {files} of v1; {fetch}"


def test_nothing_is_fetched(project: Path) -> None:
    dvc(project, "push", "-q", "--all-commits")
    shutil.rmtree(project / ".dvc/cache")
    assert "not in DVC's cache here" in compare(project, "v1", None, "x")["notes"][0]
    dvc(project, "fetch", "-q", "--all-commits")
    assert compare(project, "v1", None, "x")["notes"] == []


def test_a_project_in_a_folder_of_a_git_repository(project: Path) -> None:
    above = project.parent
    for folder in (".git", ".dvc/tmp"):
        shutil.rmtree(project / folder)
    git(above, "init", "-q")
    (project / ".dvc/config").unlink()
    dvc(project, "init", "-q", "-f", "--subdir")
    dvc(project, "remote", "add", "-q", "-d", "store", str(above / "store"))
    build(project)
    git(above, "add", "-A")
    git(above, "commit", "-qm", "first")
    recipe = compare(project, "HEAD", None, "x")
    assert recipe["notes"] == []
    assert row(recipe, "metrics", "evaluate.concise.exact_match")["says"] == "equal"
    dvc(project, "push", "-q")
    shutil.rmtree(project / ".dvc/cache")
    assert "not in DVC's cache here" in compare(project, "HEAD", None, "x")["notes"][0]


def test_a_recipe_that_is_not_built_is_noted(project: Path) -> None:
    shutil.rmtree(project / "build/x")
    recipe = compare(project, "HEAD", None, "x")
    (note,) = recipe["notes"]
    assert note.startswith("not there: build/x/prepare.json, build/x/train.json, ")
    assert note.endswith("; `dvc repro` makes and `dvc checkout` restores them")
    assert recipe["data"] == []
    assert row(recipe, "metrics", "evaluate.concise.exact_match") == {"a": 0.825}


def test_a_recipe_committed_before_it_was_built_is_noted(project: Path) -> None:
    write_recipe(project, "w", right=20)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "w, not built")
    notes = compare(project, "HEAD", None, "w")["notes"]
    files = ", ".join(f"build/w/{stage}.json" for stage in STAGES)
    assert notes[0] == f"not built in HEAD: {files}"


@pytest.mark.parametrize(
    ("a", "b", "name", "message"),
    [
        ("HAED", None, None, "HAED: is neither a recipe nor a git revision; did you mean HEAD?"),
        ("v1", "--help", None, "--help: is neither a recipe nor a git revision; there are: x, y, z, HEAD"),
        ("v1", None, "xx", "xx: no such recipe in v1 or working tree; did you mean x?"),
        ("x", None, None, "x is a recipe: name another one to compare it with, or a revision, as in `prefbuild"),
        ("x", "y", "z", "--recipe z goes with revisions; x and y are recipes"),
        ("v1", "x", "y", "--recipe y is not x; name one of them"),
    ],
)  # fmt: skip
def test_mistakes_are_told(project: Path, a: str, b: str | None, name: str | None, message: str) -> None:
    with pytest.raises(UsageError) as error:
        diff.diff(project, a, b, name)
    assert str(error.value).startswith(message)


def test_a_broken_result_is_named(project: Path) -> None:
    (project / "build/x/train.json").write_text("{")
    with pytest.raises(StageError, match=r"build/x/train\.json of working tree: is not JSON"):
        diff.diff(project, "HEAD", None, "x")


# ---- text


def test_the_text_is_aligned_and_plain(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = diff.diff(project, "v1", "HEAD", "x")
    assert text.splitlines()[0] == "x: v1 -> HEAD"
    assert "  train.learning_rate  5e-05 -> 0.0001" in text.splitlines()
    assert "\033" not in text
    lines = text.splitlines()
    metrics = lines[lines.index("metrics") + 1 : lines.index("gates")]
    assert len({line.index(" -> ") for line in metrics}) == 1
    (line,) = [line for line in metrics if "concise.exact_match" in line]
    assert line.split() == [
        "evaluate.concise.exact_match",
        "0.45",
        "->",
        "0.825",
        "+0.375",
        "±",
        "0.078",
        "p",
        "<",
        "0.001",
    ]
    assert lines[lines.index("gates") + 1].split() == ["all", "rules", "FAIL", "->", "PASS"]


def test_colours_are_asked_for(project: Path) -> None:
    comparison = diff.diff_json(project, "v1", "HEAD", "x")
    assert "\033[31mFAIL\033[0m -> \033[32mPASS\033[0m" in diff.render(comparison, colour=True)


def test_names_from_files_print_no_control_characters(project: Path) -> None:
    write_json(project / "build/x/evaluate.json", {"a\033[2Jb": {"exact_match": 0.5, "n": 1}})
    assert "\033" not in diff.diff(project, "HEAD", None, "x")


def test_the_command_prints_both_forms(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project / "recipes")
    assert cli.main(["diff", "v1", "HEAD", "--recipe", "x"]) == 0
    assert capsys.readouterr().out.startswith("x: v1 -> HEAD\n")
    monkeypatch.chdir(project)
    assert cli.main(["diff", "v1", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"][0]["name"] == "x"
