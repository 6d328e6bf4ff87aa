"""Resolving: one section a stage, nothing in it that should not re-run the stage."""

import json
from pathlib import Path

import pytest
from project import RECIPE, ROOT, TASK, run, write_rows

from prefbuild.errors import LockError
from prefbuild.resolve import load_project, resolve, write_resolved


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that is locked, its model a folder of text: resolving reads no weights."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/config.json").write_text("{}")
    write_rows(tmp_path / "recipes/rows/train.jsonl", 10)
    (tmp_path / "recipes/rows/sums.yaml").write_text(TASK)
    (tmp_path / "recipes/rows/held_out.jsonl").write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    (tmp_path / "recipes/first.yaml").write_text(RECIPE)
    run(tmp_path, "prefbuild", "lock")
    return tmp_path


def section(project: Path, stage: str, name: str = "first") -> dict:
    return resolve(load_project(project))[f"build/.resolved/{name}.json"][stage]


def test_every_default_is_written_out(project: Path) -> None:
    train = section(project, "train")["settings"]["train"]
    assert train["beta"] == 0.1
    assert train["lora"]["target_modules"] == "all-linear"
    assert section(project, "train")["settings"]["seed"] == 42


def test_params_yaml_is_inherited_and_the_recipe_wins(project: Path) -> None:
    (project / "params.yaml").write_text("seed: 7\ntrain: {save_steps: 99, logging_steps: 3}\n")
    assert section(project, "train")["settings"]["seed"] == 7
    assert section(project, "train")["settings"]["train"]["logging_steps"] == 3
    assert section(project, "train")["settings"]["train"]["save_steps"] == 2


def test_trackers_stand_beside_the_sections_and_are_inherited(project: Path) -> None:
    before, compute = section(project, "train"), section(project, "compute")
    assert "report_to" not in compute
    text = (ROOT / "params.yaml").read_text().replace("train:\n", "train:\n  report_to: [wandb, mlflow]\n")
    (project / "params.yaml").write_text(text)
    assert section(project, "compute") == compute | {"report_to": ["wandb", "mlflow"]}
    assert section(project, "train") == before
    (project / "recipes/first.yaml").write_text(RECIPE.replace("train:\n", "train:\n  report_to: []\n"))
    assert section(project, "compute") == compute


def test_nothing_is_pinned_until_it_is_locked(project: Path) -> None:
    (project / "prefbuild.lock.yaml").unlink()
    with pytest.raises(LockError) as caught:
        resolve(load_project(project))
    for what in ("models-tiny-", "rows-train-", "recipes/rows/sums.yaml"):
        assert what in str(caught.value)
    assert "prefbuild lock" in str(caught.value)
    assert resolve(load_project(project), pinned=False)


def test_a_changed_task_changes_the_key_of_its_measurement(project: Path) -> None:
    before = section(project, "evaluate")["settings"]["measurements"][0]["key"]
    (project / "recipes/rows/held_out.jsonl").write_text(json.dumps({"question": "2+2", "answer": "4"}) + "\n")
    run(project, "prefbuild", "lock")
    assert section(project, "evaluate")["settings"]["measurements"][0]["key"] != before


def test_recipes_with_other_seeds_share_a_baseline(project: Path) -> None:
    (project / "recipes/second.yaml").write_text(RECIPE + "seed: 5\n")
    run(project, "prefbuild", "lock")
    resolved = resolve(load_project(project))
    baselines = [sections["baseline"] for path, sections in resolved.items() if "/baselines/" in path]
    assert len(baselines) == 1
    assert len(baselines[0]["settings"]["measurements"]) == 1


def test_a_recipe_that_measures_otherwise_leaves_the_first_ones_sections_alone(project: Path) -> None:
    before = resolve(load_project(project))["build/.resolved/first.json"]
    (project / "recipes/second.yaml").write_text(RECIPE.replace("limit: 4", "limit: 6"))
    run(project, "prefbuild", "lock")
    resolved = resolve(load_project(project))
    assert resolved["build/.resolved/first.json"] == before
    baseline = next(sections["baseline"] for path, sections in resolved.items() if "/baselines/" in path)
    assert [m["limit"] for m in baseline["settings"]["measurements"]] != []
    assert {m["limit"] for m in baseline["settings"]["measurements"]} == {4, 6}


def test_a_reward_model_is_measured_on_no_task_and_needs_no_baseline(project: Path) -> None:
    text = RECIPE.replace("method: dpo", "method: reward").replace("max_kl", "max_reward_difference")
    gates = "gates: [{metric: train.held_out.accuracy, min: 0.7}]\n"
    (project / "recipes/first.yaml").write_text(
        text[: text.index("evaluate:")] + gates + text[text.index("promote:") :]
    )
    run(project, "prefbuild", "lock")
    resolved = resolve(load_project(project))
    assert not [path for path in resolved if "/baselines/" in path]
    mine = resolved["build/.resolved/first.json"]
    assert set(mine) == {"prepare", "train", "merge", "gate", "promote", "compute"}
    assert not {"evaluate", "samples", "baseline"} & {*mine["gate"]["inputs"], *mine["promote"]["inputs"]}
    assert mine["merge"]["settings"] == {"merge": {"max_reward_difference": 0.5}}
    report = resolved["build/.resolved/report.json"]["report"]
    assert report["settings"]["baselines"] == {} and report["inputs"]["baselines"] == []
    assert not [path for path in report["inputs"]["first"] if "evaluate" in path]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_sections_say_of_adapter_and_reference_what_there_is_to_say(project: Path, method: str) -> None:
    recipe = RECIPE.replace("method: dpo", f"method: {method}")
    if method == "kto":
        recipe = recipe.replace("chosen: chosen, rejected: rejected", "completion: chosen")
    full = recipe.replace("  lora: {r: 4}\n", "  use_peft: false\n")
    held = full.replace("  use_peft: false\n", "  use_peft: false\n  reference: {recipe: first}\n")
    child = held.replace("source: file\n  path: models/tiny", "source: recipe\n  recipe: first")
    for name, text in (("first", recipe), ("full", full), ("held", held), ("child", child)):
        (project / f"recipes/{name}.yaml").write_text(text)
    sections = {
        name: resolve(load_project(project))[f"build/.resolved/{name}.json"]
        for name in ("first", "full", "held", "child")
    }
    train = {name: one["train"]["settings"]["train"] for name, one in sections.items()}
    base = {"reference": "base"} if method == "dpo" else {}  # which kto's sections of before had not
    assert not {"use_peft"} & train["first"].keys() and train["first"].items() >= base.items()
    assert train["full"]["use_peft"] is False and not {"lora", "quantization"} & train["full"].keys()
    assert {name: one.get("reference") for name, one in train.items()} == {
        **dict.fromkeys(("first", "full", "child"), base.get("reference")),
        "held": {"recipe": "first"},
    }  # the model of its base is what child starts from, so it is the base
    held_inputs = [
        sections["held"][stage]["inputs"].get("reference") for stage in ("train", "gate", "promote", "merge")
    ]
    assert held_inputs == ["build/first/merged"] * 3 + [None]
    assert "reference" not in sections["child"]["train"]["inputs"]
    assert sections["full"]["train"]["outputs"]["trained"] == sections["full"]["merge"]["inputs"]["trained"]
    assert not any(
        "adapter" in sections["full"][stage][side]
        for stage in ("train", "merge", "gate", "promote")
        for side in ("inputs", "outputs")
    )
    assert sections["full"]["promote"]["settings"]["promote"]["adapter"] is False
    assert sections["first"]["promote"]["settings"]["promote"]["adapter"] is True


def test_the_section_names_the_engine_where_it_is_ours_and_else_keeps_its_bytes(project: Path) -> None:
    assert section(project, "train")["settings"]["train"]["engine"] == "packed"
    trl = RECIPE.replace("method: dpo", "method: dpo\n  engine: trl")
    (project / "recipes/first.yaml").write_text(trl)
    by_trl = section(project, "train")["settings"]["train"]
    assert "engine" not in by_trl
    (project / "recipes/first.yaml").write_text(RECIPE + "compute: {gpus: 2, strategy: fsdp}\n")
    assert section(project, "train")["settings"]["train"] == by_trl
    (project / "recipes/first.yaml").write_text(RECIPE.replace("method: dpo", "method: orpo"))
    assert "engine" not in section(project, "train")["settings"]["train"]


def test_unchanged_files_are_not_written_again(project: Path) -> None:
    resolved = resolve(load_project(project))
    assert write_resolved(project, resolved)
    assert write_resolved(project, resolved) == []


def test_the_resolved_recipes_in_git_are_those_of_the_sources() -> None:
    for path, sections in resolve(load_project(ROOT)).items():
        assert json.loads((ROOT / path).read_text()) == json.loads(json.dumps(sections)), path


def test_only_training_takes_several_gpus_and_its_section_says_how(project: Path) -> None:
    recipe = project / "recipes/first.yaml"
    one = recipe.read_text() + "compute: {gpus: 1}\n"
    recipe.write_text(one)
    assert "strategy" not in section(project, "train")["settings"]
    for given, strategy in (("gpus: 2", "ddp"), ("gpus: 2, strategy: fsdp", "fsdp")):
        recipe.write_text(one.replace("gpus: 1", given))
        assert (section(project, "train")["gpus"], section(project, "train")["settings"]["strategy"]) == (2, strategy)
        assert [section(project, stage)["gpus"] for stage in ("merge", "evaluate", "gate")] == [1, 1, 0]
