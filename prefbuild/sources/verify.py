"""Copy a stream into a file that must have the locked size and sha256.

The bytes are hashed as they are written, so what was checked is what was copied.
"""

import hashlib
import re
import sys
from pathlib import Path
from typing import IO, Any

from prefbuild.errors import LockError

CHUNK = 4 * 1024 * 1024
PROGRESS_FROM = 100_000_000  # bytes; below that a bar only flickers


def copy_verified(stream: IO[bytes], entry: dict[str, Any], into: Path, *, shown: str, remedy: str) -> None:
    """Write a stream to `into/<the entry's path>`.

    Raises LockError when size or sha256 is not the entry's, naming `shown` and ending with `remedy`.
    Nothing is left then; no more than the locked size is ever written.
    """
    from tqdm import tqdm

    target = into / entry["path"]
    if not target.resolve().is_relative_to(into.resolve()):
        raise LockError(f"{shown}: the lock wants it at {entry['path']}, which is outside {into}; {remedy}")
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    quiet = not sys.stderr.isatty() or entry["size"] < PROGRESS_FROM
    try:
        with (
            open(target, "wb") as file,
            tqdm(
                total=entry["size"], unit="B", unit_scale=True, desc=target.name, disable=quiet, file=sys.stderr
            ) as bar,
        ):
            while chunk := stream.read(CHUNK):
                size += len(chunk)
                if size > entry["size"]:
                    raise LockError(f"{shown}: is larger than the {entry['size']} bytes that were locked; {remedy}")
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
        if size != entry["size"]:
            raise LockError(f"{shown}: has {size} bytes, {entry['size']} were locked; {remedy}")
        if digest.hexdigest() != entry["sha256"]:
            raise LockError(f"{shown}: sha256 is {digest.hexdigest()}, {entry['sha256']} was locked; {remedy}")
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def slugify(text: str) -> str:
    """Lower case letters, digits and single dashes, at most 40 characters; `x` when nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "x"
