"""A user's own reward: a function in a Python file of the project, whose digest is pinned.

Covered: the file's own bytes. Not covered: what its code opens or imports by itself. It runs with the rights of the
stage, so only in the train stage (a container's, under the Docker runner) and where `prefbuild reward` is called.
"""

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from prefbuild.errors import StageError

Function = Callable[..., Any]


def verify(pins: list[dict[str, Any]]) -> None:
    """StageError when a file of rewards is not what was locked."""
    for pin in pins:
        path = Path(pin["path"])
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        if found != pin["sha256"]:
            what = "is gone" if found is None else "changed"
            raise StageError(f"{path}: {what} since it was locked; run `prefbuild lock`, or put the old file back")


def load(path: str, function: str) -> Function:
    """The function. StageError when the file fails, or has none of that name that takes prompts and completions."""
    module = ModuleType(Path(path).stem)
    module.__file__ = path
    try:
        # Read and run here: an import would leave __pycache__ beside the recipes.
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; correct the path in the recipe") from None
    except Exception as error:
        raise StageError(f"{_line(path, error)}: {_said(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise StageError(f"{path}: has no function {function}; there are {', '.join(names) or 'none'}")
    loaded: Function = found
    return loaded


def call(
    path: str, function: str, loaded: Function, prompts: list[Any], completions: list[str], columns: dict[str, Any]
) -> list[float]:
    """Its numbers, one a completion. StageError: it raised, or returned another number of values, or no numbers."""
    where = f"{path}: {function}"
    try:
        values = loaded(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise StageError(f"{_line(path, error)}: {function}: {_said(error)}") from error
    if not isinstance(values, list | tuple):
        raise StageError(f"{where}: returned {type(values).__name__}; return a list of numbers, one a completion")
    if len(values) != len(completions):
        raise StageError(f"{where}: returned {len(values)} values for {len(completions)} completions; return one each")
    for row, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StageError(
                f"{where}: row {row}: returned {value!r} for the completion {completions[row - 1][:60]!r}; "
                "a finite number is wanted"
            )
    return [float(value) for value in values]


def _line(path: str, error: Exception) -> str:
    """`file:line` of the last line of the file that was at work."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
