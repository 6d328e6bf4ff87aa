"""`prefbuild plan`: what of a recipe will fit a device, in which micro-batches, in how much memory and time.

Covered: DPO's packed engine; what GRPO and RLOO decode, and train on. Of other methods only memory is said, as
`prefbuild doctor` estimates it. Not covered: fetching, merging and evaluating, and how long rewards take.
"""

import itertools
import json
import math
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefbuild.device import Device, find_device
from prefbuild.doctor import longest_row, memory_need
from prefbuild.errors import UsageError
from prefbuild.machine import cpu_bf16
from prefbuild.methods import DPO, PARTS, PromptOptions, split_batch, with_engine
from prefbuild.plan import (
    GRAPH_KERNEL,
    H200,
    Arithmetic,
    PackedPlan,
    RolloutPlan,
    Row,
    Speed,
    load_of,
    plan_packed,
    plan_rollout,
    reference_seconds,
    weight_bytes,
)
from prefbuild.recipe import Recipe, known_recipes
from prefbuild.resolve import load_project
from prefbuild.shape import ModelShape, shape_of

TRL_STEP = 0.06  # seconds that TRL's own Python takes a step on prompts: rewards' texts, advantages, metrics
MOST_STEPS = 1000  # that are looked at
# Starting Python and its libraries, and reading weights: seconds, and bytes a second from memory or a fast disk.
START, READ = 12.0, 2e9


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What `prefbuild plan` says: bytes and seconds. None is what is not predicted, or is none of this engine."""

    recipe: str
    engine: str
    shape: ModelShape
    device: Device
    rows: str
    mean_tokens: float
    num_steps: int | None
    token_budget: int | None
    micro_batches: int | None
    checkpointing: bool | None
    dequantise: bool | None
    peak_memory: int
    fits: bool
    rollout: RolloutPlan | None = None
    seconds_per_step: float | None = None
    reference_seconds: float | None = None
    seconds: float | None = None  # of the whole training, loading and reference with it
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned, and for what."""

    name: str
    recipe: Recipe
    shape: ModelShape
    device: Device
    rows: list[Row]
    said: str  # of the rows
    rows_a_step: int
    num_gpus: int
    arithmetic: Arithmetic

    def packed(self, steps: list[list[Row]]) -> PackedPlan:
        """How training packs these steps."""
        return packed_plan(self.arithmetic, steps, self.device.memory, self.device.speed)

    def forecast(self, engine: str, num_steps: int | None, plan: PackedPlan | None, peak: int) -> Forecast:
        """A forecast without times."""
        fits = peak <= self.device.memory and (plan is None or plan.fits)
        return Forecast(
            recipe=self.name,
            engine=engine,
            shape=self.shape,
            device=self.device,
            rows=self.said,
            mean_tokens=load_of(self.rows).tokens / len(self.rows),
            num_steps=num_steps,
            token_budget=None if plan is None else plan.token_budget,
            micro_batches=None if plan is None else plan.micro_batches,
            checkpointing=None if plan is None else plan.checkpointing,
            dequantise=None if plan is None else plan.dequantise,
            peak_memory=peak,
            fits=fits,
            note="" if fits else _too_little(self.recipe),
        )


def forecast(root: Path, name: str, *, gpu: str | None = None, gpu_memory: str | None = None) -> Forecast:
    """Plan a recipe's training, of several GPUs for one. Raises UsageError for an unknown recipe, GPU or size, for a base
    whose size is unknown, and where there is no GPU to plan for."""
    project = load_project(root)
    known_recipes([name], project.recipes)
    recipe = project.recipes[name]
    shape = shape_of(project, recipe)
    if not shape.num_parameters:
        raise UsageError(f"{name}: nothing can be planned: {shape.source}; run `prefbuild lock {name}`")
    device = find_device(recipe, shape, gpu, gpu_memory)
    precision = recipe.train.precision
    bf16 = precision == "bf16" if precision != "auto" else device.is_gpu or bool(cpu_bf16())
    rows, said = rows_of(root / "build" / name, recipe)
    job = Job(
        name=name,
        recipe=recipe,
        shape=shape,
        device=device,
        rows=rows,
        said=said,
        rows_a_step=recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps,
        num_gpus=max(1, recipe.compute.gpus),
        arithmetic=arithmetic_of(recipe, shape, bf16=bf16, is_gpu=device.is_gpu),
    )
    train = with_engine(recipe.train, recipe.compute.strategy)
    if isinstance(train, PromptOptions) and train.rollout is not None and train.rollout.engine == "graph":
        return _of_prompts(job)
    return _of_pairs(job) if isinstance(train, DPO) and train.engine == "packed" else _of_another(job)


def packed_plan(how: Arithmetic, steps: list[list[Row]], memory: int, speed: Speed | None) -> PackedPlan:
    """plan_packed, as training calls it."""
    return plan_packed(
        how.shape,
        steps,
        memory,
        lora_r=how.lora_r,
        quantized=how.quantized,
        statistics=how.statistics,
        bytes_per_number=how.bytes_per_number,
        fused=how.fused,
        head_again=how.head_again,
        speed=speed,
    )


def plan_of(recipe: Recipe, shape: ModelShape, rows: list[Row], memory: int, *, bf16: bool, is_gpu: bool) -> PackedPlan:
    """The packed engine's plan of a recipe on one of its GPUs, or the CPU."""
    how = arithmetic_of(recipe, shape, bf16=bf16, is_gpu=is_gpu)
    train = recipe.train
    steps, _ = steps_of(recipe, rows, train.per_device_train_batch_size * train.gradient_accumulation_steps)
    shares = [share(step, recipe.compute.gpus) for step in steps]
    return packed_plan(how, shares, memory, H200 if is_gpu else None)


def share(step: list[Row], num_gpus: int) -> list[Row]:
    """One GPU's rows of a step."""
    return sorted(step, key=sum, reverse=True)[:: max(1, num_gpus)]


def forecast_json(found: Forecast) -> str:
    """For programs: sizes in bytes, times in seconds."""
    return json.dumps(asdict(found), indent=2)


def forecast_text(found: Forecast) -> str:
    """A line a fact."""
    shape, device = found.shape, found.device
    speed = ""
    if device.speed is not None:
        tera, giga = device.speed.matmul / 1e12, device.speed.bandwidth / 1e9
        speed = f"; {tera:.0f} TFLOP/s and {giga:,.0f} GB/s, {device.source}"
    lines = {
        "model": f"{shape.num_parameters / 1e9:.2f} billion weights; {shape.source}",
        "device": f"{device.name}, {_gigabytes(device.memory)}" + speed,
        "rows": f"{found.rows}; {found.mean_tokens:.0f} tokens each in the mean, prompts once",
        "engine": found.engine,
    }
    if found.token_budget is not None:
        whole = "a step is one" if found.micro_batches == 1 else f"up to {found.micro_batches} a step"
        again = "layers computed again for gradients" if found.checkpointing else "nothing computed twice"
        unpacked = ", the base unpacked from 4 bits once" if found.dequantise else ""
        lines["micro-batches"] = f"{whole}, of at most {found.token_budget:,} tokens; {again}{unpacked}"
    if found.rollout is not None:
        lines["decoding"] = (
            f"{found.rollout.seconds_per_token * 1e3:.2f} ms a token, {found.rollout.seconds:.2f} s a step; a cache of "
            f"{_gigabytes(found.rollout.cache)} and a copy of the weights of {_gigabytes(found.rollout.weights)}"
        )
    verdict = "" if found.fits else ": DOES NOT FIT"
    lines["memory"] = f"{_gigabytes(found.peak_memory)} at its peak, of {_gigabytes(device.memory)}{verdict}"
    if found.seconds_per_step is not None:
        steps = "" if found.num_steps is None else f", {found.num_steps:,} steps"
        lines["time"] = f"{found.seconds_per_step:.3g} s a step{steps}"
        if found.seconds is not None:
            lines["time"] += f"; {_duration(found.seconds)} with loading"
        if found.reference_seconds is not None:
            lines["time"] += f" and the reference, which takes {_duration(found.reference_seconds)} the first time"
    width = max(map(len, lines))
    return "\n".join(
        [*(f"{key:{width}}  {text}" for key, text in lines.items()), *([found.note] if found.note else [])]
    )


# ---- the rows


def rows_of(built: Path | None, recipe: Recipe) -> tuple[list[Row], str]:
    """Tokens of every row, prompt first, as prepared in a recipe's folder; before that as the recipe allows, one row."""
    parts = PARTS[recipe.shape]
    if built is not None and (built / "prepared/train.jsonl").exists():
        with open(built / "prepared/train.jsonl", encoding="utf-8") as file:
            rows: list[Row] = [tuple(len(row[f"{part}_ids"]) for part in parts) for row in map(json.loads, file)]
        if rows:
            return rows, f"{len(rows):,} prepared rows"
    prompt = min(recipe.data.max_prompt_length, longest_row(recipe))
    answers = () if recipe.shape == "prompts" else (longest_row(recipe) - prompt,) * (len(parts) - 1)
    lengths = " and twice ".join(map(str, (prompt, *answers[:1]))) if len(answers) > 1 else str(prompt + sum(answers))
    return [(prompt, *answers)], f"none is prepared yet, so all are taken to be {lengths} tokens"


def steps_of(recipe: Recipe, rows: list[Row], rows_a_step: int) -> tuple[list[list[Row]], int | None]:
    """The rows of the run's first steps, and how many steps there are; None where rows are unknown.

    The packed engine's steps are the run's own. Others' order is drawn here: like theirs, and not theirs.
    """
    train = recipe.train
    if len(rows) == 1:
        return [rows * rows_a_step], train.max_steps
    number = train.max_steps or math.ceil((train.num_train_epochs or 1.0) * math.ceil(len(rows) / rows_a_step))
    if isinstance(train, DPO):
        from prefbuild.training.prepared import steps_of_a_run

        steps = steps_of_a_run(train, recipe.seed, len(rows))
        return [[rows[index] for index in step] for step in itertools.islice(steps, MOST_STEPS)], number
    draw = random.Random(recipe.seed)
    return [draw.sample(rows, min(rows_a_step, len(rows))) for _ in range(min(number, MOST_STEPS))], number


# ---- methods


def _of_pairs(job: Job) -> Forecast:
    steps, number = steps_of(job.recipe, job.rows, job.rows_a_step)
    plan = job.packed([share(step, job.num_gpus) for step in steps])
    speed, how = job.device.speed, job.arithmetic
    if speed is None:
        return job.forecast("packed", number, plan, plan.peak_memory)
    used = {id(row): row for step in steps for row in step}.values() if len(job.rows) > 1 else []
    reference = reference_seconds(how, list(used), speed) if used else None
    seconds = None
    if number is not None and reference is not None:
        seconds = START + weight_bytes(how) / READ + reference + number * plan.seconds_per_step
    return replace(
        job.forecast("packed", number, plan, plan.peak_memory),
        seconds_per_step=plan.seconds_per_step,
        reference_seconds=reference,
        seconds=seconds,
    )


def _of_prompts(job: Job) -> Forecast:
    train: Any = job.recipe.train
    completions = max(1, job.rows_a_step // job.num_gpus)
    prompts = max(1, completions // train.num_generations)
    steps, number = steps_of(job.recipe, job.rows, prompts)
    # Completions end where they like; all are taken to be as long as they may be.
    length = train.max_completion_length
    groups: list[list[Row]] = [[(row[0], *[length] * train.num_generations) for row in step] for step in steps]
    speed = job.device.speed and replace(job.device.speed, launch=GRAPH_KERNEL)  # the training half is captured too
    plan = packed_plan(job.arithmetic, groups, job.device.memory, speed)
    rollout = plan_rollout(
        job.shape,
        prompts,
        completions,
        max(prompt for prompt, *_ in job.rows),
        length,
        speed=job.device.speed or H200,
        bytes_per_number=job.arithmetic.bytes_per_number,
    )
    peak = plan.peak_memory + rollout.cache + rollout.weights
    found = job.forecast("a static cache, prompts shared", number, plan, peak)
    found = replace(found, note=f"every completion is taken to be {length} tokens; rewards are not counted")
    if job.device.speed is None:
        return found
    seconds = rollout.seconds + plan.seconds_per_step + TRL_STEP
    loading = START + weight_bytes(job.arithmetic) / READ
    whole = None if number is None else loading + number * seconds
    return replace(found, rollout=rollout, seconds_per_step=seconds, seconds=whole)


def _of_another(job: Job) -> Forecast:
    train = job.recipe.train
    batch, _ = split_batch(train, max(1, job.recipe.compute.gpus))
    train = train.model_copy(update={"per_device_train_batch_size": batch})
    longest = max(row[0] + max(row[1:], default=0) for row in job.rows)
    size = job.arithmetic.bytes_per_number
    _, number = steps_of(job.recipe, job.rows, job.rows_a_step)
    found = job.forecast("trl", number, None, memory_need(train, job.shape, max_length=longest, bytes_per_number=size))
    note = "memory is a rough bound, and time is not predicted: that is known of packed DPO, GRPO and RLOO"
    return replace(found, note=note)


def arithmetic_of(recipe: Recipe, shape: ModelShape, *, bf16: bool, is_gpu: bool) -> Arithmetic:
    """How a recipe's training computes, as far as the planner goes."""
    train = recipe.train
    return Arithmetic(
        shape=shape,
        lora_r=train.lora.r if train.use_peft else None,
        bytes_per_number=2 if bf16 else 4,
        fused=is_gpu,
        head_again=isinstance(train, PromptOptions),
        statistics=True,
        quantized=train.quantization is not None,
    )


def _too_little(recipe: Recipe) -> str:
    if recipe.train.use_peft and recipe.train.quantization is None:
        return "train.quantization: nf4 takes a quarter of the weights' memory; or lower data.max_length"
    return "take a smaller base or a larger GPU, or lower data.max_length"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
