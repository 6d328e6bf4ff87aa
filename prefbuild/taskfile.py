"""Which files an lm-evaluation-harness task YAML reads, found without running any of it.

Covered: the YAML, what it includes, its data files, and the Python file of every `!function`. A task that reads
anything that can't be pinned (the Hub, a URL, a pattern, a module that is not in the project) is refused.
Not covered: files that its Python code opens or imports by itself.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefbuild.errors import RecipeError

FORMATS = ("json", "csv", "parquet", "text")


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A task of the project: its own name and the files it reads, relative to the project, the YAML first."""

    name: str
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class _Function:
    """`!function module.name`, not resolved."""

    spec: str
    line: int


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps `!function` as text."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> _Function:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "!function takes module.name", node.start_mark)
    return _Function(spec=str(loader.construct_scalar(node)), line=node.start_mark.line + 1)


_Loader.add_constructor("!function", _function)


def is_task_file(task: str) -> bool:
    """Whether a recipe's `task` is a YAML of the project; else it is a stock task's name."""
    return task.endswith((".yaml", ".yml"))


def read_task(root: Path, path: str, named_by: str) -> TaskFile:
    """The task's name and files. RecipeError (file:line: key: ...) when it reads what can't be pinned.

    `named_by` is the place to blame for a path that is not there.
    """
    root = root.resolve()
    read: dict[str, dict[str, Any]] = {}
    config = _merged(root, _in_project(root, root, path, named_by), read)
    (top, *_) = read
    where = _Where(root, read)
    name = config.get("task")
    if not isinstance(name, str) or "group" in config:
        raise where.error("task", "names no single task; give one task a file, and list each in the recipe")
    for key in ("custom_dataset", "use_prompt"):
        if config.get(key) is not None:
            raise where.error(
                key, f"reads what can't be pinned; use dataset_path: {FORMATS[0]} with dataset_kwargs.data_files"
            )
    if config.get("dataset_path") not in FORMATS:
        raise where.error(
            "dataset_path",
            f"{config.get('dataset_path')} comes from the Hub, which this version does not pin; "
            f"use one of {', '.join(FORMATS)} and name the files in dataset_kwargs.data_files",
        )
    files = {**dict.fromkeys(read), **dict.fromkeys(_data_files(root, config, where, top))}
    for included, part in read.items():
        for function in _functions(part):
            files.setdefault(_module(root, included, function))
    return TaskFile(name=name, files=list(files))


class _Where:
    """Finds the line of a key in the YAMLs that were read; a later include loses to what includes it."""

    def __init__(self, root: Path, read: dict[str, dict[str, Any]]):
        self.root = root
        self.read = read

    def origin(self, key: str) -> str:
        """The YAML that a top-level key comes from; the task's own when none has it."""
        holders = [path for path, part in self.read.items() if key in part]
        return holders[0] if holders else next(iter(self.read))

    def error(self, keys: str, what: str) -> RecipeError:
        """`file:line: key: what` for a dotted key."""
        path = self.origin(keys.split(".")[0])
        return RecipeError([f"{path}:{_line(self.root / path, keys.split('.'))}: {keys}: {what}"])


def _line(path: Path, keys: list[str]) -> int:
    """Line of a key, or of the nearest one above it that is there."""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader), 1
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key_node, value_node in pairs:
            if key_node.value == key:
                node, line = value_node, key_node.start_mark.line + 1
                break
        else:
            break
    return line


def _merged(root: Path, path: str, read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A YAML on top of what it includes, as lm-evaluation-harness merges them; fills `read` by path."""
    if path in read:
        raise RecipeError([f"{path}:1: include: is included twice; include it once"])
    try:
        config = yaml.load((root / path).read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise RecipeError([f"{path}:{mark.line + 1 if mark else 1}: is not a task YAML: {error}"]) from None
    if not isinstance(config, dict):
        raise RecipeError([f"{path}:1: is not a task YAML: it holds no keys"])
    read[path] = config
    merged: dict[str, Any] = {}
    includes = config.get("include") or []
    for included in includes if isinstance(includes, list) else [includes]:
        where = f"{path}:{_line(root / path, ['include'])}: include"
        part = _merged(root, _in_project(root, (root / path).parent, str(included), where), read)
        merged.update({key: value for key, value in part.items() if key != "task_list"})
    merged.update({key: value for key, value in config.items() if key != "include"})
    return merged


def _data_files(root: Path, config: dict[str, Any], where: _Where, top: str) -> Iterator[str]:
    """The data files, relative to the folder of the task's YAML."""
    options = config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    given = options.get("data_files")
    if not given or options.get("data_dir") is not None:
        raise where.error(
            "dataset_kwargs", "names no data; list each file in data_files, by split, and give no data_dir"
        )
    origin = where.origin("dataset_kwargs")
    if Path(origin).parent != Path(top).parent:
        raise where.error(
            "dataset_kwargs", f"is in another folder than {top}, so its paths could mean either; move it to {top}"
        )
    for split, value in given.items() if isinstance(given, dict) else [("", given)]:
        key = f"dataset_kwargs.data_files{'.' if split else ''}{split}"
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or "://" in name or any(sign in name for sign in "*?["):
                raise where.error(key, f"{name} is no plain path; name each file")
            try:
                yield _in_project(root, (root / top).parent, name, "")
            except RecipeError as error:
                raise where.error(key, error.problems[0].removeprefix(": ")) from None


def _functions(value: Any) -> Iterator[_Function]:
    """Every `!function` in a value, at any depth."""
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _functions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _functions(item)


def _module(root: Path, path: str, function: _Function) -> str:
    """The Python file of a `!function`, which lm-evaluation-harness takes from beside the YAML before any package."""
    module, _, name = function.spec.rpartition(".")
    where = f"{path}:{function.line}: !function {function.spec}"
    candidate = (root / path).parent / f"{module.replace('.', '/')}.py"
    if not module or not name or not candidate.is_file():
        raise RecipeError([
            f"{where}: no {module or function.spec}.py is beside the YAML, and code from elsewhere is not pinned; "
            f"put the function in a .py file in {Path(path).parent}"
        ])  # fmt: skip
    return _in_project(root, candidate.parent, candidate.name, where)


def _in_project(root: Path, folder: Path, given: str, where: str) -> str:
    """A path relative to the project. RecipeError when it is outside it, behind a link, or no file."""
    path = Path(os.path.normpath(folder / given))
    if not path.is_relative_to(root):
        raise RecipeError([f"{where}: {given} is outside the project; copy it into the project"])
    if not path.is_file():
        raise RecipeError([f"{where}: {given}: no such file"])
    if path.resolve() != path:
        raise RecipeError(
            [f"{where}: {given} is a link, and what it points to can change unseen; copy the file instead"]
        )
    return path.relative_to(root).as_posix()
