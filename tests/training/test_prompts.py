"""GRPO and RLOO on a tiny model: prompts as prepared, rewards that rise, and runs that go on where they were killed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trained import run_in

from prefbuild.errors import StageError
from prefbuild.methods import METHODS
from prefbuild.template import load_tokenizer, render_prompt, tokenize
from prefbuild.training import trainer

BASE = {"name": "tiny", "revision": "sha256:0"}


def write_prepared(folder: Path, model: Path, train: int, held_out: int) -> Path:
    """Prompts in the form that `prepare` writes."""
    tokenizer = load_tokenizer(model)
    folder.mkdir(parents=True)
    rows = []
    for number in range(train + held_out):
        messages = [{"role": "user", "content": f"Say {number}."}]
        text = render_prompt(tokenizer, messages)
        ids = tokenize(tokenizer, [text])[0]
        columns = {"answer": str(number)}
        rows.append({"id": f"0:{number}", "prompt": text, "prompt_ids": ids, "messages": messages, "columns": columns})
    for name, part in (("train", rows[:train]), ("held_out", rows[train:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def settings(method: str, **own: Any) -> Any:
    return METHODS[method].model_validate(
        {
            "method": method,
            "rewards": [{"reward": "length", "target": 10}],
            "num_generations": 4,
            "max_completion_length": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_steps": 3,
            "lr_scheduler_type": "constant",
            "precision": "float32",
            **({"lora": {"r": 4}} if own.get("use_peft", True) else {}),
            **own,
        }
    )


def run(folder: Path, model: Path, prepared: Path, options: Any, work: Path | None = None) -> dict[str, Any]:
    where = run_in(folder, model, prepared, seed=1, base=BASE, work=work or folder / "work")
    return trainer(options.method)(options, where)


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "prepared", tiny_model, train=5, held_out=3)


@pytest.mark.parametrize(
    ("method", "own", "kept"),
    [
        ("grpo", {}, 3),
        ("grpo", {"num_iterations": 2, "beta": 0.1, "max_steps": 6}, 4),  # not 3, between two generations
        ("rloo", {}, 3),
        ("grpo", {"rollout": {"engine": "graph"}, "num_iterations": 2, "max_steps": 6, "temperature": 0.8}, 4),
        ("rloo", {"rollout": {"engine": "graph"}, "use_peft": False, "learning_rate": 1e-4}, 3),
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    tmp_path: Path, tiny_model: Path, prepared: Path, method: str, own: dict[str, Any], kept: int
) -> None:
    options = settings(method, **own)
    whole = run(tmp_path / "whole", tiny_model, prepared, options)
    assert whole["steps"] == options.max_steps and whole["grad_norm"]["max"] > 0 and whole["reward_std"] > 0
    # Two steps are an epoch, so it goes on in the second one.
    shutil.copytree(tmp_path / f"whole/work/checkpoint-{kept}", tmp_path / f"killed/work/checkpoint-{kept}")
    killed = run(tmp_path / "killed", tiny_model, prepared, options)
    weights = "adapter_model.safetensors" if options.use_peft else "model.safetensors"
    first, second = (tmp_path / name / "adapter" / weights for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()
    for metrics in (whole, killed):
        del metrics["seconds"], metrics["mean_loss"]
    assert whole == killed


def test_rewards_rise_on_completions_of_the_prepared_ids(
    tmp_path: Path, tiny_model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    generate, seen = GRPOTrainer._generate_single_turn, []

    def spy(self: Any, prompt_ids: list[list[int]], *rest: Any) -> Any:
        seen.extend(prompt_ids)
        return generate(self, prompt_ids, *rest)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", spy)
    rows = [json.loads(line) for line in (prepared / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"][2:]  # not what the text would be tokenised to
    changed = shutil.copytree(prepared, tmp_path / "prepared")
    (changed / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = settings(
        "grpo",
        rewards=[{"reward": "length", "target": 8}],
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_completion_length=4,
        top_k=8,  # an untrained model finds all tokens equally likely
        max_steps=12,
    )
    metrics = run(tmp_path, tiny_model, changed, options)
    curve = (tmp_path / "live/plots/metrics/train/reward.tsv").read_text().split()[2:]
    rewards = [float(value) for value in curve[1::2]]
    assert len(rewards) == 12
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 4
    assert {tuple(ids) for ids in seen} == {tuple(row["prompt_ids"]) for row in rows}
    assert metrics["reward"] == metrics["rewards"]["length"] == pytest.approx(rewards[-1])


FILE = """\
def score(prompts, completions, answer):
    if fail:
        raise KeyError("no such thing")
    for prompt, number in zip(prompts, answer):
        assert prompt == [{"role": "user", "content": f"Say {number}."}]
    return [float(number) for number in answer]
"""


def test_rewards_are_weighed_summed_and_given_columns(
    tmp_path: Path, tiny_model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"reward": "file", "path": "recipes/own.py", "function": "score", "columns": ["answer"], "weight": 10.0}
    never = {"reward": "regex", "pattern": "never", "name": "says_never"}
    options = settings("grpo", rewards=[own, never], max_steps=1)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own.py").write_text("fail = False\n" + FILE)
    metrics = run(tmp_path, tiny_model, prepared, options)
    assert metrics["frac_reward_zero_std"] == 1, "a column is of the prompt, so its group has one reward"
    assert metrics["rewards"]["says_never"] == 0 and metrics["reward"] == 10 * metrics["rewards"]["score"] > 0
    # Prompts 5, 6 and 7 are held out.
    assert metrics["held_out"]["rewards"] == metrics["step_0"]["rewards"] == {"score": 6.0, "says_never": 0.0}
    assert metrics["held_out"]["reward"] == 60.0

    (tmp_path / "recipes/own.py").write_text("fail = True\n" + FILE)
    with pytest.raises(StageError, match=r"^recipes/own.py:4: score: KeyError: 'no such thing'$"):
        run(tmp_path / "again", tiny_model, prepared, options)


def test_too_few_prompts_for_a_step_are_an_error(tmp_path: Path, tiny_model: Path, prepared: Path) -> None:
    options = settings("grpo", per_device_train_batch_size=24, gradient_accumulation_steps=1)
    message = (
        r"^a step takes 6 prompts \(24 completions, 4 a prompt\), and there are 5 to train on; lower train.per_dev"
    )
    with pytest.raises(StageError, match=message):
        run(tmp_path, tiny_model, prepared, options)


def test_a_completion_ends_with_its_first_stop_token() -> None:
    from prefbuild.training.prompts import _until

    assert _until({2}, [5, 2, 0, 0]) == [5, 2]
    assert _until({2}, [5, 6]) == [5, 6]


@pytest.mark.parametrize(("method", "engine"), [("grpo", "hf"), ("rloo", "hf"), ("grpo", "graph")])
def test_a_base_in_four_bits_is_trained_on_and_ended_by_a_rule(
    tmp_path: Path, tiny_model: Path, prepared: Path, method: str, engine: str
) -> None:
    rule = {"metric": "completions.mean_length", "above": 0.0, "for": 2}
    options = settings(method, quantization="nf4", rollout={"engine": engine}, stop_if=[rule])
    metrics = run(tmp_path, tiny_model, prepared, options)
    assert metrics["steps"] == 2 and metrics["stopped_early"] == 1
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
