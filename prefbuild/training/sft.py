"""Supervised fine-tuning on answers, and their tokens alone, with TRL's SFTTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
"""

from typing import Any

from prefbuild.methods import PARTS, SFT
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
    load_policy,
    lora_config,
    newest_checkpoint,
    run_trainer,
    save_trained,
    set_up,
    shared_metrics,
    trainer_arguments,
)
from prefbuild.training.prepared import read_ids

IGNORED = -100  # a label that is in no loss


def labelled(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A prepared row as SFTTrainer takes it: prompt and answer, with labels for the answer alone."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def train(settings: SFT, run: Run) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import disable_dropout_in_model

    class TokenizedSFTTrainer(SFTTrainer):
        """SFTTrainer on rows that `prepare` rendered, tokenised, cut and counted."""

        def _prepare_dataset(self, dataset: Dataset, *_arguments: Any) -> Dataset:
            # TRL would look for columns to label and cut by (1.16); rows have their labels, and their length.
            return dataset

    # ---- settings
    bf16 = set_up(settings, run.seed)
    # Score the positions that count and no others, on a CPU too; as in dpo.py.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        SFTConfig, settings, run=run, bf16=bf16, loss_type=settings.loss_type, max_length=None
    )

    # ---- data
    train_rows = [labelled(row) for row in read_ids(run.prepared / "train.jsonl", PARTS["answers"])]
    held_out_rows = [labelled(row) for row in read_ids(run.prepared / "held_out.jsonl", PARTS["answers"])]

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = TokenizedSFTTrainer(
        model=load_policy(settings, run.model, bf16),
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=AutoTokenizer.from_pretrained(run.model, local_files_only=True),
        peft_config=lora_config(settings),
        callbacks=callbacks(run, checkpoint),
    )
    if settings.disable_dropout:  # SFTConfig has no such option
        disable_dropout_in_model(trainer.model)  # type: ignore[arg-type]  # TRL says it may be None
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    measured = ("loss", "mean_token_accuracy", "entropy")
    return {
        **shared_metrics(trainer, result, history, bf16),
        "mean_token_accuracy": last["mean_token_accuracy"],
        "entropy": last["entropy"],
        "step_0": {"loss": first["loss"]},
        "held_out": {key: held_out[f"eval_{key}"] for key in measured} if held_out else {},
    }
