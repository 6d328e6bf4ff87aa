"""Sync, `dvc repro`, and the verdict."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefbuild.artifact import read_json
from prefbuild.errors import GateFailed, StageError
from prefbuild.gates import verdict_table
from prefbuild.pipeline import nodes, sync
from prefbuild.recipe import known_recipes
from prefbuild.resolve import Resolved, load_project, resolve, resolved_path


def build(root: Path, names: list[str], *, keep_going: bool = False, pull: bool = False, runner: str = "local") -> int:
    """Build the named recipes (default: all, and the report) and print their verdicts.

    Raises StageError when a stage failed, GateFailed when a gate did.
    """
    project = load_project(root)
    names = known_recipes(names, project.recipes)
    resolved = resolve(project)  # before anything runs, say what is not pinned
    if runner == "docker":
        check_images(resolved)
    for path in sync(project):
        print(f"wrote {path}")
    everything = set(names) == set(project.recipes)
    targets = [] if everything else [f"pipelines/{name}/dvc.yaml:gate" for name in names]
    code = repro([*(["--keep-going"] if keep_going else []), *(["--pull"] if pull else []), *targets])
    if code:
        if keep_going:
            print_verdicts([name for name in names if Path(f"build/{name}/gate.json").exists()])
        raise StageError("the build stopped: the failing stage is named above; `prefbuild status` shows what is left")
    failed = print_verdicts(names)
    if everything:
        print("report: build/report/index.html")
    if failed:
        raise GateFailed(f"{', '.join(failed)}: not every gate passed")
    return 0


def check_images(resolved: Resolved) -> None:
    """Before DVC starts: an engine answers and has every pinned image. LockError or StageError otherwise."""
    from prefbuild.engine import connect
    from prefbuild.job import Image
    from prefbuild.runners.docker import pinned_image

    client = connect()
    images = {
        Image(role=node.compute["role"], id=node.section["image"], repo_digest=node.compute["repo_digest"])
        for node in nodes(resolved)
    }
    for image in images:
        pinned_image(client, image)


def gates(root: Path, names: list[str]) -> int:
    """Print the verdicts of builds that are up to date. GateFailed when a gate failed or a verdict is missing or old."""
    from prefbuild.status import status

    names = known_recipes(names, load_project(root).recipes)
    failed = print_verdicts(names)
    old = sorted({change.name for change in status(root, names)} & set(names))
    if old:
        raise GateFailed(
            f"{', '.join(old)}: changed since the verdict; `prefbuild status` says what, `prefbuild build` judges again"
        )
    if failed:
        raise GateFailed(f"{', '.join(failed)}: not every gate passed")
    return 0


def print_verdicts(names: list[str]) -> list[str]:
    """Print each recipe's verdict; returns the names of those that failed."""
    failed = []
    for name in names:
        gate = read_json(Path(f"build/{name}/gate.json"))
        print(metrics_table(name) + "\n")
        print(verdict_table(gate))
        if gate["passed"] is not True:
            failed.append(name)
    return failed


def metrics_table(name: str) -> str:
    """What a recipe's model and its base scored, task by task; of a reward model, how it did on rows and held-out rows."""
    section = read_json(Path(resolved_path("gate", name)))["gate"]
    if "evaluate" not in section["inputs"]:
        return _aligned(_reward_rows(read_json(Path(section["inputs"]["train"]))))
    ours = read_json(Path(section["inputs"]["evaluate"]))
    base = read_json(Path(section["inputs"]["baseline"], "metrics.json"))
    rows: list[tuple[str, ...]] = [("task", "metric", "n", "base", "this model", "difference")]
    for task, metrics in ours.items():
        for metric, value in metrics.items():
            if metric == "n" or "_stderr" in metric:
                continue
            reference = base.get(task, {}).get(metric)
            known = isinstance(reference, int | float)
            rows.append(
                (
                    task,
                    metric,
                    str(metrics["n"]),
                    f"{reference:.4f}" if known else "-",
                    f"{value:.4f}",
                    f"{value - reference:+.4f}" if known else "-",
                )
            )
    return _aligned(rows)


def _reward_rows(train: dict[str, Any]) -> list[tuple[str, ...]]:
    """The numbers of a reward model's train.json that are measured on several rows."""
    rows: list[tuple[str, ...]] = [("metric", "first step", "last step", "held out")]
    for metric in ("loss", "accuracy", "margin"):
        held_out = train["held_out"].get(metric)
        last = "-" if held_out is None else f"{held_out:.4f}"
        rows.append((metric, f"{train['step_0'][metric]:.4f}", f"{train[metric]:.4f}", last))
    return rows


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def inputs_of(root: Path, stage: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's settings and inputs from the recipe as it is now, building what is missing of the inputs."""
    project = load_project(root)
    known_recipes([name], project.recipes)
    resolved = resolve(project)
    section = resolved[resolved_path(stage, name)][stage]
    makers = {path: node for node in nodes(resolved) for path in node.section["outputs"].values()}
    inputs: dict[str, Any] = {}
    missing = []
    for role, value in section["inputs"].items():
        paths = value if isinstance(value, list) else [value]
        missing += [makers[path].address for path in paths if path in makers and not Path(path).exists()]
        inputs[role] = [Path(path) for path in paths] if isinstance(value, list) else Path(value)
    if missing:
        sync(project)
        if repro(missing):
            raise StageError(f"{', '.join(missing)} could not be built")
    return section["settings"], inputs


def repro(arguments: list[str]) -> int:
    """Run `dvc repro`, which ends when this process does; returns its exit code."""
    env = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])}
    env.setdefault("DVC_NO_ANALYTICS", "1")
    child = subprocess.Popen([sys.executable, "-m", "dvc", "repro", *arguments], env=env, preexec_fn=_end_with_parent)
    # Ctrl-C reaches the stage through the terminal; this process waits for DVC to tidy up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
