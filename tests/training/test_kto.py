"""KTO: the prepared ids and verdicts reach the model, KL is measured on others' answers, and useless rows are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from trained import answer_log_probs, batches, read_prepared, train, unpadded, write_prepared

from prefbuild.errors import StageError
from prefbuild.methods import KTO
from prefbuild.training.kto import check_held_out, check_verdicts, read_rows, with_other_answers
from prefbuild.training.reference import check_reference


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("kto") / "prepared", tiny_model, "labelled")


def settings(**more: Any) -> KTO:
    return KTO.model_validate({"method": "kto", "per_device_train_batch_size": 4, **more})


def test_loss_rewards_and_kl_are_those_of_the_paper(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl import KTOTrainer

    seen = batches(monkeypatch, KTOTrainer)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.2}
    metrics = train(tmp_path, "kto", tiny_model, prepared, max_steps=3, learning_rate=1e-2, **weights)

    # ---- what reached the model: nine rows in batches of four, the last of one
    rows = read_prepared(prepared)
    got: list[Any] = []
    for batch in seen[:3]:
        ids = unpadded(batch["input_ids"], batch["attention_mask"])
        answers = unpadded(batch["input_ids"], batch["completion_mask"])
        others = unpadded(batch["KL_input_ids"], batch["KL_completion_mask"])
        got += zip(ids, answers, batch["label"].tolist(), strict=True)
        assert not any(answer == other for answer, other in zip(answers, others, strict=True))
    assert sorted(got) == sorted(
        (row["prompt_ids"] + row["completion_ids"], row["completion_ids"], row["label"]) for row in rows
    )

    # ---- what was computed on the held-out rows, one batch of three
    held_out = read_rows(prepared / "held_out.jsonl", settings(), seed=42)

    def ratio(row: dict[str, Any], answer: str) -> Any:
        trained, base = (
            answer_log_probs(tiny_model, adapter, row["prompt_ids"], row[answer]).sum()
            for adapter in (tmp_path / "adapter", None)
        )
        return trained - base

    kl = torch.stack([ratio(row, "KL_completion_ids") for row in held_out]).mean().clamp(min=0)
    losses, rewards = [], []
    for row in held_out:
        reward = 0.2 * ratio(row, "completion_ids")
        rewards.append((row["label"], reward.item()))
        signed = reward - 0.2 * kl if row["label"] else 0.2 * kl - reward
        losses.append((1.5 if row["label"] else 0.5) * (1 - torch.sigmoid(signed)))
    assert metrics["held_out"]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert metrics["held_out"]["kl"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-4)
    chosen, rejected = ([reward for label, reward in rewards if label == kind] for kind in (True, False))
    means = {"chosen": sum(chosen) / len(chosen), "rejected": sum(rejected) / len(rejected)}
    means["margins"] = means["chosen"] - means["rejected"]
    assert metrics["held_out"]["rewards"] == pytest.approx(means, rel=1e-3, abs=1e-5)


def test_an_untrained_adapter_is_its_own_reference(tiny_model: Path, prepared: Path, tmp_path: Path) -> None:
    metrics = train(tmp_path, "kto", tiny_model, prepared, max_steps=1, per_device_train_batch_size=9)
    assert metrics["kl"] == 0
    assert metrics["step_0"]["loss"] == pytest.approx(0.5)
    assert metrics["rewards"] == {"chosen": 0, "margins": 0, "rejected": 0}


def test_without_kl_no_other_answers_are_needed(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import KTOTrainer

    seen = batches(monkeypatch, KTOTrainer)
    more = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 1}
    train(tmp_path, "kto", tiny_model, prepared, max_steps=1, **more)
    assert all("KL_input_ids" not in batch for batch in seen)


def test_batches_of_one_are_refused_where_kl_is_measured() -> None:
    with pytest.raises(ValidationError, match="is 1, but KTO measures KL on the answers to the other prompts"):
        settings(per_device_train_batch_size=1)


@pytest.mark.parametrize(("count", "size"), [(9, 4), (8, 4), (5, 2), (2, 4), (3, 2)])
def test_no_row_is_given_its_own_answer(count: int, size: int) -> None:
    rows = with_other_answers([{"completion_ids": [i]} for i in range(count)], size)
    assert [row["completion_ids"] for row in rows] == [[i] for i in range(count)]
    assert all(row["KL_completion_ids"] != row["completion_ids"] for row in rows)
    for start in range(0, count - count % size, size):  # whole batches: the same answers, paired otherwise
        batch = rows[start : start + size]
        assert sorted(row["KL_completion_ids"] for row in batch) == [row["completion_ids"] for row in batch]


def test_rows_sorted_by_verdict_are_mixed_the_same_way_each_time(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt_ids": [1], "completion_ids": [i], "label": i < 20} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = read_rows(path, settings(), seed=1)
    assert mixed == read_rows(path, settings(), seed=1)
    assert mixed != read_rows(path, settings(), seed=2)
    assert sorted(row["completion_ids"][0] for row in mixed) == list(range(40))
    kinds = [{row["label"] for row in mixed[start : start + 4]} for start in range(0, 40, 4)]
    assert sum(len(kind) == 2 for kind in kinds) > 5


def test_answers_of_one_kind_and_a_single_held_out_row_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    one = write_prepared(tmp_path / "one", tiny_model, "labelled", held_out=1)
    with pytest.raises(StageError, match=r"held_out.jsonl: has one row, but KTO measures KL .* set data.held_out"):
        train(tmp_path, "kto", tiny_model, one)
    for label, kind in ((True, "good"), (False, "bad")):
        with pytest.raises(StageError, match=f"rows: all 3 answers are {kind}; KTO needs good and bad ones"):
            check_verdicts(Path("rows"), [{"label": label}] * 3, settings())


def test_uneven_verdicts_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"label": True}] * 2 + [{"label": False}] * 8
    check_verdicts(Path("rows"), rows, settings())
    said = capsys.readouterr().err
    assert "2 good answers times desirable_weight are 0.25 times 8 bad ones" in said
    assert "desirable_weight: 4" in said
    check_verdicts(Path("rows"), rows, settings(desirable_weight=4.0))
    check_held_out(Path("rows"), rows)
    check_held_out(Path("rows"), [])
    assert capsys.readouterr().err == ""
    check_held_out(Path("rows"), rows[:2])
    assert "rows: all 2 answers are good, so there is no margin to measure" in capsys.readouterr().err


def test_a_reward_before_any_update_is_refused() -> None:
    first = {"rewards/chosen": 0.5, "loss": 0.4}  # a first batch of good answers alone
    with pytest.raises(StageError, match=r"rewards of 0.5 \(chosen\) before any update, where all must be 0"):
        check_reference(KTO.model_validate({"method": "kto"}), first)
    check_reference(KTO.model_validate({"method": "kto"}), first | {"rewards/chosen": 1e-3})
