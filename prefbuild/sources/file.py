"""A file or folder on this machine.

Covered: plain files, in folders of any depth. Not covered: links and hidden files inside a folder, which are
refused, because what they hold is not what a reader of the folder sees.
"""

import os
import stat
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from prefbuild.artifact import sha256_file
from prefbuild.errors import LockError
from prefbuild.sources.verify import copy_verified, slugify


def reference(source: dict[str, Any]) -> dict[str, Any]:
    """Its path, written one way."""
    return {"source": "file", "path": str(PurePosixPath(source["path"]))}


def title(source: dict[str, Any]) -> str:
    """The path."""
    return str(PurePosixPath(source["path"]))


def slug(source: dict[str, Any]) -> str:
    """`<folder>-<name>` of recipes/<folder>/<name>.jsonl."""
    path = PurePosixPath(source["path"])
    return slugify(f"{path.parent.name} {path.stem}")


def pin(source: dict[str, Any], root: Path) -> dict[str, Any]:
    """Size and sha256 of the file, or of every file of the folder."""
    found = files_of(source, root)
    return {"files": [describe(path, name) for name, path in found.items()]}


def fetch(source: dict[str, Any], locked: dict[str, Any], into: Path, work: Path) -> None:
    """Copy the locked files. LockError when the folder holds other files, or a file other bytes."""
    found = files_of(source, Path())
    remedy = "if the change is meant, run `prefbuild lock`; else put the old file back"
    for name in sorted(set(found) ^ {entry["path"] for entry in locked["files"]}):
        what = "is not in the lock" if name in found else "was locked and is gone"
        raise LockError(f"{shown(source, name)}: {what}; {remedy}")
    for entry in locked["files"]:
        with open(found[entry["path"]], "rb") as stream:
            copy_verified(stream, entry, into, shown=shown(source, entry["path"]), remedy=remedy)


def shown(source: dict[str, Any], name: str) -> str:
    """How a file of this source is called in messages: its path from the project."""
    path = PurePosixPath(source["path"])
    return str(path if path.name == name else path / name)


def describe(path: Path, name: str) -> dict[str, Any]:
    """A file as the lock keeps it: {path, size in bytes, sha256}."""
    return {"path": name, "size": path.stat().st_size, "sha256": sha256_file(path)}


def files_of(source: dict[str, Any], root: Path) -> dict[str, Path]:
    """Every file of a source: its name within the source, and where it is. LockError when it can't be pinned."""
    path = root / source["path"]
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        hint = (
            f"did you mean {PurePosixPath(source['path']).parent / close[0]}?"
            if close
            else "check the path in the recipe"
        )
        raise LockError(f"{source['path']}: no such file or folder; {hint}")
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        for name in folders + sorted(names):
            item = Path(parent, name)
            relative = item.relative_to(path).as_posix()
            mode = item.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise LockError(
                    f"{shown(source, relative)}: is a link, and what it points to can change unseen; "
                    f"copy the folder with its files (`cp -rL {source['path']} COPY`) and name the copy"
                )
            if name.startswith("."):
                raise LockError(
                    f"{shown(source, relative)}: is hidden; move it out of the folder, or name one file of it"
                )
            if stat.S_ISREG(mode):
                files[relative] = item
            elif not stat.S_ISDIR(mode):
                raise LockError(
                    f"{shown(source, relative)}: is neither a file nor a folder ({stat.filemode(mode)}); remove it"
                )
    if not files:
        raise LockError(f"{source['path']}: is an empty folder; put the files there, or correct the path in the recipe")
    return dict(sorted(files.items()))
