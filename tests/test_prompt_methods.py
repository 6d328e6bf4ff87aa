"""What is said of settings of GRPO, RLOO and rewards that can't be meant."""

from pathlib import Path

import pytest

from prefbuild.errors import RecipeError
from prefbuild.methods import (
    METHODS,
    PromptOptions,
    reward_columns,
    reward_files,
    train_metrics,
    train_settings,
    with_engine,
)
from prefbuild.recipe import Defaults, load_recipe

RECIPE = """\
base: {source: file, path: models/tiny}
data: {sources: [{source: file, path: rows.jsonl}], held_out: 0.1}
evaluate: {tasks: [{task: recipes/sums.yaml}]}
gates: [{metric: GATE, max: 1.0}]
train:
  method: METHOD
  rewards:
    - reward: numeric
      column: answer
    - REWARD
  SETTING
"""


def write(
    folder: Path,
    *,
    method: str = "grpo",
    reward: str = "reward: repetition",
    setting: str = "",
    gate: str = "train.entropy",
) -> Path:
    text = RECIPE.replace("METHOD", method).replace("REWARD", reward.replace("\n", "\n      "))
    path = folder / "first.yaml"
    path.write_text(text.replace("SETTING", setting.replace("\n", "\n  ")).replace("GATE", gate))
    return path


@pytest.mark.parametrize(
    ("method", "reward", "message"),
    [
        (
            "grpo",
            "reward: recipes/own.py",
            "10: train.rewards[1].reward: 'recipes/own.py' is a file; write reward: file, path: recipes/own.py and the "
            "name of its function",
        ),
        (
            "grpo",
            "reward: lenght\ntarget: 3",
            "10: train.rewards[1].reward: 'lenght' is not known; did you mean length?",
        ),
        ("rloo", "reward: length", "10: train.rewards[1].target: missing; required: The length wanted"),
        (
            "rloo",
            "reward: regex\npattern: (",
            "11: train.rewards[1].pattern: '(' is not a regular expression of Python's",
        ),
        (
            "grpo",
            "reward: format\npattern: a+",
            "11: train.rewards[1].pattern: 'a+' names no part; write (?P<answer>.*)",
        ),
        ("grpo", "reward: numeric\ncolumn: b", "7: train.rewards: 2 of them are called numeric; give each a `name`"),
        ("grpo", "reward: language", "10: train.rewards[1].script: missing, and so is alphabet; give one of them"),
        (
            "grpo",
            "reward: language\nscript: latin\nalphabet: abc",
            "11: train.rewards[1].script: says what letters count, and so does alphabet; give one of them",
        ),
        (
            "grpo",
            "reward: file\npath: ../own.py\nfunction: f",
            "11: train.rewards[1].path: '../own.py' is no .py file below recipes/",
        ),
        (
            "grpo",
            "reward: file\npath: recipes/own.py\nfunction: f\ncolumns: [prompts]",
            "13: train.rewards[1].columns: 'prompts' can't be an argument of a function; rename the column in the data",
        ),
    ],
)
def test_a_reward_that_can_not_be_meant(tmp_path: Path, method: str, reward: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, method=method, reward=reward), Defaults())
    assert f"first.yaml:{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        (
            "grpo",
            "num_generations: 6\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 4",
            "num_generations: is 6, which does not divide the 32 completions of a step (per_device_train_batch_size 8 x "
            "gradient_accumulation_steps 4); give 4 or 8, or per_device_train_batch_size 9",
        ),
        (
            "rloo",
            "per_device_train_batch_size: 1",
            "num_generations: is 2, which does not divide the 1 completions of a step (per_device_train_batch_size 1 x "
            "gradient_accumulation_steps 1); give per_device_train_batch_size 2",
        ),
        ("grpo", "num_generations: 1", "num_generations: is 1; at least 2 is wanted"),
        ("grpo", "loss_type: gropo", "loss_type: 'gropo' is not known; did you mean grpo?"),
        ("grpo", "loss_type: luspo", "importance_sampling_level: is token, but luspo is for ratios of sequences"),
        (
            "grpo",
            "importance_sampling_level: sequence",
            "importance_sampling_level: is sequence, which dapo weighs by length; write loss_type: grpo for GSPO",
        ),
        (
            "grpo",
            "use_bias_correction_kl: false",
            "use_bias_correction_kl: says nothing with beta 0, where there is no KL",
        ),
        ("grpo", "max_prompt_length: 9", "max_prompt_length: unknown key; it belongs in data"),
        ("grpo", "normalize_advantages: true", "normalize_advantages: does not go with this"),
        ("grpo", "rollout: {engine: grpah}", "rollout.engine: 'grpah' is not known; did you mean graph?"),
        (
            "rloo",
            "rollout: {engine: graph}\nlora: {use_dora: true}",
            "rollout: is graph, which merges adapters as LoRA has them; leave out use_dora, or write engine: hf",
        ),
        ("rloo", "reward_clip_range: [3, 1]", "reward_clip_range: is [3, 1]; the lower bound goes first"),
    ],
)
def test_a_setting_that_can_not_be_meant(tmp_path: Path, method: str, setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, method=method, setting=setting), Defaults())
    assert f"train.{message}" in str(caught.value)


def test_a_gate_can_ask_for_a_recipes_own_rewards(tmp_path: Path) -> None:
    for gate in (
        "train.rewards.mine",
        "train.held_out.rewards.mine",
        "train.held_out.reward",
        "train.completions.clipped_ratio",
    ):
        load_recipe(write(tmp_path, reward="reward: repetition\nname: mine", gate=gate), Defaults())
    with pytest.raises(RecipeError, match=r"'train.rewards.mime' is no metric; did you mean train.rewards.mine\?"):
        load_recipe(write(tmp_path, reward="reward: repetition\nname: mine", gate="train.rewards.mime"), Defaults())


def test_columns_files_and_metrics_are_those_of_the_rewards(tmp_path: Path) -> None:
    own = "reward: file\npath: recipes/own.py\nfunction: score\ncolumns: [level]"
    train = load_recipe(write(tmp_path, reward=own), Defaults()).train
    assert (reward_columns(train), reward_files(train)) == (["answer", "level"], ["recipes/own.py"])
    assert {"rewards.numeric", "rewards.score", "step_0.rewards.score"} <= set(train_metrics(train))


@pytest.mark.parametrize("method", [name for name, options in METHODS.items() if issubclass(options, PromptOptions)])
def test_a_section_of_train_is_read_as_it_was_written(tmp_path: Path, method: str) -> None:
    train = load_recipe(write(tmp_path, method=method), Defaults()).train
    assert METHODS[method].model_validate(train.model_dump(mode="json", by_alias=True)) == train


def test_graphs_write_completions_where_they_can(tmp_path: Path) -> None:
    def engine(setting: str, strategy: str | None = None) -> str:
        train = with_engine(load_recipe(write(tmp_path, setting=setting), Defaults()).train, strategy)
        return train_settings(train).get("rollout", {"engine": "hf"})["engine"]

    assert engine("") == engine("", "ddp") == "graph"
    assert engine("", "fsdp") == engine("lora: {use_dora: true}") == engine("rollout: {engine: hf}") == "hf"
    assert engine("rollout: {engine: vllm}", "fsdp") == "vllm"
    text = write(tmp_path, setting="rollout: {engine: graph}").read_text() + "compute: {gpus: 2, strategy: fsdp}\n"
    (tmp_path / "first.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=r"train.rollout: is graph, which needs all weights on each GPU, and compute."
    ):
        load_recipe(tmp_path / "first.yaml", Defaults())
