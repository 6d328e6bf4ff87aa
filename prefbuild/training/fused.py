"""The same arithmetic in fewer kernels and less memory: LoRA as one autograd function, Liger's kernels, NF4 once.

What is not known to give the same result is left as it is: adapters with dropout or DoRA, quantised layers, heads.
"""

import types
from typing import Any

import torch
from torch.nn.functional import linear


class FusedLora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T, for a frozen W. Saves x and x A^T: PEFT's own saves y's parts too, and adds them
    in further kernels."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
        # x [T, in], weight [out, in], a [r, in], b [out, r]; in x's number format, adapters are kept in float32.
        a, b = a.to(x.dtype), b.to(x.dtype)
        weight = weight.to(x.dtype)
        down = x @ a.t()
        ctx.save_for_backward(x, down, weight, a, b)
        ctx.scale = scale
        return linear(x, weight, bias).addmm_(down, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, down, weight, a, b = ctx.saved_tensors
        back = (gradient @ b).mul_(ctx.scale)  # [T, r]
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = (gradient @ weight).addmm_(back, a)
        into_a = (back.t() @ x).float()
        into_b = (gradient.t() @ down).float().mul_(ctx.scale)
        return into_x, None, None, into_a, into_b, None


def fuse(model: Any) -> list[str]:
    """Fuse what can be of a causal model, or of a PEFT model around one, in place; says what was done."""
    done = []
    if number := fuse_lora(model):
        done.append(f"{number} LoRA layers")
    if on_gpu(model) and (kernels := liger(model)):
        done.append(kernels)
    return done


def fuse_lora(model: Any) -> int:
    """Replace the forward of PEFT's LoRA layers, where that is plain LoRA on a plain linear layer; how many."""
    from peft.tuners.lora import Linear

    number = 0
    for layer in model.modules():
        if type(layer) is Linear and _plain(layer):
            layer.forward = types.MethodType(_forward, layer)
            number += 1
    return number


def _plain(layer: Any) -> bool:
    name = "default"
    return (
        type(layer.base_layer) is torch.nn.Linear
        and list(layer.lora_A) == [name]
        and not layer.lora_variant.get(name)  # DoRA and others
        and not layer.lora_bias.get(name)
        and not getattr(layer.lora_dropout[name], "p", 0.0)
        and not layer.base_layer.weight.requires_grad
    )


def _forward(layer: Any, x: Any, *arguments: Any, **named: Any) -> Any:
    base = layer.base_layer
    if layer.disable_adapters or layer.merged:
        return base(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        out = FusedLora.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)


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
        state = layer.weight.quant_state
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
