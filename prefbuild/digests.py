"""sha256 and md5 of what a stage wrote, taken in one pass and handed on, so that nothing is read again.

The sha256 goes into manifest.json, the md5 is DVC's. A stage that hashes while it writes says so here, the worker adds
the files it has to read, and the process that DVC started tells DVC (dvc_state.py). A file that changed since, by size or
time of change, is read.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.artifact import read_json, write_json

DIGESTS = "digests.json"  # in a stage's work folder
CHUNK = 2**24  # bytes


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A file's size in bytes, the time it was last changed (ns), and what its bytes hash to."""

    size: int
    changed: int
    sha256: str
    md5: str


class Hashing:
    """sha256 and md5 of a stream. Each is taken in a thread of its own, as hashlib lets go of Python's lock.

    `update` returns while its data is still being hashed, so the caller must not change it; it waits for the data of the
    call before, so that never more than two are in memory.
    """

    def __init__(self) -> None:
        self._hashes = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._threads = ThreadPoolExecutor(len(self._hashes))
        self._busy: list[Future[None]] = []

    def update(self, data: Any) -> None:
        """Hash a buffer of bytes after those before it."""
        self._wait()
        self._busy = [self._threads.submit(one.update, data) for one in self._hashes]

    def finish(self, path: Path) -> Digest:
        """The digest of the file that these bytes are in."""
        self._wait()
        self._threads.shutdown()
        about = path.stat()
        sha256, md5 = (one.hexdigest() for one in self._hashes)
        return Digest(size=about.st_size, changed=about.st_mtime_ns, sha256=sha256, md5=md5)

    def _wait(self) -> None:
        for future in self._busy:
            future.result()


def digest_file(path: Path) -> Digest:
    """Read a file once for both of its hashes."""
    hashing = Hashing()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            hashing.update(data)
    return hashing.finish(path)


class Digests:
    """The digests of a stage's outputs, by their paths in the project, kept in its work folder from process to process."""

    def __init__(self, work: Path) -> None:
        self._kept = work / DIGESTS
        self.files: dict[str, Digest] = {}
        if self._kept.exists():
            self.files = {path: Digest(**digest) for path, digest in read_json(self._kept).items()}

    def add(self, path: Path, digest: Digest) -> None:
        """Say what a file hashes to."""
        self.files[_in_project(path)] = digest

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file: what was said of it or, when nothing was or the file changed since, what is read."""
        known = self.files.get(_in_project(path))
        if known is None or not is_of(known, path):
            known = digest_file(path)
            self.add(path, known)
        return known.sha256

    def save(self) -> None:
        """Keep them for the next process."""
        write_json(self._kept, {path: vars(digest) for path, digest in self.files.items()})


def is_of(digest: Digest, path: Path) -> bool:
    """Whether a file is, by its size and time of change, the one that was hashed."""
    about = path.stat()
    return (about.st_size, about.st_mtime_ns) == (digest.size, digest.changed)


def _in_project(path: Path) -> str:
    # A container writes to /out what is moved to the project afterwards.
    return os.path.relpath(path, os.environ.get("PREFBUILD_OUT") or os.curdir)
