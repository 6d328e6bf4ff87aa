"""Kahneman-Tversky optimisation on answers marked good or bad, with TRL's KTOTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
The reference is the base with the adapter switched off; a second model is loaded only where all weights are trained,
or another recipe's model is the reference.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from prefbuild.errors import StageError
from prefbuild.methods import KTO, PARTS
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
    load_policy,
    lora_config,
    newest_checkpoint,
    pick,
    run_trainer,
    save_trained,
    set_up,
    shared_metrics,
    trainer_arguments,
)
from prefbuild.training.reference import check_tokenizer, load_reference, reference_checks

Row = dict[str, Any]


def read_rows(path: Path, settings: KTO, seed: int) -> list[Row]:
    """Token ids and verdicts of prepared rows, in an order drawn by the seed, with the answers that KL is measured on.

    Raises StageError for a single row, whose KL can't be measured on another's answer.
    """
    columns = ("prompt_ids", "completion_ids", "label")
    with open(path, encoding="utf-8") as file:
        rows = [{column: row[column] for column in columns} for row in map(json.loads, file)]
    # KTOTrainer takes rows as they come, the same way in every epoch: a file of good answers, then bad ones, would
    # make batches of one kind.
    random.Random(seed).shuffle(rows)
    if settings.loss_type != "kto":
        return rows
    if len(rows) == 1:
        raise StageError(
            f"{path}: has one row, but KTO measures KL on the answers to other prompts; give more rows, set "
            "data.held_out higher or to 0, or train.loss_type: apo_zero_unpaired"
        )
    return with_other_answers(rows, settings.per_device_train_batch_size)


def with_other_answers(rows: list[Row], batch_size: int) -> list[Row]:
    """Rows with the answer to another prompt of their batch, by which KTOTrainer estimates KL.

    As TRL does it: within a batch, each row gets the answer of the row before, and the first that of the last. Where
    the last batch is a single row, TRL gives it its own answer, which is no KL; here it gets the one before it.
    """
    paired = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        before = batch[-1:] + batch[:-1] if len(batch) > 1 else [rows[start - 1]]
        paired += [row | {"KL_completion_ids": b["completion_ids"]} for row, b in zip(batch, before, strict=True)]
    return paired


def check_verdicts(path: Path, rows: list[Row], settings: KTO) -> None:
    """StageError unless there are good and bad answers; says it when one kind outweighs the other."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        kind = "bad" if bad else "good"
        raise StageError(
            f"{path}: all {len(rows)} answers are {kind}; KTO needs good and bad ones (data.columns.label)"
        )
    ratio = good * settings.desirable_weight / (bad * settings.undesirable_weight)
    if not 0.99 <= ratio <= 1.34:
        print(
            f"train: {good} good answers times desirable_weight are {ratio:.3g} times {bad} bad ones times "
            "undesirable_weight; 1 to 4/3 is advised, as with desirable_weight: "
            f"{settings.desirable_weight / ratio:.3g}",
            file=sys.stderr,
        )


def check_held_out(path: Path, rows: list[Row]) -> None:
    """Says it when held-out rows can't show a margin."""
    if len({row["label"] for row in rows}) == 1:
        kind = "good" if rows[0]["label"] else "bad"
        print(
            f"train: {path}: all {len(rows)} answers are {kind}, so there is no margin to measure "
            "(held_out.rewards.margins); set data.held_out higher, or another seed",
            file=sys.stderr,
        )


def train(settings: KTO, run: Run) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number, for rows that KTO can't learn from, and for a reference of another
    tokenizer.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    class TokenizedKTOTrainer(KTOTrainer):
        """KTOTrainer on rows that `prepare` rendered, tokenised, cut and counted."""

        def _prepare_dataset(self, dataset: Dataset, *_arguments: Any) -> Dataset:
            # TRL would tokenise again, drop long prompts and cut answers, without counting (1.16).
            return dataset

    # ---- settings
    bf16 = set_up(settings, run.seed)
    # Score the positions that count and no others, on a CPU too; as in dpo.py.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        KTOConfig,
        settings,
        run=run,
        bf16=bf16,
        loss_type=settings.loss_type,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        disable_dropout=settings.disable_dropout,
        max_length=None,
    )

    # ---- data
    train_rows = read_rows(run.prepared / "train.jsonl", settings, run.seed)
    held_out_rows = read_rows(run.prepared / "held_out.jsonl", settings, run.seed)
    check_verdicts(run.prepared / "train.jsonl", train_rows, settings)
    check_held_out(run.prepared / "held_out.jsonl", held_out_rows)

    # ---- reference
    if run.reference is not None:
        check_tokenizer(run.model, run.reference, run.prepared / "train.jsonl", PARTS["labelled"])
    reference_model = load_reference(settings, run.model, run.reference, bf16)

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = TokenizedKTOTrainer(
        model=load_policy(settings, run.model, bf16),
        ref_model=reference_model,
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=AutoTokenizer.from_pretrained(run.model, local_files_only=True),
        peft_config=lora_config(settings),
        callbacks=[*callbacks(run, checkpoint), *reference_checks(settings, run)],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    # A batch may have answers of one kind alone, so of each number it is the last there was.
    latest = {key: value for entry in history for key, value in entry.items()}
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(latest, "rewards/"),
        "logps": pick(latest, "logps/"),
        "kl": latest["kl"],
        "step_0": {"loss": history[0]["loss"]},
        "held_out": {
            "loss": held_out["eval_loss"],
            "rewards": pick(held_out, "eval_rewards/"),
            "kl": held_out["eval_kl"],
        }
        if held_out
        else {},
    }
