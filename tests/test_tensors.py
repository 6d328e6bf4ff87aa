"""prefbuild/tensors.py: files are those of safetensors, and what was hashed is what was written."""

import hashlib
from pathlib import Path

import pytest

from prefbuild.digests import is_of
from prefbuild.tensors import find_tensors, read_tensor, write_tensors


@pytest.mark.parametrize(("format", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_written_file_is_that_of_safetensors(format: str, dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {"b.weight": (3, 5), "a.weight": (7,), "B": (2, 2, 2), "z": (), "größe": (1,), "none": (0, 4), "a.b": (9,)}
    tensors = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    told: list[int] = []
    digest = write_tensors(tmp_path / "model.safetensors", shapes, format, tensors.__getitem__, told.append)

    data = (tmp_path / "model.safetensors").read_bytes()
    assert data == (tmp_path / "expected.safetensors").read_bytes()
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert digest.md5 == hashlib.md5(data).hexdigest()
    assert is_of(digest, tmp_path / "model.safetensors")
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    places = find_tensors(tmp_path)
    assert set(places) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(places[name]), tensor)


def test_slices_of_other_tensors_are_written_in_order(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "model.safetensors", {"turned": (4, 3)}, "F32", lambda name: whole.T, lambda size: None)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["turned"], whole.T)


def test_only_files_of_the_index_count(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}}'
    )
    places = find_tensors(tmp_path)
    assert {name: read_tensor(place).item() for name, place in places.items()} == {"a": 0, "b": 1}


def test_folder_without_safetensors_has_no_tensors(tmp_path: Path) -> None:
    assert find_tensors(tmp_path) == {}
