"""Direct preference optimisation with TRL's DPOTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
The reference is the base with the adapter switched off; a second model is loaded only where all weights are trained,
or another recipe's model is the reference.
"""

from typing import Any

from prefbuild.methods import DPO, PARTS
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
    dpo_metrics,
    load_policy,
    lora_config,
    newest_checkpoint,
    pick,
    run_trainer,
    save_trained,
    set_up,
    trainer_arguments,
)
from prefbuild.training.prepared import read_ids
from prefbuild.training.reference import check_tokenizer, load_reference, reference_checks


def train(settings: DPO, run: Run) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number, or the reference is not what it should be.
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
    bf16 = set_up(settings, run.seed)
    # On a CPU TRL 1.16 scores every position, prompts and padding too, and masks them afterwards; this makes it score
    # the positions that count, as it does on GPUs. The only use of the name in that module.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        DPOConfig,
        settings,
        run=run,
        bf16=bf16,
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        use_weighting=settings.use_weighting,
        ld_alpha=settings.ld_alpha,
        f_divergence_type=settings.f_divergence_type,
        f_alpha_divergence_coef=settings.f_alpha_divergence_coef,
        disable_dropout=settings.disable_dropout,
        max_length=None,
    )

    # ---- data
    train_rows = read_ids(run.prepared / "train.jsonl", PARTS["pairs"])
    held_out_rows = read_ids(run.prepared / "held_out.jsonl", PARTS["pairs"])

    # ---- reference
    if run.reference is not None:
        check_tokenizer(run.model, run.reference, run.prepared / "train.jsonl", PARTS["pairs"])
    reference_model = load_reference(settings, run.model, run.reference, bf16)

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = TokenizedDPOTrainer(
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
    held_out = pick(trainer.evaluate(), "eval_") if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    return dpo_metrics(trainer, result, history, held_out, bf16)
