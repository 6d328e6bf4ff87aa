"""DPO itself, on a tiny model: QLoRA, losses and their weights, the reference, and runs that are ended early."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from project import write_rows
from pydantic import ValidationError
from trained import run_in

from prefbuild.errors import StageError
from prefbuild.methods import DPO, StopRule, train_settings, with_engine
from prefbuild.strict import Wrong
from prefbuild.template import load_tokenizer, render_prompt
from prefbuild.training import trainer
from prefbuild.training.reference import check_reference

Train = Callable[..., dict[str, Any]]
SIX_STEPS = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of bare and wordy sums, as prepare writes them."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = load_tokenizer(tiny_model)
    write_rows(folder / "rows.jsonl", 12)
    lines = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = {"prompt": render_prompt(tokenizer, [{"role": "user", "content": row["question"]}])}
        texts |= {part: f"{row[part]}<|im_end|>\n" for part in ("chosen", "rejected")}
        ids = {f"{part}_ids": tokenizer(text, add_special_tokens=False)["input_ids"] for part, text in texts.items()}
        lines.append(json.dumps({**texts, **ids}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "held_out.jsonl").write_text("")
    return folder


def run(tiny_model: Path, prepared: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    plain = {"method": "dpo", "max_steps": 2, "per_device_train_batch_size": 2, "precision": "float32"}
    base = {"name": "me/tiny", "revision": "sha256:0"}
    return trainer("dpo")(DPO.model_validate(plain | settings), run_in(folder, tiny_model, prepared, base=base))


@pytest.fixture
def train(tiny_model: Path, prepared: Path, tmp_path: Path) -> Train:
    """Train two steps on the tiny model, or as `settings` say; the adapter is in tmp_path / "adapter"."""
    return partial(run, tiny_model, prepared, tmp_path)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps that move far enough for settings to differ."""
    return run(tiny_model, prepared, tmp_path_factory.mktemp("plain"), **SIX_STEPS)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_qlora_trains_on_four_bits_and_its_adapter_fits_the_plain_base(
    train: Train, tiny_model: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    seen: dict[str, Any] = {}
    started = DPOTrainer.__init__

    def look(self: Any, *arguments: Any, **named: Any) -> None:
        started(self, *arguments, **named)
        layers = dict(self.model.base_model.model.named_modules())
        four_bit = [layer for layer in layers.values() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
        seen.update(layers=layers, states=[layer.weight.quant_state for layer in four_bit], four_bit=four_bit)
        seen["trained"] = {p.dtype for p in self.model.parameters() if p.requires_grad}

    monkeypatch.setattr(DPOTrainer, "__init__", look)
    metrics = train(quantization="nf4", precision=precision, gradient_checkpointing=True, learning_rate=1e-3)
    assert len(seen["four_bit"]) == 2 * 7  # q, k, v, o, gate, up and down of two layers
    assert {(state.quant_type, state.nested) for state in seen["states"]} == {("nf4", False)}
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {layer.compute_dtype for layer in seen["four_bit"]} == {compute}
    assert not isinstance(seen["layers"]["lm_head"], bitsandbytes.nn.Linear4bit)
    assert seen["trained"] == {torch.bfloat16}
    assert metrics["step_0"]["margins"] == 0 and metrics["steps"] == 2 and metrics["grad_norm"]["max"] > 0

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert not [key for key, value in config.items() if value and ("bnb" in key or "quant" in key or "loftq" in key)]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    pair = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), pair.disable_adapter():
        without = pair(ids).logits
    with torch.inference_mode():
        assert not torch.equal(pair(ids).logits, without)
        merged = pair(ids).logits
        assert torch.allclose(pair.merge_and_unload(safe_merge=True)(ids).logits, merged, atol=1e-4)


def test_a_killed_qlora_run_goes_on_to_the_same_bytes(train: Train, tmp_path: Path) -> None:
    settings = SIX_STEPS | {"quantization": "nf4", "save_steps": 4}
    whole = train(**settings)
    adapter = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "work/checkpoint-6")
    again = train(**settings)
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == adapter
    assert again["loss"] == whole["loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"warmup_steps": 0.9, "lr_scheduler_type": "constant_with_warmup"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_each_option_changes_what_is_learned(train: Train, plain: dict[str, Any], settings: dict[str, Any]) -> None:
    metrics = train(**SIX_STEPS | settings)
    assert metrics["step_0"]["margins"] == 0 and plain["loss"] < metrics["step_0"]["loss"]
    assert metrics["loss"] != pytest.approx(plain["loss"], abs=1e-4)


def test_the_first_loss_is_ln_2_a_loss_by_its_weight(train: Train) -> None:
    metrics = train(loss_type=["sigmoid", "robust"], loss_weights=[1.0, 0.5], max_steps=1)
    assert metrics["step_0"] == {"loss": pytest.approx(1.5 * math.log(2), abs=1e-4), "margins": 0}


def test_dropout_of_the_adapter_leaves_the_reference_alone(train: Train) -> None:
    metrics = train(disable_dropout=False, lora={"lora_dropout": 0.5}, max_steps=1)
    assert metrics["step_0"]["margins"] == 0


def test_a_reference_that_is_not_the_base_ends_the_run_at_its_first_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraLayer

    # An adapter that changes the model from the start, as one that was trained before would.
    reset = LoraLayer.reset_lora_parameters

    def start_elsewhere(self: Any, *arguments: Any) -> None:
        reset(self, *arguments)
        for layer in self.lora_B.values():
            layer.weight.data.fill_(1.0)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", start_elsewhere)
    with pytest.raises(StageError, match="step 1 has rewards of .* before any update, where all must be 0"):
        train(max_steps=2)


SIGMOID = {"method": "dpo"}


@pytest.mark.parametrize(
    ("settings", "first", "said"),
    [
        (SIGMOID, (0.0, 0.0, math.log(2)), None),
        (SIGMOID, (0.01, -0.01, math.log(2)), None),
        (SIGMOID, (0.03, 0.03, math.log(2)), r"rewards of 0.03 \(chosen\) and 0.03 \(rejected\) before any update"),
        (SIGMOID, (0.0, -0.03, math.log(2)), r"rewards of 0 \(chosen\) and -0.03 \(rejected\) before any update"),
        (SIGMOID | {"beta": 0.5}, (0.0, -0.03, math.log(2)), None),
        (SIGMOID, (0.0, 0.0, 0.8), "a loss of 0.8 before any update.* must be 0.6931"),
        (SIGMOID | {"use_weighting": True}, (0.0, 0.0, 0.1), None),
        (SIGMOID | {"loss_type": ["sigmoid", "sft"]}, (0.0, 0.0, 3.0), None),
        (SIGMOID | {"loss_type": ["hinge"]}, (0.5, 0.0, 1.0), "rewards of 0.5"),
        (SIGMOID | {"disable_dropout": False}, (0.5, 0.0, 1.0), None),
    ],
)
def test_what_the_first_step_must_show(
    settings: dict[str, Any], first: tuple[float, float, float], said: str | None
) -> None:
    chosen, rejected, loss = first
    logged = {"rewards/chosen": chosen, "rewards/rejected": rejected, "loss": loss}
    if said is None:
        check_reference(DPO.model_validate(settings), logged)
    else:
        with pytest.raises(StageError, match=said):
            check_reference(DPO.model_validate(settings), logged)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"label_smoothing": 0.1},
            "label_smoothing: changes nothing in sigmoid; TRL smooths aot, aot_unpaired, exo_pair, robust",
        ),
        ({"use_weighting": True, "loss_type": ["sigmoid", "aot"]}, "use_weighting: has no meaning for aot"),
        (
            {"f_divergence_type": "forward_kl", "loss_type": ["apo_zero"]},
            "f_divergence_type: must be reverse_kl for apo_zero",
        ),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef: says nothing without f_divergence_type: alpha_div",
        ),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        (
            {"engine": "packed", "use_weighting": True},
            "engine: is packed, which has no weights by how likely the model finds a pair; leave out use_weighting, or "
            "write engine: trl",
        ),
        (
            {"engine": "packed", "disable_dropout": False, "lora": {"lora_dropout": 0.1}},
            "engine: is packed, which computes without dropout; leave out disable_dropout: false, or write engine: trl",
        ),
        ({"warmup_steps": 1.5}, "warmup_steps: is 1.5; give whole steps without a point, or a fraction of all below 1"),
        ({"stop_if": [{"metric": "loss"}]}, "stops nothing; give below or above"),
        ({"stop_if": [{"metric": "loss", "below": 2.0, "above": 1.0}]}, "stops every run; swap them"),
        ({"stop_if": [{"metric": "rewards/margins", "below": 0.0}]}, "stop_if.0.metric"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_trl_would_ignore_or_refuse_late_are_errors(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DPO.model_validate({"method": "dpo", **settings})
    (error,) = [one for one in caught.value.errors() if one["type"] != "float_type"]
    wrong = error.get("ctx", {}).get("error")
    where = wrong.key if isinstance(wrong, Wrong) else ".".join(map(str, error["loc"]))
    assert said in f"{where}: {error['msg'].removeprefix('Value error, ')}"


@pytest.mark.parametrize(
    ("settings", "strategy", "engine"),
    [
        ({}, None, "packed"),
        ({}, "ddp", "packed"),
        ({}, "fsdp", "trl"),
        ({}, "zero3", "trl"),
        ({"engine": "trl"}, None, "trl"),
        ({"engine": "packed"}, None, "packed"),
        ({"use_weighting": True}, None, "trl"),
        ({"lora": {"lora_dropout": 0.1}}, None, "packed"),
        ({"disable_dropout": False}, None, "packed"),
        ({"disable_dropout": False, "lora": {"lora_dropout": 0.1}}, None, "trl"),
        ({"use_peft": False, "loss_type": ["aot"]}, None, "packed"),
    ],
)
def test_the_packed_engine_is_the_default_where_it_applies(
    settings: dict[str, Any], strategy: str | None, engine: str
) -> None:
    chosen = with_engine(DPO.model_validate({"method": "dpo", **settings}), strategy)
    assert chosen.engine == engine
    assert train_settings(chosen).get("engine") == ("packed" if engine == "packed" else None)


# ---- runs that are ended early


def test_a_rule_ends_the_run_and_the_adapter_is_what_it_was_then(train: Train, tmp_path: Path) -> None:
    rule = {"metric": "rewards.margins", "above": 0.001, "for": 2}
    metrics = train(**SIX_STEPS, stop_if=[{"metric": "loss", "above": 10.0}, rule], save_steps=1)
    stopped_at = metrics["steps"]
    assert 3 <= stopped_at < 6
    assert metrics["stopped"] == {"step": stopped_at, "rule": "rewards.margins above 0.001 for 2 points"}
    assert metrics["stopped_early"] == 1
    assert metrics["rewards"]["margins"] > 0.001 and (tmp_path / "adapter/adapter_model.safetensors").exists()
    # No checkpoint from which a killed run would go on past the stop, and the run that goes on stops there again.
    steps = sorted(int(folder.name.partition("-")[2]) for folder in (tmp_path / "work").glob("checkpoint-*"))
    assert steps == [stopped_at - 2, stopped_at - 1]
    adapter = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    again = train(**SIX_STEPS, stop_if=[rule], save_steps=1)
    assert again["stopped"] == metrics["stopped"] and again["steps"] == stopped_at
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == adapter


def test_a_run_that_breaks_no_rule_says_so(train: Train) -> None:
    metrics = train(stop_if=[{"metric": "loss", "above": 10.0}, {"metric": "grad_norm", "above": 0.0, "for": 3}])
    assert metrics["stopped"] is None and metrics["stopped_early"] == 0 and metrics["steps"] == 2


def test_a_rule_on_a_metric_that_never_comes_is_an_error_that_lists_those_there_are(train: Train) -> None:
    said = r"train.stop_if: rewards.margin is not logged; there are entropy, .*loss, .*rewards.margins"
    with pytest.raises(StageError, match=said):
        train(stop_if=[{"metric": "rewards.margin", "below": -1.0}], max_steps=6)


def test_a_loss_that_is_no_number_ends_the_run_at_once(train: Train, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"the loss became (nan|inf); lower train.learning_rate \(now 1e\+30\)"):
        train(learning_rate=1e30, max_steps=1000)


def test_a_rule_in_words() -> None:
    rule = StopRule.model_validate({"metric": "kl", "below": -1, "above": 2.5, "for": 5})
    assert str(rule) == "kl below -1 or above 2.5 for 5 points"
    assert [rule.broken_by(value) for value in (-1.1, -1, 0, 2.5, 2.6)] == [True, False, False, False, True]
