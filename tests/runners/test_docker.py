"""Containers of a real engine: what is inside, every way they end, and that none remains."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from engine import SECRETS, can_start, start, unavailable
from project import git, make_project, run

DRIVER = Path(__file__).with_name("in_container.py")
WRITE = "import os; os.makedirs('/out/build/test'); open('/out/build/test/out.txt', 'w').write('{}')\n"
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
MiB = 2**20

pytestmark = pytest.mark.timeout(900)


class Bench:
    """A folder to run jobs in, an image, and the engine that has it."""

    def __init__(self, folder: Path, image: str, host: str):
        self.folder, self.image, self.host = folder, image, host
        self.client = docker.DockerClient(base_url=host)

    def start(self, code: str, **asked: object) -> subprocess.Popen:
        options = {"env": {**os.environ, "DOCKER_HOST": self.host, **asked.pop("env", {})}}
        words = json.dumps({"code": code, "image": self.image, **asked})
        return subprocess.Popen(
            [sys.executable, str(DRIVER), words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )

    def end(self, process: subprocess.Popen, code: int, timeout: float = 120) -> str:
        text, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, text
        assert self.containers() == []
        return text

    def run(self, code: str, *, exit_code: int = 0, **asked: object) -> str:
        return self.end(self.start(code, **asked), exit_code)

    def containers(self) -> list[str]:
        """Of this folder, in any state."""
        found = self.client.api.containers(all=True, filters={"label": f"prefbuild.project={self.folder}"})
        return [container["Id"] for container in found]

    def running(self, process: subprocess.Popen) -> str:
        """The container's ID once its program runs; fails with what the process said when it ended instead."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            for id in self.containers():
                with suppress(
                    docker.errors.NotFound
                ):  # an engine lists a container a moment before it can be asked about
                    if b"ready" in self.client.api.logs(id):
                        return id
            time.sleep(0.05)
        raise AssertionError("no container runs")

    @property
    def output(self) -> Path:
        return self.folder / "build/test/out.txt"


def small_image(client: docker.DockerClient, base: str) -> str:
    """Python without libraries, started as our images are."""
    text = f'FROM {base}\nENTRYPOINT ["python3"]\nLABEL prefbuild.code=test\n'.encode()
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    context.seek(0)
    image, _ = client.images.build(fileobj=context, custom_context=True, network_mode="none", rm=True)
    return str(image.id)


@pytest.fixture
def bench(engine: str, base_image: str, tmp_path: Path) -> Bench:
    client = docker.DockerClient(base_url=engine)
    return Bench(tmp_path, small_image(client, base_image), engine)


@pytest.fixture(scope="module")
def built(cpu_image: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe built whole in containers, by the public command."""
    folder = make_project(tmp_path_factory.mktemp("docker") / "project", tiny_model)
    run(folder, "prefbuild", "image", "lock", "cpu", cpu_image)
    git(folder, "commit", "-qam", "image")
    run(folder, "prefbuild", "build", "--runner", "docker", timeout=600)
    return folder


# ---- a build


def test_a_whole_build_runs_in_the_pinned_image(built: Path, cpu_image: str, engine: str) -> None:
    made = json.loads((built / "build/first/train.json").read_text())
    assert made["machine"]["image"] == cpu_image
    for stage in ("train-first", "merge-first", "evaluate-first", "gate-first", "report-report"):
        assert (built / f"build/.work/logs/{stage}.log").stat().st_size > 0
    assert json.loads((built / "build/first/gate.json").read_text())["passed"] is True
    left = docker.DockerClient(base_url=engine).containers.list(
        all=True, filters={"label": f"prefbuild.project={built}"}
    )
    assert left == []
    assert not list((built / "build/.work").glob("train-first*"))


def test_a_container_and_this_machine_make_the_same_adapter(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(built, folder, symlinks=True)
    adapter = folder / "build/first/adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    for runner in ("docker", "local"):
        shutil.rmtree(folder / "build/first/adapter")
        run(folder, "prefbuild", "stage", "train", "first", "--runner", runner)
        assert adapter.read_bytes() == before, runner


def test_limits_run_nothing_again_and_gpus_do(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(built, folder, symlinks=True)
    recipe = folder / "recipes/first.yaml"
    text = recipe.read_text()
    recipe.write_text(text + "compute: {memory: 3GiB, time_limit: 1h}\n")
    assert "up to date: only resolve would run" in run(folder, "prefbuild", "status")
    recipe.write_text(text + "compute: {gpus: 1, image: cpu}\n")
    assert "compute.gpus 0 -> 1" in run(folder, "prefbuild", "status")


def test_a_new_image_runs_everything_again(built: Path, engine: str, base_image: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(built, folder, symlinks=True)
    lock = folder / "prefbuild.lock.yaml"
    old = json.loads((folder / "build/.resolved/first.json").read_text())["train"]["image"]
    lock.write_text(lock.read_text().replace(old, "sha256:" + "ab" * 32))
    assert f"the image it runs in {old[:19]} -> sha256:abababababab" in run(folder, "prefbuild", "status")
    text = run(folder, "prefbuild", "build", "--runner", "docker", code=7)
    assert "image cpu (sha256:abababababab) is not in the engine" in text
    assert "docker load" in text
    assert "Running stage" not in text  # said before DVC starts


def test_without_a_pinned_image_the_command_that_makes_one_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", tiny_model)
    run(folder, "prefbuild", "resolve")
    text = run(folder, "prefbuild", "stage", "model", next((folder / "build/.resolved/models").iterdir()).stem, code=0)
    assert "done in" in text  # without an image, on this machine
    text = run(folder, "prefbuild", "stage", "data", next((folder / "build/.resolved/data").iterdir()).stem,
               "--runner", "docker", code=4)  # fmt: skip
    assert "image cpu is not pinned" in text and "prefbuild image build cpu" in text


# ---- inside

FACTS = """
import json, os, socket, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
def refused(do):
    try: do()
    except OSError as error: return type(error).__name__ + " " + os.strerror(error.errno or 0)
    return ""
facts = {
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "capabilities": [status[key].strip() for key in ("CapEff", "CapPrm", "CapBnd")],
    "no_new_privileges": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "root": refused(lambda: open("/usr/x", "w")), "input": refused(lambda: open("rows/a.txt", "w")),
    "project": refused(lambda: open("/project/x", "w")),
    "interfaces": os.listdir("/sys/class/net"),
    "connect": refused(lambda: socket.create_connection(("1.1.1.1", 53), 2)),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "tmp": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
    "tmp_options": [line.split()[3] for line in open("/proc/mounts") if line.split()[1] == "/tmp"][0].split(","),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "parent": open("/proc/1/comm").read().strip(), "pid": os.getpid(),
    "environment": dict(os.environ), "cwd": os.getcwd(), "read": open("rows/a.txt").read(),
}
def fork():
    for _ in range(200):
        if os.fork() == 0: __import__("time").sleep(5); os._exit(0)
facts["forks"] = refused(fork)
open("/project/build/.work/train-test/x/checkpoint", "w").write("kept")
os.makedirs("/out/build/test"); json.dump(facts, open("/out/build/test/out.txt", "w"))
"""


def test_what_a_stage_can_do_inside(bench: Bench) -> None:
    rows = bench.folder / "rows"
    rows.mkdir()
    (rows / "a.txt").write_text("rows")
    bench.run(FACTS, inputs=["rows"], env=SECRETS)
    facts = json.loads(bench.output.read_text())
    assert (facts["uid"], facts["gid"]) == (os.getuid(), os.getgid())
    assert facts["capabilities"] == ["0" * 16] * 3
    assert facts["no_new_privileges"] == "1"
    assert facts["seccomp"] == "2"
    assert "Read-only" in facts["root"] and "Read-only" in facts["input"] and "Read-only" in facts["project"]
    assert facts["interfaces"] == ["lo"]
    assert "unreachable" in facts["connect"]
    assert (facts["shm"], facts["tmp"]) == (64 * MiB, 1 * MiB)
    assert {"noexec", "nosuid", "nodev"} <= set(facts["tmp_options"])
    assert facts["core"] == 0
    assert facts["pid"] != 1  # an init is, which passes signals on
    assert "temporarily unavailable" in facts["forks"]
    assert facts["cwd"] == "/project" and facts["read"] == "rows"
    # Nothing of the caller's environment but what is named crosses.
    assert not {"PATH_INFO", *SECRETS} & set(facts["environment"])
    assert not any(secret in json.dumps(facts) for secret in SECRETS.values())
    assert bench.output.stat().st_uid == os.getuid()


def test_no_secret_of_the_caller_is_in_the_container_or_its_log(bench: Bench) -> None:
    process = bench.start(SLEEP, env=SECRETS)
    about = json.dumps(bench.client.api.inspect_container(bench.running(process)))
    process.send_signal(signal.SIGTERM)
    text = bench.end(process, 130)
    log = (bench.folder / "build/.work/logs/train-test.log").read_text()
    for secret in SECRETS.values():
        assert secret not in about + text + log
    assert "ready" in log


def test_links_in_inputs_are_followed_as_caches_make_them(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (cache / "blob").write_text("absolute")
    rows = bench.folder / "hub/snapshots/main"
    (bench.folder / "hub/blobs").mkdir(parents=True)
    (bench.folder / "hub/blobs/1").write_text("relative")
    rows.mkdir(parents=True)
    (rows / "a").symlink_to(cache / "blob")
    (rows / "b").symlink_to("../../blobs/1")
    read = "text = ' '.join(open(f'hub/snapshots/main/{name}').read() for name in 'ab')\n"
    bench.run(read + WRITE.replace("'{}'", "text"), inputs=["hub/snapshots/main"])
    assert bench.output.read_text() == "absolute relative"
    (rows / "c").symlink_to("../../blobs/2")
    assert "c: is a link to ../../blobs/2, which is not there" in bench.run(
        "", inputs=["hub/snapshots/main"], exit_code=7
    )


def test_output_comes_as_it_is_written(bench: Bench) -> None:
    """A progress bar redraws its line: it ends in a carriage return, and must not wait for a newline."""
    process = bench.start(
        "import time\nfor i in range(3): print(f'\\r{i} of 3', end='', flush=True); time.sleep(1)\n" + WRITE
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen = b""
    while b"\r0 of 3" not in seen:
        assert process.poll() is None
        seen += process.stdout.buffer.read() or b""
        time.sleep(0.02)
    assert b"2 of 3" not in seen
    os.set_blocking(process.stdout.fileno(), True)
    bench.end(process, 0)
    assert "\r2 of 3" in (bench.folder / "build/.work/logs/train-test.log").read_bytes().decode()


def test_on_a_terminal_the_stage_has_a_terminal(bench: Bench) -> None:
    leader, follower = pty.openpty()
    code = "import sys, os; print('tty', sys.stderr.isatty(), os.environ['COLUMNS'])\n" + WRITE
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), json.dumps({"code": code, "image": bench.image})],
        cwd=bench.folder,
        env={**os.environ, "DOCKER_HOST": bench.host, "COLUMNS": "123"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    assert process.wait(60) == 0
    assert b"tty True 123" in os.read(leader, 10_000)
    os.close(leader)
    os.close(follower)


def test_an_ordinary_user_gets_files_of_their_own(bench: Bench) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user; then every other test here runs as an ordinary user")
    folder = Path(tempfile.mkdtemp(prefix="prefbuild-", dir="/tmp"))
    os.chown(folder, 12345, 12345)
    mine = Bench(folder, bench.image, bench.host)
    code = "import os; assert (os.getuid(), os.getgid()) == (12345, 12345)\n" + WRITE.format("mine")
    try:
        mine.run(code, uid=12345, group=os.stat(bench.host.removeprefix("unix://")).st_gid)
        assert mine.output.read_text() == "mine" and mine.output.stat().st_uid == 12345
    finally:
        shutil.rmtree(folder)


# ---- how it ends


def test_memory_of_the_container(bench: Bench) -> None:
    text = bench.run("x = bytearray(400 << 20)", limits={"memory": 100 * MiB}, exit_code=7)
    assert "train test: out of memory: it had 0.1 GiB (compute.memory); raise compute.memory" in text


def test_memory_of_a_child_whose_parent_goes_on(bench: Bench) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)'])\n" + WRITE
    text = bench.run(code, limits={"memory": 100 * MiB}, exit_code=7)
    assert "a process in it was killed for memory though the stage went on, so its result can't be trusted" in text
    assert not bench.output.exists()


def test_a_child_killed_for_memory_is_noticed_inside_too(engine: str, cpu_image: str, tmp_path: Path) -> None:
    """Engines that do not report it (Podman) are helped by the worker, which reads the kernel's counter."""
    bench = Bench(tmp_path, cpu_image, engine)
    code = (
        "import subprocess, sys; from prefbuild.worker import killed_for_memory\n"
        "before = killed_for_memory()\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)'])\n"
        "print('killed', before, killed_for_memory())"
    )
    assert "killed 0 1" in bench.run(code, limits={"memory": 100 * MiB}, exit_code=7)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "was killed from outside (SIGKILL): by a person (`docker kill`)"),
        ("stop", "was stopped from outside (SIGTERM, `docker stop`)"),
        ("remove", "somebody removed its container while it ran"),
    ],
)
def test_ended_by_somebody_else(bench: Bench, how: str, message: str) -> None:
    process = bench.start(SLEEP)
    id = bench.running(process)
    if how == "kill":
        bench.client.api.kill(id)
    elif how == "stop":
        bench.client.api.stop(id)
    else:
        bench.client.api.remove_container(id, force=True)
    assert message in bench.end(process, 7)


def test_time_limit(bench: Bench) -> None:
    text = bench.run(SLEEP, limits={"time_limit": 2.0}, exit_code=7)
    assert "ran past compute.time_limit (2 s) and was stopped; raise it" in text


def test_exit_codes_come_through(bench: Bench) -> None:
    assert "ended with exit code 5; its log is build/.work/logs/train-test.log" in bench.run("exit(5)", exit_code=5)


def test_full_tmp_is_named_with_the_key_that_makes_it_larger(engine: str, cpu_image: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, cpu_image, engine)
    code = (
        "from prefbuild.worker import explain\n"
        "try: open('/{}/x', 'wb').write(bytes(100 << 20))\n"
        "except OSError as error: print(explain(error)); exit(7)"
    )
    text = bench.run(code.format("tmp"), exit_code=7)
    assert "no space left: /tmp (0.00 GiB) is full; raise compute.tmp_size" in text
    assert "/dev/shm (0.06 GiB) is full; raise compute.shm_size" in bench.run(code.format("dev/shm"), exit_code=7)


def test_a_full_disk_under_the_checkpoints(built: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "project"
    shutil.copytree(built, folder, symlinks=True)
    shutil.rmtree(folder / "build/first/adapter")
    work = folder / "build/.work/train-first"
    work.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(work)], check=True)
    try:
        text = run(folder, "prefbuild", "stage", "train", "first", "--runner", "docker", code=7)
    finally:
        subprocess.run(["umount", str(work)], check=True)
    assert "no space left: " in text and "free space on the disk that holds build/" in text
    assert not (folder / "build/first/adapter").exists()
    run(folder, "prefbuild", "stage", "train", "first", "--runner", "docker")
    assert (folder / "build/first/adapter/manifest.json").exists()


def test_image_missing(bench: Bench) -> None:
    bench.image = "sha256:" + "12" * 32
    text = bench.run("", exit_code=7)
    assert "image cpu (sha256:121212121212) is not in the engine at unix://" in text
    assert "prefbuild image build cpu" in text


def test_gpu_missing(bench: Bench) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has one")
    text = bench.run("", gpus=1, exit_code=7)
    assert "could not select device driver" in text
    assert "install the NVIDIA Container Toolkit" in text and "compute.gpus: 0" in text


def test_a_gpu_that_was_promised_and_is_not_there(engine: str, cpu_image: str, tmp_path: Path) -> None:
    """Podman runs a container without the GPU that was asked for: the worker looks for itself."""
    bench = Bench(tmp_path, cpu_image, engine)
    code = "import os; os.environ['PREFBUILD_GPUS'] = '1'; from prefbuild.worker import check_gpus; check_gpus()"
    assert "the torch of the container (2.13.0+cpu) computes on no GPU" in bench.run(code, exit_code=1)


@pytest.mark.gpu
def test_a_gpu_is_seen_inside(engine: str, tmp_path: Path) -> None:
    """With PREFBUILD_TEST_CUDA_IMAGE: the ID of an image made from cuda.Dockerfile that the engine has."""
    image = os.environ.get("PREFBUILD_TEST_CUDA_IMAGE")
    if not image or not os.path.exists("/dev/nvidia0"):
        pytest.skip("needs a GPU and PREFBUILD_TEST_CUDA_IMAGE")
    bench = Bench(tmp_path, image, engine)
    code = (
        "import os; os.environ['PREFBUILD_GPUS'] = '1'\n"
        "from prefbuild.worker import check_gpus, explain; check_gpus()\n"
        "import torch; x = torch.ones(4096, 4096, device='cuda', dtype=torch.bfloat16); print((x @ x).sum().item())\n"
        "try: torch.empty(2**50, device='cuda')\n"
        "except RuntimeError as error: print(explain(error))\n"
        "os.environ['PREFBUILD_GPU_MEMORY'] = str(300 * 2**30)\n"
        "try: check_gpus()\n"
        "except Exception as error: print(error)\n"
        "print('compiled', torch.compile(lambda a: (a * 2 + 1).relu().sum())(x).item())\n"
    )
    text = bench.run(code + WRITE, gpus=1, limits={"tmp_size": 64 * MiB, "pids": 4096})
    assert "prefbuild: GPU 0: " in text
    assert "out of GPU memory; lower train.per_device_train_batch_size" in text
    assert "compute.gpu_memory is 300 GiB, and " in text
    assert "compiled 50331648.0" in text  # Triton's compiler needs a folder that programs can run from


def test_no_engine(bench: Bench) -> None:
    process = bench.start("", env={"DOCKER_HOST": f"unix://{bench.folder}/none"})
    assert "no container engine answers at unix://" in bench.end(process, 7)


# ---- what it leaves

SPECIAL = {
    "is a FIFO": "os.mkfifo('/out/build/test/pipe')",
    "is a symbolic link": "os.symlink('/etc/passwd', '/out/build/test/link')",
    "is a setuid file": "open('/out/build/test/x', 'w').close(); os.chmod('/out/build/test/x', 0o4755)",
    "is a file with 2 names (hard links)": "os.link('/out/build/test/out.txt', '/out/build/test/again')",
    "is a socket": "import socket; socket.socket(socket.AF_UNIX).bind('/out/build/test/s')",
}


@pytest.mark.parametrize("what", SPECIAL)
def test_only_plain_files_are_taken(bench: Bench, what: str) -> None:
    bench.output.parent.mkdir(parents=True)
    bench.output.write_text("old")
    text = bench.run(WRITE + SPECIAL[what], exit_code=7)
    assert "the stage left what is no plain file or folder" in text and what in text
    assert bench.output.read_text() == "old"
    assert sorted(path.name for path in bench.output.parent.iterdir()) == ["out.txt"]


def test_outputs_that_are_missing(bench: Bench) -> None:
    assert "ended well and left no build/test/out.txt" in bench.run("", exit_code=7)


# ---- signals and crashes


@pytest.mark.parametrize("signal_at", ["before create", "after create", "before start", "after start"])
def test_interrupted_while_it_starts(bench: Bench, signal_at: str) -> None:
    started = time.monotonic()
    bench.run(SLEEP, signal_at=signal_at, exit_code=130)
    assert time.monotonic() - started < 20
    assert not bench.output.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_it_runs(bench: Bench, number: signal.Signals) -> None:
    process = bench.start(SLEEP)
    bench.running(process)
    process.send_signal(number)
    bench.end(process, 130, timeout=20)


def test_a_stage_that_ignores_signals_is_ended_all_the_same(bench: Bench) -> None:
    process = bench.start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    bench.running(process)
    process.send_signal(signal.SIGINT)
    bench.end(process, 130, timeout=25)


def test_it_ends_with_the_dvc_above_it(bench: Bench) -> None:
    """A killed `dvc repro` must not leave its stage running."""
    above = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()",
            sys.executable,
            str(DRIVER),
            json.dumps({"code": SLEEP, "image": bench.image}),
        ],
        cwd=bench.folder,
        env={**os.environ, "DOCKER_HOST": bench.host, "DVC_STAGE": "train"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    bench.running(above)
    above.kill()
    above.wait()
    deadline = time.monotonic() + 20
    while bench.containers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert bench.containers() == []


def test_what_a_crash_left_is_cleaned_and_nothing_else(bench: Bench) -> None:
    crashed, alive = bench.start(SLEEP), None
    dead = bench.running(crashed)
    crashed.kill()
    crashed.communicate()
    created = bench.client.containers.create(bench.image, labels=bench.client.containers.get(dead).labels)
    foreign = bench.client.containers.create(bench.image, labels={"somebody": "else"})
    other = Bench(bench.folder / "other", bench.image, bench.host)
    other.folder.mkdir()
    try:
        alive = other.start(SLEEP)
        lives = other.running(alive)
        text = run(bench.folder, "prefbuild", "clean", "--containers", DOCKER_HOST=bench.host)
        assert f"removed {dead[:12]} (train test, running, of {bench.folder})" in text
        assert f"removed {created.id[:12]} (train test, created" in text
        assert f"left {lives[:12]} (train test, running, of {other.folder}): process {alive.pid} waits for it" in text
        assert bench.containers() == [] and other.containers() == [lives]
        foreign.reload()
    finally:
        foreign.remove(force=True)
        if alive is not None:
            alive.terminate()
            other.end(alive, 130)


def test_the_next_run_removes_what_a_crashed_one_left(bench: Bench) -> None:
    crashed = bench.start(SLEEP)
    left = bench.running(crashed)
    crashed.kill()
    crashed.communicate()
    text = bench.run(WRITE)
    assert f"removing container {left[:12]}, left by a run that was killed" in text


# ---- an engine that goes away

TICKS = "import time\nprint('ready', flush=True)\nfor i in range(10): print('tick', i, flush=True); time.sleep(1)\n"


@pytest.fixture(scope="module")
def saved_image(engine: str, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    client = docker.DockerClient(base_url=engine)
    id = small_image(client, base_image)
    path = tmp_path_factory.mktemp("saved") / "image.tar"
    with open(path, "wb") as file:
        for chunk in client.images.get(id).save(chunk_size=8 << 20):
            file.write(chunk)
    return id, path


@pytest.fixture
def private(
    saved_image: tuple[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Bench, object]]:
    """A bench on an engine of its own, to be killed; `request.param`: whether containers survive that."""
    if not can_start():
        unavailable("killing an engine needs one of our own: root, with dockerd installed")
    folder = Path(tempfile.mkdtemp(prefix="prefbuild-engine-", dir="/tmp"))
    daemon = start(folder, live_restore=request.param)
    try:
        bench = Bench(tmp_path, saved_image[0], daemon.host)
        with open(saved_image[1], "rb") as file:
            bench.client.api.load_image(file)
        yield bench, daemon
    finally:
        daemon.stop()


@pytest.mark.parametrize("private", [True], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_engine_restarts_and_the_stage_goes_on(private: tuple, number: signal.Signals) -> None:
    bench, daemon = private
    process = bench.start(TICKS + WRITE.format("whole"))
    bench.running(process)
    daemon.kill(number)
    time.sleep(2)
    daemon.start()
    text = bench.end(process, 0)
    assert "went away; waiting" in text
    assert "the engine is back, and the stage went on meanwhile" in text
    assert all(f"tick {i}" in text for i in range(10))
    assert bench.output.read_text() == "whole"


@pytest.mark.parametrize("private", [False], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_engine_restarts_and_takes_the_stage_with_it(private: tuple, number: signal.Signals) -> None:
    bench, daemon = private
    process = bench.start(SLEEP)
    bench.running(process)
    daemon.kill(number)
    time.sleep(1)
    daemon.start()
    text = bench.end(process, 7)
    assert "the engine stopped during the run and took the container with it" in text
    assert "live-restore" in text


@pytest.mark.parametrize("private", [True], indirect=True)
def test_interrupted_while_the_engine_is_away(private: tuple) -> None:
    bench, daemon = private
    process = bench.start(SLEEP)
    left = bench.running(process)
    daemon.kill(signal.SIGKILL)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 7
    assert f"its container {left[:12]} can't be stopped from here" in text and "prefbuild clean --containers" in text
    daemon.start()
    assert f"removed {left[:12]}" in run(bench.folder, "prefbuild", "clean", "--containers", DOCKER_HOST=bench.host)
    assert bench.containers() == []
