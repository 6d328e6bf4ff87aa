"""The test hub, against the real client in processes of its own: it reads HF_ENDPOINT when it is imported."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hub import OTHER, READ, WRITE, Hub
from project import ROOT

BEGIN = """
import hashlib, json, os, pathlib, sys, time
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi, hf_hub_download, snapshot_download
api = HfApi()
def answer(value):
    print("ANSWER" + json.dumps(value))
def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
"""


def client(hub: Hub, code: str, token: str | None = WRITE, **env: str) -> Any:
    """Run code with the real client; returns what it gives to answer()."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(code)],
        env={**os.environ, **hub.env(token), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^ANSWER(.*)$", done.stdout, re.MULTILINE)
    return json.loads(found[1]) if found else None


def test_a_folder_goes_up_and_comes_down(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "up"
    (folder / "sub").mkdir(parents=True)
    hub.part_size = 1000
    files = {
        "README.md": b"---\nlicense: mit\n---\n# A model\n",
        "config.json": b"{}",
        "empty.txt": b"",
        "sub/small.safetensors": b"one part" * 10,
        "model.safetensors": bytes(range(256)) * 13,
    }
    for path, content in files.items():
        (folder / path).write_bytes(content)
    down = client(
        hub,
        f"""
        api.create_repo("me/model", private=True)
        api.create_repo("me/model", exist_ok=True)
        info = api.upload_folder(repo_id="me/model", folder_path={str(folder)!r}, commit_message="first")
        down = snapshot_download("me/model", revision=info.oid)
        answer({{"oid": info.oid, "down": down}})
        """,
    )
    found = {
        path.relative_to(down["down"]).as_posix(): path for path in Path(down["down"]).rglob("*") if path.is_file()
    }
    assert {path: file.read_bytes() for path, file in found.items() if path != ".gitattributes"} == files
    assert hub.history("me/model")[0] == down["oid"]
    assert {path: hub.read("me/model", path) for path in files} == files
    assert len(hub.requests("PUT", r"/storage/[0-9a-f]+/0000[1-4]")) == 4  # 3328 bytes in parts of 1000
    assert all(request.user is None for request in hub.requests(path="^/storage/"))
    assert not list((hub.folder / "incoming").iterdir())


def test_commits_have_parents_and_a_stale_one_is_refused(hub: Hub) -> None:
    first = hub.put("me/model", {"a.txt": b"1", "old/b.txt": b"2", "old/c.txt": b"3"})
    answer = client(
        hub,
        f"""
        new = api.create_commit("me/model", [Add("a.txt", b"changed"), Delete("old/", is_folder=True)],
            commit_message="second", commit_description="key: 7", parent_commit={first!r})
        stale = error(api.create_commit, "me/model", [Add("a.txt", b"again")], commit_message="x", parent_commit={first!r})
        same = api.create_commit("me/model", [Add("a.txt", b"changed")], commit_message="no-op", parent_commit={first!r})
        listed = [[c.commit_id, c.title, c.message] for c in api.list_repo_commits("me/model")]
        answer({{"new": new.oid, "stale": stale, "same": same.oid, "listed": listed}})
        """,
    )
    assert answer["stale"] == ["HfHubHTTPError", 412]
    assert answer["same"] == answer["new"]  # the client makes no commit of what is there, whatever the parent
    assert answer["listed"][0] == [answer["new"], "second", "key: 7"]
    assert [commit for commit, *_ in answer["listed"]] == hub.history("me/model") and len(answer["listed"]) == 3
    assert set(hub.tree("me/model")) == {".gitattributes", "a.txt"}


def test_what_lies_there_is_not_sent_again(hub: Hub) -> None:
    hub.put("me/one", {"model.safetensors": b"weights"})
    hub.put("me/two", {})
    client(hub, 'api.create_commit("me/two", [Add("x.safetensors", b"weights")], commit_message="same bytes")')
    assert hub.read("me/two", "x.safetensors") == b"weights"
    assert not hub.requests("PUT")


def test_branches_and_tags(hub: Hub) -> None:
    first = hub.put("me/rows", {"a.jsonl": b"{}"}, kind="dataset")
    answer = client(
        hub,
        f"""
        of = {{"repo_id": "me/rows", "repo_type": "dataset"}}
        api.create_branch(**of, branch="work/one", revision=None)
        work = api.create_commit(**of, operations=[Add("a.jsonl", b"[]")], commit_message="x", revision="work/one")
        api.create_tag(**of, tag="v1", revision={first!r})
        twice = error(api.create_tag, **of, tag="v1", revision=work.oid)
        kept = api.create_tag(**of, tag="v1", revision=work.oid, exist_ok=True)
        refs = api.list_repo_refs(**of)
        shas = [api.dataset_info("me/rows", revision=r).sha for r in ("v1", "work/one", "main", {first!r})]
        missing = error(api.dataset_info, "me/rows", revision="v2")
        api.delete_tag(**of, tag="v1")
        api.delete_branch(**of, branch="work/one")
        answer({{"work": work.oid, "twice": twice, "missing": missing, "shas": shas,
            "refs": sorted([r.name, r.target_commit] for r in refs.branches + refs.tags)}})
        """,
    )
    work = answer["work"]
    assert answer["refs"] == sorted([["main", first], ["work/one", work], ["v1", first]])
    assert answer["shas"] == [first, work, first, first]
    assert (answer["twice"], answer["missing"]) == (["HfHubHTTPError", 409], ["RevisionNotFoundError", 404])
    assert hub.repos["datasets/me/rows"]["tags"] == {} and set(hub.repos["datasets/me/rows"]["branches"]) == {"main"}


def test_a_tree_comes_in_pages(hub: Hub) -> None:
    hub.page_size = 4
    hub.put("me/model", {f"d{n // 5}/file{n}.txt": b"%d" % n for n in range(15)} | {"m.safetensors": b"w"})
    answer = client(
        hub,
        """
        tree = list(api.list_repo_tree("me/model", recursive=True))
        answer({"files": {e.path: e.size for e in tree if hasattr(e, "size")},
            "folders": [e.path for e in tree if not hasattr(e, "size")],
            "lfs": [[e.path, e.lfs.sha256, e.lfs.size] for e in tree if getattr(e, "lfs", None)],
            "top": [e.path for e in api.list_repo_tree("me/model")],
            "below": [e.path for e in api.list_repo_tree("me/model", "d1", expand=True)],
            "none": error(lambda: list(api.list_repo_tree("me/model", "d9"))),
            "asked": [e.path for e in api.get_paths_info("me/model", ["d0/file1.txt", "none"])],
            "info": {s.rfilename: s.size for s in api.model_info("me/model", files_metadata=True).siblings}})
        """,
    )
    assert len(answer["files"]) == 17 and answer["files"] == answer["info"]
    assert answer["folders"] == ["d0", "d1", "d2"]
    assert answer["lfs"] == [["m.safetensors", hub.tree("me/model")["m.safetensors"], 1]]
    assert answer["top"] == [".gitattributes", "d0", "d1", "d2", "m.safetensors"]
    assert answer["below"] == [f"d1/file{n}.txt" for n in (5, 6, 7, 8, 9)]
    assert answer["none"] == ["RemoteEntryNotFoundError", 404] and answer["asked"] == ["d0/file1.txt"]
    assert len(hub.requests("GET", "cursor=.*recursive=true")) == 4  # 20 entries, 4 a page


def test_who_may_do_what(hub: Hub) -> None:
    hub.put("me/private", {"config.json": b"{}"}, private=True)
    hub.put("me/gated", {"config.json": b"{}"}, gated=True)
    hub.put("me/open", {"config.json": b"{}"})
    code = """
    do = {
        "who": lambda: api.whoami(),
        "private": lambda: hf_hub_download("me/private", "config.json"),
        "private info": lambda: api.model_info("me/private"),
        "gated": lambda: hf_hub_download("me/gated", "config.json"),
        "gated info": lambda: api.model_info("me/gated"),
        "gated check": lambda: api.auth_check("me/gated"),
        "missing": lambda: api.model_info("me/none"),
        "open": lambda: hf_hub_download("me/open", "config.json"),
        "write": lambda: api.create_commit("me/open", [Add("x", b"x")], commit_message="x"),
        "create": lambda: api.create_repo("me/new"),
        "delete": lambda: api.delete_repo("me/open"),
    }
    answer({what: error(function) for what, function in do.items() if error(function)})
    """
    stranger = client(hub, code, None, HF_HOME=str(hub.folder / "1"))
    assert stranger.pop("who")[0] == "LocalTokenNotFoundError"
    missing = {what: ["RepositoryNotFoundError", 401] for what in ("private", "private info", "missing")}
    gated = {what: ["GatedRepoError", 401] for what in ("gated", "gated check")}
    writes = {what: ["HfHubHTTPError", 401] for what in ("write", "create", "delete")}
    assert stranger == missing | gated | writes
    other = client(hub, code, OTHER, HF_HOME=str(hub.folder / "2"))
    missing = {what: ["RepositoryNotFoundError", 404] for what in ("private", "private info", "missing")}
    gated = {what: ["GatedRepoError", 403] for what in ("gated", "gated check")}
    writes = {what: ["HfHubHTTPError", 403] for what in ("write", "create", "delete")}
    assert other == missing | gated | writes
    reader = client(hub, code, READ, HF_HOME=str(hub.folder / "3"))
    assert reader == {"missing": ["RepositoryNotFoundError", 404]} | writes
    hub.repos["models/me/gated"]["granted"].append("other")
    assert "gated" not in client(hub, code, OTHER, HF_HOME=str(hub.folder / "4"))
    hub.revoked.add(WRITE)
    revoked = client(hub, code, WRITE, HF_HOME=str(hub.folder / "5"))
    assert {status for _, status in revoked.values()} == {401} and {kind for kind, _ in revoked.values()} == {
        "HfHubHTTPError"
    }


def test_a_repository_can_be_deleted(hub: Hub) -> None:
    hub.put("our-team/model", {"a": b"1"})
    client(hub, 'api.delete_repo("our-team/model")')
    assert not hub.repos


CHUNK = 10 * 1024 * 1024  # the client takes a body in pieces of this size, and loses a piece that it has not whole


def test_a_truncated_download_goes_on_where_it_ended(hub: Hub) -> None:
    hub.put("me/model", {"m.safetensors": bytes(range(256)) * (5 * CHUNK // 512)})
    hub.fault("truncate", "GET", "/storage/")
    answer = client(
        hub,
        'answer(hashlib.sha256(open(hf_hub_download("me/model", "m.safetensors"), "rb").read()).hexdigest())',
    )
    assert answer == hub.tree("me/model")["m.safetensors"]
    assert [request.range for request in hub.requests("GET", "/storage/")] == [None, f"bytes={CHUNK}-"]


def test_the_client_does_not_notice_a_flipped_bit(hub: Hub) -> None:
    """Downloads are only size-checked: whoever needs the bytes has to hash them."""
    hub.put("me/model", {"m.safetensors": b"weights" * 99})
    hub.fault("flip", "GET", "/storage/")
    answer = client(hub, 'answer(open(hf_hub_download("me/model", "m.safetensors"), "rb").read().decode("latin1"))')
    assert len(answer) == 7 * 99 and answer.encode("latin1") != b"weights" * 99


@pytest.mark.parametrize("do, lands", [("drop-before", False), ("drop-after", True), ("status-after", True)])
def test_a_commit_may_land_though_its_answer_is_lost(hub: Hub, do: str, lands: bool) -> None:
    hub.put("me/model", {"a": b"1"})
    hub.fault(do, "POST", "/commit/", skip=1)
    answer = client(
        hub,
        """
        commit = lambda n: api.create_commit("me/model", [Add("a", b"%d" % n)], commit_message=str(n))
        answer([error(commit, n) for n in (2, 3, 4)])
        """,
    )
    lost = ["HfHubHTTPError", 500] if do == "status-after" else ["RemoteProtocolError", None]
    assert answer == [None, lost, None]
    assert len(hub.history("me/model")) == (5 if lands else 4)
    assert [request.status for request in hub.requests("POST", "/commit/")] == [200, lost[1] or 0, 200]


def test_the_client_tries_uploads_again(hub: Hub) -> None:
    hub.put("me/model", {})
    hub.fault("status", "PUT", "/storage/", status=507)
    hub.fault("drop-before", "PUT", "/storage/")
    hub.fault("slow", "POST", "/preupload/", seconds=0.2)
    full = client(
        hub,
        """
        commit = lambda: api.create_commit("me/model", [Add("m.safetensors", b"weights")], commit_message="x")
        answer([error(commit), error(commit)])
        """,
    )
    assert full == [["RuntimeError", None], None]  # a full disk ends an upload, a lost connection does not
    assert [request.status for request in hub.requests("PUT")] == [507, 0, 200]
    assert hub.read("me/model", "m.safetensors") == b"weights"


def test_a_token_may_be_revoked_midway(hub: Hub) -> None:
    hub.put("me/model", {})
    hub.fault("revoke", "POST", "/commit/")
    code = 'answer(error(api.create_commit, "me/model", [Add("a", b"1")], commit_message="x"))'
    assert client(hub, code) == ["HfHubHTTPError", 401]
    assert len(hub.history("me/model")) == 2


def test_damaged_uploads_are_not_kept(hub: Hub) -> None:
    from http.client import HTTPConnection

    hub.put("me/model", {})
    connection = HTTPConnection("127.0.0.1", hub.server.server_port)
    oid, allowed = "0" * 64, {"Authorization": f"Bearer {WRITE}"}
    connection.request("PUT", f"/storage/{oid}", b"other bytes")
    assert connection.getresponse().read() == b""
    connection.request("POST", "/me/model.git/info/lfs/verify", json.dumps({"oid": oid, "size": 11}), allowed)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]) == (400, f"LFS object {oid} has another sha256")
    line = {"key": "lfsFile", "value": {"path": "m.bin", "algo": "sha256", "oid": oid, "size": 11}}
    body = json.dumps({"key": "header", "value": {"summary": "x"}}) + "\n" + json.dumps(line)
    connection.request("POST", "/api/models/me/model/commit/main", body, allowed)
    answer = connection.getresponse()
    assert (answer.status, "was not uploaded" in json.loads(answer.read())["error"]) == (400, True)
    connection.request("GET", f"/storage/{oid}", headers=allowed)
    assert connection.getresponse().status == 400  # a token is not for storage


def test_xet_works_both_ways(hub: Hub) -> None:
    hub.put("me/model", {"m.safetensors": b"weights"})
    folder = hub.folder.parent
    (folder / "n.safetensors").write_bytes(os.urandom(300_000))
    answer = client(
        hub,
        f"""
        files = [Add("small.txt", b"text"), Add("n.safetensors", {str(folder / "n.safetensors")!r})]
        oid = api.create_commit("me/model", [*files, Add("o.bin", b"xet" * 99)], commit_message="x").oid
        read = lambda name: hashlib.sha256(open(hf_hub_download("me/model", name), "rb").read()).hexdigest()
        answer({{name: read(name) for name in ("m.safetensors", "n.safetensors", "o.bin", "small.txt")}})
        """,
        HF_HUB_DISABLE_XET="0",
    )
    assert {**answer, ".gitattributes": hub.tree("me/model")[".gitattributes"]} == hub.tree("me/model")
    assert hub.read("me/model", "n.safetensors") == (folder / "n.safetensors").read_bytes()
    assert hub.requests("GET", "/xet-write-token/") and hub.requests("GET", "/xet-read-token/")
    assert not hub.requests("PUT")
    # What came by Xet can be had without it.
    code = 'answer(open(hf_hub_download("me/model", "o.bin"), "rb").read().decode())'
    assert client(hub, code, HF_HOME=str(folder / "another")) == "xet" * 99


def test_it_runs_by_hand_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        commit = hub.put("me/model", {"a": b"1"})
    command = [sys.executable, str(ROOT / "tests" / "hub.py"), str(tmp_path / "hub"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:") and f"HF_TOKEN={WRITE}" in line
        found = re.search(r"HF_ENDPOINT=(\S+)", line)
        assert found
        assert client(hub, 'answer(api.model_info("me/model").sha)', HF_ENDPOINT=found[1]) == commit
        assert process.stderr.readline() == "GET /api/models/me/model me 200\n"
    finally:
        process.terminate()
        process.wait(timeout=10)
