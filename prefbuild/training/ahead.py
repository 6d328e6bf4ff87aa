"""A checkpoint's weights, on their way to a GPU while Python imports what will use them: each takes seconds.

Imports torch and safetensors, and so must be imported before transformers is, by who wants to gain by it.
"""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefbuild.launch import is_rank
from prefbuild.methods import TrainOptions

FILES_AT_ONCE = 4
_reading: dict[Path, list[Future[dict[str, Any]]]] = {}


def read_ahead(settings: TrainOptions, folder: Path) -> None:
    """Begin to read a checkpoint, where a GPU holds it just as it is: not in 4 bits, nor in float32.

    And where the GPU has room for it twice: transformers sets as much memory aside before it looks at the weights.
    """
    as_it_is = settings.quantization is None and settings.use_peft and settings.precision != "float32"
    if not as_it_is or is_rank() or not torch.cuda.is_available():
        return
    if 2 * sum(path.stat().st_size for path in weight_files(folder)) < torch.cuda.mem_get_info()[0]:
        begin(folder, f"cuda:{torch.cuda.current_device()}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a checkpoint's weights are in; none where one is missing, as its loading will say."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    return files if all(file.exists() for file in files) else []


def begin(folder: Path, device: str) -> None:
    """Read all of a checkpoint's weights to a device, in threads."""
    threads = ThreadPoolExecutor(FILES_AT_ONCE)
    _reading[folder] = [threads.submit(load_file, path, device) for path in weight_files(folder)]
    threads.shutdown(wait=False)


def take(folder: Path) -> dict[str, Any] | None:
    """The weights by name, once; None where they are not read, or can't be, which whoever loads them then will say."""
    files = _reading.pop(folder, [])
    try:
        found = [file.result() for file in files]
    except Exception as error:
        print(f"{folder}: could not be read ahead ({error})", file=sys.stderr)
        return None
    return {name: tensor for file in found for name, tensor in file.items()} or None
