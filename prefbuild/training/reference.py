"""The model that DPO and KTO hold on to: the base, or the merged model of another recipe."""

import json
from pathlib import Path
from typing import Any

from prefbuild.artifact import sha256_file, verify_artifact
from prefbuild.errors import StageError
from prefbuild.methods import TrainOptions
from prefbuild.template import load_tokenizer, tokenize
from prefbuild.training.common import load_policy


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
