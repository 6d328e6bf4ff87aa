"""Ranks: all end when one fails or their parent is gone, one is heard, and the first error is the one that is shown."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefbuild.errors import DataError
from prefbuild.launch import RankFailed, launch
from prefbuild.runners.stopping import is_alive

RANK = """
import os, signal, sys, time
from prefbuild.errors import DataError
from prefbuild.launch import record_failure
from prefbuild.worker import die_with_parent
die_with_parent()
rank, folder = os.environ["RANK"], sys.argv[1]
with open(f"{folder}/{rank}", "w") as file:
    file.write(str(os.getpid()))
print(f"rank {rank} is here", flush=True)
while len(os.listdir(folder)) < 3:
    time.sleep(0.01)
"""
WAIT = "time.sleep(100)\n"


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    folder = tmp_path / "pids"
    folder.mkdir()
    return folder


def begin(tmp_path: Path, pids: Path, code: str) -> None:
    (tmp_path / "rank.py").write_text(RANK + code)
    launch([str(tmp_path / "rank.py"), str(pids)], 3, tmp_path / "work")


def alive(pids: Path) -> list[int]:
    return [int(path.read_text()) for path in pids.iterdir() if is_alive(int(path.read_text()))]


def test_only_the_first_rank_is_heard(tmp_path: Path, pids: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, pids, "")
    assert capfd.readouterr().out == "rank 0 is here\n"
    assert (tmp_path / "work/rank-2.log").read_text() == "rank 2 is here\n"


def test_one_that_fails_ends_all_with_its_error(tmp_path: Path, pids: Path) -> None:
    # Rank 0 waits for ever, rank 2 fails because rank 1 did.
    code = f"""
if rank == "1":
    error = DataError("its row is broken")
    record_failure(error, str(error), error.exit_code)
if rank == "2":
    time.sleep(0.1)
    record_failure(RuntimeError("connection lost"), None, 1)
{WAIT}"""
    started = time.monotonic()
    with pytest.raises(RankFailed, match="^rank 1 of 3: its row is broken$") as caught:
        begin(tmp_path, pids, code)
    assert caught.value.exit_code == DataError.exit_code
    assert time.monotonic() - started < 20 and not alive(pids)


def test_an_error_of_nobody_s_making_comes_with_its_traceback(
    tmp_path: Path, pids: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = f"""
try:
    {{}}["key"] if rank == "2" else {WAIT.strip()}
except KeyError as error:
    record_failure(error, None, 1)
"""
    with pytest.raises(RankFailed, match="rank 2 of 3: KeyError: 'key'"):
        begin(tmp_path, pids, code)
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_one_that_is_killed_is_named_though_others_complain(tmp_path: Path, pids: Path) -> None:
    code = f"""
if rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "0":
    record_failure(RuntimeError("connection lost"), None, 1)
{WAIT}"""
    with pytest.raises(RankFailed, match=r"rank 1 of 3 was ended by SIGKILL, .*its last words are in .*rank-1\.log"):
        begin(tmp_path, pids, code)
    assert not alive(pids)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_the_process_that_launched_it(tmp_path: Path, pids: Path, signum: signal.Signals) -> None:
    (tmp_path / "rank.py").write_text(RANK + WAIT)
    code = f"from pathlib import Path; from prefbuild.launch import launch; launch([{str(tmp_path / 'rank.py')!r}, "
    code += f"{str(pids)!r}], 3, Path({str(tmp_path / 'work')!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(alive(pids)) == 3
    os.kill(parent.pid, signum)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pids)
