"""Direct preference optimisation with TRL's DPOTrainer and a LoRA adapter.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
The reference is the base itself: the adapter is switched off, so no second model is loaded.
"""

from pathlib import Path
from typing import Any

from prefbuild.methods import DPO, PARTS
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
    save_adapter,
    set_up,
    shared_metrics,
    trainer_arguments,
)


def train(
    settings: DPO,
    *,
    seed: int,
    base: dict[str, str],
    model: Path,
    prepared: Path,
    adapter: Path,
    live: Path,
    work: Path,
    name: str,
) -> dict[str, Any]:
    """Train an adapter on prepared rows and save it; returns the metrics of train.json.

    `base` names the model in the adapter's config: {"name", "revision"}. Checkpoints go to `work`, and training
    goes on from the newest whole one found there. Raises StageError when the loss is no number.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """DPOTrainer on rows that `prepare` rendered, tokenised, cut and counted."""

        def _prepare_dataset(self, dataset: Dataset, *_arguments: Any) -> Dataset:
            # TRL would render and tokenise again, drop long prompts and cut answers, without counting (1.16).
            return dataset

    # ---- settings
    bf16 = set_up(settings, seed)
    # On a CPU TRL 1.16 scores every position, prompts and padding too, and masks them afterwards; this makes it score
    # the positions that count, as it does on GPUs. The only use of the name in that module.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        DPOConfig,
        settings,
        work=work,
        seed=seed,
        bf16=bf16,
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        disable_dropout=settings.disable_dropout,
        max_length=None,
    )

    # ---- data
    train_rows = read_ids(prepared / "train.jsonl", PARTS["pairs"])
    held_out_rows = read_ids(prepared / "held_out.jsonl", PARTS["pairs"])

    # ---- train
    checkpoint = newest_checkpoint(work)
    trainer = TokenizedDPOTrainer(
        model=load_policy(settings, model, bf16),
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=AutoTokenizer.from_pretrained(model, local_files_only=True),
        peft_config=lora_config(settings),
        callbacks=[Curves(live, resume_from=checkpoint), ProgressBar(name), Checkpoints(live)],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_adapter(trainer.model, adapter, base)
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"], "margins": first["rewards/margins"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["eval_loss"], "rewards": pick(held_out, "eval_rewards/")} if held_out else {},
    }
