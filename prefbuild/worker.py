"""Run ONE stage in whatever environment it finds itself in: `python -m prefbuild.worker <stage> <name>`.

Covered: no network but for the stages that fetch (Python's own sockets are refused), the GPUs that were promised, memory
and disk that ran out told apart, manifests written last, errors as one line and an exit code. Not covered: a sandbox;
native code can still open sockets. Containers do that.
"""

import ctypes
import errno
import importlib
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from prefbuild.artifact import input_digest, write_manifest
from prefbuild.digests import Digests
from prefbuild.errors import PrefbuildError, StageError, UsageError
from prefbuild.job import NETWORK_STAGES, make_job, read_section
from prefbuild.launch import is_rank, launch, record_failure
from prefbuild.machine import leave_out
from prefbuild.methods import needs_bitsandbytes
from prefbuild.resolve import STAGE_VERSIONS
from prefbuild.stages import STAGES
from prefbuild.track import asked_for, trackio_folder

LOOPBACK = ("127.", "::1", "localhost")
GIB = 2**30
# What libraries import wherever it is installed, for parts of them that the stage never asks for: transformers has torch
# for models, of which stage prepare loads none, and DVCLive pandas for tables. Methods of TRL need what it imports.
UNUSED = {
    "prepare": ("torch",),
    "reference": ("datasets", "pandas", "scipy"),
    "train": ("datasets", "pandas", "scipy"),  # by the packed engine
    "merge": ("datasets", "pandas", "scipy"),
}
# What safetensors' Rust and torch's zip writer say when the disk is full; Python itself says ENOSPC.
DISK_FULL = re.compile(r"No space left on device|os error 28|PytorchStreamWriter failed writing|unexpected pos \d+")
# Containers count kills for memory here (cgroup 2, cgroup 1).
OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def main(argv: list[str]) -> int:
    """Run the stage named in argv; returns the exit code."""
    stage, name = argv
    die_with_parent()
    try:
        run_stage(stage, name)
    except PrefbuildError as error:
        if is_rank():
            record_failure(error, str(error), error.exit_code)
        print(f"prefbuild: {stage} {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        explained = explain(error)
        if is_rank():
            record_failure(error, explained, StageError.exit_code if explained else 1)
        if explained is None:
            raise
        traceback.print_exc()
        print(f"prefbuild: {stage} {name}: {explained}", file=sys.stderr)
        return StageError.exit_code
    return 0


def run_stage(stage: str, name: str) -> None:
    """Run a stage's function, then write the manifest of every folder it left."""
    section = read_section(stage, name)
    if section["version"] != STAGE_VERSIONS[stage]:
        raise StageError(
            f"this is version {STAGE_VERSIONS[stage]} of the stage and version {section['version']} is asked for: "
            "the image holds another prefbuild; build it anew with `prefbuild image build ROLE`"
        )
    if stage not in NETWORK_STAGES:
        refuse_network(stage)
    work = Path(os.environ.get("PREFBUILD_WORK") or make_job(stage, name).work)
    num_ranks = count_ranks(stage, section["gpus"])
    if num_ranks == 1 or is_rank():
        check_gpus()
    inputs: dict[str, Any] = {
        role: [Path(path) for path in value] if isinstance(value, list) else Path(value)
        for role, value in section["inputs"].items()
    }
    out = Path(os.environ.get("PREFBUILD_OUT", ""))
    outputs = {role: out / path for role, path in section["outputs"].items()}
    started = time.monotonic()
    if num_ranks == 1 or is_rank():
        before_imports(stage, section["settings"].get("train"))
        run = importlib.import_module(STAGES[stage]).run
        run(section["settings"], inputs, outputs, work, name)
    else:
        strategy = section["settings"].get("strategy", "ddp")
        launch(["-m", "prefbuild.worker", stage, name], num_ranks, work, strategy=strategy)
    if is_rank():
        return  # the process that launched this one does the rest
    missing = [section["outputs"][role] for role, path in outputs.items() if not path.exists()]
    if missing:
        raise StageError(f"the stage left no {', '.join(missing)}")
    killed = killed_for_memory()
    if killed:
        raise StageError(
            f"{killed} of its processes were killed for memory, so its result can't be trusted; "
            "raise compute.memory, or lower the batch size"
        )
    digests = {} if stage in NETWORK_STAGES else {role: _digest(value) for role, value in inputs.items()}
    hashed = Digests(work)  # the stage may have hashed files while it wrote them
    for role, path in outputs.items():
        if path.is_dir() and role not in ("plots", "report"):
            write_manifest(path, stage=stage, name=name, inputs=digests, sha256=hashed.sha256)
    hashed.save()
    print(f"prefbuild: {stage} {name}: done in {time.monotonic() - started:.0f} s", file=sys.stderr)


def before_imports(stage: str, train: dict[str, Any] | None) -> None:
    """What must be said before libraries are imported: which others they shall not import, and where trackio writes."""
    report_to = asked_for()
    if stage != "train" or (train is not None and train.get("engine") == "packed" and not report_to):
        leave_out(*UNUSED.get(stage, ()))
        if "torch" in UNUSED.get(stage, ()):
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that there is none
    if stage in UNUSED:
        leave_out("chardet")  # requests would take its tables, of a second, for what charset_normalizer does as well
    leave_out(*{"wandb", "mlflow", "trackio"}.difference(report_to))
    if not needs_bitsandbytes(train):
        leave_out("bitsandbytes")
    if "trackio" in report_to:  # read when it is imported, by TRL even
        os.environ["TRACKIO_DIR"] = str(trackio_folder(Path(os.environ["PREFBUILD_TRACKING"])))


def count_ranks(stage: str, gpus: int) -> int:
    """How many processes a stage runs in: training in one a GPU. Others run in one, on one GPU.

    PREFBUILD_PROCESSES tries the same on a CPU, where it gains nothing: it is part of no section. UsageError when it is
    no number.
    """
    tried = os.environ.get("PREFBUILD_PROCESSES") or "1"
    if not tried.isdigit() or int(tried) < 1:
        raise UsageError(
            f"PREFBUILD_PROCESSES is {tried!r}; give how many processes train together on the CPU, as in 2"
        )
    if stage != "train":
        return 1
    return max(1, gpus or int(tried))


def die_with_parent() -> None:
    """Be killed when the process that started this one ends. Linux only; elsewhere the runner's own watch must do."""
    parent = os.environ.get("PREFBUILD_PARENT")
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(137)


# ---- what the machine gives


def check_gpus() -> None:
    """StageError unless this process sees and can use the GPUs it was promised: some engines ignore the request."""
    wanted = int(os.environ.get("PREFBUILD_GPUS") or 0)
    if not wanted:
        return
    import torch

    here = "the container" if "PREFBUILD_IMAGE" in os.environ else "this machine"
    remedy = (
        "install the NVIDIA Container Toolkit on the engine's machine and restart the engine (podman ignores the request "
        "for GPUs without its CDI files), or set compute.gpus: 0"
        if "PREFBUILD_IMAGE" in os.environ
        else "run it on a machine with a GPU and its driver, or set compute.gpus: 0"
    )
    if torch.version.cuda is None and torch.version.hip is None:
        raise StageError(
            f"compute.gpus is {wanted}, and the torch of {here} ({torch.__version__}) computes on no GPU; "
            "use an image or an environment with a CUDA torch (compute.image: cuda)"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted:
        raise StageError(
            f"compute.gpus is {wanted}, and {here} sees {found or 'no'} GPU{'s' if found > 1 else ''}; {remedy}"
        )
    memory = int(os.environ.get("PREFBUILD_GPU_MEMORY") or 0)
    for index in [int(os.environ["LOCAL_RANK"])] if is_rank() else range(wanted):
        about = torch.cuda.get_device_properties(index)
        if about.total_memory < 0.95 * memory:
            raise StageError(
                f"compute.gpu_memory is {memory / GIB:.0f} GiB, and {about.name} has {about.total_memory / GIB:.1f} GiB; "
                "use a larger GPU, or lower compute.gpu_memory if the recipe fits"
            )
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            raise StageError(f"GPU {index} ({about.name}) is there and can't be used: {error}") from None
        print(f"prefbuild: GPU {index}: {about.name}, {about.total_memory / GIB:.0f} GiB", file=sys.stderr)


def killed_for_memory() -> int:
    """How many processes of this container the kernel killed for memory. 0 outside of containers."""
    if "PREFBUILD_IMAGE" not in os.environ:
        return 0
    for path in OOM_COUNTERS:
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        if found:
            return int(found[1])
    return 0


def explain(error: BaseException) -> str | None:
    """What ran out, and what to change; None when it was something else. Looks through an error's causes."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if type(seen).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
            return (
                "out of GPU memory; lower train.per_device_train_batch_size (and raise gradient_accumulation_steps as much), "
                "set train.gradient_checkpointing: true, lower data.max_length or evaluate.batch_size, "
                f"or use a larger GPU ({'. '.join(text.split('. ')[:2])})"  # torch goes on for many sentences
            )
        if isinstance(seen, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
            return (
                f"out of memory; lower the batch size, or raise compute.memory ({text.splitlines()[0] if text else ''})"
            )
        if (isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)) or DISK_FULL.search(text):
            return f"no space left: {full_disks()}"
        seen = seen.__cause__ or seen.__context__
    return None


def full_disks() -> str:
    """Which of the places a stage writes to are full, and what gives them more room."""
    places = {
        "/tmp": "raise compute.tmp_size",
        "/dev/shm": "raise compute.shm_size",
        os.environ.get("PREFBUILD_WORK", "."): "free space on the disk that holds build/",
        os.environ.get("PREFBUILD_OUT", "."): "free space on the disk that holds build/",
    }
    in_container = "PREFBUILD_IMAGE" in os.environ
    full = {}
    for path, remedy in places.items():
        try:
            about = os.statvfs(path)
        except OSError:
            continue
        if about.f_bavail * about.f_frsize < 0.02 * about.f_blocks * about.f_frsize:
            size = about.f_blocks * about.f_frsize / GIB
            inside = in_container or path not in ("/tmp", "/dev/shm")
            full[remedy] = f"{path} ({size:.2f} GiB) is full; {remedy if inside else 'free space there'}"
    return ", ".join(full.values()) or "free space on the disk that holds build/, or raise compute.tmp_size"


# ---- the network


def refuse_network(stage: str) -> None:
    """Make Python's sockets refuse anything but this machine: only fetching may use the network."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple) and not _is_local(arguments[1][0]):
            raise StageError(f"stage {stage} tried to reach {arguments[1][0]}: only fetching may use the network")
        if event == "socket.getaddrinfo" and arguments[0] and not _is_local(arguments[0]):
            raise StageError(f"stage {stage} tried to look up {arguments[0]}: only fetching may use the network")

    sys.addaudithook(hook)


def _is_local(host: object) -> bool:
    text = host.decode() if isinstance(host, bytes) else str(host)
    return text.startswith(LOOPBACK)


def _digest(value: Path | list[Path]) -> Any:
    if isinstance(value, list):
        return {path.as_posix(): input_digest(path) for path in value}
    return input_digest(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
