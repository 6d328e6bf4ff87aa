"""Run a job as a child process on this machine.

The child never outlives the build: it dies with this process (Linux' parent-death signal), and this process
ends when the `dvc` above it does. Not covered: limits of memory and processes, which only containers have; a stage's
grandchildren when this process is killed with SIGKILL (torch's data loaders notice by themselves).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from prefbuild.errors import StageError
from prefbuild.job import Job
from prefbuild.runners.stopping import on_stop

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
SECRETS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)


def run(job: Job) -> int:
    """Run the job's argv with this interpreter; returns its exit code, 128 + signal when a signal ended it.

    StageError when it ran past its time limit.
    """
    env = worker_environment(job)
    env["PREFBUILD_PARENT"] = str(os.getpid())
    # Its own session, so that everything it started can be signalled at once. Locks held here are inherited.
    child = subprocess.Popen([sys.executable, *job.argv], env=env, start_new_session=True, close_fds=False)
    stopping = threading.Event()

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=_end, args=(child,), daemon=True).start()

    on_stop(stop)
    try:
        code = child.wait(job.limits.time_limit)
    except subprocess.TimeoutExpired:
        _end(child)
        raise StageError(
            f"{job.stage} {job.name}: ran past compute.time_limit ({job.limits.time_limit:.0f} s) and was stopped; "
            "raise it, or make the stage shorter. Training goes on from its last checkpoint"
        ) from None
    if stopping.is_set():
        _signal_group(child, signal.SIGKILL)
        return 130
    return code if code >= 0 else 128 - code


def worker_environment(job: Job) -> dict[str, str]:
    """The caller's environment with the job's on top and, where there is no network, without tokens of hubs and trackers."""
    env = {**os.environ, **job.env}
    if not job.network:
        for key in SECRETS:
            env.pop(key, None)
    if job.gpus:
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = allowed.split(",") if allowed else [str(index) for index in range(job.gpus)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[: job.gpus])
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    return env


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child, signal.SIGKILL)


def _signal_group(child: subprocess.Popen[bytes], signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signum)
