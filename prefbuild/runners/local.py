"""Run a job as a child process on this machine.

The child never outlives the build: it dies with this process (Linux' parent-death signal), and this process
ends when the `dvc` above it does, which DVC itself does not see to (a killed `dvc repro` leaves its stage running).
Not covered: a stage's grandchildren when this process is killed with SIGKILL; torch's data loaders notice by themselves.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from prefbuild.job import Job, worker_environment

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}


def run(job: Job) -> int:
    """Run the job's argv with this interpreter; returns its exit code, 128 + signal when a signal ended it."""
    env = worker_environment(job)
    env["PREFBUILD_PARENT"] = str(os.getpid())
    # Its own session, so that everything it started can be signalled at once. Locks held here are inherited.
    child = subprocess.Popen([sys.executable, *job.argv], env=env, start_new_session=True, close_fds=False)
    stopping = threading.Event()

    def stop(signum: int, _frame: object = None) -> None:
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=_end, args=(child,), daemon=True).start()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_watch_build, args=(stop,), daemon=True).start()
    code = child.wait()
    if stopping.is_set():
        _signal_group(child, signal.SIGKILL)
        return 130
    return code if code >= 0 else 128 - code


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child, signal.SIGKILL)


def _signal_group(child: subprocess.Popen[bytes], signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signum)


def _watch_build(stop: object) -> None:
    """Call `stop` as soon as the build above this process is gone: the parent, or its parent when that is a shell."""
    above = [os.getppid()]
    while _command(above[-1]) in SHELLS:
        above.append(_parent(above[-1]))
    if sys.platform == "linux":
        waiting = []
        for pid in above:
            try:
                waiting.append(os.pidfd_open(pid))
            except ProcessLookupError:
                break
        else:
            select.select(waiting, [], [])
    else:
        while all(_alive(pid) for pid in above):
            time.sleep(0.5)
    stop(signal.SIGTERM)  # type: ignore[operator]


def _command(pid: int) -> str:
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/comm").read_text().strip()
        return os.path.basename(subprocess.check_output(["ps", "-o", "comm=", "-p", str(pid)], text=True).strip())
    except (OSError, subprocess.CalledProcessError):
        return ""


def _parent(pid: int) -> int:
    if sys.platform == "linux":
        # The command's name in the second field may itself hold spaces and parentheses.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pid)], text=True))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
