"""DPO on packed pairs: no padding, every prompt once, completion tokens scored and no others, no second model.

The same loss on the same rows in the same order as TRL's DPOTrainer (engine: trl, which the tests compare it with),
in a third of its arithmetic. A step's pairs go through the model in as few rows as memory takes (planned before the
first step); reference log-probabilities are computed once for the rows that a run uses, or read from stage reference.
On several GPUs each takes its share of a step's tokens, not of its pairs.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prefbuild.errors import StageError
from prefbuild.methods import DPO, PARTS
from prefbuild.training import Run, ranks
from prefbuild.training.attention import OTHER_ENGINE, use_packed_attention
from prefbuild.training.common import (
    callbacks,
    lora_config,
    model_options,
    newest_checkpoint,
    pick,
    read_ids,
    run_trainer,
    save_trained,
    set_up,
    shared_metrics,
    trainer_arguments,
)
from prefbuild.training.fused import dequantise, fuse
from prefbuild.training.losses import NEEDS_WHOLE_BATCH, answer_sums, dpo_loss
from prefbuild.training.packing import Group, into_bins, pack, packed_size
from prefbuild.training.reference import check_tokenizer, read_log_probs, reference_checks
from prefbuild.training.scoring import Scores, score

Row = dict[str, list[int]]
LogProbs = tuple[list[float], list[float]]  # of a row's chosen and rejected tokens, nats

MULTIPLE = 128  # a row of tokens is filled up to this on a GPU, whose kernels are fastest on whole tiles
# Nats by which a packed answer may be likelier or less likely than the same answer alone, a token, on average.
DISAGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


# ---- what a run takes


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
    order: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


def rows_of_a_run(settings: DPO, seed: int, num_rows: int) -> list[int]:
    """The prepared rows that a run uses, each once, in the order of their first use."""
    return list(dict.fromkeys(row for step in steps_of_a_run(settings, seed, num_rows) for row in step))


# ---- scores


def group_of(row: Row) -> Group:
    """A pair as a prompt and two completions."""
    return row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]


def score_rows(model: Any, rows: list[Row], *, statistics: bool = False) -> tuple[Scores, list[int]]:
    """Score pairs in one packed row; also how many tokens each answer has, chosen and rejected by turns."""
    device = next(model.parameters()).device
    packed = pack([group_of(row) for row in rows], device, MULTIPLE if device.type == "cuda" else 1)
    return score(model, packed, statistics=statistics), packed.lengths


def token_log_probs(model: Any, rows: list[Row], budget: int, done: Callable[[int], None]) -> list[LogProbs]:
    """Log-probabilities of every answer token of every row, in order. `done` is told how many rows are new.

    Rows go through the model in order, as many at once as `budget` tokens take.
    """
    found: list[LogProbs] = []
    waiting: deque[tuple[Any, list[int]]] = deque()

    def collect() -> None:
        values, lengths = waiting.popleft()
        parts = [part.tolist() for part in values.cpu().split(lengths)]
        found.extend(zip(parts[0::2], parts[1::2], strict=True))
        done(len(lengths) // 2)

    for some in in_order([packed_size(group_of(row)) for row in rows], budget):
        with torch.no_grad():
            scores, lengths = score_rows(model, [rows[index] for index in some])
        waiting.append((scores.log_probs, lengths))
        if len(waiting) > 1:  # a GPU is given the next rows before the last ones' results are asked for
            collect()
    while waiting:
        collect()
    return found


def in_order(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices 0, 1, 2, ... cut wherever `budget` would be exceeded."""
    parts: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not parts or filled + size > budget:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += size
    return parts


def reference_log_probs(
    settings: DPO, model: Path, rows: list[Row], bf16: bool, done: Callable[[int], None] = lambda _: None
) -> list[LogProbs]:
    """What a reference (a checkpoint's folder) says to rows, in order: in the arithmetic it would be trained in."""
    if not rows:
        return []
    reference = load_model(settings, model, bf16)
    fuse(reference)
    with torch.no_grad(), autocast(reference, bf16):
        check_packed(reference.eval(), rows)
        return token_log_probs(reference, rows, scoring_budget(reference), done)


def scoring_budget(model: Any) -> int:
    """Tokens that go through a model at once without a gradient: enough to keep a GPU busy."""
    return 16384 if next(model.parameters()).is_cuda else 2048


def autocast(model: Any, bf16: bool) -> Any:
    """The arithmetic of a run, as Trainer has it."""
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=bf16)


# ---- the model


def load_model(settings: DPO, folder: Path, bf16: bool) -> Any:
    """A checkpoint on this process' device, with packed attention; NF4 weights are dequantised once.

    StageError when the model has parts that packing would change.
    """
    options = model_options(settings, bf16)
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise StageError(f"{folder}: its loss has a term of the experts' router, which packing has not; {OTHER_ENGINE}")
    if settings.quantization is not None:
        dequantise(model)
    if settings.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    use_packed_attention(model)
    model.config.use_cache = False
    return model


def check_packed(model: Any, rows: list[Row]) -> None:
    """StageError unless packed pairs score as each answer does alone, by the model's own code on a plain row.

    On the two shortest rows: what is wrong with a model's attention or positions shows in any.
    """
    shortest = sorted(rows, key=lambda row: packed_size(group_of(row)))[:2]
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.no_grad():
        scores, _ = score_rows(model, shortest)
        whole.set_attn_implementation("sdpa")
        try:
            alone = [
                _alone(model, row["prompt_ids"], row[f"{answer}_ids"])
                for row in shortest
                for answer in ("chosen", "rejected")
            ]
        finally:
            use_packed_attention(whole)
    difference = (scores.log_probs - torch.cat(alone)).abs().mean().item()
    dtype = torch.get_autocast_dtype(scores.log_probs.device.type) if torch.is_autocast_enabled() else whole.dtype
    if not difference <= DISAGREEMENT.get(dtype, 1e-3):  # written so that NaN fails
        raise StageError(
            f"{type(whole).__name__}: packed answers score {difference:.3g} nats a token otherwise than alone, so "
            f"this model's attention is not what packing takes it for; {OTHER_ENGINE}"
        )


def _alone(model: Any, prompt: list[int], answer: list[int]) -> Any:
    ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(1).gather(1, torch.tensor(answer, device=ids.device)[:, None])[:, 0]


def token_budget(model: Any) -> int:
    """Tokens that go through a model at once with a gradient."""
    if not next(model.parameters()).is_cuda:
        return 8192
    text = model.config.get_text_config()
    hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    a_token = 2 * layers * (5 * hidden + 3 * wide + 3 * hidden // 4) * 1.2
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    return int((0.9 * total - weights - 4e9) / a_token)


# ---- train


class Steps:
    """A batch sampler whose batches are the rows of optimizer steps, as steps_of_a_run has them."""

    def __init__(self, settings: DPO, seed: int, num_rows: int):
        self.rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.seed, self.num_rows, self.epoch = seed, num_rows, 0

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.rows_a_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.seed, self.epoch, self.num_rows)
        yield from (order[start : start + self.rows_a_step] for start in range(0, self.num_rows, self.rows_a_step))


class PackedTrainer(Trainer):
    """Trainer on packed pairs. Its batches are the rows of a step by number."""

    _total_train_tokens = 0  # named as in TRL's trainers

    def __init__(self, *, settings: DPO, rows: list[Row], log_probs: dict[int, LogProbs], budget: int, **named: Any):
        super().__init__(train_dataset=rows, **named)  # type: ignore[arg-type]
        self.settings, self.rows, self.log_probs, self.budget = settings, rows, log_probs, budget
        self.logged: list[Any] = []  # VALUES of the steps since the last logged point, on the device

    def get_train_dataloader(self) -> Any:
        """Every process draws all rows of a step; see `share`."""
        steps = Steps(self.settings, int(self.args.seed), len(self.rows))
        return StepLoader(range(len(self.rows)), batch_sampler=steps, collate_fn=list)  # type: ignore[arg-type,var-annotated]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The gradient of one optimizer step; returns its loss, which stays on the device."""
        model.train()
        units = self.units(inputs)
        mine = share(units, [self.size(unit) for unit in units], ranks.num_ranks(), ranks.number())
        total = self.sum_up(mine, backward=True)
        ranks.sum_gradients(self.model)
        ranks.add_up(total)
        self.logged.append(total)
        self._total_train_tokens += sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in (self.rows[index] for index in inputs)
        )
        return total[0].clone()

    def units(self, step: list[int]) -> list[list[tuple[int, float]]]:
        """What of a step must go through the model together: (row, weight) of single pairs, or whole micro-batches.

        TRL's loss is a mean over micro-batches of the means over their pairs, so the pairs of a last, smaller
        micro-batch weigh more.
        """
        size = self.settings.per_device_train_batch_size
        batches = [step[start : start + size] for start in range(0, len(step), size)]
        weighted = [[(row, 1 / (len(batch) * len(batches))) for row in batch] for batch in batches]
        if NEEDS_WHOLE_BATCH & set(self.settings.loss_type):
            return weighted
        return [[pair] for batch in weighted for pair in batch]

    def size(self, unit: list[tuple[int, float]]) -> int:
        """Tokens of a unit."""
        return sum(packed_size(group_of(self.rows[row])) for row, _ in unit)

    def sum_up(self, units: list[list[tuple[int, float]]], *, backward: bool) -> Any:
        """Values (VALUES, weighed and added up) of units; with `backward` the gradient of their loss is added too."""
        total = torch.zeros(len(VALUES), device=self.args.device)
        for members in into_bins([self.size(unit) for unit in units], self.budget):
            with torch.set_grad_enabled(backward), self.compute_loss_context_manager():
                loss, values = self.bin_values([units[index] for index in members])
            if backward:
                self.accelerator.backward(loss)
            total += values
        return total

    def bin_values(self, units: list[list[tuple[int, float]]]) -> tuple[Any, Any]:
        """(loss with its gradient, VALUES) of units that are packed together."""
        pairs = [row for unit in units for row, _ in unit]
        weights = self.tensor([weight for unit in units for _, weight in unit])
        scores, lengths = score_rows(self.model, [self.rows[row] for row in pairs], statistics=True)
        counts = self.tensor(lengths, torch.int64)
        flat = [value for row in pairs for answer in self.log_probs[row] for value in answer]
        alpha = self.settings.ld_alpha
        chosen, rejected, unweighted = answer_sums(scores.log_probs, counts, alpha)
        ref_chosen, ref_rejected, _ = answer_sums(self.tensor(flat), counts, alpha)
        columns = chosen, rejected, ref_chosen, ref_rejected, counts[0::2], counts[1::2], unweighted
        parts, start = [], 0
        whole = NEEDS_WHOLE_BATCH & set(self.settings.loss_type)
        for size in [len(unit) for unit in units] if whole else [len(pairs)]:
            parts.append(dpo_loss(self.settings, *(column[start : start + size] for column in columns)))
            start += size
        loss = (torch.cat(parts) * weights).sum()
        with torch.no_grad():
            rewards = self.settings.beta * (chosen - ref_chosen), self.settings.beta * (rejected - ref_rejected)
            of_pairs = [*rewards, rewards[0] - rewards[1], (rewards[0] > rewards[1]).float(), chosen, rejected]
            is_chosen = torch.arange(len(lengths), device=counts.device).remainder(2) == 0
            first = is_chosen.repeat_interleave(counts, output_size=sum(lengths))
            of_tokens = [
                scores.entropies.sum(),
                (scores.mean_logits * first).sum(),
                (scores.mean_logits * ~first).sum(),
                (scores.top1 & first).sum(),
                counts[0::2].sum(),
                counts[1::2].sum(),
            ]
            values = torch.stack([loss.detach(), *((value * weights).sum() for value in of_pairs), *of_tokens])
        return loss, values

    def tensor(self, values: list[Any], dtype: Any = torch.float32) -> Any:
        """A list on the device, without waiting for it."""
        found = torch.tensor(values, dtype=dtype)
        device = self.args.device
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of TRL's DPOTrainer, by its names: means over the steps since the last point."""
        if self.logged and "loss" in logs:
            points = [named_values(values.tolist()) for values in self.logged]
            logs |= {key: sum(point[key] for point in points) / len(points) for key in points[0] if key != "loss"}
            logs["num_tokens"] = float(self._total_train_tokens)
            self.logged.clear()
        super().log(logs, start_time)

    def measure(self, rows: list[Row], log_probs: dict[int, LogProbs]) -> dict[str, float]:
        """The metrics of held-out rows: means over pairs, tokens' over tokens."""
        kept = self.rows, self.log_probs
        self.rows, self.log_probs = rows, log_probs
        self.model.eval()
        size = self.settings.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        units = [[(row, 1 / len(rows)) for row in batch] for batch in batches]
        try:
            return named_values(self.sum_up(units, backward=False).tolist())
        finally:
            self.rows, self.log_probs = kept


class StepLoader(DataLoader):  # type: ignore[type-arg]
    """A DataLoader that Trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.epoch = epoch  # type: ignore[union-attr]


# What is summed over a step: the first seven are weighed means over pairs, the others sums over tokens.
VALUES = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"),
    *("chosen_tokens", "rejected_tokens"),
)


def named_values(values: list[float]) -> dict[str, float]:
    """Summed VALUES as means, by TRL's names."""
    found = dict(zip(VALUES, values, strict=True))
    chosen, rejected = found.pop("chosen_tokens"), found.pop("rejected_tokens")
    found["entropy"] /= chosen + rejected
    found["mean_token_accuracy"] /= chosen
    found["logits/chosen"] /= chosen
    found["logits/rejected"] /= rejected
    return found


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


def log_probs_of_another(settings: DPO, run: Run, rows: list[Row], bf16: bool) -> list[LogProbs] | None:
    """What the reference says to rows, where that is known already or takes a model of its own; else None."""
    if run.log_probs is not None:
        return read_log_probs(run.log_probs, rows)
    if run.reference is None and settings.use_peft:
        return None
    return with_progress(run.name, rows, partial(reference_log_probs, settings, run.reference or run.model, rows, bf16))


def with_progress(
    name: str, rows: list[Row], find: Callable[[Callable[[int], None]], list[LogProbs]]
) -> list[LogProbs]:
    """Call `find` with what moves a progress bar of rows."""
    interval = 0.1 if sys.stderr.isatty() else 15
    with tqdm(total=len(rows), desc=f"reference {name}", unit="row", dynamic_ncols=True, mininterval=interval) as bar:
        return find(bar.update)


def train(settings: DPO, run: Run) -> dict[str, Any]:
    """Train on prepared rows and save the adapter, or all weights; returns the metrics of train.json.

    Raises StageError when the loss is no number, the reference is not what it should be, or the model can't be packed.
    """
    from peft import get_peft_model
    from transformers import AutoTokenizer

    # ---- settings
    bf16 = set_up(settings, run.seed)
    rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    # Trainer's batch is a whole step.
    as_trainer = settings.model_copy(
        update={
            "per_device_train_batch_size": rows_a_step,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        }
    )
    arguments = trainer_arguments(TrainingArguments, as_trainer, run=run, bf16=bf16, remove_unused_columns=False)

    # ---- data
    train_rows = read_ids(run.prepared / "train.jsonl", PARTS["pairs"])
    held_out_rows = read_ids(run.prepared / "held_out.jsonl", PARTS["pairs"])
    used = rows_of_a_run(settings, run.seed, len(train_rows))

    # ---- reference
    if run.reference is not None:
        check_tokenizer(run.model, run.reference, run.prepared / "train.jsonl", PARTS["pairs"])
    scored = [*(train_rows[index] for index in used), *held_out_rows]
    reference = log_probs_of_another(settings, run, scored, bf16)

    # ---- model
    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    model = load_model(settings, run.model, bf16)
    if settings.use_peft:
        model = get_peft_model(model, lora_config(settings))
    fuse(model)
    with autocast(model, bf16):
        check_packed(model.eval(), scored[:rows_a_step])
        if reference is None:  # the base itself, which is at hand
            with model.disable_adapter():
                reference = with_progress(
                    run.name, scored, partial(token_log_probs, model, scored, scoring_budget(model))
                )

    # ---- train
    trainer = PackedTrainer(
        settings=settings,
        rows=train_rows,
        log_probs=dict(zip(used, reference, strict=False)),
        budget=token_budget(model),
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(run.model, local_files_only=True),
        callbacks=[*callbacks(run, checkpoint), *reference_checks(settings, run)],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    first, last = history[0], history[-1]
    held_out = trainer.measure(held_out_rows, dict(enumerate(reference[len(used) :]))) if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"], "margins": first["rewards/margins"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["loss"], "rewards": pick(held_out, "rewards/")} if held_out else {},
    }
