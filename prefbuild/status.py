"""What `dvc repro` would run, down to the value that changed, without running anything.

DVC's own status compares a stage with the resolved file of the last build. Here recipes, params.yaml and the lock are
resolved in memory first, and each section is compared with the one in dvc.lock.

Covered: settings, stage versions, commands, inputs and outputs on disk, pins, DVC files that are out of date.
Not covered: DVC's run cache: a stage that `runs` is restored instead when the same settings were built before.
"""

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from prefbuild.errors import GraphError, LockError, UsageError
from prefbuild.lock import check_local
from prefbuild.pipeline import RECIPE_STAGES, Node, nodes, sync
from prefbuild.recipe import known_recipes
from prefbuild.resolve import Project, Section, load_project, resolve
from prefbuild.yamlfile import show

# Of settings that a recipe writes elsewhere, or under another name.
WRITTEN_AS = {"measurements": "evaluate.tasks", "batch_size": "evaluate.batch_size", "strategy": "compute.strategy"}
COLORS = {"stops": "31", "runs": "33", "restores": "36", "may run": "2"}
MOST_REASONS = 8  # lines a stage in the text; the JSON has all


@dataclass(frozen=True, kw_only=True)
class Change:
    """A stage that is not up to date, and why.

    `state`: `stops` (nothing good comes of building until this is put right), `runs`, `restores` (its outputs are put back from
    DVC's cache, nothing runs), or `may run` (only if what it reads comes out different). `name` is the recipe, the
    shared model, data or baseline, or empty for what concerns the project.
    """

    stage: str
    name: str
    state: str
    reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What DVC knows of a stage: its own objects, and the section the stage was last built from."""

    section: Section | None
    recorded: bool
    command_changed: bool
    outs: dict[str, Any]
    deps: dict[str, Any]


def status(root: Path, names: list[str] | None = None) -> list[Change]:
    """What building the named recipes (all, and the report, when None) would do. Nothing is written or run.

    Raises RecipeError for broken files, UsageError for an unknown recipe or where there is no DVC repository,
    GraphError when DVC cannot read its own files.
    """
    root = root.resolve()
    project = load_project(root)
    chosen = known_recipes(names or [], project.recipes)
    changes = []
    stale = sync(project, check=True)
    if stale:
        says = f"the DVC files are out of date: run `prefbuild sync` ({_some(stale)})"
        changes.append(Change(stage="sync", name="", state="stops", reasons=[says]))
    for name in chosen:
        problems = lock_problems(project, name)
        if problems:
            changes.append(Change(stage="lock", name=name, state="stops", reasons=problems))

    graph = {node.address: node for node in nodes(resolve(project, pinned=False))}
    makers = {path: node.address for node in graph.values() for path in node.section["outputs"].values()}
    above = {address: {makers[path] for path in node.deps if path in makers} for address, node in graph.items()}
    wanted = set(graph) if not names else _with_ancestors({a for a, n in graph.items() if _recipe(n) in chosen}, above)
    with _open_repo(root) as repo:
        kept = _kept(repo, root)
        changes += _resolve_changes(kept.get("resolve"), root)
        found = _stage_changes({address: graph[address] for address in graph if address in wanted}, above, makers, kept)
    return changes + found


def status_json(changes: list[Change]) -> str:
    """A JSON list of {stage, name, state, reasons}."""
    return json.dumps([dataclasses.asdict(change) for change in changes], indent=2, ensure_ascii=False)


def status_text(changes: list[Change], *, color: bool | None = None) -> str:
    """Aligned lines by recipe. `color`: None takes the terminal's word for it."""
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not changes:
        return "up to date: a build would run nothing"
    if [change.stage for change in changes] == ["resolve"]:
        return f"up to date: only resolve would run ({'; '.join(changes[0].reasons)}), and no stage sees a difference"
    lines: list[str] = []
    names = [change.name for change in changes if change.stage in RECIPE_STAGES or change.stage == "lock"]
    groups: dict[str, list[Change]] = {"": [], **{name: [] for name in sorted(names)}}
    for change in changes:
        groups[change.name if change.name in names else ""].append(change)
    width = max((len(_label(change)) for change in changes if change.stage != "sync"), default=0)
    for title, group in groups.items():
        rows = [change for change in group if change.stage != "sync"]
        lines += [
            _painted(reason, "31", color) for change in group if change.stage == "sync" for reason in change.reasons
        ]
        if rows:
            lines += ["", title or "shared"] if lines else [title or "shared"]
        for change in rows:
            reasons = change.reasons[:MOST_REASONS]
            if len(change.reasons) > MOST_REASONS:
                reasons.append(f"and {len(change.reasons) - MOST_REASONS} more")
            state = _painted(f"{change.state:8}", COLORS[change.state], color)
            lines += [f"  {_label(change):{width}}  {state}  {reasons[0]}"]
            lines += [f"  {'':{width}}  {'':8}  {reason}" for reason in reasons[1:]]
    return "\n".join([*lines, "", _summary(changes)])


# ---- what DVC knows


def _open_repo(root: Path) -> Any:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        return Repo(str(root))
    except NotDvcRepoError:
        raise UsageError(f"{root}: is no DVC repository; run `git init` and `dvc init` there") from None


def _kept(repo: Any, root: Path) -> dict[str, _Kept]:
    """Every stage of the DVC files, by address."""
    from dvc.dependency.param import ParamsDependency
    from dvc.exceptions import DvcException

    try:
        stages = repo.index.stages
    except DvcException as error:
        raise GraphError(f"DVC cannot read the graph: {error}; `prefbuild sync` writes dvc.yaml anew") from None
    kept = {}
    for stage in stages:
        if not Path(stage.path).is_relative_to(root):
            continue
        file = Path(stage.path).relative_to(root).as_posix()
        params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
        sections = {key: value for dep in params for key, value in (dep.hash_info.value or {}).items()}
        kept[stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"] = _Kept(
            section=next(iter(sections.values()), None),
            recorded=any(out.hash_info for out in stage.outs),
            command_changed=stage.cmd_changed,
            outs={_shown(out.fs_path, root): out for out in stage.outs},
            deps={_shown(dep.fs_path, root): dep for dep in stage.deps if dep not in params},
        )
    return kept


def _shown(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _on_disk(entry: Any) -> str | None:
    """DVC's word for how a dep or out differs from its record: deleted, modified, new, `not in cache`, or None."""
    return next((str(value) for value in entry.status().values()), None)


# ---- changes


def _resolve_changes(kept: _Kept | None, root: Path) -> list[Change]:
    if kept is None or not kept.recorded:
        return [Change(stage="resolve", name="", state="runs", reasons=["never run"])]
    reasons = [f"{path} {_HAPPENED[state]}" for path, dep in kept.deps.items() if (state := _on_disk(dep))]
    reasons += [f"{path} {_HAPPENED[state]}" for path, out in kept.outs.items() if (state := _on_disk(out))]
    return [Change(stage="resolve", name="", state="runs", reasons=reasons)] if reasons else []


def _stage_changes(
    graph: dict[str, Node], above: dict[str, set[str]], makers: dict[str, str], kept: dict[str, _Kept]
) -> list[Change]:
    changes: dict[str, Change] = {}
    causes: dict[str, set[str]] = {}  # of every stage that runs or may run: the stages that run and lead to it
    for address in TopologicalSorter({a: sorted(above[a] & set(graph)) for a in graph}).static_order():
        node = graph[address]
        reasons = _reasons(node, kept.get(address), makers, kept)
        inherited = set().union(*(causes.get(parent, set()) for parent in above[address]))
        lost, spoiled = ([], []) if reasons else _lost_outputs(kept[address])
        if spoiled:
            causes[address] = {address}
            changes[address] = Change(stage=node.stage, name=node.name, state="stops", reasons=spoiled)
        elif reasons or any("DVC's cache lacks it" in text for text in lost):
            causes[address] = {address}
            changes[address] = Change(stage=node.stage, name=node.name, state="runs", reasons=reasons or lost)
        elif inherited:
            causes[address] = inherited
            because = [f"because {_because(node, [graph[a] for a in sorted(inherited)])}", *lost]
            changes[address] = Change(stage=node.stage, name=node.name, state="may run", reasons=because)
        elif lost:
            changes[address] = Change(stage=node.stage, name=node.name, state="restores", reasons=lost)
    return [changes[address] for address in graph if address in changes]


_HAPPENED = {"deleted": "is gone", "modified": "changed on disk", "new": "is new", "not in cache": "changed on disk"}


def _reasons(node: Node, kept: _Kept | None, makers: dict[str, str], all_kept: dict[str, _Kept]) -> list[str]:
    """Why DVC would run a stage, its lost outputs and what runs above it left out."""
    if kept is None or not kept.recorded:
        return ["never built"]
    if kept.section is None:
        return ["what it was built from is not in dvc.lock"]
    reasons = differences(node.stage, kept.section, node.section)
    if kept.command_changed:
        reasons.append("its command changed")
    for path, dep in kept.deps.items():
        maker = all_kept.get(makers.get(path, ""))
        if maker is None:  # a file of the project
            state = _on_disk(dep)
            if state:
                reasons.append(f"{path} {_HAPPENED[state]}")
        elif path in maker.outs and maker.recorded and dep.hash_info != maker.outs[path].hash_info:
            reasons.append(f"{path} was made anew since")
    return reasons


def _lost_outputs(kept: _Kept) -> tuple[list[str], list[str]]:
    """Outputs that are not as they were recorded, and those of them that DVC would put back wrong."""
    lost, spoiled = [], []
    for path, out in kept.outs.items():
        state = _on_disk(out)
        if state == "not in cache":
            lost.append(f"{path} {'is there' if out.exists else 'is gone'}, but DVC's cache lacks it")
        elif state:
            lost.append(f"{path} {_HAPPENED[state]}; DVC puts its own copy back")
        if state == "modified":
            spoiled += [
                f"{path} changed on disk, and through a hard link in DVC's cache; remove {file} and build again"
                for file in _spoiled_objects(out)
            ]
    return lost, spoiled


def _spoiled_objects(out: Any) -> list[str]:
    """Files of DVC's cache behind an output that are not what their name says, which DVC takes on trust."""
    hashes = [item for _, _, item in out.get_obj()] if out.hash_info.isdir else [out.hash_info]
    spoiled = []
    for item in hashes:
        file = Path(out.cache.oid_to_path(item.value))
        with open(file, "rb") as stream:
            if item.name == "md5" and hashlib.file_digest(stream, "md5").hexdigest() != item.value:
                spoiled.append(str(file))
    return spoiled


def lock_problems(project: Project, name: str) -> list[str]:
    """What is not pinned, or not what was pinned."""
    recipe = project.recipes[name]
    try:
        resolve(dataclasses.replace(project, recipes={name: recipe}))
    except LockError as error:
        return str(error).splitlines()
    return check_local(project.root, project.lock, recipe, name=name)


def _recipe(node: Node) -> str | None:
    return node.name if node.stage in RECIPE_STAGES else None


def _with_ancestors(addresses: set[str], above: dict[str, set[str]]) -> set[str]:
    found, rest = set(addresses), list(addresses)
    while rest:
        new = above[rest.pop()] - found
        found |= new
        rest += new
    return found


# ---- two sections compared


def differences(stage: str, old: Section, new: Section) -> list[str]:
    """What differs between two sections of a stage, a line a value, called as in a recipe."""
    lines = []
    if old.get("version") != new["version"]:
        lines.append(f"prefbuild's own {stage} changed (version {show(old.get('version'))} -> {show(new['version'])})")
    before, after = old.get("gpus", 0), new.get("gpus", 0)
    if before != after:
        lines.append(f"compute.gpus {before} -> {after}")
    if old.get("image") != new.get("image"):
        lines.append(f"the image it runs in {_short(old.get('image'))} -> {_short(new.get('image'))}")
    lines += _differ("", old.get("settings"), new["settings"])
    for key, word in (("inputs", "reads"), ("outputs", "writes")):
        before, after = _paths(old.get(key) or {}), _paths(new[key])
        lines += [f"{word} {path}" for path in after if path not in before]
        lines += [f"{word} {path} no more" for path in before if path not in after]
    if not lines and old != new:
        lines.append("the order of its inputs changed")
    return lines


def _short(image: str | None) -> str:
    return image[:19] if image else "none"


def _differ(path: str, old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*new, *(key for key in old if key not in new)]:
            inner = WRITTEN_AS.get(key, key) if not path else f"{path}.{key}"
            if key == "key" and path.startswith("evaluate.tasks["):
                continue  # a digest of what is told anyway
            if key not in old:
                lines.append(f"{inner} {show(new[key])} (new)")
            elif key not in new:
                lines.append(f"{inner} {show(old[key])} (gone)")
            else:
                lines += _differ(inner, old[key], new[key])
        return lines
    if isinstance(old, list) and isinstance(new, list):
        return _lists_differ(path, old, new)
    if path == "commit":  # of a repository on the Hub: all 40 digits would be hidden as a token
        return [f"commit {str(old)[:8]} -> {str(new)[:8]}"]
    return [f"{path} {show(old)} -> {show(new)}"]


def _lists_differ(path: str, old: list[Any], new: list[Any]) -> list[str]:
    # What is in both is left out first, so that equal names (a task measured twice) are not paired wrongly.
    before, after = _labelled(_without(old, new)), _labelled(_without(new, old))
    lines = []
    for key, item in after.items():
        if key not in before:
            lines.append(f"{path} + {key}")
        elif path.rpartition(".")[2] == "files":
            sizes = f"{before[key]['size']} -> {item['size']} bytes"
            lines.append(f"{path}: {key} is another ({sizes if before[key]['size'] != item['size'] else 'same size'})")
        else:
            lines += _differ(f"{path}[{key}]", before[key], item)
    lines += [f"{path} - {key}" for key in before if key not in after]
    return lines or [f"{path}: another order"]


def _without(items: list[Any], others: list[Any]) -> list[Any]:
    rest, others = [], list(others)
    for item in items:
        if item in others:
            others.remove(item)
        else:
            rest.append(item)
    return rest


def _labelled(items: list[Any]) -> dict[str, Any]:
    """List items by what people call them, numbered where two are called the same."""
    labelled: dict[str, Any] = {}
    for item in items:
        label = show(item)
        if isinstance(item, dict):
            label = next((str(item[key]) for key in ("name", "metric", "path", "column") if item.get(key)), label)
            if item.get("against", "base") != "base":
                label += f" against {item['against']}"
        unique, count = label, 2
        while unique in labelled:
            unique, count = f"{label} #{count}", count + 1
        labelled[unique] = item
    return labelled


def _paths(roles: dict[str, Any]) -> list[str]:
    paths = [path for value in roles.values() for path in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(paths))


# ---- text


def _because(node: Node, causes: list[Node]) -> str:
    words = []
    for cause in causes:
        if cause.stage not in RECIPE_STAGES:
            words.append(f"{cause.stage} {cause.name}")
        else:
            words.append(cause.stage if cause.name == node.name else f"{cause.stage} of {cause.name}")
    return f"{_some(words)} {'runs' if len(words) == 1 else 'run'}"


def _some(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _label(change: Change) -> str:
    shared = change.name and change.stage not in (*RECIPE_STAGES, "lock", "report")
    return f"{change.stage} {change.name}" if shared else change.stage


def _summary(changes: list[Change]) -> str:
    counts = {state: sum(change.state == state for change in changes) for state in COLORS}
    runs = counts["runs"]
    words = [f"{runs} stage{'' if runs == 1 else 's'} would run"]
    if counts["may run"]:
        words.append(f"{counts['may run']} more if what they read comes out different")
    if counts["restores"]:
        words.append(f"{counts['restores']} would be restored from DVC's cache")
    if counts["stops"]:
        words.append("first put right what stops the build")
    return "; ".join(words)


def _painted(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
