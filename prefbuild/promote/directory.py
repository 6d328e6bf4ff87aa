"""A folder as registry: <registry>/<name>/v1, v2, ... each a whole version.

A version is written beside its place, read back, and renamed into it, so that it is there whole or not at all. All of
it happens under one lock; what a killed promotion left is removed, or recorded, by the next.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefbuild.errors import PromotionRefused
from prefbuild.promote import version
from prefbuild.promote.version import Files


@contextmanager
def locked(registry: Path) -> Iterator[None]:
    """Hold the registry: a second promotion waits. The lock goes with the process that holds it."""
    registry.mkdir(parents=True, exist_ok=True)
    with open(registry / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(
    registry: Path,
    target: dict[str, Any],
    name: str,
    *,
    build: str,
    gate: dict[str, Any],
    taken: Iterable[str],
    write: Callable[[Path, str], Files],
) -> tuple[dict[str, Any], bool]:
    """Publish a build, unless it is there; returns what the record keeps, and whether it was there.

    `taken` are versions that were promoted once, there still or not: a number is never given twice. `write(folder,
    version)` writes the version's files. PromotionRefused leaves nothing behind.
    """
    with locked(registry):
        found = next((one for one in _versions(registry, name) if _facts(registry, name, one)["build"] == build), None)
        already = found is not None
        if found is None:
            found = _next(registry, name, taken)
            _put(registry, name, found, lambda folder: write(folder, str(found)))
        files = _check(registry, name, found)
        version.check_roles(files, target, gate, str(registry / name / found))
        return _record(registry, name, found), already


def roll_back(registry: Path, name: str, to: str | None, recorded: list[str]) -> dict[str, Any]:
    """Make an earlier version current again, as a copy with the next number; returns what the record keeps.

    `recorded` are the versions in the record, so that a rollback that was interrupted is finished first.
    """
    with locked(registry):
        there = _versions(registry, name)
        if not there:
            raise PromotionRefused(f"{registry / name}: holds no version")
        last = _record(registry, name, there[-1])
        if "same_as" in last and there[-1] not in recorded and to in (None, last["same_as"]):
            _check(registry, name, there[-1])
            return last
        origin = str(last.get("same_as", there[-1]))
        if to is not None and to not in there:
            raise PromotionRefused(f"{registry / name}: has no version {to}; it has {', '.join(there)}")
        before = [one for one in there if int(one[1:]) < int(origin[1:])]
        if to is None and not before:
            raise PromotionRefused(f"{registry / name}: {there[-1]} is {origin}, and no version was promoted before it")
        source = to or before[-1]
        _check(registry, name, source)
        if _facts(registry, name, source)["version"] == origin:
            raise PromotionRefused(f"{registry / name}: {there[-1]} holds the files of {origin} already")
        number = _next(registry, name, recorded)
        copy = registry / name / source
        _put(registry, name, number, lambda folder: shutil.copytree(copy, folder, dirs_exist_ok=True))
        _check(registry, name, number)
        return _record(registry, name, number)


def _put(registry: Path, name: str, number: str, write: Callable[[Path], Any]) -> None:
    (registry / name).mkdir(exist_ok=True)
    for stale in (registry / name).glob(".tmp-*"):  # the lock is ours, so its promotion is dead
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(dir=registry / name, prefix=".tmp-"))
    try:
        folder = temporary / f"{name}-{number}"  # an OpenSSF signature holds the folder's name
        folder.mkdir()
        write(folder)
        _sync(folder)
        folder.replace(registry / name / number)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(registry / name)


def _check(registry: Path, name: str, number: str) -> Files:
    """Hash a published version. PromotionRefused names the file that differs."""
    folder = registry / name / number
    files = version.read_files(folder)
    version.check_files(files, _statement(registry, name, number)[0], str(folder))
    return files


def _record(registry: Path, name: str, number: str) -> dict[str, Any]:
    """What the record keeps; a version whose statement names another one went back to that one."""
    facts = {**_facts(registry, name, number), "place": str(registry)}
    if facts["version"] == number:
        return facts
    made = datetime.fromtimestamp((registry / name / number).stat().st_mtime, UTC).isoformat(timespec="seconds")
    return {**facts, "version": number, "same_as": facts["version"], "time": made}


def _facts(registry: Path, name: str, number: str) -> dict[str, Any]:
    return _statement(registry, name, number)[1]


def _statement(registry: Path, name: str, number: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = registry / name / number / version.STATEMENT
    try:
        return version.read_statement(path.read_bytes(), str(path))
    except OSError as error:
        raise PromotionRefused(f"{path}: can't be read ({error.strerror}): the registry was changed since") from None


def _versions(registry: Path, name: str) -> list[str]:
    folder = registry / name
    found = [path.name for path in folder.iterdir() if version.NUMBER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda number: int(number[1:]))


def _next(registry: Path, name: str, taken: Iterable[str]) -> str:
    used = [int(number[1:]) for number in (*_versions(registry, name), *taken)]
    return f"v{max(used, default=0) + 1}"


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
