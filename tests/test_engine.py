"""Reaching the engine: one that does not answer, may not be used, or lacks an image."""

import os
import socket
from pathlib import Path

import pytest

from prefbuild import engine
from prefbuild.errors import StageError


def problem() -> str:
    with pytest.raises(StageError) as error:
        engine.connect()
    return str(error.value)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("unix:///no/such/socket", "No such file or directory"),
        ("tcp://127.0.0.1:1", "Connection refused"),
        ("nonsense://x", "Invalid bind address protocol: nonsense://x"),
    ],
)
def test_no_engine_is_said_with_the_address_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, host: str, reason: str
) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    assert problem() == (
        f"no container engine answers at {host} ({reason}); start it (`sudo systemctl start docker`), "
        f"or set DOCKER_HOST to the address of one that runs, such as unix:///run/user/1000/docker.sock"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_a_socket_that_may_not_be_used_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o600)
        monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/socket")
        problem()  # imports all it needs while this is root still
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                os.write(write, problem().encode())
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        assert os.read(read, 10_000).decode() == (
            f"no permission to use the container engine at unix://{path}; add yourself to its group "
            f"(`sudo usermod -aG docker $USER`, then log in again), or run a rootless engine and set DOCKER_HOST"
        )
        os.close(read)


def test_an_image_is_found_by_its_id(engine: str, base_image: str) -> None:
    from prefbuild.engine import connect, find_image

    client = connect()
    id = client.images.get(base_image).id
    assert find_image(client, {"id": id, "repo_digest": None}, "cpu").id == id


def test_a_missing_image_is_said_with_the_command_that_gets_it_and_never_pulled(engine: str) -> None:
    from prefbuild.engine import connect, find_image

    client = connect()
    digest = f"registry.invalid/x@sha256:{'b' * 64}"
    for repo_digest, how in (
        (digest, f"run `docker pull {digest}`"),
        (
            None,
            "it is in no registry: bring it with `docker save` and `docker load` from where it was built, "
            "or run `prefbuild image build cpu` (a new image: what ran in the old one runs again)",
        ),
    ):
        with pytest.raises(StageError) as error:
            find_image(client, {"id": f"sha256:{'a' * 64}", "repo_digest": repo_digest}, "cpu")
        assert str(error.value) == f"image cpu (sha256:aaaaaaaaaaaa) is not in the engine at {engine}; {how}"
