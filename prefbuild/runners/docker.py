"""Run a job in a hardened container of the pinned image, through the engine's API (Docker, or Podman at DOCKER_HOST).

Inside: inputs read-only, one output mount, the work folder, no network but for fetching, the caller's uid and gid, no
capabilities, a read-only root. The container is created, watched and removed here; it never outlives the build unless
this process is killed with SIGKILL: then the next run of the stage, or `prefbuild clean --containers`, removes it.
Not covered: engines on other machines (folders are mounted from this one); what root could do through a mounted folder
when the caller is root.
"""

import os
import re
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefbuild.engine import address, connect, find_image, is_podman
from prefbuild.errors import LockError, StageError
from prefbuild.image import is_current
from prefbuild.job import WORK, Image, Job, refuse_special
from prefbuild.runners.containers import PATIENCE, labels_of, remove, remove_stale
from prefbuild.runners.gpus import INSIDE as DRIVER_FOLDER
from prefbuild.runners.gpus import gpu_requests
from prefbuild.runners.mounts import CACHE, OUT, PROJECT, mounts
from prefbuild.runners.stopping import on_stop

GRACE = 5  # seconds between SIGTERM and SIGKILL
POLL = 0.5  # seconds; the end of the output is noticed at once
RECONNECT = 600.0  # seconds to wait for an engine that went away
# What a stage's speed and threads depend on; nothing else of the caller's environment crosses.
PASSED_ON = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
GIB = 2**30
# What engines say of a request for GPUs that they can't fulfil: without the toolkit, with CDI but no GPU, with no driver.
NO_TOOLKIT = re.compile("device driver|CDI|nvidia", re.IGNORECASE)


def run(job: Job) -> int:
    """Run the job in a container; returns its exit code, 130 when it was stopped. No container remains.

    Raises LockError when no image is pinned, StageError for everything that ends a container but its own exit code.
    """
    stopping, woken = threading.Event(), threading.Event()

    def stop() -> None:
        stopping.set()
        woken.set()

    # Handlers only set flags: a request to the engine is never cut in half, so no container is left unknown.
    on_stop(stop)
    client = connect()
    image = pinned_image(client, job.image)
    remove_stale(client, job)
    out = job.work.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    container = None
    try:
        container = _start(client, image, job, out, stopping)
        if container is None:
            return 130
        log = Path(WORK, "logs", f"{job.stage}-{job.name}.log")
        return _finish(job, out, _watch(client, container, job, log, stopping, woken), log)
    finally:
        if container is not None:
            remove(client, container, patience=0 if stopping.is_set() else PATIENCE)
        shutil.rmtree(out, ignore_errors=True)


def pinned_image(client: Any, image: Image) -> Any:
    """The engine's image that the lock pins for a role. Says so when it holds other code than this machine.

    LockError when none is pinned, StageError when the engine has it not; each names the command that helps.
    """
    if image.id is None:
        raise LockError(
            f"image {image.role} is not pinned, so there is nothing to run stages in; run `prefbuild image build {image.role}` "
            f"(or `prefbuild image lock {image.role} IMAGE`), then build again"
        )
    found = find_image(client, {"id": image.id, "repo_digest": image.repo_digest}, image.role)
    if not is_current(found):
        _say(f"image {image.role} holds other code of prefbuild than this machine; {_rebuild(image)}")
    return found


# ---- create and start


def _start(client: Any, image: Any, job: Job, out: Path, stopping: threading.Event) -> "Running | None":
    """The container, started, its output attached from the first byte; None when a signal came before it ran."""
    from docker.errors import APIError
    from requests import RequestException

    problem = ""
    for ways in gpu_requests(job.gpus, podman=is_podman(client)):
        container = None
        try:
            container = client.containers.create(image.id, job.argv, **_options(client, job, out), **ways)
            if stopping.is_set():
                remove(client, Running(container.id))
                return None
            running = Running(container.id, tty=bool(container.attrs["Config"]["Tty"]))
            running.attach(client)
            container.start()
            return running
        except (APIError, RequestException) as error:
            if container is not None:
                remove(client, Running(container.id))
            problem = str(getattr(error, "explanation", None) or error)
            if not (job.gpus and NO_TOOLKIT.search(problem)):
                break
    raise StageError(
        f"{job.stage} {job.name}: the engine at {address()} could not start its container: {_hint(problem, job)}"
    )


def _options(client: Any, job: Job, out: Path) -> dict[str, Any]:
    """Everything but image, argv and GPUs: the hardened set."""
    from docker.types import LogConfig, Ulimit

    limits = job.limits
    memory = limits.memory or client.info()["MemTotal"]
    size = shutil.get_terminal_size()
    env = {
        **{key: os.environ[key] for key in PASSED_ON if key in os.environ},
        **job.env,
        "PREFBUILD_OUT": OUT,
        "PREFBUILD_IMAGE": str(job.image.id),
        "HOME": "/tmp",
        "USER": "prefbuild",  # the uid has no name in the image, and libraries ask for one
        "TRITON_CACHE_DIR": f"{CACHE}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
        "COLUMNS": str(size.columns),
        "LINES": str(size.lines),
        "TERM": "xterm",
    }
    if job.network:
        # Images are offline; the one stage that is not asks the Hub that the caller asks.
        env |= {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
        env |= {key: os.environ[key] for key in ("HF_ENDPOINT",) if key in os.environ}
    if job.gpus:
        env["LD_LIBRARY_PATH"] = DRIVER_FOLDER
    return {
        "name": f"prefbuild-{job.stage}-{job.name}-{os.getpid()}-{time.time_ns() % 10**6}"[:120],
        "environment": env,
        "labels": labels_of(job),
        "user": f"{os.getuid()}:{os.getgid()}",
        "working_dir": PROJECT,
        "tty": sys.stdout.isatty() and sys.stderr.isatty(),
        "init": True,  # PID 1 that passes signals on and reaps
        "read_only": True,
        "tmpfs": {"/tmp": f"rw,nosuid,nodev,noexec,size={limits.tmp_size},mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "network_mode": _network(client) if job.network else "none",
        "ipc_mode": "private",
        "pids_limit": limits.pids,
        "mem_limit": memory,
        "memswap_limit": memory,  # no swap: a stage that swaps for a day is worse than one that fails
        "shm_size": limits.shm_size,
        "ulimits": [Ulimit(name="core", soft=0, hard=0)],
        "log_config": LogConfig(type="json-file", config={"max-size": "20m", "max-file": "2"}),
        "mounts": mounts(job, out),
    }


def _network(client: Any) -> str:
    """The network to fetch through: the engine's bridge, or the host's where the engine has none."""
    return "bridge" if client.networks.list(names=["bridge"]) else "host"


def _hint(problem: str, job: Job) -> str:
    if job.gpus and NO_TOOLKIT.search(problem):
        return (
            f"{problem}. The recipe asks for {job.gpus} GPU{'s' * (job.gpus > 1)}: install the NVIDIA Container Toolkit and restart the engine "
            "(`sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker`), or set compute.gpus: 0"
        )
    if "catatonit" in problem or "docker-init" in problem or "container-init" in problem:
        return f"{problem}. The engine lacks the small init it runs as PID 1; install the package catatonit (Podman) or tini"
    if "no space left" in problem.lower():
        return f"{problem}. Free space where the engine keeps its data (`docker system df`)"
    return problem or "it gave no reason"


def _rebuild(image: Image) -> str:
    return f"`prefbuild image build {image.role}` makes it anew, and what ran in the old one runs again"


# ---- watch


@dataclass
class Running:
    """A container and the thread that passes its output on."""

    id: str
    tty: bool = False
    stream: Any = None
    thread: threading.Thread | None = None
    seen: float = field(default_factory=time.time)  # when output last came

    def attach(self, client: Any) -> None:
        self.stream = client.api.attach(self.id, stream=True, demux=not self.tty)

    def pump(self, log: Any, woken: threading.Event) -> None:
        """Pass the output on, byte by byte as it comes, to the terminal and the log, until it ends."""

        def work() -> None:
            from docker.errors import DockerException
            from requests import RequestException

            with suppress(DockerException, RequestException, OSError, ValueError):
                for chunk in self.stream:
                    self.seen = time.time()
                    out, err = (chunk, None) if self.tty else chunk
                    _write(out, err, log)
            woken.set()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()


def _watch(
    client: Any, running: Running, job: Job, log: Path, stopping: threading.Event, woken: threading.Event
) -> "End":
    """Wait for the container's end, through restarts of the engine; stop it when told to or out of time."""
    from docker.errors import APIError, DockerException, NotFound
    from requests import RequestException

    started = time.monotonic()
    gone_since: float | None = None
    end = End()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        running.pump(file, woken)
        while True:
            woken.wait(POLL)
            woken.clear()
            limit = job.limits.time_limit
            late = limit is not None and time.monotonic() - started > limit
            try:
                if (stopping.is_set() or late) and gone_since is None:
                    end.stopped, end.late = stopping.is_set(), late and not stopping.is_set()
                    client.api.stop(running.id, timeout=GRACE)
                state = client.api.inspect_container(running.id)["State"]
            except NotFound:
                end.removed = True
                return end
            except (DockerException, RequestException, OSError) as error:
                if isinstance(error, APIError) and not error.is_server_error():
                    raise StageError(f"{job.stage} {job.name}: the engine at {address()} failed: {error}") from None
                if gone_since is None:
                    gone_since = time.monotonic()
                    end.engine_gone = True
                    _say(
                        f"the engine at {address()} went away; waiting up to {RECONNECT / 60:.0f} min for it to come back"
                    )
                if stopping.is_set() or time.monotonic() - gone_since > RECONNECT:
                    raise StageError(
                        f"{job.stage} {job.name}: the engine at {address()} went away and its container {running.id[:12]} can't "
                        "be stopped from here; start the engine and run `prefbuild clean --containers`"
                    ) from None
                time.sleep(POLL)
                continue
            if gone_since is not None:
                gone_since = None
                if state["Running"]:
                    end.engine_gone = False
                    _say("the engine is back, and the stage went on meanwhile")
                    _reattach(client, running, file, woken)
            if not state["Running"]:
                if state["ExitCode"] in (137, 143) and not (end.stopped or end.late):
                    _why_killed(client, running, end)
                break
        if running.thread is not None:
            running.thread.join(GRACE)
    end.code, end.out_of_memory, end.error = state["ExitCode"], bool(state["OOMKilled"]), state.get("Error") or ""
    return end


def _why_killed(client: Any, running: Running, end: "End") -> None:
    """`docker rm -f` kills first and an engine that shuts down stops its containers first: see what comes next."""
    from docker.errors import DockerException
    from requests import RequestException

    time.sleep(POLL)
    try:
        end.removed = not client.api.containers(all=True, filters={"id": running.id})
    except (DockerException, RequestException, OSError):
        end.engine_gone = True


def _reattach(client: Any, running: Running, file: Any, woken: threading.Event) -> None:
    """Show what was written meanwhile, then go on live. Lines near the break may come twice, none is lost."""
    if running.thread is not None:
        running.thread.join(GRACE)
    since = running.seen
    running.attach(client)
    missed = client.api.logs(running.id, since=since, stream=False)
    _write(missed, None, file)
    running.pump(file, woken)


def _write(out: bytes | None, err: bytes | None, log: Any) -> None:
    for data, stream in ((out, sys.stdout), (err, sys.stderr)):
        if data:
            log.write(data)
            log.flush()
            with suppress(OSError, ValueError):  # a closed terminal is no reason to stop a training
                stream.buffer.write(data)
                stream.flush()


@dataclass
class End:
    """How a container ended."""

    code: int = 0
    stopped: bool = False  # by a signal to this process
    late: bool = False
    removed: bool = False
    engine_gone: bool = False
    out_of_memory: bool = False
    error: str = ""


def _finish(job: Job, out: Path, end: End, log: Path) -> int:
    """Take the outputs of a job that ended well; otherwise say why it did not. Returns the exit code."""
    what = f"{job.stage} {job.name}"
    memory = (
        f"{job.limits.memory / GIB:.1f} GiB (compute.memory)" if job.limits.memory else "all of the machine's memory"
    )
    if end.stopped:
        return 130
    if end.late:
        raise StageError(
            f"{what}: ran past compute.time_limit ({job.limits.time_limit:.0f} s) and was stopped; raise it, or make the "
            f"stage shorter. Training goes on from its last checkpoint. Its log is {log}"
        )
    if end.removed:
        raise StageError(f"{what}: somebody removed its container while it ran; build again. Its log is {log}")
    if end.out_of_memory and end.code == 0:
        raise StageError(
            f"{what}: a process in it was killed for memory though the stage went on, so its result can't be trusted; it had "
            f"{memory}: raise compute.memory, or lower the batch size. Its log is {log}"
        )
    if end.out_of_memory:
        raise StageError(
            f"{what}: out of memory: it had {memory}; raise compute.memory, or lower train.per_device_train_batch_size "
            f"(and raise gradient_accumulation_steps as much). Its log is {log}"
        )
    if end.code == 0:
        _take_outputs(job, out)
        return 0
    if end.engine_gone and end.code >= 128:
        raise StageError(
            f"{what}: the engine stopped during the run and took the container with it (exit code {end.code}); build again: "
            "training goes on from its last checkpoint. With `live-restore` in the engine's daemon.json containers survive "
            f"its restarts. Its log is {log}"
        )
    if end.code == 137:
        raise StageError(
            f"{what}: was killed from outside (SIGKILL): by a person (`docker kill`), by the machine for memory, or by an "
            f"engine that does not say why, as Podman for memory; it had {memory}. Its log is {log}"
        )
    if end.code == 143:
        raise StageError(f"{what}: was stopped from outside (SIGTERM, `docker stop`); build again. Its log is {log}")
    if end.error:
        raise StageError(f"{what}: {_hint(end.error, job)}")
    _say(f"{what} ended with exit code {end.code}; its log is {log}")
    return end.code


def _take_outputs(job: Job, out: Path) -> None:
    """Move the outputs into the project, all or none, once nothing but plain files and folders is in them."""
    refuse_special([out], hard_links=True)
    missing = [str(path) for path in job.outputs if not (out / path).exists()]
    if missing:
        raise StageError(
            f"{job.stage} {job.name}: its container ended well and left no {', '.join(missing)}; "
            f"image {job.image.role} may hold an older prefbuild: {_rebuild(job.image)}"
        )
    for path in job.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.rename(out / path, path)


def _say(text: str) -> None:
    print(f"prefbuild: {text}", file=sys.stderr, flush=True)
