"""Where a published artifact came from: git commit, recipe, pins, digests, versions, machine."""

import json
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import prefbuild
from prefbuild.artifact import sha256_file

SOURCES = ("recipes", "params.yaml", "prefbuild.lock.yaml", "dvc.yaml", "pipelines/*/dvc.yaml")


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """The commit a project stands at, and what is not in it."""

    commit: str | None
    dirty: list[str]  # paths relative to the project, or a sentence in brackets


def source_state(root: Path, name: str) -> SourceState:
    """Compare everything a build is made from with git's HEAD.

    Looks at recipes/, params.yaml, the lock, the DVC files, and prefbuild itself where it lies in the same repository.
    """
    try:
        return _state(root, name)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return SourceState(commit=None, dirty=[f"({why[0]})" if why else "(git failed)"])


def _state(root: Path, name: str) -> SourceState:
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").strip()
    except subprocess.CalledProcessError:
        return SourceState(commit=None, dirty=["(the repository has no commits)"])
    paths = [f":(top,glob){_inside(root, top)}{path}" for path in SOURCES]
    paths[0] += "/**"
    package = Path(prefbuild.__file__).resolve().parent
    if package.is_relative_to(top.resolve()):
        paths.append(f":(top){package.relative_to(top.resolve()).as_posix()}")
    status = _git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--", *paths)
    dirty = {_shown(root, top, entry[3:]) for entry in status.split("\0") if entry}
    # What git ignores is not in its status: a recipe must be in the commit itself.
    own = (f"recipes/{name}.yaml", f"pipelines/{name}/dvc.yaml")
    for path in ("params.yaml", "prefbuild.lock.yaml", "dvc.yaml", *own):
        if not _committed(root, top, path):
            dirty.add(path)
    return SourceState(commit=commit, dirty=sorted(dirty))


def gather(
    root: Path,
    name: str,
    *,
    version: str,
    build: str,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    source: SourceState,
) -> dict[str, Any]:
    """The record published beside the artifact: read from files, but for time, commit and this Python."""
    inputs = resolved["promote"]["inputs"]
    train = json.loads((root / inputs["train"]).read_text(encoding="utf-8"))
    records = [
        json.loads((root / inputs["samples"] / f"{m['key']}.json").read_text(encoding="utf-8"))
        for m in resolved["gate"]["settings"]["measurements"]
    ]
    versions: dict[str, Any] = {}
    for record in records:
        versions |= record.get("versions", {})
    return {
        "name": name,
        "version": version,
        "build": build,
        "artifact": gate["artifact"],
        "adapter": gate["adapter"],
        "git_commit": source.commit,
        "dirty": source.dirty,
        "recipe": {"path": f"recipes/{name}.yaml", "sha256": sha256_file(root / "recipes" / f"{name}.yaml")},
        "lock": {"sha256": sha256_file(root / "prefbuild.lock.yaml"), "entries": _pins(root, resolved)},
        "judged": gate["judged"],
        "made_from": {role: _made_from(root / inputs[role]) for role in ("prepared", "adapter", "merged", "samples")},
        "evaluated_with": versions,
        "trained_on": train.get("machine", {}),
        "promoted_with": {"prefbuild": prefbuild.__version__, "python": platform.python_version()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _made_from(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["inputs"]


def _pins(root: Path, resolved: dict[str, Any]) -> dict[str, Any]:
    """What the lock pinned of the model and the data, by path, from their resolved sections."""
    pins = {}
    inputs = resolved["prepare"]["inputs"]
    for path in [inputs["model"], *inputs["data"]]:
        kind, node = Path(path).parts[-2:]
        section = root / "build/.resolved" / kind / f"{node}.json"
        if section.exists():  # not for a base that is another recipe's merged model
            sections = json.loads(section.read_text(encoding="utf-8"))
            pins[path] = sections["model" if kind == "models" else "data"]["settings"]
    return pins


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _inside(root: Path, top: Path) -> str:
    """The project's folder within its repository: '' or 'a/b/'."""
    inside = root.resolve().relative_to(top.resolve()).as_posix()
    return "" if inside == "." else f"{inside}/"


def _shown(root: Path, top: Path, path: str) -> str:
    inside = _inside(root, top)
    return path.removeprefix(inside)


def _committed(root: Path, top: Path, path: str) -> bool:
    try:
        _git(root, "cat-file", "-e", f"HEAD:{_inside(root, top)}{path}")
    except subprocess.CalledProcessError:
        return False
    return True
