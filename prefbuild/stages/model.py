"""Make a checkpoint folder (config, safetensors, tokenizer, generation config) of a base model's locked files.

The files are a GGUF, which is unpacked into full weights, or a checkpoint folder, which is copied. Weights end up in
the recipe's dtype; pickled ones that the recipe allows by digest are read as tensors only, and become safetensors.
Not covered: other pickles, quantized checkpoints and models with code of their own are refused.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from prefbuild.artifact import write_json
from prefbuild.errors import DataError, StageError
from prefbuild.sources import fetch, title
from prefbuild.template import load_tokenizer, render, tokenize

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHTS = ".safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names them
# llama.cpp's name for how text is split before merging; transformers reads the others and takes GPT-2's for this one.
SMOLLM = "smollm"


def run(
    settings: dict[str, Any], inputs: dict[str, Path | list[Path]], outputs: dict[str, Path], work: Path, name: str
) -> None:
    """Leave the checkpoint in outputs["model"]. LockError for other bytes than locked, StageError for unusable ones."""
    source = settings["source"]
    where = title(source)
    if "source" in inputs:
        source = {**source, "path": str(inputs["source"])}
    fetched, out = work / "fetched", outputs["model"]
    for folder in (fetched, out):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir(parents=True)
    fetch(source, settings, fetched, work)

    ggufs = sorted(fetched.rglob("*.gguf"))
    if len(ggufs) == 1 and len(settings["files"]) == 1:
        _unpack_gguf(ggufs[0], out, source["dtype"], where)
    elif ggufs:
        raise StageError(
            f"{where}: holds {len(settings['files'])} files, {len(ggufs)} of them GGUF; name the one GGUF file to use"
        )
    else:
        _read_pickles(fetched, source.get("allow_pickle") or {}, settings["files"], where)
        _copy_checkpoint(fetched, out, source["dtype"], where)
    _check_weights(out, where)
    _finish_tokens(out, where)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which the user of a container can't read


# ---- a GGUF


def _unpack_gguf(path: Path, out: Path, dtype: str, where: str) -> None:
    """Every weight in full, in the given number format; the tokenizer and chat template that the file holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            local_files_only=True,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # never packed, whatever kernels are installed
            output_loading_info=True,
        )
    except ImportError as error:
        raise StageError(f"{where}: reading a GGUF needs another package: {error}") from None
    except (ValueError, KeyError, RuntimeError, NotImplementedError, OSError) as error:
        raise StageError(
            f"{where}: transformers can't read this GGUF ({error}); give a checkpoint folder instead"
        ) from error
    model, loading = loaded
    lost = {key: sorted(names) for key, names in loading.items() if names}
    if lost:  # transformers only warns, and starts a missing weight at random
        raise StageError(f"{where}: the weights in the file are not those of its architecture: {lost}")

    # The loaded model refuses to be saved ("quantized with gguf"), though its weights are full ones by now.
    config = model.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(out)

    _set_splits(tokenizer, path, where)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for key in ("is_local", "local_files_only"):  # how it was loaded here is not part of the model
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(out)


def _set_splits(tokenizer: Any, path: Path, where: str) -> None:
    """Make the tokenizer split text as the GGUF says, or StageError: other splits give other tokens, silently."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, get_gguf_tokenizer

    _, found, _ = get_gguf_tokenizer(str(path))
    if found["tokenizer_type"] != "gpt2":  # the others split by their vocabulary alone
        return
    splits = found.get("pre_tokenizer_type")
    if splits == SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif splits != "gpt-2" and splits not in GGUF_PRE_TOKENIZER_SPLITS:
        raise StageError(
            f"{where}: its text is split the way '{splits}' does, which transformers does not know; "
            "give a checkpoint folder instead"
        )


# ---- pickled weights


def _read_pickles(folder: Path, allowed: dict[str, str], files: list[dict[str, Any]], where: str) -> None:
    """Put safetensors in the place of the pickles that the recipe allows and the lock has pinned as it allows them."""
    pinned = {entry["path"]: f"sha256:{entry['sha256']}" for entry in files}
    for name in sorted(name for name in allowed if pinned.get(name) == allowed[name]):
        _read_pickle(folder / name, folder / _as_safetensors(name), f"{where}/{name}")
        (folder / name).unlink()
    if allowed and (folder / PICKLE_INDEX).exists():
        index = json.loads((folder / PICKLE_INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {tensor: _as_safetensors(name) for tensor, name in index["weight_map"].items()}
        write_json(folder / INDEX, index)
        (folder / PICKLE_INDEX).unlink()


def _as_safetensors(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` as `model-00001-of-00002.safetensors`."""
    return f"{Path(name).stem.replace('pytorch_model', 'model')}{WEIGHTS}"


def _read_pickle(path: Path, target: Path, where: str) -> None:
    """Write a pickle's tensors as safetensors. StageError when it asks for more than tensors; nothing of it is run."""
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises can be anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"asks for {asked[1]}, which is no tensor"
            if asked
            else f"can't be read as tensors ({type(error).__name__})"
        )
        raise StageError(
            f"{where}: {why}, so nothing of it was run; don't load it elsewhere, and choose a repository with safetensors"
        ) from None
    tensors = loaded.values() if isinstance(loaded, dict) else [None]
    if not all(isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided for tensor in tensors):
        raise StageError(f"{where}: holds more than named tensors; choose a repository with safetensors")
    # Tied weights share memory, which safetensors does not store.
    save_file({key: tensor.clone().contiguous() for key, tensor in loaded.items()}, target, metadata={"format": "pt"})


# ---- a checkpoint folder


def _copy_checkpoint(fetched: Path, out: Path, dtype: str, where: str) -> None:
    """The folder's files as they are; weights of another number format are cast."""
    _refuse_unusable(fetched, where)
    cast = {path for path in fetched.glob(f"*{WEIGHTS}") if _needs_cast(path, dtype, where)}
    for path in sorted(fetched.iterdir()):
        if path in cast:
            _cast(path, out / path.name, dtype)
        else:
            shutil.move(path, out / path.name)
    if cast:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        write_json(out / "config.json", config)
        if (out / INDEX).exists():
            index = json.loads((out / INDEX).read_text(encoding="utf-8"))
            index["metadata"] = {"total_size": sum(_bytes(out / shard) for shard in set(index["weight_map"].values()))}
            write_json(out / INDEX, index)


def _refuse_unusable(folder: Path, where: str) -> None:
    """StageError for a folder that is no checkpoint, or one that can't be loaded safely."""
    names = sorted(path.name for path in folder.iterdir())
    folders = [name for name in names if (folder / name).is_dir()]
    pickles = [name for name in names if name.endswith(PICKLES)]
    code = [name for name in names if name.endswith(".py")]
    if pickles:
        raise StageError(
            f"{where}: {pickles[0]} is a pickle, which can run code when loaded; move it out of the folder"
        )
    if code:
        raise StageError(
            f"{where}: {code[0]} is code, and a model with code of its own is not supported; move it out if unused"
        )
    if folders:
        raise StageError(f"{where}: a checkpoint is one flat folder; move {folders[0]}/ out of it")
    if "config.json" not in names:
        raise StageError(
            f"{where}: has no config.json, so it is no checkpoint; name a checkpoint folder or a GGUF file"
        )
    weights = [name for name in names if name.endswith(WEIGHTS)]
    wanted = sorted(set(_index(folder, where).values())) if INDEX in names else ["model.safetensors"]
    if weights != wanted:
        raise StageError(f"{where}: has the weights {weights or 'of no file'}, and should have {wanted}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise StageError(
            f"{where}: its weights are quantized (quantization_config); name the full-precision checkpoint"
        )
    if "auto_map" in config:
        raise StageError(f"{where}: needs code of its own (auto_map in config.json), which is not supported")


def _index(folder: Path, where: str) -> dict[str, str]:
    """The index's map from tensor to shard. StageError when a tensor is not in its shard."""
    from safetensors import safe_open

    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise StageError(f"{where}: {shard} is in {INDEX} and missing; copy the whole checkpoint")
        with safe_open(folder / shard, "pt") as file:
            lost = sorted({tensor for tensor, of in weight_map.items() if of == shard} - set(file.keys()))
        if lost:
            raise StageError(
                f"{where}: {shard} lacks {lost[0]}, which {INDEX} says it holds; copy the whole checkpoint"
            )
    return weight_map


def _needs_cast(path: Path, dtype: str, where: str) -> bool:
    """Whether a file holds floats of another number format. StageError for formats that are no plain floats."""
    from safetensors import SafetensorError, safe_open

    wanted = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    try:
        with safe_open(path, "pt") as file:
            formats = {tensor: file.get_slice(tensor).get_dtype() for tensor in sorted(file.keys())}
    except SafetensorError as error:
        raise StageError(
            f"{where}: {path.name} is damaged ({error}); copy the checkpoint again and run `prefbuild lock`"
        ) from None
    for tensor, stored in formats.items():
        if stored not in FLOATS and stored.startswith(("F", "E")):
            raise StageError(
                f"{where}: {tensor} is stored as {stored}, a quantized format; name the full-precision checkpoint"
            )
    return any(stored in FLOATS and stored != wanted for stored in formats.values())


def _cast(path: Path, target: Path, dtype: str) -> None:
    """A safetensors file with its floats in another number format; one tensor of the old file at a time."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            tensors[key] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    save_file(tensors, target, metadata={"format": "pt"})


def _bytes(path: Path) -> int:
    """Bytes of a safetensors file's tensors, without its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


# ---- what any checkpoint must have


def _check_weights(folder: Path, where: str) -> None:
    """StageError naming the first tensor that holds NaN or infinity."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob(f"*{WEIGHTS}")):
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key)
                bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
                if bad:
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    raise StageError(
                        f"{where}: {key} holds {bad} values that are NaN or infinite in {dtype}; "
                        "use an undamaged checkpoint, or dtype: bfloat16 if it was cast to float16"
                    )


def _finish_tokens(folder: Path, where: str) -> None:
    """Write generation_config.json so that generation stops at the end of a turn and knows how to pad."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise StageError(
            f"{where}: its tokenizer has no chat template; add a chat_template.jinja to the checkpoint folder"
        )
    _, answer = render(tokenizer, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    ends = [number for number in tokenize(tokenizer, [answer])[0] if number in special][:1]
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"_from_model_config": True}
    stored = config.get("eos_token_id")
    if stored is None:
        stored = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    eos = list(dict.fromkeys((stored if isinstance(stored, list) else [stored]) + ends))
    if not eos:
        raise DataError(f"{where}: nothing says where an answer ends: no eos_token, no special token after a turn")
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    write_json(path, config)
