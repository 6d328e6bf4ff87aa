"""Direct preference optimisation with TRL's DPOTrainer and a LoRA adapter.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
The reference is the base itself: the adapter is switched off, so no second model is loaded.
"""

import json
import math
from pathlib import Path
from typing import Any

from prefbuild.errors import StageError
from prefbuild.recipe import DPO
from prefbuild.training.common import (
    Checkpoints,
    Curves,
    ProgressBar,
    machine,
    newest_checkpoint,
    save_adapter,
    use_bf16,
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
    import torch
    import trl.trainer.utils
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """DPOTrainer on rows that `prepare` rendered, tokenised, cut and counted."""

        def _prepare_dataset(self, dataset: Dataset, *_arguments: Any) -> Dataset:
            # TRL would render and tokenise again, drop long prompts and cut answers, without counting (1.16).
            return dataset

    # ---- settings
    bf16 = use_bf16(settings.precision)
    torch.use_deterministic_algorithms(settings.deterministic)
    # Costs time only: no kernel used here reads memory that it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # On a CPU TRL 1.16 scores every position, prompts and padding too, and masks them afterwards; this makes it score
    # the positions that count, as it does on GPUs. The only use of the name in that module.
    trl.trainer.utils._use_triton = lambda device: True
    set_seed(seed)
    disable_progress_bars()
    arguments = DPOConfig(
        output_dir=str(work),
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.num_train_epochs or 1.0,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        disable_dropout=settings.disable_dropout,
        max_length=None,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # Trainer would log an average in place of a loss that is no number
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
    )

    # ---- data
    train_rows = read_rows(prepared / "train.jsonl")
    held_out_rows = read_rows(prepared / "held_out.jsonl")

    # ---- model
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto" if bf16 else torch.float32, local_files_only=True, use_safetensors=True
    )
    lora = LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.lora_alpha,
        lora_dropout=settings.lora.lora_dropout,
        target_modules=settings.lora.target_modules,
        use_rslora=settings.lora.use_rslora,
        use_dora=settings.lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )

    # ---- train
    checkpoint = newest_checkpoint(work)
    trainer = TokenizedDPOTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Curves(live, resume_from=checkpoint), ProgressBar(name), Checkpoints(live)],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not math.isfinite(result.training_loss):
        raise StageError(
            f"the loss became {result.training_loss}; lower train.learning_rate (now {settings.learning_rate})"
        )

    # ---- measure and save
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_adapter(trainer.model, adapter, base)
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "loss": last["loss"],
        "mean_loss": result.training_loss,
        "grad_norm": {"last": last["grad_norm"], "max": max(entry["grad_norm"] for entry in history)},
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"], "margins": first["rewards/margins"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["eval_loss"], "rewards": pick(held_out, "eval_rewards/")} if held_out else {},
        "tokens": last["num_tokens"],
        "seconds": round(result.metrics["train_runtime"], 1),
        "machine": machine() | {"precision": "bf16" if bf16 else "float32"},
    }


def read_rows(path: Path) -> list[dict[str, list[int]]]:
    """The token ids of prepared rows."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    with open(path, encoding="utf-8") as file:
        return [{column: row[column] for column in columns} for row in map(json.loads, file)]


def pick(entry: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of one family, by their last name: {"rewards/margins": 1} -> {"margins": 1}."""
    return {key.removeprefix(prefix): value for key, value in sorted(entry.items()) if key.startswith(prefix)}
