"""Reach the container engine: the client, and the images the lock pins.

The engine is Docker or what speaks its API, where DOCKER_HOST says (default: the machine's own socket).
"""

import os
from typing import TYPE_CHECKING, Any

from prefbuild.errors import StageError

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.images import Image

DEFAULT_HOST = "unix:///var/run/docker.sock"
# Starting a container on a busy machine can take a while; a longer silence means that the engine hangs.
TIMEOUT = 120


def connect() -> "DockerClient":
    """A client of the engine, which has answered. StageError says which address was asked and what to do."""
    import docker
    import requests

    try:
        client = docker.from_env(timeout=TIMEOUT)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError, ValueError) as error:
        raise StageError(_no_engine(error)) from None
    return client


def is_podman(client: "DockerClient") -> bool:
    """Whether the engine is Podman, which takes some requests without a word and does not fulfil them."""
    return any("podman" in part.get("Name", "").lower() for part in client.version().get("Components") or [])


def address() -> str:
    """Where the engine is asked."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_HOST


def find_image(client: "DockerClient", entry: dict[str, Any], role: str) -> "Image":
    """The image that the lock pins for a role, by its id, then by its repo_digest. Never pulls.

    An engine with another image store knows the same image by another id, but not by another repo_digest.
    StageError names the command that gets an image that is not there.
    """
    import docker

    for reference in (entry["id"], entry["repo_digest"]):
        if reference is None:
            continue
        try:
            return client.images.get(reference)
        except docker.errors.ImageNotFound:
            continue
        except docker.errors.APIError as error:
            raise StageError(f"image {role}: the engine at {address()} failed: {error}") from None
    if entry["repo_digest"] is not None:
        how = f"run `docker pull {entry['repo_digest']}`"
    else:
        how = (
            f"it is in no registry: bring it with `docker save` and `docker load` from where it was built, "
            f"or run `prefbuild image build {role}` (a new image: what ran in the old one runs again)"
        )
    raise StageError(f"image {role} ({entry['id'][:19]}) is not in the engine at {address()}; {how}")


def _no_engine(error: Exception) -> str:
    where = address()
    causes = _causes(error)
    if any(isinstance(cause, PermissionError) for cause in causes):
        return (
            f"no permission to use the container engine at {where}; add yourself to its group "
            f"(`sudo usermod -aG docker $USER`, then log in again), or run a rootless engine and set DOCKER_HOST"
        )
    # The innermost exception says it shortest: "Connection refused", "No such file or directory".
    reasons = [getattr(cause, "strerror", None) or str(cause) for cause in reversed(causes)]
    reason = next((text for text in reasons if text), type(error).__name__)
    return (
        f"no container engine answers at {where} ({reason}); start it (`sudo systemctl start docker`), "
        f"or set DOCKER_HOST to the address of one that runs, such as unix:///run/user/1000/docker.sock"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The exception and those inside it: requests and urllib3 wrap the system's own in their arguments."""
    found: list[BaseException] = []
    todo: list[BaseException] = [error]
    while todo:
        one = todo.pop(0)
        if one in found:
            continue
        found.append(one)
        inner = [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
        todo += [item for item in inner if isinstance(item, BaseException)]
    return found
