"""Run one job in a container as `prefbuild stage` does: `python in_container.py '<json>'`, in a project's folder.

Tests run it as a process of its own, so that signals, crashes and exit codes are real. With "signal_at" it sends itself
SIGINT before or after a request to the engine.
"""

import json
import os
import signal
import sys
from pathlib import Path

from docker.models.containers import Container, ContainerCollection

from prefbuild.errors import PrefbuildError
from prefbuild.job import Image, Job, Limits, run_job
from prefbuild.runners import docker as runner

LIMITS = {"memory": None, "shm_size": 64 << 20, "tmp_size": 1 << 20, "pids": 64, "time_limit": None}
REQUESTS = {"create": ContainerCollection, "start": Container}


def main(asked: dict) -> int:
    job = Job(
        stage="train",
        name="test",
        argv=["-c", asked["code"]],
        inputs=[Path(path) for path in asked.get("inputs", [])],
        outputs=[Path("build/test/out.txt")],
        work=Path("build/.work/train-test/x"),
        caches=[],
        env={},
        network=False,
        gpus=asked.get("gpus", 0),
        image=Image(role="cpu", id=asked["image"], repo_digest=None),
        limits=Limits(**{**LIMITS, **asked.get("limits", {})}),
    )
    if "signal_at" in asked:
        when, method = asked["signal_at"].split()
        send_signal(REQUESTS[method], method, when)
    if "uid" in asked:
        become(asked["uid"], asked["group"])
    try:
        return run_job(job, runner.run)
    except PrefbuildError as error:
        print(f"prefbuild: {error}", file=sys.stderr)
        return error.exit_code


def become(uid: int, group: int) -> None:
    """Go on as an ordinary user. Everything is imported before: the interpreter may be root's alone."""
    import docker.types  # noqa: F401
    import requests  # noqa: F401

    from prefbuild import engine

    engine.connect().close()
    os.setgroups([group])
    os.setgid(uid)
    os.setuid(uid)


def send_signal(owner: type, method: str, when: str) -> None:
    """Send SIGINT to this process around a real request."""
    request = getattr(owner, method)

    def with_signal(*arguments, **options):
        if when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        answer = request(*arguments, **options)
        if when == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    setattr(owner, method, with_signal)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
