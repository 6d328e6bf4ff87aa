"""Where a recipe's training is tracked besides DVCLive, and what to do to see it: `prefbuild track NAME`.

Trackers write below build/.tracking/<recipe>/ while a model trains: without a network, outside of DVC's outputs, and never
emptied by a build. Sending to a service is the user's own act, from here, with the user's own login.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from prefbuild.errors import StageError, UsageError

TRACKING = "build/.tracking"
# What is imported of each; the package of that name is prefbuild's extra.
MODULES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
PROJECT = "prefbuild"  # what runs are filed under, where a tracker has projects


def asked_for() -> list[str]:
    """The trackers that the job of this process asks for."""
    return [name for name in os.environ.get("PREFBUILD_REPORT_TO", "").split(",") if name]


def trackio_folder(folder: Path) -> Path:
    """Where trackio's store is, in a recipe's folder of trackers; TRACKIO_DIR says so to trackio."""
    return (folder / "trackio").resolve()


def not_installed(report_to: list[str]) -> list[str]:
    """The trackers that this Python can't import."""
    return [name for name in report_to if not all(map(importlib.util.find_spec, MODULES[name]))]


def how_to_install(names: list[str]) -> str:
    """The command that installs trackers here."""
    return f"{sys.executable} -m pip install 'prefbuild[{','.join(names)}]'"


def check_installed(report_to: list[str]) -> None:
    """StageError naming the trackers that are not installed, and the command that installs them."""
    missing = not_installed(report_to)
    if not missing:
        return
    fix = how_to_install(missing)
    if "PREFBUILD_IMAGE" in os.environ:
        fix = "the image is made without trackers: build it with `prefbuild image build ROLE --tracking`"
    raise StageError(f"train.report_to: {', '.join(missing)} not installed; {fix}, or leave it out of report_to")


def track(name: str) -> str:
    """What each tracker has of a recipe's trainings, and the command or address that shows it.

    The project's root is the working directory. UsageError when nothing was tracked.
    """
    folder = Path(TRACKING, name)
    parts = [show(folder) for show in (_tensorboard, _wandb, _mlflow, _trackio)]
    found = [part for part in parts if part]
    if not found:
        raise UsageError(
            f"{folder}: nothing was tracked; write train: {{report_to: [tensorboard]}} (or wandb, mlflow, trackio) and "
            "build. DVCLive's curves are there always: `dvc plots show`"
        )
    return "\n\n".join(found)


def send(name: str, to: str = "wandb", *, run: Callable[[list[str]], int] = subprocess.call) -> int:
    """Send what was tracked offline to Weights & Biases, with the user's own login; returns the exit code.

    UsageError when there is nothing to send, or wandb is not installed. `run` runs a command.
    """
    runs = _unsent(Path(TRACKING, name))
    if not list(Path(TRACKING, name).glob("wandb/offline-run-*")):
        raise UsageError(f"{TRACKING}/{name}/wandb: nothing to send; train with report_to: [wandb]")
    if not_installed([to]):
        raise UsageError(f"wandb is not installed, and it is what sends; {how_to_install([to])}")
    if not runs:
        print("everything was sent")
        return 0
    return run([sys.executable, "-m", "wandb", "sync", *map(str, runs)])


def _tensorboard(folder: Path) -> str:
    runs = sorted((folder / "tensorboard").glob("*/"))
    command = f"tensorboard --logdir {folder}/tensorboard"
    return _shown("tensorboard", runs, command, "http://localhost:6006") if runs else ""


def _wandb(folder: Path) -> str:
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    if not runs:
        return ""
    unsent = _unsent(folder)
    text = f"wandb: {_count(len(runs))}, {len(unsent) or 'none'} of them not sent"
    if not unsent:
        return text
    login = "with your own login (`wandb login`)"
    return f"{text}\n  prefbuild track {folder.name} --to wandb\nwhich runs, {login}:\n  wandb sync " + " ".join(
        map(str, unsent)
    )


def _mlflow(folder: Path) -> str:
    if not (folder / "mlflow/mlflow.db").exists():
        return ""
    command = f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow/mlflow.db"
    page = "" if importlib.util.find_spec("flask") else "; the page is in the whole package: pip install mlflow"
    return f"mlflow: {folder}/mlflow/mlflow.db\n  {command}\nthen http://localhost:5000{page}"


def _trackio(folder: Path) -> str:
    if not list((folder / "trackio").glob("*.db")):
        return ""
    command = f"TRACKIO_DIR={folder}/trackio trackio show --project {PROJECT}"
    return f"trackio: {folder}/trackio\n  {command}\nwhich opens the page"


def _shown(what: str, runs: list[Path], command: str, address: str) -> str:
    lacks = "" if not not_installed([what]) else f"; not installed here: {how_to_install([what])}"
    return f"{what}: {_count(len(runs))}\n  {command}\nthen {address}{lacks}"


def _unsent(folder: Path) -> list[Path]:
    """Offline runs that `wandb sync` has not marked as sent."""
    return [run for run in sorted((folder / "wandb").glob("offline-run-*")) if not list(run.glob("*.synced"))]


def _count(runs: int) -> str:
    return f"{runs} run{'s' * (runs > 1)}"
