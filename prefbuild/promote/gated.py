"""Is what would be published what passed its gates? Every byte is hashed again, and the verdict judged again.

In this order, so that the file named is the one that differs: the resolved recipe against the recipe, gate.json and
the metrics against what DVC recorded, everything judged against gate.json, folders against their manifests, and last
the verdict itself.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST, canonical_json, read_json, sha256_file, verify_artifact
from prefbuild.errors import PromotionRefused, StageError
from prefbuild.gates import METRICS, folders, judge
from prefbuild.pipeline import RECIPE_STAGES
from prefbuild.recipe import known_recipes
from prefbuild.resolve import load_project, resolve, resolved_path


def read_resolved(root: Path, name: str) -> dict[str, Any]:
    """The resolved recipe, when it is what recipe, params.yaml and lock say now.

    UsageError when there is no such recipe, PromotionRefused when it is not to be promoted or changed since it was built.
    """
    project = load_project(root)
    known_recipes([name], project.recipes)
    if project.recipes[name].promote is None:
        raise PromotionRefused(f"recipes/{name}.yaml: has no `promote:`, which says where to publish")
    resolved = resolve(replace(project, recipes={name: project.recipes[name]}))
    for path, sections in resolved.items():
        if Path(path).stem == "report" or "baselines" in Path(path).parts:
            continue  # these are of all recipes together
        if not (root / path).exists():
            raise PromotionRefused(f"{path}: is missing: {name} was not built; run `dvc repro`")
        if (root / path).read_bytes() != canonical_json(sections).encode():
            raise PromotionRefused(f"{path}: is not what recipes/{name}.yaml asks for now; run `dvc repro`")
    return resolved[resolved_path("promote", name)]


def verified_gate(root: Path, name: str, resolved: dict[str, Any]) -> dict[str, Any]:
    """The verdict, when it is a pass, this recipe's, and true of the files as they are now. Else PromotionRefused."""
    inputs = resolved["promote"]["inputs"]
    path = inputs["gate"]
    try:
        gate = read_json(root / path)
    except StageError as error:
        raise PromotionRefused(_relative(root, error)) from None
    if not isinstance(gate, dict) or gate.get("recipe") != name:
        raise PromotionRefused(f"{path}: is not the verdict on {name}; run `dvc repro`")
    _check_recorded(root, name, resolved)
    if gate.get("passed") is not True:
        failed = [rule["says"] for rule in gate.get("rules", []) if not rule["passed"]]
        raise PromotionRefused(f"{path}: {name} failed its gates:\n  " + "\n  ".join(failed))
    for file in [inputs[stage] for stage in METRICS] + [
        f"{folder}/{MANIFEST}" for folder in [inputs[role] for role in folders(inputs)] + inputs["others"]
    ]:
        _check_digest(root, file, gate.get("judged", {}).get(file), path)
    for folder in [inputs[role] for role in folders(inputs)] + inputs["others"]:
        try:
            verify_artifact(root / folder)
        except StageError as error:
            raise PromotionRefused(f"{_relative(root, error)}: not what {path} judged") from None
    verdict = judge(resolved["gate"]["settings"], resolved["gate"]["inputs"], name, root)
    if canonical_json(verdict) != (root / path).read_text(encoding="utf-8"):
        failed = [rule["says"] for rule in verdict["rules"] if not rule["passed"]]
        raise PromotionRefused(
            f"{path}: differs from the verdict on the files as they are now" + (f": {failed[0]}" if failed else "")
        )
    return verdict


def judged_bytes(root: Path, path: str, gate: dict[str, Any]) -> bytes:
    """A judged file's bytes, read once and checked, so that what is published is what was hashed."""
    data = (root / path).read_bytes()
    if gate["judged"][path] != "sha256:" + hashlib.sha256(data).hexdigest():
        raise PromotionRefused(f"{path}: changed while it was being promoted")
    return data


def _check_digest(root: Path, path: str, judged: Any, gate: str) -> None:
    if not (root / path).is_file():
        raise PromotionRefused(f"{path}: is missing; run `dvc repro`")
    found = "sha256:" + sha256_file(root / path)
    if found != judged:
        raise PromotionRefused(f"{path}: is {found}, not the {judged} that {gate} judged; run `dvc repro`")


def _check_recorded(root: Path, name: str, resolved: dict[str, Any]) -> None:
    """The verdict and the metrics are those of DVC's last run, which ran with the settings resolved now."""
    inputs = resolved["promote"]["inputs"]
    lock = f"pipelines/{name}/dvc.lock"
    stages = _read_lock(root, lock)
    recorded = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    for path in [inputs["gate"], *(inputs[stage] for stage in METRICS), inputs["lengths"], inputs["plots"]]:
        _check_md5(root, path, recorded.get(path), lock)
    file = resolved_path("promote", name)
    for stage in RECIPE_STAGES:
        params = (stages.get(stage) or {}).get("params") or {}
        section = (params.get(file) or {}).get(stage)
        if json.dumps(section, sort_keys=True) != json.dumps(resolved[stage], sort_keys=True):
            raise PromotionRefused(f"{file}: {stage} is not what {lock} says was run; run `dvc repro`")


def _check_md5(root: Path, path: str, recorded: str | None, lock: str) -> None:
    if recorded is None:
        raise PromotionRefused(f"{path}: {lock} does not record it, so nothing shows it was built; run `dvc repro`")
    if not (root / path).exists():
        raise PromotionRefused(f"{path}: is missing; run `dvc repro`")
    found = _md5_of_folder(root / path) if (root / path).is_dir() else _md5(root / path)
    if found != recorded:
        raise PromotionRefused(f"{path}: md5 is {found}, {lock} records {recorded}; run `dvc repro`")


def _md5(path: Path) -> str:
    with open(path, "rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_folder(folder: Path) -> str:
    """As DVC names a folder: by the md5 of the JSON list of its files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listed = [{"md5": _md5(path), "relpath": name} for name, path in sorted(files.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _read_lock(root: Path, lock: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages = YAML(typ="safe").load((root / lock).read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        raise PromotionRefused(f"{lock}: is missing, so nothing shows what was built; run `dvc repro`") from None
    except (YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise PromotionRefused(f"{lock}: is no DVC lock ({type(error).__name__}); restore it from git") from None
    return dict(stages)


def _relative(root: Path, error: Exception) -> str:
    return str(error).replace(f"{root}/", "")
