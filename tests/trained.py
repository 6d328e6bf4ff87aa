"""Training of a model on prepared rows that are written here, for tests of every method."""

import functools
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from prefbuild.methods import METHODS, SHAPES, with_engine
from prefbuild.template import load_tokenizer, render_prompt
from prefbuild.training import Run, ranks, trainer

ANIMALS = ("cat", "dog", "horse", "cow", "hen", "fish", "goat", "bee")
BASE = {"name": "test/tiny", "revision": "1234"}
# What methods on prompts need besides: two prompts a step.
ON_PROMPTS = {
    "rewards": [{"reward": "length", "target": 20}],
    "num_generations": 4,
    "max_completion_length": 16,
    "gradient_accumulation_steps": 2,
}


def write_prepared(folder: Path, model: Path, shape: str, train: int = 9, held_out: int = 3) -> Path:
    """Rows as the prepare stage leaves them, rendered and tokenised; returns the folder."""
    tokenizer = load_tokenizer(model)
    folder.mkdir(parents=True)
    rows = [_row(tokenizer, shape, i) for i in range(train + held_out)]
    for name, part in (("train", rows[:train]), ("held_out", rows[train:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def read_prepared(prepared: Path, name: str = "train") -> list[dict[str, Any]]:
    """The rows of train.jsonl or held_out.jsonl."""
    return [json.loads(line) for line in (prepared / f"{name}.jsonl").read_text().splitlines()]


def run_in(folder: Path, model: Path, prepared: Path, **own: Any) -> Run:
    """A run that leaves what it trains in folder/adapter, its curves in folder/live and checkpoints in folder/work."""
    places: dict[str, Any] = {"trained": folder / "adapter", "live": folder / "live", "work": folder / "work"}
    return Run(**{"name": "test", "seed": 42, "base": BASE, "model": model, "prepared": prepared} | places | own)


def train(
    folder: Path, method: str, model: Path, prepared: Path, other: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Train as the train stage does, for four steps unless `settings` say otherwise; returns the metrics.

    `other` is the reference where that is not the base. The adapter, or all weights, are left in folder/adapter, the
    checkpoints in folder/work.
    """
    few: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    few |= {"lora": {"r": 4}} if settings.get("use_peft", True) else {}
    few |= ON_PROMPTS if SHAPES[method] == "prompts" else {}
    asked = METHODS[method].model_validate({"method": method, "precision": "float32", **few, **settings})
    asked = with_engine(asked, ranks.strategy())
    engine = getattr(asked, "engine", None)
    metrics: dict[str, Any] = trainer(method, engine)(asked, run_in(folder, model, prepared, reference=other))
    return metrics


def train_and_die(step: int, *arguments: Any, **settings: Any) -> None:
    """The same, killed at the end of a step. Call it in a process of its own."""
    from prefbuild.training.common import ProgressBar

    def die(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressBar.on_step_end = die  # type: ignore[method-assign]
    train(*arguments, **settings)


def digest(folder: Path) -> dict[str, str]:
    """The sha256 of every file that training left."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "adapter").iterdir()}


def _row(tokenizer: Any, shape: str, i: int) -> dict[str, Any]:
    animal = ANIMALS[i % len(ANIMALS)]
    question = f"Are {i} {animal}s many?" + " Say why." * (i % 3)
    messages = [{"role": "user", "content": question}]
    texts = {"prompt": render_prompt(tokenizer, messages)}
    good, bad = f"Yes, {i} {animal}s are.<|im_end|>\n", "I am not sure." * (1 + i % 2) + f" Ask {i}.<|im_end|>\n"
    if shape == "pairs":
        texts |= {"chosen": good, "rejected": bad}
    elif shape != "prompts":
        texts["completion"] = good if i % 2 else bad
    ids = {f"{part}_ids": tokenizer(text, add_special_tokens=False)["input_ids"] for part, text in texts.items()}
    more: dict[str, Any] = {"labelled": {"label": bool(i % 2)}, "prompts": {"messages": messages, "columns": {}}}
    return {"id": str(i), **texts, **ids, **more.get(shape, {})}


def log_probs(model: Path, adapter: Path | None, prompt: list[int], answer: list[int]) -> Any:
    """The log-probability of every token but the first of prompt and answer, without padding, by a plain forward."""
    import torch

    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        logits = _load(model, adapter)(input_ids=ids).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]


def answer_log_probs(model: Path, adapter: Path | None, prompt: list[int], answer: list[int]) -> Any:
    """The same of the answer's tokens alone, its end of turn among them."""
    return log_probs(model, adapter, prompt, answer)[len(prompt) - 1 :]


@functools.cache
def _load(model: Path, adapter: Path | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter)).eval()


def batches(monkeypatch: pytest.MonkeyPatch, trainer_class: type) -> list[dict[str, Any]]:
    """The batches that a trainer's loss is computed on, training and held out, gathered as it runs."""
    seen: list[dict[str, Any]] = []
    compute_loss = trainer_class.compute_loss  # type: ignore[attr-defined]

    def compute_and_keep(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        seen.append({key: value.clone() if hasattr(value, "clone") else value for key, value in inputs.items()})
        return compute_loss(self, model, inputs, *arguments, **named)

    monkeypatch.setattr(trainer_class, "compute_loss", compute_and_keep)
    return seen


def unpadded(ids: Any, mask: Any) -> list[list[int]]:
    """The rows of a batch without their padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
