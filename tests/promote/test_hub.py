"""Promotion to the Hub: the real client in processes of its own, against the test hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import OTHER, READ, WRITE, Hub
from onhub import REPO, prefbuild, rebuild, records, tags, to_hub
from project import RECIPE, make_project, run

from prefbuild.artifact import sha256_file
from prefbuild.promote import signing, version
from tests import built

# ---- a whole life


@pytest.mark.timeout(600)
def test_lock_fetch_build_promote_verify_again_second_version_rollback(
    hub: Hub, tiny_model: Path, keys: Path, tmp_path: Path
) -> None:
    root = make_project(tmp_path / "project", tiny_model)
    hub.put("me/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    rows = (root / "recipes/rows/train.jsonl").read_bytes()
    data = hub.put("me/rows", {"train.jsonl": rows}, kind="dataset")
    text = RECIPE.replace("source: file\n  path: models/tiny\n", "source: hub\n  repo: me/tiny\n")
    text = text.replace("source: file\n      path: recipes/rows/train.jsonl\n", "source: hub\n      repo: me/rows\n")
    text = text.replace("to: directory\n  path: registry", f"to: hub\n  repo: {REPO}\n  card: recipes/about.md")
    (root / "recipes/first.yaml").write_text(text)
    (root / "recipes/about.md").write_text("Made for a test.\n")
    signed = {"PREFBUILD_KEY": str(keys), "PREFBUILD_TRAIN_ANYWAY": ""}

    prefbuild(hub, root, "lock")
    prefbuild(hub, root, "sync")
    built.git(root, "add", "-A")
    built.git(root, "commit", "-qm", "from the Hub to the Hub")
    prefbuild(hub, root, "build", "first", **signed)
    built.git(root, "add", "-A")
    built.git(root, "commit", "-qm", "built")
    assert f"promoted first v1: {REPO}@v1 (commit " in prefbuild(hub, root, "promote", "first", **signed)
    first = tags(hub)["v1"]
    said = prefbuild(hub, root, "verify", f"{REPO}@v1", **signed)
    assert said.startswith(f"{REPO}@v1 is first v1, commit {first[:8]}, built from git commit ")
    assert "is a good OpenSSF signature" in said and "2 of 2 rules passed" in said
    assert "already there: nothing changed" in prefbuild(hub, root, "promote", "first", **signed)
    assert hub.history(REPO)[0] == first and len(records(root)) == 1

    (root / "recipes/first.yaml").write_text(text.replace("A tiny model", "A second version"))
    built.git(root, "commit", "-qam", "other words")
    run(root, "dvc", "repro", "-q")
    built.git(root, "commit", "-qam", "built")
    assert "promoted first v2" in prefbuild(hub, root, "promote", "first", **signed)
    assert f"rolled first back to v1, as v3: {REPO}@v3" in prefbuild(hub, root, "rollback", "first", **signed)
    assert hub.tree(REPO) == hub.tree(REPO, "v1") == hub.tree(REPO, "v3") != hub.tree(REPO, "v2")
    assert f"{REPO}@v3 is first v1" in prefbuild(hub, root, "verify", f"{REPO}@v3", **signed)
    assert "no version was promoted before it" in prefbuild(hub, root, "rollback", "first", code=9, **signed)
    assert list(tags(hub)) == ["v1", "v2", "v3"] and len(hub.history(REPO)) == 4  # with the Hub's own first commit
    shown = prefbuild(hub, root, "promotions").splitlines()
    assert [line.split()[1:3] for line in shown[1:3]] == [["first", "v1"], ["first", "v2"]] and "v3 (= v1)" in shown[3]
    assert [line["version"] for line in json.loads(prefbuild(hub, root, "promotions", "--json"))] == ["v1", "v2", "v3"]

    card = hub.read(REPO, "README.md").decode()
    assert "Made for a test." in card and data[:8] in card and "datasets:\n- me/rows" in card
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({REPO!r}, revision='v1')"
    run(root, sys.executable, "-c", code, **{**hub.env(WRITE), "TRANSFORMERS_OFFLINE": "0"})
    places = [path for folder in (root, hub.folder / "blobs") for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in places if WRITE.encode() in path.read_bytes()]


# ---- what goes wrong


def at_once(hub: Hub, roots: list[Path]) -> list[tuple[int, str]]:
    """Promote from several projects, so that every one has looked before any commits."""
    hub.fault("gather", "POST", "/commit/", times=len(roots), seconds=60)
    env = {**os.environ, **hub.env(WRITE)}
    command = ["prefbuild", "promote", "x"]
    options = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, cwd=root, **options) for root in roots]
    return [(process.wait(timeout=120), process.communicate()[0]) for process in processes]


def test_four_builds_at_once_one_wins(hub: Hub, promoting: Path, tmp_path: Path) -> None:
    hub.put(REPO, {}, private=True)
    roots = [Path(shutil.copytree(promoting, tmp_path / f"copy {i}")) for i in range(4)]
    for i, root in enumerate(roots):
        rebuild(root, 0.1 + i / 10)
    ended = at_once(hub, roots)
    assert sorted(code for code, _ in ended) == [0, 9, 9, 9]
    (winner,) = [said for code, said in ended if code == 0]
    assert f"promoted x v1: {REPO}@v1 (commit {tags(hub)['v1'][:8]})\n" in winner
    for code, said in ended:
        assert code == 0 or "somebody else was faster: main is v1 of another build now; nothing of yours was" in said
    assert len(hub.history(REPO)) == 3 and list(tags(hub)) == ["v1"]
    assert sum((root / "promotions.jsonl").exists() for root in roots) == 1


def test_four_of_one_build_at_once_publish_it_once(hub: Hub, promoting: Path, tmp_path: Path) -> None:
    hub.put(REPO, {}, private=True)
    roots = [Path(shutil.copytree(promoting, tmp_path / f"copy {i}")) for i in range(4)]
    ended = at_once(hub, roots)
    assert [code for code, _ in ended] == [0, 0, 0, 0], ended
    assert sum("already there: nothing changed" in said for _, said in ended) == 3
    assert sum("is published by somebody else at the same time" in said for _, said in ended) == 3
    assert len(hub.history(REPO)) == 3 and list(tags(hub)) == ["v1"]
    assert len({json.dumps(records(root)) for root in roots}) == 1


def test_a_rollback_that_was_cut_off_is_finished(hub: Hub, promoting: Path) -> None:
    prefbuild(hub, promoting, "promote", "x")
    rebuild(promoting, 0.4)
    prefbuild(hub, promoting, "promote", "x")
    hub.fault("status", "POST", "/tag/", times=9)
    said = prefbuild(hub, promoting, "rollback", "x", code=9)
    assert "is on main, and could not be tagged v3" in said and list(tags(hub)) == ["v1", "v2"]
    hub.faults.clear()
    assert "rolled x back to v1, as v3" in prefbuild(hub, promoting, "rollback", "x")
    assert len(hub.history(REPO)) == 4 and list(tags(hub)) == ["v1", "v2", "v3"]
    assert [(line["version"], line.get("same_as")) for line in records(promoting)] == [("v1", None), ("v2", None), ("v3", "v1")]  # fmt: skip


def test_a_build_that_was_rolled_back_is_not_published_again_but_asked_for(hub: Hub, promoting: Path) -> None:
    prefbuild(hub, promoting, "promote", "x")
    rebuild(promoting, 0.4)
    prefbuild(hub, promoting, "promote", "x")
    prefbuild(hub, promoting, "rollback", "x")
    said = prefbuild(hub, promoting, "promote", "x")
    assert "v3 is current since then; `prefbuild rollback x --to v2` brings this build back" in said
    assert "promoted x v2" in said and list(tags(hub)) == ["v1", "v2", "v3"]
    assert "rolled x back to v2, as v4" in prefbuild(hub, promoting, "rollback", "x", "--to", "v2")
    assert hub.tree(REPO) == hub.tree(REPO, "v2")
    assert "has no version v9; it has v1, v2, v3, v4" in prefbuild(
        hub, promoting, "rollback", "x", "--to", "v9", code=9
    )
    assert "holds the files of v2 already" in prefbuild(hub, promoting, "rollback", "x", "--to", "v2", code=9)


def test_files_that_no_promotion_put_there_are_left_alone(hub: Hub, promoting: Path) -> None:
    hub.put(REPO, {"notes.md": b"mine"}, private=True)
    said = prefbuild(hub, promoting, "promote", "x", code=9)
    assert f"{REPO}: main holds files that no promotion put there (notes.md)" in said and "--replace" in said
    assert len(hub.history(REPO)) == 2
    assert "promoted x v1" in prefbuild(hub, promoting, "promote", "x", "--replace")
    assert "notes.md" not in hub.tree(REPO)
    hub.put(REPO, {"README.md": b"# better\n"})
    rebuild(promoting, 0.4)
    said = prefbuild(hub, promoting, "promote", "x", code=9)
    assert "main was changed since v1:\n  README.md: gitBlob is " in said
    assert "promoted x v2" in prefbuild(hub, promoting, "promote", "x", "--replace")


def test_another_recipes_repository_is_refused(hub: Hub, promoting: Path) -> None:
    prefbuild(hub, promoting, "promote", "x")
    statement = hub.read(REPO, version.STATEMENT)
    made = signing.read_statement(statement, "it")[0]
    made["predicate"]["buildDefinition"]["externalParameters"]["name"] = "other"
    hub.put(REPO, {version.STATEMENT: signing.sign_statement(made, None)})
    rebuild(promoting, 0.4)
    assert "main holds other v1, another recipe's model" in prefbuild(hub, promoting, "promote", "x", code=9)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "you are not logged in to the Hub; log in with `hf auth login`"),
        (READ, "your token can only read"),
        (OTHER, "me is neither you nor an organisation of yours: you are other"),
        ("hf_" + "x" * 34, "the Hub does not accept your token"),
    ],
)
def test_who_may_not_write_makes_nothing(hub: Hub, promoting: Path, token: str | None, says: str) -> None:
    said = prefbuild(hub, promoting, "promote", "x", token=token, code=9)
    assert says in said and not hub.repos and (token is None or token not in said)


def test_what_is_meant_to_be_private_is_not_published_for_all(hub: Hub, promoting: Path) -> None:
    hub.put(REPO, {}, private=False)
    assert "everybody can see" in prefbuild(hub, promoting, "promote", "x", code=9)
    hub.repos.clear()
    prefbuild(hub, promoting, "promote", "x")
    assert hub.repos[f"models/{REPO}"]["private"] is True
    to_hub(promoting, private=False)
    hub.repos.clear()
    prefbuild(hub, promoting, "promote", "x")
    assert hub.repos[f"models/{REPO}"]["private"] is False


def test_no_network_and_offline_say_so(hub: Hub, promoting: Path) -> None:
    said = prefbuild(hub, promoting, "promote", "x", code=9, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub can't be reached at http://127.0.0.1:9" in said
    assert "HF_HUB_OFFLINE is set" in prefbuild(hub, promoting, "promote", "x", code=9, HF_HUB_OFFLINE="1")


def test_a_place_of_this_machine_in_the_recipe_is_not_published(hub: Hub, promoting: Path) -> None:
    rows = promoting.parent / "rows.jsonl"
    shutil.copy(promoting / "recipes/rows/train.jsonl", rows)
    data = {**built.RECIPE["data"], "sources": [{"source": "file", "path": str(rows)}]}
    built.write_recipe(promoting, "x", gates=built.GATES, data=data, promote={"to": "hub", "repo": REPO})
    built.resolve_all(promoting)
    said = prefbuild(hub, promoting, "promote", "x", code=9)
    assert f"names {rows}, a place on this machine" in said and not hub.repos


def test_xet_carries_the_same_bytes(hub: Hub, promoting: Path, keys: Path) -> None:
    xet = {"HF_HUB_DISABLE_XET": "0", "PREFBUILD_KEY": str(keys)}
    prefbuild(hub, promoting, "promote", "x", **xet)
    assert not hub.requests("POST", "/info/lfs/objects/batch") and hub.requests("GET", "/xet-write-token/")
    assert hub.tree(REPO)["model.safetensors"] == sha256_file(promoting / "build/x/merged/model.safetensors")
    shutil.rmtree(hub.folder / "home")
    assert "is a good OpenSSF signature" in prefbuild(hub, promoting, "verify", f"{REPO}@v1", **xet)
    shutil.rmtree(hub.folder / "home")
    assert "is a good OpenSSF signature" in prefbuild(hub, promoting, "verify", f"{REPO}@v1", PREFBUILD_KEY=str(keys))
