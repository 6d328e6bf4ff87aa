"""Files and folders on this machine: what is pinned, what is refused, what is copied."""

import hashlib
import os
from pathlib import Path

import pytest

from prefbuild.errors import LockError
from prefbuild.sources import fetch, node_id, pin, reference, title
from prefbuild.sources.verify import copy_verified


def source(path: Path | str) -> dict[str, str]:
    return {"source": "file", "path": str(path)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows" / "more").mkdir(parents=True)
    (tmp_path / "rows/b.jsonl").write_text("b\n")
    (tmp_path / "rows/more/a.jsonl").write_text("aa\n")
    return tmp_path / "rows"


def test_a_file_is_pinned_by_its_name_size_and_sha256(folder: Path) -> None:
    assert pin(source("rows/b.jsonl"), folder.parent) == {
        "files": [{"path": "b.jsonl", "size": 2, "sha256": hashlib.sha256(b"b\n").hexdigest()}]
    }


def test_a_folder_is_pinned_file_by_file_in_order_of_names(folder: Path) -> None:
    assert [(f["path"], f["size"]) for f in pin(source(folder), Path("elsewhere"))["files"]] == [
        ("b.jsonl", 2),
        ("more/a.jsonl", 3),
    ]


def test_fetch_copies_the_locked_files_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    fetch(source(folder), pin(source(folder), tmp_path), tmp_path / "out", tmp_path / "work")
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert found == {"b.jsonl": "b\n", "more/a.jsonl": "aa\n"}
    assert (tmp_path / "out/b.jsonl").stat().st_ino != (folder / "b.jsonl").stat().st_ino


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("c\n", "sha256 is a3a5e715f0cc574a73c3f9bebb6bc24f32ffd5b67b387244c2c909da779a1478, {old} was locked"),
        ("bb\n", "is larger than the 2 bytes that were locked"),
        ("b", "has 1 bytes, 2 were locked"),
    ],
)
def test_other_bytes_than_locked_are_refused_and_nothing_is_left(
    folder: Path, tmp_path: Path, text: str, what: str
) -> None:
    locked = pin(source(folder / "b.jsonl"), tmp_path)
    old = locked["files"][0]["sha256"]
    (folder / "b.jsonl").write_text(text)
    with pytest.raises(LockError) as error:
        fetch(source(folder / "b.jsonl"), locked, tmp_path / "out", tmp_path / "work")
    assert str(error.value) == (
        f"{folder}/b.jsonl: {what.format(old=old)}; "
        "if the change is meant, run `prefbuild lock`; else put the old file back"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_joined_or_left_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    locked = pin(source(folder), tmp_path)
    (folder / "c.jsonl").write_text("c\n")
    with pytest.raises(LockError, match=r"rows/c\.jsonl: is not in the lock; .*prefbuild lock"):
        fetch(source(folder), locked, tmp_path / "out", tmp_path / "work")
    (folder / "c.jsonl").unlink()
    (folder / "b.jsonl").unlink()
    with pytest.raises(LockError, match=r"rows/b\.jsonl: was locked and is gone"):
        fetch(source(folder), locked, tmp_path / "out", tmp_path / "work")


def test_a_locked_path_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    locked = pin(source(folder / "b.jsonl"), tmp_path)
    (tmp_path / "out").mkdir()
    with open(folder / "b.jsonl", "rb") as stream, pytest.raises(LockError, match="outside"):
        copy_verified(stream, {**locked["files"][0], "path": "../b.jsonl"}, tmp_path / "out", shown="x", remedy="y")
    assert not (tmp_path / "b.jsonl").exists()


def test_links_hidden_files_and_pipes_in_a_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "link.jsonl").symlink_to(folder / "b.jsonl")
    with pytest.raises(LockError, match=r"rows/link\.jsonl: is a link, .*cp -rL rows COPY"):
        pin(source("rows"), tmp_path)
    (folder / "link.jsonl").unlink()
    (folder / "linked").symlink_to(folder / "more")
    with pytest.raises(LockError, match=r"rows/linked: is a link"):
        pin(source("rows"), tmp_path)
    (folder / "linked").unlink()
    (folder / ".cache").mkdir()
    with pytest.raises(LockError, match=r"rows/\.cache: is hidden; move it out"):
        pin(source("rows"), tmp_path)
    (folder / ".cache").rmdir()
    os.mkfifo(folder / "pipe")
    with pytest.raises(LockError, match=r"rows/pipe: is neither a file nor a folder"):
        pin(source("rows"), tmp_path)


def test_a_path_that_is_not_there_suggests_the_nearest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LockError) as error:
        pin(source("rows/b.json"), tmp_path)
    assert str(error.value) == "rows/b.json: no such file or folder; did you mean rows/b.jsonl?"
    with pytest.raises(LockError, match="nowhere/x: no such file or folder; check the path in the recipe"):
        pin(source("nowhere/x"), tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(LockError, match="none: is an empty folder"):
        pin(source("none"), tmp_path)


def test_node_ids_are_the_same_for_the_same_reference_and_differ_by_path_and_dtype() -> None:
    plain = source("recipes/concise/train.jsonl")
    assert node_id(plain) == node_id(source("./recipes/concise/train.jsonl"))
    assert node_id(plain).startswith("concise-train-")
    assert len({node_id(plain), node_id(source("recipes/other/train.jsonl"))}) == 2
    models = [{**plain, "dtype": dtype, "name": name} for dtype in ("bfloat16", "float32") for name in ("a", None)]
    assert len({node_id(model) for model in models}) == 2
    assert reference(models[0]) == {**plain, "dtype": "bfloat16"}
    assert title(models[0]) == "recipes/concise/train.jsonl"
    assert node_id(source("/Ä/Ö.jsonl")).startswith("x-")
