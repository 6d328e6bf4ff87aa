"""ORPO: the prepared ids reach the model, and the loss is the paper's."""

import shutil
from pathlib import Path

import pytest
from trained import answer_log_probs, batches, log_probs, read_prepared, train, unpadded, write_prepared

from prefbuild.template import padding_tokenizer
from prefbuild.training.pairs import IGNORED


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("orpo") / "prepared", tiny_model, "pairs", train=4)


def test_loss_is_cross_entropy_and_the_odds_ratio(
    tiny_model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl.experimental.orpo import ORPOTrainer

    seen = batches(monkeypatch, ORPOTrainer)
    metrics = train(tmp_path, "orpo", tiny_model, prepared, max_steps=2, learning_rate=1e-2, beta=0.3)

    # ---- what reached the model
    rows = read_prepared(prepared)
    for answer in ("chosen", "rejected"):
        ids = unpadded(seen[0][f"{answer}_input_ids"], seen[0][f"{answer}_attention_mask"])
        labels = [[label for label in row.tolist() if label != IGNORED] for row in seen[0][f"{answer}_labels"]]
        want = sorted((row["prompt_ids"] + row[f"{answer}_ids"], row[f"{answer}_ids"]) for row in rows)
        assert sorted(zip(ids, labels, strict=True)) == want
    both = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert metrics["tokens"] == 2 * both

    # ---- what was computed on the held-out rows, one batch of three
    adapter = tmp_path / "adapter"
    held_out = read_prepared(prepared, "held_out")
    nll = -torch.cat([log_probs(tiny_model, adapter, row["prompt_ids"], row["chosen_ids"]) for row in held_out]).mean()
    chosen, rejected = (
        torch.stack(
            [answer_log_probs(tiny_model, adapter, row["prompt_ids"], row[f"{answer}_ids"]).mean() for row in held_out]
        )
        for answer in ("chosen", "rejected")
    )
    odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
    loss = nll - 0.3 * torch.nn.functional.logsigmoid(odds).mean()
    measured = metrics["held_out"]
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert measured["nll_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert measured["log_odds_chosen"] == pytest.approx(odds.mean().item(), rel=1e-4)
    assert measured["rewards"]["margins"] == pytest.approx(0.3 * (chosen - rejected).mean().item(), rel=1e-4)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tiny_model: Path, tmp_path: Path) -> None:
    import json

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = padding_tokenizer(model)
    assert tokenizer.pad_token == tokenizer.eos_token
