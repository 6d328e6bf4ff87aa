"""SFT: the prepared ids reach the model, the loss is that of the answers, and no other."""

from pathlib import Path
from typing import Any

import pytest
from trained import answer_log_probs, batches, read_prepared, train, unpadded, write_prepared

from prefbuild.training.sft import IGNORED


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("sft") / "prepared", tiny_model, "answers")


def nll(rows: list[dict[str, Any]], model: Path, adapter: Path | None) -> list[Any]:
    return [-answer_log_probs(model, adapter, row["prompt_ids"], row["completion_ids"]) for row in rows]


def test_loss_is_the_cross_entropy_of_the_answers_tokens(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl import SFTTrainer

    seen = batches(monkeypatch, SFTTrainer)
    metrics = train(
        tmp_path, "sft", tiny_model, prepared, max_steps=2, per_device_train_batch_size=9, learning_rate=1e-2
    )
    rows = {name: read_prepared(prepared, name) for name in ("train", "held_out")}

    # ---- what reached the model
    for batch, part in ((seen[0], rows["train"]), (seen[-1], rows["held_out"])):
        assert set(batch) >= {"input_ids", "labels", "attention_mask"}
        want = sorted((row["prompt_ids"] + row["completion_ids"], row["completion_ids"]) for row in part)
        ids = unpadded(batch["input_ids"], batch["attention_mask"])
        labels = [[label for label in row.tolist() if label != IGNORED] for row in batch["labels"]]
        assert sorted(zip(ids, labels, strict=True)) == want
    assert len(seen) == 3

    # ---- what was computed: of the untrained model at first, of the trained one on held-out rows
    before = torch.cat(nll(rows["train"], tiny_model, None)).mean()
    assert metrics["step_0"]["loss"] == pytest.approx(before.item(), rel=1e-5)
    after = torch.cat(nll(rows["held_out"], tiny_model, tmp_path / "adapter")).mean()
    assert metrics["held_out"]["loss"] == pytest.approx(after.item(), rel=1e-5)
    assert abs(after - torch.cat(nll(rows["held_out"], tiny_model, None)).mean()) > 0.01
    assert 0 <= metrics["mean_token_accuracy"] <= 1
    assert metrics["tokens"] == 2 * sum(len(row["prompt_ids"] + row["completion_ids"]) for row in rows["train"])


def test_dynamic_fine_tuning_weighs_each_token_by_its_probability(
    tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    import torch

    once: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 9}
    metrics = train(tmp_path, "sft", tiny_model, prepared, loss_type="dft", **once)
    losses = torch.cat(nll(read_prepared(prepared), tiny_model, None))
    assert metrics["step_0"]["loss"] == pytest.approx((losses * (-losses).exp()).mean().item(), rel=1e-4)


def test_dropout_of_the_adapter_is_on_unless_it_is_disabled(tiny_model: Path, prepared: Path, tmp_path: Path) -> None:
    # The adapter starts as nothing, so that dropout shows from the second step on.
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 9, "learning_rate": 1e-2}
    lora = {"r": 4, "lora_dropout": 0.5}
    losses = [
        train(tmp_path / str(i), "sft", tiny_model, prepared, lora=lora, **settings, **more)["loss"]
        for i, more in enumerate(({}, {"disable_dropout": True}))
    ]
    plain = train(tmp_path / "plain", "sft", tiny_model, prepared, **settings)["loss"]
    assert losses[0] != plain
    assert losses[1] == plain


def test_without_held_out_rows_nothing_is_measured_on_them(tiny_model: Path, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", tiny_model, "answers", train=4, held_out=0)
    assert train(tmp_path, "sft", tiny_model, prepared, max_steps=1)["held_out"] == {}
