"""Attention over packed rows (packing.py), as an implementation that transformers' models take by name.

On a GPU in half precision it is torch's varlen_attn (FlashAttention's kernel for sequences of any length, which
aligns a causal mask to the end where keys are more than queries); elsewhere SDPA, segment by segment.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from prefbuild.errors import StageError
from prefbuild.machine import has_triton
from prefbuild.training.packing import Segments

NAME = "prefbuild_packed"
OTHER_ENGINE = "set train.engine: trl (evaluate and rollout have their own: hf)"


def use_packed_attention(model: Any) -> None:
    """Have a transformers model attend by the `segments` that its forward is given. StageError when it can't."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError, TypeError) as error:
        raise StageError(
            f"{type(model).__name__} has its own attention, which can't be packed ({error}); {OTHER_ENGINE}"
        ) from error


def attend(
    module: Any,
    query: Any,  # [1, heads, T, head]
    key: Any,  # [1, key heads, T, head]
    value: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """Attention of every segment's queries to its keys; [1, T, heads, head], as AttentionInterface has it."""
    _refuse(module, segments, dropout, others)
    assert segments is not None
    if torch.is_autocast_enabled(query.device.type):
        # Rotary tables are float32 where all weights are, and so are queries and keys then; a kernel wants one format.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    keys = Gather.apply(key.squeeze(0).transpose(0, 1), segments)
    values = Gather.apply(value.squeeze(0).transpose(0, 1), segments)
    queries = query.squeeze(0).transpose(0, 1)
    if queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float16):
        out = _varlen(queries, keys, values, segments, scaling)
    else:
        out = _by_segment(queries, keys, values, segments, scaling)
    return out[None], None


def _refuse(module: Any, segments: Segments | None, dropout: float, others: dict[str, Any]) -> None:
    """StageError for what a model wants of its attention and this one does not do."""
    if segments is None:
        raise StageError(f"{type(module).__name__} does not hand on what packed attention needs; {OTHER_ENGINE}")
    window = others.get("sliding_window")
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    wanted += ["dropout"] if dropout else []
    wanted += ["sliding_window"] if window is not None and segments.longest_key > window else []
    if wanted:
        raise StageError(f"{type(module).__name__} has {' and '.join(wanted)}, which packing has not; {OTHER_ENGINE}")


class Gather(torch.autograd.Function):
    """[T, heads, head] -> [K, heads, head]: each segment's keys, prompts again for every completion.

    The gradient of a prompt's key is summed in float32 in a fixed order: index_add would sum it in any order in bf16.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Any, segments: Segments) -> Any:
        ctx.segments = segments
        return tensor.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        segments = ctx.segments
        if segments.uses is None:
            raise NotImplementedError("groups of different numbers of completions are for scoring alone")
        out = gradient.index_select(0, segments.own)
        if gradient.is_cuda and (kernels := _triton()) is not None:
            kernels.add_uses(out, gradient.contiguous(), segments.prompts, segments.uses)
            return out, None
        whole = out.index_select(0, segments.prompts).float()
        for use in segments.uses.unbind(1):
            whole += gradient.index_select(0, use)
        # index_copy_; `unsafe` leaves out the checks of its deterministic form, which wait for the GPU.
        places = [segments.prompts]
        return torch.ops.aten._index_put_impl_(out, places, whole.to(out.dtype), accumulate=False, unsafe=True), None


def _varlen(query: Any, key: Any, value: Any, segments: Segments, scaling: float | None) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned to the end
        **_gqa(),
    )


@cache
def _triton() -> Any:
    """The module of Triton's kernels, where it can be used."""
    if not has_triton():
        return None
    from prefbuild.training import attention_kernels

    return attention_kernels


@cache
def _gqa() -> dict[str, Any]:
    """torch 2.11 shares key heads among query heads by itself; later versions want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _by_segment(query: Any, key: Any, value: Any, segments: Segments, scaling: float | None) -> Any:
    repeats = query.shape[1] // key.shape[1]
    query_ends, key_ends = segments.ends
    parts = []
    for q0, q1, k0, k1 in zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False):
        q, k, v = (one.transpose(0, 1) for one in (query[q0:q1], key[k0:k1], value[k0:k1]))
        whole = q1 - q0 == k1 - k0
        mask = (
            None if whole else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(k1 - k0 - q1 + q0)
        )
        k, v = (one.repeat_interleave(repeats, 0) for one in (k, v))
        out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=whole, scale=scaling)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
