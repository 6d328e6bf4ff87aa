"""Direct preference optimisation with TRL's DPOTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
The reference is the base with the adapter switched off; a second model is loaded only where all weights are trained,
or another recipe's model is the reference.
"""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefbuild.errors import StageError
from prefbuild.methods import DPO, PARTS
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
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
from prefbuild.training.reference import check_tokenizer, load_reference

# A policy that is its reference gives 0 exactly, unless rounding differs: nats by which a whole answer may be likelier.
TOLERANCE = 0.2
# The losses that are ln 2 while policy and reference are the same.
LN_2_LOSSES = {"sigmoid", "sigmoid_norm", "robust"}


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
    checks = [] if run.reference is not None else [Reference(settings)]

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
        callbacks=[*callbacks(run, checkpoint), *checks],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.evaluate() if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"], "margins": first["rewards/margins"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["eval_loss"], "rewards": pick(held_out, "eval_rewards/")} if held_out else {},
    }


class Reference(TrainerCallback):
    """The reference is checked where it is the base: before the first update that is the model trained on.

    What is logged of step 1 was computed before its update.
    """

    def __init__(self, settings: DPO):
        self.settings = settings

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if state.global_step == 1 and "rewards/chosen" in logs:
            check_reference(self.settings, logs)


def check_reference(settings: DPO, first: dict[str, Any]) -> None:
    """StageError unless step 1's rewards (so their margins) are 0, and its loss is ln 2 where that follows from them.

    Not checked with dropout, which makes the two differ by itself, nor is a loss with further terms.
    """
    if not settings.disable_dropout:
        return
    chosen, rejected, loss = first["rewards/chosen"], first["rewards/rejected"], first["loss"]
    if max(abs(chosen), abs(rejected)) > TOLERANCE * settings.beta:
        raise StageError(
            f"step 1 has rewards of {chosen:.3g} (chosen) and {rejected:.3g} (rejected) before any update, where both "
            "must be 0: the reference is not the model trained on as it is before training. Check that the base "
            "computes alike twice; with train.precision: float32 what is left is no rounding"
        )
    losses = set(settings.loss_type)
    if not losses <= LN_2_LOSSES or settings.use_weighting or "aux_loss" in first:
        return
    wanted = math.log(2) * sum(settings.loss_weights or [1.0] * len(settings.loss_type))
    if abs(loss - wanted) > 0.02 * wanted:
        raise StageError(
            f"step 1 has a loss of {loss:.4g} before any update, where {' and '.join(settings.loss_type)} of rewards "
            f"of 0 must be {wanted:.4g} (ln 2 a loss): what is trained is not the loss the recipe names"
        )
