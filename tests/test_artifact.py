"""Manifests name the file that differs."""

import os
from pathlib import Path

import pytest

from prefbuild.artifact import canonical_json, verify_artifact, write_atomic, write_manifest
from prefbuild.errors import StageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/one.txt").write_text("one")
    (tmp_path / "a/deep/two.txt").write_text("two")
    write_manifest(tmp_path / "a", stage="test", name="x", inputs={})
    return tmp_path / "a"


def test_the_same_files_have_the_same_digest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b/deep").mkdir(parents=True)
    (tmp_path / "b/deep/two.txt").write_text("two")
    (tmp_path / "b/one.txt").write_text("one")
    other = write_manifest(tmp_path / "b", stage="other", name="y", inputs={"z": 1})
    assert verify_artifact(folder)["digest"] == other["digest"]


def test_a_flipped_byte_is_named(folder: Path) -> None:
    (folder / "deep/two.txt").write_text("twO")
    with pytest.raises(StageError, match=r"deep/two.txt: sha256 is .* the manifest says"):
        verify_artifact(folder)


def test_an_added_file_is_named(folder: Path) -> None:
    (folder / "three.txt").write_text("three")
    with pytest.raises(StageError, match=r"three.txt: is on disk but not in the manifest"):
        verify_artifact(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "one.txt").unlink()
    with pytest.raises(StageError, match=r"one.txt: is in the manifest but not on disk"):
        verify_artifact(folder)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"size": 3', '"size": 4', 1))
    with pytest.raises(StageError, match="its digest is not that of the files it lists"):
        verify_artifact(folder)


@pytest.mark.parametrize("kind", ["link", "folder link", "fifo"])
def test_links_and_fifos_are_refused(folder: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(folder / "odd")
    else:
        (folder / "odd").symlink_to("one.txt" if kind == "link" else "/")
    with pytest.raises(StageError, match="odd: an artifact holds plain files and folders only"):
        write_manifest(folder, stage="test", name="x", inputs={})


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
