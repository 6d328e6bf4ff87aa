"""Triton kernel of a model's head: from logits to log-probabilities, in place to their gradient.

A program has a row of logits, in the number format that the head's matmul left them in; all arithmetic is float32.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

ALIGNED = 64  # numbers: a row begins on a cache line, which matmuls and 16-byte loads ask for (32,002 logits do not)


# A compilation takes a tenth of a second, and where a chunk of these begins is aligned in one of many ways.
@triton.jit(do_not_specialize_on_alignment=["targets", "log_probs", "entropies", "top1", "mean_logits"])
def _log_probs(
    logits, targets, log_probs, entropies, top1, mean_logits, scale,
    VOCABULARY: tl.constexpr, STRIDE: tl.constexpr, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Loads and stores take what fills a row up too: a bound that is not aligned would make them narrow.
    row = tl.program_id(0)
    mine = logits + row.to(tl.int64) * STRIDE
    target = tl.load(targets + row)
    own = tl.load(mine + target).to(tl.float32) * scale
    top = tl.maximum(own, -3.0e38)  # finite, so that no difference of it is NaN
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    ahead = tl.zeros([BLOCK], tl.int32)  # logits that argmax takes before the target's
    for start in range(0, STRIDE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(mine + columns, mask=columns < STRIDE, other=0.0).to(tl.float32) * scale
        x = tl.where(columns < VOCABULARY, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        shrunk = tl.exp(top - higher)
        share = tl.exp(x - higher)
        total = total * shrunk + share
        if STATISTICS:
            behind = (x < own) | ((x == own) & (columns >= target))
            ahead += tl.where(behind | (columns >= VOCABULARY), 0, 1)
            x = tl.where(columns < VOCABULARY, x, 0.0)
            weighted = weighted * shrunk + share * x
            plain += x
        top = higher
    sum_of_shares = tl.sum(total, axis=0)
    log_sum = top + tl.log(sum_of_shares)
    tl.store(log_probs + row, own - log_sum)
    if STATISTICS:
        tl.store(entropies + row, log_sum - tl.sum(weighted, axis=0) / sum_of_shares)
        tl.store(top1 + row, tl.sum(ahead, axis=0) == 0)
        tl.store(mean_logits + row, tl.sum(plain, axis=0) / VOCABULARY)
    if GRADIENT:
        for start in range(0, STRIDE, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(mine + columns, mask=columns < STRIDE, other=0.0).to(tl.float32) * scale
            change = scale * (tl.where(columns == target, 1.0, 0.0) - tl.exp(x - log_sum))
            # A matmul may multiply what fills a row up (by 0, as oneDNN's does), so it must be no NaN.
            change = tl.where(columns < VOCABULARY, change, 0.0)
            tl.store(mine + columns, change.to(logits.dtype.element_ty), mask=columns < STRIDE)


def room(rows, vocabulary, like):
    """Memory for logits of so many rows, which are some numbers longer than the vocabulary."""
    return like.new_empty(rows, triton.cdiv(vocabulary, ALIGNED) * ALIGNED)


def log_probs(logits, vocabulary, targets, out, scale, *, gradient, block=2048, num_warps=8):
    """Of logits [n, room] times `scale`: into `out` the log-probabilities [n] of targets [n], and if it has four

    entropies, whether each target is the likeliest (of equals the first), and mean logits. With `gradient`, logits
    become the log-probabilities' gradient by them.
    """
    statistics = len(out) > 1
    _log_probs[(len(targets),)](
        logits, targets, *(out if statistics else out * 4), scale,
        VOCABULARY=vocabulary, STRIDE=logits.stride(0), STATISTICS=statistics, GRADIENT=gradient, BLOCK=block,
        num_warps=num_warps,
    )  # fmt: skip
