"""Group relative policy optimisation with TRL's GRPOTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
With beta above 0 the reference is the base itself: the adapter is switched off, or TRL loads the base a second time.
"""

from typing import Any

from prefbuild.methods import GRPO
from prefbuild.training import Run
from prefbuild.training.common import (
    callbacks,
    load_policy,
    lora_config,
    newest_checkpoint,
    run_trainer,
    save_trained,
    set_up,
    trainer_arguments,
)
from prefbuild.training.prompts import Prompts, as_prepared, prompt_arguments, save_between_generations


def train(settings: GRPO, run: Run) -> dict[str, Any]:
    """Train on prepared prompts and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number, there are too few prompts, or a reward fails.
    """
    import trl.trainer.utils
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    # ---- settings
    bf16 = set_up(settings, run.seed)
    # Score the positions that count and no others, on a CPU too; as in dpo.py.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        GRPOConfig,
        save_between_generations(settings),
        run=run,
        bf16=bf16,
        **prompt_arguments(settings),
        loss_type=settings.loss_type,
        delta=settings.delta,
        scale_rewards=settings.scale_rewards,
        multi_objective_aggregation=settings.multi_objective_aggregation,
        importance_sampling_level=settings.importance_sampling_level,
        top_entropy_quantile=settings.top_entropy_quantile,
        use_bias_correction_kl=settings.use_bias_correction_kl,
    )

    # ---- data and rewards
    tokenizer = AutoTokenizer.from_pretrained(run.model, local_files_only=True)
    prompts = Prompts(settings, run.prepared, tokenizer)

    # ---- train
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    trainer = as_prepared(GRPOTrainer, settings)(
        model=load_policy(settings, run.model, bf16),
        args=arguments,
        reward_funcs=prompts.reward_funcs(),
        train_dataset=prompts.dataset(),
        processing_class=tokenizer,
        peft_config=lora_config(settings),
        callbacks=callbacks(run, checkpoint),
    )
    trainer.prompts = prompts
    before = prompts.measure(trainer)
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    metrics = prompts.metrics(trainer, result, history, bf16, before)
    save_trained(settings, trainer.model, run)
    return metrics
