"""Recipe, defaults and lock become one section a stage: everything that may re-run it, and nothing else.

    resolve(project) -> {"build/.resolved/<name>.json": {"prepare": section, "train": section, ...}, ...}

A section is all a stage is told: {"version", "image", "gpus", "inputs": {role: path}, "outputs": {role: path},
"settings"}. `version` is raised below when a stage's code changes what it makes from the same settings; `image` is the
ID of the image it runs in, null when none is locked. Beside the sections stands "compute": what a runner must know and
what changes no result (limits, where the image is found, trackers), so a change there runs nothing again.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild import lock as locks
from prefbuild.artifact import canonical_json, merged_folder, write_atomic
from prefbuild.errors import LockError, UsageError
from prefbuild.methods import (
    reference_recipe,
    reference_settings,
    reward_columns,
    reward_files,
    reward_models,
    train_settings,
    with_engine,
)
from prefbuild.recipe import (
    Compute,
    Defaults,
    Evaluate,
    Recipe,
    Task,
    data_settings,
    load_defaults,
    load_recipes,
    merge_settings,
    seconds,
    size_bytes,
)
from prefbuild.sources import node_id, title

STAGE_VERSIONS = {
    "model": 1,
    "data": 1,
    "prepare": 1,
    "reference": 1,
    "train": 1,
    "merge": 1,
    "evaluate": 2,
    "baseline": 2,
    "gate": 1,
    "report": 1,
    "promote": 1,
}
GPU_STAGES = {"reference", "train", "merge", "evaluate", "baseline"}
SHARED_STAGES = {"model": "models", "data": "data", "baseline": "baselines"}
RESOLVED = "build/.resolved"
# lm-evaluation-harness' own default. Not the recipe's seed, so that recipes with other seeds share a baseline.
EVALUATION_SEED = 1234

Section = dict[str, Any]
Resolved = dict[str, dict[str, Section]]


@dataclass(frozen=True, kw_only=True)
class Project:
    """A folder with recipes/, params.yaml and a lock, all read and checked."""

    root: Path
    recipes: dict[str, Recipe]
    defaults: Defaults
    lock: dict[str, Any]


def find_root(start: Path) -> Path:
    """The nearest folder upwards that holds params.yaml and recipes/. UsageError when there is none."""
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file() and (folder / "recipes").is_dir():
            return folder
    raise UsageError(f"{start}: no params.yaml and recipes/ here or above; start a project with `prefbuild new NAME`")


def load_project(root: Path) -> Project:
    """Read every recipe, params.yaml and the lock. RecipeError lists all problems of all files."""
    return Project(
        root=root,
        recipes=load_recipes(root),
        defaults=load_defaults(root / "params.yaml"),
        lock=locks.read_lock(root),
    )


def resolved_path(stage: str, name: str) -> str:
    """The resolved file that holds a stage's section."""
    if stage == "report":
        return f"{RESOLVED}/report.json"
    if stage in SHARED_STAGES:
        return f"{RESOLVED}/{SHARED_STAGES[stage]}/{name}.json"
    return f"{RESOLVED}/{name}.json"


def resolve(project: Project, *, pinned: bool = True) -> Resolved:
    """Every resolved file of a project, by path.

    With `pinned=False` what the lock lacks is left null: enough for the shape of the graph.
    Raises LockError naming everything that is not pinned.
    """
    unpinned: list[str] = []

    def pin(find: Any, *arguments: Any) -> Any:
        try:
            return find(project.lock, *arguments)
        except LockError as error:
            unpinned.append(str(error))
            return None

    resolved: Resolved = {}
    computes: dict[str, list[Compute]] = {}  # by resolved file, of every recipe that has a part in it
    measured: dict[str, list[tuple[Recipe, Evaluate, list[dict[str, Any]]]]] = {}  # by baseline
    for name, recipe in project.recipes.items():
        base_id = _base_id(recipe)
        measurements = []
        if recipe.evaluate is not None:
            measurements = [
                _measurement(recipe.evaluate, task, pin(locks.locked_task, task)) for task in recipe.evaluate.tasks
            ]
            measured.setdefault(base_id, []).append((recipe, recipe.evaluate, measurements))
        if recipe.base.source != "recipe":
            path = resolved_path("model", base_id)
            resolved[path] = {"model": _fetch_section("model", base_id, recipe.base.model_dump(mode="json"), pin)}
            computes.setdefault(path, []).append(recipe.compute)
        for source in recipe.data.sources:
            data_id = node_id(source.model_dump(mode="json"))
            path = resolved_path("data", data_id)
            resolved[path] = {"data": _fetch_section("data", data_id, source.model_dump(mode="json"), pin)}
            computes.setdefault(path, []).append(recipe.compute)
        path = resolved_path("prepare", name)
        rewards = [pin(locks.locked_reward, file) for file in reward_files(recipe.train)]
        resolved[path] = _recipe_sections(project, name, recipe, base_id, measurements, rewards)
        computes[path] = [recipe.compute]

    for base_id, users in measured.items():
        unique = {m["key"]: m for *_, measurements in users for m in measurements}
        resolved[resolved_path("baseline", base_id)] = {
            "baseline": _section(
                "baseline",
                inputs={"model": _base_path(users[0][0], base_id), "tasks": _task_files(list(unique.values()))},
                outputs={"samples": f"build/baselines/{base_id}"},
                measurements=[unique[key] for key in sorted(unique)],
                batch_size=min(evaluate.batch_size for _, evaluate, _ in users),
                seed=EVALUATION_SEED,
            )
        }
        computes[resolved_path("baseline", base_id)] = [recipe.compute for recipe, *_ in users]
    resolved[resolved_path("report", "")] = {"report": _report_section(project)}
    computes[resolved_path("report", "")] = [recipe.compute for recipe in project.recipes.values()]
    for path, sections in resolved.items():
        # What several recipes share runs once: fetching needs the least of their machines, a baseline the largest.
        choose = max if "baseline" in sections else min
        _place(sections, choose(computes[path] or [Compute()], key=lambda c: (c.gpus, c.role)), project.lock)
    for name, recipe in project.recipes.items():
        if recipe.train.report_to:
            resolved[resolved_path("train", name)]["compute"]["report_to"] = list(recipe.train.report_to)
    if unpinned and pinned:
        raise LockError("\n".join(dict.fromkeys(unpinned)))
    return dict(sorted(resolved.items()))


def write_resolved(root: Path, resolved: Resolved) -> list[str]:
    """Write the resolved files that changed; returns their paths."""
    changed = []
    for path, sections in resolved.items():
        text = canonical_json(sections)
        if not (root / path).exists() or (root / path).read_text(encoding="utf-8") != text:
            write_atomic(root / path, text)
            changed.append(path)
    return changed


def _place(sections: dict[str, Section], compute: Compute, lock: locks.Lock) -> None:
    """Say in each section, and beside them, where the stages run."""
    image = lock.get("images", {}).get(compute.role) or {"id": None, "repo_digest": None}
    for stage, section in sections.items():
        if stage != "promote":  # it runs where it is called
            # Only training is shared among several.
            gpus = compute.gpus if stage == "train" else min(compute.gpus, 1)
            section.update(image=image["id"], gpus=gpus if stage in GPU_STAGES else 0)
    sections["compute"] = {
        "role": compute.role,
        "repo_digest": image["repo_digest"],
        "gpu_memory": compute.gpu_memory and size_bytes(compute.gpu_memory),
        "memory": compute.memory and size_bytes(compute.memory),
        "shm_size": size_bytes(compute.shm_size),
        "tmp_size": size_bytes(compute.tmp_size),
        "pids": compute.pids,
        "time_limit": compute.time_limit and seconds(compute.time_limit),
    }


def _section(stage: str, inputs: dict[str, Any], outputs: dict[str, str], **settings: Any) -> Section:
    return {"version": STAGE_VERSIONS[stage], "inputs": inputs, "outputs": outputs, "settings": settings}


def _fetch_section(stage: str, node: str, source: dict[str, Any], pin: Any) -> Section:
    inputs = {"source": source["path"]} if source["source"] == "file" else {}
    outputs = {stage: f"build/{SHARED_STAGES[stage]}/{node}"}
    source = {key: value for key, value in source.items() if key != "name"}  # each recipe's own word for the same files
    entry = pin(locks.locked, node) or {}
    pins = {key: entry[key] for key in ("files", "wheel", "commit") if key in entry}
    return _section(stage, inputs, outputs, source=source, **pins)


def _base_id(recipe: Recipe) -> str:
    if recipe.base.source == "recipe":
        return f"recipe-{recipe.base.recipe}"
    return node_id(recipe.base.model_dump(mode="json"))


def _base_path(recipe: Recipe, base_id: str) -> str:
    if recipe.base.source == "recipe":
        return merged_folder(recipe.base.recipe)
    return f"build/models/{base_id}"


def _base_name(recipe: Recipe) -> str:
    if recipe.base.source == "recipe":
        return merged_folder(recipe.base.recipe)
    if recipe.base.source == "hub":
        return recipe.base.name or recipe.base.repo  # what PEFT loads an adapter's base by
    return recipe.base.name or title(recipe.base.model_dump(mode="json"))


def _measurement(evaluate: Evaluate, task: Task, locked: dict[str, Any] | None) -> dict[str, Any]:
    """One task and everything that changes its numbers; equal keys mean comparable results."""
    locked = locked or {"name": task.task, "files": []}
    chat = evaluate.apply_chat_template if task.apply_chat_template is None else task.apply_chat_template
    measurement = {
        "task": task.task,
        "name": locked["name"],
        "data": task.data,
        "files": locked["files"],
        "num_fewshot": task.num_fewshot,
        "limit": task.limit,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": evaluate.fewshot_as_multiturn,
    }
    identity = {**measurement, "version": STAGE_VERSIONS["evaluate"], "seed": EVALUATION_SEED}
    return {"key": hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12], **measurement}


def _task_files(measurements: list[dict[str, Any]]) -> list[str]:
    return sorted({file["path"] for measurement in measurements for file in measurement["files"]})


def _recipe_sections(
    project: Project,
    name: str,
    recipe: Recipe,
    base_id: str,
    measurements: list[dict[str, Any]],
    rewards: list[dict[str, Any]],
) -> dict[str, Section]:
    out = f"build/{name}"
    model = _base_path(recipe, base_id)
    data = [f"build/data/{node_id(source.model_dump(mode='json'))}" for source in recipe.data.sources]
    # Left out where there are none, so that other recipes' sections keep their bytes.
    reward_inputs = {"rewards": files} if (files := reward_files(recipe.train)) else {}
    if judges := reward_models(recipe.train):
        reward_inputs["reward_models"] = [merged_folder(judge) for judge in judges]
    # `adapter`, or all weights as they were trained.
    trained = "adapter" if recipe.train.use_peft else "trained"
    train, reference_inputs = _reference(recipe)
    # Of the packed engine, which computes them once: a stage of its own.
    log_probs = {"reference_log_probs": f"{out}/reference"} if train.get("engine") == "packed" else {}
    rivals = sorted({gate.against for gate in recipe.gates} - {"base", name})
    judged: dict[str, Any] = {
        "prepare": f"{out}/prepare.json",
        "train": f"{out}/train.json",
        "merge": f"{out}/merge.json",
        "evaluate": f"{out}/evaluate.json",
        "samples": f"{out}/evaluate",
        "prepared": f"{out}/prepared",
        trained: f"{out}/{trained}",
        "merged": merged_folder(name),
        "base_model": model,
        "baseline": f"build/baselines/{base_id}",
        "others": [f"build/{rival}/evaluate" for rival in rivals],
        **reference_inputs,
        **log_probs,
    }
    if judges:
        judged["reward_models"] = reward_inputs["reward_models"]
    if recipe.evaluate is None:
        for role in ("evaluate", "samples", "baseline"):
            del judged[role]
    sections = {
        "prepare": _section(
            "prepare",
            inputs={"model": model, "data": data},
            outputs={"prepared": judged["prepared"], "metrics": judged["prepare"], "lengths": f"{out}/lengths.csv"},
            data=data_settings(recipe.data, recipe.shape, reward_columns(recipe.train)),
            seed=recipe.seed,
        ),
        "train": _section(
            "train",
            inputs={"model": model, "prepared": judged["prepared"], **reward_inputs, **reference_inputs, **log_probs},
            outputs={
                trained: judged[trained],
                "metrics": judged["train"],
                "plots": f"{out}/live/plots/metrics",
                "live": f"{out}/live/metrics.json",
            },
            train=train,
            seed=recipe.seed,
            base={"name": _base_name(recipe)},
            **({"strategy": recipe.compute.strategy or "ddp"} if recipe.compute.gpus > 1 else {}),
            **({"rewards": rewards} if rewards else {}),
        ),
        "merge": _section(
            "merge",
            inputs={"model": model, trained: judged[trained]},
            outputs={"merged": judged["merged"], "metrics": judged["merge"]},
            merge=merge_settings(recipe.merge, recipe.train),
        ),
        "gate": _section(
            "gate",
            inputs=judged,
            outputs={"gate": f"{out}/gate.json"},
            gates=[gate.model_dump(mode="json") for gate in recipe.gates],
            measurements=measurements,
            others={rival: f"build/{rival}/evaluate" for rival in rivals},
        ),
    }
    if log_probs:
        sections["reference"] = _section(
            "reference",
            inputs={"model": model, "prepared": judged["prepared"], **reference_inputs},
            outputs=log_probs,
            **reference_settings(recipe.train, recipe.seed),
        )
    if recipe.evaluate is not None:
        sections["evaluate"] = _section(
            "evaluate",
            inputs={"model": judged["merged"], "tasks": _task_files(measurements)},
            outputs={"samples": judged["samples"], "metrics": judged["evaluate"]},
            measurements=measurements,
            batch_size=recipe.evaluate.batch_size,
            seed=EVALUATION_SEED,
        )
    if recipe.promote is not None:
        sections["promote"] = _section(
            "promote",
            inputs={
                **judged,
                "gate": f"{out}/gate.json",
                "lengths": f"{out}/lengths.csv",
                "plots": f"{out}/live/plots/metrics",
            },
            outputs={},
            promote=recipe.publishes,
            description=recipe.description,
        )
    return sections


def _reference(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """What stage train is told of `train:`, and the reference it reads where that is not the base."""
    train, other = with_engine(recipe.train, recipe.compute.strategy), reference_recipe(recipe.train)
    if other is None:
        return train_settings(train), {}
    if recipe.base.source == "recipe" and recipe.base.recipe == other:
        return train_settings(train.model_copy(update={"reference": "base"})), {}
    return train_settings(train), {"reference": merged_folder(other)}


def _report_section(project: Project) -> Section:
    names = list(project.recipes)
    files = (
        "gate.json",
        "prepare.json",
        "train.json",
        "merge.json",
        "evaluate.json",
        "evaluate",
        "lengths.csv",
        "live/plots/metrics",
    )
    measured = {name: recipe for name, recipe in project.recipes.items() if recipe.evaluate is not None}
    baselines = {name: f"build/baselines/{_base_id(recipe)}" for name, recipe in measured.items()}
    return _section(
        "report",
        inputs={
            name: [f"build/{name}/{file}" for file in files if name in measured or not file.startswith("evaluate")]
            for name in names
        }
        | {"baselines": sorted(set(baselines.values()))},
        outputs={"report": "build/report"},
        recipes=names,
        methods={name: recipe.train.method for name, recipe in project.recipes.items()},
        baselines=baselines,
    )
