"""Start a recipe, and a project around it where there is none."""

import subprocess
import sys
from pathlib import Path

from prefbuild.artifact import write_atomic
from prefbuild.errors import PrefbuildError, UsageError
from prefbuild.recipe import NAME, RESERVED_NAMES, schema_text
from prefbuild.resolve import find_root

TEMPLATE = Path(__file__).parent / "templates" / "recipe.yaml.txt"

PARAMS = """\
# What every recipe inherits unless it says otherwise. A change here re-runs just the stages it touches.
seed: 42
train:
  precision: auto
  deterministic: true
evaluate:
  batch_size: 16
"""

GITIGNORE = """\
# What a build leaves. DVC keeps it; only the resolved recipes are in git. Static on purpose: DVC takes its
# own entries back when a stage fails, and weights would become visible to git.
/build/*
!/build/.resolved/
/registry/
"""

DVCIGNORE = """\
# Checkpoints, locks and caches: not results.
/build/.work
/build/.tracking
/registry
/.venv
__pycache__
"""

# Hard links first: with reflinks first, DVC copies what a stage has just made wherever the file system has none.
DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
    check_update = false
[cache]
    type = "hardlink,reflink,copy"
"""


def new(start: Path, name: str, *, like: str | None = None) -> list[str]:
    """Write recipes/<name>.yaml, from the template or a copy of another recipe; returns the lines to print.

    Where no project is found at `start` or above, one is made at `start`: git, DVC, params.yaml, ignore files.
    Nothing that exists is overwritten. Raises UsageError for a name that can't be used.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"{name}: is no recipe name; use lower-case letters, digits, - and _, such as my-model")
    if name in RESERVED_NAMES:
        raise UsageError(f"{name}: is a name the build uses itself; choose another")
    lines = []
    try:
        root = find_root(start)
    except UsageError:
        if like is not None:
            raise
        root = start
        lines += _make_project(root)
    recipe = root / "recipes" / f"{name}.yaml"
    if recipe.exists():
        raise UsageError(f"recipes/{name}.yaml: is there already; edit it, or choose another name")
    if like is None:
        text = TEMPLATE.read_text(encoding="utf-8").format(name=name)
    else:
        pattern = root / "recipes" / f"{like}.yaml"
        if not NAME.fullmatch(like) or not pattern.is_file():
            there = ", ".join(sorted(path.stem for path in (root / "recipes").glob("*.yaml"))) or "none"
            raise UsageError(f"{like}: no such recipe to copy; there are: {there}")
        text = pattern.read_text(encoding="utf-8")
    write_atomic(recipe, text)
    lines.append(f"wrote recipes/{name}.yaml")
    lines += [
        "next: edit it, then",
        "  prefbuild check",
        f"  prefbuild lock {name}",
        f"  prefbuild preview {name}",
        f"  prefbuild build {name}",
    ]
    return lines


def _make_project(root: Path) -> list[str]:
    if not _inside_git(root):
        _run(root, "git", "init", "--quiet")
    if not (root / ".dvc").is_dir():
        at_top = (root / ".git").exists()
        _run(root, sys.executable, "-m", "dvc", "init", "--quiet", *([] if at_top else ["--subdir"]))
        write_atomic(root / ".dvc" / "config", DVC_CONFIG)
    texts = {
        "params.yaml": PARAMS,
        ".dvcignore": DVCIGNORE,
        "recipes/recipe.schema.json": schema_text(),
    }
    lines = [f"made a project in {root}"]
    for path, text in texts.items():
        if path == ".dvcignore" or not (root / path).exists():  # `dvc init` leaves a .dvcignore of comments
            _append_or_write(root / path, text)
            lines.append(f"wrote {path}")
    _append_or_write(root / ".gitignore", GITIGNORE)
    lines.append("wrote .gitignore")
    return lines


def _append_or_write(path: Path, text: str) -> None:
    """Add the text to what the file holds, once."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if text not in old:
        write_atomic(path, old + ("\n" if old and not old.endswith("\n") else "") + text)


def _inside_git(root: Path) -> bool:
    done = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=root, capture_output=True, check=False)
    return done.returncode == 0


def _run(root: Path, *command: str) -> None:
    try:
        subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise PrefbuildError(f"{command[0]}: is not installed; install it first") from None
    except subprocess.CalledProcessError as error:
        raise PrefbuildError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None
