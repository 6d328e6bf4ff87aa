"""When a runner must stop: a signal, or the end of the build above it.

A stage never outlives its build: DVC does not see to that (a killed `dvc repro` leaves its stage running).
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}


def on_stop(stop: Callable[[], None]) -> None:
    """Call `stop`, which must return at once, at SIGINT, SIGTERM, SIGHUP, or when the `dvc` above is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: stop())
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_watch_build, args=(stop,), daemon=True).start()


def _watch_build(stop: Callable[[], None]) -> None:
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
        while all(is_alive(pid) for pid in above):
            time.sleep(0.5)
    stop()


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


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
