"""A job is one stage made runnable: what a runner is told, and all of it.

What crosses to a runner is an argv, folders, an environment and an exit code; no Python object does.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefbuild.artifact import digest_of, input_digest, read_json
from prefbuild.errors import StageError, UsageError
from prefbuild.resolve import STAGE_VERSIONS, Section, resolved_path

NETWORK_STAGES = {"model", "data"}
WORK = "build/.work"
# Every library a stage loads is told that there is no hub, and nothing it counts may leave the machine.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
}
# Same bytes from the same machine: sets are ordered alike, and cuBLAS has one workspace.
DETERMINISTIC = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
# The libraries are pinned, so what they will rename some day is no news to the person who watches a build.
QUIET = {"PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning"}
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, ready to run."""

    stage: str
    name: str
    argv: list[str]
    inputs: list[Path]  # read-only
    outputs: list[Path]
    work: Path  # kept until the stage succeeds
    env: dict[str, str]
    network: bool


Runner = Callable[[Job], int]


def read_section(stage: str, name: str) -> Section:
    """A stage's section from its resolved file. UsageError when there is no such stage or recipe."""
    if stage not in STAGE_VERSIONS or stage == "promote":
        raise UsageError(f"{stage}: no such stage; one of {', '.join(s for s in STAGE_VERSIONS if s != 'promote')}")
    path = Path(resolved_path(stage, name))
    if not path.exists():
        raise UsageError(f"{path}: is missing, so there is nothing to run; run `prefbuild resolve`")
    section: Section = read_json(path)[stage]
    return section


def make_job(stage: str, name: str) -> Job:
    """The job of a stage. The project's root is the working directory."""
    section = read_section(stage, name)
    inputs = [
        Path(path) for value in section["inputs"].values() for path in (value if isinstance(value, list) else [value])
    ]
    missing = [str(path) for path in inputs if not path.exists()]
    if missing:
        raise StageError(f"{stage} {name}: {', '.join(missing)} missing; `dvc repro` builds what a stage needs")
    # Keyed by what the stage reads, so that a changed recipe never goes on from a checkpoint of the old one.
    fingerprint = digest_of([section, {str(path): _quick_digest(path) for path in inputs}]).removeprefix("sha256:")[:16]
    return Job(
        stage=stage,
        name=name,
        argv=["-m", "prefbuild.worker", stage, name],
        inputs=inputs,
        outputs=[Path(path) for path in section["outputs"].values()],
        work=Path(WORK, f"{stage}-{name}", fingerprint),
        env={**DETERMINISTIC, **QUIET, **({} if stage in NETWORK_STAGES else OFFLINE)},
        network=stage in NETWORK_STAGES,
    )


def run_job(job: Job, run: Runner) -> int:
    """Run a job alone on its outputs; returns its exit code. Its work folder is kept only when it failed."""
    with only_one(job):
        for other in job.work.parent.glob("*"):
            if other != job.work:
                shutil.rmtree(other)
        job.work.mkdir(parents=True, exist_ok=True)
        code = run(job)
        if code == 0:
            shutil.rmtree(job.work.parent, ignore_errors=True)
    return code


@contextmanager
def only_one(job: Job) -> Iterator[None]:
    """Hold the stage's lock, so that two builds never write the same outputs. StageError when it is taken."""
    path = Path(WORK, "locks", f"{job.stage}-{job.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        # The worker inherits the descriptor: the lock lives as long as anything that writes the outputs.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StageError(
                f"{job.stage} {job.name}: is already running ({file.read().strip() or 'by another build'}); wait for it or stop it"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def worker_environment(job: Job) -> dict[str, str]:
    """The caller's environment with the job's on top and, where there is no network, without hub tokens."""
    env = {**os.environ, **job.env}
    if not job.network:
        for key in SECRETS:
            env.pop(key, None)
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    return env


def _quick_digest(path: Path) -> str:
    # Raw sources may be large, and the stages that read them verify every byte against the lock.
    return input_digest(path) if path.parts[:1] == ("build",) else ""
