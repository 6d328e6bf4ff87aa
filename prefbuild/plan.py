"""What will fit a device, and how long it takes: the arithmetic of packed training and of decoding, without a model.

Bytes are those of tensors, as torch counts them at their peak. Seconds are FLOPs over the device's measured matmul
speed plus bytes that other kernels move over its measured bandwidth, or the time that the host needs to launch all
these kernels where that is longer. What autograd keeps is counted on a CPU (tests/test_plan.py); all of it is measured
on a GPU (benchmarks/plan.py).

Covered: llama-like models (attention, norms, a gated MLP) with a LoRA adapter or all weights. Not covered: mixtures of
experts, DoRA, soft caps of logits, other programs on the same device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefbuild.shape import ModelShape
from prefbuild.training.packing import into_bins
from prefbuild.training.prepared import LOGITS_AT_ONCE, SCORED_AT_ONCE

Row = Sequence[int]  # tokens of a prompt, and of each of its completions: (prompt, chosen, rejected)

CONTEXT = 700_000_000  # bytes that CUDA and its libraries take beside tensors
SPARE = 0.1  # the share of memory that is not planned with: it lies in pieces, and estimates are off by as much
CPU_TOKENS = 8192  # of a micro-batch on a CPU: what it computes must not depend on memory
FILLING = 127  # tokens that fill a row up on a GPU, at most
LOGIT_BYTES = 18  # of each of these: itself in two formats, its gradient's two parts, and their sum
KERNEL_LOGIT_BYTES = 2  # the same of a head that is one kernel: its gradient takes its place
# Kernels that the host launches for a layer, forward and backward, and for a step beside layers.
KERNELS_FORWARD, KERNELS_BACKWARD, KERNELS_STEP = 45, 100, 400
# Of a captured graph: kernels a layer that decodes, and for a token beside layers; seconds that each takes at least.
KERNELS_DECODING, KERNELS_DRAWING, GRAPH_KERNEL = 5, 20, 4e-6
# How often other kernels move what a layer keeps: written and read forward; backward read, and its gradient written and
# read again.
PASSES_FORWARD, PASSES_BACKWARD = 2.0, 4.0
ATTENTION = 0.13  # the share of a large matmul's speed that attention reaches, on segments of some hundred tokens


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device does, as measured: FLOP/s of large matmuls, bytes/s read and written, seconds a kernel's launch."""

    matmul: float
    bandwidth: float
    launch: float


H200 = Speed(matmul=750e12, bandwidth=4.0e12, launch=6e-6)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a model is trained, as far as bytes and FLOPs go."""

    shape: ModelShape
    lora_r: int | None  # None: all weights; 0: none, as for scoring
    bytes_per_number: int = 2
    fused: bool = True  # norms, rotary embedding, SwiGLU and the head in kernels of their own
    head_again: bool = False  # the head is TRL's, as for GRPO: logits are computed again for the gradient
    statistics: bool = False  # entropies beside log-probabilities
    quantized: bool = False  # a base in NF4 ...
    dequantise: bool = False  # ... which is unpacked once
    checkpointing: bool = False  # layers are computed again for gradients

    @property
    def num_trained(self) -> int:
        """Weights that are trained: an adapter's on all linear layers, or all."""
        if self.lora_r is None:
            return self.shape.num_parameters
        return self.lora_r * self.shape.layers * sum(a + b for a, b in self.shape.linear)

    @property
    def fused_head(self) -> bool:
        """Whether log-probabilities and their gradient are one kernel's: of a head in half precision, not trained."""
        return self.fused and not self.head_again and self.lora_r is not None and self.bytes_per_number == 2


@dataclass(frozen=True, kw_only=True)
class Load:
    """What rows ask for when they are packed, each prompt once."""

    tokens: float
    scored: float  # tokens of completions
    keys: float  # a prompt's are there for itself and again for each completion
    pairs: float  # of a query and a key that it attends to


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """How packed training does its steps. Memory is in bytes of tensors at their peak; `fits` says if there is as much."""

    token_budget: int  # tokens a micro-batch
    micro_batches: int  # at most, in a step
    checkpointing: bool
    dequantise: bool
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


def load_of(rows: Sequence[Row]) -> Load:
    """The sums over rows. Attention is causal; a completion attends to its prompt and to itself."""
    tokens = scored = keys = pairs = 0
    for prompt, *completions in rows:
        tokens += prompt + sum(completions)
        scored += sum(completions)
        keys += prompt * (1 + len(completions)) + sum(completions)
        pairs += prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)
    return Load(tokens=tokens, scored=scored, keys=keys, pairs=pairs)


# ---- bytes


def layer_bytes(how: Arithmetic, keys: float = 1.0) -> float:
    """Bytes that autograd keeps of one token in one layer; `keys` are those that attention takes, a token.

    In numbers: inputs and outputs of both norms (4 hidden), queries and attention's output (2 queries), keys and values,
    gate, up and their product (3 intermediate), and what each adapter's A gave (7 r). Attention's log-sum a head and the
    norms' scales are float32. A norm of several kernels keeps its input in float32, and SwiGLU one number more. Where
    all weights are trained, norms keep their result in float32 too, and autocast a copy of it for each linear layer.
    """
    shape, size = how.shape, how.bytes_per_number
    numbers = 2 * shape.queries + 2 * shape.keys * keys + (3 if how.fused else 4) * shape.intermediate
    numbers += 7 * (how.lora_r or 0)
    if how.lora_r is None:
        norms = 2 * (4 + 4) * shape.hidden + (5 * shape.hidden * 2 if size == 2 else 2 * shape.hidden * 4)
    else:
        norms = 2 * (size if how.fused else 4) * shape.hidden + 2 * shape.hidden * size
    return norms + numbers * size + 4 * (shape.heads + 2)


def weight_bytes(how: Arithmetic) -> int:
    """Bytes of the base's weights; in NF4 its linear layers take 4 bits a weight and a float32 scale for each 64."""
    shape = how.shape
    if not how.quantized or how.dequantise:
        return shape.num_parameters * how.bytes_per_number
    whole = max(0, shape.num_parameters - shape.linear_weights)
    return whole * how.bytes_per_number + int(shape.linear_weights * (4 + 32 / 64) / 8)


def fixed_bytes(how: Arithmetic) -> int:
    """Bytes that are there whatever a step's tokens: weights, and what is trained, with its gradients and Adam's moments.

    What is trained is float32, which makes 16 bytes a weight, and has a copy in the format that computes.
    """
    trained = (16 + (2 if how.bytes_per_number == 2 else 0)) * how.num_trained
    return trained + (0 if how.lora_r is None else weight_bytes(how))


def peak_bytes(how: Arithmetic, load: Load) -> int:
    """Bytes of a micro-batch at its peak, weights and all: what every layer keeps, and the more of

    the head: hidden states of scored tokens and their gradients, and a chunk of logits, or
    the last layer's backward pass: gradients of its MLP, and of three hidden states.
    """
    shape, size = how.shape, how.bytes_per_number
    layer = load.tokens * layer_bytes(how, load.keys / load.tokens)
    kept = layer + load.tokens * shape.layers * shape.hidden * size if how.checkpointing else layer * shape.layers
    kept += load.tokens * (2 * shape.hidden + 2 * shape.head_dim) * size  # embeddings, the last norm, rotary tables
    each = KERNEL_LOGIT_BYTES if how.fused_head else LOGIT_BYTES + (4 if how.statistics else 0)
    chunk = min(LOGITS_AT_ONCE, load.scored * shape.vocabulary) * each
    head = chunk + 3 * load.scored * shape.hidden * size
    backward = load.tokens * ((1 if how.fused else 3) * shape.intermediate + 3 * shape.hidden) * size
    return int(fixed_bytes(how) + kept + max(head, backward))


# ---- seconds


def forward_seconds(how: Arithmetic, load: Load, speed: Speed) -> float:
    """The device's seconds for all layers: matmuls, which are never faster than their weights are read, and the rest."""
    shape = how.shape
    layer = PASSES_FORWARD * layer_bytes(how, load.keys / load.tokens) + lora_bytes(how)[0] + unfused_bytes(how)
    moved = shape.layers * load.tokens * layer
    unpacked = shape.linear_weights * (0.5 + how.bytes_per_number) if how.quantized and not how.dequantise else 0.0
    return (
        _linear_seconds(how, load.tokens, speed)
        + (2 * load.tokens * how.num_trained / speed.matmul if how.lora_r else 0.0)
        + 4 * load.pairs * shape.queries * shape.layers / (ATTENTION * speed.matmul)
        + (moved + unpacked) / speed.bandwidth
    )


def backward_seconds(how: Arithmetic, load: Load, speed: Speed) -> float:
    """The device's seconds for the gradients of all layers.

    2 FLOPs a token and weight for gradients of activations; of weights 2 more where they are trained, which an adapter
    spares all but its own.
    """
    shape = how.shape
    layer = PASSES_BACKWARD * layer_bytes(how, load.keys / load.tokens) + lora_bytes(how)[1] + 2 * unfused_bytes(how)
    moved = shape.layers * load.tokens * layer
    unpacked = shape.linear_weights * (0.5 + how.bytes_per_number) if how.quantized and not how.dequantise else 0.0
    trained = 4 * how.num_trained if how.lora_r else 2 * shape.linear_weights
    return (
        _linear_seconds(how, load.tokens, speed)
        + load.tokens * trained / speed.matmul
        + 10 * load.pairs * shape.queries * shape.layers / (ATTENTION * speed.matmul)
        + (moved + unpacked) / speed.bandwidth
    )


def lora_bytes(how: Arithmetic) -> tuple[float, float]:
    """Bytes that an adapter's own matmuls move in a layer for a token, forward and backward, beside what is kept.

    An adapter's rank is so small that its matmuls are reading and writing. As training/fused.py does them: forward x is
    read by A, and each output is written by B and read by the layer's own product; backward each output's gradient is
    read for B and for its gradient, x for A's, and x's gradient is written by A and read and written by each layer.
    """
    if not how.lora_r:
        return 0.0, 0.0
    shape = how.shape
    outputs, inputs = (sum(sizes) for sizes in zip(*((b, a) for a, b in shape.linear), strict=True))
    read = 2 * shape.hidden + shape.queries + shape.intermediate  # q, k and v read one x, and so do gate and up
    return (2 * outputs + read) * how.bytes_per_number, (2 * outputs + 2 * read + 2 * inputs) * how.bytes_per_number


def unfused_bytes(how: Arithmetic) -> float:
    """Bytes that norms, rotary embedding and SwiGLU move in a layer for a token, forward, for being several kernels.

    Two norms read and write numbers in float32 some seven times, queries and keys go through four kernels more, and
    gate and up through one. Backward it is twice that.
    """
    if how.fused:
        return 0.0
    shape = how.shape
    return 30 * shape.hidden + how.bytes_per_number * (7 * (shape.queries + shape.keys) + 2.5 * shape.intermediate)


def _linear_seconds(how: Arithmetic, tokens: float, speed: Speed) -> float:
    weights = how.shape.linear_weights
    return max(2 * tokens * weights / speed.matmul, weights * how.bytes_per_number / speed.bandwidth)


def head_seconds(how: Arithmetic, scored: float, speed: Speed, *, gradient: bool) -> float:
    """The head's: logits forward, for a gradient once more unless it is a kernel's, and the gradient itself.

    A kernel's logits are written and read, and for a gradient read again, overwritten, and read by its matmul.
    """
    shape = how.shape
    if how.fused_head:
        flops, moved = (4, 5 * KERNEL_LOGIT_BYTES) if gradient else (2, 2 * KERNEL_LOGIT_BYTES)
    else:
        flops, moved = (6, 2 * LOGIT_BYTES + 12) if gradient else (2, 12)
    return scored * shape.vocabulary * (flops * shape.hidden / speed.matmul + moved / speed.bandwidth)


def micro_batch_seconds(how: Arithmetic, load: Load, speed: Speed) -> float:
    """Forward and backward of one micro-batch: the device's time, or the host's where that is longer."""
    forwards = 2 if how.checkpointing else 1
    device = forwards * forward_seconds(how, load, speed) + backward_seconds(how, load, speed)
    device += head_seconds(how, load.scored, speed, gradient=True)
    return max(device, how.shape.layers * (KERNELS_FORWARD * forwards + KERNELS_BACKWARD) * speed.launch)


def step_seconds(how: Arithmetic, rows: Sequence[Row], token_budget: int, speed: Speed) -> tuple[float, int]:
    """Seconds of a step, and its micro-batches. The optimizer reads and writes 28 bytes a trained weight."""
    bins = into_bins([sum(row) for row in rows], token_budget)
    batches = sum(micro_batch_seconds(how, load_of([rows[i] for i in members]), speed) for members in bins)
    return batches + 28 * how.num_trained / speed.bandwidth + KERNELS_STEP * speed.launch, len(bins)


def reference_seconds(how: Arithmetic, rows: Sequence[Row], speed: Speed) -> float:
    """Seconds that the log-probabilities of rows under the reference take, in bins that fill the device."""
    load = load_of(rows)
    whole = replace(how, lora_r=0)
    seconds = forward_seconds(whole, load, speed) + head_seconds(whole, load.scored, speed, gradient=False)
    num_bins = -(-load.tokens // SCORED_AT_ONCE["cuda"])
    return max(seconds, num_bins * how.shape.layers * KERNELS_FORWARD * speed.launch)


# ---- plans


def usable(memory: int) -> int:
    """Bytes for tensors on a device with so much memory."""
    return int((memory - CONTEXT) * (1 - SPARE))


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
    head_again: bool = False,
    speed: Speed | None = H200,
) -> PackedPlan:
    """The fastest way to do these steps on a device with that memory; the one that takes least where none fits.

    `steps` are the rows of each step: their tokens decide how many fit. Whether layers are computed again and whether a
    quantised base is unpacked once is no rule: all ways are estimated. `speed` None is a CPU, where nothing is computed
    again, the base is unpacked, and a micro-batch has CPU_TOKENS at most, whatever its memory; its seconds mean nothing.
    """
    how = Arithmetic(
        shape=shape, lora_r=lora_r, bytes_per_number=bytes_per_number, fused=fused, head_again=head_again,
        statistics=statistics, quantized=quantized,
    )  # fmt: skip
    ways = [
        replace(how, dequantise=dequantise, checkpointing=checkpointing)
        for dequantise in ((False, True) if quantized else (False,))
        for checkpointing in ((False, True) if allow_checkpointing else (False,))
    ]
    if speed is None:
        return _plan(replace(how, dequantise=quantized), steps, gpu_memory, H200, CPU_TOKENS)
    plans = [_plan(way, steps, usable(gpu_memory), speed) for way in ways]
    if not any(plan.fits for plan in plans):
        return min(plans, key=lambda plan: plan.peak_memory)
    return min((plan for plan in plans if plan.fits), key=lambda plan: (plan.seconds_per_step, plan.peak_memory))


def _plan(
    how: Arithmetic, steps: Sequence[Sequence[Row]], memory: int, speed: Speed, at_most: int | None = None
) -> PackedPlan:
    mean = load_of([row for step in steps for row in step])

    def peak(tokens: int) -> int:
        part = (tokens + (FILLING if at_most is None else 0)) / mean.tokens
        scaled = {name: value * part for name, value in vars(mean).items()}
        return peak_bytes(how, Load(**scaled))

    least = max(sum(row) for step in steps for row in step)
    most = max(sum(map(sum, step)) for step in steps)
    most = most if at_most is None else max(least, min(most, at_most))
    budget = most if at_most is not None or peak(most) <= memory else least
    if budget != most and peak(least) <= memory:
        above = most
        while above - budget > 1:  # the one fits, the other does not
            middle = (budget + above) // 2
            budget, above = (middle, above) if peak(middle) <= memory else (budget, middle)
    done = [step_seconds(how, step, budget, speed) for step in steps]
    return PackedPlan(
        token_budget=budget,
        micro_batches=max(num for _, num in done),
        checkpointing=how.checkpointing,
        dequantise=how.dequantise,
        peak_memory=peak(budget),
        seconds_per_step=sum(seconds for seconds, _ in done) / len(done),
        fits=peak(budget) <= memory,
    )


def plan_rollout(
    shape: ModelShape,
    num_prompts: int,
    num_completions: int,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    speed: Speed = H200,
    bytes_per_number: int = 2,
) -> RolloutPlan:
    """Decoding of all completions of a step from a static cache, over merged weights, a captured graph a token.

    A token reads all weights and the cache, and takes no less than its kernels one after the other.
    """
    how = Arithmetic(shape=shape, lora_r=0, bytes_per_number=bytes_per_number)
    a_token = 2 * shape.layers * shape.keys * bytes_per_number  # of the cache, for its keys and values
    cache = num_completions * (prompt_tokens + completion_tokens) * a_token
    weights = (shape.linear_weights + shape.vocabulary * shape.hidden) * bytes_per_number
    kernels = KERNELS_DECODING * shape.layers + KERNELS_DRAWING
    seconds = max((weights + cache) / speed.bandwidth, kernels * GRAPH_KERNEL)
    prefill = forward_seconds(how, load_of([(prompt_tokens,)] * num_prompts), speed)
    prefill = max(prefill, shape.layers * KERNELS_FORWARD * GRAPH_KERNEL)
    refresh = 4 * weights / speed.bandwidth
    return RolloutPlan(
        cache=cache, weights=weights, seconds_per_token=seconds, seconds=completion_tokens * seconds + prefill + refresh
    )
