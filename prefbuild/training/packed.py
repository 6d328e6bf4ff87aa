"""DPO on packed pairs: no padding, every prompt once, completion tokens scored and no others, no second model.

The same loss on the same rows in the same order as TRL's DPOTrainer (engine: trl, which the tests compare it with),
in a third of its arithmetic. A step's pairs go through the model in as few rows as memory takes (planned before the
first step); reference log-probabilities are computed once for the rows that a run uses, or read from stage reference.
On several GPUs each takes its share of a step's tokens, not of its pairs.
"""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from prefbuild.methods import DPO, PARTS
from prefbuild.training import Run, ranks
from prefbuild.training.common import (
    callbacks,
    dpo_metrics,
    lora_config,
    newest_checkpoint,
    run_trainer,
    save_trained,
    set_up,
    trainer_arguments,
)
from prefbuild.training.fused import fuse, leave_out_unread
from prefbuild.training.log_probs import read_log_probs
from prefbuild.training.losses import answer_sums, dpo_loss
from prefbuild.training.packed_model import (
    autocast,
    check_packed,
    load_model,
    reference_log_probs,
    token_log_probs,
    without_dropout,
)
from prefbuild.training.packed_pairs import Bin, Pairs, StepLoader, Steps
from prefbuild.training.planned import plan_run
from prefbuild.training.prepared import LogProbs, Row, in_parts, read_ids, rows_of_a_run, steps_of_a_run
from prefbuild.training.reference import check_tokenizer, reference_checks
from prefbuild.training.scoring import score


class PackedTrainer(Trainer):
    """Trainer on packed pairs. Its batches are the rows of a step by number, and their bins."""

    _total_train_tokens = 0  # named as in TRL's trainers

    def __init__(self, *, pairs: Pairs, **named: Any):
        super().__init__(train_dataset=pairs.rows, **named)
        self.pairs = pairs
        self.logged: list[Any] = []  # VALUES of the steps since the last logged point, on the device
        self.unread: Point | None = None
        self.iterator: Any = None
        self.ahead: tuple[list[int], list[Bin]] | None = None  # the next step

    def get_train_dataloader(self) -> Any:
        """Every process draws all rows of a step; see `share`."""
        return StepLoader(Steps(self.pairs.settings, int(self.args.seed), len(self.pairs.rows)))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The next step, which is packed while a GPU still computes the one before."""
        if epoch_iterator is not self.iterator:
            self.iterator, self.ahead = epoch_iterator, None
        step = self.ahead or self.next_step()
        self.ahead = None
        return [step] if step else [], None

    def next_step(self) -> tuple[list[int], list[Bin]] | None:
        """The rows of the epoch's next step and their bins; None at its end."""
        rows = next(self.iterator, None)
        if rows is None:
            return None
        return rows, self.pairs.bins(rows, self.args.device, ranks.num_ranks(), ranks.number())

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The gradient of one optimizer step; returns its loss, which stays on the device."""
        rows, bins = inputs
        if not model.training:  # which asks every module
            model.train()
        total = self.sum_up(bins, backward=True)
        if self.state.global_step + 1 < self.state.max_steps:  # of later rows the reference is not known
            self.ahead = self.next_step()
        ranks.sum_gradients(self.model)
        ranks.add_up(total)
        self.logged.append(total)
        self._total_train_tokens += self.pairs.num_tokens(rows)
        return total[0].clone()

    def sum_up(self, bins: list[Bin], *, backward: bool) -> Any:
        """[VALUES] of bins, weighed and added up; with `backward` the gradient of their loss is added too."""
        total = torch.zeros(len(VALUES), device=self.args.device)
        for one in bins:
            with torch.set_grad_enabled(backward), self.compute_loss_context_manager():
                loss, values = self.values(one)
            if backward:
                self.accelerator.backward(loss)
            total += values
        return total

    def values(self, one: Bin) -> tuple[Any, Any]:
        """(loss with its gradient, [VALUES]) of a bin."""
        settings, counts = self.pairs.settings, one.counts
        scores = score(self.model, one.packed, statistics=True)
        chosen, rejected, unweighted = answer_sums(scores.log_probs, counts, settings.ld_alpha)
        ref_chosen, ref_rejected, _ = answer_sums(one.reference, counts, settings.ld_alpha)
        columns = chosen, rejected, ref_chosen, ref_rejected, counts[0::2], counts[1::2], unweighted
        parts = zip(*(column.split(one.sizes) for column in columns), strict=True)
        loss = (torch.cat([dpo_loss(settings, *part) for part in parts]) * one.weights).sum()
        with torch.no_grad():
            rewards = settings.beta * (chosen - ref_chosen), settings.beta * (rejected - ref_rejected)
            of_pairs = [*rewards, rewards[0] - rewards[1], (rewards[0] > rewards[1]).float(), chosen, rejected]
            answers = torch.arange(len(counts), device=counts.device)
            of_chosen = (answers % 2 == 0).repeat_interleave(counts, output_size=sum(one.packed.lengths))
            of_tokens = [
                scores.entropies.sum(),
                (scores.mean_logits * of_chosen).sum(),
                (scores.mean_logits * ~of_chosen).sum(),
                (scores.top1 & of_chosen).sum(),
                counts[0::2].sum(),
                counts[1::2].sum(),
            ]
            values = [loss.detach(), *((value * one.shares).sum() for value in of_pairs), *of_tokens]
        return loss, torch.stack(values)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *arguments: Any, **named: Any) -> None:
        """As Trainer's, but a point is logged when the step after it has been launched.

        To read it is to wait until the GPU has done all that it was given, and then it has nothing to do until the host
        has launched some more.
        """
        should_log = self.control.should_log
        self.log_unread()
        self.control.should_log = should_log  # which logging took back
        at_once = self.control.should_save or self.control.should_evaluate or self.control.should_training_stop
        if should_log and not at_once and not self.pairs.settings.stop_if:
            self.unread = Point(self, tr_loss, grad_norm, named.get("learning_rate"))
            tr_loss -= tr_loss
            self._globalstep_last_logged = self.state.global_step
            self.logged.clear()
            self.control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, **named)

    def log_unread(self) -> None:
        """Log the last step's point as it would have been logged then."""
        if self.unread is None:
            return
        point, self.unread = self.unread, None
        loss, logs = point.read()
        self._total_loss_scalar += loss
        state, now = self.state, (self.state.global_step, self.state.epoch)
        state.global_step, state.epoch = point.step, point.epoch
        super().log(logs)
        state.global_step, state.epoch = now

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of TRL's DPOTrainer, by its names: means over the steps since the last point."""
        if self.logged and "loss" in logs:
            logs |= means(torch.stack(self.logged).tolist()) | {"num_tokens": float(self._total_train_tokens)}
            self.logged.clear()
        super().log(logs, start_time)

    def measure(self, pairs: Pairs) -> dict[str, float]:
        """The metrics of held-out rows: the loss is a mean over pairs, and what is of tokens over tokens."""
        self.model.eval()  # type: ignore[union-attr]
        bins = pairs.bins(list(range(len(pairs.rows))), self.args.device)
        return named_values(self.sum_up(bins, backward=False).tolist())


# What is summed over a step: the first seven are weighed means over pairs, the others sums over tokens.
VALUES = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"),
    *("chosen_tokens", "rejected_tokens"),
)


class Point:
    """What is logged of a step, on its way from the device."""

    def __init__(self, trainer: PackedTrainer, loss: Any, grad_norm: Any, learning_rate: float | None):
        """`loss` is the sum over the steps since the last point."""
        self.step, self.epoch = trainer.state.global_step, trainer.state.epoch
        self.num_steps = self.step - trainer._globalstep_last_logged
        self.learning_rate, self.num_tokens = learning_rate, float(trainer._total_train_tokens)
        found = torch.stack([loss.float(), torch.as_tensor(grad_norm, device=loss.device).float()])
        self.found = [one.to("cpu", non_blocking=True) for one in (found, torch.stack(trainer.logged))]
        self.copied = None
        if loss.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> tuple[float, dict[str, Any]]:
        """(summed loss, what is logged), when it has come."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, grad_norm = self.found[0].tolist()
        logs = {"loss": loss / self.num_steps, "grad_norm": grad_norm, "learning_rate": self.learning_rate}
        return loss, logs | means(self.found[1].tolist()) | {"num_tokens": self.num_tokens}


def means(steps: list[list[float]]) -> dict[str, float]:
    """Means of steps' VALUES by TRL's names; the loss is Trainer's."""
    points = [named_values(values) for values in steps]
    return {key: sum(point[key] for point in points) / len(points) for key in points[0] if key != "loss"}


def named_values(values: list[float]) -> dict[str, float]:
    """Summed VALUES as means, by TRL's names."""
    found = dict(zip(VALUES, values, strict=True))
    chosen, rejected = found.pop("chosen_tokens"), found.pop("rejected_tokens")
    found["entropy"] /= chosen + rejected
    found["mean_token_accuracy"] /= chosen
    found["logits/chosen"] /= chosen
    found["logits/rejected"] /= rejected
    return found


def log_probs_of_another(settings: DPO, run: Run, rows: list[Row], bf16: bool) -> list[LogProbs] | None:
    """What the reference says to rows, where that is known already or takes a model of its own; else None."""
    if run.log_probs is not None:
        return read_log_probs(run.log_probs, rows)
    if run.reference is None and settings.use_peft:
        return None
    parts = in_parts(rows, "cuda" if torch.cuda.is_available() else "cpu")
    return with_progress(run.name, rows, reference_log_probs(settings, run.reference or run.model, parts, bf16))


def with_progress(name: str, rows: list[Row], found: Iterable[list[LogProbs]]) -> list[LogProbs]:
    """All that is found of rows, part by part, with a bar of rows."""
    log_probs = []
    interval = 0.1 if sys.stderr.isatty() else 15
    with tqdm(total=len(rows), desc=f"reference {name}", unit="row", dynamic_ncols=True, mininterval=interval) as bar:
        for part in found:
            log_probs += part
            bar.update(len(part))
    return log_probs


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

    checkpoint = newest_checkpoint(run.work, settings.use_peft)
    watching = callbacks(run, checkpoint)

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
    sizes = [tuple(len(row[f"{part}_ids"]) for part in PARTS["pairs"]) for row in train_rows]
    steps = steps_of_a_run(settings, run.seed, len(train_rows))
    plan = plan_run(settings, run.model, [[sizes[index] for index in step] for step in steps], bf16)
    model = load_model(settings, run.model, bf16, dequantised=plan.dequantise)
    if plan.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.use_peft:
        model = get_peft_model(model, lora_config(settings))
    if settings.disable_dropout:
        without_dropout(model)
    fuse(model)
    leave_out_unread(model)
    with autocast(model, bf16):
        check_packed(model.eval(), scored[:rows_a_step])
        if reference is None:  # the base itself, which is at hand
            with model.disable_adapter():
                parts = in_parts(scored, model.device.type)
                reference = with_progress(run.name, scored, token_log_probs(model, parts))

    # ---- train
    pairs = partial(Pairs, settings=settings, budget=plan.token_budget)
    trainer = PackedTrainer(
        pairs=pairs(rows=train_rows, log_probs=dict(zip(used, reference, strict=False))),
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(run.model, local_files_only=True),
        callbacks=[*watching, *reference_checks(settings, run)],
    )
    result, history = run_trainer(trainer, settings, checkpoint)

    # ---- measure and save
    of_held_out = dict(enumerate(reference[len(used) :]))
    held_out = trainer.measure(pairs(rows=held_out_rows, log_probs=of_held_out, held_out=True)) if held_out_rows else {}
    save_trained(settings, trainer.model, run)
    return dpo_metrics(trainer, result, history, held_out, bf16)
