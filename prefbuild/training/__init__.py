"""One flat module a training method: settings, data, model, train, save, top to bottom."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = {
    "dpo": "dpo",
    "sft": "sft",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "grpo": "grpo",
    "rloo": "rloo",
    "reward": "reward",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training is told besides its settings: what it reads, and where it writes."""

    name: str  # the recipe's
    seed: int
    base: dict[str, str]  # what an adapter's config calls the base: {"name", "revision"}
    model: Path  # the base's checkpoint
    reference: Path | None = None  # the reference's checkpoint, where that is not the base
    log_probs: Path | None = None  # what the reference says to the rows, where stage reference left it
    prepared: Path  # the rows, as stage prepare left them
    trained: Path  # where the adapter goes, or all weights
    live: Path  # where DVCLive's curves go
    work: Path  # where checkpoints go; a training goes on from the newest whole one found there


def trainer(method: str, engine: str | None = None) -> Callable[..., dict[str, Any]]:
    """The function `train(settings, run)` of a method, which returns train.json's metrics. Only its module is imported.

    `engine` is DPO's: packed or trl, which None is too.
    """
    module = "packed" if engine == "packed" else MODULES[method]
    train: Callable[..., dict[str, Any]] = import_module(f"prefbuild.training.{module}").train
    return train
