"""Odds ratio preference optimisation with TRL's ORPOTrainer: a LoRA adapter, or all weights. There is no reference.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
"""

from typing import Any

from prefbuild.methods import ORPO, PARTS
from prefbuild.template import padding_tokenizer
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
from prefbuild.training.pairs import PreparedPairs
from prefbuild.training.prepared import read_ids


def train(settings: ORPO, run: Run) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number.
    """
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class PreparedORPOTrainer(PreparedPairs, ORPOTrainer):
        pass

    # ---- settings
    bf16 = set_up(settings, run.seed)
    arguments = trainer_arguments(
        ORPOConfig,
        settings,
        run=run,
        bf16=bf16,
        beta=settings.beta,
        disable_dropout=settings.disable_dropout,
        remove_unused_columns=False,
    )

    # ---- data
    train_rows = read_ids(run.prepared / "train.jsonl", PARTS["pairs"])
    held_out_rows = read_ids(run.prepared / "held_out.jsonl", PARTS["pairs"])

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = PreparedORPOTrainer(
        model=load_policy(settings, run.model, bf16),
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=padding_tokenizer(run.model),
        peft_config=lora_config(settings),
        callbacks=callbacks(run, checkpoint),
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    own = ("nll_loss", "log_odds_ratio", "log_odds_chosen")
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        **{key: last[key] for key in own},
        "step_0": {"loss": first["loss"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {
            "loss": held_out["eval_loss"],
            "rewards": pick(held_out, "eval_rewards/"),
            **{key: held_out[f"eval_{key}"] for key in own},
        }
        if held_out
        else {},
    }
