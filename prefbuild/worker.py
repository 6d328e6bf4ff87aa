"""Run ONE stage in whatever environment it finds itself in: `python -m prefbuild.worker <stage> <name>`.

Covered: no network but for the stages that fetch (Python's own sockets are refused), manifests written last,
errors as one line and an exit code. Not covered: a sandbox; native code can still open sockets. Containers do that.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prefbuild.artifact import input_digest, write_manifest
from prefbuild.errors import PrefbuildError, StageError
from prefbuild.job import NETWORK_STAGES, make_job, read_section
from prefbuild.stages import STAGES

LOOPBACK = ("127.", "::1", "localhost")


def main(argv: list[str]) -> int:
    """Run the stage named in argv; returns the exit code."""
    stage, name = argv
    die_with_parent()
    try:
        run_stage(stage, name)
    except PrefbuildError as error:
        print(f"prefbuild: {stage} {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def run_stage(stage: str, name: str) -> None:
    """Run a stage's function, then write the manifest of every folder it left."""
    section = read_section(stage, name)
    if stage not in NETWORK_STAGES:
        refuse_network(stage)
    inputs: dict[str, Any] = {
        role: [Path(path) for path in value] if isinstance(value, list) else Path(value)
        for role, value in section["inputs"].items()
    }
    outputs = {role: Path(path) for role, path in section["outputs"].items()}
    started = time.monotonic()
    run = importlib.import_module(STAGES[stage]).run
    run(section["settings"], inputs, outputs, make_job(stage, name).work, name)
    missing = [str(path) for path in outputs.values() if not path.exists()]
    if missing:
        raise StageError(f"the stage left no {', '.join(missing)}")
    digests = {} if stage in NETWORK_STAGES else {role: _digest(value) for role, value in inputs.items()}
    for role, path in outputs.items():
        if path.is_dir() and role not in ("plots", "report"):
            write_manifest(path, stage=stage, name=name, inputs=digests)
    print(f"prefbuild: {stage} {name}: done in {time.monotonic() - started:.0f} s", file=sys.stderr)


def die_with_parent() -> None:
    """Be killed when the process that started this one ends. Linux only; elsewhere the runner's own watch must do."""
    parent = os.environ.get("PREFBUILD_PARENT")
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(137)


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
