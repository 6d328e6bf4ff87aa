"""Merge a LoRA adapter into its base tensor by tensor, from the base's files to the merged ones.

PEFT's own layers say what to add, one at a time, so the bytes are those of its merge_and_unload(safe_merge=True); the model
itself is never in memory, only the adapter and a few times the largest tensor.
Covered: LoRA, rsLoRA and DoRA on linear layers, tied embeddings, bases of one number format in any number of files.
Not covered, and left to PEFT and the whole model: adapters with more than A, B and a magnitude, bases of mixed formats, and
architectures whose tensors have other names in memory than in files (mixtures of experts that transformers fuses).
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from prefbuild.digests import Digest
from prefbuild.errors import StageError
from prefbuild.tensors import FORMATS, INDEX, Place, find_tensors, num_bytes, read_tensor, write_tensors

ADAPTER = "default"  # PEFT's name for an adapter that has none
WEIGHTS = "adapter_model.safetensors"
ROWS = 256  # that are rounded and added at a time, so that they stay in the CPU's cache
# What such an adapter holds of a layer.
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


class NotCovered(Exception):
    """This base or this adapter is not one of those above."""


def stream_merge(model: Path, adapter: Path, merged: Path, max_shard_size: str) -> dict[Path, Digest]:
    """Write config.json and the merged weights; returns the digests of the weights' files.

    NotCovered, with nothing written, when PEFT must do it. StageError for NaN and infinity, and for an adapter on one of
    two tied layers.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from tqdm import tqdm

    base = _empty(model)
    places = _places(base, model)
    format = next(iter(places.values())).format
    # Of the base before PEFT changes it. The split is that of transformers' save_pretrained, as are the names.
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    num_parameters = base.num_parameters()
    split = split_torch_state_dict_into_shards(
        _state(base), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    layers = _layers(base, adapter)
    refuse_tied(base, model, adapter, tied)

    _save_config(base, model, merged)
    total = sum(num_bytes(place.shape, format) for place in places.values())
    room = torch.empty(max((math.prod(places[name].shape) for name in layers), default=0), dtype=torch.float32)

    def tensor(name: str) -> Any:
        try:
            weight = _merged(read_tensor(places[name]), layers.get(name), room)
        except ValueError as error:  # PEFT's way to say what is said below
            raise StageError(f"{adapter}: can't be merged into {model}: {error}") from error
        # A look at each number takes longer than all the rest. Their sum is finite only when all of them are.
        if name in layers and not weight.sum().isfinite() and not weight.isfinite().all():
            raise StageError(f"{adapter}: can't be merged into {model}: {name} would hold NaN or infinity")
        return weight

    digests = {}
    with torch.no_grad(), tqdm(total=total, desc="merging", unit="B", unit_scale=True, mininterval=1) as bar:
        for file, names in split.filename_to_tensors.items():
            digests[merged / file] = write_tensors(
                merged / file,
                {name: places[name].shape for name in names},
                format,
                tensor,
                bar.update,
            )
            (merged / file).chmod(0o644)  # as all that is copied, whatever the caller's umask
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (merged / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def refuse_tied(base: Any, model: Path, adapter: Path, tied: bool) -> None:
    """StageError when an embedding that is adapted is also the output layer."""
    embeddings = base.get_input_embeddings(), base.get_output_embeddings()
    if tied and any(type(layer).__module__.startswith("peft.") for layer in embeddings):
        raise StageError(
            f"{adapter}: adapts an embedding that {model} uses as input and as output; merging would change both, "
            "though one was trained. Leave the embeddings and lm_head out of lora.target_modules"
        )


def _empty(model: Path) -> Any:
    """The base without numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    if not isinstance(config.dtype, torch.dtype):
        raise NotCovered(f"{model}: config.json does not say the number format")
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
    except RuntimeError as error:  # some architectures calculate while they are made
        raise NotCovered(f"{model}: can't be made without numbers: {error}") from error
    if base._keep_in_fp32_modules or base._keep_in_fp32_modules_strict:
        raise NotCovered(f"{model}: keeps some layers in float32")
    if not all(isinstance(conversion, WeightRenaming) for conversion in get_model_conversion_mapping(base)):
        raise NotCovered(f"{model}: its tensors are other ones in memory")
    return base


def _state(base: Any) -> dict[str, Any]:
    """What save_pretrained would write, in its order: every parameter and buffer, tied ones once. Without numbers."""
    from transformers.core_model_loading import dot_natural_key

    tied = base.all_tied_weights_keys
    state = {name: tensor for name, tensor in base.state_dict().items() if name not in tied}
    return dict(sorted(state.items(), key=lambda item: dot_natural_key(item[0])))


def _places(base: Any, model: Path) -> dict[str, Place]:
    """Where the base's tensors are, when they are exactly those of its files."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _state(base).items()}
    places = find_tensors(model)
    if {name: place.shape for name, place in places.items()} != wanted:
        raise NotCovered(f"{model}: its tensors have other names or shapes in memory")
    dtype = str(base.dtype).removeprefix("torch.")
    if any(FORMATS.get(place.format, ("",))[0] != dtype for place in places.values()):
        raise NotCovered(f"{model}: its tensors are not all in {dtype}")
    return places


def _layers(base: Any, adapter: Path) -> dict[str, Any]:
    """PEFT's layer for each weight that is adapted, by the weight's name in the base; A and B are there, the base is not."""
    import peft
    import torch
    from peft.tuners.lora import Linear
    from safetensors import safe_open

    config = peft.PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != "LORA":
        raise NotCovered(f"{adapter}: is no LoRA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of whatever is without numbers
        pair = peft.PeftModel(base, config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    found = {f"{name}.": layer for name, layer in pair.named_modules() if type(layer) is Linear}
    layers: dict[str, Any] = {}
    num_set = 0
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, a safe_open is no dict
            prefix, part = next(
                ((key.removesuffix(part), part) for part in PARTS if key.endswith(f".{part}")), (None, "")
            )
            if prefix not in found:
                raise NotCovered(f"{adapter}: {key} is not of a linear layer's LoRA")
            layer = found[prefix]
            # As PEFT loads an adapter into a base of any format.
            value = torch.nn.Parameter(file.get_tensor(key).float(), requires_grad=False)
            owner = getattr(layer, part.split(".")[0])[ADAPTER]
            if owner.weight.shape != value.shape:
                raise NotCovered(f"{adapter}: {key} is shaped {tuple(value.shape)}, not {tuple(owner.weight.shape)}")
            owner.weight = value
            num_set += 1
            layers[f"{prefix.removeprefix('base_model.model.')}weight"] = layer
    if num_set != sum("lora_" in name for name, _ in pair.named_parameters()):
        raise NotCovered(f"{adapter}: does not have all of its layers")
    return layers


def _merged(weight: Any, layer: Any, room: Any) -> Any:
    """A tensor as it is to be written, in place where PEFT's layer allows. `room` is for as many float32 as it has."""
    import torch

    if layer is None:
        return weight
    if (
        ADAPTER in layer.lora_variant or layer.fan_in_fan_out
    ):  # DoRA, which scales the base too; weights lying crosswise
        inner = layer.get_base_layer()
        without, inner.weight = inner.weight, torch.nn.Parameter(weight, requires_grad=False)
        layer.merge(safe_merge=True)
        merged, inner.weight = inner.weight.data, without
        return merged
    # What its merge(safe_merge=True) does, step by step, in memory that is there: new memory costs more than the sums.
    update = room[: weight.numel()].view(weight.shape)
    torch.mm(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight, out=update)
    update *= layer.scaling[ADAPTER]
    for rows, of_rows in zip(weight.split(ROWS), update.split(ROWS), strict=True):
        rows += of_rows.to(weight.dtype)
    return weight


def _save_config(base: Any, model: Path, merged: Path) -> None:
    """config.json and, where the base has none to copy, the generation config, as save_pretrained writes them."""
    from transformers import GenerationConfig

    merged.mkdir(parents=True, exist_ok=True)
    base.config.dtype = str(base.dtype).removeprefix("torch.")
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(merged)
    if base.can_generate() and not (model / "generation_config.json").exists():
        # As from_pretrained makes it then.
        generation = GenerationConfig.from_pretrained(
            model, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
        generation.save_pretrained(merged)
