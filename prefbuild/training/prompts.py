"""What methods on prompts share: prompts exactly as prepared, rewards, batches that a resumed run meets again.

TRL's trainers would tokenise prompts themselves, shuffle a resumed second epoch like the first, and take no step at all
when there are fewer prompts than a batch has (1.16).
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, TypeVar

from prefbuild.errors import StageError
from prefbuild.methods import PromptOptions
from prefbuild.rewards import Scorer
from prefbuild.training import ranks
from prefbuild.training.common import pick, shared_metrics
from prefbuild.training.graph_engine import engine_arguments, engine_of, with_graphs

Options = TypeVar("Options", bound=PromptOptions)


class Prompts:
    """Prepared rows and the rewards that score completions of them."""

    def __init__(self, settings: PromptOptions, prepared: Path, tokenizer: Any):
        """StageError when a user's reward can't be loaded, or there are fewer prompts than a step takes."""
        self.settings = settings
        self.tokenizer = tokenizer
        self.scorers = [Scorer(reward) for reward in settings.rewards]
        self.train = _read(prepared / "train.jsonl")
        self.held_out = _read(prepared / "held_out.jsonl")
        self.ids = {row["prompt"]: row["prompt_ids"] for row in self.train}
        a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        num_prompts = a_step // settings.num_generations
        if len(self.train) < num_prompts:
            raise StageError(
                f"a step takes {num_prompts} prompts ({a_step} completions, {settings.num_generations} a prompt), and "
                f"there are {len(self.train)} to train on; lower train.per_device_train_batch_size"
            )
        if left := len(self.train) % num_prompts:
            print(
                f"each pass leaves out {left} of the {len(self.train)} prompts: a step takes {num_prompts}",
                file=sys.stderr,
            )

    def dataset(self) -> Any:
        """What the trainer draws from: rendered prompts, and where each one's row is."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": [row["prompt"] for row in self.train], "row": list(range(len(self.train)))})

    def reward_funcs(self) -> list[Any]:
        """The rewards as TRL calls them, weights aside."""
        return [self._reward_func(scorer) for scorer in self.scorers]

    def _reward_func(self, scorer: Scorer) -> Any:
        def score(completions: list[str], completion_ids: list[list[int]], row: list[int], **_rest: Any) -> list[float]:
            return self._score(scorer, [self.train[index] for index in row], completions, completion_ids)

        score.__name__ = scorer.name
        return score

    def _score(self, scorer: Scorer, rows: list[Any], completions: list[str], ids: list[list[int]]) -> list[float]:
        special = set(self.tokenizer.all_special_ids)
        num_tokens = [sum(token not in special for token in one) for one in ids]
        return scorer([row["messages"] for row in rows], completions, [row["columns"] for row in rows], num_tokens)

    def measure(self, trainer: Any) -> dict[str, Any]:
        """The rewards of greedy completions of the held-out prompts; {} when there are none.

        Greedy, so that before and after differ by the training alone, and no random number is drawn.
        """
        if not self.held_out:
            return {}
        stops = set(trainer.eos_token_ids)
        if engine_of(self.settings) == "graph":
            completions = self._written_by_graphs(trainer)
        else:
            with ranks.for_generation(trainer) as model:
                completions = self._written_by_generate(trainer, model, stops)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = {s.name: _mean(self._score(s, self.held_out, texts, completions)) for s in self.scorers}
        return {
            "reward": sum(scorer.weight * rewards[scorer.name] for scorer in self.scorers),
            "rewards": rewards,
            "mean_length": _mean([len(ids) for ids in completions]),
            "clipped_ratio": _mean([ids[-1] not in stops for ids in completions]),
        }

    def _written_by_graphs(self, trainer: Any) -> list[list[int]]:
        from prefbuild.training.sampling import GREEDY

        prompts = [row["prompt_ids"] for row in self.held_out]
        size = self.settings.per_device_train_batch_size
        trainer.rollout.refresh()
        completions: list[list[int]] = []
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            # As many rows each time: another number would be another graph.
            completions += trainer.rollout.complete(some + some[-1:] * (size - len(some)), GREEDY)[: len(some)]
        return completions

    def _written_by_generate(self, trainer: Any, model: Any, stops: set[int]) -> list[list[int]]:
        import torch

        was_training = model.training
        model.eval()
        completions: list[list[int]] = []
        size = self.settings.per_device_train_batch_size
        for start in range(0, len(self.held_out), size):
            batch = [{"input_ids": row["prompt_ids"]} for row in self.held_out[start : start + size]]
            padded = self.tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
            with torch.no_grad(), trainer.accelerator.autocast():
                whole = model.generate(
                    **padded,
                    max_new_tokens=self.settings.max_completion_length,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    min_p=None,
                    eos_token_id=trainer.eos_token_ids,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            completions += [_until(stops, ids) for ids in whole[:, padded["input_ids"].shape[1] :].tolist()]
        model.train(was_training)
        return completions

    def metrics(
        self, trainer: Any, result: Any, history: list[dict[str, Any]], bf16: bool, before: dict[str, Any]
    ) -> dict[str, Any]:
        """train.json. `before` is what `measure` said before training."""
        # TRL logs rewards and tokens only at steps that wrote completions: of num_iterations steps, at the first.
        last = {key: value for entry in history for key, value in entry.items()}
        return {
            **shared_metrics(trainer, result, [*history[:-1], last], bf16),
            **{key: last[key] for key in ("reward", "reward_std", "frac_reward_zero_std", "entropy")},
            **({"kl": last["kl"]} if "kl" in last else {}),
            "rewards": {scorer.name: last[f"rewards/{scorer.name}/mean"] for scorer in self.scorers},
            "completions": pick(last, "completions/"),
            "step_0": before,
            "held_out": self.measure(trainer),
        }


def prompt_arguments(settings: PromptOptions) -> dict[str, Any]:
    """The arguments that TRL's trainers on prompts share."""
    shared = (
        *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("num_iterations", "epsilon", "epsilon_high", "mask_truncated_completions", "beta", "disable_dropout"),
    )
    return {
        **{key: getattr(settings, key) for key in shared},
        "reward_weights": [reward.weight for reward in settings.rewards],
        **engine_arguments(settings),
    }


def save_between_generations(settings: Options) -> Options:
    """Settings whose save_steps are rounded up to a multiple of num_iterations.

    A checkpoint holds no completions, so a run that goes on from one writes new ones at once.
    """
    steps = math.ceil(settings.save_steps / settings.num_iterations) * settings.num_iterations
    return settings.model_copy(update={"save_steps": steps})


def as_prepared(trainer_class: Any, settings: PromptOptions) -> Any:
    """TRL's trainer on prompts that `prepare` rendered, tokenised and counted, in an order that each epoch has anew.

    What writes the completions is the recipe's engine.
    """
    from torch.utils.data import Sampler
    from trl.trainer.utils import RepeatSampler

    class EpochSampler(RepeatSampler):
        """Shuffles by seed and epoch. TRL's own goes on from the epoch before, which a resumed run never drew."""

        def set_epoch(self, epoch: int) -> None:
            self.generator.manual_seed(int(self.seed or 0) + epoch)

    class PreparedPromptTrainer(trainer_class):
        """Generates from the token ids of prepared rows."""

        prompts: Prompts

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            # TRL would tokenise the text again, adding special tokens where the tokenizer does.
            return [self.prompts.ids[prompt] for prompt in prompts], None, {}

        def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
            return EpochSampler(
                dataset,
                mini_repeat_count=self.num_generations,
                batch_size=self.args.generation_batch_size // self.num_generations,
                repeat_count=self.num_iterations * self.args.steps_per_generation,
                seed=self.args.seed,
            )

    return with_graphs(PreparedPromptTrainer) if engine_of(settings) == "graph" else PreparedPromptTrainer


def _read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _until(stops: set[int], ids: list[int]) -> list[int]:
    """The tokens up to the first one that stops, with it; what follows is padding."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values)
