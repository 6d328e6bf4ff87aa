"""Group relative policy optimisation with TRL's GRPOTrainer: a LoRA adapter, or all weights.

Started as the train stage: `dvc repro pipelines/<name>/dvc.yaml:train`, or by hand `prefbuild stage train <name>`.
With beta above 0 the reference is the base itself: the adapter is switched off, or TRL loads the base a second time.
"""

from pathlib import Path
from typing import Any

from prefbuild.methods import GRPO
from prefbuild.training.common import (
    Checkpoints,
    Curves,
    ProgressBar,
    load_policy,
    lora_config,
    newest_checkpoint,
    run_trainer,
    save_trained,
    set_up,
    trainer_arguments,
)
from prefbuild.training.prompts import Prompts, as_prepared, prompt_arguments, save_between_generations


def train(
    settings: GRPO,
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
    """Train on prepared prompts and save the adapter, or all weights; returns the metrics of train.json.

    `base` names the model in an adapter's config: {"name", "revision"}. Checkpoints go to `work`, and training
    goes on from the newest whole one found there. Raises StageError when the loss is no number, there are too few
    prompts, or a reward fails.
    """
    import trl.trainer.utils
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    # ---- settings
    bf16 = set_up(settings, seed)
    # Score the positions that count and no others, on a CPU too; as in dpo.py.
    trl.trainer.utils._use_triton = lambda device: True
    arguments = trainer_arguments(
        GRPOConfig,
        save_between_generations(settings),
        work=work,
        seed=seed,
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
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    prompts = Prompts(settings, prepared, tokenizer)

    # ---- train
    checkpoint = newest_checkpoint(work, settings.use_peft)
    trainer = as_prepared(GRPOTrainer)(
        model=load_policy(settings, model, bf16),
        args=arguments,
        reward_funcs=prompts.reward_funcs(),
        train_dataset=prompts.dataset(),
        processing_class=tokenizer,
        peft_config=lora_config(settings),
        callbacks=[Curves(live, resume_from=checkpoint), ProgressBar(name), Checkpoints(live)],
    )
    trainer.prompts = prompts
    before = prompts.measure(trainer)
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    metrics = prompts.metrics(trainer, result, history, bf16, before)
    save_trained(settings, trainer.model, trained, base, model)
    return metrics
