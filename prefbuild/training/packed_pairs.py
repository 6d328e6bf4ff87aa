"""The pairs of an optimizer step, in Trainer's order, weighed as TRL weighs them, and packed into bins."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from prefbuild.methods import DPO
from prefbuild.training.losses import NEEDS_WHOLE_BATCH
from prefbuild.training.packed_model import pack_rows
from prefbuild.training.packing import Packed, into_bins, packed_size
from prefbuild.training.prepared import LogProbs, Row, epoch_order, group_of


class Steps:
    """A batch sampler whose batches are the rows of an epoch's optimizer steps, as steps_of_a_run has them."""

    def __init__(self, settings: DPO, seed: int, num_rows: int):
        self.rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.seed, self.num_rows, self.epoch = seed, num_rows, 0

    def set_epoch(self, epoch: int) -> None:
        """Whose order the next iteration has. Trainer says so."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.rows_a_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.seed, self.epoch, self.num_rows)
        yield from (order[start : start + self.rows_a_step] for start in range(0, self.num_rows, self.rows_a_step))


class StepLoader(DataLoader):
    """A DataLoader of steps, which Trainer can tell the epoch."""

    def __init__(self, steps: Steps):
        super().__init__(range(steps.num_rows), batch_sampler=steps, collate_fn=list)  # type: ignore[arg-type]
        self.steps = steps

    def set_epoch(self, epoch: int) -> None:
        """See Steps."""
        self.steps.set_epoch(epoch)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs that go through the model together, on its device."""

    packed: Packed
    reference: Any  # [S] log-probabilities of the reference
    counts: Any  # [2n] tokens of answers, chosen and rejected by turns
    weights: Any  # [n] of pairs in the loss
    shares: Any  # [n] of pairs in other metrics, which are means of micro-batches' means
    sizes: list[int]  # of pairs whose loss is computed together; they sum to n


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows, and what the reference says to those of them that are used."""

    settings: DPO
    rows: list[Row]
    log_probs: dict[int, LogProbs]  # by row
    budget: int  # tokens that go through the model at once
    held_out: bool = False  # all are one step, whose loss is a mean over rows: so Trainer's evaluate has it

    def bins(self, step: list[int], device: Any, num_ranks: int = 1, rank: int = 0) -> list[Bin]:
        """One rank's part of the rows of a step, on its device."""
        units = self.units(step)
        units = share(units, [self.size(unit) for unit in units], num_ranks, rank)
        members = into_bins([self.size(unit) for unit in units], self.budget)
        return [self.bin([units[index] for index in some], device) for some in members]

    def units(self, step: list[int]) -> list[list[tuple[int, float]]]:
        """What of a step must go through the model together: (row, weight) of single pairs, or whole micro-batches.

        TRL's loss is a mean over micro-batches of the means over their pairs, so the pairs of a last, smaller
        micro-batch weigh more.
        """
        size = self.settings.per_device_train_batch_size
        batches = [step[start : start + size] for start in range(0, len(step), size)]
        weighted = [[(row, 1 / (len(batch) * len(batches))) for row in batch] for batch in batches]
        if self.need_whole_batches:
            return weighted
        return [[pair] for batch in weighted for pair in batch]

    @property
    def need_whole_batches(self) -> bool:
        """Whether a pair's loss depends on the others of its micro-batch."""
        return bool(NEEDS_WHOLE_BATCH & set(self.settings.loss_type))

    def size(self, unit: list[tuple[int, float]]) -> int:
        """Tokens of a unit."""
        return sum(packed_size(group_of(self.rows[row])) for row, _ in unit)

    def bin(self, units: list[list[tuple[int, float]]], device: Any) -> Bin:
        """Units that are packed together."""
        used = [row for unit in units for row, _ in unit]
        packed = pack_rows([self.rows[row] for row in used], device)
        reference = np.concatenate([answer for row in used for answer in self.log_probs[row]])
        shares = [weight for unit in units for _, weight in unit]
        return Bin(
            packed=packed,
            reference=on_device(reference, device),
            counts=on_device(packed.lengths, device, torch.int64),
            weights=on_device([1 / len(self.rows)] * len(used) if self.held_out else shares, device),
            shares=on_device(shares, device),
            sizes=[len(unit) for unit in units] if self.need_whole_batches else [len(used)],
        )

    def num_tokens(self, step: list[int]) -> int:
        """Tokens of a step's prompts and answers, as TRL counts them: a prompt with each of its answers."""
        rows = (self.rows[row] for row in step)
        return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def on_device(values: Any, device: Any, dtype: Any = torch.float32) -> Any:
    """Numbers as a tensor on a device, without waiting for it."""
    found = torch.tensor(values, dtype=dtype)
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


def share(units: list[Any], sizes: list[int], num_ranks: int, rank: int) -> list[Any]:
    """One rank's part of a step: the largest units first, each to whom has the fewest tokens so far."""
    filled = [0] * num_ranks
    mine = []
    for index in sorted(range(len(units)), key=lambda index: (-sizes[index], index)):
        to = filled.index(min(filled))
        filled[to] += sizes[index]
        if to == rank:
            mine.append(index)
    return [units[index] for index in sorted(mine)]
