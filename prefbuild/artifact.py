"""Digests, manifests and atomic writes: what makes a folder an artifact.

A stage's output folder becomes an artifact when `manifest.json` is written into it, last. The manifest
lists every other file with size and sha256, and the digests of the artifacts the stage read. An artifact's
digest is the sha256 of the canonical JSON of that file list, so the same files have the same digest anywhere.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefbuild.errors import StageError

MANIFEST = "manifest.json"
HASHED_AT_ONCE = 4  # files: the shards of a large model are as many
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def merged_folder(recipe: str) -> str:
    """Where a build leaves a recipe's model, from the project's root."""
    return f"build/{recipe}/merged"


def writable(cache: Path, inside: Path) -> Path:
    """The cache; where a container can't write it, `inside` its work folder, so that a killed run goes on from there."""
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if os.access(cache, os.W_OK):
        return cache
    inside.mkdir(parents=True, exist_ok=True)
    return inside


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and a final newline: equal values give equal bytes.

    Raises ValueError on NaN and infinities, which are not JSON.
    """
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(value: Any) -> str:
    """`sha256:<hex>` of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob(content: bytes) -> str:
    """The sha1 by which git, and the Hub's list of files, name some bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, str):
        data = data.encode()
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_atomic(path, canonical_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; StageError names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: is missing; run `dvc repro` to build it") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise StageError(f"{path}: is not JSON: {error}") from None


def list_files(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> dict[str, dict[str, Any]]:
    """`{relative path: {size, sha256}}` of every file but the manifest.

    Raises StageError on links, devices, FIFOs, sockets and setuid files: an artifact is plain files and folders.
    """
    paths: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in sorted(folders) + sorted(names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode) or mode & (stat.S_ISUID | stat.S_ISGID):
                raise StageError(
                    f"{path}: an artifact holds plain files and folders only, this is {stat.filemode(mode)}"
                )
            relative = path.relative_to(folder).as_posix()
            if relative != MANIFEST:
                paths[relative] = path
    paths = dict(sorted(paths.items()))
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        hashed = threads.map(sha256, paths.values())
        return {
            relative: {"size": path.stat().st_size, "sha256": digest}
            for (relative, path), digest in zip(paths.items(), hashed, strict=True)
        }


def list_special(path: Path, *, hard_links: bool = False, any_owner: bool = False) -> list[str]:
    """A line for everything at or below a path that is not a plain file or folder of this user's, or of anybody's.

    With `hard_links` also for files that have a second name: DVC gives its outputs one, in its cache. Links are never followed: what an untrusted process left must not be opened before this has passed.
    """
    found: list[str] = []

    def unreadable(error: OSError) -> None:
        found.append(f"{error.filename} can't be read ({error.strerror})")

    top: tuple[Any, list[str], list[str]] = (path.parent, [], [path.name])
    is_folder = path.is_dir() and not path.is_symlink()
    for parent, folders, names in [top, *(os.walk(path, onerror=unreadable) if is_folder else [])]:
        for name in sorted(folders) + sorted(names):
            entry = Path(parent, name)
            try:
                about = entry.lstat()
            except FileNotFoundError:
                continue
            kind = KINDS.get(stat.S_IFMT(about.st_mode))
            if kind is None and about.st_mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(about.st_mode):
                kind = "a setuid file"
            elif kind is None and hard_links and stat.S_ISREG(about.st_mode) and about.st_nlink > 1:
                kind = f"a file with {about.st_nlink} names (hard links)"
            elif kind is None and not any_owner and about.st_uid != os.getuid():
                kind = f"owned by user {about.st_uid}"
            if kind is not None:
                found.append(f"{entry} is {kind}")
    return found


def write_manifest(
    folder: Path, *, stage: str, name: str, inputs: dict[str, Any], sha256: Callable[[Path], str] = sha256_file
) -> dict[str, Any]:
    """Hash every file of a folder and write its manifest. Returns the manifest."""
    files = list_files(folder, sha256)
    manifest = {"digest": digest_of(files), "stage": stage, "name": name, "inputs": inputs, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, without hashing its files. StageError when there is none."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("digest") != digest_of(manifest.get("files")):
        raise StageError(f"{folder / MANIFEST}: its digest is not that of the files it lists; rebuild {folder}")
    return manifest


def verify_artifact(folder: Path) -> dict[str, Any]:
    """Re-hash every file of an artifact; returns its manifest, or StageError naming the first file that differs."""
    manifest = read_manifest(folder)
    found = list_files(folder)
    for path in sorted(set(found) | set(manifest["files"])):
        if path not in found:
            raise StageError(f"{folder / path}: is in the manifest but not on disk")
        if path not in manifest["files"]:
            raise StageError(f"{folder / path}: is on disk but not in the manifest")
        if found[path] != manifest["files"][path]:
            raise StageError(
                f"{folder / path}: sha256 is {found[path]['sha256']}, the manifest says {manifest['files'][path]['sha256']}"
            )
    return manifest


def input_digest(path: Path) -> str:
    """Digest of one input: an artifact's own digest, a plain file's sha256, or that of a plain folder's file list."""
    if (path / MANIFEST).exists():
        return str(read_manifest(path)["digest"])
    if path.is_dir():
        return digest_of(list_files(path))
    return "sha256:" + sha256_file(path)
