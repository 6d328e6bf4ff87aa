"""The schema of `train:`: one class a method, and what all of them share.

Field names are TRL's and PEFT's own. What a method needs of a row is its shape: `pairs` (prompt, chosen, rejected),
`answers` (prompt, completion), `labelled` (an answer with a verdict) or `prompts`.
"""

from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from prefbuild.strict import Strict, Wrong

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr"]


class Lora(Strict):
    """PEFT's LoraConfig."""

    r: int = Field(default=16, ge=1, description="Rank.")
    lora_alpha: int = Field(default=16, ge=1, description="Scale: updates are multiplied by lora_alpha / r.")
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout; DPO switches it off unless disable_dropout is false."
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="`all-linear`, or names such as q_proj. lm_head can't be trained by DPO."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r).")
    use_dora: bool = Field(default=False, description="Weight-decomposed LoRA.")


class TrainOptions(Strict):
    """What every method has: how long, how fast, in what arithmetic, and the adapter."""

    learning_rate: float = Field(default=5e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Scheduler = Field(default="cosine", description="Shape of the learning rate over the run.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps from 0 to the peak.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps. Give this or num_train_epochs.")
    num_train_epochs: float | None = Field(default=None, gt=0, description="Passes over the rows. Default: 1.")
    per_device_train_batch_size: int = Field(default=8, ge=1, description="Rows a device takes at once.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches a step.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, a third slower."
    )
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "sgd"
    ] = Field(
        default="adamw_torch", description="Optimizer. The paged and 8-bit ones are bitsandbytes' and need a GPU."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    disable_dropout: bool = Field(default=True, description="No dropout while training, as TRL has it.")
    lora: Lora = Field(default_factory=Lora, description="The adapter.")
    precision: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="Arithmetic. auto: bf16 where the machine computes in it, else float32."
    )
    deterministic: bool = Field(default=True, description="The same machine gives the same bytes; costs 10 % on a GPU.")
    logging_steps: int = Field(default=1, ge=1, description="Steps between two logged points.")
    save_steps: int = Field(default=20, ge=1, description="Steps between checkpoints, from which a killed run goes on.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainOptions":
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise Wrong("max_steps", "says how long to train, and num_train_epochs too; give one")
        return self


class DPO(TrainOptions):
    """Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023, arXiv 2305.18290)."""

    method: Literal["dpo"] = Field(description="How it is trained; `dpo` is direct preference optimisation.")
    loss_type: list[LossType] = Field(default=["sigmoid"], min_length=1, description="TRL's DPO losses, summed.")
    loss_weights: list[float] | None = Field(default=None, description="One weight a loss. Default: 1 each.")
    beta: float = Field(default=0.1, gt=0, description="Strength of the pull towards the reference model.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Probability that a label is flipped (robust, exo_pair, sigmoid)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DPO":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            have, want = len(self.loss_weights), len(self.loss_type)
            raise Wrong("loss_weights", f"has {have} numbers for {want} losses; give one weight a loss")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise Wrong("loss_type", "exo_pair needs label_smoothing above 0; 1e-3 is usual")
        return self


class SFT(TrainOptions):
    """Supervised fine-tuning on answers, with TRL's SFTTrainer. The loss is on the answer alone."""

    method: Literal["sft"] = Field(description="How it is trained; `sft` is supervised fine-tuning.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    loss_type: Literal["nll", "dft"] = Field(
        default="nll",
        description="nll: cross-entropy. dft: dynamic fine-tuning (arXiv 2508.05629), which weighs each token by its "
        "own probability.",
    )
    disable_dropout: bool = Field(default=False, description="No dropout while training. TRL has it on in SFT.")


class KTO(TrainOptions):
    """Kahneman-Tversky optimisation on answers marked good or bad, with TRL's KTOTrainer (arXiv 2402.01306)."""

    method: Literal["kto"] = Field(description="How it is trained; `kto` is Kahneman-Tversky optimisation.")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="apo_zero_unpaired: APO-zero on unpaired answers (arXiv 2408.06266), without KL."
    )
    beta: float = Field(default=0.1, gt=0, description="Strength of the pull towards the reference model.")
    desirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="Weight of the loss of good answers. Good: answers times weight are 1 to 4/3 times those of bad.",
    )
    undesirable_weight: float = Field(default=1.0, gt=0, description="Weight of the loss of bad answers.")

    @model_validator(mode="after")
    def _has_other_answers(self) -> "KTO":
        if self.loss_type == "kto" and self.per_device_train_batch_size < 2:
            raise Wrong(
                "per_device_train_batch_size",
                "is 1, but KTO measures KL on the answers to the other prompts of a batch; give at least 2, "
                "or loss_type: apo_zero_unpaired",
            )
        return self


class ORPO(TrainOptions):
    """Odds ratio preference optimisation, without a reference, with TRL's ORPOTrainer (arXiv 2403.07691).

    Its cross-entropy is over prompt and answer, as in TRL and the authors' code; the odds ratio is of the answers.
    """

    method: Literal["orpo"] = Field(description="How it is trained; `orpo` is odds ratio preference optimisation.")
    beta: float = Field(default=0.1, gt=0, description="Weight of the odds ratio; the paper's lambda.")


class SimPO(TrainOptions):
    """Simple preference optimisation, without a reference, with TRL's CPOTrainer (arXiv 2405.14734)."""

    method: Literal["simpo"] = Field(description="How it is trained; `simpo` is simple preference optimisation.")
    beta: float = Field(
        default=2.0,
        gt=0,
        description="Scale of the reward, a mean over tokens: the paper has 2 to 2.5. TRL's 0.1 is for sums.",
    )
    simpo_gamma: float = Field(
        default=1.0, ge=0, description="Margin that rewards are asked for; the paper: 0.3 to 1.6."
    )
    cpo_alpha: float = Field(default=0.0, ge=0, description="Weight of the chosen answer's cross-entropy. 0: SimPO.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Probability that a label is flipped.")


class GRPO(TrainOptions):
    """Group relative policy optimisation with TRL's GRPOTrainer (Shao et al. 2024, arXiv 2402.03300)."""

    method: Literal["grpo"] = Field(description="How it is trained; `grpo` is group relative policy optimisation.")


Train = Annotated[Union[DPO, SFT, KTO, ORPO, SimPO, GRPO], Field(discriminator="method")]
METHODS: dict[str, Any] = {"dpo": DPO, "sft": SFT, "kto": KTO, "orpo": ORPO, "simpo": SimPO, "grpo": GRPO}
# What a row must have for a method.
SHAPES = {"dpo": "pairs", "sft": "answers", "kto": "labelled", "orpo": "pairs", "simpo": "pairs", "grpo": "prompts"}
PARTS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "answers": ("prompt", "completion"),
    "labelled": ("prompt", "completion"),
    "prompts": ("prompt",),
}

# The numbers of train.json that a gate can ask for, by method.
_SHARED = ("loss", "mean_loss", "steps", "epochs", "grad_norm.last", "grad_norm.max", "seconds", "tokens")
_REWARDS = ("rewards.chosen", "rewards.rejected", "rewards.margins", "rewards.accuracies")
_PAIRS = (
    *(*_SHARED, *_REWARDS, "logps.chosen", "logps.rejected"),
    *("held_out.loss", *(f"held_out.{key}" for key in _REWARDS)),
)
TRAIN_METRICS: dict[str, tuple[str, ...]] = {
    "dpo": (*_PAIRS, "step_0.loss", "step_0.margins", "chosen_logps_change"),
    "sft": (*_SHARED, "held_out.loss"),
    "kto": (*_SHARED, *_REWARDS[:3], "held_out.loss"),
    "orpo": _PAIRS,
    "simpo": _PAIRS,
    "grpo": _SHARED,
}


def reward_columns(train: Any) -> list[str]:
    """The columns of the data that a method's rewards read, besides the prompt: carried into prepared rows."""
    return []
