"""The schema of `train:`: one class a method, and what all of them share.

Field names are TRL's and PEFT's own. What a method needs of a row is its shape: `pairs` (prompt, chosen, rejected),
`answers` (prompt, completion), `labelled` (an answer with a verdict) or `prompts`.
"""

import math
from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from prefbuild.rewards.schema import Reward, columns_of, files_of, models_of
from prefbuild.strict import Strict, Wrong, Wrongs

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
BNB_OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit")  # bitsandbytes' own, which need a GPU
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # the losses in which TRL 1.16 uses label_smoothing
# The losses that TRL lets measure distance in other ways than reverse KL.
F_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
Engine = Literal["packed", "trl"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
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


class StopRule(Strict):
    """When a run counts as diverged: a logged metric on the wrong side, for so many logged points in a row."""

    metric: str = Field(
        pattern=r"^[\w.-]+$", description="As TRL logs it, with dots: loss, grad_norm, rewards.margins, kl."
    )
    below: float | None = Field(default=None, description="Below this.")
    above: float | None = Field(default=None, description="Above this.")
    for_: int = Field(default=1, ge=1, alias="for", description="Logged points in a row; see logging_steps.")

    @model_validator(mode="after")
    def _has_a_bound(self) -> "StopRule":
        if self.below is None and self.above is None:
            raise Wrong("metric", "stops nothing; give below or above")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise Wrong("below", f"is over above ({self.above:g}), which stops every run; swap them")
        return self

    def __str__(self) -> str:
        bounds = [
            f"{word} {value:g}" for word, value in (("below", self.below), ("above", self.above)) if value is not None
        ]
        return f"{self.metric} {' or '.join(bounds)}" + (f" for {self.for_} points" if self.for_ > 1 else "")

    def broken_by(self, value: float) -> bool:
        """Whether one logged value is on the wrong side."""
        return (self.below is not None and value < self.below) or (self.above is not None and value > self.above)


class RecipeReference(Strict):
    """Another recipe's merged model as reference: this recipe is built after that one."""

    recipe: str = Field(description="The other recipe's name. Its tokenizer must be the base's.")


Reference = Literal["base"] | RecipeReference


class TrainOptions(Strict):
    """What every method has: how long, how fast, in what arithmetic, and what is trained."""

    learning_rate: float = Field(default=5e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Scheduler = Field(default="cosine", description="Shape of the learning rate over the run.")
    warmup_steps: int | float = Field(
        default=0, ge=0, description="Steps from 0 to the peak; 0.1 is a tenth of all steps."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps. Give this or num_train_epochs.")
    num_train_epochs: float | None = Field(default=None, gt=0, description="Passes over the rows. Default: 1.")
    per_device_train_batch_size: int = Field(default=8, ge=1, description="Rows a device takes at once.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches a step.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations: less memory, a third slower. DPO's packed engine does so where it must.",
    )
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "sgd"
    ] = Field(
        default="adamw_torch", description="Optimizer. The paged and 8-bit ones are bitsandbytes' and need a GPU."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="QLoRA: nf4 keeps the base in 4 bits while training, with bitsandbytes. Merging takes the base as it is.",
    )
    disable_dropout: bool = Field(default=True, description="No dropout while training, as TRL has it.")
    use_peft: bool = Field(
        default=True,
        description="Train a LoRA adapter. False: all weights, in float32, which takes 16 bytes a weight with AdamW, "
        "and a learning rate that is a tenth of an adapter's or less.",
    )
    lora: Lora = Field(default_factory=Lora, description="The adapter.")
    precision: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="Arithmetic. auto: bf16 where the machine computes in it, else float32."
    )
    deterministic: bool = Field(default=True, description="The same machine gives the same bytes; costs 10 % on a GPU.")
    logging_steps: int = Field(default=1, ge=1, description="Steps between two logged points.")
    save_steps: int = Field(default=20, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    # No part of a dump: it changes no result, so it stands beside the sections, under compute.
    report_to: list[Tracker] = Field(
        default=[],
        exclude=True,
        description="Where curves go besides DVCLive, which always has them. Trackers write below build/.tracking while "
        "training; `prefbuild track` shows them, and sends what goes to a service.",
    )
    stop_if: list[StopRule] = Field(
        default=[], description="Any of these ends a run that diverges; what is trained is saved as it is then."
    )

    @model_validator(mode="after")
    def _tracked_once(self) -> "TrainOptions":
        for name in self.report_to:
            if self.report_to.count(name) > 1:
                raise Wrong("report_to", f"names {name} twice; write it once")
        return self

    @model_validator(mode="after")
    def _adapter_or_not(self) -> "TrainOptions":
        if self.use_peft:
            return self
        if "lora" in self.model_fields_set:
            raise Wrong("lora", "is of an adapter, and use_peft is false, which trains all weights; remove one of them")
        if self.quantization is not None:
            raise Wrong(
                "quantization",
                "holds the base in 4 bits, which only an adapter can be trained on, and use_peft is false; "
                "remove one of them",
            )
        return self

    @model_validator(mode="after")
    def _fraction_of_steps(self) -> "TrainOptions":
        if isinstance(self.warmup_steps, float) and self.warmup_steps >= 1:
            raise Wrong(
                "warmup_steps",
                f"is {self.warmup_steps}; give whole steps without a point, or a fraction of all below 1",
            )
        return self

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
    reference: Reference = Field(
        default="base",
        description="The model held on to. base: the one trained on, as it is before training. {recipe: NAME}: the "
        "merged model of another recipe.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Probability that a label is flipped (robust, exo_pair, aot, aot_unpaired).",
    )
    use_weighting: bool = Field(
        default=False, description="WPO: weigh pairs by how likely the model finds them (arXiv 2406.11827)."
    )
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="LD-DPO: weight of tokens beyond the shorter answer's length; 1 is plain DPO (arXiv 2409.06411).",
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="How distance from the reference is measured (f-DPO, arXiv 2309.16240)."
    )
    f_alpha_divergence_coef: float = Field(default=0.5, description="Alpha of alpha_divergence.")
    engine: Engine | None = Field(
        default=None,
        description="What trains. packed: prefbuild's own loop, where pairs lie side by side without padding and a "
        "prompt is computed once. trl: TRL's DPOTrainer. Default: packed where it can; see docs/speed.md.",
    )

    @model_validator(mode="after")
    def _packed_applies(self) -> "DPO":
        if self.engine == "packed" and (reason := why_not_packed(self)):
            raise Wrong("engine", f"is packed, {reason}, or write engine: trl")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "DPO":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            have, want = len(self.loss_weights), len(self.loss_type)
            raise Wrong("loss_weights", f"has {have} numbers for {want} losses; give one weight a loss")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise Wrong("loss_type", "exo_pair needs label_smoothing above 0; 1e-3 is usual")
        if self.label_smoothing > 0 and not set(self.loss_type) & SMOOTHED:
            raise Wrong(
                "label_smoothing",
                f"changes nothing in {', '.join(self.loss_type)}; TRL smooths {', '.join(sorted(SMOOTHED))}. "
                "Take robust, which is sigmoid for labels that may be flipped, or leave it out",
            )
        if self.use_weighting and (sorts := set(self.loss_type) & {"aot", "aot_unpaired"}):
            raise Wrong("use_weighting", f"has no meaning for {min(sorts)}, which sorts the pairs; leave one out")
        if self.f_divergence_type != "reverse_kl" and (others := set(self.loss_type) - F_DIVERGENCE):
            raise Wrong(
                "f_divergence_type",
                f"must be reverse_kl for {min(others)}; others need {', '.join(sorted(F_DIVERGENCE))}",
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise Wrong("f_alpha_divergence_coef", "says nothing without f_divergence_type: alpha_divergence")
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
    reference: Reference = Field(
        default="base",
        description="The model held on to. base: the one trained on, as it is before training. {recipe: NAME}: the "
        "merged model of another recipe.",
    )
    desirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="Weight of the loss of good answers. Good: answers times weight are 1 to 4/3 times those of bad.",
    )
    undesirable_weight: float = Field(default=1.0, gt=0, description="Weight of the loss of bad answers.")

    @property
    def smallest_batch(self) -> int:
        """Rows that a device must take at once."""
        return 2 if self.loss_type == "kto" else 1

    @model_validator(mode="after")
    def _has_other_answers(self) -> "KTO":
        if self.per_device_train_batch_size < self.smallest_batch:
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


class Rollout(Strict):
    """What writes the completions."""

    engine: Literal["graph", "vllm", "hf"] = Field(
        description="graph: prefbuild's own decoding of llama-like models, as CUDA graphs on a GPU, where a prompt is "
        "computed once for its completions. vllm: vLLM, where it is installed. hf: transformers' generate, as TRL has it."
    )


class PromptOptions(TrainOptions):
    """What methods on prompts share: the model writes several completions a prompt, and rewards score them.

    A batch is counted in completions, as TRL does: those of a step are batch size times accumulation.
    """

    rewards: list[Reward] = Field(min_length=1, description="What a completion is worth: the sum of these.")
    num_generations: int = Field(default=8, ge=2, description="Completions a prompt, which are compared.")
    max_completion_length: int = Field(default=512, ge=1, description="Tokens; a completion that is longer is clipped.")
    temperature: float = Field(default=1.0, gt=0, description="Of the sampling. Below 1: likelier tokens.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample among the likeliest tokens of this probability.")
    top_k: int = Field(default=0, ge=0, description="Sample among so many of the likeliest tokens; 0 is all.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest one's."
    )
    repetition_penalty: float = Field(default=1.0, gt=0, description="Above 1: tokens that came before are unlikelier.")
    num_iterations: int = Field(default=1, ge=1, description="Steps taken on the same completions.")
    epsilon: float = Field(default=0.2, gt=0, description="Ratios of probabilities are clipped to 1 - epsilon.")
    epsilon_high: float | None = Field(
        default=None, gt=0, description="And to 1 + epsilon_high. Default: epsilon; DAPO has 0.28."
    )
    mask_truncated_completions: bool = Field(
        default=False, description="Leave completions that were clipped out of the loss, as DAPO does."
    )
    rollout: Rollout | None = Field(
        default=None, description="What writes the completions. Default: graph where it can; see docs/speed.md."
    )

    @model_validator(mode="after")
    def _graph_applies(self) -> "PromptOptions":
        if self.rollout is not None and self.rollout.engine == "graph" and (reason := why_no_graph(self)):
            raise Wrong("rollout", f"is graph, {reason}, or write engine: hf")
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> "PromptOptions":
        batch, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        total = batch * accumulation
        if total % self.num_generations:
            fits = [n for n in range(2, total + 1) if total % n == 0]
            nearest = sorted(sorted(fits, key=lambda n: abs(n - self.num_generations))[:2])
            least = self.num_generations // math.gcd(self.num_generations, accumulation)
            larger = -(-batch // least) * least
            raise Wrong(
                "num_generations",
                f"is {self.num_generations}, which does not divide the {total} completions of a step "
                f"(per_device_train_batch_size {batch} x gradient_accumulation_steps {accumulation}); "
                + (f"give {' or '.join(map(str, nearest))}, or " if nearest else "give ")
                + f"per_device_train_batch_size {larger}",
            )
        return self

    @model_validator(mode="after")
    def _named_apart(self) -> "PromptOptions":
        names = [reward.metric for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise Wrong("rewards", f"{names.count(name)} of them are called {name}; give each a `name`")
        return self


class GRPO(PromptOptions):
    """Group relative policy optimisation with TRL's GRPOTrainer (Shao et al. 2024, arXiv 2402.03300)."""

    method: Literal["grpo"] = Field(description="How it is trained; `grpo` is group relative policy optimisation.")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = Field(
        default="dapo", description="How tokens are weighed in the loss; `grpo` is the paper's, `dapo` TRL's default."
    )
    beta: float = Field(
        default=0.0, ge=0, description="Strength of the pull towards the base (KL). 0 computes none, and is faster."
    )
    delta: float | None = Field(default=None, gt=1, description="Upper bound of ratios, as in INTELLECT-2.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group", description="Advantages are divided by the standard deviation of the group, the batch, or not."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        default="sum_then_normalize", description="Several rewards: sum them first (GRPO), or normalise each (GDPO)."
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        default="token", description="Ratios of tokens, or of whole completions as in GSPO."
    )
    top_entropy_quantile: float = Field(
        default=1.0, gt=0, le=1, description="Only this share of tokens, those of highest entropy, is trained on."
    )
    use_bias_correction_kl: bool = Field(default=True, description="KL is weighed by the ratio, as in DeepSeek-V3.2.")

    @model_validator(mode="after")
    def _levels(self) -> "GRPO":
        # TRL only warns.
        level, loss = self.importance_sampling_level, self.loss_type
        if loss == "luspo" and level == "token":
            raise Wrong("importance_sampling_level", "is token, but luspo is for ratios of sequences; write sequence")
        if level == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo", "vespo"):
            raise Wrong(
                "importance_sampling_level",
                f"is sequence, which {loss} weighs by length; write loss_type: grpo for GSPO, or token here",
            )
        if not self.use_bias_correction_kl and self.beta == 0:
            raise Wrong("use_bias_correction_kl", "says nothing with beta 0, where there is no KL; give beta")
        return self


class RLOO(PromptOptions):
    """REINFORCE leave-one-out with TRL's RLOOTrainer (Ahmadian et al. 2024, arXiv 2402.14740)."""

    method: Literal["rloo"] = Field(description="How it is trained; `rloo` is REINFORCE leave-one-out.")
    num_generations: int = Field(default=2, ge=2, description="Completions a prompt, which are compared.")
    beta: float = Field(default=0.05, ge=0, description="Strength of the pull towards the base (KL); 0 computes none.")
    normalize_advantages: bool = Field(
        default=False, description="Advantages get mean 0 and standard deviation 1 over the batch."
    )
    reward_clip_range: list[float] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="Rewards are clipped to these two bounds, as in [-10, 10].",
    )

    @model_validator(mode="after")
    def _bounds(self) -> "RLOO":
        if self.reward_clip_range is not None and self.reward_clip_range[0] >= self.reward_clip_range[1]:
            low, high = self.reward_clip_range
            raise Wrong("reward_clip_range", f"is [{low:g}, {high:g}]; the lower bound goes first")
        return self


class RewardModel(TrainOptions):
    """A reward model: one number for a prompt and its answer, with TRL's RewardTrainer (Bradley-Terry's loss).

    It gets a head of its own, `score`, which is trained whole and kept in the adapter.
    """

    method: Literal["reward"] = Field(description="How it is trained; `reward` makes a reward model.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    center_rewards_coefficient: float | None = Field(
        default=None, gt=0, description="Pulls rewards towards a mean of 0 (arXiv 2312.09244); 0.01 is usual."
    )

    @model_validator(mode="after")
    def _head_is_whole(self) -> "RewardModel":
        if not self.use_peft:
            raise Wrong("use_peft", "is false, and a reward model is trained with an adapter; remove it")
        if "score" in self.lora.target_modules:
            raise Wrongs([(("lora", "target_modules"), "names score, the head, which is trained whole; leave it out")])
        return self


Train = Annotated[Union[DPO, SFT, KTO, ORPO, SimPO, GRPO, RLOO, RewardModel], Field(discriminator="method")]
METHODS: dict[str, Any] = {
    "dpo": DPO,
    "sft": SFT,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SimPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reward": RewardModel,
}
# What a row must have for a method.
SHAPES = {
    "dpo": "pairs",
    "sft": "answers",
    "kto": "labelled",
    "orpo": "pairs",
    "simpo": "pairs",
    "grpo": "prompts",
    "rloo": "prompts",
    "reward": "pairs",
}
PARTS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "answers": ("prompt", "completion"),
    "labelled": ("prompt", "completion"),
    "prompts": ("prompt",),
}

# The numbers of train.json that a gate can ask for, by method.
_SHARED = (
    *("loss", "mean_loss", "steps", "epochs", "stopped_early", "grad_norm.last", "grad_norm.max", "seconds", "tokens"),
)
_REWARDS = ("rewards.chosen", "rewards.rejected", "rewards.margins", "rewards.accuracies")
_PAIRS = (
    *(*_SHARED, *_REWARDS, "logps.chosen", "logps.rejected"),
    *("held_out.loss", *(f"held_out.{key}" for key in _REWARDS)),
)
_PROMPTS = (
    *(*_SHARED, "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl"),
    *(f"completions.{key}_{of}" for key in ("mean", "min", "max") for of in ("length", "terminated_length")),
    "completions.clipped_ratio",
    *(f"{when}.{key}" for when in ("step_0", "held_out") for key in ("reward", "mean_length", "clipped_ratio")),
)
TRAIN_METRICS: dict[str, tuple[str, ...]] = {
    "dpo": (*_PAIRS, "step_0.loss", "step_0.margins", "chosen_logps_change"),
    "sft": (
        *(*_SHARED, "step_0.loss", "mean_token_accuracy", "entropy"),
        *(f"held_out.{key}" for key in ("loss", "mean_token_accuracy", "entropy")),
    ),
    "kto": (
        *(*_SHARED, *_REWARDS[:3], "logps.chosen", "logps.rejected", "kl", "step_0.loss"),
        *(f"held_out.{key}" for key in ("loss", *_REWARDS[:3], "kl")),
    ),
    "orpo": (
        *(*_PAIRS, "step_0.loss", "chosen_logps_change"),
        *(f"{part}{key}" for part in ("", "held_out.") for key in ("nll_loss", "log_odds_ratio", "log_odds_chosen")),
    ),
    "simpo": (*_PAIRS, "step_0.loss", "chosen_logps_change"),
    "grpo": _PROMPTS,
    "rloo": _PROMPTS,
    "reward": (
        *(*_SHARED, "accuracy", "margin", "mean_reward", "min_reward", "max_reward"),
        *(f"{when}.{key}" for when in ("step_0", "held_out") for key in ("loss", "accuracy", "margin")),
    ),
}


def split_batch(train: TrainOptions, num: int) -> tuple[int, int]:
    """(per_device_train_batch_size, gradient_accumulation_steps) on each of `num` GPUs, so that a step keeps its rows.

    As much of `num` as divides the accumulation is taken from it, so that batches stay as they are, and the rest from
    the batch. KTO's batch goes first: its KL is a mean over what all GPUs hold at once. Wrong when neither divides.
    """
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if isinstance(train, KTO) and batch % num == 0 and batch // num >= train.smallest_batch:
        return batch // num, accumulation
    by_accumulation = math.gcd(accumulation, num)
    by_batch = num // by_accumulation
    remedy = f"give a gradient_accumulation_steps that {num} divides, as {-(-accumulation // num) * num}"
    if batch % by_batch:
        raise Wrong(
            "gpus",
            f"is {num}, among which the {batch * accumulation} rows of a step can't be shared out evenly "
            f"(per_device_train_batch_size {batch} x gradient_accumulation_steps {accumulation}); {remedy}",
        )
    if isinstance(train, KTO) and batch // by_batch < train.smallest_batch:
        raise Wrong(
            "gpus",
            f"is {num}, which leaves each one row of a batch of {batch}, but KTO measures KL on the answers to the "
            f"other prompts of a batch; {remedy}",
        )
    return batch // by_batch, accumulation // by_accumulation


def train_metrics(train: Any) -> tuple[str, ...]:
    """The numbers of train.json that a gate of this recipe can ask for: those of its method, and of each reward."""
    names = [reward.metric for reward in train.rewards] if isinstance(train, PromptOptions) else []
    rewards = (f"{family}.{name}" for name in names for family in ("rewards", "held_out.rewards", "step_0.rewards"))
    return *TRAIN_METRICS[train.method], *rewards


def why_not_packed(train: DPO, strategy: str | None = None) -> str | None:
    """What of these settings the packed engine has not, and what to change; None where it can train them.

    `strategy` is compute.strategy. Where it can, its loss is TRL's to rounding.
    """
    if train.use_weighting:
        return "which has no weights by how likely the model finds a pair; leave out use_weighting"
    if not train.disable_dropout and train.lora.lora_dropout > 0:
        return "which computes without dropout; leave out disable_dropout: false"
    if strategy in ("fsdp", "zero3"):
        return f"which needs all weights on each GPU, and compute.strategy is {strategy}; write strategy: ddp"
    return None


def why_no_graph(train: PromptOptions, strategy: str | None = None) -> str | None:
    """What of these settings decoding with graphs has not, and what to change; None where it can write completions.

    `strategy` is compute.strategy. What model it is, is seen when it is loaded.
    """
    if train.use_peft and train.lora.use_dora:
        return "which merges adapters as LoRA has them; leave out use_dora"
    if strategy in ("fsdp", "zero3"):
        return f"which needs all weights on each GPU, and compute.strategy is {strategy}; write strategy: ddp"
    return None


def with_engine(train: Any, strategy: str | None) -> Any:
    """The same settings with the engine that trains them, where a method has more than one."""
    if isinstance(train, PromptOptions) and train.rollout is None:
        engine: Literal["graph", "hf"] = "hf" if why_no_graph(train, strategy) else "graph"
        return train.model_copy(update={"rollout": Rollout(engine=engine)})
    if not isinstance(train, DPO) or train.engine is not None:
        return train
    return train.model_copy(update={"engine": "trl" if why_not_packed(train, strategy) else "packed"})


def reference_recipe(train: Any) -> str | None:
    """The recipe whose model is the reference; None where that is the base, or there is none."""
    reference = train.reference if isinstance(train, DPO | KTO) else None
    return reference.recipe if isinstance(reference, RecipeReference) else None


def train_settings(train: Any) -> dict[str, Any]:
    """What stage train is told of `train:`: nothing that says nothing, so that sections keep their bytes.

    Its engine must have been chosen, by with_engine: none is TRL's.
    """
    told: dict[str, Any] = train.model_dump(mode="json", by_alias=True)
    if train.use_peft:
        del told["use_peft"]
    else:
        del told["lora"], told["quantization"]
    if train.method == "kto" and train.reference == "base":
        del told["reference"]
    if train.method == "dpo" and train.engine != "packed":
        del told["engine"]
    if isinstance(train, PromptOptions) and (train.rollout is None or train.rollout.engine == "hf"):
        del told["rollout"]
    return told


def reference_settings(train: Any, seed: int) -> dict[str, Any]:
    """What stage reference is told of DPO's settings: what its numbers depend on, and which rows a run uses.

    Nothing of rows where a run uses all, as a whole epoch does.
    """
    told: dict[str, Any] = {"precision": train.precision, "deterministic": train.deterministic}
    if train.quantization is not None:
        told["quantization"] = train.quantization
    if not train.use_peft:
        told["use_peft"] = False
    if train.max_steps is None and (train.num_train_epochs or 1.0) >= 1:
        return {"train": told}
    length = "num_train_epochs" if train.max_steps is None else "max_steps"
    rows_a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return {"train": {**told, length: getattr(train, length), "per_device_train_batch_size": rows_a_step}, "seed": seed}


def needs_bitsandbytes(train: dict[str, Any] | None) -> bool:
    """Whether a resolved `train:` has its weights or its optimizer from bitsandbytes. A stage without one has neither."""
    if train is None:
        return False
    return train.get("quantization") is not None or train.get("optim") in BNB_OPTIMIZERS


def reward_columns(train: Any) -> list[str]:
    """The columns of the data that a method's rewards read, besides the prompt: carried into prepared rows."""
    return columns_of(train.rewards) if isinstance(train, PromptOptions) else []


def reward_files(train: Any) -> list[str]:
    """The Python files that a method's rewards are in: pinned by the lock."""
    return files_of(train.rewards) if isinstance(train, PromptOptions) else []


def reward_models(train: Any) -> list[str]:
    """The recipes whose merged reward models score completions."""
    return models_of(train.rewards) if isinstance(train, PromptOptions) else []
