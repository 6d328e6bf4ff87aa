"""What will fit a device, and how long it takes: the arithmetic of packed training and of decoding, without a model.

Bytes are those of tensors, as torch counts them at their peak. Seconds are FLOPs over the device's measured matmul
speed, plus bytes that other kernels move over its measured bandwidth, or the time the host needs to launch all these
kernels where that is longer. Both are checked: the bytes against what autograd keeps (tests/test_plan.py), all of it
against a GPU (benchmarks/plan.py).

Covered: llama-like models (attention, norms, a gated MLP) with a LoRA adapter or all weights. Not covered: mixtures of
experts, DoRA, other programs on the same device, and reading the weights from a cold disk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefbuild.shape import ModelShape

__all__ = ["PackedPlan", "ModelShape", "RolloutPlan", "Speed", "plan_packed", "plan_rollout"]

Row = Sequence[int]  # tokens of a prompt, and of each of its completions: (prompt, chosen, rejected)

CONTEXT = 700_000_000  # bytes that CUDA and its libraries take beside tensors
FRAGMENTED = 0.04  # the share of memory that the allocator can't give out, because it lies in pieces
HEAD_CHUNK = 1024  # completion tokens whose logits exist at once
# Kernels that the host launches for one layer: forward, and with the backward pass; and for a step beside layers.
KERNELS_FORWARD, KERNELS_BACKWARD, KERNELS_STEP = 45, 100, 400
# How often other kernels move what a layer keeps, forward and backward: written, read by the next, read again for
# gradients, which are written and read in their turn.
PASSES_FORWARD, PASSES_BACKWARD = 2.0, 4.0
ATTENTION = 0.5  # the share of a matmul's speed that attention reaches


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device does, as measured: FLOP/s of a large matmul, bytes/s read and written, seconds a kernel's launch."""

    matmul: float
    bandwidth: float
    launch: float


H200 = Speed(matmul=750e12, bandwidth=4.0e12, launch=6e-6)


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """How packed training does its steps. Memory in bytes, of tensors at their peak; `fits` says whether there is as much."""

    token_budget: int  # tokens a micro-batch
    micro_batches: int  # of the largest step
    checkpointing: bool  # whether layers are computed again for gradients
    dequantise: bool  # whether a base in 4 bits is unpacked once
    peak_memory: int
    seconds_per_step: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What decoding takes: bytes of the static cache and of the merged copy of the weights, and seconds."""

    cache: int
    weights: int
    seconds_per_token: float
    seconds: float  # of a step's completions, with their prompts


# ---- tokens


def row_tokens(row: Row) -> int:
    """Tokens a row takes when its prompt is there once."""
    return sum(row)


def attention_pairs(row: Row) -> int:
    """(query, key) pairs of a row: causal within the prompt, and each completion's on the prompt and itself."""
    prompt, *completions = row
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)


# ---- bytes


def layer_bytes(shape: ModelShape, *, lora_r: int | None, bytes_per_number: int = 2, fused: bool = True) -> int:
    """Bytes that autograd keeps of one token in one layer.

    In numbers: inputs and outputs of both norms (4 hidden), queries and attention's output (2 queries), keys and values,
    gate, up and their product (3 intermediate), and what each adapter's A gave (7 r); attention's log-sum a head and the
    norms' scale are float32. Without fused kernels a norm keeps a float32 copy of its input, and SwiGLU one number more.
    """
    norm = shape.hidden * bytes_per_number if fused else shape.hidden * 4
    numbers = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + (3 if fused else 4) * shape.intermediate
    return 2 * norm + (numbers + 7 * (lora_r or 0)) * bytes_per_number + 4 * (shape.heads + 2)


def weight_bytes(shape: ModelShape, *, bytes_per_number: int = 2, quantized: bool = False) -> int:
    """Bytes of a model's weights; in NF4 its linear layers take 4 bits a weight and a float32 scale for each 64."""
    if not quantized:
        return shape.num_parameters * bytes_per_number
    whole = max(0, shape.num_parameters - shape.linear_weights)
    return whole * bytes_per_number + int(shape.linear_weights * (4 + 32 / 64) / 8)


def num_trained(shape: ModelShape, lora_r: int | None) -> int:
    """Weights that are trained: an adapter's on all linear layers, or (None) all."""
    if lora_r is None:
        return shape.num_parameters
    return lora_r * shape.layers * sum(a + b for a, b in shape.linear)


def fixed_bytes(
    shape: ModelShape, *, lora_r: int | None, quantized: bool = False, dequantise: bool = False, bytes_per_number: int = 2
) -> int:
    """Bytes that are there whatever a step's tokens: weights, and what is trained with its gradients and Adam's moments.

    What is trained is float32: 16 bytes a weight; all weights have autocast's bf16 copies beside them.
    """
    trained = 16 * num_trained(shape, lora_r)
    if lora_r is None:
        return trained + (shape.num_parameters * 2 if bytes_per_number == 2 else 0)
    return trained + weight_bytes(shape, bytes_per_number=bytes_per_number, quantized=quantized and not dequantise)


def peak_bytes(
    shape: ModelShape,
    tokens: int,
    completion_tokens: int,
    *,
    lora_r: int | None,
    checkpointing: bool,
    bytes_per_number: int = 2,
    fused: bool = True,
    statistics: bool = False,
) -> int:
    """Bytes that a micro-batch takes at its peak, beside fixed_bytes: what all layers keep, and the more of

    the head: hidden states of completion tokens, their gradients in float32, and a chunk of logits in both formats,
    or the last layer's backward pass: gradients of gate, up and their product, and of two hidden states.
    """
    layer = layer_bytes(shape, lora_r=lora_r, bytes_per_number=bytes_per_number, fused=fused)
    if checkpointing:
        kept = tokens * (shape.layers * shape.hidden * bytes_per_number + layer)
    else:
        kept = tokens * shape.layers * layer
    kept += tokens * (2 * shape.hidden + 2 * shape.head_dim) * bytes_per_number  # embeddings, last norm, rotary tables
    chunk = min(HEAD_CHUNK, completion_tokens) * shape.vocabulary * (bytes_per_number + 4 * (3 if statistics else 2))
    head = chunk + completion_tokens * shape.hidden * (2 * bytes_per_number + 4)
    backward = tokens * (3 * shape.intermediate + 2 * shape.hidden) * bytes_per_number
    return kept + max(head, backward)


# ---- seconds


def forward_seconds(
    shape: ModelShape, tokens: float, pairs: float, *, lora_r: int | None, speed: Speed, bytes_per_number: int = 2
) -> float:
    """Seconds of the device for all layers, forward: matmuls (never faster than their weights are read), the rest, attention."""
    flops = 2 * tokens * (shape.linear_weights + (num_trained(shape, lora_r) if lora_r is not None else 0))
    layer = layer_bytes(shape, lora_r=lora_r, bytes_per_number=bytes_per_number)
    return (
        max(flops / speed.matmul, shape.linear_weights * bytes_per_number / speed.bandwidth)
        + PASSES_FORWARD * tokens * shape.layers * layer / speed.bandwidth
        + 4 * pairs * shape.queries * shape.layers / (ATTENTION * speed.matmul)
    )


def micro_batch_seconds(
    shape: ModelShape,
    tokens: float,
    completion_tokens: float,
    pairs: float,
    *,
    lora_r: int | None,
    checkpointing: bool,
    packed_weights: bool,
    speed: Speed,
    bytes_per_number: int = 2,
) -> float:
    """Seconds of one micro-batch, forward and backward; `packed_weights`: 4 bits, unpacked for each pass.

    A frozen weight costs its gradient's half of the backward pass nothing: 2 FLOPs a weight and token, as forward.
    """
    forward = forward_seconds(shape, tokens, pairs, lora_r=lora_r, speed=speed, bytes_per_number=bytes_per_number)
    trained = num_trained(shape, lora_r) if lora_r is not None else shape.linear_weights
    layer = layer_bytes(shape, lora_r=lora_r, bytes_per_number=bytes_per_number)
    backward = (
        max(2 * tokens * shape.linear_weights / speed.matmul, shape.linear_weights * bytes_per_number / speed.bandwidth)
        + 2 * tokens * trained * (2 if lora_r is not None else 1) / speed.matmul
        + PASSES_BACKWARD * tokens * shape.layers * layer / speed.bandwidth
        + 10 * pairs * shape.queries * shape.layers / (ATTENTION * speed.matmul)
    )
    head = 6 * completion_tokens * shape.hidden * shape.vocabulary / speed.matmul
    head += 20 * completion_tokens * shape.vocabulary / speed.bandwidth
    passes = 3 if checkpointing else 2
    unpack = passes * shape.linear_weights * (0.5 + bytes_per_number) / speed.bandwidth if packed_weights else 0.0
    device = (2 if checkpointing else 1) * forward + backward + head + unpack
    kernels = KERNELS_BACKWARD + KERNELS_FORWARD * (2 if checkpointing else 1)
    return max(device, shape.layers * kernels * speed.launch)


def step_seconds(
    shape: ModelShape,
    rows: Sequence[Row],
    token_budget: int,
    *,
    lora_r: int | None,
    checkpointing: bool,
    packed_weights: bool = False,
    speed: Speed,
    bytes_per_number: int = 2,
) -> float:
    """Seconds of a step: its micro-batches, and the optimizer, which reads and writes 28 bytes a trained weight."""
    tokens = sum(map(row_tokens, rows))
    num = math.ceil(tokens / token_budget)
    each = micro_batch_seconds(
        shape,
        tokens / num,
        sum(sum(row[1:]) for row in rows) / num,
        sum(map(attention_pairs, rows)) / num,
        lora_r=lora_r,
        checkpointing=checkpointing,
        packed_weights=packed_weights,
        speed=speed,
        bytes_per_number=bytes_per_number,
    )
    optimizer = 28 * num_trained(shape, lora_r) / speed.bandwidth
    return num * each + optimizer + KERNELS_STEP * speed.launch


def reference_seconds(shape: ModelShape, rows: Sequence[Row], *, speed: Speed, bytes_per_number: int = 2) -> float:
    """Seconds that the reference's log-probabilities of rows take, in bins that fill the device."""
    tokens, pairs = sum(map(row_tokens, rows)), sum(map(attention_pairs, rows))
    completion_tokens = sum(sum(row[1:]) for row in rows)
    layers = forward_seconds(shape, tokens, pairs, lora_r=None, speed=speed, bytes_per_number=bytes_per_number)
    head = completion_tokens * shape.vocabulary * (2 * shape.hidden / speed.matmul + 8 / speed.bandwidth)
    return layers + head


# ---- plans


def usable(memory: int) -> int:
    """Bytes for tensors on a device with so much memory."""
    return int((memory - CONTEXT) * (1 - FRAGMENTED))


def plan_packed(
    shape: ModelShape,
    steps: Sequence[Sequence[Row]],
    gpu_memory: int,
    *,
    lora_r: int | None,
    quantized: bool = False,
    allow_checkpointing: bool = True,
    statistics: bool = False,
    bytes_per_number: int = 2,
    fused: bool = True,
    speed: Speed = H200,
) -> PackedPlan:
    """The fastest way to do these steps on a device with that memory; the one that takes least where none fits.

    `steps` are the rows of each step: their tokens decide how many fit. `lora_r` None trains all weights. Whether to
    checkpoint and, with `quantized`, to unpack the base once is tried, not ruled: the estimates decide.
    """
    rows = [row for step in steps for row in step]
    largest_row = max(map(row_tokens, rows))
    largest_step = max(sum(map(row_tokens, step)) for step in steps)
    share = sum(sum(row[1:]) for row in rows) / sum(map(row_tokens, rows))  # of tokens that are completions'
    plans = []
    for dequantise in (False, True) if quantized else (False,):
        fixed = fixed_bytes(
            shape, lora_r=lora_r, quantized=quantized, dequantise=dequantise, bytes_per_number=bytes_per_number
        )
        for checkpointing in (False, True) if allow_checkpointing else (False,):

            def peak(tokens: int, fixed: int = fixed, checkpointing: bool = checkpointing) -> int:
                return fixed + peak_bytes(
                    shape,
                    tokens,
                    int(tokens * share),
                    lora_r=lora_r,
                    checkpointing=checkpointing,
                    bytes_per_number=bytes_per_number,
                    fused=fused,
                    statistics=statistics,
                )

            budget = largest_row
            if peak(largest_step) <= usable(gpu_memory):
                budget = largest_step
            elif peak(largest_row) <= usable(gpu_memory):
                low, high = largest_row, largest_step  # the first fits, the second does not
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if peak(middle) <= usable(gpu_memory) else (low, middle)
                budget = low
            seconds = [
                step_seconds(
                    shape,
                    step,
                    budget,
                    lora_r=lora_r,
                    checkpointing=checkpointing,
                    packed_weights=quantized and not dequantise,
                    speed=speed,
                    bytes_per_number=bytes_per_number,
                )
                for step in steps
            ]
            plans.append(
                PackedPlan(
                    token_budget=budget,
                    micro_batches=math.ceil(largest_step / budget),
                    checkpointing=checkpointing,
                    dequantise=dequantise,
                    peak_memory=peak(budget),
                    seconds_per_step=sum(seconds) / len(seconds),
                    fits=peak(budget) <= usable(gpu_memory),
                )
            )
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak_memory)
    return min(fitting, key=lambda plan: (plan.seconds_per_step, plan.peak_memory))


def plan_rollout(
    shape: ModelShape,
    num_prompts: int,
    num_completions: int,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    speed: Speed,
    kernels: int = 12,
    kernel_seconds: float = 2e-6,
    bytes_per_number: int = 2,
) -> RolloutPlan:
    """Decoding of a step's completions from a static cache and a graph of `kernels` a layer, over merged weights.

    A token reads all weights and the cache so far (half of it, in the mean, beyond the prompt), and takes no less than
    its kernels one after the other.
    """
    a_token = 2 * shape.layers * shape.keys * bytes_per_number  # of the cache, for keys and values
    weights = (shape.linear_weights + shape.vocabulary * shape.hidden) * bytes_per_number
    read = weights + num_completions * (prompt_tokens + completion_tokens / 2) * a_token
    seconds = max(read / speed.bandwidth, shape.layers * kernels * kernel_seconds)
    prompts = num_prompts * prompt_tokens
    prefill = forward_seconds(shape, prompts, prompts * prompt_tokens / 2, lora_r=None, speed=speed)
    prefill = max(prefill, shape.layers * KERNELS_FORWARD * speed.launch)
    refresh = 4 * weights / speed.bandwidth
    return RolloutPlan(
        cache=num_completions * (prompt_tokens + completion_tokens) * a_token,
        weights=weights,
        seconds_per_token=seconds,
        seconds=completion_tokens * seconds + prefill + refresh,
    )
