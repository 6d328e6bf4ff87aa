"""The rows that stage prepare left: their token ids, the order in which a run takes them, and how they are scored.

Imports nothing heavy: stage reference, when all is known already, is over before torch would be loaded.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefbuild.methods import DPO
from prefbuild.training.packing import Group, packed_size

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, list[int]]  # {"prompt_ids", "chosen_ids", "rejected_ids"}
# Of a row's chosen and rejected tokens, nats, float32.
LogProbs = tuple["np.ndarray", "np.ndarray"]

# Tokens that go through a model at once without a gradient, by device: enough to keep a GPU busy.
SCORED_AT_ONCE = {"cuda": 16384, "cpu": 2048}
# Logits that are there at once: 128 MiB where a kernel does the head, else 256 MiB in float32, a few times over while
# the gradient is computed.
LOGITS_AT_ONCE = 1 << 26


def read_ids(path: Path, parts: tuple[str, ...]) -> list[Row]:
    """The token ids of prepared rows, by part: {"prompt_ids": [...], ...}."""
    with open(path, encoding="utf-8") as file:
        return [{f"{part}_ids": row[f"{part}_ids"] for part in parts} for row in map(json.loads, file)]


def group_of(row: Row) -> Group:
    """A pair as a prompt and two completions."""
    return row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]


def steps_of_a_run(settings: DPO, seed: int, num_rows: int) -> Iterator[list[int]]:
    """The rows of every optimizer step, in Trainer's order: shuffled anew each epoch, by seed and epoch."""
    rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps_an_epoch = math.ceil(num_rows / rows_a_step)
    num_steps = settings.max_steps or math.ceil((settings.num_train_epochs or 1.0) * steps_an_epoch)
    for step in range(num_steps):
        epoch, start = step // steps_an_epoch, step % steps_an_epoch * rows_a_step
        if start == 0:
            order = epoch_order(seed, epoch, num_rows)
        yield order[start : start + rows_a_step]


def epoch_order(seed: int, epoch: int, num_rows: int) -> list[int]:
    """The order in which accelerate's SeedableRandomSampler, Trainer's, draws rows in an epoch."""
    import torch

    order: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


def rows_of_a_run(settings: DPO, seed: int, num_rows: int) -> list[int]:
    """The prepared rows that a run uses, each once, in the order of their first use."""
    return list(dict.fromkeys(row for step in steps_of_a_run(settings, seed, num_rows) for row in step))


def in_parts(rows: list[Row], device: str) -> list[list[Row]]:
    """Rows cut, in order, into what goes through a model at once without a gradient."""
    parts: list[list[Row]] = []
    filled = 0
    for row in rows:
        size = packed_size(group_of(row))
        if not parts or filled + size > SCORED_AT_ONCE[device]:
            parts.append([])
            filled = 0
        parts[-1].append(row)
        filled += size
    return parts
