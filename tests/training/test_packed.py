"""The packed engine beside TRL's: the same scores, gradients and curves; and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from trained import answer_log_probs, digest, read_prepared, run_in, train, write_prepared

from prefbuild.errors import StageError
from prefbuild.methods import DPO
from prefbuild.training import packed_pairs
from prefbuild.training.packing import into_bins, pack
from prefbuild.training.prepared import rows_of_a_run, steps_of_a_run

EIGHT_STEPS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "save_steps": 8,
}
RATES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs: the last step of an epoch has micro-batches of four and one. Five are held out."""
    return write_prepared(tmp_path_factory.mktemp("rows") / "prepared", tiny_model, "pairs", train=21, held_out=5)


def curve(folder: Path, step: int = 8) -> list[dict[str, float]]:
    state = json.loads((folder / f"work/checkpoint-{step}/trainer_state.json").read_text())
    return [{key: value for key, value in point.items() if key not in RATES} for point in state["log_history"]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5, "logging_steps": 3},
        {"loss_type": ["ipo"], "lora": {"r": 4, "use_dora": True}},
        {"use_peft": False, "learning_rate": 1e-3, "f_divergence_type": "js_divergence"},
    ],
    ids=["sigmoid", "batchwise", "dora", "full"],
)
def test_both_engines_train_alike(settings: dict[str, Any], prepared: Path, tiny_model: Path, tmp_path: Path) -> None:
    found, points = {}, {}
    for engine in ("trl", "packed"):
        # The third has the epoch's last, smaller micro-batches; the fourth is of the next epoch.
        asked = EIGHT_STEPS | {"max_steps": 4, "save_steps": 4} | settings | {"engine": engine}
        found[engine] = train(tmp_path / engine, "dpo", tiny_model, prepared, **asked)
        points[engine] = curve(tmp_path / engine, 4)
    assert [point["step"] for point in points["trl"]] == ([1, 3] if "logging_steps" in settings else [1, 2, 3, 4])
    assert points["trl"][-1]["loss"] < points["trl"][0]["loss"]
    for theirs, ours in zip(points["trl"], points["packed"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Of entropies and logits TRL logs means of micro-batches' means, which weigh tokens by their batch.
            loose = key.startswith(("entropy", "logits", "mean_token_accuracy", "epoch"))
            assert ours[key] == pytest.approx(value, rel=0.1 if loose else 2e-4, abs=0.1 if loose else 2e-5), key
    for part in ("rewards", "logps", "step_0"):
        assert found["packed"][part] == pytest.approx(found["trl"][part], rel=1e-3, abs=1e-4)
    held_out = {engine: {**metrics["held_out"], **metrics["held_out"]["rewards"]} for engine, metrics in found.items()}
    for key in ("loss", "chosen", "rejected", "margins", "accuracies"):
        assert held_out["packed"][key] == pytest.approx(held_out["trl"][key], rel=1e-3, abs=1e-4), key


def test_a_pair_scores_as_its_answers_do_alone_and_feels_no_other(tiny_model: Path, prepared: Path) -> None:
    import torch

    from prefbuild.training.packed_model import load_model, score_rows

    model = load_model(DPO(method="dpo"), tiny_model, bf16=False).eval()
    rows = read_prepared(prepared)[:6]
    with torch.no_grad():
        scores, lengths = score_rows(model, rows)
    alone = [
        answer_log_probs(tiny_model, None, row["prompt_ids"], row[f"{answer}_ids"])
        for row in rows
        for answer in ("chosen", "rejected")
    ]
    for ours, theirs in zip(scores.log_probs.split(lengths), alone, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)

    other = [dict(row) for row in rows]
    other[2] = {key: [7] * len(value) if key.endswith("_ids") else value for key, value in other[2].items()}
    with torch.no_grad():
        changed, _ = score_rows(model, other)
    pairs = list(zip(scores.log_probs.split(lengths), changed.log_probs.split(lengths), strict=True))
    assert not torch.equal(*pairs[4]) and not torch.equal(*pairs[5])
    for before, after in pairs[:4] + pairs[6:]:
        assert torch.equal(before, after)


def test_scores_and_gradients_of_adapters_are_those_of_a_padded_batch(tiny_model: Path, prepared: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from prefbuild.training.fused import fuse, leave_out_unread
    from prefbuild.training.packed_model import load_model, pack_rows, score_rows

    torch.manual_seed(0)
    model = get_peft_model(
        load_model(DPO(method="dpo"), tiny_model, bf16=False),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = read_prepared(prepared)[:5]

    def gradients(log_probs: Any) -> dict[str, Any]:
        model.zero_grad()
        # Weights that differ, so that a token of another answer would be noticed.
        (log_probs * torch.linspace(0.5, 2.0, len(log_probs))).sum().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}

    sequences = [(row["prompt_ids"], row[f"{answer}_ids"]) for row in rows for answer in ("chosen", "rejected")]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.tensor(
        [[*prompt, *answer] + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in sequences]
    )
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (longest - len(p) - len(a)) for p, a in sequences])
    model.get_base_model().set_attn_implementation("sdpa")
    padded = (
        model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    )
    wanted = torch.cat([row[len(p) - 1 :][: len(a)] for row, (p, a) in zip(padded, sequences, strict=True)])
    wanted_gradients = gradients(wanted)

    from prefbuild.training.attention import use_packed_attention

    use_packed_attention(model.get_base_model())
    assert fuse(model) and leave_out_unread(model) and len(wanted_gradients) > 10
    seen = []
    model.get_base_model().model.layers[-1].mlp.act_fn.register_forward_hook(lambda *found: seen.append(len(found[2])))
    found, _ = score_rows(model, rows)
    # Of the last layer's MLP is asked what a scored token is predicted from, and no more.
    assert seen == [len(set(pack_rows(rows, torch.device("cpu")).sources.tolist()))] != [found.log_probs.numel()]
    torch.testing.assert_close(found.log_probs, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(found.log_probs).items():
        difference = (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()
        assert difference < 1e-4, name


def test_a_step_in_many_bins_is_the_step_in_one(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefbuild.training import packed

    settings = EIGHT_STEPS | {"max_steps": 3, "save_steps": 3, "engine": "packed", "loss_type": ["aot", "sigmoid"]}
    train(tmp_path / "one", "dpo", tiny_model, prepared, **settings)
    seen = []
    into = packed_pairs.into_bins
    monkeypatch.setattr(packed_pairs, "into_bins", lambda sizes, _: seen.append(into(sizes, 100)) or seen[-1])
    train(tmp_path / "many", "dpo", tiny_model, prepared, **settings)
    assert max(map(len, seen)) > 1 and packed is not None
    for one, many in zip(curve(tmp_path / "one", 3), curve(tmp_path / "many", 3), strict=True):
        assert many == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_run_that_goes_on_ends_with_the_bytes_of_another(tiny_model: Path, prepared: Path, tmp_path: Path) -> None:
    import shutil

    settings = EIGHT_STEPS | {"save_steps": 5, "engine": "packed"}  # in the middle of the second epoch
    train(tmp_path / "whole", "dpo", tiny_model, prepared, **settings)
    shutil.copytree(tmp_path / "whole/work/checkpoint-5", tmp_path / "resumed/work/checkpoint-5")
    train(tmp_path / "resumed", "dpo", tiny_model, prepared, **settings)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")


def test_a_run_takes_the_rows_that_it_says(tiny_model: Path, prepared: Path) -> None:
    settings = DPO.model_validate({"method": "dpo"} | EIGHT_STEPS | {"max_steps": 2})
    steps = list(steps_of_a_run(settings, seed=42, num_rows=21))
    assert [len(step) for step in steps] == [8, 8]
    assert rows_of_a_run(settings, seed=42, num_rows=21) == steps[0] + steps[1]
    whole = settings.model_copy(update={"max_steps": None, "num_train_epochs": 1.5})
    assert [len(step) for step in steps_of_a_run(whole, seed=42, num_rows=21)] == [8, 8, 5, 8, 8]
    assert sorted(rows_of_a_run(whole, seed=42, num_rows=21)) == list(range(21))


def test_a_model_whose_attention_is_no_plain_causal_one_is_refused(
    tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    import shutil

    from prefbuild.training.packed import train as train_packed

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    (model / "config.json").write_text(json.dumps(config))
    settings = DPO.model_validate({"method": "dpo", "max_steps": 1, "precision": "float32"})
    with pytest.raises(StageError, match=r"sliding_window, which packing has not; set train.engine: trl"):
        train_packed(settings, run_in(tmp_path / "run", model, prepared))


def test_a_model_that_scores_otherwise_alone_is_refused(
    tiny_model: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefbuild.training import attention
    from prefbuild.training.packed_model import check_packed, load_model

    model = load_model(DPO(method="dpo"), tiny_model, bf16=False).eval()
    check_packed(model, read_prepared(prepared))
    plain = attention._by_segment
    monkeypatch.setattr(attention, "_by_segment", lambda *arguments: plain(*arguments) * 1.1)
    with pytest.raises(StageError, match=r"packed answers score .* nats a token otherwise than alone"):
        check_packed(model, read_prepared(prepared))


def test_rows_are_packed_into_bins_and_shared_out_by_tokens() -> None:
    assert into_bins([5, 9, 4, 6, 20], 10) == [[0], [1], [2, 3], [4]]
    sizes = [100, 90, 50, 40, 30, 10]
    parts = [packed_pairs.share(list(range(6)), sizes, 2, rank) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(6))
    assert [sum(sizes[unit] for unit in part) for part in parts] == [170, 150]


def test_what_fills_a_row_up_is_scored_nowhere() -> None:
    packed = pack([([1, 2, 3], [[4], [5, 6]])], "cpu", multiple_of=8)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]] and packed.num_tokens == 6
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert packed.segments.read.tolist() == [2, 4, 0, 1, 3, 5, 6, 7]
    assert pack([([1, 2, 3], [[4], [5, 6]])], "cpu").segments.read.tolist() == [2, 4]
    assert packed.sources.tolist() == [2, 2, 4] and packed.targets.tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="empty prompt or completion"):
        pack([([1], [[]])], "cpu")


def test_four_bit_weights_are_dequantised_to_what_they_multiply_by() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    from prefbuild.training.fused import dequantise

    torch.manual_seed(0)
    layer = Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data.copy_(torch.randn(32, 64))
    model = torch.nn.Sequential(layer.to("cpu"))
    x = torch.randn(5, 64)
    before = model(x)
    model.config = object()
    assert dequantise(model) == 1 and type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert math.isfinite(before.sum().item())


def test_a_model_whose_weights_are_read_ahead_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    from prefbuild.training import ahead
    from prefbuild.training.packed_model import load_model

    settings = DPO(method="dpo")
    ahead.begin(tiny_model, "cpu")
    one, other = (load_model(settings, tiny_model, bf16=True) for _ in range(2))  # the second reads by itself
    assert one.config.to_dict() == other.config.to_dict() and one.dtype == other.dtype
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys() and len(weights) > 10
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight or not one.config.tie_word_embeddings

    # What can't be read is said by whoever loads it: here in a file of a sharded checkpoint that is cut.
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    ahead.begin(tmp_path, "cpu")
    assert ahead.take(tmp_path) is None and ahead.take(tmp_path) is None
    with pytest.raises(Exception, match="(?i)incomplete|invalid|header|deserializ"):
        load_model(settings, tmp_path, bf16=True)
    shard.unlink()
    ahead.begin(tmp_path, "cpu")
    assert ahead.take(tmp_path) is None
