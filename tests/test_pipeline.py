"""The build with real DVC: what re-runs, what does not, and what happens when things die."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project import RECIPE, git, make_project, run

pytestmark = pytest.mark.timeout(600)
OF_A_RECIPE = {"prepare", "reference", "train", "merge", "evaluate", "gate"}


# On prompts, of which a step takes one.
GRPO = """
method: grpo
  rewards: [{reward: length, target: 9}]
  num_generations: 4
  max_completion_length: 8
"""


def repro(project: Path, *arguments: str, code: int | None = 0) -> set[str]:
    """Run plain `dvc repro`; returns the stages that ran: `resolve`, `report`, `train first`, `baseline`..."""
    output = run(project, "dvc", "repro", *arguments, code=code, timeout=400)
    return ran(output)


def ran(output: str) -> set[str]:
    stages = set()
    for command in re.findall(r"^> prefbuild (.*)$", output, re.M):
        words = command.split()
        if words[0] == "resolve" or words[1] == "report":
            stages.add(words[-1])
        else:
            stages.add(words[1] if words[1] in ("model", "data", "baseline") else f"{words[1]} {words[2]}")
    return stages


def edit(project: Path, name: str, old: str, new: str) -> None:
    path = project / f"recipes/{name}.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose one recipe is built and committed."""
    project = make_project(tmp_path_factory.mktemp("built") / "project", tiny_model)
    stages = repro(project)
    assert stages == {"resolve", "report", "model", "data", "baseline"} | {f"{s} first" for s in OF_A_RECIPE}
    git(project, "add", "-A")
    git(project, "commit", "-qm", "built")
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    """A copy of the built project, cache and all."""
    # DVC's cache holds hard links of the outputs; a plain copy keeps the bytes and loses the links, which is fine.
    shutil.copytree(built, tmp_path / "project")
    return tmp_path / "project"


def test_a_second_repro_runs_nothing(built: Path) -> None:
    assert repro(built) == set()


def test_two_processes_of_a_stage_leave_what_one_leaves(project: Path) -> None:
    """Trained in two on the CPU, the batch of 4 halved: the same files, a manifest, and one voice."""
    before = {
        path: (project / "build/first" / path).read_text() for path in ("adapter/adapter_config.json", "train.json")
    }
    said = run(project, "prefbuild", "stage", "train", "first", PREFBUILD_PROCESSES="2")
    assert said.count("prefbuild: train first: done in") == 1 and said.count("4/4") == 1
    assert (project / "build/first/adapter/adapter_config.json").read_text() == before["adapter/adapter_config.json"]
    manifest = json.loads((project / "build/first/adapter/manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    one, two = json.loads(before["train.json"]), json.loads((project / "build/first/train.json").read_text())
    assert two["machine"]["ranks"] == "2 (ddp)"
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert not list((project / "build/.work").glob("train-first/*"))
    assert "give how many processes" in run(
        project, "prefbuild", "stage", "train", "first", code=2, PREFBUILD_PROCESSES="two"
    )


def test_weights_are_stored_once(built: Path) -> None:
    merged = built / "build/first/merged/model.safetensors"
    copies = [path for path in (built / ".dvc/cache").rglob("*") if path.is_file() and digest(path) == digest(merged)]
    assert len(copies) == 1
    assert copies[0].samefile(merged)


def test_evaluate_alone_reruns_evaluate_baseline_gate_report(project: Path) -> None:
    edit(project, "first", "limit: 4", "limit: 5")
    assert repro(project) == {"resolve", "evaluate first", "baseline", "gate first", "report"}


def test_comments_and_written_out_defaults_rerun_resolve_alone(project: Path) -> None:
    written = "  # a comment\n  beta: 0.1\n  learning_rate: 0.001\n  report_to: [tensorboard]  # changes no result"
    edit(project, "first", "  learning_rate: 1.0e-3", written)
    assert repro(project) == {"resolve"}


def test_params_yaml_reaches_just_the_stages_it_touches(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("batch_size: 16", "batch_size: 4"))
    assert "train first" not in repro(project, "--dry")
    assert repro(project) - {"report"} == {"resolve", "evaluate first", "baseline", "gate first"} - {"gate first"}


def test_a_new_recipe_needs_sync_and_reruns_nothing_of_the_first(project: Path) -> None:
    (project / "recipes/another.yaml").write_text(RECIPE.replace("1.0e-3", "2.0e-3"))
    run(project, "prefbuild", "lock")
    output = run(project, "dvc", "repro", code=None)
    assert "the graph changed" in output
    assert "run `prefbuild sync`" in output
    run(project, "prefbuild", "sync")
    output = run(project, "dvc", "repro", timeout=400)
    # The base is shared, so are its baseline and what it says to the rows.
    assert ran(output) == {"resolve", "report"} | {f"{stage} another" for stage in OF_A_RECIPE}
    assert re.search(r"^reference: (\d+) rows, \1 kept from before$", output, re.M)


def test_recipes_on_each_others_models_build_in_a_chain_and_a_change_reruns_what_follows(project: Path) -> None:
    base = "source: file\n  path: models/tiny"
    child = RECIPE.replace(base, "source: recipe\n  recipe: first").replace("max_steps: 4", "max_steps: 2")
    (project / "recipes/child.yaml").write_text(child.replace("train:\n", "train:\n  report_to: [tensorboard]\n"))
    columns = "columns: {prompt: question, chosen: chosen, rejected: rejected}"
    last = child.replace("recipe: first", "recipe: child").replace("method: dpo", GRPO.strip())
    last = last.replace(
        f"{columns}\n  ignore: [kind]", "columns: {prompt: question}\n  ignore: [kind, chosen, rejected]"
    )
    last = last.replace("  max_length: 96\n", "").replace("train:\n", "train:\n  report_to: [trackio]\n")
    (project / "recipes/last.yaml").write_text(last)
    run(project, "prefbuild", "lock")
    run(project, "prefbuild", "sync")
    # Models alone, for the sake of time; benchmarks/chain.py builds and changes a whole chain.
    first_time = {f"{stage} {name}" for name in ("child", "last") for stage in ("prepare", "train", "merge")}
    first_time |= {"reference child"}  # which is DPO
    assert repro(project, "pipelines/last/dvc.yaml:merge") == {"resolve"} | first_time
    for name, before in (("child", "first"), ("last", "child")):
        config = json.loads((project / f"build/{name}/adapter/adapter_config.json").read_text())
        manifest = json.loads((project / f"build/{before}/merged/manifest.json").read_text())
        assert config["revision"] == manifest["digest"]
    # What tracked it is kept, is of the worker's own folder, and nothing that git or DVC sees.
    (events,) = (project / "build/.tracking").rglob("events.out.tfevents.*")
    assert events.parent.parent == project / "build/.tracking/child/tensorboard"
    assert list((project / "build/.tracking/last/trackio").glob("*.db"))  # though TRL imports trackio by itself
    assert ".tracking" not in git(project, "status", "--porcelain", "--untracked-files=all")

    edit(project, "child", "1.0e-3", "3.0e-3")
    changes = json.loads(run(project, "prefbuild", "status", "first", "child", "last", "--json"))
    states = {f"{change['stage']} {change['name']}": change["state"] for change in changes}
    after = {stage for stage in first_time if states.get(stage) in ("runs", "may run")}
    assert after == first_time - {"prepare child", "reference child"}  # which read no learning rate
    assert not any(name.endswith(" first") and state != "unchanged" for name, state in states.items()), states


def test_a_model_of_all_weights_that_holds_on_to_another_is_built_and_promoted(project: Path) -> None:
    full = RECIPE.replace("lora: {r: 4}", "use_peft: false\n  reference: {recipe: first}")
    (project / "recipes/full.yaml").write_text(full)
    run(project, "prefbuild", "lock")
    run(project, "prefbuild", "sync")
    assert repro(project) == {"resolve", "report"} | {f"{stage} full" for stage in OF_A_RECIPE}
    build = project / "build/full"
    assert not (build / "adapter").exists()
    verdict = json.loads((build / "gate.json").read_text())
    trained, merged = (json.loads((build / name / "manifest.json").read_text()) for name in ("trained", "merged"))
    reference = json.loads((project / "build/first/merged/manifest.json").read_text())["digest"]
    assert verdict["trained"] == trained["digest"] == merged["inputs"]["trained"] and "adapter" not in verdict
    assert trained["inputs"]["reference"] == verdict["judged"]["build/first/merged"] == reference
    page = (project / "build/report/index.html").read_text()
    assert "weights as trained <code>" in page and "against the weights as trained, on" in page

    git(project, "add", "-A")
    git(project, "commit", "-qm", "full")
    run(project, "prefbuild", "promote", "full")
    version = project / "registry/full/v1"
    assert [path.relative_to(version).as_posix() for path in version.rglob("*.safetensors")] == ["model.safetensors"]
    assert digest(version / "model.safetensors") == digest(build / "merged/model.safetensors")
    card = (version / "README.md").read_text()
    assert f"| weights as trained, before they were rounded | {verdict['trained']} |" in card
    assert f"| reference | recipe first's merged model, {reference} |" in card
    assert "| use_peft | false |" in card and "PeftModel" not in card
    envelope = json.loads((version / "prefbuild/provenance.intoto.jsonl").read_text())
    definition = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["buildDefinition"]
    found = {one["name"]: one["digest"] for one in definition["resolvedDependencies"]}
    assert found["reference model"] == {"sha256": reference.removeprefix("sha256:")}
    assert "rules passed, on exactly these weights\n" in run(project, "prefbuild", "verify", "registry/full/v1")
    assert json.loads((project / "promotions.jsonl").read_text())["trained"] == verdict["trained"]

    edit(project, "first", "1.0e-3", "2.0e-3")
    changes = json.loads(run(project, "prefbuild", "status", "full", "--json"))
    states = {(change["name"], change["stage"]): change["state"] for change in changes}
    assert states["first", "train"] == "runs" and states["full", "train"] == "may run"


def test_keep_going_builds_the_second_though_the_first_fails(project: Path) -> None:
    # A learning rate that makes the loss no number fails the training of `first` for real.
    edit(project, "first", "learning_rate: 1.0e-3", "learning_rate: 1.0e+30")
    (project / "recipes/second.yaml").write_text(RECIPE.replace("1.0e-3", "2.0e-3"))
    run(project, "prefbuild", "lock")
    run(project, "prefbuild", "sync")
    output = run(project, "dvc", "repro", "--keep-going", code=255, timeout=400)
    assert "prefbuild: train first: the loss became" in output
    assert {f"{stage} second" for stage in OF_A_RECIPE} <= ran(output)
    assert (project / "build/second/gate.json").exists()
    assert not (project / "build/first/adapter").exists()
    visible = git(project, "status", "--porcelain", "--untracked-files=all")
    assert "safetensors" not in visible
    assert "build/" not in visible.replace("build/.resolved/", "")


def test_a_second_clone_pulls_and_retrains_nothing(project: Path, tmp_path: Path) -> None:
    run(project, "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    git(project, "commit", "-qam", "remote")
    run(project, "dvc", "push", "--run-cache")
    git(tmp_path, "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    shutil.copytree(project / "models", clone / "models")
    run(clone, "dvc", "pull", "--run-cache")
    stages = repro(clone, "--pull")
    assert not any(stage.startswith("train") for stage in stages), stages
    assert digest(clone / "build/first/adapter/adapter_model.safetensors") == digest(
        project / "build/first/adapter/adapter_model.safetensors"
    )


def processes(project: Path) -> list[str]:
    """Workers running in a project."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                "prefbuild.worker" in (folder / "cmdline").read_text()
                and (folder / "cwd").resolve() == project.resolve()
            ):
                found.append(folder.name)
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(project: Path) -> None:
    train = "pipelines/first/dvc.yaml:train"
    edit(project, "first", "max_steps: 4", "max_steps: 40")
    repro(project, train)
    straight = digest(project / "build/first/adapter/adapter_model.safetensors")
    straight_curve = (project / "build/first/live/plots/metrics/train/loss.tsv").read_text()

    # Forget the build, so that the next one trains again.
    shutil.rmtree(project / ".dvc/cache/runs")
    (project / "pipelines/first/dvc.lock").unlink()
    building = subprocess.Popen(
        ["dvc", "repro", train], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(project.glob("build/.work/train-first/*/checkpoint-*/manifest.json")))
    for pid in processes(project):
        os.kill(int(pid), signal.SIGKILL)
    assert building.wait(60) != 0
    assert list(project.glob("build/.work/train-first/*/checkpoint-*/manifest.json"))

    output = run(project, "dvc", "repro", train, timeout=400)
    assert "going on from checkpoint-" in output
    assert digest(project / "build/first/adapter/adapter_model.safetensors") == straight
    assert (project / "build/first/live/plots/metrics/train/loss.tsv").read_text() == straight_curve
    assert not (project / "build/.work/train-first").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_no_child_outlives_its_dvc_repro(project: Path, signum: signal.Signals) -> None:
    edit(project, "first", "max_steps: 4", "max_steps: 500")
    building = subprocess.Popen(
        ["dvc", "repro"], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: list(project.glob("build/.work/train-first/*/checkpoint-*")))
    os.kill(building.pid, signum)
    building.wait(30)
    wait_for(lambda: not processes(project), seconds=15)


def test_two_builds_never_write_the_same_outputs(project: Path) -> None:
    edit(project, "first", "max_steps: 4", "max_steps: 500")
    repro(project, "pipelines/first/dvc.yaml:reference")  # a longer run uses more rows
    first = subprocess.Popen(
        ["prefbuild", "stage", "train", "first"], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(project.glob("build/.work/train-first/*/checkpoint-*")))
    output = run(project, "prefbuild", "stage", "train", "first", code=7)
    assert output == f"prefbuild: train first: is already running (process {first.pid}); wait for it or stop it\n"
    first.terminate()
    assert first.wait(30) == 130
    wait_for(lambda: not processes(project), seconds=15)


def test_metrics_params_and_plots_diff_between_commits(project: Path) -> None:
    edit(project, "first", "max_steps: 4", "max_steps: 6")
    repro(project)
    metrics = json.loads(run(project, "dvc", "metrics", "diff", "HEAD", "--json"))
    assert metrics["build/first/train.json"]["steps"] == {"old": 4, "new": 6, "diff": 2}
    params = json.loads(run(project, "dvc", "params", "diff", "HEAD", "--json"))
    assert params["build/.resolved/first.json"]["train.settings.train.max_steps"]["new"] == 6
    assert params["recipes/first.yaml"]["train.max_steps"] == {"old": 4, "new": 6, "diff": 2}
    shown = run(project, "dvc", "metrics", "show")
    assert "build/first/evaluate.json" in shown
    assert "build/first/prepare.json" in shown
    run(project, "dvc", "plots", "diff", "HEAD", "-o", "plots")
    page = (project / "plots/index.html").read_text()
    assert "lengths.csv" in page
    assert "loss.tsv" in page


def test_dvc_exp_run_sets_a_value_of_a_recipe(project: Path) -> None:
    output = run(project, "dvc", "exp", "run", "-S", "recipes/first.yaml:train.learning_rate=0.002", timeout=400)
    assert {"resolve", "train first"} <= ran(output)
    assert (
        json.loads((project / "build/.resolved/first.json").read_text())["train"]["settings"]["train"]["learning_rate"]
        == 0.002
    )


def test_no_stage_but_fetch_reaches_the_network(built: Path, tmp_path: Path) -> None:
    """The worker refuses addresses outside this machine, and the whole build passed with the hub libraries offline."""
    code = (
        "import socket, prefbuild.worker as w; w.refuse_network('train'); "
        "socket.create_connection(('192.0.2.1', 80), timeout=1)"
    )
    output = run(tmp_path, "python", "-c", code, code=1)
    assert "stage train tried to look up 192.0.2.1: only fetching may use the network" in output


def test_a_gate_on_a_metric_that_does_not_exist_fails_the_build(project: Path) -> None:
    edit(project, "first", "evaluate.sums.exact_match", "evaluate.sums.exact_macth")
    output = run(project, "prefbuild", "build", code=8)
    assert "FAIL  evaluate.sums.exact_macth min 0" in output
    assert "did you mean" in output
    assert output.endswith("prefbuild: first: not every gate passed\n")
    assert json.loads((project / "build/first/gate.json").read_text())["passed"] is False
    run(project, "prefbuild", "gates", code=8)
    run(project, "prefbuild", "promote", "first", "--allow-dirty", code=9)
    assert not (project / "registry").exists()


def test_promote_publishes_once_and_refuses_a_changed_byte_naming_the_file(project: Path) -> None:
    said = run(project, "prefbuild", "promote", "first")
    assert said.endswith("\npromoted first v1: registry/first/v1\n") and "publishing unsigned" in said
    published = {path: digest(path) for path in sorted((project / "registry").rglob("*")) if path.is_file()}
    assert "already there: nothing changed" in run(project, "prefbuild", "promote", "first")
    assert {path: digest(path) for path in sorted((project / "registry").rglob("*")) if path.is_file()} == published
    shutil.rmtree(project / "registry")
    for name in ("merged/model.safetensors", "merged/tokenizer.json", "adapter/adapter_model.safetensors",
                 "evaluate.json", "train.json", "prepare.json", "merge.json", "gate.json"):  # fmt: skip
        path = project / "build/first" / name
        kept = path.read_bytes()
        flipped = bytearray(kept)
        flipped[len(kept) // 2] ^= 1
        path.unlink()  # the file may be a link into DVC's cache
        path.write_bytes(flipped)
        output = run(project, "prefbuild", "promote", "first", code=9)
        assert f"build/first/{name}" in output
        assert not list((project / "registry").rglob("*.safetensors"))
        path.write_bytes(kept)
    assert "promoted first v2" in run(project, "prefbuild", "promote", "first")  # v1 was another folder's


def test_promote_refuses_sources_that_are_not_committed(project: Path) -> None:
    edit(project, "first", "description: A tiny model for tests.", "description: Another sentence.")
    repro(project)
    output = run(project, "prefbuild", "promote", "first", code=9)
    assert "recipes/first.yaml" in output
    assert "--allow-dirty" in output
    run(project, "prefbuild", "promote", "first", "--allow-dirty")
    assert json.loads((project / "promotions.jsonl").read_text())["dirty"] == ["recipes/first.yaml"]
