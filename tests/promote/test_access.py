"""Asked before training: could the promotion write to the Hub? The real client in processes of its own."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hub import OTHER, READ, WRITE, Hub
from project import RECIPE, ROOT, run

from prefbuild.artifact import write_json

FINE = "hf_" + "f" * 34
ASK = """
import sys
from prefbuild.promote.access import CouldNotAsk, write_access
try:
    print(write_access(sys.argv[1], sys.argv[2] == "private"))
except CouldNotAsk as error:
    print("could not ask:", error)
"""


def ask(hub: Hub, repo: str, token: str | None = WRITE, *, private: bool = True, **env: str) -> str:
    """What `write_access` returns, or why it could not ask."""
    argv = (sys.executable, "-c", ASK, repo, "private" if private else "public")
    said = run(hub.folder, *argv, **{**hub.env(token), **env}).rstrip("\n")
    assert not [one for one in hub.log if one.method != "GET"]
    assert not token or token not in said
    return said


def test_who_can_write_is_told_nothing(hub: Hub) -> None:
    assert ask(hub, "me/new") == "None"
    assert ask(hub, "our-team/new") == "None"
    assert list(hub.repos) == []
    hub.put("me/model", {"config.json": b"{}"}, private=True)
    hub.put("me/open", {"config.json": b"{}"}, gated=True)
    assert ask(hub, "me/model") == "None"
    assert ask(hub, "me/model", private=False) == "None"
    assert ask(hub, "me/open", private=False) == "None"


def test_who_can_not_is_told_why(hub: Hub) -> None:
    hub.put("me/model", {"config.json": b"{}"}, private=True)
    hub.put("me/open", {"config.json": b"{}"})
    assert ask(hub, "me/new", None) == "you are not logged in to the Hub; log in with `hf auth login`"
    assert ask(hub, "me/new", "hf_" + "x" * 34) == (
        "the Hub does not accept your token: it is mistyped, expired or revoked; unset HF_TOKEN if it is set, and log in "
        "again with `hf auth login`"
    )
    assert ask(hub, "me/model", READ) == (
        f"your token can only read; make one that can write, at {hub.url}/settings/tokens, and log in with it"
    )
    foreign = "you are other, in no organisation; correct promote.repo"
    for repo in ("me/model", "me/open", "me/new"):  # and no word on what is private
        assert ask(hub, repo, OTHER) == f"me is neither you nor an organisation of yours: {foreign}"
    assert ask(hub, "other/new") == (
        "other is neither you nor an organisation of yours: you are me and in our-team; correct promote.repo"
    )
    assert ask(hub, "me/open") == (
        "everybody can see me/open, and the recipe says promote.private: true; make it private in its settings on the "
        "Hub, or write private: false"
    )


def scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"_id": "1", "type": kind, "name": name}, "permissions": list(permissions)}


def test_a_fine_grained_token_is_asked_for_its_scopes(hub: Hub) -> None:
    hub.put("me/model", {"config.json": b"{}"}, private=True)
    user = hub.users[FINE] = {"name": "me", "role": "fineGrained", "orgs": ["our-team"], "scoped": []}
    tokens = f"{hub.url}/settings/tokens"
    made = f"your fine-grained token can't make repositories of me; let the token write to me, at {tokens}"
    assert ask(hub, "me/new", FINE) == made
    assert ask(hub, "me/model", FINE) == (
        f"me/model is there, and you can't write to it; let the token write to me/model, at {tokens}"
    )
    user["scoped"] = [scope("user", "me", "repo.content.read"), scope("model", "me/model", "repo.write")]
    assert ask(hub, "me/model", FINE) == "None"
    assert ask(hub, "me/new", FINE) == made
    user["scoped"] = [scope("user", "me", "repo.content.read", "repo.write")]
    assert ask(hub, "me/new", FINE) == ask(hub, "me/model", FINE) == "None"
    assert ask(hub, "our-team/new", FINE).startswith("your fine-grained token can't make repositories of our-team; ")
    user["scoped"] = [{"entity": "me"}]  # of a shape that is not known here
    assert ask(hub, "me/new", FINE) == "None"


def test_a_member_who_may_only_read(hub: Hub) -> None:
    hub.put("our-team/model", {"config.json": b"{}"}, private=True)
    hub.users[WRITE] = {"name": "me", "role": "write", "orgs": ["our-team"], "read_only_orgs": ["our-team"]}
    assert ask(hub, "our-team/new") == (
        "you may only read in our-team, where our-team/new would be made; ask its owners for write access"
    )
    assert ask(hub, "our-team/model") == (
        "our-team/model is there, and you can't write to it; ask the owners of our-team for write access"
    )


def test_no_answer_is_no_answer(hub: Hub) -> None:
    assert ask(hub, "me/new", HF_HUB_OFFLINE="1") == "could not ask: HF_HUB_OFFLINE is set"
    said = ask(hub, "me/new", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("could not ask: the Hub can't be reached at http://127.0.0.1:9: ")
    hub.put("me/model", {"config.json": b"{}"})
    for path in ("/whoami-v2", "/models/me/model$", "/auth-check/write"):
        fault = hub.fault("status", "GET", path, status=500, times=9)
        assert ask(hub, "me/model") == "could not ask: the Hub answered 500" and fault.seen
        hub.faults.clear()
    hub.fault("drop-before", "GET", "/auth-check", times=9)
    assert ask(hub, "me/model").startswith("could not ask: the Hub can't be reached at ")


@pytest.fixture
def trainable(tmp_path: Path) -> Path:
    """A project where only training is left, which has no base to train and so fails at once."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (folder / "recipes/first.yaml").write_text(RECIPE)
    for name in ("model", "prepared"):
        (folder / "build" / name).mkdir(parents=True)
    return folder


def train(hub: Hub, project: Path, token: str | None, to: str = "hub", stage: str = "train", **env: str) -> str:
    """Run the stage of a recipe that promotes; returns what it said."""
    section = {
        "version": 1,
        "image": None,
        "gpus": 0,
        "inputs": {"model": "build/model", "prepared": "build/prepared"},
        "outputs": {"out": "build/out"},
        "settings": {},
    }
    places = {"hub": {"to": "hub", "repo": "me/model", "private": True}, "directory": {"to": "directory"}}
    compute = dict.fromkeys(("repo_digest", "gpu_memory", "memory", "time_limit"))
    compute |= {"role": "cpu", "shm_size": 2**26, "tmp_size": 2**26, "pids": 64}
    sections = {stage: section, "promote": {"settings": {"promote": places[to]}}, "compute": compute}
    write_json(project / "build/.resolved/first.json", sections)
    return run(project, "prefbuild", "stage", stage, "first", code=None, **{**hub.env(token), **env})


REFUSED = (
    "prefbuild: train first: training would end in a model that you can't promote to me/model: your token can only "
    "read; make one that can write, at {url}/settings/tokens, and log in with it. To train all the same: "
    "PREFBUILD_TRAIN_ANYWAY=1\n"
)


def test_training_begins_only_when_its_model_can_be_promoted(hub: Hub, trainable: Path) -> None:
    assert train(hub, trainable, READ) == REFUSED.format(url=hub.url)
    assert not (trainable / "build/.work").exists()
    for token, env in ((WRITE, {}), (READ, {"PREFBUILD_TRAIN_ANYWAY": "1"})):
        said = train(hub, trainable, token, **env)
        assert "promote" not in said and (trainable / "build/.work").exists(), said
    said = train(hub, trainable, READ, HF_HUB_OFFLINE="1")
    assert said.splitlines()[0] == (
        "prefbuild: whether first can be promoted to me/model is not known: HF_HUB_OFFLINE is set"
    )
    assert "prefbuild: train first: build/prepared/manifest.json: is missing" in said  # the stage itself


def test_other_stages_and_other_places_ask_nothing(hub: Hub, trainable: Path) -> None:
    train(hub, trainable, READ, stage="merge")
    train(hub, trainable, READ, to="directory")
    assert hub.log == []
    loaded = "[name for name in ('huggingface_hub', 'prefbuild.promote', 'torch') if name in sys.modules]"
    stage = f"import sys; from prefbuild.cli import main; main(['stage', 'train', 'first']); print({loaded})"
    assert run(trainable, sys.executable, "-c", stage).splitlines()[-1] == "[]"
