"""A plan in training: smaller micro-batches, layers computed again and a base left in 4 bits change rounding alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trained import read_prepared, run_in, write_prepared

from prefbuild.methods import DPO
from prefbuild.plan import CPU_TOKENS, PackedPlan
from prefbuild.training import packed, packed_model
from prefbuild.training.planned import plan_run

SETTINGS = {
    "method": "dpo", "engine": "packed", "precision": "float32", "max_steps": 2, "per_device_train_batch_size": 4,
    "learning_rate": 1e-3, "lora": {"r": 4}, "loss_type": ["sigmoid"],
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("rows") / "prepared", tiny_model, "pairs")


def trained(folder: Path, model: Path, prepared: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and adapter."""
    from safetensors.torch import load_file

    found = packed.train(DPO.model_validate({**SETTINGS, **settings}), run_in(folder, model, prepared))
    return found, load_file(folder / "adapter/adapter_model.safetensors")


def other_plan(monkeypatch: pytest.MonkeyPatch, **change: Any) -> list[PackedPlan]:
    """Have training plan otherwise; the plans that were changed are kept in the list."""
    plans: list[PackedPlan] = []

    def changed(*arguments: Any) -> PackedPlan:
        plans.append(plan_run(*arguments))
        return replace(plans[-1], **change)

    monkeypatch.setattr(packed, "plan_run", changed)
    return plans


def test_on_a_cpu_a_micro_batch_is_a_step_up_to_a_bound(tiny_model: Path, prepared: Path) -> None:
    settings = DPO.model_validate(SETTINGS)
    sizes = [
        tuple(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in read_prepared(prepared)
    ]
    found = plan_run(settings, tiny_model, [sizes[:4], sizes[4:8]], False)
    assert found.token_budget == max(sum(map(sum, sizes[:4])), sum(map(sum, sizes[4:8])))
    assert not found.checkpointing
    assert plan_run(settings, tiny_model, [sizes * 500], False).token_budget == CPU_TOKENS


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"token_budget": 1}])
def test_a_plan_changes_rounding_alone(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    import torch
    import transformers.modeling_utils

    plain, adapter = trained(tmp_path / "plain", tiny_model, prepared)
    calls: list[int] = []
    if change.get("checkpointing"):
        again = transformers.modeling_utils.checkpoint
        monkeypatch.setattr(
            transformers.modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or again(*a, **k)
        )
    plans = other_plan(monkeypatch, **change)
    other, other_adapter = trained(tmp_path / "other", tiny_model, prepared)
    assert plans[0].micro_batches == 1 and not plans[0].checkpointing
    assert bool(calls) == bool(change.get("checkpointing"))
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    for name, value in adapter.items():
        torch.testing.assert_close(other_adapter[name], value, rtol=1e-3, atol=1e-4)


def test_a_base_that_stays_in_four_bits_gives_the_same_gradients(tiny_model: Path, prepared: Path) -> None:
    """In training mode: a CPU's bitsandbytes packs weights anew, in bf16, where a model only scores."""
    import torch
    from peft import get_peft_model

    from prefbuild.training.common import lora_config
    from prefbuild.training.fused import fuse

    settings = DPO.model_validate({**SETTINGS, "quantization": "nf4"})
    rows: list[Any] = read_prepared(prepared)[:2]
    found = []
    for dequantised in (True, False):
        model = packed_model.load_model(settings, tiny_model, False, dequantised=dequantised).train()
        torch.manual_seed(0)
        model = get_peft_model(model, lora_config(settings))
        assert bool(fuse(model)) == dequantised
        scores, _ = packed_model.score_rows(model, rows)
        scores.log_probs.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((scores.log_probs.detach(), gradients))
    (once, of_once), (each, of_each) = found
    torch.testing.assert_close(each, once)
    assert of_once and set(of_once) == set(of_each)
    for name, gradient in of_once.items():
        torch.testing.assert_close(of_each[name], gradient, rtol=1e-4, atol=1e-5)
