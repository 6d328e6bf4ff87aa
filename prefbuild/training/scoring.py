"""Log-probabilities of the tokens of completions, and of no others; never all logits at once."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from prefbuild.machine import has_triton
from prefbuild.training.packing import Packed
from prefbuild.training.prepared import LOGITS_AT_ONCE

TILE = 128  # rows that a matmul on a GPU computes at once


class Scores(NamedTuple):
    """Of S scored tokens, in the order of Packed.targets. The last three are None unless asked for, without gradient."""

    log_probs: Any  # [S] float32
    entropies: Any  # [S] nats
    top1: Any  # [S] bool: the token is the likeliest
    mean_logits: Any  # [S] mean over the vocabulary


def score(model: Any, packed: Packed, *, statistics: bool = False, temperature: float = 1.0) -> Scores:
    """Score every completion of a packed row by a causal model (or its PEFT adapter) that has packed attention.

    Logits are computed for the positions that count, a chunk at a time: once by a kernel, where there is one for the
    head, else again for the gradient.
    """
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = whole.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        segments=packed.segments,
    ).last_hidden_state
    return score_hidden(
        whole, hidden.squeeze(0).index_select(0, packed.sources), packed.targets, statistics, temperature
    )


def score_hidden(whole: Any, hidden: Any, targets: Any, statistics: bool = False, temperature: float = 1.0) -> Scores:
    """The same from the hidden states [S, hidden] that predict the tokens [S]. `whole` is the causal model."""
    head, (factor, cap) = whole.get_output_embeddings(), logit_change(whole.config)
    dtype = kernel_dtype(head, hidden.device, hidden.dtype, cap)
    if dtype is None:
        columns = by_torch(head, hidden, targets, statistics, factor, cap, temperature)
    else:
        columns = by_kernel(head, hidden.to(dtype), targets, statistics, factor / temperature)
    return Scores(*columns, *[None] * (4 - len(columns)))


def logit_change(config: Any) -> tuple[float, float | None]:
    """What a model scales its logits by after the head, and their soft cap, by the names of transformers' configs."""
    text = config.get_text_config()
    factor = getattr(text, "logit_scale", None) or 1.0
    factor /= getattr(text, "logits_scaling", None) or 1.0
    return factor, getattr(text, "final_logit_softcapping", None)


# ---- by PyTorch


def by_torch(
    head: Any, hidden: Any, targets: Any, statistics: bool, factor: float, cap: float | None, temperature: float
) -> tuple[Any, ...]:
    """The columns of Scores, by any head; logits are computed again for the gradient."""

    def chunk(hidden: Any, targets: Any) -> tuple[Any, ...]:
        logits = head(hidden).float()
        if factor != 1.0:
            logits = logits * factor
        if cap:
            logits = cap * torch.tanh(logits / cap)
        if temperature != 1.0:
            logits = logits / temperature
        total = logits.logsumexp(1)
        log_probs = logits.gather(1, targets[:, None])[:, 0] - total
        if not statistics:
            return (log_probs,)
        # After what the gradient needs: computing it again for the gradient ends before here.
        with torch.no_grad():
            logits = logits.detach()
            entropies = total - (logits * (logits - total[:, None]).exp()).sum(1)
            return log_probs, entropies, logits.argmax(1) == targets, logits.mean(1)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = []
    for start in range(0, len(targets), size):
        some = hidden[start : start + size], targets[start : start + size]
        parts.append(checkpoint(chunk, *some, use_reentrant=False) if torch.is_grad_enabled() else chunk(*some))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


# ---- by a kernel


def kernel_dtype(head: Any, device: Any, dtype: Any, cap: float | None) -> Any:
    """The number format in which the kernel scores hidden states of that device and format; None where it can't.

    It does plain heads that are not trained, in half precision on a GPU.
    """
    if device.type != "cuda" or cap or type(head) is not torch.nn.Linear or not has_triton():
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in head.parameters())
    half = dtype in (torch.bfloat16, torch.float16)
    return dtype if half and head.weight.dtype == dtype and head.weight.device == device and not trained else None


def by_kernel(head: Any, hidden: Any, targets: Any, statistics: bool, scale: float) -> tuple[Any, ...]:
    """The columns of Scores, by a head that kernel_dtype takes."""
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    with torch.autocast(hidden.device.type, enabled=False):
        columns: tuple[Any, ...] = HeadLogProbs.apply(
            hidden, head.weight, head.bias, targets, scale, statistics, gradient
        )
    return columns


def chunks(num: int, size: int) -> Iterator[slice]:
    """What covers `num` rows in chunks of `size`, a multiple of TILE. The last begins earlier, to be of whole tiles too.

    A matmul is set up anew for each shape that it meets, which takes the host milliseconds; so there are few.
    """
    for start in range(0, num, size):
        rows = min(size, -(-(num - start) // TILE) * TILE, num)
        first = min(start, num - rows)
        yield slice(first, first + rows)


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of tokens by a frozen linear head, and what Scores has beside them.

    Their gradient by the hidden states is computed at once, while the logits are there, and is all that is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, scale: float, statistics: bool, gradient: bool
    ) -> tuple[Any, ...]:
        from prefbuild.training.head_kernels import log_probs, room

        # hidden [S, h], weight [v, h], bias [v] or None, targets [S]
        num, vocabulary = len(targets), weight.shape[0]
        formats = (torch.float32, torch.float32, torch.bool, torch.float32)
        columns = tuple(targets.new_empty(num, dtype=dtype) for dtype in formats[: 4 if statistics else 1])
        into_hidden = torch.empty_like(hidden) if gradient else None
        size = max(1, LOGITS_AT_ONCE // vocabulary)
        size = size // TILE * TILE or size  # whole tiles, whose results begin at aligned addresses
        memory = room(min(size, num), vocabulary, hidden)
        for part in chunks(num, size):
            some = hidden[part]
            rows = memory[: len(some)]
            logits = rows[:, :vocabulary]
            if bias is None:
                torch.mm(some, weight.t(), out=logits)
            else:
                torch.addmm(bias, some, weight.t(), out=logits)
            log_probs(rows, vocabulary, targets[part], [one[part] for one in columns], scale, gradient=gradient)
            if into_hidden is not None:  # what was logits is their gradient
                torch.mm(logits, weight, out=into_hidden[part])
        ctx.save_for_backward(into_hidden)
        ctx.mark_non_differentiable(*columns[1:])
        ctx.set_materialize_grads(False)
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Any, *_: Any) -> tuple[Any, ...]:
        (into_hidden,) = ctx.saved_tensors
        if of_log_probs is not None:
            # float32 times half precision, rounded once.
            into_hidden = torch.mul(of_log_probs[:, None], into_hidden, out=torch.empty_like(into_hidden))
        return None if of_log_probs is None else into_hidden, *[None] * 6
