"""A reward model with TRL's RewardTrainer and a LoRA adapter, whose file holds the new head too.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
"""

from pathlib import Path
from typing import Any

from prefbuild.methods import PARTS, RewardModel
from prefbuild.rewards.model import HEAD, make
from prefbuild.template import padding_tokenizer
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
    lora_config,
    model_options,
    newest_checkpoint,
    run_trainer,
    save_trained,
    set_up,
    shared_metrics,
    trainer_arguments,
)
from prefbuild.training.prepared import read_ids

OWN = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def read_rows(path: Path) -> list[dict[str, list[int]]]:
    """Prompt and answer in one, which is what is scored."""
    rows = read_ids(path, PARTS["pairs"])
    return [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")} for row in rows]


def train(settings: RewardModel, run: Run) -> dict[str, Any]:
    """Train an adapter and a head on prepared pairs and save them; returns the metrics of train.json.

    Raises StageError when the loss is no number, or the base can't be given a head.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    class TokenizedRewardTrainer(RewardTrainer):
        """RewardTrainer on rows that `prepare` rendered, tokenised, cut and counted."""

        def _prepare_dataset(self, dataset: Dataset, *_arguments: Any) -> Dataset:
            return dataset  # TRL would drop long rows without counting (1.16)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *arguments, **named)
            if not model.training:
                # TRL takes the mean over batches, of which the last is smaller; each held-out pair is to count once.
                pairs = len(inputs["input_ids"]) // 2
                for values in (self._metrics["eval"][key] for key in ("accuracy", "margin")):
                    values += [values[-1]] * (pairs - 1)
            return loss

    # ---- settings
    bf16 = set_up(settings, run.seed)
    arguments = trainer_arguments(
        RewardConfig,
        settings,
        run=run,
        bf16=bf16,
        center_rewards_coefficient=settings.center_rewards_coefficient,
        disable_dropout=settings.disable_dropout,
        max_length=None,
    )

    # ---- data
    train_rows = read_rows(run.prepared / "train.jsonl")
    held_out_rows = read_rows(run.prepared / "held_out.jsonl")

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = TokenizedRewardTrainer(
        model=make(run.model, run.seed, **model_options(settings, bf16, whole=[HEAD])),
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=padding_tokenizer(run.model),
        peft_config=lora_config(settings, task_type="SEQ_CLS", modules_to_save=[HEAD]),
        callbacks=callbacks(run, checkpoint),
    )
    if settings.quantization:
        # TRL makes all that QLoRA trains bf16 (1.16); the head's input is float32 where nothing computes in bf16.
        assert trainer.model is not None
        for path, parameter in trainer.model.named_parameters():
            if f".{HEAD}." in path:
                parameter.data = parameter.data.float()
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    shown = ("loss", "accuracy", "margin")
    return {
        **shared_metrics(trainer, result, history, bf16),
        **{key: last[key] for key in OWN},
        "step_0": {key: first[key] for key in shown},
        "held_out": {key: held_out[f"eval_{key}"] for key in shown} if held_out else {},
    }
