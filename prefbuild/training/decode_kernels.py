"""Triton kernels of a decoding step: matrix products with what comes before and after, and attention over a cache.

Everything here has few rows (completions that are written at once), so a kernel's time is its latency, and what counts
is how many there are. Sums are float32; what is rounded between two operations is rounded as PyTorch does it.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl


@triton.jit
def _linear(
    x, weight, bias, norm, residual, out, num_rows, width, eps,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, column_in = rows < num_rows, columns < width
    dtype = weight.dtype.element_ty
    inverse = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if NORM:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part = tl.load(x + rows[:, None] * K + k[None, :], mask=row_in[:, None] & (k < K)[None, :], other=0.0)
            squares += part.to(tl.float32) * part.to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = tl.load(x + rows[:, None] * K + k[None, :], mask=row_in[:, None] & (k < K)[None, :], other=0.0)
        if NORM:
            scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
            part = (part.to(tl.float32) * inverse[:, None] * scale[None, :]).to(dtype)
        inside = (k < K)[:, None] & column_in[None, :]
        block = tl.load(weight + columns[None, :] * K + k[:, None], mask=inside, other=0.0)
        first += tl.dot(part, block, input_precision=PRECISION)
        if GATE:  # rows below `width` are the gate's, those above are the other half's
            block = tl.load(weight + (columns + width)[None, :] * K + k[:, None], mask=inside, other=0.0)
            second += tl.dot(part, block, input_precision=PRECISION)
    if BIAS:
        first += tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
        if GATE:
            second += tl.load(bias + width + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    if GATE:
        gate = first.to(dtype).to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
        first = gate * second.to(dtype).to(tl.float32)
    here = rows[:, None] * width + columns[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if RESIDUAL:
        first = first.to(dtype).to(tl.float32) + tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, first.to(dtype), mask=inside)


def linear(x, weight, bias=None, *, norm=None, residual=None, eps=0.0, gate=False):
    """x [rows, k] times weight [n, k] transposed, after RMSNorm by `norm`, then plus `residual` or silu(gate) * up."""
    num_rows, depth = x.shape
    width = weight.shape[0] // 2 if gate else weight.shape[0]
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    # Narrow blocks, so that there are about as many programs as the GPU has processors. The sizes are an H200's best
    # for a model of 135M and 16 rows; they fit a GPU of any size.
    block_n = 16 if width <= 4096 else 32
    block_k = 64 if gate else 256 if depth >= 1024 and block_m * block_n <= 256 else 128
    grid = (triton.cdiv(width, block_n), triton.cdiv(num_rows, block_m))
    _linear[grid](
        x, weight, weight if bias is None else bias, weight if norm is None else norm,
        x if residual is None else residual, out, num_rows, width, eps,
        K=depth, NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATE=gate,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k if x.dtype != torch.float32 else block_k // 2,
        num_warps=8 if norm is not None and not gate else 4, num_stages=3 if block_k == 256 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    qkv, keys, values, positions, cos, sin, out, scale, row_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    SHARING: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 2 * HALF
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)  # a cache may have more than 2^31 numbers
    dtype = keys.dtype.element_ty
    position = tl.load(positions + row).to(tl.int32)
    low, whole = tl.arange(0, HALF), tl.arange(0, SIZE)
    c = tl.load(cos + position * HALF + low).to(tl.float32)
    s = tl.load(sin + position * HALF + low).to(tl.float32)
    mine = qkv + row * (HEADS + 2 * KV_HEADS) * SIZE
    cached = row * row_stride + kv_head * head_stride

    # The queries that share this head, turned to their position.
    member = tl.arange(0, PADDED)
    there = (kv_head * SHARING + member)[:, None] * SIZE + low[None, :]
    kept = (member < SHARING)[:, None]
    x1 = tl.load(mine + there, mask=kept, other=0.0).to(tl.float32)
    x2 = tl.load(mine + there + HALF, mask=kept, other=0.0).to(tl.float32)
    q1 = (x1 * c[None, :] - x2 * s[None, :]).to(dtype)
    q2 = (x2 * c[None, :] + x1 * s[None, :]).to(dtype)

    # This token's key and value: into the cache, and the first to be attended to.
    k1 = tl.load(mine + (HEADS + kv_head) * SIZE + low).to(tl.float32)
    k2 = tl.load(mine + (HEADS + kv_head) * SIZE + HALF + low).to(tl.float32)
    new1, new2 = (k1 * c - k2 * s).to(dtype), (k2 * c + k1 * s).to(dtype)
    new = tl.load(mine + (HEADS + KV_HEADS + kv_head) * SIZE + whole)
    tl.store(keys + cached + position * SIZE + low, new1)
    tl.store(keys + cached + position * SIZE + HALF + low, new2)
    tl.store(values + cached + position * SIZE + whole, new)
    own = tl.sum(q1.to(tl.float32) * new1.to(tl.float32)[None, :], axis=1)
    own += tl.sum(q2.to(tl.float32) * new2.to(tl.float32)[None, :], axis=1)
    top = own * scale
    total = tl.zeros([PADDED], tl.float32) + 1.0
    seen = tl.zeros([PADDED, SIZE], tl.float32) + new.to(tl.float32)[None, :]

    for start in range(0, position, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < position
        at = cached + n[None, :] * SIZE + low[:, None]
        scores = tl.dot(q1, tl.load(keys + at, mask=inside[None, :], other=0.0), input_precision=PRECISION)
        scores += tl.dot(q2, tl.load(keys + at + HALF, mask=inside[None, :], other=0.0), input_precision=PRECISION)
        scores = tl.where(inside[None, :], scores * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shares = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(top - higher)
        block = tl.load(values + cached + n[:, None] * SIZE + whole[None, :], mask=inside[:, None], other=0.0)
        seen = seen * shrunk[:, None] + tl.dot(shares.to(dtype), block, input_precision=PRECISION)
        total = total * shrunk + tl.sum(shares, axis=1)
        top = higher
    to = out + row * HEADS * SIZE + (kv_head * SHARING + member)[:, None] * SIZE + whole[None, :]
    tl.store(to, (seen / total[:, None]).to(dtype), mask=kept)


def attend(qkv, keys, values, rotary, num_heads, scale):
    """Attention of one token a row, [rows, heads * size], after turning by `rotary` (positions [rows], cos, sin).

    qkv is [rows, (queries, keys and values) * size]; keys and values, [rows, kv heads, length, size], get the new ones.
    """
    positions, cos, sin = rotary
    num_rows, num_kv_heads, _, size = keys.shape
    sharing = num_heads // num_kv_heads
    out = torch.empty(num_rows, num_heads * size, dtype=qkv.dtype, device=qkv.device)
    block = 128 if size * qkv.element_size() <= 128 else 64  # of a cache's tokens
    _attend[(num_rows, num_kv_heads)](
        qkv, keys, values, positions, cos, sin, out, scale, keys.stride(0), keys.stride(1),
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=size // 2,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        SHARING=sharing, PADDED=max(16, triton.next_power_of_2(sharing)), BLOCK=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
