"""The model that DPO and KTO hold on to: the base, or the merged model of another recipe."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefbuild.artifact import sha256_file, verify_artifact
from prefbuild.errors import StageError
from prefbuild.methods import DPO, KTO, TrainOptions
from prefbuild.template import load_tokenizer, tokenize
from prefbuild.training import Run
from prefbuild.training.common import load_policy

# A policy that is its reference gives 0 exactly, unless rounding differs: nats by which a whole answer may be likelier.
TOLERANCE = 0.2
# The losses that are ln 2 while policy and reference are the same.
LN_2_LOSSES = {"sigmoid", "sigmoid_norm", "robust"}


def load_reference(settings: TrainOptions, model: Path, reference: Path | None, bf16: bool) -> Any:
    """A second model in the arithmetic of the first; None where the base without its adapter is the reference.

    In no other arithmetic: a policy that is its reference must give the same numbers before the first update.
    """
    if reference is None and settings.use_peft:
        return None
    return load_policy(settings, reference or model, bf16)


def check_tokenizer(model: Path, reference: Path, rows: Path, parts: tuple[str, ...]) -> None:
    """StageError unless a reference reads the prepared rows' token ids as the base does, and scores as many tokens.

    Compared are the vocabularies, the ids of every row's texts, and the rows of the output layer. `parts` are the
    texts of a row.
    """
    verify_artifact(reference)
    sizes = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (model, reference)]
    ours, theirs = (config.get("text_config", config).get("vocab_size") for config in sizes)
    if ours != theirs:
        raise StageError(
            f"train.reference: {reference} scores {theirs} tokens, and the base {model} scores {ours}, so their "
            "probabilities can't be compared; name a recipe that starts from the same base"
        )
    files = [folder / "tokenizer.json" for folder in (model, reference)]
    if all(file.exists() for file in files) and sha256_file(files[0]) == sha256_file(files[1]):
        return
    tokenizer = load_tokenizer(reference)
    fix = "train.reference must have the base's tokenizer: name a recipe that starts from the same base"
    if tokenizer.get_vocab() != load_tokenizer(model).get_vocab():
        raise StageError(f"{reference}: has another vocabulary than the base {model}; {fix}")
    with open(rows, encoding="utf-8") as file:
        for number, row in enumerate(map(json.loads, file), start=1):
            for part, ids in zip(parts, tokenize(tokenizer, [row[part] for part in parts]), strict=True):
                wanted = row[f"{part}_ids"]
                if ids[: len(wanted)] != wanted:  # an answer's ids may be cut
                    raise StageError(
                        f"{rows}:{number}: {part} has other token ids in {reference} than in the base {model}; {fix}"
                    )


def reference_checks(settings: DPO | KTO, run: Run) -> list[TrainerCallback]:
    """The callback that checks the reference where it is the base."""
    return [] if run.reference is not None else [Reference(settings)]


class Reference(TrainerCallback):
    """The reference is checked where it is the base: before the first update that is the model trained on.

    What is logged of step 1 was computed before its update.
    """

    def __init__(self, settings: DPO | KTO):
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
        if state.global_step == 1 and "loss" in logs:
            check_reference(self.settings, logs)


def check_reference(settings: DPO | KTO, first: dict[str, Any]) -> None:
    """StageError unless step 1's rewards (so their margins) are 0, and DPO's loss is ln 2 where that follows from them.

    Not checked with dropout, which makes the two differ by itself, nor is a loss with further terms.
    """
    if not settings.disable_dropout:
        return
    # KTO's first batch may have answers of one kind alone.
    rewards = {side: first[f"rewards/{side}"] for side in ("chosen", "rejected") if f"rewards/{side}" in first}
    if any(abs(reward) > TOLERANCE * settings.beta for reward in rewards.values()):
        found = " and ".join(f"{reward:.3g} ({side})" for side, reward in rewards.items())
        raise StageError(
            f"step 1 has rewards of {found} before any update, where all "
            "must be 0: the reference is not the model trained on as it is before training. Check that the base "
            "computes alike twice; with train.precision: float32 what is left is no rounding"
        )
    if isinstance(settings, KTO):
        return  # its loss depends on the weights and on KL
    losses, loss = set(settings.loss_type), first["loss"]
    if not losses <= LN_2_LOSSES or settings.use_weighting or "aux_loss" in first:
        return
    wanted = math.log(2) * sum(settings.loss_weights or [1.0] * len(settings.loss_type))
    if abs(loss - wanted) > 0.02 * wanted:
        raise StageError(
            f"step 1 has a loss of {loss:.4g} before any update, where {' and '.join(settings.loss_type)} of rewards "
            f"of 0 must be {wanted:.4g} (ln 2 a loss): what is trained is not the loss the recipe names"
        )
