"""One flat module a training method: settings, data, model, train, save, top to bottom."""

from collections.abc import Callable
from importlib import import_module
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


def trainer(method: str) -> Callable[..., dict[str, Any]]:
    """The `train` function of a method; only its module is imported."""
    train: Callable[..., dict[str, Any]] = import_module(f"prefbuild.training.{MODULES[method]}").train
    return train
