"""Run a stage in several processes, a GPU each: its ranks. When one fails all end, and its error is the stage's.

A rank is told who it is as torchrun tells it, by RANK, LOCAL_RANK, WORLD_SIZE and the address of a store to meet at.
The store is held here, at a port that the system chose, so none is guessed. Only rank 0 is heard; what the others say
is in a file in the work folder. A rank dies with the process that started it (Linux' parent-death signal), however that
ends. Not covered: several machines, and starting again by itself what failed: a later run goes on from the last checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

from prefbuild.artifact import write_atomic
from prefbuild.errors import PrefbuildError, StageError

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
POLL = 0.05  # seconds
RECORDS = "PREFBUILD_RANKS"  # the folder where ranks say why they failed
STRATEGY = "PREFBUILD_STRATEGY"
INSTALL_DEEPSPEED = (
    "install it with `pip install 'prefbuild[deepspeed]'` (in the image too: it compiles with the CUDA toolkit), "
    "or write compute.strategy: fsdp"
)
LOOPBACK = "127.0.0.1"
# One machine: ranks meet over loopback, all there is in a container. Multicast through the NVLink switch is left off:
# it needs device nodes that containers and rented machines often lack, and NCCL then hangs or fails at its start.
ONE_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}


class RankFailed(StageError):
    """A rank failed; it has the exit code that the rank's own error has."""

    def __init__(self, text: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(text)


def is_rank() -> bool:
    """Whether this process is one of several that `launch` started."""
    return RECORDS in os.environ


def launch(argv: list[str], num: int, work: Path, *, strategy: str = "ddp", env: dict[str, str] | None = None) -> None:
    """Run this interpreter with `argv` as ranks 0 to num - 1 and wait for all. `env` is added to each one's environment.

    Raises RankFailed with the message of the first that failed, after all have ended.
    """
    from torch.distributed import TCPStore

    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("rank-*"):
        old.unlink()
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num)),  # unless the caller says otherwise
        **os.environ,
        **ONE_MACHINE,
        **(env or {}),
        RECORDS: str(work),
        STRATEGY: strategy,
        "PREFBUILD_PARENT": str(os.getpid()),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here; rank 0 opens none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files:
        try:
            for rank in range(num):
                heard = None if rank == 0 else files.enter_context(open(_log(work, rank), "wb"))
                own = shared | {"RANK": str(rank), "LOCAL_RANK": (env or {}).get("LOCAL_RANK", str(rank))}
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *argv],
                        env=own,
                        stdin=subprocess.DEVNULL,
                        stdout=heard,
                        stderr=heard,
                        close_fds=False,  # locks held here are held as long as any rank lives
                    )
                )
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                time.sleep(POLL)
            codes = [rank.poll() for rank in ranks]
        finally:
            _end(ranks)
    if any(codes):
        raise _failure(codes, work)


def record_failure(error: BaseException, explained: str | None, exit_code: int) -> None:
    """Say, as a rank, why it fails, and end it at once: the ranks that wait for it would keep it from ending."""
    about = {
        "time": time.time(),
        "exit_code": exit_code,
        "text": explained or f"{type(error).__name__}: {error}",
        "traceback": "" if isinstance(error, PrefbuildError) else "".join(traceback.format_exception(error)),
    }
    write_atomic(_record(Path(os.environ[RECORDS]), int(os.environ["RANK"])), json.dumps(about))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _failure(codes: list[int | None], work: Path) -> RankFailed:
    """What the first rank that failed says; the others then failed for want of it."""
    num = len(codes)
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:  # it could say nothing; what others say came after
        rank = killed[0]
        name = signal.Signals(-(codes[rank] or 0)).name
        said = "" if rank == 0 else f"; its last words are in {_log(work, rank)}"
        memory = ", by the machine for memory perhaps (dmesg says)" if name == "SIGKILL" else ""
        return RankFailed(f"rank {rank} of {num} was ended by {name}{memory}{said}", StageError.exit_code)
    found = {rank: json.loads(_record(work, rank).read_text()) for rank in range(num) if _record(work, rank).exists()}
    if not found:
        rank = next(rank for rank, code in enumerate(codes) if code)
        said = "" if rank == 0 else f"; what it said is in {_log(work, rank)}"
        return RankFailed(f"rank {rank} of {num} ended with exit code {codes[rank]}{said}", StageError.exit_code)
    rank = min(found, key=lambda rank: found[rank]["time"])
    print(found[rank]["traceback"], end="", file=sys.stderr)
    return RankFailed(f"rank {rank} of {num}: {found[rank]['text']}", found[rank]["exit_code"])


def _log(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.log"


def _record(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.json"
