"""A job is one stage made runnable: what a runner is told, and all of it.

What crosses to a runner is an argv, folders, an environment and an exit code; no Python object does.

    PREFBUILD_WORK         the stage's work folder
    PREFBUILD_OUT          where outputs go, by their paths in the project; unset: the project itself
    PREFBUILD_GPUS         GPUs that the worker must see; PREFBUILD_GPU_MEMORY: bytes that each must have
    PREFBUILD_REPORT_TO    trackers of a training, which write to the folder PREFBUILD_TRACKING
    PREFBUILD_IMAGE        ID of the image the worker runs in; unset outside of one
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.artifact import digest_of, input_digest, list_special, read_json
from prefbuild.dvc_state import tell_dvc
from prefbuild.errors import StageError, UsageError
from prefbuild.resolve import STAGE_VERSIONS, Section, resolved_path
from prefbuild.track import TRACKING

NETWORK_STAGES = {"model", "data"}
WORK = "build/.work"
# Of stages that keep results for each other, the folder below WORK.
CACHES = {"evaluate": "evaluations", "baseline": "evaluations", "reference": "references"}
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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a stage may take: sizes in bytes, time in seconds. None: what the machine has."""

    memory: int | None = None
    shm_size: int
    tmp_size: int
    pids: int
    time_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Image:
    """The image a stage runs in. `id` is None when the lock has none of that role."""

    role: str
    id: str | None
    repo_digest: str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, ready to run. Paths are relative to the project's root, but for inputs from elsewhere."""

    stage: str
    name: str
    argv: list[str]  # for the interpreter
    inputs: list[Path]  # read-only
    outputs: list[Path]
    work: Path  # kept until the stage succeeds
    caches: list[Path]  # kept from job to job
    env: dict[str, str]
    network: bool
    gpus: int
    image: Image
    limits: Limits


Runner = Callable[[Job], int]


def read_section(stage: str, name: str) -> Section:
    """A stage's section from its resolved file. UsageError when there is no such stage or recipe."""
    section: Section = _read_resolved(stage, name)[stage]
    return section


def _read_resolved(stage: str, name: str) -> dict[str, Any]:
    if stage not in STAGE_VERSIONS or stage == "promote":
        raise UsageError(f"{stage}: no such stage; one of {', '.join(s for s in STAGE_VERSIONS if s != 'promote')}")
    path = Path(resolved_path(stage, name))
    if not path.exists():
        raise UsageError(f"{path}: is missing, so there is nothing to run; run `prefbuild resolve`")
    sections: dict[str, Any] = read_json(path)
    if "compute" not in sections or not {"image", "gpus"} <= set(sections[stage]):
        raise UsageError(f"{path}: is of an older prefbuild; run `prefbuild resolve`")
    return sections


def make_job(stage: str, name: str) -> Job:
    """The job of a stage. The project's root is the working directory."""
    sections = _read_resolved(stage, name)
    section, compute = sections[stage], sections["compute"]
    inputs = [
        Path(path) for value in section["inputs"].values() for path in (value if isinstance(value, list) else [value])
    ]
    missing = [str(path) for path in inputs if not path.exists()]
    if missing:
        raise StageError(f"{stage} {name}: {', '.join(missing)} missing; `dvc repro` builds what a stage needs")
    # Keyed by what the stage reads, so that a changed recipe never goes on from a checkpoint of the old one.
    fingerprint = digest_of([section, {str(path): _quick_digest(path) for path in inputs}]).removeprefix("sha256:")[:16]
    work = Path(WORK, f"{stage}-{name}", fingerprint)
    env = {**DETERMINISTIC, **QUIET, **({} if stage in NETWORK_STAGES else OFFLINE)}
    env |= {"PREFBUILD_WORK": str(work), "PREFBUILD_GPUS": str(section["gpus"])}
    if section["gpus"] and compute["gpu_memory"]:
        env["PREFBUILD_GPU_MEMORY"] = str(compute["gpu_memory"])
    caches = [Path(WORK, folder)] if (folder := CACHES.get(stage)) else []
    if stage == "train" and (report_to := compute.get("report_to")):
        caches = [Path(TRACKING, name)]
        env |= {"PREFBUILD_REPORT_TO": ",".join(report_to), "PREFBUILD_TRACKING": str(caches[0])}
    if not section["gpus"]:
        env["CUDA_VISIBLE_DEVICES"] = ""  # a recipe for the CPU gives the same bytes on a machine that has a GPU too
    return Job(
        stage=stage,
        name=name,
        argv=["-m", "prefbuild.worker", stage, name],
        inputs=[Path(resolved_path(stage, name)), *inputs],
        outputs=[Path(path) for path in section["outputs"].values()],
        work=work,
        caches=caches,
        env=env,
        network=stage in NETWORK_STAGES,
        gpus=section["gpus"],
        image=Image(role=compute["role"], id=section["image"], repo_digest=compute["repo_digest"]),
        limits=Limits(**{key: compute[key] for key in ("memory", "shm_size", "tmp_size", "pids", "time_limit")}),
    )


def run_job(job: Job, run: Runner) -> int:
    """Run a job alone on its outputs; returns its exit code. Its work folder is kept only when it failed.

    Raises StageError when it left anything but plain files and folders: DVC would follow a link and hang on a FIFO.
    """
    with only_one(job):
        for other in job.work.parent.glob("*"):
            if other != job.work:
                shutil.rmtree(other)
        for folder in (job.work, *job.caches):
            folder.mkdir(parents=True, exist_ok=True)
        code = run(job)
        if code == 0:
            refuse_special(job.outputs)
            tell_dvc(job.outputs, job.work)
            shutil.rmtree(job.work.parent, ignore_errors=True)
    return code


def refuse_special(outputs: list[Path], *, hard_links: bool = False) -> None:
    """StageError naming every link, device, FIFO, socket, setuid or foreign file in the outputs; see list_special."""
    special = [line for path in outputs for line in list_special(path, hard_links=hard_links)]
    if special:
        more = f" and {len(special) - 5} more" if len(special) > 5 else ""
        raise StageError(
            f"the stage left what is no plain file or folder: {'; '.join(special[:5])}{more}. Nothing of it was taken"
        )


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


def _quick_digest(path: Path) -> str:
    # Raw sources may be large, and the stages that read them verify every byte against the lock.
    return input_digest(path) if path.parts[:1] == ("build",) else ""
