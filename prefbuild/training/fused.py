"""The same arithmetic in fewer kernels and less memory: LoRA as one autograd function, Liger's kernels, NF4 once.

What is not known to give the same result is left as it is: adapters with dropout or DoRA, quantised layers, heads.
"""

from functools import partial
from typing import Any

import torch


class FusedLora(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for layers that read the same x, with W_i frozen.

    The adapter's part is written first and the layer's own product added onto it as it is computed, so that no output
    is read again; gradients of x are added up the same way. Saved are x and x A^T alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, scales: tuple[float, ...], a: Any, bs: list[Any], *layers: Any) -> tuple[Any, ...]:
        # x [T, in]; a [sum of r, in] and bs [out, r], times their scales, in x's number format; then weight [out, in],
        # bias [out] or None, A [r, in] and B [out, r] of every layer, which is where gradients go.
        weights, biases = [weight.to(x.dtype) for weight in layers[0::4]], layers[1::4]
        ctx.ranks = [b.shape[1] for b in bs]
        ctx.scales = scales
        down = x @ a.t()  # [T, sum of r]
        outs = []
        for part, b, weight, bias in zip(down.split(ctx.ranks, 1), bs, weights, biases, strict=True):
            out = (part @ b.t()).addmm_(x, weight.t())
            outs.append(out if bias is None else out.add_(bias))
        ctx.save_for_backward(x, down, a, *bs, *weights)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        x, down, a, *rest = ctx.saved_tensors
        bs, weights = rest[: len(gradients)], rest[len(gradients) :]
        back = torch.cat([gradient @ b for gradient, b in zip(gradients, bs, strict=True)], 1)  # [T, sum of r]
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = back @ a
            for gradient, weight in zip(gradients, weights, strict=True):
                into_x.addmm_(gradient, weight)
        of_a = (back.t() @ x).float().split(ctx.ranks)
        into = []
        for gradient, part, scale, into_a in zip(gradients, down.split(ctx.ranks, 1), ctx.scales, of_a, strict=True):
            into_b = (gradient.t() @ part).float()
            into += [None, None, into_a, into_b if scale == 1 else into_b.mul_(scale)]
        return into_x, None, None, None, *into


def fuse(model: Any) -> list[str]:
    """Fuse what can be of a causal model, or of a PEFT model around one, in place; says what was done."""
    done = []
    if number := fuse_lora(model):
        done.append(f"{number} LoRA layers")
    if on_gpu(model) and (kernels := liger(model)):
        done.append(kernels)
    return done


NAME = "default"  # PEFT's, of the adapter
CAPTURED = "captured"  # what is cast in a CUDA graph that is being captured
# Layers that read the same tensor, one after the other, by the names of transformers' models.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_lora(model: Any) -> int:
    """Replace the forward of PEFT's LoRA layers, where that is plain LoRA on a plain linear layer; how many."""
    from peft.tuners.lora import Linear

    plain = {name: layer for name, layer in model.named_modules() if type(layer) is Linear and _plain(layer)}
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for name, layer in plain.items():
        parent, _, last = name.rpartition(".")
        names = next((names for names in TOGETHER if last in names), (last,))
        groups.setdefault((parent, names), []).append(layer)
    shared: list[Group] = []
    for layers in groups.values():
        group = Group(layers, shared)
        shared.append(group)
        for layer in layers:
            layer.forward = partial(group.forward, layer)
    return len(plain)


class Group:
    """LoRA layers that are called with the same tensor: the first call computes them all."""

    def __init__(self, layers: list[Any], shared: "list[Group]"):
        """`shared` are all groups of a model. What of the layers is looked up here stays theirs, as optimizers ask too."""
        self.layers, self.shared = layers, shared
        self.x: Any = None
        self.outs: dict[int, Any] = {}  # of layers that are not called yet, by id
        self.scales = tuple(float(layer.scaling[NAME]) for layer in layers)
        self.all_a = [layer.lora_A[NAME].weight for layer in layers]
        self.all_b = [layer.lora_B[NAME].weight for layer in layers]
        bases = [(layer.base_layer.weight, layer.base_layer.bias) for layer in layers]
        self.parts = [
            part for (base, a, b) in zip(bases, self.all_a, self.all_b, strict=True) for part in (*base, a, b)
        ]
        self.cast: tuple[Any, list[Any]] | None = None  # FusedLora's a and bs
        self.cast_of: Any = None  # the weights of which they are, as they were

    def forward(self, layer: Any, x: Any, *_arguments: Any, **_named: Any) -> Any:
        """What a layer's own forward gives."""
        if layer.disable_adapters or layer.merged:
            return layer.base_layer(x)
        if self.x is not x or id(layer) not in self.outs:
            self.x, self.outs = x, dict(zip(map(id, self.layers), self.together(x), strict=True))
        out = self.outs.pop(id(layer))
        if not self.outs:
            self.x = None  # kept no longer than needed
        return out

    def together(self, x: Any) -> list[Any]:
        """What every layer gives."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            outs = FusedLora.apply(x.reshape(-1, x.shape[-1]), self.scales, *self.in_format_of(x), *self.parts)
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def in_format_of(self, x: Any) -> tuple[Any, list[Any]]:
        """FusedLora's a and bs. What an optimizer has changed is cast for all groups at once: there are hundreds."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.cast is None or self.cast_of != (CAPTURED if capturing else self.state(x.dtype)):
            cast_all(self.shared, x.dtype, capturing)
        assert self.cast is not None
        if capturing:
            self.cast_of = None
        return self.cast

    def state(self, dtype: Any) -> Any:
        """What says that the weights are as they were."""
        return dtype, [one._version for one in self.all_a], [one._version for one in self.all_b]


@torch.no_grad()
def cast_all(groups: list[Group], dtype: Any, capturing: bool) -> None:
    """Cast the adapters' weights of all groups to a number format.

    A CUDA graph that is captured casts what the weights are when it is replayed: for one use of each group.
    """
    targets, sources, scales = [], [], []
    for group in groups:
        a = group.all_a[0].new_empty(sum(map(len, group.all_a)), group.all_a[0].shape[1], dtype=dtype)
        bs = [torch.empty_like(b, dtype=dtype) for b in group.all_b]
        group.cast, group.cast_of = (a, bs), CAPTURED if capturing else group.state(dtype)
        targets += [*a.split([len(one) for one in group.all_a]), *bs]
        sources += [*group.all_a, *group.all_b]
        scales += [*[1.0] * len(group.all_a), *group.scales]
    if any(scale != 1 for scale in scales):
        sources = list(torch._foreach_mul(sources, scales))
    torch._foreach_copy_(targets, sources)


def _plain(layer: Any) -> bool:
    return (
        type(layer.base_layer) is torch.nn.Linear
        and list(layer.lora_A) == [NAME]
        and not layer.lora_variant.get(NAME)  # DoRA and others
        and not layer.lora_bias.get(NAME)
        and not getattr(layer.lora_dropout[NAME], "p", 0.0)
        and not layer.base_layer.weight.requires_grad
    )


class Rows(torch.autograd.Function):
    """[T, H] -> [R, H]: some rows, each once unless `repeated`, whose gradients are then added up in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, places: Any, repeated: bool = False) -> Any:
        ctx.save_for_backward(places)
        ctx.number, ctx.repeated = len(tensor), repeated
        return tensor.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return put_rows(gradient, ctx.saved_tensors[0], ctx.number, add=ctx.repeated), None, None


class AmongZeros(torch.autograd.Function):
    """[R, H] -> [T, H]: rows in their places, and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Any, places: Any, number: int) -> Any:
        ctx.save_for_backward(places)
        return put_rows(rows, places, number)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def put_rows(rows: Any, places: Any, number: int, *, add: bool = False) -> Any:
    """[number, H] zeros with rows [R, H] in their places: each of its own, or with `add` those of one place added up."""
    out = rows.new_zeros(number, rows.shape[1])
    # index_copy_ or index_add_; `unsafe` leaves out the checks of their deterministic forms, which wait for the GPU.
    return torch.ops.aten._index_put_impl_(out, [places], rows, accumulate=add, unsafe=True)


def leave_out_unread(model: Any) -> bool:
    """Have the last layer's MLP compute the positions whose hidden state is read (Segments.read); whether it does.

    Nothing else sees what it gives: prompts, all but their last token, are two fifths of DPO's rows. After `fuse`.
    """
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    *_, layer = getattr(whole.base_model, "layers", [None])
    mlp: Any = getattr(layer, "mlp", None)
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    of_all, read = mlp.forward, [None]

    def of_some(hidden: Any) -> Any:
        if read[0] is None:
            return of_all(hidden)
        rows = of_all(Rows.apply(hidden.flatten(0, 1), read[0]))
        return AmongZeros.apply(rows, read[0], hidden[..., 0].numel()).view(hidden.shape)

    def before(_layer: Any, _arguments: Any, named: dict[str, Any]) -> None:
        read[0] = getattr(named.get("segments"), "read", None)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    mlp.forward = of_some
    return True


def on_gpu(model: Any) -> bool:
    """Whether a model is on an NVIDIA or AMD GPU."""
    return bool(next(model.parameters()).is_cuda)


def liger(model: Any) -> str | None:
    """Liger's RMSNorm, rotary embedding and SwiGLU, where it is installed and knows the model; what was done."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return None
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(whole.config.model_type)
    if apply is None:
        return None
    # Its losses and its head are not ours: log-probabilities of pairs are no cross-entropy.
    apply(model=whole, fused_linear_cross_entropy=False, cross_entropy=False)
    return "Liger's norms, rotary embedding and SwiGLU"


def dequantise(model: Any) -> int:
    """Replace bitsandbytes' 4-bit linear layers by plain ones that hold the values they multiply by; how many.

    QLoRA dequantises a layer at each use; here it is done once. Before an adapter is put on.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    number = 0
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        state = layer.weight.quant_state  # type: ignore[attr-defined]
        weight = dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype or torch.bfloat16)
        with torch.device("meta"):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
        number += 1
    if number:
        forget_quantisation(model)
    return number


def forget_quantisation(model: Any) -> None:
    """Have transformers and PEFT see a plain model."""
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            setattr(model, attribute, None if attribute in ("quantization_method", "hf_quantizer") else False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
