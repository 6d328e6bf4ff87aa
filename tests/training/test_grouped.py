"""Completions that share their prompts are scored as TRL scores them padded: same losses, same gradients."""

from pathlib import Path
from typing import Any

import pytest
from trained import train, write_prepared

LOSSES = [
    ("grpo", {"loss_type": "dapo"}),
    ("grpo", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "top_entropy_quantile": 0.5}),
    ("grpo", {"loss_type": "bnpo", "mask_truncated_completions": True, "temperature": 0.7}),
    ("grpo", {"loss_type": "cispo", "delta": 2.0, "scale_rewards": "none"}),
    ("rloo", {"beta": 0.05, "num_iterations": 2}),
]


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "prepared", tiny_model, "prompts", train=4, held_out=0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines write the same completions, of different lengths, some of which end."""
    from trl import GRPOTrainer, RLOOTrainer

    from prefbuild.training.rollout import Rollout

    def write(prompts: list[list[int]], step: int) -> list[list[int]]:
        made = []
        for number, prompt in enumerate(prompts):
            ids = [(token * (number + 3) + step) % 997 + 10 for token in prompt[: 1 + (5 * number + step) % 7]]
            made.append([*ids, 2] if number % 2 else ids)
        return made

    def generate(self: Any, prompt_ids: list[list[int]], *others: Any) -> Any:
        completions = write(prompt_ids, self.state.global_step)
        return (completions, None) if isinstance(self, GRPOTrainer) else completions

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(Rollout, "complete", lambda self, prompts, sampling, step=0: write(prompts, step))


@pytest.mark.parametrize(("method", "own"), LOSSES)
def test_a_training_is_trls(
    tmp_path: Path, tiny_model: Path, prepared: Path, written: None, method: str, own: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    # Plain SGD, so that the adapter is the sum of the gradients. A micro-batch has parts of several groups.
    options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 4, "num_generations": 4, **own}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found = {}
    for engine in ("hf", "graph"):
        folder = tmp_path / engine
        metrics = train(folder, method, tiny_model, prepared, rollout={"engine": engine}, **options)
        del metrics["seconds"]
        found[engine] = metrics, load_file(folder / "adapter/adapter_model.safetensors")
    (theirs, their_weights), (ours, our_weights) = found["hf"], found["graph"]
    assert flat(ours) == pytest.approx(flat(theirs), rel=1e-4, abs=1e-6)
    assert theirs["grad_norm"]["max"] > 0
    for name, weight in their_weights.items():
        assert (our_weights[name] - weight).norm() <= 1e-4 * weight.norm(), name


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers by their path."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def test_no_completion_feels_another(tiny_model: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from prefbuild.training.grouped import GroupedScores

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    scores = GroupedScores(model, temperature=1.0, bf16=False, largest_group=3, longest=20, capture=False)
    scores.step = 16  # as where it is captured: filled up
    prompts: list[Any] = [[5, 6, 7], [8, 9], [5, 6, 7]]
    alone, _ = scores.score(prompts[:1], [[11, 12]], 4)
    before, _ = scores.score(prompts, [[11, 12], [13], [14, 15, 16]], 4)
    after, _ = scores.score(prompts, [[11, 12], [99, 98, 97, 96], [21]], 4)
    assert torch.equal(before[0], after[0]) and torch.allclose(before[0], alone[0], atol=1e-5)
    assert before[0, 2:].eq(0).all() and (before[1, 0] - after[1, 0]).abs() > 1e-3


@pytest.mark.gpu
def test_what_is_captured_has_the_gradients_of_what_is_not(smollm2: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from prefbuild.training.grouped import GroupedScores

    prompts: list[Any] = [list(range(10 + 200 * (row // 4), 300 + 100 * (row // 4))) for row in range(8)]
    completions = [list(range(500 + row, 540 + 3 * row)) for row in range(8)]
    weight = torch.linspace(-1, 1, 8 * 64, device="cuda").view(8, 64)
    found = {}
    for capture in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).to("cuda")
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        scores = GroupedScores(model, temperature=0.9, bf16=True, largest_group=4, longest=600, capture=capture)
        for _ in range(3):  # captured, replayed, and added to what is there
            log_probs, entropies = scores.score(prompts, completions, 64)
            (log_probs * weight).sum().backward()
            with torch.no_grad():
                torch._foreach_mul_(scores.trained, 1.1)  # as an optimizer changes them
        gradients = torch.cat([one.grad.flatten() for one in scores.trained])  # type: ignore[union-attr]
        found[capture] = log_probs.detach(), entropies, gradients
    for captured, plain in zip(found[True], found[False], strict=True):
        assert (captured - plain).norm() <= 1e-2 * plain.norm() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_two_trainings_with_graphs_leave_the_same_bytes(tmp_path: Path, smollm2: Path, method: str) -> None:
    rows = write_prepared(tmp_path / "prepared", smollm2, "prompts")
    options: dict[str, Any] = {"precision": "bf16", "deterministic": True, "rollout": {"engine": "graph"}, "beta": 0.05}
    for name in ("one", "two"):
        train(tmp_path / name, method, smollm2, rows, **options)
    first, second = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
