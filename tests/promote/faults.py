"""A promotion to the Hub with every one of its requests going wrong in turn: `python tests/promote/faults.py`.

Each point is a promotion of a build in a process of its own, with the real client, in which one request fails; then
the promotion is run again, with nothing wrong. What is visible at the tag in between, and what is there in the end, is
read from the server itself.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from hub import WRITE, Hub  # noqa: E402

from prefbuild.promote import version  # noqa: E402
from prefbuild.promote.repository import BUILD_LINE  # noqa: E402
from tests import built  # noqa: E402

# What goes wrong with a request, and the hub's fault that does it. The client is killed while the hub holds its request.
KINDS = {
    "lost before": "drop-before",
    "client killed": "slow",
    "answer lost": "drop-after",
    "answer 500": "status",
    "done, answer 500": "status-after",
    "token revoked": "revoke",
}
HELD = 0.2  # seconds that the hub holds a request whose client is killed
REPO = "me/x"
# Forks a process a command, so that Python and its libraries are loaded once for hundreds of them.
CLIENT = """
import json, os, sys
import huggingface_hub.hf_api, huggingface_hub.repocard, jinja2, prefbuild.promote, ruamel.yaml, scipy.special
from prefbuild.cli import main
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(asked["folder"])
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        code = main(asked["argv"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Point:
    """One fault and what came of it."""

    request: str
    wrong: str
    exit: str  # of the promotion that met it
    at_tag: str  # after it: nothing, or the gated bytes
    again: str  # exit of the next promotion
    in_the_end: str


class Bench:
    """A built project, a hub, and a client."""

    def __init__(self, folder: Path, hub: Hub):
        self.root, self.hub = folder / "project", hub
        self.log = folder / "client.log"
        self.root.mkdir()
        recipe = built.RECIPE
        built.RECIPE = {**recipe, "promote": {"to": "hub", "repo": REPO}}
        try:
            built.make(self.root)
        finally:
            built.RECIPE = recipe
        env = {**os.environ, **hub.env(WRITE)}
        self.client = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        assert self.client.stdin is not None
        self.client.stdin.close()
        self.client.wait(timeout=30)

    def reset(self) -> None:
        """Nothing was ever promoted."""
        self.hub.faults.clear()
        self.hub.revoked.clear()
        self.hub.repos.clear()
        self.hub.log.clear()
        for blob in (self.hub.folder / "blobs").iterdir():
            blob.unlink()
        (self.root / "promotions.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.root / "build/.work", ignore_errors=True)
        shutil.rmtree(self.hub.folder / "home", ignore_errors=True)  # what is in the client's cache is not asked for

    def promote(self, kill_at: int | None = None) -> int:
        """The exit code; kills the client while its request number `kill_at` is held."""
        assert self.client.stdin is not None and self.client.stdout is not None
        asked = {"folder": str(self.root), "log": str(self.log), "argv": ["promote", "x"]}
        self.client.stdin.write(json.dumps(asked) + "\n")
        self.client.stdin.flush()
        pid = int(self.client.stdout.readline())
        if kill_at is not None:
            (fault,) = self.hub.faults
            while fault.seen <= kill_at:
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
        code = int(self.client.stdout.readline())
        while kill_at is not None and not any(entry.fault for entry in self.hub.log):
            time.sleep(0.01)  # the hub goes on with what it was asked
        return code

    def whole_commits(self) -> list[str]:
        """Commits that are a whole version of this build; AssertionError for one that is anything else."""
        repo = self.hub.repos.get(f"models/{REPO}")
        found = []
        for oid in self.hub.history(REPO) if repo else ():
            commit = repo["commits"][oid]
            if list(commit["files"]) == [version.OF_THE_HUB]:
                continue
            files = {path: {"size": e["size"], "sha256": e["sha256"]} for path, e in commit["files"].items()}
            made, facts = version.read_statement(self.hub.read(REPO, version.STATEMENT, oid), "it")
            version.check_files(files, made, "a commit")
            gate = json.loads((self.root / "build/x/gate.json").read_text())
            version.check_roles(files, {"adapter": True, "merged": True}, gate, "a commit")
            assert f"{BUILD_LINE}{facts['build']}" in commit["message"]
            found.append(oid)
        return found

    def at_tag(self) -> str:
        """What somebody sees who asks for v1."""
        whole = self.whole_commits()
        tags = self.hub.repos.get(f"models/{REPO}", {"tags": {}})["tags"]
        assert set(tags) <= {"v1"} and set(tags.values()) <= set(whole), f"tags {tags}, whole commits {whole}"
        return "gated bytes" if tags else "nothing"

    def in_the_end(self) -> str:
        whole, lines = self.whole_commits(), (self.root / "promotions.jsonl").read_text().splitlines()
        assert self.at_tag() == "gated bytes"
        assert len(whole) == 1, f"published {len(whole)} times"
        assert [json.loads(line)["commit"] for line in lines] == whole
        return "v1, once, recorded"


def sweep(folder: Path, kinds: Iterable[str] = KINDS) -> Iterator[Point]:
    """Every request of a promotion to a repository that is not there yet, with every kind of fault."""
    with Hub(folder / "hub") as hub:
        bench = Bench(folder, hub)
        try:
            yield from _sweep(bench, hub, kinds)
        finally:
            bench.close()


def _sweep(bench: Bench, hub: Hub, kinds: Iterable[str]) -> Iterator[Point]:
    bench.reset()
    assert bench.promote() == 0, bench.log.read_text()
    requests = len(hub.log)
    for number in range(requests):
        for wrong in kinds:
            fault = KINDS[wrong]
            bench.reset()
            hub.fault(fault, skip=number, seconds=HELD)
            code = bench.promote(kill_at=number if fault == "slow" else None)
            (met,) = [entry for entry in hub.log if entry.fault]
            seen = bench.at_tag()
            hub.faults.clear()
            hub.revoked.clear()
            said = bench.log.read_text()
            assert WRITE not in said and "Traceback" not in said, said
            again = bench.promote()
            assert again == 0, bench.log.read_text()
            request = f"{number + 1:2} {met.method} {_short(met.path)}"
            yield Point(request, wrong, _exit(code), seen, _exit(again), bench.in_the_end())


def _short(path: str) -> str:
    path = re.sub(r"[0-9a-f]{40,64}", "...", path.partition("?")[0])
    return path.removeprefix("/api").replace(f"/models/{REPO}", "").replace(f"/{REPO}", "") or "repository"


def _exit(code: int) -> str:
    return "killed" if code == -signal.SIGKILL else str(code)


def main() -> None:
    os.environ.update({"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "test"})
    os.environ.update({"GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "test@localhost"})
    form, count = "{:58} {:17} {:7} {:12} {:6} {}", 0
    print(form.format(*(field.name.replace("_", " ") for field in fields(Point))), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for point in sweep(Path(folder)):
            print(form.format(*vars(point).values()), flush=True)
            count += 1
    print(f"{count} points: after each, nothing or the gated bytes at the tag, and all of it once in the end")


if __name__ == "__main__":
    main()
