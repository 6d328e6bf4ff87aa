"""Projects that promote to the test hub, by the public commands in processes of their own."""

import json
from pathlib import Path

import pytest
from hub import OTHER, READ, WRITE, Hub
from project import run

from prefbuild.promote import signing
from tests import built

REPO = "me/x"


@pytest.fixture
def promoting(root: Path) -> Path:
    """A whole build whose recipe promotes to the Hub."""
    to_hub(root)
    return root


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    signing.keygen(folder, None)
    return folder


def to_hub(root: Path, **changes: object) -> None:
    built.write_recipe(root, "x", gates=built.GATES, promote={"to": "hub", "repo": REPO, **changes})
    built.resolve_all(root)
    built.lock(root)
    built.git(root, "add", "-A")
    built.git(root, "commit", "-qm", "promote to the Hub")


def rebuild(root: Path, loss: float) -> None:
    """Another build of the same recipe."""
    built.edit(root / "build/x/train.json", lambda metrics: metrics.update(loss=loss))
    built.judge(root)
    built.lock(root)


def prefbuild(hub: Hub, root: Path, *arguments: str, token: str | None = WRITE, code: int = 0, **env: str) -> str:
    said = run(root, "prefbuild", *arguments, code=code, **{**hub.env(token), "XDG_CONFIG_HOME": str(root), **env})
    assert "Traceback" not in said and not any(secret in said for secret in (WRITE, READ, OTHER))
    return said


def records(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "promotions.jsonl").read_text().splitlines()]


def tags(hub: Hub) -> dict[str, str]:
    return dict(hub.repos[f"models/{REPO}"]["tags"])
