"""Read and write safetensors files one tensor at a time, and hash what is written on the way.

The files are, byte for byte, what safetensors' own save_file writes. Covered: tensors of one number format a file.
Not covered: mixed formats, which safetensors sorts by the format first.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.artifact import read_json
from prefbuild.digests import Digest, Hashing

# What safetensors calls a format: what torch calls it, and its bytes a number.
FORMATS = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor's bytes are."""

    path: Path
    start: int
    end: int
    format: str
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, Place]:
    """Where each tensor of a checkpoint is, by its name. Empty when it has no safetensors in one of the two usual ways."""
    if (folder / SINGLE).exists():
        return _places(folder / SINGLE)
    if not (folder / INDEX).exists():
        return {}
    weight_map = read_json(folder / INDEX)["weight_map"]
    found = {name: place for file in sorted(set(weight_map.values())) for name, place in _places(folder / file).items()}
    return {name: found[name] for name in weight_map}


def _places(path: Path) -> dict[str, Place]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            path=path,
            start=8 + length + about["data_offsets"][0],
            end=8 + length + about["data_offsets"][1],
            format=about["dtype"],
            shape=tuple(about["shape"]),
        )
        for name, about in header.items()
    }


def read_tensor(place: Place) -> Any:
    """A tensor of its own memory: a mapped file would count as ours, and grow to the whole of it."""
    import torch

    data = torch.empty(place.end - place.start, dtype=torch.uint8)
    view = data.numpy().data
    with open(place.path, "rb", buffering=0) as file:
        file.seek(place.start)
        while view:
            num_read = file.readinto(view)
            if not num_read:
                raise OSError(f"{place.path}: ends in the middle of a tensor")
            view = view[num_read:]
    return data.view(getattr(torch, FORMATS[place.format][0])).reshape(place.shape)


def write_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    format: str,
    tensor: Callable[[str], Any],
    wrote: Callable[[int], Any],
) -> Digest:
    """Write a safetensors file of tensors that `tensor(name)` gives when they are wanted; `wrote` is told of bytes.

    Returns the file's digest. At most two tensors are in memory: the one that is hashed, and the next.
    """
    import torch

    names = sorted(shapes)
    header = _header(((name, shapes[name]) for name in names), format)
    hashing = Hashing()
    with open(path, "wb", buffering=0) as file:

        def write(data: Any) -> None:
            hashing.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

        write(header)
        for name in names:
            values = tensor(name).contiguous()
            assert tuple(values.shape) == shapes[name], f"{name} has another shape"
            write(values.reshape(-1).view(torch.uint8).numpy())
            wrote(values.nbytes)
    return hashing.finish(path)


def _header(shapes: Iterable[tuple[str, tuple[int, ...]]], format: str) -> bytes:
    """What safetensors puts before the numbers: length and JSON, filled up with spaces to a multiple of 8 bytes."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes:
        start, end = end, end + num_bytes(shape, format)
        about[name] = {"dtype": format, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def num_bytes(shape: tuple[int, ...], format: str) -> int:
    """Bytes of a tensor."""
    size = FORMATS[format][1]
    for length in shape:
        size *= length
    return size
