"""prefbuild/digests.py: both hashes from one reading, and none of a file that changed."""

import hashlib
import os
from pathlib import Path

import pytest

from prefbuild import digests
from prefbuild.artifact import verify_artifact, write_manifest
from prefbuild.digests import Digest, Digests, digest_file


def test_both_hashes_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", 1000)
    data = os.urandom(123_456)
    (tmp_path / "file").write_bytes(data)
    found = digest_file(tmp_path / "file")
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.md5 == hashlib.md5(data).hexdigest()
    assert found.size == len(data)
    (tmp_path / "empty").touch()
    assert digest_file(tmp_path / "empty").sha256 == hashlib.sha256().hexdigest()


def claim(path: Path) -> Digest:
    """A digest that no reading of the file would give."""
    about = path.stat()
    return Digest(size=about.st_size, changed=about.st_mtime_ns, sha256="c" * 64, md5="c" * 32)


def test_what_is_known_goes_into_the_manifest_unread(tmp_path: Path) -> None:
    folder, work = tmp_path / "merged", tmp_path / "work"
    folder.mkdir()
    for name in ("known", "unknown"):
        (folder / name).write_text(name)
    told = Digests(work)
    told.add(folder / "known", claim(folder / "known"))
    told.save()

    again = Digests(work)  # as the worker has it, from the stage
    manifest = write_manifest(folder, stage="merge", name="x", inputs={}, sha256=again.sha256)
    assert manifest["files"]["known"]["sha256"] == "c" * 64
    assert manifest["files"]["unknown"]["sha256"] == hashlib.sha256(b"unknown").hexdigest()
    again.save()
    md5s = sorted(digest.md5 for digest in Digests(work).files.values())
    assert md5s == sorted(["c" * 32, hashlib.md5(b"unknown").hexdigest()])


def test_file_that_changed_since_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "file").write_text("one")
    told = Digests(tmp_path / "work")
    told.add(folder / "file", claim(folder / "file"))
    (folder / "file").write_text("two")
    os.utime(folder / "file", ns=(0, 1))
    write_manifest(folder, stage="merge", name="x", inputs={}, sha256=told.sha256)
    assert verify_artifact(folder)["files"]["file"]["sha256"] == hashlib.sha256(b"two").hexdigest()


def test_paths_are_those_in_the_project_where_a_container_wrote_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFBUILD_OUT", str(tmp_path / "out"))
    (tmp_path / "out/build/x").mkdir(parents=True)
    (tmp_path / "out/build/x/file").write_text("one")
    told = Digests(tmp_path / "work")
    told.sha256(tmp_path / "out/build/x/file")
    assert list(told.files) == ["build/x/file"]
