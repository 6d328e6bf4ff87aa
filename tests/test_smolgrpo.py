"""SmolGRPO: the recipe says what the course says, locks against a Hub, and its rows become prompts."""

import io
import json
import shutil
from pathlib import Path

import pytest
from hub import Hub
from project import ROOT, run

from prefbuild import yamlfile
from prefbuild.lock import LOCK
from prefbuild.methods import GRPO, with_engine
from prefbuild.recipe import Recipe, data_settings, load_defaults, load_recipe
from prefbuild.stages.prepare import prepare


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes/headline/smolgrpo.yaml", load_defaults(ROOT / "params.yaml"))


def test_it_is_the_course_setting_by_setting(recipe: Recipe) -> None:
    assert recipe.base.repo == "HuggingFaceTB/SmolLM-135M-Instruct"  # type: ignore[union-attr]
    (source,) = recipe.data.sources
    assert (source.repo, source.split) == ("mlabonne/smoltldr", "train")  # type: ignore[union-attr]
    assert (recipe.data.max_prompt_length, recipe.data.held_out) == (512, 0)
    train = recipe.train.model_dump()
    (reward,) = train["rewards"]
    assert reward == {"reward": "length", "target": 50, "unit": "characters", "weight": 1.0, "name": None}
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
    assert {key: train["lora"][key] for key in lora} == lora
    settings = {
        "method": "grpo", "num_generations": 8, "max_completion_length": 96, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2, "optim": "adamw_bnb_8bit", "learning_rate": 2e-5, "num_train_epochs": 1.0,
        "max_steps": None, "precision": "bf16", "logging_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "beta": 0.04, "temperature": 0.9, "loss_type": "grpo", "scale_rewards": "group", "epsilon": 0.2,
        "num_iterations": 1, "use_bias_correction_kl": False, "quantization": None,
    }  # fmt: skip
    assert {key: train[key] for key in settings} == settings


def parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


def test_it_locks_against_repositories_of_those_names_and_shapes(
    recipe: Recipe, hub: Hub, real_data: Path, tmp_path: Path
) -> None:
    texts = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    model = dict.fromkeys(texts, b"{}") | {"model.safetensors": b"weights", "README.md": b"#", "onnx/model.onnx": b"x"}
    commit = recipe.base.revision  # type: ignore[union-attr]
    made = hub.put(recipe.base.repo, model)  # type: ignore[union-attr]
    repo = hub.repos[f"models/{recipe.base.repo}"]  # type: ignore[union-attr]
    repo["commits"][commit] = repo["commits"].pop(made)
    repo["branches"]["main"] = commit
    hub.save()
    rows = [json.loads(line) for line in (real_data / "prompts/tldr_100.jsonl").read_text().splitlines()]
    files = {f"data/{split}-00000-of-00001.parquet": parquet(rows) for split in ("train", "validation", "test")}
    hub.put("mlabonne/smoltldr", files, kind="dataset")

    project = tmp_path / "project"
    shutil.copytree(ROOT / "recipes/concise", project / "recipes/concise")
    shutil.copy(ROOT / "params.yaml", project)
    shutil.copy(ROOT / "recipes/headline/smolgrpo.yaml", project / "recipes")
    run(project, "prefbuild", "lock", timeout=60, **hub.env())
    entries = {e["reference"]["repo"]: e for e in yamlfile.load(project / LOCK).data["sources"].values()}
    assert entries["HuggingFaceTB/SmolLM-135M-Instruct"]["commit"] == commit
    (pinned,) = entries["mlabonne/smoltldr"]["files"]
    assert pinned["path"] == "data/train-00000-of-00001.parquet"
    run(project, "prefbuild", "sync", HF_HUB_OFFLINE="1")
    run(project, "prefbuild", "resolve", HF_HUB_OFFLINE="1")
    section = json.loads((project / "build/.resolved/smolgrpo.json").read_text())["train"]
    assert GRPO.model_validate(section["settings"]["train"]) == with_engine(recipe.train, None)


def test_posts_become_prompts(recipe: Recipe, smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    shutil.copy(real_data / "prompts/tldr_100.jsonl", tmp_path)
    settings = {"data": data_settings(recipe.data, recipe.shape, []), "seed": recipe.seed}
    prepared = prepare(settings, {"model": smollm2, "data": [tmp_path]})
    rows = prepared.metrics["rows"]
    assert rows["in"] == 100 and rows["out"] + sum(prepared.metrics["dropped"].values()) == 100 and rows["train"] > 80
