"""Resolved recipes become DVC files: a pure function, so that `dvc repro` is the build.

The root dvc.yaml holds what recipes share (resolve, models, data, baselines, report); pipelines/<name>/dvc.yaml
holds a recipe's own stages, because one dvc.lock for all makes DVC's own time grow with the square of the stages.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild import yamlfile
from prefbuild.artifact import write_atomic
from prefbuild.errors import GraphError
from prefbuild.resolve import RESOLVED, Project, Resolved, Section, resolve

HEADER = "# Written by `prefbuild sync` from recipes/. Edit a recipe, not this file.\n"
RECIPE_STAGES = ("prepare", "reference", "train", "merge", "evaluate", "gate")
METRICS = {"metrics", "live"}
PLOTS: dict[str, dict[str, str]] = {
    "lengths": {"x": "tokens", "y": "rows"},
    "plots": {"x": "step"},
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One stage of the graph."""

    stage: str
    name: str  # of the recipe, or of the shared model, data or baseline
    resolved: str  # the resolved file that holds its section
    section: Section
    compute: dict[str, Any]  # where it runs: limits, and where the image is found

    @property
    def address(self) -> str:
        """The stage as DVC calls it."""
        if self.stage in RECIPE_STAGES:
            return f"pipelines/{self.name}/dvc.yaml:{self.stage}"
        return self.stage if self.stage == "report" else f"{self.stage}-{self.name}"

    @property
    def deps(self) -> list[str]:
        """What DVC watches. Task files are not among them: the section holds their digests, and the lock checks them."""
        paths: set[str] = set()
        for role, value in self.section["inputs"].items():
            if role != "tasks":
                paths.update(value if isinstance(value, list) else [value])
        return sorted(paths)


def nodes(resolved: Resolved) -> list[Node]:
    """Every stage but resolve itself, in the order of the pipeline."""
    found = []
    for path, sections in resolved.items():
        for stage, section in sections.items():
            if stage not in ("promote", "compute"):
                found.append(
                    Node(stage=stage, name=Path(path).stem, resolved=path, section=section, compute=sections["compute"])
                )
    order = ["model", "data", "prepare", "reference", "train", "merge", "evaluate", "baseline", "gate", "report"]
    return sorted(found, key=lambda node: (node.name if node.stage in RECIPE_STAGES else "", order.index(node.stage)))


def render(project: Project) -> dict[str, str]:
    """The text of every DVC file of a project, by path. A pure function of the recipes and params.yaml."""
    resolved = resolve(project, pinned=False)
    shared: dict[str, Any] = {
        "resolve": {
            "cmd": "prefbuild resolve",
            "deps": ["params.yaml", "prefbuild.lock.yaml", "recipes", *_tasks_elsewhere(project)],
            "outs": [{path: {"cache": False, "persist": True}} for path in resolved],
        }
    }
    own: dict[str, dict[str, Any]] = {}
    for node in nodes(resolved):
        if node.stage in RECIPE_STAGES:
            own.setdefault(node.name, {})[node.stage] = {"wdir": "../.."} | _stage(node)
        else:
            shared[node.address] = _stage(node)
    files = {
        "dvc.yaml": {
            "stages": shared,
            "metrics": [
                f"{node.section['outputs']['samples']}/metrics.json"
                for node in nodes(resolved)
                if node.stage == "baseline"
            ],
            # For `dvc params diff` and `dvc exp run -S recipes/x.yaml:train.beta=0.2`; a change here triggers nothing.
            "params": [f"recipes/{name}.yaml" for name in project.recipes],
        }
    }
    for name, stages in own.items():
        files[f"pipelines/{name}/dvc.yaml"] = {"stages": stages}
    return {path: HEADER + yamlfile.dump(value) for path, value in files.items()}


def sync(project: Project, *, check: bool = False) -> list[str]:
    """Write the DVC files that differ and remove those of recipes that are gone; returns what changed.

    With `check` nothing is written.
    """
    wanted = render(project)
    changed = []
    for path, text in wanted.items():
        file = project.root / path
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            changed.append(path)
            if not check:
                write_atomic(file, text)
    for file in sorted(project.root.glob("pipelines/*/dvc.yaml")):
        path = file.relative_to(project.root).as_posix()
        if path not in wanted:
            changed.append(path)
            if not check:
                shutil.rmtree(file.parent)
    resolved = resolve(project, pinned=False)
    for file in sorted((project.root / RESOLVED).rglob("*.json")):
        path = file.relative_to(project.root).as_posix()
        if path not in resolved:
            changed.append(path)
            if not check:
                file.unlink()
    return changed


def check_synced(project: Project) -> None:
    """GraphError when the DVC files are not what the recipes ask for."""
    stale = sync(project, check=True)
    if stale:
        raise GraphError(
            f"the graph changed: {', '.join(stale)} out of date; run `prefbuild sync` (or `prefbuild build`)"
        )


def _tasks_elsewhere(project: Project) -> list[str]:
    tasks = {task.task for recipe in project.recipes.values() for task in recipe.tasks}
    return sorted(task for task in tasks if task.endswith((".yaml", ".yml")) and not task.startswith("recipes/"))


def _stage(node: Node) -> dict[str, Any]:
    outputs = node.section["outputs"]
    outs, metrics, plots = [], [], []
    for role, path in outputs.items():
        if role in METRICS:
            metrics.append(path)
        elif role in PLOTS:
            plots.append({path: PLOTS[role]})
        else:
            outs.append(path)
    stage: dict[str, Any] = {
        "cmd": f"prefbuild stage {node.stage}" + ("" if node.stage == "report" else f" {node.name}"),
        "deps": node.deps,
        "params": [{node.resolved: [node.stage]}],
        "outs": sorted(outs),
        "metrics": sorted(metrics),
        "plots": plots,
    }
    return {key: value for key, value in stage.items() if value}
