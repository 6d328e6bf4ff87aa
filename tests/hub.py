"""A small Hugging Face Hub on this machine, for the real client: `python tests/hub.py FOLDER --port 8000`.

Covered: models and datasets, commits on a known parent, LFS in one or many parts, branches, tags, trees in pages,
downloads with ranges, private and gated repositories, read and write tokens, and faults that a test switches on:

    with Hub(folder) as hub:
        commit = hub.put("me/model", {"config.json": b"{}"})
        hub.fault("drop-after", "POST", "/commit/", skip=1)      # the second commit lands, its answer is lost
        subprocess.run(["..."], env={**os.environ, **hub.env(WRITE)})
        hub.log                                                  # every request, with its status

As in life, LFS files lie on another host, under signed addresses that no token may be sent to. It keeps contents by
their sha256, and all else in hub.json, so it goes on where it was stopped. Xet is hf_xet itself on a folder
(`casUrl: local://`), so faults in the transfer of bytes need HF_HUB_DISABLE_XET=1. Not covered: pull requests, spaces.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# Of the shape of real tokens, so that whatever looks for those finds these.
WRITE, READ, OTHER = "hf_" + "w" * 34, "hf_" + "r" * 34, "hf_" + "o" * 34
LFS_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", ".zip", ".npz", ".png", ".model")
LFS_FROM = 10_000_000  # bytes: larger files are LFS whatever their name
SHA = re.compile(r"[0-9a-f]{40}")
FAULTS = ("drop-before", "drop-after", "status", "status-after", "slow", "gather", "truncate", "flip", "revoke")


@dataclass
class Fault:
    """What shall go wrong with requests whose method and path match, after `skip` of them and `times` times."""

    do: str
    method: str
    path: str
    skip: int
    times: int
    status: int
    seconds: float
    seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as the log keeps it; `user` is whose token came with it, never the token."""

    method: str
    path: str
    user: str | None
    status: int  # 0: the connection was dropped
    range: str | None
    fault: str | None

    def __str__(self) -> str:
        notes = [note for note in (self.range, self.fault) if note]
        return f"{self.method} {self.path} {self.user or '-'} {self.status or 'dropped'} {' '.join(notes)}".rstrip()


@dataclass
class Answer:
    """A response; a body that is a path is sent from the disk, from byte `start` on and before `end`."""

    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.end or (len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size)


class Refused(Exception):
    """An answer that is an error, with the Hub's headers."""

    def __init__(self, status: int, message: str, code: str = "", body: dict[str, Any] | None = None, **headers: str):
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = to_json({"error": message, **(body or {})}, status, **headers)


class Hub:
    """The server, what it holds, and what goes wrong with it. `put`, `tag` and the like need no client."""

    def __init__(self, folder: Path, *, port: int = 0, part_size: int = 16 * 1024 * 1024, page_size: int = 1000):
        self.folder, self.part_size, self.page_size = folder, part_size, page_size
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.users = {
            WRITE: {"name": "me", "role": "write", "orgs": ["our-team"]},
            READ: {"name": "me", "role": "read", "orgs": ["our-team"]},
            OTHER: {"name": "other", "role": "write", "orgs": []},
        }  # with the role fineGrained: `scoped`, as whoami tells it; `read_only_orgs`, among `orgs`
        self.revoked: set[str] = set()
        for name in ("blobs", "incoming"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        state = folder / "hub.json"
        self.repos: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.exists() else {}
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"
        self.xet_url = f"local://{folder.resolve()}/xet"
        self.verbose = False

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """The environment of a client of this hub, with a cache of its own. The client reads it when imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def fault(
        self,
        do: str,
        method: str = ".*",
        path: str = "",
        *,
        skip: int = 0,
        times: int = 1,
        status: int = 500,
        seconds: float = 1.0,
    ) -> Fault:
        """Switch a fault on; `path` is a pattern found anywhere in path and query. `hub.faults.clear()` ends all."""
        assert do in FAULTS, do
        self.faults.append(Fault(do, method, path, skip, times, status, seconds))
        return self.faults[-1]

    def requests(self, method: str = ".*", path: str = "") -> list[Request]:
        """The requests so far whose method and path match."""
        return [one for one in self.log if re.fullmatch(method, one.method) and re.search(path, one.path)]

    # ---- what is held

    def put(
        self,
        name: str,
        files: dict[str, bytes],
        *,
        kind: str = "model",
        branch: str = "main",
        delete: tuple[str, ...] = (),
        private: bool | None = None,
        gated: bool | None = None,
    ) -> str:
        """Commit files, in a repository that is made when it is not there; returns the commit."""
        with self.lock:
            repo = self.repos.get(f"{kind}s/{name}") or self.create(f"{kind}s/{name}")
            repo["private"] = repo["private"] if private is None else private
            repo["gated"] = repo["gated"] if gated is None else gated
            tree = dict(repo["commits"][repo["branches"][branch]]["files"])
            for path in delete:
                del tree[path]
            for path, content in files.items():
                tree[path] = self.entry(path, content)
            return self.commit(repo, branch, tree, "by the test", "")

    def tag(self, name: str, tag: str, commit: str, *, kind: str = "model") -> None:
        """Set a tag, or move it."""
        self.repos[f"{kind}s/{name}"]["tags"][tag] = commit
        self.save()

    def read(self, name: str, path: str, revision: str = "main", *, kind: str = "model") -> bytes:
        """The bytes of a file."""
        repo = self.repos[f"{kind}s/{name}"]
        return self.blob(repo["commits"][resolve(repo, revision)]["files"][path]["sha256"]).read_bytes()

    def tree(self, name: str, revision: str = "main", *, kind: str = "model") -> dict[str, str]:
        """The sha256 of every file."""
        repo = self.repos[f"{kind}s/{name}"]
        files = repo["commits"][resolve(repo, revision)]["files"]
        return {path: entry["sha256"] for path, entry in sorted(files.items())}

    def history(self, name: str, branch: str = "main", *, kind: str = "model") -> list[str]:
        """The commits of a branch, newest first."""
        repo = self.repos[f"{kind}s/{name}"]
        commits, commit = [], repo["branches"].get(branch)
        while commit:
            commits.append(commit)
            commit = repo["commits"][commit]["parent"]
        return commits

    def create(self, key: str, *, private: bool = False) -> dict[str, Any]:
        """A repository with a first commit, as the Hub makes it."""
        repo = {"private": private, "gated": False, "granted": [], "branches": {}, "tags": {}, "commits": {}}
        self.repos[key] = repo
        rules = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_FILES).encode()
        self.commit(repo, "main", {".gitattributes": self.entry(".gitattributes", rules)}, "initial commit", "")
        return repo

    def commit(self, repo: dict[str, Any], branch: str, tree: dict[str, Any], title: str, message: str) -> str:
        parent = repo["branches"].get(branch)
        commit = {"parent": parent, "title": title, "message": message, "date": now(), "files": tree}
        oid = hashlib.sha1((json.dumps(commit, sort_keys=True) + uuid.uuid4().hex).encode()).hexdigest()
        repo["commits"][oid] = commit
        repo["branches"][branch] = oid
        self.save()
        return oid

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        """Keep a content; returns the entry of a file that has it."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            write_whole(self.blob(sha256), content)
        lfs = is_lfs(path, len(content), content[:512])
        return {"sha256": sha256, "size": len(content), "lfs": lfs, "oid": git_sha1(pointer(sha256, len(content)) if lfs else content)}  # fmt: skip

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def save(self) -> None:
        write_whole(self.folder / "hub.json", json.dumps(self.repos).encode())

    # ---- Xet

    def xet_files(self) -> dict[str, str]:
        """The Xet hash of every file that came by Xet, by its sha256: the shards that hf_xet wrote tell."""
        shards = (self.folder / "xet").rglob("shards/*.mdb")
        return {sha256: xet for shard in shards for sha256, xet in files_of_shard(shard.read_bytes())}

    def take_from_xet(self, sha256: str) -> None:
        """Put a file that came by Xet among the others, if it did."""
        xet = self.xet_files().get(sha256)
        if xet is None:
            return
        import hf_xet

        access = {"endpoint": self.xet_url, "token": "test", "token_expiry_unix_secs": int(time.time()) + 3600}
        incoming = self.folder / "incoming" / f"{sha256}.xet"
        with hf_xet.XetSession().new_file_download_group(**access) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet, None), str(incoming))
        assert hashlib.sha256(incoming.read_bytes()).hexdigest() == sha256
        os.replace(incoming, self.blob(sha256))

    # ---- who may do what

    def user(self, token: str | None) -> dict[str, Any] | None:
        if token is None:
            return None
        if token in self.revoked or token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def repo(self, key: str, token: str | None, *, write: bool = False, content: bool = False) -> dict[str, Any]:
        """The repository, when this token may see it, write to it, or read its files' content."""
        user, repo = self.user(token), self.repos.get(key)
        owner = user is not None and key.split("/")[1] in [user["name"], *user["orgs"]]
        if repo is None or (repo["private"] and not owner):
            if user is None:  # the Hub doesn't tell a stranger what exists
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if content and repo["gated"] and not owner and (user is None or user["name"] not in repo["granted"]):
            name = key.partition("/")[2]
            message = f"Access to {key.partition('s/')[0]} {name} is restricted. Visit {self.url}/{name} to ask for it."
            raise Refused(403 if user else 401, message, "GatedRepo")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and (not owner or not self.may_write(user, key.split("/")[1], key.partition("/")[2])):
            raise Refused(403, f"You don't have the rights to write to {key}: use a token with write access")
        return repo

    def may_write(self, user: dict[str, Any], space: str, name: str) -> bool:
        """Whether a token may write to a repository of a space, or make one there."""
        if space in user.get("read_only_orgs", []):
            return False
        scopes = [scope for scope in user.get("scoped", []) if scope["entity"]["name"] in (space, name)]
        return user["role"] == "write" or any("repo.write" in scope["permissions"] for scope in scopes)


class Server(ThreadingHTTPServer):
    """Says nothing of clients that went away, as killed ones do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the faults act, and routes it."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer with a body waits 40 ms for the client's acknowledgement

    def do_GET(self) -> None:
        hub, self.body = self.hub, self._read_body()
        given = self.headers.get("Authorization", "")
        self.token = given.removeprefix("Bearer ") or None
        fault = self._fault()
        match fault and fault.do:
            case "slow":
                time.sleep(fault.seconds)
            case "gather":  # go on when all have come
                deadline = time.monotonic() + fault.seconds
                while fault.seen < fault.skip + fault.times and time.monotonic() < deadline:
                    time.sleep(0.01)
            case "revoke" if self.token:
                hub.revoked.add(self.token)
        if fault and fault.do == "drop-before":
            return self._finish(None, fault)
        if fault and fault.do == "status":
            return self._finish(to_json({"error": "a fault of the test"}, fault.status), fault)
        try:
            answer = self._route()
        except Refused as refused:
            answer = refused.answer
        if fault and fault.do == "status-after":
            answer = to_json({"error": "a fault of the test"}, fault.status)
        return self._finish(None if fault and fault.do == "drop-after" else answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if re.fullmatch(fault.method, self.command) and re.search(fault.path, self.path):
                    fault.seen += 1
                    if fault.skip < fault.seen <= fault.skip + fault.times:
                        return fault
        return None

    def _finish(self, answer: Answer | None, fault: Fault | None) -> None:
        user = self.hub.users.get(self.token or "", {}).get("name", "unknown" if self.token else None)
        entry = Request(
            method=self.command,
            path=self.path,
            user=user,
            status=answer.status if answer else 0,
            range=self.headers.get("Range"),
            fault=fault and fault.do,
        )
        self.hub.log.append(entry)
        if self.hub.verbose:
            print(entry, file=sys.stderr, flush=True)
        if answer is None:
            return self._drop()
        length = answer.end - answer.start
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD" or not length:
            return None
        spoil = fault.do if fault else ""
        if isinstance(answer.body, bytes):
            content = answer.body[answer.start : answer.end]
        else:
            with open(answer.body, "rb") as file:
                file.seek(answer.start)
                content = file.read(length)
        if spoil == "flip":
            content = content[: length // 2] + bytes([content[length // 2] ^ 1]) + content[length // 2 + 1 :]
        self.wfile.write(content[: length // 2] if spoil == "truncate" else content)
        return self._drop() if spoil == "truncate" else None

    def _drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # ---- routes

    def _route(self) -> Answer:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                user = self.hub.user(self.token)
                if user is None:
                    raise Refused(401, "Invalid username or password.")
                roles = dict.fromkeys(user["orgs"], "write") | dict.fromkeys(user.get("read_only_orgs", []), "read")
                orgs = [{"name": org, "type": "org", "roleInOrg": role} for org, role in roles.items()]
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
                if user["role"] == "fineGrained":
                    auth["accessToken"]["fineGrained"] = {"global": [], "scoped": user["scoped"]}
                return to_json({"type": "user", "name": user["name"], "orgs": orgs, "auth": auth})
            case "POST" | "DELETE", ["api", "repos", ("create" | "delete") as act]:
                return self._create() if act == "create" else self._delete()
            case "POST", ["api", "validate-yaml"]:
                return to_json({"errors": [], "warnings": []})
            case "GET", ["api", "agent-harnesses"]:
                return to_json({})
            case _, ["api", ("models" | "datasets") as kind, space, name, *rest]:
                return self._api(f"{kind}/{space}/{name}", rest)
            case _, ["storage", *rest]:
                return self._storage(rest)
            case "POST", [*kind, space, name, "info", "lfs", "objects", "batch"]:
                return self._batch(f"{(kind or ['models'])[0]}/{space}/{name.removesuffix('.git')}")
            case "POST", [*kind, space, name, "info", "lfs", "verify"]:
                return self._verify(f"{(kind or ['models'])[0]}/{space}/{name.removesuffix('.git')}")
            case "GET" | "HEAD", ["datasets", space, name, "resolve", revision, *path]:
                return self._resolve(f"datasets/{space}/{name}", revision, "/".join(path))
            case "GET" | "HEAD", [space, name, "resolve", revision, *path]:
                return self._resolve(f"models/{space}/{name}", revision, "/".join(path))
        raise Refused(404, f"Sorry, we can't find {self.command} {url.path}.")

    def _api(self, key: str, rest: list[str]) -> Answer:
        hub = self.hub
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                return self._info(key, hub.repo(key, self.token), rest[1] if rest else "main")
            case "GET", ["auth-check", *more]:
                hub.repo(key, self.token, write=more == ["write"], content=True)
                return to_json({})
            case "GET", ["refs"]:
                repo = hub.repo(key, self.token)
                kinds = {"branches": "refs/heads/", "tags": "refs/tags/"}
                refs = {
                    kind: [{"name": n, "ref": ref + n, "targetCommit": c} for n, c in sorted(repo[kind].items())]
                    for kind, ref in kinds.items()
                }
                return to_json({**refs, "converts": [], "pullRequests": []})
            case "GET", ["tree", revision, *path]:
                return self._tree(hub.repo(key, self.token), revision, "/".join(path))
            case "POST", ["paths-info", revision]:
                repo = hub.repo(key, self.token)
                asked = parse_qs(self.body.decode()).get("paths", [])
                files = repo["commits"][resolve(repo, revision)]["files"]
                return to_json([shown(path, files[path]) for path in asked if path in files])
            case "GET", ["commits", revision]:
                return self._commits(hub.repo(key, self.token), revision)
            case "POST" | "DELETE", [("tag" | "branch") as kind, *_]:
                return self._ref(key, kind, rest[1])
            case "POST", ["preupload", revision]:
                return self._preupload(key, revision)
            case "POST", ["commit", revision]:
                return self._commit(key, revision)
            case "GET", [("xet-read-token" | "xet-write-token") as kind, _]:
                hub.repo(key, self.token, write=kind == "xet-write-token", content=True)
                token = {"accessToken": "test", "exp": int(time.time()) + 3600, "casUrl": hub.xet_url}
                headers = {"X-Xet-Access-Token": "test", "X-Xet-Token-Expiration": str(token["exp"])}
                return to_json(token, **headers, **{"X-Xet-Cas-Url": hub.xet_url})
        raise Refused(404, f"Sorry, we can't find {self.command} {self.path}.")

    def _create(self) -> Answer:
        asked, user = json.loads(self.body), self.hub.user(self.token)
        space = asked.get("organization") or (user or {}).get("name")
        key = f"{asked.get('type') or 'model'}s/{space}/{asked['name']}"
        url = f"{self.hub.url}/{key.removeprefix('models/')}"
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if space not in [user["name"], *user["orgs"]] or not self.hub.may_write(user, space, ""):
            raise Refused(403, f'You don\'t have the rights to create a repository under the namespace "{space}"')
        with self.hub.lock:
            if key in self.hub.repos:
                raise Refused(409, "You already created this repository", body={"url": url})
            self.hub.create(key, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return to_json({"url": url, "name": f"{space}/{asked['name']}"})

    def _delete(self) -> Answer:
        asked, user = json.loads(self.body), self.hub.user(self.token)
        space = asked.get("organization") or (user or {}).get("name")
        key = f"{asked.get('type') or 'model'}s/{space}/{asked['name']}"
        with self.hub.lock:
            self.hub.repo(key, self.token, write=True)
            del self.hub.repos[key]
            self.hub.save()
        return to_json({})

    def _info(self, key: str, repo: dict[str, Any], revision: str) -> Answer:
        kind, _, name = key.partition("/")
        sha = resolve(repo, revision)
        commit = repo["commits"][sha]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit["files"])]
        if self.query.get("blobs", "").lower() == "true":
            for sibling in siblings:
                entry = shown(sibling["rfilename"], commit["files"][sibling["rfilename"]])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        gated = "manual" if repo["gated"] else False
        about = {"id": name, "author": name.split("/")[0], "sha": sha, "private": repo["private"], "gated": gated}
        about |= {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": commit["date"]}
        about |= {"createdAt": commit["date"], "siblings": siblings}
        return to_json(about | ({"modelId": name} if kind == "models" else {}))

    def _tree(self, repo: dict[str, Any], revision: str, folder: str) -> Answer:
        sha = resolve(repo, revision)
        commit = repo["commits"][sha]
        inside = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(commit["files"].items()):
            if not path.startswith(inside):
                continue
            names = path.removeprefix(inside).split("/")
            for depth in range(1, len(names) if recursive else min(len(names), 2)):
                parent = inside + "/".join(names[:depth])
                entries.setdefault(parent, {"type": "directory", "oid": git_sha1(parent.encode()), "size": 0, "path": parent})  # fmt: skip
            if recursive or len(names) == 1:
                entries[path] = shown(path, file)
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": sha})
        listed = list(entries.values())
        if self.query.get("expand", "").lower() in ("true", "1"):
            last = {"id": sha, "title": commit["title"], "date": commit["date"]}
            listed = [{**entry, "lastCommit": last, "security": None} for entry in listed]
        start = int(self.query.get("cursor", 0))
        end = start + int(self.query.get("limit", self.hub.page_size))
        answer = to_json(listed[start:end], **{"X-Repo-Commit": sha})
        if end < len(listed):
            rest = "".join(f"&{key}={quote(value)}" for key, value in self.query.items() if key != "cursor")
            answer.headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?cursor={end}{rest}>; rel="next"'
        return answer

    def _commits(self, repo: dict[str, Any], revision: str) -> Answer:
        listed, sha = [], resolve(repo, revision)
        while sha:
            commit = repo["commits"][sha]
            about = {key: commit[key] for key in ("title", "message", "date")}
            listed.append({"id": sha, "authors": [{"user": "me"}], **about})
            sha = commit["parent"]
        return to_json(listed)

    def _ref(self, key: str, kind: str, name: str) -> Answer:
        asked = json.loads(self.body or b"{}")
        with self.hub.lock:
            repo = self.hub.repo(key, self.token, write=True)
            if kind == "tag" and self.command == "POST":  # the address holds what is tagged
                refs, name, start = repo["tags"], asked["tag"], name
            else:
                refs = repo["tags" if kind == "tag" else "branches"]
                start = asked.get("startingPoint") or "main"
            if self.command == "DELETE":
                if name not in refs:
                    raise Refused(404, f"{kind} {name} does not exist", "RevisionNotFound")
                del refs[name]
            elif name in refs:
                raise Refused(409, f"{kind} {name} exists already")
            else:
                refs[name] = resolve(repo, start)
            self.hub.save()
        return to_json({})

    def _preupload(self, key: str, revision: str) -> Answer:
        repo = self.hub.repo(key, self.token, write=True)
        files = repo["commits"][resolve(repo, revision)]["files"]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, old = asked["path"], files.get(asked["path"])
            lfs = is_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if old:
                answer["oid"] = old["sha256"] if old["lfs"] else old["oid"]
            answers.append(answer)
        return to_json({"files": answers})

    def _commit(self, key: str, revision: str) -> Answer:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        with self.hub.lock:
            repo = self.hub.repo(key, self.token, write=True)
            if "create_pr" in self.query:
                raise Refused(501, "This hub has no pull requests")
            branch = revision.removeprefix("refs/heads/")
            if branch not in repo["branches"]:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if header.get("parentCommit") not in (None, repo["branches"][branch]):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo["commits"][repo["branches"][branch]]["files"])
            for line in lines[1:]:
                value = line["value"]
                path = value["path"]
                match line["key"]:
                    case "file":
                        tree[path] = {**self.hub.entry(path, base64.b64decode(value["content"])), "lfs": False}
                        tree[path]["oid"] = git_sha1(base64.b64decode(value["content"]))
                    case "lfsFile":
                        blob = self.hub.blob(value["oid"])
                        if not blob.exists():
                            self.hub.take_from_xet(value["oid"])
                        if not blob.exists():
                            raise Refused(400, f"LFS object {value['oid']} of {path} was not uploaded")
                        size = blob.stat().st_size
                        oid = git_sha1(pointer(value["oid"], size))
                        tree[path] = {"sha256": value["oid"], "size": size, "lfs": True, "oid": oid}
                    case "deletedFile":
                        if tree.pop(path, None) is None:
                            raise Refused(404, f"{path} does not exist", "EntryNotFound")
                    case "deletedFolder":
                        tree = {name: entry for name, entry in tree.items() if not name.startswith(path.rstrip("/") + "/")}  # fmt: skip
            oid = self.hub.commit(repo, branch, tree, header["summary"], header.get("description", ""))
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{oid}"
        return to_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ---- large files

    def _batch(self, key: str) -> Answer:
        self.hub.repo(key, self.token, write=True)
        objects, path = [], f"{self.hub.url}/{key.removeprefix('models/')}.git/info/lfs"
        for asked in json.loads(self.body)["objects"]:
            oid, size, one = asked["oid"], asked["size"], {"oid": asked["oid"], "size": asked["size"]}
            objects.append(one)
            if self.hub.blob(oid).exists():
                continue
            href, header = f"{self.hub.storage}/{oid}?signature=1", {}
            if size > self.hub.part_size:
                parts = -(-size // self.hub.part_size)
                header = {str(n): f"{self.hub.storage}/{oid}/{n:05}?signature=1" for n in range(1, parts + 1)}
                header["chunk_size"] = str(self.hub.part_size)
                href = f"{self.hub.url}/storage/{oid}/complete"
            one["actions"] = {"upload": {"href": href, "header": header}, "verify": {"href": f"{path}/verify"}}
        return to_json({"transfer": "basic", "objects": objects})

    def _storage(self, rest: list[str]) -> Answer:
        """Another host: uploads to signed addresses, and downloads."""
        if "Authorization" in self.headers:
            raise Refused(400, "Only one auth mechanism allowed: a token was sent to storage")
        oid, incoming = rest[0], self.hub.folder / "incoming"
        match self.command, rest[1:]:
            case "GET" | "HEAD", []:
                if not self.hub.blob(oid).exists():
                    raise Refused(403, "Access denied")
                return self._file(self.hub.blob(oid), {"ETag": f'"{oid}"'})
            case "PUT", [*part]:
                write_whole(incoming / ".".join([oid, *part]), self.body)
                return Answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
            case "POST", ["complete"]:
                parts = [incoming / f"{oid}.{part['partNumber']:05}" for part in json.loads(self.body)["parts"]]
                etags = [part["etag"].strip('"') for part in json.loads(self.body)["parts"]]
                if not all(part.exists() for part in parts) or etags != [md5(part) for part in parts]:
                    raise Refused(400, "One or more of the specified parts could not be found")
                write_whole(incoming / oid, b"".join(part.read_bytes() for part in parts))
                for part in parts:
                    part.unlink()
                return to_json({})
        raise Refused(405, "Method not allowed")

    def _verify(self, key: str) -> Answer:
        self.hub.repo(key, self.token, write=True)
        asked = json.loads(self.body)
        uploaded, blob = self.hub.folder / "incoming" / asked["oid"], self.hub.blob(asked["oid"])
        with self.hub.lock:
            if not blob.exists():
                if not uploaded.exists() or uploaded.stat().st_size != asked["size"]:
                    raise Refused(404, f"LFS object {asked['oid']} is not there with {asked['size']} bytes")
                if hashlib.sha256(uploaded.read_bytes()).hexdigest() != asked["oid"]:
                    raise Refused(400, f"LFS object {asked['oid']} has another sha256")
                os.replace(uploaded, blob)
        return to_json({})

    def _resolve(self, key: str, revision: str, path: str) -> Answer:
        repo = self.hub.repo(key, self.token)
        sha = resolve(repo, revision)
        headers = {"X-Repo-Commit": sha}
        self.hub.repo(key, self.token, content=True)
        entry = repo["commits"][sha]["files"].get(path)
        if entry is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound", **headers)
        if entry["lfs"]:
            headers |= {"X-Linked-ETag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
            headers["Location"] = f"{self.hub.storage}/{entry['sha256']}?signature=1"
            if xet := self.hub.xet_files().get(entry["sha256"]):
                headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": f"{self.hub.url}/api/{key}/xet-read-token/{sha}"}
            return Answer(302, b"", headers)
        return self._file(self.hub.blob(entry["sha256"]), headers | {"ETag": f'"{entry["oid"]}"'})

    def _file(self, path: Path, headers: dict[str, str]) -> Answer:
        size = path.stat().st_size
        headers = {**headers, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return Answer(200, path, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        if start > end:
            raise Refused(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Answer(206, path, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}, start, end + 1)


def to_json(value: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON answer."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def resolve(repo: dict[str, Any], revision: str) -> str:
    """The commit of a branch, a tag or a commit."""
    name = re.sub("^refs/(heads|tags)/", "", revision)
    found = repo["branches"].get(name) or repo["tags"].get(name)
    if found is None and SHA.fullmatch(revision) and revision in repo["commits"]:
        found = revision
    if found is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found


def shown(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A file as trees list it."""
    about = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["lfs"]:
        size = len(pointer(entry["sha256"], entry["size"]))
        about["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": size}
    return about


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file as LFS: by its name, its size, or for not being text."""
    return size > 0 and (path.endswith(LFS_FILES) or size > LFS_FROM or b"\0" in sample)


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def files_of_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """sha256 and Xet hash of every file that a shard describes, in entries of 48 bytes behind a header of one."""

    def word(at: int) -> str:  # four little-endian numbers
        return b"".join(shard[at + i : at + i + 8][::-1] for i in range(0, 32, 8)).hex()

    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        xet, (flags, segments) = word(at), struct.unpack("<II", shard[at + 32 : at + 40])
        at += 48 * (1 + segments * (2 if flags & 1 << 31 else 1))  # each segment, and how it is verified
        if flags & 1 << 30:
            yield word(at), xet
            at += 48


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader sees half of it, and none is left after a kill."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on this machine.")
    parser.add_argument("folder", type=Path, help="where it keeps what it holds")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    hub = Hub(arguments.folder, port=arguments.port)
    hub.verbose = True
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={WRITE} HF_HUB_DISABLE_XET=1   # user me", flush=True)
    try:
        hub.server.serve_forever()
    except KeyboardInterrupt:
        hub.server.server_close()


if __name__ == "__main__":
    main()
