"""`rollout: {engine: graph}`: TRL's trainers on prompts, with completions from rollout.py and log-probabilities from
grouped.py. Rewards, advantages, losses and metrics stay TRL's own.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from prefbuild.errors import StageError
from prefbuild.methods import PromptOptions
from prefbuild.training import ranks

INSTALL_VLLM = "install it (pip install vllm), in the image of stage train where there is one, or write engine: graph"


def engine_of(settings: PromptOptions) -> str:
    """What writes completions. A section without a word on it is TRL's `generate`."""
    return settings.rollout.engine if settings.rollout is not None else "hf"


def engine_arguments(settings: PromptOptions) -> dict[str, Any]:
    """What TRL's configs are told of the engine. StageError when vLLM is wanted and not there."""
    if engine_of(settings) != "vllm":
        return {}
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise StageError(f"train.rollout.engine is vllm, which is not installed here; {INSTALL_VLLM}")
    return {"use_vllm": True, "vllm_mode": "colocate"}


def scores_groups(settings: PromptOptions) -> bool:
    """Whether prompts are shared while training too. TRL scores where gradients must meet those of other GPUs, where
    all weights are trained, and with dropout."""
    dropout = not settings.disable_dropout and settings.lora.lora_dropout > 0
    return settings.use_peft and ranks.num_ranks() == 1 and not dropout


def trained(model: Any) -> list[Any]:
    """The parameters that are trained, found once."""
    found: list[Any] | None = model.__dict__.get("_trained")
    if found is None:
        found = model.__dict__["_trained"] = [one for one in model.parameters() if one.requires_grad]
    return found


def walk_less(model: Any, settings: PromptOptions) -> None:
    """Have a model do without walks through all its modules what Trainer and TRL ask of it at every step.

    Each is 10 to 20 ms for the thousands of modules of a small model with an adapter, as long as its arithmetic takes.
    """
    train = model.train

    def train_unless_it_does(mode: bool = True) -> Any:
        return model if model.training == mode else train(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained(model):
            parameter.grad = None

    model.train, model.zero_grad = train_unless_it_does, zero_grad
    if not settings.use_peft:
        return
    if not settings.gradient_checkpointing:
        model.is_gradient_checkpointing = False  # PEFT's wrapper would ask every module
    layers, whole_copies = adapted(model)
    if whole_copies:
        return

    @contextlib.contextmanager
    def disable_adapter() -> Iterator[None]:
        """PEFT's first asks for the state of all adapters, and then has no weight require a gradient for that time."""
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    model.disable_adapter = disable_adapter


def adapted(model: Any) -> tuple[list[Any], bool]:
    """(layers that have an adapter, whether PEFT trains copies of whole modules beside them)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return layers, any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules)


def with_graphs(trainer_class: Any) -> Any:
    """A TRL trainer on prompts (prompts.as_prepared) whose completions and log-probabilities are ours."""
    import torch

    from prefbuild.training.grouped import GroupedScores
    from prefbuild.training.rollout import Rollout
    from prefbuild.training.sampling import sampling_of

    class GraphTrainer(trainer_class):
        """Its batches carry `row`: which of the completions that were written last each one is."""

        written: tuple[list[list[int]], list[list[int]]]  # token ids of prompts and completions, as written last
        rows: list[int] | None = None  # of the batch that is scored; None is all that are written

        @functools.cached_property
        def rollout(self) -> Rollout:
            """Made at its first use: the model is where it stays then."""
            settings, prompts = self.prompts.settings, [*self.prompts.train, *self.prompts.held_out]
            return Rollout(
                self.accelerator.unwrap_model(self.model),
                max_prompt=max(len(row["prompt_ids"]) for row in prompts),
                max_new_tokens=settings.max_completion_length,
                stops=self.eos_token_ids,
                bf16=self.args.bf16,
                seed=self.args.seed * ranks.num_ranks() + self.accelerator.process_index,
            )

        @functools.cached_property
        def scores(self) -> GroupedScores:
            """Made at its first use, which is in training: from then on the model's attention is packed."""
            settings = self.prompts.settings
            longest = max(len(row["prompt_ids"]) for row in self.prompts.train) + settings.max_completion_length
            return GroupedScores(
                self.accelerator.unwrap_model(self.model),
                temperature=self.temperature,
                bf16=self.args.bf16,
                largest_group=self.num_generations,
                longest=longest,
                # Checkpointing and 4-bit layers do what can't be captured; float32 has no attention for packed rows.
                capture=self.accelerator.device.type == "cuda"
                and self.args.bf16
                and not settings.gradient_checkpointing
                and settings.quantization is None,
            )

        def create_optimizer(self, *arguments: Any) -> Any:
            walk_less(self.model, self.prompts.settings)
            self.accelerator.unwrap_model = functools.cache(self.accelerator.unwrap_model)  # another walk
            return super().create_optimizer(*arguments)

        def _clip_grad_norm(self, model: Any) -> Any:
            if ranks.num_ranks() > 1:
                return super()._clip_grad_norm(model)
            return self.accelerator.clip_grad_norm_(trained(self.model), self.args.max_grad_norm)

        def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any) -> Any:
            self.rollout.refresh()
            # The step, so that a run that goes on draws what it would have drawn.
            completions = self.rollout.complete(prompt_ids, sampling_of(self.prompts.settings), self.state.global_step)
            self.written = prompt_ids, completions
            # GRPO is told of log-probabilities too, where an engine has them.
            return (completions, None) if hasattr(self, "importance_sampling_level") else completions

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            self.rows = None
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return {**output, "row": torch.arange(len(inputs))}  # shuffled and split with the rest

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            self.rows = inputs["row"].tolist()
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **others: Any,
        ) -> tuple[Any, Any, None]:
            if not scores_groups(self.prompts.settings):
                found: tuple[Any, Any, None] = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
                )
                return found
            rows = list(range(len(input_ids))) if self.rows is None else self.rows
            size = batch_size or len(rows)
            parts = []
            for some in (rows[start : start + size] for start in range(0, len(rows), size)):
                prompts, completions = ([ids[row] for row in some] for ids in self.written)
                parts.append(self.scores.score(prompts, completions, logits_to_keep))
            log_probs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
            return log_probs, entropies if compute_entropy else None, None

    return GraphTrainer
