"""Where a published artifact came from: git commit, recipe, pins, digests, versions, machine.

    gather(root, name, ...) -> facts            one dict that the statement, the ML-BOM and the card are made from
    statement(facts, files, metrics) -> dict    an in-toto statement with SLSA provenance, about every published file
    facts_of(statement) -> dict                 what a registry's record keeps, read back

In none of them: a path outside of the project, a user, a host, or a value of the environment. Not covered: what a
recipe's own words say, and a secret in the path of git's remote (`publishable` looks for the known kinds).
"""

import json
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import prefbuild
from prefbuild.artifact import digest_of, sha256_file
from prefbuild.gates import trained_role
from prefbuild.pipeline import RECIPE_STAGES
from prefbuild.recipe import NAME
from prefbuild.resolve import RESOLVED
from prefbuild.sources import title

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:prefbuild:build:v1"
BUILDER = "urn:prefbuild:promote:v1"
GIT, GATE = "git", "gate"  # names of the commit among the dependencies, and of the verdict among the byproducts

SOURCES = ("recipes", "params.yaml", "prefbuild.lock.yaml", "dvc.yaml", "pipelines/*/dvc.yaml")


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """The commit a project stands at, and what is not in it."""

    commit: str | None
    dirty: list[str]  # paths relative to the project, or a sentence in brackets


def source_state(root: Path, name: str) -> SourceState:
    """Compare everything a build is made from with git's HEAD.

    Looks at recipes/, params.yaml, the lock, the DVC files, and prefbuild itself where it lies in the same repository.
    """
    try:
        return _state(root, name)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return SourceState(commit=None, dirty=[f"({why[0]})" if why else "(git failed)"])


def _state(root: Path, name: str) -> SourceState:
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").strip()
    except subprocess.CalledProcessError:
        return SourceState(commit=None, dirty=["(the repository has no commits)"])
    paths = [f":(top,glob){_inside(root, top)}{path}" for path in SOURCES]
    paths[0] += "/**"
    package = Path(prefbuild.__file__).resolve().parent
    if package.is_relative_to(top.resolve()):
        paths.append(f":(top){package.relative_to(top.resolve()).as_posix()}")
    status = _git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--", *paths)
    dirty = {_shown(root, top, entry[3:]) for entry in status.split("\0") if entry}
    # What git ignores is not in its status: a recipe must be in the commit itself.
    own = (f"recipes/{name}.yaml", f"pipelines/{name}/dvc.yaml")
    for path in ("params.yaml", "prefbuild.lock.yaml", "dvc.yaml", *own):
        if not _committed(root, top, path):
            dirty.add(path)
    return SourceState(commit=commit, dirty=sorted(dirty))


def gather(
    root: Path,
    name: str,
    *,
    version: str,
    build: str,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    source: SourceState,
    key: str | None = None,
) -> dict[str, Any]:
    """Everything known of a promotion, read from files, but for time, commit and this Python.

    `key` is the id of the key that will sign it.
    """
    inputs = resolved["promote"]["inputs"]
    trained = trained_role(gate)
    train = json.loads((root / inputs["train"]).read_text(encoding="utf-8"))
    records = [
        json.loads((root / inputs["samples"] / f"{m['key']}.json").read_text(encoding="utf-8"))
        for m in resolved["gate"]["settings"]["measurements"]
    ]
    versions: dict[str, Any] = {}
    for record in records:
        versions |= record.get("versions", {})
        versions |= {"image": record["image"]} if record.get("image") else {}
    return {
        "name": name,
        "version": version,
        "build": build,
        "artifact": gate["artifact"],
        trained: gate[trained],
        "git_commit": source.commit,
        "git_remote": _remote(root),
        # git's own words, in brackets, may name folders of this machine.
        "dirty": [re.sub("/.*", "...)", line) if line.startswith("(") else line for line in source.dirty],
        "recipe": _file(root, f"recipes/{name}.yaml"),
        "params": _file(root, "params.yaml"),
        "lock": {**_file(root, "prefbuild.lock.yaml"), "entries": _pins(root, resolved)},
        "dvc_lock": _file(root, f"pipelines/{name}/dvc.lock"),
        "tasks": _tasks(resolved),
        "rewards": resolved["train"]["settings"].get("rewards", []),
        "images": _images(root, resolved),
        "method": resolved["train"]["settings"]["train"]["method"],
        "seed": resolved["train"]["settings"]["seed"],
        "settings": {
            stage: digest_of(resolved[stage]["settings"]) for stage in (*RECIPE_STAGES, "promote") if stage in resolved
        },
        "gate": {
            **_file(root, inputs["gate"]),
            "passed": gate["passed"],
            "rules": [{"passed": rule["passed"], "says": rule["says"]} for rule in gate["rules"]],
        },
        "judged": gate["judged"],
        "made_from": {
            role: _made_from(root / inputs[role])
            for role in ("prepared", "reference_log_probs", trained, "merged", "samples")
            if role in inputs
        },
        "evaluated_with": versions,
        "trained_on": train.get("machine", {}),
        "promoted_with": {"prefbuild": prefbuild.__version__, "python": platform.python_version()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
    }


def statement(facts: dict[str, Any], files: dict[str, dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
    """An in-toto statement v1 with SLSA provenance v1: every file published, and what it was made from.

    `files` is {path: {size, sha256, gitBlob}}, the two digests in hex, either of which may be missing. A git blob's
    name is what the Hub lists for a small file, so that it can be checked there without a download.
    """
    digests = ("sha256", "gitBlob")
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": path, "digest": {kind: entry[kind] for kind in digests if kind in entry}}
            for path, entry in sorted(files.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "name": facts["name"],
                    "recipe": facts["recipe"],
                    "params": facts["params"],
                    "lock": {key: facts["lock"][key] for key in ("path", "sha256")},
                },
                "internalParameters": {
                    key: facts[key]
                    for key in (
                        *(
                            "version",
                            "artifact",
                            trained_role(facts),
                            "dirty",
                            "method",
                            "seed",
                            "settings",
                            "made_from",
                        ),
                        *("trained_on", "evaluated_with", "promoted_with", "key"),
                    )
                },
                "resolvedDependencies": _dependencies(facts),
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {"invocationId": facts["build"], "finishedOn": facts["time"].replace("+00:00", "Z")},
                "byproducts": [
                    _resource(
                        GATE,
                        facts["gate"]["sha256"],
                        passed=facts["gate"]["passed"],
                        rules=facts["gate"]["rules"],
                        judged=facts["judged"],
                    ),
                    {"name": "metrics", "annotations": {kind: metrics[kind] for kind in ("evaluate", "baseline")}},
                    _resource(facts["dvc_lock"]["path"], facts["dvc_lock"]["sha256"]),
                ],
            },
        },
    }


FORMS = {
    "name": NAME.pattern,
    "version": r"v[1-9][0-9]*",
    "build": r"sha256:[0-9a-f]{64}",
    "artifact": r"sha256:[0-9a-f]{64}",
    "adapter": r"sha256:[0-9a-f]{64}",
    "trained": r"sha256:[0-9a-f]{64}",
    "git_commit": r"[0-9a-f]{40}([0-9a-f]{24})?",
    "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00",
    "key": r"[0-9a-f]{64}",
}
DIGESTS = {"sha256": r"[0-9a-f]{64}", "gitBlob": r"[0-9a-f]{40}"}


def facts_of(statement: Any) -> dict[str, Any]:
    """What a statement says of the promotion itself: name, version, build, artifact, adapter (or all weights as they
    were trained), commit, time and key.

    Raises ValueError that says what is missing or of another form, also of the files it is about.
    """
    try:
        if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
            raise ValueError(f"is no in-toto statement v1 with {PREDICATE_TYPE}")
        definition, details = (statement["predicate"][key] for key in ("buildDefinition", "runDetails"))
        if definition["buildType"] != BUILD_TYPE:
            raise ValueError(f"its buildType is not {BUILD_TYPE}, the only one this prefbuild reads")
        known = definition["internalParameters"]
        commits = [entry["digest"]["gitCommit"] for entry in definition["resolvedDependencies"] if entry["name"] == GIT]
        facts = {
            "name": definition["externalParameters"]["name"],
            "version": known["version"],
            "build": details["metadata"]["invocationId"],
            "artifact": known["artifact"],
            trained_role(known): known[trained_role(known)],
            "git_commit": commits[0] if commits else None,
            "dirty": known["dirty"],
            "time": re.sub("Z$", "+00:00", details["metadata"]["finishedOn"]),
            "key": known["key"],
        }
        _check_subjects(statement["subject"])
    except KeyError as error:
        raise ValueError(f"lacks {error.args[0]}") from None
    except (TypeError, AttributeError, IndexError):
        raise ValueError("is not built like a statement") from None
    for key, form in FORMS.items():
        if key not in facts:
            continue  # adapter or trained: one of them is there
        optional = key in ("git_commit", "key") and facts[key] is None
        if not optional and not (isinstance(facts[key], str) and re.fullmatch(form, facts[key])):
            raise ValueError(f"its {key} has another form: {str(facts[key])[:80]!r}")
    if not isinstance(facts["dirty"], list) or not all(isinstance(line, str) for line in facts["dirty"]):
        raise ValueError("its dirty is no list of paths")
    return facts


def _check_subjects(subjects: Any) -> None:
    """Plain paths below the folder, each once, each with digests: they are joined to folders and compared."""
    seen = set()
    for subject in subjects:
        name, digests = subject["name"], subject["digest"]
        if not isinstance(name, str) or not name or not name.isprintable() or name in seen:
            raise ValueError(f"names the file {name!r} twice, or it is no file's name")
        if str(PurePosixPath(name)) != name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"names {name!r}, which is no path below the published folder")
        if not digests or any(
            kind not in DIGESTS or not re.fullmatch(DIGESTS[kind], digest) for kind, digest in digests.items()
        ):
            raise ValueError(f"has no digest of {name} that this prefbuild knows")
        seen.add(name)
    if not seen:
        raise ValueError("is about no file")


def public_title(source: dict[str, Any]) -> str:
    """A source's title; of a file that lies outside of the project, its name alone."""
    shown = title(source)
    return public_path(shown) if source["source"] == "file" else shown


def public_path(path: str) -> str:
    """A path within the project; of any other only its last part, since the rest is of this machine."""
    parts = PurePosixPath(path)
    return parts.name if parts.is_absolute() or ".." in parts.parts or path.startswith("~") else path


def uri_of(pins: dict[str, Any], path: str = "") -> str | None:
    """Where anybody can find a pinned source, or one file of it; None for a file of the project."""
    source = pins["source"]
    if source["source"] == "hub":
        kind = "" if "dtype" in source else "datasets/"  # as only a base model has one
        return f"hf://{kind}{source['repo']}@{pins['commit']}" + (f"/{quote(path)}" if path else "")
    if source["source"] == "wheel":
        return f"pkg:pypi/{source['package']}@{quote(source['version'])}" + (f"#{quote(path)}" if path else "")
    return None


def _dependencies(facts: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if facts["git_commit"]:
        uri = f"git+{facts['git_remote']}@{facts['git_commit']}" if facts["git_remote"] else None
        found.append({"name": GIT, **({"uri": uri} if uri else {}), "digest": {"gitCommit": facts["git_commit"]}})
    found += [_resource(facts[key]["path"], facts[key]["sha256"]) for key in ("recipe", "params", "lock")]
    for node, pins in facts["lock"]["entries"].items():
        source = pins["source"]
        about = {"title": public_title(source), **({"commit": pins["commit"]} if "commit" in pins else {})}
        if "wheel" in pins:
            found.append(_resource(pins["wheel"]["filename"], pins["wheel"]["sha256"], uri_of(pins)))
        for file in pins["files"]:
            uri = uri_of(pins, source["path"] if source["source"] == "wheel" else file["path"])
            found.append(_resource(f"{node}/{file['path']}", file["sha256"], uri, **about))
    made_from = facts["made_from"]["prepared"]
    # As prefbuild reads them: for a base that is another recipe's model, this is all there is.
    found.append(_resource("base model", made_from["model"], artifact=True))
    found += [_resource(path, digest, artifact=True) for path, digest in made_from["data"].items()]
    judges = facts["made_from"][trained_role(facts)].get("reward_models", {})
    found += [_resource(path, digest, artifact=True) for path, digest in judges.items()]
    reference = facts["made_from"][trained_role(facts)].get("reference")
    found += [_resource("reference model", reference, artifact=True)] if reference else []
    for task in facts["tasks"]:
        found += [_resource(file["path"], file["sha256"], task=task["name"]) for file in task["files"]]
    found += [_resource(file["path"], file["sha256"], reward=True) for file in facts["rewards"]]
    for image in facts["images"]:
        # Pinned is not used: with the local runner a stage runs on the machine itself.
        ran = [key for key in ("trained_on", "evaluated_with") if facts[key].get("image") == image["id"]]
        about = {"role": image["role"], "used": ran}
        about |= {"repo_digest": image["repo_digest"]} if image["repo_digest"] else {}
        found.append(_resource(f"image {image['role']}", image["id"], **about))
    return found


def _resource(name: str, sha256: str, uri: str | None = None, **annotations: Any) -> dict[str, Any]:
    """An in-toto resource descriptor."""
    found: dict[str, Any] = {"name": name, "digest": {"sha256": sha256.removeprefix("sha256:")}}
    found |= {"uri": uri} if uri else {}
    return found | ({"annotations": annotations} if annotations else {})


def _file(root: Path, path: str) -> dict[str, str]:
    return {"path": path, "sha256": sha256_file(root / path)}


def _tasks(resolved: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": measurement["name"],
            "key": measurement["key"],
            "files": [{**file, "path": public_path(file["path"])} for file in measurement["files"]],
        }
        for measurement in resolved["gate"]["settings"]["measurements"]
    ]


def _images(root: Path, resolved: dict[str, Any]) -> list[dict[str, Any]]:
    """The images pinned for the recipe's stages and for those it shares with other recipes, by role."""
    found = {}
    for sections in [resolved, *_shared(root, resolved).values()]:
        about = {key: sections["compute"][key] for key in ("role", "repo_digest")}
        for section in sections.values():
            if section.get("image"):
                found[about["role"], section["image"]] = {**about, "id": section["image"]}
    return [found[key] for key in sorted(found)]


def _remote(root: Path) -> str | None:
    """origin's URL without user, password and query; None when there is none that others could use."""
    try:
        # Not `git remote get-url`: that applies url.*.insteadOf, which is where tokens are put.
        url = _git(root, "config", "--get", "remote.origin.url").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return public_url(url)


def public_url(url: str) -> str | None:
    """A git URL that may be published, or None: a folder of this machine, or nothing that is sure to hold no password."""
    if not url.isprintable() or " " in url:
        return None
    if "://" not in url:  # [user@]host:owner/name
        found = re.fullmatch(r"(?:[^@/:]+@)?([A-Za-z0-9.-]+):([^/~@:][^@:]*)", url)
        return f"ssh://{found[1]}/{found[2]}" if found else None
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return None
    if parts.scheme not in ("https", "http", "ssh", "git") or not re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?", host):
        return None
    if "@" in parts.path + parts.query + parts.fragment:  # a password with / ? or # in it
        return None
    return f"{parts.scheme}://{host}{parts.path}"


def _made_from(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["inputs"]


def _pins(root: Path, resolved: dict[str, Any]) -> dict[str, Any]:
    """What the lock pinned of the model and the data, by path, from their resolved sections."""
    pins = {}
    for path, sections in _shared(root, resolved).items():
        for stage in ("model", "data"):
            if stage in sections:
                pins[path] = sections[stage]["settings"]
    return pins


def _shared(root: Path, resolved: dict[str, Any]) -> dict[str, Any]:
    """The resolved sections of the model, the data and the baseline, by the folder each makes."""
    inputs = resolved["prepare"]["inputs"]
    found = {}
    baseline = resolved["promote"]["inputs"].get("baseline")  # a reward model has none
    for path in [inputs["model"], *inputs["data"], *([baseline] if baseline else [])]:
        kind, node = Path(path).parts[-2:]
        file = root / RESOLVED / kind / f"{node}.json"
        if file.exists():  # not for a base that is another recipe's merged model
            found[path] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _inside(root: Path, top: Path) -> str:
    """The project's folder within its repository: '' or 'a/b/'."""
    inside = root.resolve().relative_to(top.resolve()).as_posix()
    return "" if inside == "." else f"{inside}/"


def _shown(root: Path, top: Path, path: str) -> str:
    inside = _inside(root, top)
    return path.removeprefix(inside)


def _committed(root: Path, top: Path, path: str) -> bool:
    try:
        _git(root, "cat-file", "-e", f"HEAD:{_inside(root, top)}{path}")
    except subprocess.CalledProcessError:
        return False
    return True
