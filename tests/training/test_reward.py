"""A reward model: its head, its loss on prepared ids, its merge, and its scores as rewards of GRPO and RLOO."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from trained import read_prepared, train, write_prepared

from prefbuild.artifact import read_manifest, write_manifest
from prefbuild.errors import StageError, UsageError
from prefbuild.generate import generate
from prefbuild.rewards.model import Judge, ids_of, is_reward_model, make, scores
from prefbuild.stages import merge
from prefbuild.template import load_tokenizer


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_model, folder)
    write_manifest(folder, stage="model", name="tiny", inputs={})
    return folder


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Five held-out pairs in batches of two: the last one is half.
    return write_prepared(tmp_path_factory.mktemp("prepared") / "pairs", base, "pairs", train=6, held_out=5)


@pytest.fixture(scope="module")
def trained(base: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and metrics of a reward model; its adapter has a manifest."""
    folder = tmp_path_factory.mktemp("trained")
    metrics = train(folder, "reward", base, prepared, per_device_train_batch_size=2, center_rewards_coefficient=0.5)
    write_manifest(folder / "adapter", stage="train", name="test", inputs={"model": read_manifest(base)["digest"]})
    return folder, metrics


@pytest.fixture(scope="module")
def project(base: Path, trained: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the build of recipe `judge` left its model."""
    root = tmp_path_factory.mktemp("project")
    merged(root / "build/judge", base, trained[0] / "adapter")
    return root


def merged(folder: Path, base: Path, adapter: Path, limit: float = 0.1) -> dict[str, Any]:
    outputs = {"merged": folder / "merged", "metrics": folder / "merge.json"}
    inputs: dict[str, Any] = {"model": base, "adapter": adapter}
    merge.run({"merge": {"max_reward_difference": limit}}, inputs, outputs, folder, "judge")
    return dict(json.loads(outputs["metrics"].read_text()))


def rewards(model: Any, rows: list[dict[str, Any]], side: str) -> list[float]:
    """By a plain forward of each prompt and answer alone, so without padding."""
    import torch

    with torch.inference_mode():
        ids = [torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]]) for row in rows]
        return [model.eval()(input_ids=one).logits.item() for one in ids]


def pair_of(base: Path, adapter: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    whole.config.pad_token_id = load_tokenizer(base).pad_token_id
    return PeftModel.from_pretrained(whole, adapter)


def test_the_head_starts_from_the_seed_alone(base: Path) -> None:
    import torch

    first = make(base, 42, dtype=torch.float32)
    torch.rand(7)
    again, other = make(base, 42, dtype=torch.bfloat16), make(base, 43, dtype=torch.float32)
    assert torch.equal(first.score.weight.bfloat16(), again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert 0.01 < first.score.weight.std() < 0.03 and first.config.pad_token_id is not None


def test_what_is_measured_is_what_base_adapter_and_head_score(
    base: Path, prepared: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, metrics = trained
    rows = read_prepared(prepared, "held_out")
    pair = pair_of(base, folder / "adapter")
    both = list(zip(rewards(pair, rows, "chosen"), rewards(pair, rows, "rejected"), strict=True))
    margins = [chosen - rejected for chosen, rejected in both]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    centre = [0.5 * (chosen + rejected) ** 2 for chosen, rejected in both]
    found = metrics["held_out"]
    assert found["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 5)
    assert found["margin"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert found["loss"] == pytest.approx((sum(losses) + sum(centre)) / 5, abs=1e-5)
    assert metrics["min_reward"] <= metrics["mean_reward"] <= metrics["max_reward"]


def test_merged_is_a_reward_model_in_the_bases_number_format(base: Path, prepared: Path, project: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = project / "build/judge/merged"
    found = json.loads((project / "build/judge/merge.json").read_text())
    assert 0 < found["mean_reward_difference"] <= found["max_reward_difference"] < 0.01 and found["bytes"] > 1e6
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["score.weight"].shape == (1, 64) and "lm_head.weight" not in weights
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["pad_token_id"] == load_tokenizer(base).pad_token_id
    assert is_reward_model(folder) and not is_reward_model(base)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert whole.config.num_labels == 1
    rows = read_prepared(prepared)
    wanted = rewards(whole, rows, "chosen")
    assert scores(whole, [row["prompt_ids"] + row["chosen_ids"] for row in rows]) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(
        UsageError, match="merged: is a reward model, which writes nothing; `prefbuild reward judge --try`"
    ):
        generate(folder, "Hello?")


def test_a_merge_that_is_not_base_and_adapter_is_refused(
    base: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(
        StageError, match="a reward differs by .* which is over merge.max_reward_difference 1e-09. Store"
    ):
        merged(tmp_path / "tight", base, trained[0] / "adapter", limit=1e-9)
    adapter = tmp_path / "adapter"
    shutil.copytree(trained[0] / "adapter", adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: value * (1e-6 if "lora_B" in key else 1) for key, value in tensors.items()}, path)
    write_manifest(adapter, stage="train", name="test", inputs={"model": read_manifest(base)["digest"]})
    with pytest.raises(StageError, match="so what was trained is lost in rounding; train further, or store the base"):
        merged(tmp_path / "small", base, adapter)


def test_completions_are_scored_as_training_rendered_answers(
    base: Path, prepared: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, row = load_tokenizer(base), read_prepared(prepared)[2]
    question, answer = "Are 2 horses many? Say why. Say why.", "Yes, 2 horses are."
    asked = [[{"role": "user", "content": question}]] * 2
    ids = ids_of(tokenizer, asked, [answer, answer + "<|im_end|>"])  # type: ignore[arg-type]
    assert ids == [row["prompt_ids"] + row["chosen_ids"]] * 2  # an end of turn in the text would end it earlier
    thinking = load_tokenizer(base)
    thinking.chat_template = thinking.chat_template.replace("['content']", "['content'].split('</think>')[-1]")
    assert ids_of(thinking, asked, [answer, "So.</think>" + answer]) == [  # type: ignore[arg-type]
        ids[0],
        row["prompt_ids"] + tokenizer("So.</think>" + answer + "<|im_end|>\n")["input_ids"],
    ]
    monkeypatch.chdir(project)
    judge = Judge("judge")
    assert judge(asked[:1], [answer]) == pytest.approx(scores(judge.model, ids[:1]))  # type: ignore[arg-type]
    with pytest.raises(StageError, match="build/other/merged: holds no model; `prefbuild build other` makes it"):
        Judge("other")


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_reward_model_is_the_reward(
    method: str, base: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    asked: list[tuple[list[Any], list[str], list[float]]] = []
    call = Judge.__call__

    def spy(self: Judge, prompts: list[Any], completions: list[str]) -> list[float]:
        asked.append((prompts, completions, call(self, prompts, completions)))
        return asked[-1][-1]

    monkeypatch.setattr(Judge, "__call__", spy)
    prompts = write_prepared(tmp_path / "prompts", base, "prompts", train=4, held_out=2)
    options = {"max_completion_length": 8, "max_steps": 2}
    weighed = [{"reward": "model", "recipe": "judge", "weight": 2.0}]
    metrics = train(tmp_path / "trained", method, base, prompts, rewards=weighed, **options)
    before, *_, last, after = (sum(values) / len(values) for *_, values in asked)
    assert metrics["rewards"]["judge"] == pytest.approx(last, abs=1e-6)
    assert metrics["reward"] == pytest.approx(2 * last, abs=1e-6)
    assert metrics["step_0"]["rewards"]["judge"] == pytest.approx(before)
    assert metrics["held_out"]["rewards"]["judge"] == pytest.approx(after)
    assert asked[0][0] == [row["messages"] for row in read_prepared(prompts, "held_out")]
    assert metrics["reward_std"] > 0 and metrics["grad_norm"]["max"] > 0
