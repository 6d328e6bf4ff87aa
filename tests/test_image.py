"""Images: what goes into a build and what does not, pins, and the image at work."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from engine import SECRETS, empty_project
from project import ROOT, run

from prefbuild import image, yamlfile
from prefbuild.errors import UsageError
from prefbuild.job import OFFLINE
from prefbuild.lock import LOCK, read_lock

pytestmark = pytest.mark.timeout(900)  # the first to need the image may have to build it
# A role that is built in a second, for tests of the builder.
SMALL = "ARG BASE=prefbuild-test-base\nFROM ${BASE}\n"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = empty_project(tmp_path / "project")
    yield folder
    if (folder / LOCK).exists():
        remove_images(folder)


def build(root: Path, role: str, base: str, *more: str, code: int = 0, **env: str) -> str:
    command = ("prefbuild", "image", "build", role, "--base", base, "--network", "host", *more)
    return run(root, *command, code=code, timeout=900, **env)


def write_role(root: Path, role: str, text: str) -> None:
    (root / "containers").mkdir(exist_ok=True)
    (root / "containers" / f"{role}.Dockerfile").write_text(text)


def remove_images(root: Path) -> None:
    """Remove what a test has built, but the CPU image of this code, which other tests use."""
    import docker

    for id in set(re.findall(r"^    id: (sha256:[0-9a-f]{64})$", (root / LOCK).read_text(), re.MULTILINE)):
        client = docker.from_env()
        with suppress(docker.errors.ImageNotFound):
            labels = client.images.get(id).labels
            if (labels["prefbuild.role"], labels["prefbuild.code"]) != ("cpu", image.code_digest()):
                client.images.remove(id, force=True)


def pinned(root: Path, role: str) -> str:
    return str(read_lock(root)["images"][role]["id"])


def inspect(id: str) -> dict[str, Any]:
    from prefbuild.engine import connect

    attributes: dict[str, Any] = connect().images.get(id).attrs
    return attributes


def run_image(id: str, *command: str, **settings: Any) -> str:
    """Run the image as the runner does: any user, no network, nothing to write but /tmp."""
    from prefbuild.engine import connect

    options = {
        "user": "12345:12345",
        "read_only": True,
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "tmpfs": {"/tmp": "mode=1777"},
        **settings,
    }
    output: bytes = connect().containers.run(id, list(command), remove=True, stdout=True, stderr=True, **options)
    return output.decode()


# ---- without an engine


def test_the_same_files_give_the_same_context_whatever_their_times_and_owners(root: Path) -> None:
    write_role(root, "small", SMALL)
    (root / "containers/tool").write_text("#!/bin/sh\n")
    (root / "containers/tool").chmod(0o700)
    first = image._context(image._context_files(root, "small")).read()
    os.utime(root / "containers/tool", (1, 1))
    (root / "containers/tool").chmod(0o755)
    (root / "containers/.netrc").write_text("password")
    (root / "containers/tool~").write_text("password")
    assert image._context(image._context_files(root, "small")).read() == first
    (root / "containers/tool").write_text("#!/bin/sh\n#\n")
    assert image._context(image._context_files(root, "small")).read() != first


def test_tracking_is_for_dockerfiles_that_take_it(root: Path) -> None:
    write_role(root, "small", SMALL)
    with pytest.raises(UsageError, match=r"containers/small.Dockerfile: takes no --tracking; write `ARG TRACKING=`"):
        image.build(root, "small", tracking=True)


def test_a_projects_file_takes_the_place_of_the_shipped_one(root: Path) -> None:
    write_role(root, "cpu", SMALL)
    files = image._context_files(root, "cpu")
    assert files["cpu.Dockerfile"] == root / "containers/cpu.Dockerfile"
    assert files["requirements-cpu.txt"] == image.SHIPPED / "requirements-cpu.txt"
    assert files["prefbuild/worker.py"] == ROOT / "prefbuild/worker.py"
    assert not [name for name in files if "__pycache__" in name or name.startswith("prefbuild/templates/containers")]


def test_a_wheel_of_prefbuild_holds_the_dockerfiles_and_the_same_code(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("prefbuild", "containers"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(tmp_path, sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    installed = tmp_path / "installed"
    zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).extractall(installed)
    code = "from prefbuild import image; print(image.PACKAGE, image.code_digest(), *image._files(image.SHIPPED))"
    package, digest, *shipped = run(installed, sys.executable, "-c", code, PYTHONPATH=str(installed)).split()
    assert Path(package) == installed / "prefbuild"
    assert digest == image.code_digest()
    assert shipped == sorted(path.name for path in (ROOT / "containers").iterdir())


def test_roles_that_cant_be_are_refused_with_a_likely_one(root: Path) -> None:
    assert run(root, "prefbuild", "image", "build", "cpuu", code=2) == (
        "prefbuild: cpuu: no containers/cpuu.Dockerfile here, and none comes with prefbuild; did you mean cpu?\n"
    )
    assert run(root, "prefbuild", "image", "lock", "../cpu", "x", code=2) == (
        "prefbuild: ../cpu: is no role of an image; use lower-case letters, digits and -, at most 32\n"
    )


def test_a_base_for_a_dockerfile_that_takes_none_is_refused(root: Path) -> None:
    write_role(root, "small", "FROM debian\n")
    with pytest.raises(UsageError) as error:
        image._base(root / "containers/small.Dockerfile", root, "x")
    assert str(error.value) == (
        "containers/small.Dockerfile: takes no --base; begin it with `ARG BASE=...` and `FROM ${BASE}`"
    )


def test_a_tag_in_the_lock_is_refused_with_its_line(tmp_path: Path) -> None:
    root = empty_project(tmp_path / "project")
    document = {"version": 1, "sources": {}, "tasks": {}, "images": {"cpu": {"id": "cpu:latest", "repo_digest": None}}}
    (root / LOCK).write_text(yamlfile.dump(document))
    assert run(root, "prefbuild", "image", "list", code=3) == (
        "prefbuild: prefbuild.lock.yaml:6: images.cpu.id: cpu:latest is not an image ID (sha256:<64 hex digits>); "
        "remove the entry and run `prefbuild image build cpu`, or `prefbuild image lock cpu REFERENCE`\n"
    )


def test_the_list_works_without_an_engine(tmp_path: Path) -> None:
    root = empty_project(tmp_path / "project")
    entry = {"id": f"sha256:{'a' * 64}", "repo_digest": f"registry.invalid/x@sha256:{'b' * 64}"}
    (root / LOCK).write_text(yamlfile.dump({"version": 1, "sources": {}, "tasks": {}, "images": {"cpu": entry}}))
    lines = run(root, "prefbuild", "image", "list", DOCKER_HOST="unix:///no/such/socket").splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["cpu", "aaaaaaaaaaaa", "registry.invalid/x@sha256:bbbbbbbbbbbb", "?", "?", "?", "?"],
        ["cuda", "no", "-", "-", "-", "-", "-"],
    ]
    assert lines[3].startswith("no container engine answers at unix:///no/such/socket")


@pytest.mark.parametrize("command", ["build", "lock", "list"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"example:\n  prefbuild image {command}" in run(ROOT, "prefbuild", "image", command, "--help")


@pytest.mark.parametrize("path", sorted((ROOT / "containers").glob("requirements-*.txt")), ids=lambda path: path.name)
def test_every_requirement_has_hashes_and_the_version_of_the_constraints(path: Path) -> None:
    def key(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    constraints = dict(re.findall(r"^([^=#\s]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    wanted = {key(name): version for name, version in constraints.items()}
    blocks = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).strip())
    for block in blocks:
        found = re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", block)
        assert found and re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
        name, version = key(found[1]), found[2]
        if name == "torch" and "cpu" in path.name:
            version = version.removesuffix("+cpu")
        assert version == wanted.get(name, version), block


@pytest.mark.parametrize("path", sorted((ROOT / "containers").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_the_shipped_dockerfiles_pin_their_base_and_set_what_jobs_count_on(path: Path) -> None:
    text = path.read_text()
    base = image.BASE.search(text)
    assert base and re.fullmatch(r"[a-z0-9./_:-]+@sha256:[0-9a-f]{64}", base[1])
    assert re.findall(r"^ARG (\w+)=", text, re.MULTILINE) == ["BASE", "TRACKING"]
    for name, value in OFFLINE.items():
        assert f"{name}={value}" in text


# ---- with one


def test_a_build_pins_the_id_and_a_second_changes_nothing(cpu_image: str, base_image: str, root: Path) -> None:
    output = build(root, "cpu", base_image)
    assert output.splitlines()[-1] == f"pinned image cpu: {cpu_image}"
    before = (root / LOCK).read_bytes()
    started = time.monotonic()
    output = build(root, "cpu", base_image)
    assert output.splitlines()[-1] == "image cpu: nothing changed"
    assert time.monotonic() - started < 30
    assert (root / LOCK).read_bytes() == before
    assert read_lock(root)["images"] == {"cpu": {"id": cpu_image, "repo_digest": None}}
    row = run(root, "prefbuild", "image", "list").splitlines()[1]
    assert row.startswith(f"cpu   {cpu_image[7:19]}  no             has it  ")
    assert row.endswith("  up to date")


def test_the_image_says_what_it_is_made_of_and_is_set_for_jobs(cpu_image: str, base_image: str) -> None:
    config = inspect(cpu_image)["Config"]
    assert config["Labels"] == {
        "prefbuild.role": "cpu",
        "prefbuild.version": image.__version__,
        "prefbuild.code": image.code_digest(),
        "prefbuild.base": inspect(base_image)["Id"],
    }
    assert config["Entrypoint"] == [image.PYTHON]
    assert config["WorkingDir"] == "/project"
    assert config["User"] == "65534:65534"
    env = dict(item.split("=", 1) for item in config["Env"])
    offline = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **OFFLINE}
    assert {key: env.get(key) for key in offline} == offline


def test_changed_code_gives_another_image_on_the_same_packages(
    cpu_image: str, base_image: str, root: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "prefbuild", copy / "prefbuild", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "prefbuild/rows.py", "a") as file:
        file.write(f"# changed {tmp_path}\n")
    build(root, "cpu", base_image)
    started = time.monotonic()
    command = ("-m", "prefbuild", "image", "build", "cpu", "--base", base_image, "--network", "host")
    output = run(root, sys.executable, *command, PYTHONPATH=str(copy))
    assert time.monotonic() - started < 60
    changed = pinned(root, "cpu")
    assert changed != cpu_image
    assert output.splitlines()[-2:] == [
        f"changed image cpu: {cpu_image[:19]}.. -> {changed}",
        "stages that ran in the old image will run again: `prefbuild status` says which",
    ]
    old, new = (inspect(id)["RootFS"]["Layers"] for id in (cpu_image, changed))
    assert (len(new), new[:-2]) == (len(old), old[:-2])
    assert "pip install" not in output
    # This machine's own code is the old one.
    assert run(root, "prefbuild", "image", "list").splitlines()[1].endswith("  other")
    output = run(root, "prefbuild", "image", "lock", "other", changed)
    assert output.splitlines()[0] == f"pinned image other: {changed}"
    assert output.splitlines()[1].startswith("warning: it holds prefbuild 0.1.0 with other code than this one (0.1.0)")


def test_locking_by_tag_pins_the_id(cpu_image: str, root: Path) -> None:
    tag = f"prefbuild-cpu:{cpu_image[7:19]}"
    assert run(root, "prefbuild", "image", "lock", "cpu", tag) == f"pinned image cpu: {cpu_image}\n"
    assert pinned(root, "cpu") == cpu_image
    assert run(root, "prefbuild", "image", "lock", "cpu", cpu_image) == "image cpu: nothing changed\n"


def test_what_cant_be_locked_is_said(base_image: str, engine: str, root: Path) -> None:
    assert run(root, "prefbuild", "image", "lock", "cpu", "no/such:1", code=7) == (
        f"prefbuild: no/such:1: is not in the engine at {engine}, and is not pulled by itself; "
        f"run `docker pull no/such:1`, then this again\n"
    )
    assert run(root, "prefbuild", "image", "lock", "cpu", base_image, code=4) == (
        f"prefbuild: {base_image}: is not an image of prefbuild (its entrypoint is None, its labels are none); "
        f"build one with `prefbuild image build cpu`\n"
    )
    assert not (root / LOCK).exists()


def test_the_image_works_for_any_user_on_a_read_only_root_without_network(cpu_image: str) -> None:
    code = """
import os, socket
import torch, trl, peft, bitsandbytes, bitsandbytes.cextension, lm_eval, datasets, prefbuild.worker
assert os.getuid() == 12345
assert type(bitsandbytes.cextension.lib).__name__ == "BNBNativeLibrary"
assert prefbuild.__file__.startswith("/opt/prefbuild/code/")
hidden = [path for path, _, names in os.walk("/opt/prefbuild") for name in (".", *names) if not os.access(os.path.join(path, name), os.R_OK)]
assert not hidden, hidden
try:
    open("/project/x", "w")
except OSError as error:
    print(error.strerror)
print(torch.ones(2).sum().item())
"""
    assert run_image(cpu_image, "-c", code).splitlines()[-2:] == ["Read-only file system", "2.0"]


def test_a_folder_of_the_project_is_not_taken_for_a_module(cpu_image: str, tmp_path: Path) -> None:
    (tmp_path / "prefbuild").mkdir()
    (tmp_path / "prefbuild/__init__.py").write_text("raise SystemExit('the project was imported')\n")
    code = "import prefbuild; print(prefbuild.__file__)"
    output = run_image(cpu_image, "-c", code, volumes={str(tmp_path): {"bind": "/project", "mode": "ro"}})
    assert output == "/opt/prefbuild/code/prefbuild/__init__.py\n"


def test_no_secret_of_the_caller_is_in_the_image(cpu_image: str) -> None:
    from prefbuild.engine import connect

    wanted = [value.encode() for value in SECRETS.values()] + [b"prefbuildTestSecret"]
    saved = connect().images.get(cpu_image)
    assert "prefbuildTestSecret" not in f"{saved.attrs} {saved.history()}"
    control = (ROOT / "prefbuild/worker.py").read_bytes()[:100]  # what is in the image is found
    rest, seen = b"", False
    for chunk in saved.save(chunk_size=1 << 22):  # layers in it are not compressed
        text = rest + chunk
        assert not [secret for secret in wanted if secret in text]
        seen = seen or control in text
        rest = text[-100:]
    assert seen


def test_a_builds_commands_see_nothing_of_the_callers_environment(base_image: str, root: Path) -> None:
    write_role(root, "small", SMALL + f"# {root}\nRUN env | sort > /environment\n")
    build(root, "small", base_image, **SECRETS)
    output = run_image(pinned(root, "small"), "cat", "/environment")
    assert {line.split("=")[0] for line in output.splitlines()} <= {"HOME", "PATH", "PWD", "HOSTNAME", "SHLVL", "_"}


def test_a_package_with_another_hash_stops_the_build(base_image: str, root: Path) -> None:
    text = (ROOT / "containers/requirements-build.txt").read_text()
    (root / "containers").mkdir()
    (root / "containers/requirements-build.txt").write_text(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", text))
    output = build(root, "cpu", base_image, code=7)
    error = output.split("prefbuild: image cpu: cpu.Dockerfile (prefbuild's own): Step 5/")[1]
    assert "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE" in error
    assert "returned a non-zero code: 1" in error.splitlines()[-1]
    assert not (root / LOCK).exists()


def test_a_build_without_network_is_told_of_the_option(base_image: str, root: Path) -> None:
    write_role(
        root, "small", SMALL + f"# {root}\nRUN python3 -c \"import urllib.request as r; r.urlopen('http://x.y')\"\n"
    )
    output = run(root, "prefbuild", "image", "build", "small", "--base", base_image, "--network", "none", code=7)
    assert "prefbuild: image small: containers/small.Dockerfile: Step 3/" in output
    assert "the build may have had no network: `--network host` uses this machine's" in output


def test_a_base_that_cant_be_had_is_said(engine: str, root: Path) -> None:
    output = build(root, "cpu", "registry.invalid/no/such:1", code=7)
    assert "pulling the base registry.invalid/no/such:1\n" in output
    assert f"the base registry.invalid/no/such:1 is not in the engine at {engine} and could not be pulled: " in output
    assert "give one that it has or reaches with --base IMAGE" in output
    output = build(root, "cpu", f"sha256:{'0' * 64}", code=7)
    assert "pulling" not in output
    assert "an ID names what an engine has" in output


def test_ctrl_c_ends_the_build_and_leaves_no_container(base_image: str, root: Path) -> None:
    from prefbuild.engine import connect

    mark = f"sleep 600 # {root}"
    write_role(root, "small", SMALL + f"RUN {mark}\n")
    command = ["prefbuild", "image", "build", "small", "--base", base_image]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    client = connect()

    def left() -> list[Any]:
        return [one for one in client.api.containers(all=True) if mark in one["Command"]]

    assert process.stdout is not None
    while "Step 3/" not in (line := process.stdout.readline()):
        assert line, "the build ended"
    wait_for(lambda: bool(left()))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    wait_for(lambda: not left())
    assert not (root / LOCK).exists()


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)
