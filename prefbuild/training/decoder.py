"""A lean forward of llama-like models for decoding: merged weights, few kernels a layer, keys and values in place.

It covers Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped queries, SwiGLU. Others are refused, as are
windows of attention that are shorter than what is decoded, DoRA, and adapters on embeddings.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefbuild.errors import StageError
from prefbuild.machine import has_triton

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary positions whose frequencies depend on the length of what is read.
CHANGING_ROPES = ("dynamic", "longrope")
MOST_ROWS_FOR_KERNELS = 64  # more rows than that are a matrix product's work, which cuBLAS does better

Cache = tuple[Tensor, Tensor]  # keys and values, each [layers, rows, key/value heads, length, head size]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's weights. Those that read the same input are one matrix: [q; k; v] and [gate; up]."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Decoder:
    """A copy of a model's weights with its adapter merged in, and the forward that decodes with it."""

    def __init__(self, model: Any, dtype: torch.dtype, max_length: int):
        """The copy holds nothing before `refresh`. `max_length` counts the tokens of a prompt and its completion."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = inner.config
        refuse(config, max_length)
        self.dtype, self.device = dtype, inner.get_input_embeddings().weight.device
        self.eps = config.rms_norm_eps
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = self.head_size**-0.5
        self.copies: list[tuple[Tensor, Any]] = []  # where weights go, and the module or parameter they come from
        self.sources: list[Tensor] = []  # the weights of those

        self.embedding = self._plain(inner.get_input_embeddings())
        self.layers = [self._layer(layer) for layer in inner.model.layers]
        self.norm = self._copy(inner.model.norm.weight)
        head = inner.get_output_embeddings()
        tied = head.weight is inner.get_input_embeddings().weight
        self.head = self.embedding if tied else self._matrix([head])[0]
        positions = torch.arange(max_length, device=self.device)[None]
        cos, sin = inner.model.rotary_emb(self.norm, positions)  # the model's own, whatever its frequencies are
        half = self.head_size // 2
        self.cos, self.sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()  # [max_length, half a head]
        self.kernels = _kernels(self.device, self.head_size)

    # ---- weights
    def _copy(self, parameter: Tensor) -> Tensor:
        to = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        self.copies.append((to, parameter))
        return to

    def _plain(self, embedding: Any) -> Tensor:
        if type(embedding) is not torch.nn.Embedding:
            raise _refused("an adapter on embeddings")
        return self._copy(embedding.weight)

    def _matrix(self, modules: list[Any]) -> tuple[Tensor, Tensor | None]:
        """One matrix of several linear layers, rows below rows, and their bias."""
        sizes = [module.out_features for module in modules]
        weight = torch.empty(sum(sizes), modules[0].in_features, dtype=self.dtype, device=self.device)
        self.copies += zip(weight.split(sizes), modules, strict=True)
        biases = [getattr(module, "base_layer", module).bias for module in modules]
        if biases[0] is None:
            return weight, None
        bias = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        self.copies += zip(bias.split(sizes), biases, strict=True)
        return weight, bias

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = self._matrix([attention.q_proj, attention.k_proj, attention.v_proj])
        out, out_bias = self._matrix([attention.o_proj])
        gate_up, gate_up_bias = self._matrix([mlp.gate_proj, mlp.up_proj])
        down, down_bias = self._matrix([mlp.down_proj])
        has_norms = hasattr(attention, "q_norm")
        return Layer(
            input_norm=self._copy(layer.input_layernorm.weight),
            qkv=qkv,
            qkv_bias=qkv_bias,
            query_norm=self._copy(attention.q_norm.weight) if has_norms else None,
            key_norm=self._copy(attention.k_norm.weight) if has_norms else None,
            out=out,
            out_bias=out_bias,
            post_norm=self._copy(layer.post_attention_layernorm.weight),
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's weights as they are now, in place, with the adapter merged in."""
        for to, source in self.copies:
            to.copy_(source if isinstance(source, Tensor) else merged(source))

    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie that `refresh` reads; a graph of it holds as long as these are the same."""
        if not self.sources:  # which an optimizer holds on to as well: they stay the same tensors
            for _, source in self.copies:
                self.sources += [source] if isinstance(source, Tensor) else list(source.parameters())
        return tuple(tensor.data_ptr() for tensor in self.sources)

    # ---- forward
    def empty_cache(self, num_rows: int, length: int) -> Cache:
        """Keys and values of `num_rows` completions with their prompts, of at most `length` tokens each."""
        shape = (len(self.layers), num_rows, self.num_kv_heads, length, self.head_size)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return keys, torch.zeros_like(keys)

    def prefill(self, ids: Tensor, lengths: Tensor, cache: Cache, prompts: Tensor) -> Tensor:
        """Read prompts [prompts, length], padded on the right; returns the logits after each one's last token.

        Row r of the cache gets the keys and values of prompt `prompts[r]`.
        """
        num, length = ids.shape
        hidden = F.embedding(ids, self.embedding)
        cos, sin = self.cos[:length], self.sin[:length]
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._rms(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
            queries, keys, values = self._heads(qkv.view(num, length, -1, self.head_size).transpose(1, 2), layer)
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
            for to, new in zip(cache, (keys, values), strict=True):
                to[index, :, :, :length].copy_(new.index_select(0, prompts))
            # Padding comes after all that is read, so it is never attended to.
            seen = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=self.num_heads != self.num_kv_heads
            )
            seen = seen.transpose(1, 2).reshape(num, length, -1)
            hidden = hidden + F.linear(seen, layer.out, layer.out_bias)
            hidden = hidden + self._mlp(self._rms(hidden, layer.post_norm), layer)
        last = hidden[torch.arange(num, device=ids.device), lengths - 1]
        return F.linear(self._rms(last, self.norm), self.head)

    def step(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Read one token a row, [rows], at `positions` [rows]; returns the logits after it, [rows, vocabulary]."""
        hidden = self.embedding[tokens]  # F.embedding takes three times as long for so few
        if self.kernels is not None and len(tokens) <= MOST_ROWS_FOR_KERNELS:
            return self._fused_step(hidden, positions, cache)
        rows = torch.arange(len(tokens), device=tokens.device)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        length = cache[0].shape[3]
        visible = (torch.arange(length, device=tokens.device) <= positions[:, None])[:, None, None]
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._rms(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
            queries, new_keys, new_values = self._heads(qkv.view(len(tokens), -1, self.head_size), layer)
            queries, new_keys = _rotated(queries, cos, sin), _rotated(new_keys, cos, sin)
            keys, values = cache[0][index], cache[1][index]
            keys[rows, :, positions] = new_keys
            values[rows, :, positions] = new_values
            # The queries that share a key/value head stand as positions, so that none is repeated for them.
            grouped = queries.view(len(tokens), self.num_kv_heads, -1, self.head_size)
            seen = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=self.scale)
            hidden = hidden + F.linear(seen.reshape(len(tokens), -1), layer.out, layer.out_bias)
            hidden = hidden + self._mlp(self._rms(hidden, layer.post_norm), layer)
        return F.linear(self._rms(hidden, self.norm), self.head)

    def _fused_step(self, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The same in five kernels a layer: at a few rows, time goes by kernels, not by what they do."""
        kernels = self.kernels
        rotary = (positions, self.cos, self.sin)
        for index, layer in enumerate(self.layers):
            qkv = kernels.linear(hidden, layer.qkv, layer.qkv_bias, norm=layer.input_norm, eps=self.eps)
            if layer.query_norm is not None:
                heads = qkv.view(len(hidden), -1, self.head_size)
                qkv = torch.cat([part.flatten(1) for part in self._heads(heads, layer)], dim=1)
            keys, values = cache[0][index], cache[1][index]
            seen = kernels.attend(qkv, keys, values, rotary, self.num_heads, self.scale)
            hidden = kernels.linear(seen, layer.out, layer.out_bias, residual=hidden)
            act = kernels.linear(
                hidden, layer.gate_up, layer.gate_up_bias, norm=layer.post_norm, eps=self.eps, gate=True
            )
            hidden = kernels.linear(act, layer.down, layer.down_bias, residual=hidden)
        return F.linear(self._rms(hidden, self.norm), self.head)

    def _rms(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.eps)

    def _mlp(self, hidden: Tensor, layer: Layer) -> Tensor:
        gate, up = F.linear(hidden, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def _heads(self, heads: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of [..., heads, (length,) head size]."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        queries, keys, values = heads.split(sizes, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = self._rms(queries, layer.query_norm), self._rms(keys, layer.key_norm)
        return queries, keys, values


def refuse(config: Any, max_length: int) -> None:
    """StageError for what this forward does not do, naming the engine that does."""
    if config.model_type not in MODEL_TYPES:
        raise _refused(f"models of type {config.model_type}, but for {', '.join(MODEL_TYPES)}")
    if config.hidden_act != "silu":
        raise _refused(f"models with {config.hidden_act} in their layers")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in CHANGING_ROPES:
        raise _refused(f"{rope} positions")
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    if windowed and window is not None and window < max_length:
        raise _refused(f"attention over a window of {window} tokens, which is shorter than prompt and completion")


def merged(module: Any) -> Tensor:
    """The weight of a linear layer with its adapter added, in float32 where it has one."""
    base = getattr(module, "base_layer", module)
    weight = base.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    if base is module or module.disable_adapters or module.merged:
        return weight
    (name,) = module.active_adapters
    if name in module.lora_variant:
        raise _refused("DoRA")
    lora_a, lora_b = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
    return torch.addmm(weight.float(), lora_b, lora_a, alpha=module.scaling[name])


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [..., head size] turned by their positions. cos and sin are of half a head."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _refused(what: str) -> StageError:
    return StageError(f"train.rollout: the graph engine does not do {what}; write rollout: {{engine: hf}}")


def _kernels(device: Any, head_size: int) -> Any:
    """The module of Triton kernels where there is a GPU for them, else None."""
    fits = head_size >= 32 and head_size & (head_size - 1) == 0  # halves of it are multiplied, of 16 numbers at least
    if device.type != "cuda" or not fits or not has_triton():
        return None
    from prefbuild.training import decode_kernels

    return decode_kernels
