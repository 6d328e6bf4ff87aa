"""Simple preference optimisation with TRL's CPOTrainer: a LoRA adapter, or all weights. There is no reference.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
"""

from pathlib import Path
from typing import Any

from prefbuild.methods import PARTS, SimPO
from prefbuild.training.common import (
    Checkpoints,
    Curves,
    ProgressBar,
    load_policy,
    lora_config,
    newest_checkpoint,
    pick,
    read_ids,
    run_trainer,
    save_trained,
    set_up,
    shared_metrics,
    trainer_arguments,
)
from prefbuild.training.pairs import PreparedPairs, padding_tokenizer


def train(
    settings: SimPO,
    *,
    seed: int,
    base: dict[str, str],
    model: Path,
    prepared: Path,
    trained: Path,
    live: Path,
    work: Path,
    name: str,
) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    `base` names the model in an adapter's config: {"name", "revision"}. Checkpoints go to `work`, and training
    goes on from the newest whole one found there. Raises StageError when the loss is no number.
    """
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class PreparedCPOTrainer(PreparedPairs, CPOTrainer):
        pass

    # ---- settings
    bf16 = set_up(settings, seed)
    arguments = trainer_arguments(
        CPOConfig,
        settings,
        work=work,
        seed=seed,
        bf16=bf16,
        loss_type="simpo",
        beta=settings.beta,
        simpo_gamma=settings.simpo_gamma,
        cpo_alpha=settings.cpo_alpha,
        label_smoothing=settings.label_smoothing,
        disable_dropout=settings.disable_dropout,
        remove_unused_columns=False,
    )

    # ---- data
    train_rows = read_ids(prepared / "train.jsonl", PARTS["pairs"])
    held_out_rows = read_ids(prepared / "held_out.jsonl", PARTS["pairs"])

    # ---- train
    checkpoint = newest_checkpoint(work, settings.use_peft)
    trainer = PreparedCPOTrainer(
        model=load_policy(settings, model, bf16),
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=padding_tokenizer(model),
        peft_config=lora_config(settings),
        callbacks=[Curves(live, resume_from=checkpoint), ProgressBar(name), Checkpoints(live)],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, trained, base, model)
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["eval_loss"], "rewards": pick(held_out, "eval_rewards/")} if held_out else {},
    }
