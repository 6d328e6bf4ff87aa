"""The two published jobs: the recipes say what the article says, lock against a Hub, and render its rows as it does."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from project import ROOT, run

from prefbuild import yamlfile
from prefbuild.localtask import load_task
from prefbuild.lock import LOCK
from prefbuild.methods import DPO, with_engine
from prefbuild.recipe import Recipe, data_settings, load_defaults, load_recipe
from prefbuild.stages.prepare import prepare

HEADLINE = sorted((ROOT / "recipes/headline").glob("**/*.yaml"))
NEURALHERMES = ("neuralhermes", "neuralhermes-h200")
# The chat template of teknium/OpenHermes-2.5-Mistral-7B.
OPENHERMES = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def headline(name: str) -> Recipe:
    return load_recipe(ROOT / f"recipes/headline/{name}.yaml", load_defaults(ROOT / "params.yaml"))


@pytest.mark.parametrize("path", HEADLINE, ids=lambda path: path.stem)
def test_each_loads(path: Path) -> None:
    assert load_recipe(path, load_defaults(ROOT / "params.yaml")).promote is not None


def test_neuralhermes_is_the_article_setting_by_setting() -> None:
    recipe = headline("neuralhermes")
    base, data, train = (section.model_dump() for section in (recipe.base, recipe.data, recipe.train))
    assert (base["repo"], base["revision"]) == (
        "teknium/OpenHermes-2.5-Mistral-7B",
        "24c0bea14d53e6f67f1fbe2eca5bfe7cae389b33",
    )
    assert [(source["repo"], source["revision"]) for source in data["sources"]] == [
        ("Intel/orca_dpo_pairs", "624952e3f420ae18d88b31977ee2ea436c833abb")
    ]
    columns = {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"}
    assert {key: data["columns"][key] for key in columns} == columns
    assert (data["max_prompt_length"], data["max_length"], data["held_out"]) == (1024, 1536, 0)
    assert data["filters"] == [] and data["drop_duplicates"] is False and data["on_too_long"] == "truncate"
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}
    modules = {"k_proj", "gate_proj", "v_proj", "up_proj", "q_proj", "o_proj", "down_proj"}
    assert {key: train["lora"][key] for key in lora} == lora and set(train["lora"]["target_modules"]) == modules
    assert not train["lora"]["use_rslora"] and not train["lora"]["use_dora"]
    settings = {
        "method": "dpo", "loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0, "reference": "base",
        "quantization": "nf4", "precision": "bf16", "gradient_checkpointing": True, "optim": "paged_adamw_32bit",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine", "max_steps": 200, "warmup_steps": 100, "logging_steps": 1, "stop_if": [],
        "weight_decay": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert {key: train[key] for key in settings} == settings


@pytest.mark.parametrize("name", NEURALHERMES)
def test_the_leaderboard_is_asked_as_it_asks(name: str) -> None:
    recipe = headline(name)
    shots = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": None, "winogrande": 5, "gsm8k": 5}
    asked = {task.task: task.num_fewshot for task in recipe.evaluate.tasks}
    mmlu = {task: number for task, number in asked.items() if task.startswith("mmlu_")}
    assert {task: number for task, number in asked.items() if task not in mmlu} == shots
    assert len(mmlu) == 57 and set(mmlu.values()) == {5}
    assert not recipe.evaluate.apply_chat_template
    assert all(task.limit is None and task.apply_chat_template is None for task in recipe.evaluate.tasks)


def test_both_recipes_train_on_the_same_rows_with_the_same_loss() -> None:
    article, today = (headline(name) for name in NEURALHERMES)
    assert article.base == today.base and article.data.sources == today.data.sources
    assert article.data.columns == today.data.columns and article.evaluate == today.evaluate
    for key in ("method", "loss_type", "loss_weights", "beta", "label_smoothing", "reference", "learning_rate"):
        assert getattr(article.train, key) == getattr(today.train, key)
    batches = {r.train.per_device_train_batch_size * r.train.gradient_accumulation_steps for r in (article, today)}
    assert batches == {16}


# ---- lock


def at(hub: Hub, name: str, commit: str, files: dict[str, bytes], kind: str = "model") -> None:
    """A repository whose newest commit has this very name."""
    made = hub.put(name, files, kind=kind)
    repo = hub.repos[f"{kind}s/{name}"]
    repo["commits"][commit] = repo["commits"].pop(made)
    repo["branches"]["main"] = commit
    hub.save()


def test_both_lock_against_repositories_of_those_names_and_shapes(hub: Hub, real_data: Path, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": {f"layer{i}": name for i, name in enumerate(names)}}
    model = {name: name.encode() * 100 for name in names} | {"tokenizer.model": b"pieces"}
    texts = (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    model |= dict.fromkeys(texts, b"{}") | {"model.safetensors.index.json": json.dumps(index).encode()}
    model |= {"README.md": b"#", "transformers_inference_example.py": b"import os"}
    article = headline("neuralhermes")
    at(hub, article.base.repo, article.base.revision, model)  # type: ignore[union-attr]
    source = article.data.sources[0]
    rows = (real_data / "preference/orca_dpo_pairs_284.jsonl").read_bytes()
    at(hub, source.repo, source.revision, {"orca_rlhf.jsonl": rows, "README.md": b"#"}, kind="dataset")  # type: ignore[union-attr]

    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", project)
    for name in NEURALHERMES:
        shutil.copy(ROOT / f"recipes/headline/{name}.yaml", project / "recipes")
    for task in article.evaluate.tasks:
        for path in (task.data or {}).values():
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).write_bytes(path.encode())
    run(project, "prefbuild", "lock", code=0, timeout=60, **hub.env())

    lock = yamlfile.load(project / LOCK).data
    by_repo = {entry["reference"]["repo"]: entry for entry in lock["sources"].values()}
    assert {repo: entry["commit"] for repo, entry in by_repo.items()} == {
        article.base.repo: article.base.revision,  # type: ignore[union-attr]
        source.repo: source.revision,  # type: ignore[union-attr]
    }
    pinned = {file["path"] for file in by_repo["teknium/OpenHermes-2.5-Mistral-7B"]["files"]}
    assert {*names, "model.safetensors.index.json", "tokenizer.model", "config.json"} <= pinned
    assert "transformers_inference_example.py" not in pinned
    assert [file["path"] for file in by_repo["Intel/orca_dpo_pairs"]["files"]] == ["orca_rlhf.jsonl"]
    run(project, "prefbuild", "sync", HF_HUB_OFFLINE="1")
    run(project, "prefbuild", "resolve", HF_HUB_OFFLINE="1")
    section = json.loads((project / "build/.resolved/neuralhermes.json").read_text())["train"]
    assert section["settings"]["base"]["name"] == "teknium/OpenHermes-2.5-Mistral-7B"
    section = json.loads((project / "build/.resolved/neuralhermes-h200.json").read_text())["train"]
    assert DPO.model_validate(section["settings"]["train"]) == with_engine(headline("neuralhermes-h200").train, None)


# ---- rows


@pytest.fixture(scope="module")
def openhermes(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with OpenHermes' chat template; both models end a turn with <|im_end|>."""
    folder = tmp_path_factory.mktemp("openhermes") / "model"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    (folder / "chat_template.jinja").write_text(OPENHERMES)
    return folder


def test_an_orca_row_is_rendered_as_the_article_prints_it(openhermes: Path, real_data: Path, tmp_path: Path) -> None:
    text = (real_data / "preference/orca_dpo_pairs_284.jsonl").read_text(encoding="utf-8")
    source = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/orca_rlhf.jsonl").write_text(text, encoding="utf-8")
    settings = {"data": data_settings(headline("neuralhermes").data, "pairs", []), "seed": 42}
    prepared = prepare(settings, {"model": openhermes, "data": [tmp_path / "rows"]})

    assert prepared.metrics["rows"]["in"] == 284 and len(prepared.rows) > 240
    assert prepared.metrics["dropped"] == {
        reason: number if reason == "prompt_too_long" else 0 for reason, number in prepared.metrics["dropped"].items()
    }
    for row in prepared.rows:
        raw = source[int(row.id.removeprefix("0:")) - 1]
        system = f"<|im_start|>system\n{raw['system']}<|im_end|>\n" if raw["system"] else ""
        question = f"<|im_start|>user\n{raw['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert row.prompt == system + question
        assert {part: answer.text for part, answer in row.answers.items()} == {
            part: raw[part] + "<|im_end|>\n" for part in ("chosen", "rejected")
        }


@pytest.mark.parametrize("system", ["", None])
def test_an_empty_system_message_is_left_out(openhermes: Path, tmp_path: Path, system: str | None) -> None:
    (tmp_path / "rows").mkdir()
    row = {"system": system, "question": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "rows/orca_rlhf.jsonl").write_text(json.dumps(row) + "\n")
    settings = {"data": data_settings(headline("neuralhermes").data, "pairs", []), "seed": 42}
    prepared = prepare(settings, {"model": openhermes, "data": [tmp_path / "rows"]})
    assert prepared.rows[0].prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


# ---- tasks

ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge": {
        "id": "1",
        "question": "?",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "winogrande": {"sentence": "The _ was.", "option1": "a", "option2": "b", "answer": "2"},
    "gsm8k": {"question": "1 + 1?", "answer": "So #### 2"},
    "mmlu_virology": {"question": "?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 1},
}


@pytest.mark.parametrize("name", ROWS)
def test_local_files_stand_in_for_a_leaderboard_tasks_splits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    task = next(task for task in headline("neuralhermes").evaluate.tasks if task.task == name)
    assert task.data is not None
    for split, path in task.data.items():
        row = {
            key: f"{split} {value}" if key in ("question", "sentence") else value for key, value in ROWS[name].items()
        }
        os.makedirs(Path(path).parent, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 30), path)
    loaded = load_task({**task.model_dump(), "name": name, "files": []}, tmp_path / "work")
    examples = "fewshot" if "fewshot" in task.data else "train"
    text = str(loaded.fewshot_docs()[0])
    assert f"{examples} " in text and loaded.config.num_fewshot == task.num_fewshot
    measured = loaded.test_docs() if loaded.has_test_docs() else loaded.validation_docs()
    assert "train " not in str(measured[0]) and "fewshot " not in str(measured[0])
