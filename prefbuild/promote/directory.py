"""A folder as registry: <registry>/<name>/v1, v2, ... and promotions.jsonl, a line a promotion.

A version is written beside its place, read back, and renamed into it, so that it is there whole or not at all. All of
it happens under one lock; what a killed promotion left is removed, or recorded, by the next.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST, canonical_json, digest_of, verify_artifact, write_manifest
from prefbuild.errors import PromotionRefused, StageError
from prefbuild.gates import METRICS, titles
from prefbuild.promote.card import render_card
from prefbuild.promote.provenance import SourceState, gather
from prefbuild.promote.publishable import check_publishable
from prefbuild.promote.verify import judged_bytes

RECORD = "promotions.jsonl"
VERSION = re.compile(r"v([1-9][0-9]*)")
# The role of each folder that may be published, and where gate.json keeps its digest.
PUBLISHED = {"adapter": "adapter", "merged": "artifact"}


@contextmanager
def locked(registry: Path) -> Iterator[None]:
    """Hold the registry: a second promotion waits. The lock goes with the process that holds it."""
    registry.mkdir(parents=True, exist_ok=True)
    with open(registry / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(registry: Path, name: str, build: str) -> str | None:
    """The version that is this build, if it was published."""
    for version in _versions(registry, name):
        if _provenance(registry, name, version).get("build") == build:
            return version
    return None


def publish(
    root: Path,
    registry: Path,
    name: str,
    *,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    source: SourceState,
    build: str,
) -> str:
    """Write the next version; returns its name. PromotionRefused leaves nothing behind."""
    (registry / name).mkdir(exist_ok=True)
    for stale in (registry / name).glob(".tmp-*"):  # the lock is ours, so its promotion is dead
        shutil.rmtree(stale)
    version = _next_version(registry, name)
    temporary = Path(tempfile.mkdtemp(dir=registry / name, prefix=".tmp-"))
    try:
        temporary.chmod(0o755)
        _write(root, temporary, name, version, resolved=resolved, gate=gate, source=source, build=build)
        check_publishable(temporary)
        manifest = write_manifest(temporary, stage="promote", name=name, inputs=gate["judged"])
        _check_read_back(temporary, manifest["files"], gate)
        _sync(temporary)
        temporary.replace(registry / name / version)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(registry / name)
    return version


def verify(registry: Path, name: str, version: str, gate: dict[str, Any]) -> dict[str, Any]:
    """Hash a published version; returns what the record keeps. PromotionRefused names the file that differs."""
    folder = registry / name / version
    try:
        files = verify_artifact(folder)["files"]
    except StageError as error:
        raise PromotionRefused(f"{error}: the registry was changed since it was published") from None
    _check_read_back(folder, files, gate)
    facts = _provenance(registry, name, version)
    return {key: facts[key] for key in ("name", "version", "build", "artifact", "git_commit", "dirty", "time")}


def record(registry: Path, facts: dict[str, Any]) -> bool:
    """Append a promotion to the registry's record, unless it is there. Returns whether it was appended."""
    entries, whole = _recorded(registry)
    if facts in entries:
        return False
    with open(registry / RECORD, "ab") as file:
        file.truncate(whole)
        file.write((json.dumps(facts, sort_keys=True, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return True


def _write(
    root: Path,
    folder: Path,
    name: str,
    version: str,
    *,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    source: SourceState,
    build: str,
) -> None:
    section = resolved["promote"]
    inputs, target = section["inputs"], section["settings"]["promote"]
    roles = [role for role in PUBLISHED if target[role]]
    for role in roles:
        shutil.copytree(root / inputs[role], folder / role, copy_function=shutil.copyfile)
    metrics = {stage: json.loads(judged_bytes(root, inputs[stage], gate)) for stage in METRICS}
    metrics["baseline"] = {}
    for key, title in titles(resolved["gate"]["settings"]["measurements"]).items():
        base = root / inputs["baseline"] / f"{key}.json"
        if base.exists():
            metrics["baseline"][title] = json.loads(base.read_text(encoding="utf-8"))["metrics"]
    facts = gather(root, name, version=version, build=build, resolved=resolved, gate=gate, source=source)
    (folder / "recipe.yaml").write_bytes((root / "recipes" / f"{name}.yaml").read_bytes())
    (folder / "resolved.json").write_text(canonical_json(resolved), encoding="utf-8")
    (folder / "gate.json").write_text(canonical_json(gate), encoding="utf-8")
    (folder / "metrics.json").write_text(canonical_json(metrics), encoding="utf-8")
    (folder / "provenance.json").write_text(canonical_json(facts), encoding="utf-8")
    (folder / "README.md").write_text(
        render_card(root, resolved=resolved, gate=gate, metrics=metrics, provenance=facts), encoding="utf-8"
    )


def _check_read_back(folder: Path, files: dict[str, Any], gate: dict[str, Any]) -> None:
    """What lies in the registry has the digests the gate judged."""
    for role, key in PUBLISHED.items():
        prefix = f"{role}/"
        own = {path.removeprefix(prefix): entry for path, entry in files.items() if path.startswith(prefix)}
        if not own:
            continue  # the recipe does not publish it
        own.pop(MANIFEST, None)
        if digest_of(own) != gate[key]:
            raise PromotionRefused(f"{folder / role}: read back as {digest_of(own)}, the gate judged {gate[key]}")


def _versions(registry: Path, name: str) -> list[str]:
    folder = registry / name
    found = [path.name for path in folder.iterdir() if VERSION.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda version: int(version[1:]))


def _next_version(registry: Path, name: str) -> str:
    """One above every version there is or was: a number is never given twice, even if a version was removed."""
    used = [int(version[1:]) for version in _versions(registry, name)]
    used += [int(entry["version"][1:]) for entry in _recorded(registry)[0] if entry["name"] == name]
    return f"v{max(used, default=0) + 1}"


def _recorded(registry: Path) -> tuple[list[dict[str, Any]], int]:
    """The record's entries, and its length without the half line that a promotion killed while writing left."""
    path = registry / RECORD
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.split(b"\n")[:-1]], len(whole)
    except ValueError as error:
        raise PromotionRefused(f"{path}: a line is not JSON ({error}); restore the record") from None


def _provenance(registry: Path, name: str, version: str) -> dict[str, Any]:
    path = registry / name / version / "provenance.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromotionRefused(f"{path}: can't be read: the registry was changed since it was published") from error
    return facts


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
