"""A recipe is right, or every wrong line of it is named with a remedy."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from prefbuild import yamlfile
from prefbuild.errors import RecipeError, UsageError
from prefbuild.methods import DPO, LOSS_TYPES, METHODS, SHAPES, reference_recipe, train_metrics
from prefbuild.recipe import (
    Compute,
    Data,
    Defaults,
    Evaluate,
    Recipe,
    RecipeModel,
    data_settings,
    json_schema,
    known_recipes,
    load_defaults,
    load_recipe,
    load_recipes,
    metrics,
    schema_text,
    seconds,
    size_bytes,
)

ROOT = Path(__file__).parent.parent
X = Path("recipes/x.yaml")
GOOD = """\
base:
  source: file
  path: models/tiny
data:
  sources:
    - {source: file, path: rows.jsonl}
train:
  method: dpo
  max_steps: 10
evaluate:
  tasks:
    - task: recipes/concise/concise.yaml
gates:
  - metric: evaluate.concise.exact_match
    min: 0.5
"""
LOSSES = ", ".join(LOSS_TYPES)
TRAIN_KEYS = ", ".join(DPO.model_fields)
TOP_KEYS = ", ".join(Recipe.model_fields)
METHOD_NAMES = ", ".join(METHODS)
EITHER_METHOD = f"{', '.join(list(METHODS)[:-1])} or {list(METHODS)[-1]}"
# What a method needs beside its name.
NEEDS = {
    "grpo": {"rewards": [{"reward": "length", "target": 50}]},
    "rloo": {"rewards": [{"reward": "length", "target": 50}]},
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one recipe, x; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/concise").mkdir(parents=True)
    Path("recipes/concise/concise.yaml").write_text("task: concise\ndoc_to_text: !function x.y\n")
    Path("params.yaml").write_text("seed: 7\n")
    X.write_text(GOOD)
    return tmp_path


def edited(*edits: tuple[str, str]) -> str:
    text = GOOD
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
        text = text.replace(old, new)
    return text


def of_method(method: str, *edits: tuple[str, str]) -> str:
    """The good recipe with another method, and what that method needs."""
    if method == "reward":
        edits = (*edits, (GOOD[GOOD.index("evaluate:") : GOOD.index("gates:")], ""))
    needs = "".join(f"\n  {key}: {json.dumps(value)}" for key, value in NEEDS.get(method, {}).items())
    return edited(("  method: dpo", f"  method: {method}{needs}"), *edits)


def problems() -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipes(Path())
    return caught.value.problems


def started_from(recipe: str) -> str:
    return edited(("source: file\n  path: models/tiny", f"source: recipe\n  recipe: {recipe}"))


# ---- what is right


def test_a_recipe_is_loaded_with_the_defaults_of_the_schema() -> None:
    recipe = load_recipes(Path())["x"]
    assert (recipe.train.max_steps, recipe.train.learning_rate, recipe.train.lora.r) == (10, 5e-5, 16)
    assert recipe.merge.max_kl == 0.01
    assert recipe.promote is None


@pytest.mark.parametrize("text", ["5e-5", "1e-5", "1E-5", "0.00001", "1.0e-05", "1"])
def test_learning_rates_are_numbers_however_written(text: str) -> None:
    X.write_text(edited(("  max_steps: 10", f"  learning_rate: {text}")))
    assert load_recipe(X, Defaults()).train.learning_rate == float(text)


def test_recipes_come_in_order_of_names_and_other_files_are_left_alone() -> None:
    for name in ("b", "a", "a-b", "c-1_x", "z" * 63):
        Path(f"recipes/{name}.yaml").write_text(GOOD)
    for name in ("README.md", "notes.txt", ".hidden.yaml", "a.yaml~", "recipe.schema.json"):
        Path(f"recipes/{name}").write_text("{")
    assert list(load_recipes(Path())) == ["a", "a-b", "b", "c-1_x", "x", "z" * 63]


def test_a_project_may_have_no_recipes_yet() -> None:
    X.unlink()
    assert load_recipes(Path()) == {}


def test_the_recipes_of_this_repository_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert set(load_recipes(Path())) == {path.stem for path in Path("recipes").glob("*.yaml")} != set()


def test_a_recipe_may_start_from_another_and_be_compared_with_it() -> None:
    Path("recipes/y.yaml").write_text(
        started_from("x").replace("min: 0.5", "min_delta: 0.0\n    against: x\n    confidence: 0.9")
    )
    base = load_recipes(Path())["y"].base
    assert isinstance(base, RecipeModel)
    assert base.recipe == "x"


@pytest.mark.parametrize("method", METHODS)
def test_every_known_metric_can_be_gated(method: str) -> None:
    train = METHODS[method].model_validate({"method": method, **NEEDS.get(method, {})})
    known = [f"{stage}.{key}" for stage, keys in metrics(SHAPES[method], train).items() for key in keys]
    gates = "\n".join(f"  - {{metric: {metric}, min: 0.5}}" for metric in known)
    text = of_method(method, ("  - metric: evaluate.concise.exact_match\n    min: 0.5", gates))
    # What some settings leave unmeasured is refused: no held-out prompts, and GRPO without KL.
    text = text.replace("data:\n", "data:\n  held_out: 0.1\n").replace("method: grpo", "method: grpo\n  beta: 0.1")
    X.write_text(text)
    assert [gate.metric for gate in load_recipe(X, Defaults()).gates] == known
    assert len(set(known)) == len(known) > 30


def test_a_metric_with_a_filter_is_of_its_task() -> None:
    X.write_text(edited(("exact_match", "exact_match@strict-match")))
    assert load_recipes(Path())["x"].gates[0].metric == "evaluate.concise.exact_match@strict-match"


@pytest.mark.parametrize("task", ["include: base.yaml\n", "task: [a, b]\n", "task: a\ntask: b\n", "\xff", None])
def test_tasks_whose_name_is_not_plain_are_left_to_the_lock(task: str | None) -> None:
    path = Path("recipes/concise/concise.yaml")
    path.unlink() if task is None else path.write_bytes(task.encode("latin-1"))
    X.write_text(edited(("evaluate.concise.exact_match", "evaluate.other.acc")))
    assert load_recipes(Path())["x"].gates[0].metric == "evaluate.other.acc"


@pytest.mark.parametrize("line", ['task: "concise"', "task: 'concise'  # name", "task:   concise"])
def test_a_local_task_is_known_by_its_own_name(line: str) -> None:
    Path("recipes/concise/concise.yaml").write_text(f"# x\n{line}\nmetric_list:\n  - task: other\n")
    load_recipes(Path())
    X.write_text(edited(("evaluate.concise", "evaluate.concize")))
    assert problems() == ["recipes/x.yaml:14: gates[0].metric: no task 'concize' is evaluated; did you mean concise?"]


# ---- what is wrong: what is written under a key, and the whole message without `recipes/x.yaml:<line>: `

IN_TRAIN = {
    "learning_rat: 1": "train.learning_rat: unknown key; did you mean learning_rate?",
    "lr: 5e-5": "train.lr: unknown key; did you mean learning_rate?",
    "num_epochs: 1": "train.num_epochs: unknown key; did you mean num_train_epochs?",
    "batch_size: 1": "train.batch_size: unknown key; did you mean per_device_train_batch_size?",
    "lora_r: 8": "train.lora_r: unknown key; did you mean train.lora.r?",
    "alpha: 16": "train.alpha: unknown key; did you mean train.lora.lora_alpha?",
    "dropout: 0.1": "train.dropout: unknown key; did you mean train.lora.lora_dropout?",
    "lora: {rank: 8}": "train.lora.rank: unknown key; did you mean r?",
    "max_seq_length: 512": "train.max_seq_length: unknown key; did you mean data.max_length?",
    "max_prompt_length: 256": "train.max_prompt_length: unknown key; it belongs in data",
    "tasks: []": "train.tasks: unknown key; it belongs in evaluate",
    "num_fewshot: 1": "train.num_fewshot: unknown key; it belongs in evaluate.tasks",
    "rpo_alpha: 1.0": "train.rpo_alpha: unknown key; TRL dropped it; write loss_type: [sigmoid, sft] with loss_weights",
    "warmup_ratio: 0.1": "train.warmup_ratio: unknown key; transformers dropped it; write warmup_steps, as in 0.1 for a tenth of the steps",
    "bf16: true": "train.bf16: unknown key; write precision: bf16 (or auto, or float32)",
    "load_in_4bit: true": "train.load_in_4bit: unknown key; write train.quantization: nf4, the one kind there is",
    "reference_free: true": "train.reference_free: unknown key; TRL dropped it; remove it",
    "ref_model: x": "train.ref_model: unknown key; write train.reference: base, or {recipe: NAME} for the model of another recipe",
    "reference: other": "train.reference: is text 'other'; base or {recipe: ...} is wanted",
    "reference: [base]": "train.reference: is a list; base or {recipe: ...} is wanted",
    "reference: {recipe: 1}": "train.reference.recipe: is the number 1; text is wanted, write it in quotes",
    "reference: {recipe: x, path: y}": "train.reference.path: unknown key; it belongs in base or in data.sources or in train.rewards or in promote",
    "reference: {recipe: y}": "train.reference.recipe: there is no recipe 'y'; known: x",
    "reference: {recipe: x}": "train.reference.recipe: recipes need each other's models (x -> x); let one do with reference: base",
    "use_lora: false": "train.use_lora: unknown key; an adapter is trained unless train.use_peft is false; remove it",
    "full_finetuning: true": "train.full_finetuning: unknown key; write train.use_peft: false to train all weights",
    "output_dir: x": "train.output_dir: unknown key; outputs go to build/<recipe>; remove it",
    "trust_remote_code: true": "train.trust_remote_code: unknown key; no code comes from a model or data set; remove it",
    "hub_token: hf_abcdefghijklmnopqrstuvwxyz0123": "train.hub_token: holds a token; remove it, and revoke it if others saw the file",
    "token: abc": "train.token: a token is never written in a recipe; remove it, and revoke it if others saw the file",
    "WANDB_API_KEY: abc": "train.WANDB_API_KEY: a token is never written in a recipe; remove it, and revoke it if others saw the file",
    "pad_token: x": f"train.pad_token: unknown key; known here: {TRAIN_KEYS}",
    "Beta: 1": "train.Beta: unknown key; did you mean beta?",
    "save-steps: 1": "train.save-steps: unknown key; did you mean save_steps?",
    "xyzzy: 1": f"train.xyzzy: unknown key; known here: {TRAIN_KEYS}",
    "hf_abcdefghijklmnopqrstuvwxyz0123: 1": f"train.'hf_***': unknown key; known here: {TRAIN_KEYS}",
    "Path: 1": "train.Path: unknown key; did you mean base.path?",
    "beta: '0.1'": "train.beta: is text '0.1'; a number is wanted, write 0.1 without quotes",
    "beta: .nan": "train.beta: is .nan; a finite number is wanted",
    "beta: .inf": "train.beta: is .inf; a finite number is wanted",
    "beta: 0": "train.beta: is 0; more than 0 is wanted",
    "beta: [1]": "train.beta: is a list; a number is wanted",
    "beta: true": "train.beta: is true; a number is wanted",
    "beta:": "train.beta: is empty; a number is wanted, or leave the key out",
    "beta: strong": "train.beta: is text 'strong'; a number is wanted",
    "learning_rate: '5e-5'": "train.learning_rate: is text '5e-5'; a number is wanted, write 5e-5 without quotes",
    "label_smoothing: 0.5": "train.label_smoothing: is 0.5; less than 0.5 is wanted",
    "label_smoothing: -1": "train.label_smoothing: is -1; at least 0 is wanted",
    "warmup_steps: 1.0": "train.warmup_steps: is 1.0; give whole steps without a point, or a fraction of all below 1",
    "warmup_steps: 1.5": "train.warmup_steps: is 1.5; give whole steps without a point, or a fraction of all below 1",
    "warmup_steps: '40'": "train.warmup_steps: is text '40'; a number is wanted, write 40 without quotes",
    "warmup_steps: 1_000": "train.warmup_steps: is text '1_000'; a number is wanted, write 1000 without quotes",
    "warmup_steps: 10%": "train.warmup_steps: is text '10%'; a number is wanted",
    "deterministic: yes": "train.deterministic: is text 'yes'; true or false is wanted, write true",
    "deterministic: 'false'": "train.deterministic: is text 'false'; true or false is wanted, write false",
    "deterministic: 1": "train.deterministic: is the number 1; true or false is wanted, write true",
    "loss_type: sigmoid": "train.loss_type: is text 'sigmoid'; a list is wanted, write [sigmoid]",
    "loss_type: [sigmod]": f"train.loss_type[0]: 'sigmod' is not known; did you mean sigmoid? (known: {LOSSES})",
    "loss_type: [sigmoid, simpo]": f"train.loss_type[1]: 'simpo' is not known; it is a method of its own, write method: simpo (known: {LOSSES})",
    "loss_type: [dpo]": f"train.loss_type[0]: 'dpo' is not known; DPO's own loss is sigmoid, write loss_type: [sigmoid] (known: {LOSSES})",
    "loss_type: kto_pair": "train.loss_type: 'kto_pair' is not known; TRL dropped it; apo_zero and sigmoid are near",
    "loss_type: []": "train.loss_type: is an empty list; at least one item is wanted",
    "loss_type: [1]": "train.loss_type[0]: is the number 1; sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft or sigmoid_norm is wanted",
    "loss_type: {a: 1}": "train.loss_type: is a section; a list is wanted, begin its items with '- '",
    "loss_weights: [1, 2]": "train.loss_weights: has 2 numbers for 1 losses; give one weight a loss",
    "loss_type: [exo_pair]": "train.loss_type: exo_pair needs label_smoothing above 0; 1e-3 is usual",
    "lora: {r: 0}": "train.lora.r: is 0; at least 1 is wanted",
    "lora: 16": "train.lora: is the number 16; a section is wanted",
    "lora: [r]": "train.lora: is a list; a section is wanted, remove the '- '",
    "lora: {target_modules: q_proj}": "train.lora.target_modules: is text 'q_proj'; all-linear or a list is wanted, write [q_proj]",
    "lora: {target_modules: [q_proj, 1]}": "train.lora.target_modules[1]: is the number 1; text is wanted, write it in quotes",
    "lora: {target_modules: }": "train.lora.target_modules: is empty; all-linear or a list is wanted, or leave the key out",
    "lora: {lora_dropout: 1}": "train.lora.lora_dropout: is 1; less than 1 is wanted",
    "precision: fp16": "train.precision: 'fp16' is not known; float16 overflows; did you mean bf16? (known: auto, bf16, float32)",
    "precision: 16": "train.precision: is the number 16; auto, bf16 or float32 is wanted",
    "precision: mixed": "train.precision: 'mixed' is not known; known: auto, bf16, float32",
    "optim: adamw_8bit": "train.optim: 'adamw_8bit' is not known; did you mean adamw_bnb_8bit? (known: adamw_torch, adamw_torch_fused, paged_adamw_32bit, paged_adamw_8bit, adamw_bnb_8bit, sgd)",
    "lr_scheduler_type: cosin": "train.lr_scheduler_type: 'cosin' is not known; did you mean cosine? (known: linear, cosine, constant, constant_with_warmup, polynomial, cosine_with_min_lr)",
    "optim: hf_abcdefghijklmnopqr": "train.optim: 'hf_***' is not known; known: adamw_torch, adamw_torch_fused, paged_adamw_32bit, paged_adamw_8bit, adamw_bnb_8bit, sgd",
}
IN_DATA = {
    "filters: [{column: a}]": "data.filters[0].column: keeps every row; give in, not_in, min or max",
    "filters: [{column: a, in: [x, [1]]}]": "data.filters[0].in[1]: is a list; text, a number or true or false is wanted",
    "filters: [{column: a, in: x}]": "data.filters[0].in: is text 'x'; a list is wanted, write [x]",
    "filters: [{column: a, in: [null]}]": "data.filters[0].in[0]: is empty; text, a number or true or false is wanted",
    "filters: [{column: a, min: 2, max: 1}]": "data.filters[0].min: is above max (1), which drops every row; swap them",
    "filters: [{in: [a]}]": "data.filters[0].column: missing; required: The column looked at",
    "filters: [a]": "data.filters[0]: is text 'a'; a section is wanted, write column: a",
    "filters: [{column: a, equals: 1}]": "data.filters[0].equals: unknown key; known here: column, in, not_in, min, max",
    "max_length: 100": "data.max_length: leaves no room for an answer: max_prompt_length is 512 and max_length 100; give a max_length well above max_prompt_length",
    "max_prompt_length: 1024": "data.max_prompt_length: leaves no room for an answer: max_prompt_length is 1024 and max_length 1024; give a max_length well above max_prompt_length",
    "columns: {choosen: a}": "data.columns.choosen: unknown key; did you mean chosen?",
    "columns: {prompt: 1}": "data.columns.prompt: is the number 1; text is wanted, write it in quotes",
    "held_out: 1.5": "data.held_out: is 1.5; at most 1 is wanted",
    "learning_rate: 1": "data.learning_rate: unknown key; it belongs in train",
    "ignore: id": "data.ignore: is text 'id'; a list is wanted, write [id]",
    "on_broken: skip": "data.on_broken: 'skip' is not known; did you mean drop? (known: fail, drop)",
    "dedup: true": "data.dedup: unknown key; did you mean drop_duplicates?",
    "prompt_length: 5": "data.prompt_length: unknown key; did you mean max_prompt_length?",
}
IN_TASK = {
    "data: {trian: a}": "evaluate.tasks[0].data.trian: unknown key; did you mean train?",
    "data: {train: 1}": "evaluate.tasks[0].data.train: is the number 1; text is wanted, write it in quotes",
    "data: {test: ../x}": "evaluate.tasks[0].data.test: '../x' climbs with '..'; give a path inside the project, or an absolute one",
    "data: a": "evaluate.tasks[0].data: is text 'a'; a section is wanted",
    "limit: 0": "evaluate.tasks[0].limit: is 0; at least 1 is wanted",
    "fewshot: 1": "evaluate.tasks[0].fewshot: unknown key; did you mean num_fewshot?",
    "batch_size: 4": "evaluate.tasks[0].batch_size: unknown key; it belongs in evaluate",
    "name: x": "evaluate.tasks[0].name: unknown key; did you mean task?",
}
AT_THE_END = {
    "promote: {to: hub}": "promote.repo: missing; required: The repository, `owner/name`; made when it is not there",
    "promote: {to: hub, repo: me}": "promote.repo: is text 'me'; wanted: The repository, `owner/name`; made when it is not there",
    "promote: {to: hub, repo: me/x, path: registry}": "promote.path: does not go with this; known here: adapter, merged, card, to, repo, private",
    "promote: {to: huggingface}": "promote.to: 'huggingface' is not known; write to: hub (known: directory, hub)",
    "promote: {to: s3}": "promote.to: 's3' is not known; known: directory, hub",
    "promote: {path: registry}": "promote.to: missing; required: directory or hub",
    "promote: {to: directory, card: about.md}": "promote.card: 'about.md' is not below recipes/; put the file there, where it is committed with the recipe",
    "promote: {to: directory, adapter: false, merged: false}": "promote.merged: is false, and adapter too, which publishes nothing; set one of them",
    "promote: yes": "promote: is text 'yes'; a section is wanted, with to: directory or hub in it",
    "seed: -1": "seed: is -1; at least 0 is wanted",
    "seed: 1.0": "seed: is the number 1.0; a whole number is wanted, write 1",
    "seed: true": "seed: is true; a whole number is wanted",
    "seed: 4294967296": "seed: is 4294967296; less than 4294967296 is wanted",
    "name: x": "name: unknown key; a recipe is named by its file; remove it",
    "evaluation: {}": "evaluation: unknown key; did you mean evaluate?",
    "dataset: x": "dataset: unknown key; did you mean data?",
    "version: 1": "version: unknown key; a recipe's version is its commit; remove it",
    "description: 5": "description: is the number 5; text is wanted, write it in quotes",
    "description: use hf_abcdefghijklmnopqrstuvwxyz": "description: holds a token; remove it, and revoke it if others saw the file",
    "métrique: 1": f"métrique: unknown key; known here: {TOP_KEYS}",
    '"a\\nb": 1': f"'a\\nb': unknown key; known here: {TOP_KEYS}",
    "merge: {max_kl: 0}": "merge.max_kl: is 0; more than 0 is wanted",
    "merge:": "merge: is empty; a section is wanted, or leave the key out",
    "extends: other": "extends: unknown key; recipes inherit from params.yaml alone; write the keys out",
    "eval: 1": "eval: unknown key; did you mean evaluate?",
    "gate: 1": "gate: unknown key; did you mean gates?",
    "registry: x": "registry: unknown key; did you mean promote?",
}
REPLACED = [
    (
        "  max_steps: 10",
        "  use_peft: false\n  lora: {}",
        ["10: train.lora: is of an adapter, and use_peft is false, which trains all weights; remove one of them"],
    ),
    (
        "  max_steps: 10",
        "  use_peft: false\n  quantization: nf4",
        [
            "10: train.quantization: holds the base in 4 bits, which only an adapter can be trained on, and use_peft is "
            "false; remove one of them"
        ],
    ),
    (
        "  max_steps: 10\n",
        "  use_peft: false\npromote: {to: directory, adapter: true, merged: false}\n",
        [
            "10: promote.adapter: is true, and train.use_peft is false, which trains no adapter; remove it",
            "10: promote.merged: is false, and train.use_peft too, which leaves no adapter to publish instead; remove it",
        ],
    ),
    (
        "  max_steps: 10",
        "  max_steps: 10\n  num_train_epochs: 2",
        ["9: train.max_steps: says how long to train, and num_train_epochs too; give one"],
    ),
    (
        "  method: dpo",
        "  method: ppo\n  num_generations: 8",
        [f"8: train.method: 'ppo' is not known; that method does not exist here yet (known: {METHOD_NAMES})"],
    ),
    (
        "  method: dpo",
        "  method: DPO",
        [f"8: train.method: 'DPO' is not known; did you mean dpo? (known: {METHOD_NAMES})"],
    ),
    ("  method: dpo", "  method: [dpo]", [f"8: train.method: is a list; {EITHER_METHOD} is wanted"]),
    (
        "  method: dpo",
        "  methd: dpo",
        [f"7: train.method: missing; required: {EITHER_METHOD}"],
    ),
    ("  method: dpo", "  lora: {}", [f"7: train.method: missing; required: {EITHER_METHOD}"]),
    (
        "  source: file\n",
        "  source: huggingface\n",
        ["2: base.source: 'huggingface' is not known; did you mean hub? (known: file, wheel, hub, recipe)"],
    ),
    (
        "  source: file\n",
        "  source: local\n",
        ["2: base.source: 'local' is not known; did you mean file? (known: file, wheel, hub, recipe)"],
    ),
    (
        "  source: file\n",
        "  source: fil\n",
        ["2: base.source: 'fil' is not known; did you mean file? (known: file, wheel, hub, recipe)"],
    ),
    ("  source: file\n", "  source: 5\n", ["2: base.source: is the number 5; file, wheel, hub or recipe is wanted"]),
    ("  source: file\n", "  source: [file]\n", ["2: base.source: is a list; file, wheel, hub or recipe is wanted"]),
    ("  source: file\n", "  source:\n", ["2: base.source: is empty; file, wheel, hub or recipe is wanted"]),
    ("  source: file\n", "", ["1: base.source: missing; required: file, wheel, hub or recipe"]),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: Qwen/Qwen2.5-0.5B\n",
        ["1: base: is text 'Qwen/Qwen2.5-0.5B'; a section is wanted, with source: file, wheel, hub or recipe in it"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base:\n",
        ["1: base: is empty; a section is wanted, with source: file, wheel, hub or recipe in it"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: [x]\n",
        ["1: base: is a list; a section is wanted, remove the '- '"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "model: x\n",
        ["1: base: missing; required: The model trained on", "1: model: unknown key; did you mean base?"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: {source: recipe, recipe: x}\n",
        ["1: base.recipe: recipes start from each other (x -> x); let one start from a file or a wheel"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: {source: recipe, recipe: y}\n",
        ["1: base.recipe: there is no recipe 'y'; known: x"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: {source: recipe, recipe: x, dtype: float16}\n",
        ["1: base.dtype: does not go with this; known here: source, recipe"],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: {source: wheel, package: a b, version: 1.0, path: /x}\n",
        [
            "1: base.package: is text 'a b'; wanted: The package's name on the index",
            "1: base.version: is the number 1.0; text is wanted, write it in quotes",
            "1: base.path: '/x' is absolute; give the path inside the package",
        ],
    ),
    (
        "base:\n  source: file\n  path: models/tiny\n",
        "base: {source: file, path: x, dtype: bf16}\n",
        ["1: base.dtype: 'bf16' is not known; did you mean bfloat16? (known: bfloat16, float16, float32)"],
    ),
    (
        "  path: models/tiny\n",
        "  path: ../x\n",
        ["3: base.path: '../x' climbs with '..'; give a path inside the project, or an absolute one"],
    ),
    ("  path: models/tiny\n", "  path: ''\n", ["3: base.path: '' is not a path; give one with / between folders"]),
    (
        "  path: models/tiny\n",
        '  path: "a\\0b"\n',
        ["3: base.path: 'a\\x00b' is not a path; give one with / between folders"],
    ),
    (
        "  path: models/tiny\n",
        "  pth: models/tiny\n",
        ["1: base.path: missing; required: File or folder", "3: base.pth: unknown key; did you mean path?"],
    ),
    ("  path: models/tiny\n", "  path: 12\n", ["3: base.path: is the number 12; text is wanted, write it in quotes"]),
    (
        "  path: models/tiny\n",
        "  path: x\n  revision: main\n",
        ["4: base.revision: unknown key; prefbuild.lock.yaml pins what is read; remove it, and run prefbuild lock"],
    ),
    (
        "    - {source: file, path: rows.jsonl}",
        "    []",
        ["5: data.sources: is an empty list; at least one item is wanted"],
    ),
    (
        "    - {source: file, path: rows.jsonl}",
        "    {source: file, path: rows.jsonl}",
        ["5: data.sources: is a section; a list is wanted, begin its items with '- '"],
    ),
    (
        "    - {source: file, path: rows.jsonl}",
        "    - rows.jsonl",
        ["6: data.sources[0]: is text 'rows.jsonl'; a section is wanted, with source: file, wheel or hub in it"],
    ),
    (
        "    - {source: file, path: rows.jsonl}",
        "    - {source: recipe, recipe: x}",
        ["6: data.sources[0].source: 'recipe' is not known; known: file, wheel, hub"],
    ),
    (
        "    - {source: file, path: rows.jsonl}",
        "    - {source: file, path: a, package: b}",
        ["6: data.sources[0].package: does not go with this; known here: source, path, weight"],
    ),
    (
        "    - task: recipes/concise/concise.yaml",
        "    - concise",
        ["12: evaluate.tasks[0]: is text 'concise'; a section is wanted, write task: concise"],
    ),
    (
        "    - task: recipes/concise/concise.yaml",
        "    - task: arc_easy",
        ["14: gates[0].metric: no task 'concise' is evaluated; known: arc_easy"],
    ),
    (
        "    - task: recipes/concise/concise.yaml",
        "    - task: concise\n    - task: recipes/concise/concise.yaml",
        ["13: evaluate.tasks[1].task: 'concise' is measured by tasks[0] already; keep one"],
    ),
    (
        "    - task: recipes/concise/concise.yaml",
        "    - task: 5",
        ["12: evaluate.tasks[0].task: is the number 5; text is wanted, write it in quotes"],
    ),
    (
        "evaluate.concise.exact_match",
        "evaluate.concis.exact_match",
        ["14: gates[0].metric: no task 'concis' is evaluated; did you mean concise?"],
    ),
    (
        "evaluate.concise.exact_match",
        "evaluate.concise",
        [
            "14: gates[0].metric: 'evaluate.concise' is a task, not a number; add the metric, as in evaluate.concise.exact_match"
        ],
    ),
    (
        "evaluate.concise.exact_match",
        "train.los",
        ["14: gates[0].metric: 'train.los' is no metric; did you mean train.loss?"],
    ),
    (
        "evaluate.concise.exact_match",
        "eval.concise.x",
        [
            "14: gates[0].metric: is text 'eval.concise.x'; wanted: `<stage>.<key>`, as in evaluate.concise.exact_match or prepare.dropped.empty"
        ],
    ),
    (
        "evaluate.concise.exact_match",
        "train",
        [
            "14: gates[0].metric: is text 'train'; wanted: `<stage>.<key>`, as in evaluate.concise.exact_match or prepare.dropped.empty"
        ],
    ),
    (
        "evaluate.concise.exact_match",
        "prepare.dropped.empy",
        ["14: gates[0].metric: 'prepare.dropped.empy' is no metric; did you mean prepare.dropped.empty?"],
    ),
    (
        "evaluate.concise.exact_match",
        "merge.speed",
        ["14: gates[0].metric: 'merge.speed' is no metric; known: kl, max_logit_difference, greedy_agreement, bytes"],
    ),
    (
        "evaluate.concise.exact_match",
        "evaluate.a b.c",
        [
            "14: gates[0].metric: is text 'evaluate.a b.c'; wanted: `<stage>.<key>`, as in evaluate.concise.exact_match or prepare.dropped.empty"
        ],
    ),
    ("    min: 0.5", "    max_drop: -0.1", ["15: gates[0].max_drop: is -0.1; at least 0 is wanted"]),
    ("    min: 0.5", "    min: high", ["15: gates[0].min: is text 'high'; a number is wanted"]),
    (
        "    min: 0.5",
        "    max_drop: 0.1\n    against: y",
        ["16: gates[0].against: there is no recipe 'y'; known: base, x"],
    ),
    (
        "    min: 0.5",
        "    min_delta: 0\n    against: x",
        ["16: gates[0].against: is this recipe itself; give base, or another recipe"],
    ),
    (
        "    min: 0.5",
        "    min: 1\n    against: base",
        ["16: gates[0].against: says nothing without min_delta or max_drop; give one of them"],
    ),
    (
        "    min: 0.5",
        "    min: 1\n    confidence: 0.9",
        ["16: gates[0].confidence: says nothing without min_delta or max_drop; give one of them"],
    ),
    ("    min: 0.5", "    min: 2\n    max: 1", ["15: gates[0].min: is above max (1), so nothing passes; swap them"]),
    ("    min: 0.5", "    min: .inf", ["15: gates[0].min: is .inf; a finite number is wanted"]),
    ("    min: 0.5", "    threshold: 1", ["15: gates[0].threshold: unknown key; did you mean min?"]),
    (
        "    min: 0.5",
        "    foo: 1",
        ["15: gates[0].foo: unknown key; known here: metric, min, max, min_delta, max_drop, against, confidence"],
    ),
    (
        "    min: 0.5",
        "    against: base",
        ["14: gates[0].metric: anything satisfies this gate; give min, max, min_delta or max_drop"],
    ),
    (
        "    min: 0.5",
        "    min_delta: 0.1\n    confidence: 95",
        ["16: gates[0].confidence: is 95; less than 1 is wanted"],
    ),
    (
        "  - metric: evaluate.concise.exact_match\n    min: 0.5",
        "  - metric: train.loss\n    max_drop: 0.1",
        ["15: gates[0].max_drop: compares evaluate.* metrics, which other models have too; give min or max here"],
    ),
    (
        "  - metric: evaluate.concise.exact_match\n    min: 0.5",
        "  []",
        ["13: gates: is an empty list; at least one item is wanted"],
    ),
    ("  - metric: evaluate.concise.exact_match\n    min: 0.5", "", ["13: gates: is empty; a list is wanted"]),
    (
        "  - metric: evaluate.concise.exact_match\n    min: 0.5",
        "  metric: evaluate.concise.exact_match",
        ["13: gates: is a section; a list is wanted, begin its items with '- '"],
    ),
    (
        "  - metric: evaluate.concise.exact_match\n    min: 0.5",
        "  - metric: [a]\n    min: 1",
        ["14: gates[0].metric: is a list; text is wanted"],
    ),
]


@pytest.mark.parametrize(
    ("where", "line", "text", "message"),
    [
        (where, line, text, message)
        for where, line, table in (
            ("  max_steps: 10\n", 10, IN_TRAIN),
            ("    - {source: file, path: rows.jsonl}\n", 7, IN_DATA),
            ("    - task: recipes/concise/concise.yaml\n", 13, IN_TASK),
            ("    min: 0.5\n", 16, AT_THE_END),
        )
        for text, message in table.items()
    ],
)
def test_what_is_added_is_refused(where: str, line: int, text: str, message: str) -> None:
    depth = {10: 2, 7: 2, 13: 6, 16: 0}[line]
    X.write_text(edited((where, f"{where}{' ' * depth}{text}\n")))
    assert problems() == [f"recipes/x.yaml:{line}: {message}"]


@pytest.mark.parametrize(("old", "new", "messages"), REPLACED)
def test_what_is_changed_is_refused(old: str, new: str, messages: list[str]) -> None:
    X.write_text(edited((old, new)))
    assert problems() == [f"recipes/x.yaml:{message}" for message in messages]


def test_the_tables_are_long() -> None:
    assert len(IN_TRAIN) + len(IN_DATA) + len(IN_TASK) + len(AT_THE_END) + len(REPLACED) >= 170


def test_a_yaml_error_is_a_problem_of_the_recipe() -> None:
    X.write_text(GOOD + "seed: [\n")
    assert problems() == ["recipes/x.yaml:16: a '[' that is not closed; close it"]


# ---- all at once


def test_all_problems_of_all_files_come_at_once_in_order() -> None:
    Path("params.yaml").write_text("seed: x\ntrain:\n  lr: 1\n")
    X.write_text(
        edited(("  max_steps: 10", "  lr: 1\n  beta: '1'"), ("min: 0.5", "mn: 0.5"), ("file\n  path", "file\n  pth"))
    )
    Path("recipes/My Model.yaml").write_text(edited(("method: dpo", "method: dpoo")))
    Path("recipes/old.yml").write_text(GOOD)
    Path("recipes/a.yaml").write_text("a: 1\na: 2\n")
    assert problems() == [
        "params.yaml:1: seed: is text 'x'; a whole number is wanted",
        "params.yaml:3: train.lr: unknown key; each recipe says this for itself, here go only precision, deterministic, "
        "logging_steps, save_steps, report_to",
        "recipes/My Model.yaml:1: 'My Model' cannot be a recipe's name; rename the file to lower-case letters, digits, - "
        "and _, at most 63, beginning and ending with a letter or digit",
        f"recipes/My Model.yaml:8: train.method: 'dpoo' is not known; did you mean dpo? (known: {METHOD_NAMES})",
        "recipes/a.yaml:2: a: written twice, first on line 1; keep one",
        "recipes/old.yml:1: ends in .yml; rename it to old.yaml",
        "recipes/x.yaml:1: base.path: missing; required: File or folder",
        "recipes/x.yaml:3: base.pth: unknown key; did you mean path?",
        "recipes/x.yaml:9: train.lr: unknown key; did you mean learning_rate?",
        "recipes/x.yaml:10: train.beta: is text '1'; a number is wanted, write 1 without quotes",
        "recipes/x.yaml:16: gates[0].mn: unknown key; did you mean min?",
    ]


# ---- data and gates by method


def with_data(method: str, data: str) -> str:
    return of_method(
        method, ("    - {source: file, path: rows.jsonl}\n", f"    - {{source: file, path: rows.jsonl}}\n  {data}\n")
    )


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("dpo", "columns: {system: s, prompt: q, chosen: a, rejected: b}"),
        ("orpo", "columns: {chosen: a}"),
        ("sft", "columns: {system: s, prompt: q, completion: a}"),
        ("sft", "columns: {system: s, messages: m}"),
        ("kto", "columns: {prompt: q, completion: a, label: good}"),
        ("kto", "columns: {messages: m, label: good}"),
        ("grpo", "columns: {system: s, prompt: q}"),
        ("rloo", "columns: {messages: m}"),
        ("grpo", "max_prompt_length: 4096"),
        ("sft", "columns: {messages: null}"),
        ("dpo", "format: hh"),
        ("dpo", "format: openai"),
        ("kto", "format: sharegpt"),
    ],
)
def test_each_method_has_its_columns(method: str, data: str) -> None:
    X.write_text(with_data(method, data))
    assert load_recipe(X, Defaults()).train.method == method


ANSWERS = "system, prompt, completion and messages"
ROOM = "leaves no room for an answer: max_prompt_length is 2000 and max_length 1024; give a max_length well above"


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("dpo", "columns: {completion: a}", "columns.completion: is not read by dpo, which reads system, prompt, chosen and rejected; remove it"),
        ("dpo", "columns: {label: a}", "columns.label: is not read by dpo, which reads system, prompt, chosen and rejected; remove it"),
        ("simpo", "columns: {messages: a}", "columns.messages: is not read by simpo, which reads system, prompt, chosen and rejected; remove it"),
        ("sft", "columns: {chosen: a}", f"columns.chosen: is not read by sft, which reads {ANSWERS}; remove it, or write completion: a to train on it"),
        ("sft", "columns: {rejected: a}", f"columns.rejected: is not read by sft, which reads {ANSWERS}; remove it"),
        ("sft", "columns: {label: a}", f"columns.label: is not read by sft, which reads {ANSWERS}; remove it"),
        ("kto", "columns: {rejected: a}", "columns.rejected: is not read by kto, which reads system, prompt, completion, messages and label; remove it"),
        ("grpo", "columns: {completion: a}", "columns.completion: is not read by grpo, which reads system, prompt and messages; remove it"),
        ("sft", "columns: {messages: m, completion: a}", "columns.completion: says where a part is, and messages has the whole; give one of them"),
        ("grpo", "columns: {messages: m, prompt: a}", "columns.prompt: says where a part is, and messages has the whole; give one of them"),
        ("grpo", "max_length: 2048", "max_length: says nothing to grpo, which trains on prompts and writes the answers itself; remove it: max_prompt_length limits prompts"),
        ("rloo", "on_too_long: drop", "on_too_long: says nothing to rloo, which trains on prompts and writes the answers itself; remove it: max_prompt_length limits prompts"),
        ("sft", "max_prompt_length: 2000", f"max_prompt_length: {ROOM} max_prompt_length"),
        ("dpo", "format: hhh", "format: 'hhh' is not known; did you mean hh? (known: hh, sharegpt, openai)"),
        ("sft", "format: openai", "format: is of pairs, and sft trains on answers; remove it, and map the columns"),
        ("kto", "format: hh", "format: needs the column of the transcripts; write columns: {messages: chosen}, say"),
        ("sft", "columns: {response: a}", "columns.response: unknown key; did you mean completion?"),
        ("sft", "columns: {conversations: a}", "columns.conversations: unknown key; did you mean messages?"),
    ],
)  # fmt: skip
def test_what_a_method_does_not_read_is_refused_where_it_stands(method: str, data: str, message: str) -> None:
    X.write_text(with_data(method, data))
    assert problems() == [f"recipes/x.yaml:7: data.{message}"]


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("dpo", "format: hh\n  columns: {prompt: a}", "columns.prompt: is not read with format: hh, whose answers hold it; remove it"),
        ("sft", "format: sharegpt\n  columns: {prompt: a}", "columns.prompt: says where a part is, and format: sharegpt has the whole; give one of them"),
    ],
)  # fmt: skip
def test_a_format_has_its_own_columns(method: str, data: str, message: str) -> None:
    X.write_text(with_data(method, data))
    assert problems() == [f"recipes/x.yaml:8: data.{message}"]


ONE = "    - {source: file, path: rows.jsonl}\n"
TWO = "    - {source: file, path: a.jsonl, weight: 0.7}\n    - {source: file, path: b.jsonl, weight: 3}\n"


def test_sources_may_have_weights_which_pin_nothing() -> None:
    X.write_text(edited((ONE, TWO), ("evaluate.concise.exact_match", "prepare.dropped.sampled_out")))
    recipe = load_recipe(X, Defaults())
    assert [source.weight for source in recipe.data.sources] == [0.7, 3]
    assert data_settings(recipe.data, recipe.shape)["weights"] == [0.7, 3]
    assert not any("weight" in source.model_dump() for source in recipe.data.sources)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (TWO.replace(", weight: 3", ""), "6: data.sources[0].weight: says nothing alone: rows are sampled in proportion to other weights; give another source one too"),
        (TWO.replace("0.7", "0"), "6: data.sources[0].weight: is 0; more than 0 is wanted"),
        (TWO.replace("3", "-1"), "7: data.sources[1].weight: is -1; more than 0 is wanted"),
        (TWO.replace("3", "x"), "7: data.sources[1].weight: is text 'x'; a number is wanted"),
        (TWO.replace("weight: 3", "proportion: 3"), "7: data.sources[1].proportion: unknown key; did you mean weight?"),
    ],
)  # fmt: skip
def test_what_is_no_weight_is_refused(sources: str, message: str) -> None:
    X.write_text(edited((ONE, sources)))
    assert problems() == [f"recipes/x.yaml:{message}"]


def test_without_weights_no_row_is_sampled_out() -> None:
    X.write_text(edited(("evaluate.concise.exact_match", "prepare.dropped.sampled_out")))
    assert "'prepare.dropped.sampled_out' is no metric; " in problems()[0]


def test_all_that_does_not_suit_a_method_is_said_at_once() -> None:
    X.write_text(with_data("sft", "columns: {chosen: a, label: b}").replace("evaluate.concise.exact_match", "train.kl"))
    assert [problem.partition(": ")[2].partition(": ")[0] for problem in problems()] == [
        "data.columns.chosen", "data.columns.label", "gates[0].metric",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "metric", "message"),
    [
        ("sft", "train.rewards.margins", "'train.rewards.margins' is no metric of sft; known: "),
        ("sft", "prepare.tokens.chosen.p95", "'prepare.tokens.chosen.p95' is no metric; did you mean prepare.tokens."),
        ("sft", "prepare.dropped.identical_pair", "'prepare.dropped.identical_pair' is no metric; "),
        ("dpo", "prepare.truncated.completion", "'prepare.truncated.completion' is no metric; did you mean "),
        ("dpo", "prepare.labels.true", "'prepare.labels.true' is no metric; "),
        ("grpo", "prepare.boundary_differs", "'prepare.boundary_differs' is no metric; "),
        ("grpo", "prepare.dropped.too_long", "'prepare.dropped.too_long' is no metric; did you mean prepare.dropped.prompt_too_long?"),
        ("dpo", "train.reward_std", "'train.reward_std' is no metric of dpo; did you mean train.rewards."),
    ],
)  # fmt: skip
def test_a_gate_asks_for_what_its_method_writes(method: str, metric: str, message: str) -> None:
    X.write_text(of_method(method, ("evaluate.concise.exact_match", metric)))
    (problem,) = problems()
    assert f": gates[0].metric: {message}" in problem


@pytest.mark.parametrize(
    ("method", "metric", "edit", "message"),
    [
        ("grpo", "train.kl", "", "train.beta is 0, where no KL is computed; give beta, or remove the gate"),
        ("rloo", "train.kl", "beta: 0.0", "train.beta is 0, where no KL is computed; give beta, or remove the gate"),
        ("rloo", "train.kl", "beta: 0.05", ""),
        ("kto", "train.kl", "", ""),
        ("dpo", "train.held_out.loss", "", "data.held_out is 0, so there is nothing to measure on; give held_out, as in 0.05"),
        ("dpo", "train.step_0.loss", "", ""),
        ("grpo", "train.step_0.reward", "", "data.held_out is 0, so there is nothing to measure on; give held_out, as"),
    ],
)  # fmt: skip
def test_a_gate_on_what_these_settings_never_measure_is_said(method: str, metric: str, edit: str, message: str) -> None:
    text = of_method(method, ("evaluate.concise.exact_match", metric))
    X.write_text(text.replace(f"  method: {method}", f"  method: {method}\n  {edit}"))
    if message:
        (problem,) = problems()
        assert f": gates[0].metric: '{metric}' is never measured: {message}" in problem
        X.write_text(text.replace("data:\n", "data:\n  held_out: 0.1\n"))
    if "held_out" in message or not message:
        load_recipes(Path())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("wandb", "train.report_to: is text 'wandb'; a list is wanted, write [wandb]"),
        ("[dvclive]", "train.report_to[0]: 'dvclive' is not known; DVCLive always has the curves, leave it out"),
        ("[wandb, wandb]", "train.report_to: names wandb twice; write it once"),
        ("[tensorbord]", "train.report_to[0]: 'tensorbord' is not known; did you mean tensorboard?"),
    ],
)
def test_report_to_names_trackers(written: str, message: str) -> None:
    X.write_text(edited(("  method: dpo", f"  method: dpo\n  report_to: {written}")))
    (problem,) = problems()
    assert message in problem


def test_prepare_is_told_what_its_rows_need_and_no_more() -> None:
    data = Data.model_validate({"sources": [{"source": "file", "path": "rows.jsonl"}]})
    told = {shape: data_settings(data, shape, ["answer"]) for shape in set(SHAPES.values())}
    assert {shape: section["columns"] for shape, section in told.items()} == {
        "pairs": {"system": None, "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        "answers": {"system": None, "prompt": "prompt", "completion": "completion"},
        "labelled": {"system": None, "prompt": "prompt", "completion": "completion", "label": "label"},
        "prompts": {"system": None, "prompt": "prompt"},
    }
    assert [shape for shape in told if "max_length" in told[shape] or "on_too_long" in told[shape]] == [
        shape for shape in told if shape != "prompts"
    ]
    assert {shape: section.get("keep") for shape, section in told.items()} == {
        shape: ["answer"] if shape == "prompts" else None for shape in told
    }
    whole = data.model_copy(update={"columns": data.columns.model_copy(update={"messages": "m"})})
    assert data_settings(whole, "labelled")["columns"] == {"system": None, "messages": "m", "label": "label"}


def test_an_empty_section_lists_what_it_needs() -> None:
    X.write_text("data: {}\n")
    assert problems() == [
        "recipes/x.yaml:1: base: missing; required: The model trained on",
        "recipes/x.yaml:1: data.sources: missing; required: Files of rows, read in this order",
        "recipes/x.yaml:1: train: missing; required: The method and its settings",
        "recipes/x.yaml:1: evaluate: missing; required: What is measured, on the model and on its base",
        "recipes/x.yaml:1: gates: missing; required: What the metrics must show before the model may be promoted",
    ]


# ---- names


@pytest.mark.parametrize("name", ["Ab", "a.b", "-a", "a-", "_a", "a b", "é", "a" * 64, "a@b", "a\nb"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    Path(f"recipes/{name}.yaml").write_text(GOOD)
    where = yamlfile.show_path(Path(f"recipes/{name}.yaml"))
    assert problems() == [
        f"{where}:1: {yamlfile.show(name)} cannot be a recipe's name; rename the file to lower-case letters, digits, - "
        "and _, at most 63, beginning and ending with a letter or digit"
    ]


@pytest.mark.parametrize("name", ["base", "baselines", "data", "models", "report"])
def test_names_of_the_build_are_refused(name: str) -> None:
    Path(f"recipes/{name}.yaml").write_text(GOOD)
    assert problems() == [f"recipes/{name}.yaml:1: '{name}' is a name that prefbuild uses itself; rename the file"]


@pytest.mark.parametrize("suffix", [".yml", ".YAML", ".Yml"])
def test_other_endings_are_refused(suffix: str) -> None:
    Path(f"recipes/y{suffix}").write_text(GOOD)
    assert problems() == [f"recipes/y{suffix}:1: ends in {suffix}; rename it to y.yaml"]


def test_a_project_without_recipes_or_params_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes(tmp_path / "recipes")
    assert caught.value.problems == [
        "recipes/params.yaml:1: is not there; a YAML file is wanted",
        "recipes/recipes:1: is no folder; a recipe is recipes/<name>.yaml",
    ]


def test_a_folder_named_like_a_recipe_is_refused() -> None:
    Path("recipes/y.yaml").mkdir()
    assert problems() == ["recipes/y.yaml:1: is not a plain file; a YAML file is wanted"]


def test_known_recipes_are_all_or_those_named() -> None:
    assert known_recipes([], {"a": 1, "b": 2}) == ["a", "b"]
    assert known_recipes(["b"], ["a", "b"]) == ["b"]
    with pytest.raises(UsageError, match=r"^there is no recipe 'concize'; did you mean concise\?$"):
        known_recipes(["concize"], ["a", "concise"])


# ---- between recipes


def test_recipes_that_start_from_each_other_are_named_once() -> None:
    for name, base in (("c", "a"), ("a", "b"), ("b", "c"), ("d", "a")):
        Path(f"recipes/{name}.yaml").write_text(started_from(base))
    assert problems() == [
        "recipes/a.yaml:3: base.recipe: recipes start from each other (a -> b -> c -> a); let one start from a file or a wheel"
    ]


def scored_by(recipe: str) -> str:
    """The good recipe with a method that another recipe's reward model serves."""
    rewards = f"  method: grpo\n  rewards: [{{reward: model, recipe: {recipe}}}]"
    return edited(("  method: dpo", rewards))


def test_a_reward_model_scores_completions_and_is_no_base_and_measured_on_no_task() -> None:
    judge = of_method("reward", ("evaluate.concise.exact_match", "train.accuracy"))
    Path("recipes/judge.yaml").write_text(judge)
    X.write_text(scored_by("judge"))
    loaded = load_recipes(Path())
    assert loaded["judge"].tasks == [] and loaded["judge"].evaluate is None
    assert train_metrics(loaded["x"].train)[-3:] == ("rewards.judge", "held_out.rewards.judge", "step_0.rewards.judge")

    X.write_text(scored_by("juge"))
    assert problems() == ["recipes/x.yaml:9: train.rewards[0].recipe: there is no recipe 'juge'; did you mean judge?"]
    Path("recipes/y.yaml").write_text(GOOD)
    X.write_text(scored_by("y"))
    assert problems() == [
        "recipes/x.yaml:9: train.rewards[0].recipe: recipe y makes a model that writes (method dpo); name one with "
        "method: reward"
    ]
    X.write_text(started_from("judge").replace("min: 0.5", "max_drop: 0.1\n    against: judge"))
    assert problems() == [
        "recipes/x.yaml:3: base.recipe: recipe judge makes a reward model, which scores answers and writes none; take "
        "another recipe",
        "recipes/x.yaml:16: gates[0].against: recipe judge makes a reward model, which writes no answers to measure; take "
        "another recipe",
    ]
    X.write_text(scored_by("judge"))
    Path("recipes/judge.yaml").write_text(
        judge.replace("source: file\n  path: models/tiny", "source: recipe\n  recipe: x")
    )
    assert problems() == [
        "recipes/judge.yaml:3: base.recipe: recipes start from each other (judge -> x -> judge); let one start from a file "
        "or a wheel"
    ]


def test_what_a_reward_model_does_not_have_is_an_error_that_says_what_it_has() -> None:
    X.write_text(edited(("  method: dpo", "  method: reward")) + "merge: {max_kl: 0.1}\n")
    why = "lm-evaluation-harness measures models that write, and a reward model scores; "
    what = "gate on train.held_out.accuracy and train.held_out.margin, which data.held_out gives"
    assert problems() == [
        f"recipes/x.yaml:10: evaluate: {why}remove it, and {what}",
        f"recipes/x.yaml:14: gates[0].metric: {why}{what}",
        "recipes/x.yaml:16: merge.max_kl: is of models that write; write max_reward_difference",
    ]
    X.write_text(of_method("reward", ("evaluate.concise.exact_match", "train.held_out.rewards.accuracies")))
    assert problems()[0].endswith("is no metric of reward; did you mean train.held_out.accuracy?")
    X.write_text(
        of_method(
            "reward",
            ("evaluate.concise.exact_match", "train.loss"),
            ("10\n", "10\n  lora: {target_modules: [score]}\n"),
        )
    )
    assert problems() == [
        "recipes/x.yaml:10: train.lora.target_modules: names score, the head, which is trained whole; leave it out"
    ]
    X.write_text(
        of_method("reward", ("evaluate.concise.exact_match", "train.loss"), ("10\n", "10\n  use_peft: false\n"))
    )
    assert problems() == [
        "recipes/x.yaml:10: train.use_peft: is false, and a reward model is trained with an adapter; remove it"
    ]
    X.write_text(GOOD + "merge: {max_reward_difference: 0.1}\n")
    assert problems() == ["recipes/x.yaml:16: merge.max_reward_difference: is of reward models; write max_kl"]
    X.write_text(edited((GOOD[GOOD.index("evaluate:") : GOOD.index("gates:")], "evaluate: null\n")))
    assert problems() == [
        "recipes/x.yaml:10: evaluate: is empty; required: What is measured, on the model and on its base"
    ]


def test_a_reference_is_an_edge_too() -> None:
    held = edited(("  max_steps: 10", "  reference: {recipe: b}"))
    for name, text in (("a", held), ("b", started_from("c")), ("c", started_from("a")), ("d", held)):
        Path(f"recipes/{name}.yaml").write_text(text)
    assert problems() == [
        "recipes/a.yaml:9: train.reference.recipe: recipes need each other's models (a -> b -> c -> a); let one do with "
        "reference: base"
    ]
    Path("recipes/c.yaml").write_text(GOOD)
    assert reference_recipe(load_recipes(Path())["a"].train) == "b"


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dpo", "kto"}))
def test_only_dpo_and_kto_choose_their_reference(method: str) -> None:
    X.write_text(of_method(method, ("  max_steps: 10", "  reference: base")))
    (problem,) = problems()
    assert (
        "train.reference: unknown key; dpo and kto have a reference of their choice; that of grpo and rloo is the base"
        in problem
    )


def test_a_recipe_that_is_wrong_itself_still_exists_for_others() -> None:
    Path("recipes/y.yaml").write_text(started_from("x").replace("min: 0.5", "max_drop: 0.1\n    against: x"))
    X.write_text(GOOD + "lr: 1\n")
    assert problems() == ["recipes/x.yaml:16: lr: unknown key; did you mean train.learning_rate?"]


def test_a_base_or_reference_that_does_not_exist_is_named_with_the_likely_one() -> None:
    Path("recipes/concise-a.yaml").write_text(GOOD)
    X.write_text(started_from("consise-a").replace("min: 0.5", "max_drop: 0.1\n    against: bas"))
    assert problems() == [
        "recipes/x.yaml:3: base.recipe: there is no recipe 'consise-a'; did you mean concise-a?",
        "recipes/x.yaml:16: gates[0].against: there is no recipe 'bas'; did you mean base?",
    ]


def test_the_recipe_compared_with_must_measure_the_task() -> None:
    Path("recipes/y.yaml").write_text(
        edited(("recipes/concise/concise.yaml", "arc_easy"), ("concise.exact_match", "arc_easy.acc"))
    )
    X.write_text(edited(("min: 0.5", "max_drop: 0.1\n    against: y")))
    assert problems() == [
        "recipes/x.yaml:16: gates[0].against: recipe y does not measure it: no task 'concise' is evaluated; known: arc_easy"
    ]


# ---- defaults


def test_defaults_are_inherited_where_the_recipe_says_nothing() -> None:
    Path("params.yaml").write_text(
        "seed: 7\ntrain: {precision: float32, save_steps: 5}\nevaluate: {batch_size: 3, apply_chat_template: true}\n"
    )
    X.write_text(edited(("  max_steps: 10", "  max_steps: 10\n  save_steps: 9")) + "seed: 8\n")
    Path("recipes/y.yaml").write_text(GOOD)
    recipes = load_recipes(Path())
    assert (recipes["x"].seed, recipes["y"].seed) == (8, 7)
    assert (recipes["x"].train.save_steps, recipes["y"].train.save_steps) == (9, 5)
    assert (recipes["x"].train.precision, recipes["x"].train.logging_steps) == ("float32", 1)
    assert (recipes["x"].evaluate.batch_size, recipes["x"].evaluate.apply_chat_template) == (3, True)


def test_a_default_that_is_not_set_is_not_inherited() -> None:
    Path("params.yaml").write_text("seed:\ntrain: {precision: }\nevaluate: {}\n")
    assert load_recipes(Path())["x"] == load_recipe(X, Defaults())


def test_an_empty_key_of_a_recipe_is_not_taken_from_the_defaults() -> None:
    X.write_text(GOOD + "seed:\n")
    assert problems() == ["recipes/x.yaml:16: seed: is empty; a whole number is wanted, or leave the key out"]


def test_defaults_do_not_hide_that_a_section_is_missing() -> None:
    defaults = Defaults.model_validate({"seed": 1, "train": {"save_steps": 5}, "evaluate": {"batch_size": 3}})
    X.write_text(edited(("train:\n  method: dpo\n  max_steps: 10\n", "train: x\n"), ("evaluate:\n", "evaluatex:\n")))
    with pytest.raises(RecipeError) as caught:
        load_recipe(X, defaults)
    assert caught.value.problems == [
        "recipes/x.yaml:1: evaluate: missing; required: What is measured, on the model and on its base",
        f"recipes/x.yaml:7: train: is text 'x'; a section is wanted, with method: {EITHER_METHOD} in it",
        "recipes/x.yaml:8: evaluatex: unknown key; did you mean evaluate?",
    ]


def test_every_default_is_a_setting_of_a_recipe_with_the_same_limits() -> None:
    """Else a value that params.yaml may hold would be an error in a recipe that does not say it."""
    recipe = Recipe.model_json_schema()
    defaults = Defaults.model_json_schema()
    pairs = (("TrainDefaults", DPO), ("EvaluateDefaults", Evaluate))
    for name, model in pairs:
        for key, schema in defaults["$defs"][name]["properties"].items():
            mine, null = schema["anyOf"]
            theirs = recipe["$defs"][model.__name__]["properties"][key]
            assert null == {"type": "null"}
            assert {k: v for k, v in theirs.items() if k not in ("default", "description", "title")} == mine, key
    limits = {k: v for k, v in recipe["properties"]["seed"].items() if k not in ("default", "description", "title")}
    assert defaults["properties"]["seed"]["anyOf"] == [limits, {"type": "null"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: 1}", "train.learning_rate: unknown key; each recipe says this for itself, here go only "
         "precision, deterministic, logging_steps, save_steps, report_to"),
        ("gates: []", "gates: unknown key; each recipe says this for itself, here go only seed, train, evaluate, compute"),
        ("train: {save_step: 1}", "train.save_step: unknown key; did you mean save_steps?"),
        ("batch_size: 1", "batch_size: unknown key; it belongs in evaluate"),
        ("eval: {}", "eval: unknown key; did you mean evaluate?"),
        ("train: {save_steps: 0}", "train.save_steps: is 0; at least 1 is wanted"),
        ("train: {precision: fp16}", "train.precision: 'fp16' is not known; float16 overflows; did you mean bf16? "
         "(known: auto, bf16, float32)"),
        ("token: hf_abc", "token: a token is never written in a recipe; remove it, and revoke it if others saw the file"),
        ("[1]", "is a list at the top; a mapping of keys is wanted"),
        ("# nothing", "is empty; a mapping of keys is wanted"),
    ],
)  # fmt: skip
def test_params_are_refused_in_the_same_way(text: str, message: str) -> None:
    Path("params.yaml").write_text(f"{text}\n")
    with pytest.raises(RecipeError) as caught:
        load_defaults(Path("params.yaml"))
    assert caught.value.problems == [f"params.yaml:1: {message}"]


def test_params_may_say_nothing() -> None:
    Path("params.yaml").write_text("{}\n")
    assert load_defaults(Path("params.yaml")) == Defaults()


# ---- no token is printed


@pytest.mark.parametrize(
    "token", ["hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789", "ghp_0123456789abcdefghijABCDEFGHIJ0123456789"]
)
@pytest.mark.parametrize(
    "edit",
    [
        ("path: models/tiny", "path: {}"),
        ("source: file\n", "source: {}\n"),
        ("method: dpo", "method: {}"),
        ("max_steps: 10", "max_steps: {}"),
        ("max_steps: 10", "{}: 10"),
        ("max_steps: 10", "lora: {{target_modules: {}}}"),
        ("max_steps: 10", "loss_type: [{}]"),
        ("min: 0.5", "min: 0.5\n    against: {}"),
        ("evaluate.concise.exact_match", "{}"),
        ("evaluate.concise.exact_match", "evaluate.{}.acc"),
        ("task: recipes/concise/concise.yaml", "task: {}"),
        ("gates:", "{}:\n{}:\ngates:"),
        ("base:\n", "base: {}\nbose:\n"),
        ("rows.jsonl", "rows.jsonl, token: {}"),
        ("rows.jsonl", "rows.jsonl, {}: {}"),
        ("method: dpo", "method: !{} dpo"),
        ("method: dpo", "method: &{} dpo"),
        ("method: dpo", "method: *{}"),
        ("method: dpo", "method: !{}!x dpo"),
        ("base:\n", "{}\nbase:\n"),
    ],
)
def test_no_message_shows_a_token(edit: tuple[str, str], token: str) -> None:
    old, new = edit
    X.write_text(edited((old, new.format(token, token))))
    for problem in problems():
        assert token[:12] not in problem


# ---- any input


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**63 - 1,
        1.5,
        1e300,
        "",
        "x",
        "a\nb",
        "\0",
        "\x1b[31m",
        "file",
        "recipe",
        "x" * 1000,
    ),
    *([], {}, [None], {"a": None}, [[]], [{}], {"source": []}, {"source": "file"}, {"source": "recipe", "recipe": "x"}),
    *({"method": "dpo"}, ["sigmoid", 1], {"target_modules": [{}]}, [{"column": "a", "in": [{}]}], {"train": {}}, "10"),
    *(float("nan"), float("inf")),
]


def places(value: Any, loc: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield loc
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*loc, key))


FULL: dict[str, Any] = {
    "description": "x",
    "base": {"source": "file", "path": "m", "dtype": "float16", "name": "n"},
    "data": {
        "sources": [{"source": "wheel", "package": "p", "version": "1", "path": "x"}],
        "columns": {"system": "s"},
        "ignore": ["a"],
        "filters": [{"column": "c", "in": [1, "x", True, 1.5], "min": 1.0}],
        "max_length": 600,
    },
    "train": {"method": "dpo", "loss_type": ["sft"], "lora": {"r": 1, "target_modules": ["q"]}, "max_steps": 1},
    "merge": {"max_kl": 1.0},
    "evaluate": {"tasks": [{"task": "t", "data": {"test": "f"}, "limit": 1}]},
    "gates": [{"metric": "evaluate.t.acc", "min_delta": 0.1, "against": "base"}],
    "promote": {"to": "directory", "path": "r"},
}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(list(places(FULL))[1:]),
    st.sampled_from(VALUES),
    st.booleans(),
    st.sampled_from(["x", "lr", "a b", "\x07"]),
)
def test_any_value_anywhere_gives_a_recipe_or_one_line_problems(
    loc: tuple[Any, ...], value: Any, add: bool, key: str
) -> None:
    data = json.loads(json.dumps(FULL))
    inner = data
    for part in loc[:-1]:
        inner = inner[part]
    if add and isinstance(inner, dict):
        inner[key] = value
    else:
        inner[loc[-1]] = value
    X.write_text(yamlfile.dump(data))
    try:
        load_recipes(Path())
    except RecipeError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r"recipes/x\.yaml:\d+: .+: .+", problem), problem
            assert problem.isprintable(), problem


def test_the_recipe_that_the_fuzz_starts_from_is_right() -> None:
    X.write_text(yamlfile.dump(FULL))
    assert load_recipes(Path())["x"].data.max_length == 600


# ---- the schema


def test_every_key_has_a_description() -> None:
    for schema in (json_schema(), Defaults.model_json_schema()):
        for name, model in {"top": schema, **schema["$defs"]}.items():
            assert model["description"], name
            for key, field in model["properties"].items():
                assert field.get("description"), f"{name}.{key}"


def test_the_schema_refuses_unknown_keys_and_nan_everywhere() -> None:
    def strict(model: type[BaseModel]) -> bool:
        config = model.model_config
        return config["extra"] == "forbid" and config["frozen"] and config["strict"] and not config["allow_inf_nan"]

    assert strict(Recipe)
    assert strict(Defaults)
    for schema in (json_schema(), Defaults.model_json_schema()):
        assert all(model["additionalProperties"] is False for model in [schema, *schema["$defs"].values()])


def test_the_schema_is_written_as_canonical_json() -> None:
    text = schema_text()
    assert text == schema_text()
    assert text.endswith("}\n")
    assert json.loads(text) == json_schema()
    assert json.loads(text)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_two_lists_of_losses_are_one() -> None:
    losses = json_schema()["$defs"]["DPO"]["properties"]["loss_type"]["items"]["enum"]
    assert tuple(losses) == LOSS_TYPES


# ---- compute


def test_compute_is_the_cpu_and_its_image_unless_said_otherwise() -> None:
    assert (Compute().gpus, Compute().role) == (0, "cpu")
    assert Compute(gpus=1).role == "cuda"
    assert Compute(gpus=1, image="mine").role == "mine"


def test_sizes_and_durations_have_units() -> None:
    assert [size_bytes(size) for size in ("64MiB", "1.5GiB", "1TiB")] == [2**26, 3 * 2**29, 2**40]
    assert [seconds(duration) for duration in ("90s", "1.5h", "2d")] == [90, 5400, 172800]


def test_compute_is_inherited_key_by_key() -> None:
    Path("params.yaml").write_text("compute: {gpus: 1, memory: 32GiB}\n")
    Path("recipes/a.yaml").write_text(GOOD + "compute: {memory: 16GiB}\n")
    loaded = load_recipes(Path())
    assert (loaded["a"].compute.gpus, loaded["a"].compute.memory) == (1, "16GiB")
    assert (loaded["x"].compute.gpus, loaded["x"].compute.memory) == (1, "32GiB")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gpus: 17", "compute.gpus: is 17; at most 16 is wanted"),
        ("gpus: 3", "compute.gpus: is 3, among which the 8 rows of a step can't be shared out evenly"),
        ("strategy: fsdp", "compute.strategy: says nothing with 0 GPUs; remove it"),
        ("strategy: deepspeed", "compute.strategy: 'deepspeed' is not known; did you mean zero3? (known: ddp, fsdp,"),
        ("memory: 16g", "compute.memory: is text '16g'; wanted: Memory of a stage's container, as in 16GiB"),
        (
            "time_limit: 2 hours",
            "compute.time_limit: is text '2 hours'; wanted: Longest run of a stage, as in 90m or 4h",
        ),
        ("shm: 1GiB", "compute.shm: unknown key; did you mean shm_size?"),
        ("image: python:3.12", "compute.image: 'python:3.12' is no role; name one such as cpu, and pin the image with"),
    ],
)
def test_compute_says_what_is_wanted(line: str, message: str) -> None:
    X.write_text(GOOD + f"compute:\n  {line}\n")
    (problem,) = problems()
    assert message in problem


def test_a_recipe_for_one_gpu_need_not_undo_an_inherited_strategy() -> None:
    Path("params.yaml").write_text("compute: {gpus: 2, strategy: fsdp}\n")
    Path("recipes/a.yaml").write_text(GOOD + "compute: {gpus: 1}\n")
    loaded = load_recipes(Path())
    assert (loaded["a"].compute.gpus, loaded["a"].compute.strategy) == (1, None)
    assert (loaded["x"].compute.gpus, loaded["x"].compute.strategy) == (2, "fsdp")


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_what_cannot_be_spread_over_gpus_is_said_at_its_key(strategy: str) -> None:
    both = "  quantization: nf4\n  optim: paged_adamw_32bit\n"
    text = GOOD.replace("train:\n", f"train:\n{both}") + f"compute: {{gpus: 2, strategy: {strategy}}}\n"
    X.write_text(text)
    quantization, optim = problems()
    assert f"train.quantization: can't be spread over GPUs by {strategy}; remove it" in quantization
    assert "train.optim: is paged_adamw_32bit, bitsandbytes' own" in optim
    X.write_text(text.replace(strategy, "ddp"))
    assert load_recipes(Path())["x"].compute.gpus == 2
    X.write_text(text.replace(both, "  engine: packed\n"))
    (engine,) = problems()
    assert (
        f"train.engine: is packed, which needs all weights on each GPU, and compute.strategy is {strategy}; "
        "write strategy: ddp, or write engine: trl" in engine
    )
    X.write_text(text.replace(both, "  use_peft: false\n"))
    (whole,) = problems()
    assert f"compute.strategy: is {strategy}, which trains adapters alone here; write ddp" in whole
    reward = text.replace(both, "").replace("method: dpo", "method: reward")
    X.write_text(re.sub("(?ms)^evaluate:.*?(?=^gates:)", "", reward).replace("evaluate.", "train.held_out."))
    assert any(
        f"compute.strategy: is {strategy}, which does not spread a reward model's head" in one for one in problems()
    )
