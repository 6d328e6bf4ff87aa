"""SimPO: the prepared ids reach the model, and the loss is the paper's."""

from pathlib import Path

import pytest
from trained import answer_log_probs, batches, read_prepared, train, unpadded, write_prepared

from prefbuild.training.pairs import IGNORED


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("simpo") / "prepared", tiny_model, "pairs", train=4)


@pytest.mark.parametrize(("cpo_alpha", "label_smoothing"), [(0.0, 0.0), (0.5, 0.1)])
def test_loss_is_that_of_mean_log_probabilities_with_a_margin(
    cpo_alpha: float,
    label_smoothing: float,
    tiny_model: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from trl.experimental.cpo import CPOTrainer

    seen = batches(monkeypatch, CPOTrainer)
    settings = {"beta": 2.5, "simpo_gamma": 0.7, "cpo_alpha": cpo_alpha, "label_smoothing": label_smoothing}
    metrics = train(tmp_path, "simpo", tiny_model, prepared, max_steps=2, learning_rate=1e-2, **settings)

    # ---- what reached the model
    rows = read_prepared(prepared)
    for answer in ("chosen", "rejected"):
        ids = unpadded(seen[0][f"{answer}_input_ids"], seen[0][f"{answer}_attention_mask"])
        labels = [[label for label in row.tolist() if label != IGNORED] for row in seen[0][f"{answer}_labels"]]
        want = sorted((row["prompt_ids"] + row[f"{answer}_ids"], row[f"{answer}_ids"]) for row in rows)
        assert sorted(zip(ids, labels, strict=True)) == want

    # ---- what was computed on the held-out rows, one batch of three
    answers = {
        answer: [
            answer_log_probs(tiny_model, tmp_path / "adapter", row["prompt_ids"], row[f"{answer}_ids"])
            for row in read_prepared(prepared, "held_out")
        ]
        for answer in ("chosen", "rejected")
    }
    chosen, rejected = (torch.stack([row.mean() for row in answers[answer]]) for answer in ("chosen", "rejected"))
    margins = 2.5 * (chosen - rejected) - 0.7
    right, wrong = (-torch.nn.functional.logsigmoid(sign * margins).mean() for sign in (1, -1))
    loss = (1 - label_smoothing) * right + label_smoothing * wrong
    loss += cpo_alpha * -torch.cat(answers["chosen"]).mean()
    measured = metrics["held_out"]
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert measured["rewards"]["margins"] == pytest.approx(2.5 * (chosen - rejected).mean().item(), rel=1e-4)
    assert measured["rewards"]["accuracies"] == pytest.approx((chosen > rejected).double().mean().item())
