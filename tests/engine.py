"""A container engine for tests, and the images that they share.

DOCKER_HOST names the engine; without it, root with dockerd installed gets a private one. Where there is neither, tests
that need one are skipped, unless PREFBUILD_TEST_DOCKER=require: CI says so, and then they fail.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import ROOT, run

BASE_IMAGE = "prefbuild-test-base"
# In the environment of every image that tests build; in no image after it.
SECRETS = {
    "HF_TOKEN": "hf_prefbuildTestSecretOne",
    "AWS_SECRET_ACCESS_KEY": "prefbuildTestSecretTwo",
    "PIP_INDEX_URL": "https://someone:prefbuildTestSecretThree@index.invalid/simple",
}


class Engine:
    """A private dockerd with all it keeps in one folder. It has no bridge, so containers get `none` or `host`."""

    def __init__(self, folder: Path, *, live_restore: bool = False):
        # A socket's path can have 107 characters, and pytest's folders are long.
        self.folder = folder
        self.live_restore = live_restore
        self.socket = folder / "sock"
        self.host = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start dockerd and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # One that was killed leaves its pids behind; dockerd does not start over a pid that lives again.
        (self.folder / "pid").unlink(missing_ok=True)
        self._containerd_pid().unlink(missing_ok=True)
        command = [
            "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none",
            f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec",
            f"--host={self.host}", f"--pidfile={self.folder}/pid",
            *(["--live-restore"] if self.live_restore else []),
        ]  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            # Its own session: Ctrl-C in pytest must not stop it before the tests have ended.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"dockerd did not start:\n{self.log()[-3000:]}")
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether the engine can be used."""
        import docker
        import requests

        try:
            client = docker.DockerClient(base_url=self.host, timeout=10)
            try:
                return bool(client.ping())
            finally:
                client.close()
        except (docker.errors.DockerException, requests.RequestException):
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send dockerd a signal and wait for its end. By SIGKILL, or with live_restore, the containers live on."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        self._wait_for_containerd()

    def restart(self) -> None:
        """Stop dockerd in good order and start it again; without live_restore its containers are stopped."""
        self.kill(signal.SIGTERM)
        self.start()

    def stop(self) -> None:
        """Stop all of it, containers too, and remove what it kept."""
        if self.process is not None:
            if self.process.poll() is not None:
                self.start()  # only an engine that runs can end what a killed one left
            self.remove_containers()
            self.kill(signal.SIGTERM)
        for mount in reversed(_mounts_under(self.folder)):
            subprocess.run(["umount", "--lazy", mount], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_containers(self) -> None:
        """End and remove all containers."""
        import docker

        client = docker.DockerClient(base_url=self.host)
        for container in client.api.containers(all=True, quiet=True):
            client.api.remove_container(container["Id"], force=True)
        client.close()

    def log(self) -> str:
        """What dockerd has written."""
        return (self.folder / "log").read_text(errors="replace")

    def _containerd_pid(self) -> Path:
        return self.folder / "exec" / "containerd" / "containerd.pid"

    def _wait_for_containerd(self) -> None:
        # It dies with its dockerd, but a little later, and a new dockerd would take it for one that serves.
        try:
            command = Path(f"/proc/{int(self._containerd_pid().read_text())}/cmdline")
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                if str(self.folder).encode() not in command.read_bytes():
                    return
            except OSError:
                return
            time.sleep(0.02)


def start(folder: Path, *, live_restore: bool = False) -> Engine:
    """A private engine that answers. Root only."""
    engine = Engine(folder, live_restore=live_restore)
    engine.start()
    return engine


def can_start() -> bool:
    """Whether this machine can run a private engine."""
    return os.geteuid() == 0 and all(map(shutil.which, ("dockerd", "containerd", "runc")))


def unavailable(what: str) -> None:
    """Skip, or fail where an engine is required."""
    required = os.environ.get("PREFBUILD_TEST_DOCKER") == "require"
    (pytest.fail if required else pytest.skip)(what)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an engine that answers; the same one for all parallel workers."""
    given = os.environ.get("DOCKER_HOST")
    if given:
        yield given
        return
    if not can_start():
        unavailable("no container engine: set DOCKER_HOST, or run as root with dockerd installed")
    with pytest.MonkeyPatch.context() as patch, _shared_engine(tmp_path_factory) as host:
        patch.setenv("DOCKER_HOST", host)
        yield host


@contextmanager
def _shared_engine(factory: pytest.TempPathFactory) -> Iterator[str]:
    """One private engine for all workers: the first starts it, the last to end stops it."""
    shared = _shared_folder(factory)
    folder = Path("/tmp") / f"prefbuild-engine-{os.getuid()}-{_key(shared)}"
    users = shared / "engine-users"
    with _alone(shared / "engine.lock"):
        count = int(users.read_text()) if users.exists() else 0
        if count == 0:
            # The data of an earlier run may hold the images still; a tidy engine is worth more than the minutes.
            Engine(folder).stop()
            start(folder)
        users.write_text(str(count + 1))
    try:
        yield f"unix://{folder}/sock"
    finally:
        with _alone(shared / "engine.lock"):
            count = int(users.read_text()) - 1
            users.write_text(str(count))
            if count == 0:
                _stop_by_pid(folder)


def _stop_by_pid(folder: Path) -> None:
    # The worker that started it may have ended, so its process is known by its pid file alone.
    engine = Engine(folder)
    if engine.answers():
        engine.remove_containers()
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (folder / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    engine.stop()


@pytest.fixture(scope="session")
def base_image(engine: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tag of a small Debian with Python, made by containers/debian-base.sh where the engine lacks it."""
    import docker

    with _alone(_shared_folder(tmp_path_factory) / "images.lock"):
        client = docker.from_env()
        try:
            client.images.get(BASE_IMAGE)
        except docker.errors.ImageNotFound:
            if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
                unavailable(f"no image {BASE_IMAGE}, and making it needs root and mmdebstrap")
            _make_base(tmp_path_factory.mktemp("base"))
        finally:
            client.close()
    return BASE_IMAGE


def _make_base(folder: Path) -> None:
    """Debian, with the certificates, index and wheels that pip on this machine has been told of."""
    certificate = next((os.environ[key] for key in ("PIP_CERT", "SSL_CERT_FILE") if os.environ.get(key)), None)
    links = os.environ.get("PIP_FIND_LINKS", "")
    settings = ["[global]"]
    options: list[str] = []
    if certificate:
        options += ["--certificate", certificate]
        settings.append("cert = /etc/ssl/certs/ca-certificates.crt")
    if os.environ.get("PIP_INDEX_URL"):
        settings.append(f"index-url = {os.environ['PIP_INDEX_URL']}")
    if links and any(Path(links).glob("*.whl")):
        options += ["--wheels", links]
        settings.append("find-links = /opt/wheels")
    (folder / "pip.conf").write_text("\n".join(settings) + "\n")
    run(
        folder, str(ROOT / "containers/debian-base.sh"), "--tag", BASE_IMAGE,
        "--pip-conf", str(folder / "pip.conf"), *options, timeout=600, PYTHON=sys.executable,
    )  # fmt: skip


@pytest.fixture(scope="session")
def cpu_image(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ID of the CPU image of this code, built as a user builds it.

    Two minutes and more where the engine has no layers of it: mark what uses it with a timeout of 900.
    """
    from prefbuild.lock import locked_image, read_lock

    with _alone(_shared_folder(tmp_path_factory) / "images.lock"):
        folder = empty_project(tmp_path_factory.mktemp("image"))
        build = ("prefbuild", "image", "build", "cpu", "--base", base_image, "--network", "host")
        run(folder, *build, timeout=1200, **SECRETS)
    return str(locked_image(read_lock(folder), "cpu")["id"])


def empty_project(folder: Path) -> Path:
    """The least that prefbuild takes for a project."""
    (folder / "recipes").mkdir(parents=True)
    (folder / "params.yaml").write_text("seed: 42\n")
    return folder


def _shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all parallel workers of one run share."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def _key(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(str(folder).encode()).hexdigest()[:8]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mounts_under(folder: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]
