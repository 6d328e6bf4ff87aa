"""What of this machine a container sees, and where."""

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefbuild.errors import StageError
from prefbuild.job import WORK, Job

PROJECT = "/project"
OUT = "/out"
CACHE = "/cache"
MOST_LINKS = 256


def mounts(job: Job, out: Path) -> list[Any]:
    """Every bind mount of a job: inputs and what they link to read-only; outputs, work folder and caches writable.

    Makes the writable folders. StageError for links to nothing, or too many of them.
    """
    # Triton's and inductor's compiled code is of the image's versions.
    compiled = Path(WORK, "compiled", str(job.image.id).removeprefix("sha256:")[:12])
    for folder in (out, compiled, job.work, *job.caches):
        # Made here, so that they are the caller's: an engine that makes a mount's source makes it root's.
        folder.mkdir(parents=True, exist_ok=True)
    return list(_mounts(job, out, compiled))


def _mounts(job: Job, out: Path, compiled: Path) -> Iterator[Any]:
    from docker.types import Mount

    def bind(source: Path, target: str, *, read_only: bool) -> Any:
        return Mount(target=target, source=str(source.resolve()), type="bind", read_only=read_only)

    inputs = {_inside(path): path for path in job.inputs}
    for target, path in sorted(inputs.items()):
        if any(parent.as_posix() in inputs for parent in Path(target).parents):
            continue  # in a folder that is mounted anyway
        yield bind(path, target, read_only=True)
    for target, path in _links(inputs).items():
        yield bind(path, target, read_only=True)
    yield bind(out, OUT, read_only=False)
    yield bind(compiled, CACHE, read_only=False)
    for folder in (job.work, *job.caches):
        yield bind(folder, _inside(folder), read_only=False)


def _inside(path: Path) -> str:
    """Where a path of the project, or an absolute one, is in the container."""
    return posixpath.normpath(path.as_posix() if path.is_absolute() else f"{PROJECT}/{path.as_posix()}")


def _links(inputs: dict[str, Path]) -> dict[str, Path]:
    """What symbolic links in the inputs point to, by where the link will look for it: caches of DVC and the Hub link."""
    found: dict[str, Path] = {}
    for top, path in inputs.items():
        # An input that is a link itself is mounted as what it points to; os.walk finds nothing in a plain file.
        for file in (Path(parent, name) for parent, folders, names in os.walk(path) for name in folders + names):
            if not file.is_symlink():
                continue
            where = posixpath.join(top, file.relative_to(path).as_posix())
            target = posixpath.normpath(posixpath.join(posixpath.dirname(where), os.readlink(file)))
            if not file.exists():
                raise StageError(
                    f"{file}: is a link to {os.readlink(file)}, which is not there; `dvc checkout` restores it"
                )
            if not any(target == other or target.startswith(f"{other}/") for other in inputs):
                found[target] = file.resolve()
    if len(found) > MOST_LINKS:
        raise StageError(
            f"{len(found)} files of the inputs are links, too many to mount; make them files: "
            "`dvc config cache.type hardlink,reflink,copy` and `dvc checkout --relink`"
        )
    return found
