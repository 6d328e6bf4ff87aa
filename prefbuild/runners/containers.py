"""Whose a container is, and removing those whose owner is gone."""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefbuild.job import Job
from prefbuild.runners.stopping import is_alive

LABEL = "prefbuild.owner"
PATIENCE = 30.0  # seconds; an engine takes up to 15 to shut down


def labels_of(job: Job) -> dict[str, str]:
    """Labels that say which build a container is of, and which process of which machine waits for it."""
    return {
        LABEL: str(os.getuid()),
        "prefbuild.host": socket.gethostname(),
        "prefbuild.boot": boot_id(),
        "prefbuild.pid": str(os.getpid()),
        "prefbuild.started": started(os.getpid()),
        "prefbuild.project": str(Path.cwd()),
        "prefbuild.stage": f"{job.stage} {job.name}",
        "prefbuild.inputs": job.work.name,
    }


def clean() -> list[str]:
    """Remove this user's containers whose prefbuild is gone, in every state; returns a line for each of ours.

    Raises StageError when no engine answers.
    """
    from prefbuild.engine import connect

    client = connect()
    lines = []
    for container in client.containers.list(all=True, filters={"label": f"{LABEL}={os.getuid()}"}, ignore_removed=True):
        labels = container.labels
        what = f"{container.id[:12]} ({labels.get('prefbuild.stage')}, {container.status}, of {labels.get('prefbuild.project')})"
        why = kept(labels)
        if why:
            lines.append(f"left {what}: {why}")
        else:
            remove(client, container)
            lines.append(f"removed {what}")
    return lines


def remove_stale(client: Any, job: Job) -> None:
    """Remove what a killed run of this very stage left: it would go on writing to the same work folder."""
    mine = labels_of(job)
    filters = [f"{key}={mine[key]}" for key in (LABEL, "prefbuild.host", "prefbuild.project", "prefbuild.stage")]
    for container in client.containers.list(all=True, filters={"label": filters}, ignore_removed=True):
        print(f"prefbuild: removing container {container.id[:12]}, left by a run that was killed", file=sys.stderr)
        remove(client, container)


def remove(client: Any, container: Any, *, patience: float = PATIENCE) -> None:
    """Remove a container, running or not, waiting a little for an engine that restarts. Names one that it can't."""
    from docker.errors import APIError, DockerException, NotFound
    from requests import RequestException

    deadline = time.monotonic() + patience
    while True:
        try:
            client.api.remove_container(container.id, force=True, v=True)
            return
        except NotFound:
            return
        except (DockerException, RequestException, OSError) as error:
            if isinstance(error, APIError) and "already in progress" in str(error):
                return
            if time.monotonic() > deadline:
                print(
                    f"prefbuild: container {container.id[:12]} could not be removed ({error}); "
                    "`prefbuild clean --containers` does it later",
                    file=sys.stderr,
                )
                return
        time.sleep(0.5)


def kept(labels: dict[str, str]) -> str:
    """Why a container must be left alone; empty when its prefbuild is gone."""
    if labels.get("prefbuild.host") != socket.gethostname():
        return f"it is of the machine {labels.get('prefbuild.host')}; run this there"
    pid = labels.get("prefbuild.pid", "")
    same_boot = labels.get("prefbuild.boot") == boot_id()
    if same_boot and pid.isdigit() and is_alive(int(pid)) and started(int(pid)) == labels.get("prefbuild.started"):
        return f"process {pid} waits for it"
    return ""


def boot_id() -> str:
    """What tells this run of the machine from earlier ones; empty where the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def started(pid: int) -> str:
    """When a process was started, in ticks since boot: tells it from a later one of the same number."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
