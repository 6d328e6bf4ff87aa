"""What the reference says to the rows that DPO's packed engine trains on: once, and not again for another beta.

Only the rows that a run uses are scored, and held-out rows. What was computed for one recipe, or before a build was
killed, is kept in build/.work/references and read by the next: then no model is loaded, on a CPU not even torch.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefbuild.artifact import digest_of, read_manifest, verify_artifact, writable
from prefbuild.errors import StageError
from prefbuild.machine import cpu_bf16, cpu_flags
from prefbuild.methods import DPO, PARTS
from prefbuild.resolve import STAGE_VERSIONS
from prefbuild.training.log_probs import open_cache, part_key, write_log_probs
from prefbuild.training.prepared import Row, in_parts, read_ids, rows_of_a_run

CACHE = Path("build/.work/references")
# Beside torch, whose versions may round otherwise.
COMPUTING = ("torch", "transformers", "bitsandbytes", "liger_kernel")


def run(settings: dict[str, Any], inputs: dict[str, Path], outputs: dict[str, Path], work: Path, name: str) -> None:
    """Leave the log-probabilities of every answer token (training/log_probs.py has the files).

    Raises StageError when the reference reads other token ids than the base, gives no numbers, or can't be packed.
    """
    asked = DPO.model_validate({"method": "dpo", **settings["train"]})
    prepared, model = inputs["prepared"], inputs.get("reference", inputs["model"])
    verify_artifact(prepared)
    if "reference" in inputs:
        from prefbuild.training.reference import check_tokenizer

        check_tokenizer(inputs["model"], model, prepared / "train.jsonl", PARTS["pairs"])

    rows = {file: read_ids(prepared / file, PARTS["pairs"]) for file in ("train.jsonl", "held_out.jsonl")}
    numbers = {file: list(range(len(rows[file]))) for file in rows}
    if "seed" in settings:  # less than an epoch
        numbers["train.jsonl"] = rows_of_a_run(asked, settings["seed"], len(rows["train.jsonl"]))
    used = {file: [rows[file][number] for number in numbers[file]] for file in rows}

    bf16, facts = arithmetic(asked)
    device = "cuda" if facts["device"].startswith("cuda") else "cpu"
    facts |= {"model": read_manifest(model)["digest"], "version": STAGE_VERSIONS["reference"]}
    kept = digest_of(facts).removeprefix("sha256:")[:32] + ".db"
    # In the order of their use, so that a longer run finds what a shorter one computed; held-out rows by themselves.
    parts = [*in_parts(used["train.jsonl"], device), *in_parts(used["held_out.jsonl"], device)]
    values = known_or_computed(asked, model, parts, bf16, writable(CACHE, work / "references") / kept, name)
    places = {file: list(zip(numbers[file], used[file], strict=True)) for file in rows}
    write_log_probs(outputs["reference_log_probs"], places, values)


def known_or_computed(asked: DPO, model: Path, parts: list[list[Row]], bf16: bool, cache: Path, name: str) -> list[Any]:
    """The values [tokens] float32 of every part, from the cache or, kept there one by one, from the model."""
    import numpy as np
    from tqdm import tqdm

    keys = [part_key(rows) for rows in parts]
    with open_cache(cache) as kept:
        found = {key: kept.get(key, num_scored(rows)) for key, rows in zip(keys, parts, strict=True)}
        missing = {key: rows for key, rows in zip(keys, parts, strict=True) if found[key] is None}
        num_rows, num_missing = (sum(map(len, some)) for some in (parts, missing.values()))
        print(f"reference: {num_rows} rows, {num_rows - num_missing} kept from before", file=sys.stderr)
        if missing:
            from prefbuild.training.ahead import read_ahead

            read_ahead(asked, model)
            from prefbuild.training.common import set_up
            from prefbuild.training.packed_model import reference_log_probs

            set_up(asked, seed=0)  # which nothing here draws from
            bar = tqdm(
                total=num_rows,
                initial=num_rows - num_missing,
                desc=f"reference {name}",
                unit="row",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 15,
            )
            with bar:
                computed = reference_log_probs(asked, model, list(missing.values()), bf16)
                for (key, rows), part in zip(missing.items(), computed, strict=True):
                    values = np.concatenate([answer for row in part for answer in row])
                    if not np.isfinite(values).all():
                        raise StageError(
                            f"{model}: gives an answer a log-probability that is no number; it can be no reference. "
                            "Look at its weights, or write train.precision: float32"
                        )
                    kept.put(key, values)
                    found[key] = values
                    bar.update(len(rows))
    return [found[key] for key in keys]


def num_scored(rows: list[Row]) -> int:
    """Tokens of all answers."""
    return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def arithmetic(asked: DPO) -> tuple[bool, dict[str, Any]]:
    """(whether in bf16, everything besides model and rows that the numbers depend on)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # as a job without GPUs is told: no need to ask torch
        cuda = False
    else:
        import torch

        cuda = torch.cuda.is_available()
    if cuda:
        from prefbuild.training.common import use_bf16

        bf16, device = use_bf16(asked.precision), f"cuda {torch.cuda.get_device_name()}"
    else:
        bf16 = asked.precision == "bf16" or (asked.precision == "auto" and bool(cpu_bf16()))
        threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
        device = f"{platform.machine()}, {threads} threads, {digest_of(sorted(cpu_flags()))}"
    return bf16, {
        "bf16": bf16,
        "device": device,
        **{key: getattr(asked, key) for key in ("quantization", "deterministic", "use_peft")},
        "image": os.environ.get("PREFBUILD_IMAGE"),
        "versions": {name: _version(name) for name in COMPUTING},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
