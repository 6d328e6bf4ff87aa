"""Promotion: nothing but what passed its gates gets out, once, and whole."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import prefbuild
from prefbuild import promote as promotion
from prefbuild.artifact import canonical_json, sha256_file, write_json
from prefbuild.errors import PrefbuildError, PromotionRefused, UsageError
from prefbuild.promote import promote, signing, version
from prefbuild.promote.provenance import facts_of
from prefbuild.promote.publishable import check_publishable, find_secret
from tests import built
from tests.built import BASELINE, FILES, KEYS, edit, edit_lines, git, lock, seal, write

CONCISE = KEYS["concise"]
REPOSITORY = Path(prefbuild.__file__).parent.parent


def refused(root: Path, **options: bool) -> str:
    """The refusal's text; and nothing is public."""
    with pytest.raises(PromotionRefused) as error:
        promote(root, "x", **options)
    assert not published(root)
    assert not (root / "promotions.jsonl").exists()
    return str(error.value)


def published(root: Path) -> list[str]:
    """Whatever lies in the registry's folder of x, temporary folders too."""
    folder = root / "registry/x"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def records(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "promotions.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, tuple]:
    """Bytes and times of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted([folder, *folder.rglob("*")])
    }


def rejudge(root: Path) -> None:
    """What a forger does last: a new verdict, new dvc.lock."""
    built.judge(root)
    lock(root)


# ---- what is published


def test_what_was_judged_is_published(root):
    record = promote(root, "x")
    folder = root / "registry/x/v1"
    assert (record["to"], record["place"], record["version"]) == ("directory", "registry", "v1")
    assert (record["already"], record["recorded"], record["dirty"]) == (False, True, [])
    assert record["artifact"] == built.digest(root, "build/x/merged")
    assert record["adapter"] == built.digest(root, "build/x/adapter")
    for role, place in (("merged", folder), ("adapter", folder / "adapter")):
        for path in (root / "build/x" / role).iterdir():
            assert path.name == "manifest.json" or (place / path.name).read_bytes() == path.read_bytes()
    records = folder / "prefbuild"
    assert (records / "gate.json").read_bytes() == (root / "build/x/gate.json").read_bytes()
    assert (records / "recipe.yaml").read_bytes() == (root / "recipes/x.yaml").read_bytes()
    assert (records / "resolved.json").read_bytes() == (root / "build/.resolved/x.json").read_bytes()
    metrics = json.loads((records / "metrics.json").read_text())
    assert metrics["evaluate"]["concise"]["exact_match"] == 0.75
    assert metrics["baseline"]["concise"]["exact_match"] == 0.45
    assert metrics["prepare"]["rows"]["in"] == 12
    assert published(root) == ["v1"]


def statement(folder: Path) -> dict:
    return signing.read_statement((folder / version.STATEMENT).read_bytes(), "it")[0]


def test_the_statement_is_about_every_file(root):
    promote(root, "x")
    folder = root / "registry/x/v1"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {path: digests["sha256"] for path, digests in version.subjects(statement(folder)).items()} == {
        path: sha256_file(file) for path, file in files.items() if path != version.STATEMENT
    }
    assert "README.md" in files and "prefbuild/bom.json" in files and "model.sig" not in files


def test_the_record_names_build_artifact_and_commit(root):
    record = promote(root, "x")
    (line,) = records(root)
    assert line == {key: value for key, value in record.items() if key not in ("already", "recorded")}
    assert line["provenance"] == sha256_file(root / "registry/x/v1" / version.STATEMENT)
    assert line["git_commit"] == git(root, "rev-parse", "HEAD").strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["time"])


@pytest.mark.parametrize(("adapter", "merged"), [(True, False), (False, True)])
def test_only_what_the_recipe_says_is_published(root, adapter, merged):
    where = {"to": "directory", "path": "models", "adapter": adapter, "merged": merged}
    built.write_recipe(root, "x", gates=built.GATES, promote=where)
    built.resolve_all(root)
    lock(root)
    git(root, "commit", "-qam", "publish less")
    promote(root, "x")
    folder = root / "models/x/v1"
    assert (folder / "adapter_model.safetensors").exists() == adapter
    assert (folder / "model.safetensors").exists() == merged
    assert not (folder / "adapter").exists()


# ---- the same build, another build


def test_the_same_build_twice_changes_nothing(root):
    first = promote(root, "x")
    before = snapshot(root / "registry")
    second = promote(root, "x")
    assert snapshot(root / "registry") == before
    assert second == {**first, "already": True, "recorded": False}


def test_another_build_is_the_next_version(root):
    promote(root, "x")
    edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=0.4))
    rejudge(root)
    assert promote(root, "x")["version"] == "v2"
    assert published(root) == ["v1", "v2"]
    assert [line["version"] for line in records(root)] == ["v1", "v2"]


def test_a_removed_versions_number_is_not_given_again(root):
    promote(root, "x")
    shutil.rmtree(root / "registry/x/v1")
    assert promote(root, "x")["version"] == "v2"


def test_versions_count_beyond_nine(root):
    for number in (1, 2, 10):
        edit(root / "build/x/train.json", lambda metrics, loss=0.4 + number / 100: metrics.update(loss=loss))
        rejudge(root)
        promote(root, "x")
    os.rename(root / "registry/x/v3", root / "registry/x/v10")
    edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=0.3))
    rejudge(root)
    assert promote(root, "x")["version"] == "v11"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "README.md", "prefbuild/gate.json", "adapter/adapter_config.json"]
)
def test_a_published_file_that_changed_since_is_named(root, file):
    promote(root, "x")
    flip(root / "registry/x/v1" / file)
    with pytest.raises(PromotionRefused, match=rf"registry/x/v1: is not what was published:\n  {file}: sha256 is "):
        promote(root, "x")


# ---- killed at any point


def in_process(root: Path, code: str = "") -> subprocess.Popen:
    """`promote(root, "x")` in a Python of its own, after some code; prints the returned record."""
    script = f"""
import json, os
from pathlib import Path
from prefbuild.promote import directory, promote, record
{code}
print(json.dumps(promote(Path({str(root)!r}), "x")))
"""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)


def test_killed_between_rename_and_record(root):
    process = in_process(root, "record.append = lambda *_: os._exit(137)")
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert published(root) == ["v1"]
    assert not (root / "promotions.jsonl").exists()
    before = snapshot(root / "registry/x")
    record = promote(root, "x")
    assert (record["already"], record["recorded"], record["version"]) == (True, True, "v1")
    assert snapshot(root / "registry/x") == before
    assert len(records(root)) == 1
    promote(root, "x")
    assert len(records(root)) == 1


def test_killed_while_it_wrote_the_version(root):
    process = in_process(root, "directory._sync = lambda *_: os._exit(137)")
    process.communicate(timeout=60)
    assert process.returncode == 137
    (left,) = published(root)
    assert left.startswith(".tmp-")
    assert promote(root, "x")["version"] == "v1"
    assert published(root) == ["v1"]


def test_killed_while_it_wrote_the_record(root):
    promote(root, "x")
    path = root / "promotions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=0.4))
    rejudge(root)
    assert promote(root, "x")["version"] == "v2"
    assert path.read_bytes().startswith(whole)
    assert [line["version"] for line in records(root)] == ["v1", "v2"]


def test_two_at_once_make_one_version(root):
    processes = [in_process(root) for _ in range(3)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert {result["version"] for result in results} == {"v1"}
    assert sorted(result["already"] for result in results) == [False, True, True]
    assert sorted(result["recorded"] for result in results) == [False, False, True]
    assert published(root) == ["v1"]
    assert len(records(root)) == 1


# ---- a file that differs is named


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_list_of_files_is_whole(root):
    shared = {"build/x/lengths.csv", "build/.resolved/report.json"}
    found = {path.relative_to(root).as_posix() for path in (root / "build").rglob("*") if path.is_file()}
    drawn = "build/x/live/"  # pictures alone are made of it
    found = {
        path for path in found if not path.startswith(("build/.resolved/baselines", "build/.resolved/data", drawn))
    }
    assert found - shared - {"build/.resolved/y.json"} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_refused_and_named(root, file):
    flip(root / file)
    says = refused(root)
    assert says.startswith(f"{file}: ") or (file.endswith("manifest.json") and says.startswith(file)), says
    assert str(root) not in says


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused_and_named(root, file):
    (root / file).unlink()
    assert refused(root).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "folder", ["build/x/merged", "build/x/adapter", "build/x/evaluate", "build/x/prepared", BASELINE]
)
def test_a_file_too_many_is_refused_and_named(root, folder):
    write(root / folder / "more.json", "{}")
    assert refused(root).startswith(f"{folder}/more.json: is on disk but not in the manifest")


def test_a_link_in_place_of_a_file_is_refused_and_named(root):
    path = root / "build/x/merged/model.safetensors"
    shutil.move(path, root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    assert refused(root).startswith("build/x/merged/model.safetensors: an artifact holds plain files and folders only")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("build/x/merged/model.safetensors", r"registry/x/\.tmp-\w+/x-v1: its merged is sha256:\w+, the gate judged "),
        (
            "build/x/adapter/adapter_model.safetensors",
            r"registry/x/\.tmp-\w+/x-v1: its adapter is sha256:\w+, the gate ",
        ),
        ("build/x/train.json", r"build/x/train\.json: changed while it was being promoted"),
    ],
)
def test_a_file_that_changes_after_it_was_verified_is_refused(root, monkeypatch, file, says):
    write_version = promotion.write_version

    def change_first(*arguments: object, **keywords: object) -> object:
        flip(root / file)
        return write_version(*arguments, **keywords)

    monkeypatch.setattr(promotion, "write_version", change_first)
    assert re.search(says, refused(root))


# ---- forged, in growing numbers of files


def pass_at(root: Path, value: float) -> None:
    """The recipe asks more than the model has."""
    built.write_recipe(root, "x", gates=[{"metric": "evaluate.concise.exact_match", "min": value}])
    built.resolve_all(root)
    rejudge(root)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "ask more")


def forge_gate(root: Path) -> None:
    """A verdict that passes, with dvc.lock to it, as `dvc commit -f` would write it."""

    def passed(gate: dict) -> None:
        gate["passed"] = True
        gate["rules"] = [
            {**rule, "passed": True, "value": 0.99, "says": "fine"}
            for rule in gate["rules"]
            if rule["metric"] != "artifact"
        ]

    built.judge(root)
    edit(root / "build/x/gate.json", passed)
    lock(root)


def test_a_failed_verdict_is_refused_with_its_reasons(root):
    pass_at(root, 0.9)
    assert refused(root) == (
        "build/x/gate.json: x failed its gates:\n  evaluate.concise.exact_match is 0.75, below the min of 0.9"
    )


def test_a_forged_verdict_is_refused(root):
    pass_at(root, 0.9)
    forge_gate(root)
    assert refused(root) == (
        "build/x/gate.json: differs from the verdict on the files as they are now: "
        "evaluate.concise.exact_match is 0.75, below the min of 0.9"
    )


def test_a_forged_verdict_with_forged_metrics_is_refused(root):
    pass_at(root, 0.9)
    edit(root / "build/x/evaluate.json", lambda scores: scores["concise"].update(exact_match=0.99))
    forge_gate(root)
    assert refused(root) == (
        "build/x/gate.json: differs from the verdict on the files as they are now: "
        f"build/x/evaluate.json: concise is not what build/x/evaluate/{CONCISE}.json measured"
    )


def test_metrics_forged_down_to_the_record_are_refused_by_the_samples(root):
    pass_at(root, 0.9)
    edit(root / "build/x/evaluate.json", lambda scores: scores["concise"].update(exact_match=0.99))
    edit(root / f"build/x/evaluate/{CONCISE}.json", lambda record: record["metrics"].update(exact_match=0.99))
    seal(root, "build/x/evaluate")
    forge_gate(root)
    assert refused(root) == (
        "build/x/gate.json: differs from the verdict on the files as they are now: evaluate.concise.exact_match is 0.99 "
        f"by build/x/evaluate/{CONCISE}.json, but the mean of its 40 samples is 0.75"
    )


def test_a_verdict_rewritten_without_a_new_run_is_refused_by_dvcs_record(root):
    edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=0.1))
    built.judge(root)
    assert re.fullmatch(
        r"build/x/gate\.json: md5 is \w{32}, pipelines/x/dvc\.lock records \w{32}; run `dvc repro`", refused(root)
    )


def test_a_better_models_weights_under_this_ones_verdict_are_refused(root):
    built.weights(root / "build/x/merged/model.safetensors", seed=9)
    seal(root, "build/x/merged")
    assert refused(root).startswith("build/x/merged/manifest.json: is sha256:")


def test_another_recipes_verdict_is_refused(root):
    edit(root / "build/x/gate.json", lambda gate: gate.update(recipe="y"))
    lock(root)
    assert refused(root) == "build/x/gate.json: is not the verdict on x; run `dvc repro`"


@pytest.mark.parametrize("passed", [1, "true", None, [True]])
def test_only_true_is_passed(root, passed):
    edit(root / "build/x/gate.json", lambda gate: gate.update(passed=passed))
    lock(root)
    assert refused(root).startswith("build/x/gate.json: x failed its gates")


def test_gates_loosened_in_the_resolved_recipe_are_refused(root):
    pass_at(root, 0.9)
    edit(root / "build/.resolved/x.json", lambda sections: sections["gate"]["settings"]["gates"][0].update(min=0.1))
    rejudge(root)
    git(root, "commit", "-qam", "looks built")
    assert refused(root) == "build/.resolved/x.json: is not what recipes/x.yaml asks for now; run `dvc repro`"


def test_a_recipe_changed_since_the_build_is_refused(root):
    built.write_recipe(root, "x", gates=built.GATES, seed=43)
    git(root, "commit", "-qam", "another seed")
    assert refused(root) == "build/.resolved/x.json: is not what recipes/x.yaml asks for now; run `dvc repro`"


def test_a_recipe_resolved_but_not_built_is_refused(root):
    built.write_recipe(root, "x", gates=built.GATES, train={**built.RECIPE["train"], "beta": 0.5})
    built.resolve_all(root)
    git(root, "commit", "-qam", "another beta")
    assert (
        refused(root) == "build/.resolved/x.json: train is not what pipelines/x/dvc.lock says was run; run `dvc repro`"
    )


@pytest.mark.parametrize("drawn", ["build/x/lengths.csv", "build/x/live/plots/metrics/train/loss.tsv"])
def test_numbers_that_are_only_drawn_must_be_those_of_the_run(root, drawn):
    flip(root / drawn)
    assert re.fullmatch(
        rf"{drawn.removesuffix('/train/loss.tsv')}: md5 is .*, pipelines/x/dvc.lock records .*", refused(root)
    )


@pytest.mark.parametrize("stage", ["prepare", "train", "merge", "evaluate", "gate"])
def test_what_dvc_did_not_record_is_refused(root, stage):
    edit(root / "pipelines/x/dvc.lock", lambda recorded: recorded["stages"].pop(stage))
    assert refused(root) == (
        f"build/x/{stage}.json: pipelines/x/dvc.lock does not record it, so nothing shows it was built; run `dvc repro`"
    )


@pytest.mark.parametrize("text", ["", "stages: [", "[]", "schema: '2.0'\n"])
def test_a_broken_dvc_lock_is_refused(root, text):
    write(root / "pipelines/x/dvc.lock", text)
    assert refused(root).startswith("pipelines/x/dvc.lock: is no DVC lock")


def test_dvcs_own_lock_is_understood(root):
    """dvc.lock as DVC itself writes it, from the DVC files of `prefbuild sync`."""
    command = [sys.executable, "-m", "dvc"]
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    (root / "pipelines/x/dvc.lock").unlink()
    write(root / "build/x/live/plots/metrics/loss.tsv", "step\tloss\n")
    write(root / "build/x/live/metrics.json", "{}")
    for path in built.resolved(root)["prepare"]["inputs"]["data"]:
        write(root / path / "train.jsonl", "{}\n")
    subprocess.run([*command, "init", "-q"], cwd=root, check=True, env=env)
    subprocess.run([*command, "commit", "-q", "-f", "pipelines/x/dvc.yaml"], cwd=root, check=True, env=env)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "built")
    assert "md5: " in (root / "pipelines/x/dvc.lock").read_text()
    assert promote(root, "x")["version"] == "v1"


# ---- committed sources


def uncommitted(root: Path, path: str) -> None:
    """Change a source in a way that does not change what is built."""
    with open(root / path, "a") as file:
        file.write("# a comment\n")


@pytest.mark.parametrize(
    "path",
    [
        "recipes/x.yaml",
        "recipes/y.yaml",
        "recipes/tasks/concise.yaml",
        "params.yaml",
        "prefbuild.lock.yaml",
        "dvc.yaml",
        "pipelines/x/dvc.yaml",
    ],
)
def test_an_uncommitted_source_is_refused_and_named(root, path):
    uncommitted(root, path)
    assert refused(root) == (
        f"x: not built from committed sources: {path}; commit and run `dvc repro`, or promote with --allow-dirty"
    )
    git(root, "add", path)  # staged is not committed
    assert path in refused(root)
    git(root, "commit", "-qm", "comment")
    assert promote(root, "x")["dirty"] == []


def test_a_source_git_does_not_know_is_refused(root):
    write(root / "recipes/tasks/new file.py", "1\n")
    assert "committed sources: recipes/tasks/new file.py;" in refused(root)


def test_a_recipe_git_ignores_is_refused(root):
    git(root, "rm", "-q", "--cached", "recipes/x.yaml")
    write(root / ".gitignore", "/build/*\n!/build/.resolved\n/registry\n/recipes/x.yaml\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "hide")
    assert "committed sources: recipes/x.yaml;" in refused(root)


def test_other_files_need_not_be_committed(root):
    write(root / "notes.md", "later\n")
    assert promote(root, "x")["dirty"] == []


def test_dirty_can_be_allowed_and_is_recorded(root, capsys):
    uncommitted(root, "recipes/x.yaml")
    write(root / "recipes/extra.txt", "x")
    record = promote(root, "x", allow_dirty=True)
    assert record["dirty"] == ["recipes/extra.txt", "recipes/x.yaml"]
    assert records(root)[0]["dirty"] == record["dirty"]
    assert facts_of(statement(root / "registry/x/v1"))["dirty"] == record["dirty"]
    commit = git(root, "rev-parse", "HEAD").strip()
    assert capsys.readouterr().err == (
        f"promoting all the same; nobody can rebuild this from git commit {commit}, which these are not in:\n"
        "  recipes/extra.txt\n  recipes/x.yaml\n"
        "prefbuild: publishing unsigned: there is no key; `prefbuild keygen` makes one\n"
    )
    assert "- recipes/extra.txt" in (root / "registry/x/v1/README.md").read_text()


def test_no_repository_and_no_commit_are_refused(root):
    shutil.rmtree(root / ".git")
    assert "not built from committed sources: (fatal: not a git repository" in refused(root)
    git(root, "init", "-q")
    assert "not built from committed sources: (the repository has no commits);" in refused(root)
    record = promote(root, "x", allow_dirty=True)
    assert record["git_commit"] is None
    assert record["dirty"] == ["(the repository has no commits)"]


def test_a_project_inside_a_larger_repository(root, tmp_path):
    shutil.rmtree(root / ".git")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    uncommitted(root, "params.yaml")
    write(tmp_path / "recipes/other.yaml", "not this project's\n")
    assert "committed sources: params.yaml;" in refused(root)
    git(tmp_path, "commit", "-qam", "params")
    assert promote(root, "x")["dirty"] == []


def test_prefbuild_itself_must_be_committed_where_it_is_in_the_repository(root):
    shutil.copytree(REPOSITORY / "prefbuild", root / "prefbuild", ignore=shutil.ignore_patterns("__pycache__"))
    write(root / ".gitignore", (root / ".gitignore").read_text() + "__pycache__/\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "prefbuild too")
    script = "from pathlib import Path; from prefbuild.promote import promote; promote(Path(), 'x')"
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": str(root)}
    uncommitted(root, "prefbuild/gates.py")
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert "x: not built from committed sources: prefbuild/gates.py;" in done.stderr
    git(root, "commit", "-qam", "comment")
    assert subprocess.run(command, cwd=root, env=env).returncode == 0


# ---- secrets, and files that are not published


def test_a_token_in_a_published_file_is_refused_and_not_shown(root):
    token = "hf_" + "aB3" * 12
    edit(root / "build/x/merged/config.json", lambda config: config.update(token=token))
    reseal_all(root)
    says = refused(root)
    assert says == "config.json: holds a Hugging Face token; take it out, and change it: it may have been seen"
    assert token not in says


def test_a_key_in_a_comment_of_the_recipe_is_refused(root):
    with open(root / "recipes/x.yaml", "a") as file:
        file.write("# AKIAIOSFODNN7EXAMPLE\n")
    git(root, "commit", "-qam", "oops")
    assert refused(root).startswith("prefbuild/recipe.yaml: holds an AWS access key;")


def test_an_environments_secret_is_refused_by_its_variables_name(root, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'pass"word\\0123456789')
    edit(root / "build/x/adapter/adapter_config.json", lambda config: config.update(note=os.environ["MY_API_KEY"]))
    reseal_all(root)
    assert refused(root).startswith(
        "adapter/adapter_config.json: holds the value of the environment variable MY_API_KEY;"
    )
    monkeypatch.delenv("MY_API_KEY")
    assert promote(root, "x")["version"] == "v1"


def reseal_all(root: Path) -> None:
    """Make the manifests, the evaluation and the verdict anew after a change of adapter or merged model."""
    seal(root, "build/x/adapter")
    edit(
        root / "build/x/merged/manifest.json",
        lambda manifest: manifest["inputs"].update(adapter=built.digest(root, "build/x/adapter")),
    )
    seal(root, "build/x/merged")
    merged = built.digest(root, "build/x/merged")
    write_json(
        root / "build/x/evaluate.json",
        built.evaluate(root, "build/x/evaluate", model=merged, who="x", stage="evaluate", name="x"),
    )
    rejudge(root)


@pytest.mark.parametrize(
    "file",
    [
        "pytorch_model.bin",
        "adapter.pt",
        "model.pkl",
        "training_args.bin",
        "optimizer.pt",
        "events.out",
        "code.py",
        "x.so",
    ],
)
def test_files_that_are_not_published_are_refused_and_named(root, file):
    write(root / f"build/x/merged/{file}", "x")
    reseal_all(root)
    assert refused(root).startswith(f"{file}: is ")


@pytest.mark.parametrize("file", ["optimizer.safetensors", "trainer_state.json", "rng_state_0.json", "scheduler.json"])
def test_state_of_training_is_refused_whatever_its_suffix(tmp_path, file):
    write(tmp_path / "merged" / file, "{}")
    with pytest.raises(PromotionRefused, match=r"is state of a training run, which is not published"):
        check_publishable(tmp_path)


@pytest.mark.parametrize("file", ["merges.txt", "tokenizer.model", "LICENSE", "schedulers.md"])
def test_files_of_a_checkpoint_may_be_published(tmp_path, file):
    write(tmp_path / file, "text of some kind")
    check_publishable(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "merges.txt", "LICENSE"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_by_another_name_is_refused(tmp_path, file, protocol):
    (tmp_path / file).write_bytes(pickle.dumps({"weights": [1.0] * 10}, protocol))
    with pytest.raises(PromotionRefused, match=rf"^{file}: is not what its name says"):
        check_publishable(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("token: hf_" + "a1" * 10, "a Hugging Face token"),
        ("ghp_" + "a" * 36, "a GitHub token"),
        ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "an AWS secret key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("-----BEGIN PRIVATE KEY-----", "a private key"),
        ("hf_short", None),
        ("hf_hub and shelf_aaaaaaa", None),
        ("a sha256: " + "0a" * 32, None),
    ],
)
def test_kinds_of_secrets(text, kind, monkeypatch):
    for variable in list(os.environ):
        if re.search("TOKEN|SECRET|PASSWORD|KEY", variable, re.IGNORECASE):
            monkeypatch.delenv(variable)
    assert find_secret(text.encode()) == kind


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("HF_TOKEN", "abcdefghijkl", True),
        ("db_password", "abcdefghijkl", True),
        ("HF_TOKEN", "abcdefghijk", False),  # 11 characters are found by chance
        ("EDITOR", "abcdefghijkl", False),
    ],
)
def test_values_of_secret_variables(monkeypatch, variable, value, found):
    monkeypatch.setenv(variable, value)
    assert (find_secret(f"x{value}y".encode()) is not None) == found


def test_a_secret_is_found_as_json_writes_it(monkeypatch):
    secret = 'pä"ss\\word0123'
    monkeypatch.setenv("DB_PASSWORD", secret)
    for text in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        assert find_secret(text.encode()) == "the value of the environment variable DB_PASSWORD"
    assert find_secret(b"password") is None


def test_a_secret_in_a_safetensors_header_is_found_and_tensors_are_not_read(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    tensor = numpy.frombuffer(b"hf_" + b"a" * 61, numpy.uint8)
    save_file({"w": tensor}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_publishable(tmp_path)
    save_file({"w": tensor}, tmp_path / "model.safetensors", metadata={"by": "hf_" + "b" * 30})
    with pytest.raises(PromotionRefused, match=r"^model\.safetensors: holds a Hugging Face token"):
        check_publishable(tmp_path)


# ---- asked for what is not there


def test_an_unknown_recipe(root):
    with pytest.raises(UsageError, match="there is no recipe"):
        promote(root, "z")


def test_a_recipe_that_says_not_where(root):
    recipe = {key: value for key, value in built.RECIPE.items() if key != "promote"}
    write(root / "recipes/x.yaml", canonical_json({**recipe, "gates": built.GATES}))
    assert refused(root) == "recipes/x.yaml: has no `promote:`, which says where to publish"


def test_a_recipe_that_was_not_built(root):
    with pytest.raises(PromotionRefused, match=r"build/y/gate\.json: is missing"):
        promote(root, "y")


def test_refusals_are_errors_with_their_exit_code(root):
    flip(root / "build/x/gate.json")
    with pytest.raises(PrefbuildError) as error:
        promote(root, "x")
    assert error.value.exit_code == 9


@pytest.mark.parametrize("change", [lambda rows: rows.pop(), lambda rows: rows[0]["metrics"].update(exact_match=0.5)])
def test_samples_changed_with_their_manifest_are_refused(root, change: Callable):
    edit_lines(root / f"build/x/evaluate/{CONCISE}.jsonl", change)
    seal(root, "build/x/evaluate")
    assert refused(root).startswith("build/x/evaluate/manifest.json: is sha256:")
