"""A repository on the Hugging Face Hub as registry: a commit and a tag a version.

In this order: read where `main` is; one commit on exactly that; read the digest of every file back; tag it. So a tag is
never on anything but a whole version. A commit names its build, and after any failure the Hub is asked what landed: a
lost answer is recognised, and nothing is committed twice. Whoever commits in between wins (the Hub answers 412), and
the loser stops for a new decision. Covered: changes by others on `main`, moved and foreign tags, renamed files. Not
covered: owners who rewrite history or move tags afterwards: `prefbuild verify` finds that.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

from prefbuild.errors import PromotionRefused
from prefbuild.promote import version
from prefbuild.promote.access import CouldNotAsk, write_access
from prefbuild.promote.repository import (
    BUILD_LINE,
    VERSION_LINE,
    Promotion,
    State,
    client,
    explain,
    list_files,
    look,
    plainly,
    read_file,
    read_statement,
)
from prefbuild.promote.version import Files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRIES = 4  # to learn what landed, when the connection is bad

Write = Callable[[Path, str], Files]


def publish(
    target: dict[str, Any], name: str, *, build: str, gate: dict[str, Any], work: Path, write: Write, replace: bool
) -> tuple[dict[str, Any], bool]:
    """Publish a build, unless it is there; returns what the record keeps, and whether it was there.

    `write(folder, version)` writes the version's files. PromotionRefused says what is in the way and what is visible.
    """
    repo = target["repo"]
    with plainly(repo):
        api = client()
        state = look(api, repo)
        found = state.find(build)
        already = found is not None and state.tags.get(found.version) == found.commit
        if found is None:
            _check_access(target, state)
            if not state.exists:
                print(f"prefbuild: making the {'private' if target['private'] else 'public'} repository {repo}", file=sys.stderr)  # fmt: skip
                api.create_repo(repo, private=target["private"], exist_ok=True)
                state = look(api, repo)
            head = list_files(api, repo, str(state.head))
            if not replace:
                _check_foreign(api, repo, name, state, head)
            shutil.rmtree(work, ignore_errors=True)
            try:
                number = state.next_version()
                folder = work / f"{name}-{number}"  # an OpenSSF signature holds the folder's name
                folder.mkdir(parents=True)
                files = write(folder, number)
                adds = [
                    path for path in _adapter_first(files) if version.differences(_only(files, path), _only(head, path))
                ]
                found, already = _commit(
                    api, repo, state, build, number, title=f"{name} {number}",
                    operations=[*_adds(folder, adds, files), *_deletes(head, files)],
                )  # fmt: skip
            finally:
                shutil.rmtree(work, ignore_errors=True)
        elif already and state.promotions[0].build != build:
            print(
                f"prefbuild: {repo}: {state.promotions[0].version} is current since then; "
                f"`prefbuild rollback {name} --to {found.version}` brings this build back",
                file=sys.stderr,
            )
        facts = _read_back(api, repo, found, target, gate)
        _tag(api, repo, found)
    return facts, already


def roll_back(
    target: dict[str, Any],
    name: str,
    to: str | None,
    *,
    check: Callable[[str], Any],
    recorded: list[str],
    replace: bool,
) -> dict[str, Any]:
    """Make an earlier version's files current by a new commit and tag; returns what the record keeps.

    `check(commit)` raises when that commit is not to be trusted; `recorded` are the versions in the record, so that a
    rollback that was interrupted is finished first. PromotionRefused when there is no earlier version, or it is not what
    was published.
    """
    repo = target["repo"]
    with plainly(repo):
        api = client()
        state = look(api, repo)
        if not state.promotions:
            raise PromotionRefused(f"{repo}: holds no promotion of prefbuild")
        last = state.promotions[0]
        facts = _read_back(api, repo, last)
        if last.commit == state.head and "same_as" in facts and last.version not in recorded and to in (None, facts["same_as"]):  # fmt: skip
            _tag(api, repo, last)
            return facts
        head = list_files(api, repo, str(state.head))
        if not replace:
            _check_foreign(api, repo, name, state, head)
        back = _earlier(repo, state, to, facts.get("same_as", last.version))
        check(back.commit)
        there = _read_back(api, repo, back)
        if there["name"] != name:
            raise PromotionRefused(f"{repo}: {back.version} is a version of {there['name']}, not of {name}")
        origin = there.get("same_as", back.version)
        operations = _restore(api, repo, back.commit, head)
        if not operations:
            raise PromotionRefused(
                f"{repo}: main holds the files of {origin} already, so there is nothing to roll back"
            )
        number = state.next_version()
        title = f"{name} {number}: back to {origin}"
        made, _ = _commit(api, repo, state, back.build, number, title=title, operations=operations)
        facts = _read_back(api, repo, made)
        _tag(api, repo, made)
    return facts


# ---- steps


def _check_access(target: dict[str, Any], state: State) -> None:
    repo = target["repo"]
    try:
        problem = write_access(repo, target["private"])
    except CouldNotAsk as error:
        raise PromotionRefused(f"{repo}: {error}; try again when it answers") from None
    if problem is not None:
        raise PromotionRefused(f"{repo}: {problem}")
    if state.exists and state.private and not target["private"]:
        print(f"prefbuild: {repo} is private and stays so; its settings on the Hub make it public", file=sys.stderr)


def _check_foreign(api: "HfApi", repo: str, name: str, state: State, head: Files) -> None:
    """What is on main must be a version of this recipe, or nothing: anything else was not put there by a promotion."""
    others = sorted(set(head) - {version.OF_THE_HUB})
    if not others:
        return
    fix = "look at it, then promote to a repository of its own, or with --replace over it; history keeps it"
    read = read_statement(api, repo, str(state.head), head)
    if read is None:
        some = ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")
        raise PromotionRefused(f"{repo}: main holds files that no promotion put there ({some}); {fix}")
    made, facts = read
    if facts["name"] != name:
        raise PromotionRefused(f"{repo}: main holds {facts['name']} {facts['version']}, another recipe's model; {fix}")
    wrong = version.wrong_files(head, made)
    if wrong:
        raise PromotionRefused(f"{repo}: main was changed since {facts['version']}:\n  " + "\n  ".join([*wrong, fix]))


def _adapter_first(files: Files) -> list[str]:
    return sorted(files, key=lambda path: (not path.removeprefix("adapter/").startswith("adapter_"), path))


def _adds(folder: Path, paths: list[str], files: Files) -> Iterator[Any]:
    """Uploads, hashed as they are now. PromotionRefused when one is not what was listed a moment ago."""
    from huggingface_hub import CommitOperationAdd

    for path in paths:
        add = CommitOperationAdd(path, str(folder / path))
        if add.upload_info.sha256.hex() != files[path]["sha256"]:
            raise PromotionRefused(f"{path}: changed while it was being promoted")
        yield add


def _deletes(head: Files, wanted: Files) -> list[Any]:
    from huggingface_hub import CommitOperationDelete

    gone = sorted(set(head) - set(wanted) - {version.OF_THE_HUB})
    return [CommitOperationDelete(path, is_folder=False) for path in gone]


def _restore(api: "HfApi", repo: str, commit: str, head: Files) -> list[Any]:
    """Operations that make main what it was at a commit. Large files are named, not sent again."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

    wanted = list_files(api, repo, commit)
    operations: list[Any] = []
    for path, entry in wanted.items():
        if path == version.OF_THE_HUB or not version.differences({path: entry}, _only(head, path)):
            continue
        if "sha256" in entry:
            operations.append(CommitOperationCopy(path, path, src_revision=commit))
        else:
            operations.append(CommitOperationAdd(path, read_file(api, repo, commit, path, entry)))
    return operations + _deletes(head, wanted)


def _only(files: Files, path: str) -> Files:
    return {path: files[path]} if path in files else {}


def _commit(
    api: "HfApi", repo: str, state: State, build: str, number: str, *, title: str, operations: list[Any]
) -> tuple[Promotion, bool]:
    """One commit on the head that was looked at. After any error the Hub is asked whether it landed.

    Returns the promotion, and whether it is somebody else's of the same build.
    """
    description = f"{BUILD_LINE}{build}\n{VERSION_LINE}{number}"
    try:
        info = api.create_commit(
            repo, operations, commit_message=title, commit_description=description, parent_commit=state.head
        )
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return Promotion(commit=info.oid, version=number, build=build, time=time), False
    except Exception as error:
        now = _look_again(api, repo, error)
        known = {one.commit for one in state.promotions}
        landed = next((one for one in now.promotions if one.build == build and one.commit not in known), None)
        if landed is not None:
            raced = getattr(getattr(error, "response", None), "status_code", None) == 412
            what = "is published by somebody else at the same time" if raced else "landed, though its answer was lost"
            print(f"prefbuild: {repo}: the commit of {landed.version} {what}", file=sys.stderr)
            return landed, raced
        if now.head != state.head:
            newer = now.promotions[0] if now.promotions else None
            who = f"{newer.version} of another build" if newer and newer.commit == now.head else f"commit {str(now.head)[:8]}"  # fmt: skip
            raise PromotionRefused(
                f"{repo}: somebody else was faster: main is {who} now; nothing of yours was published. Look at it, and "
                "promote again if yours should follow it"
            ) from None
        raise


def _look_again(api: "HfApi", repo: str, error: Exception) -> State:
    for left in reversed(range(TRIES)):
        try:
            return look(api, repo)
        except Exception as failed:
            if not left or _is_final(failed):
                raise PromotionRefused(
                    f"{repo}: {explain(repo, error)}. Whether the commit landed could not be asked ({explain(repo, failed)}); "
                    "promote again: it finds out, and publishes nothing twice"
                ) from None
            sleep(2.0 ** (TRIES - left - 2))
    raise AssertionError


def _is_final(error: Exception) -> bool:
    """Whether asking again can't help: the Hub understood, and refused."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 409, 429)


def _read_back(
    api: "HfApi", repo: str, found: Promotion, target: dict[str, Any] | None = None, gate: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A commit's files have the digests of its statement, and the roles those that a gate judged; returns its facts."""
    files = list_files(api, repo, found.commit)
    shown = f"{repo} at commit {found.commit[:8]}"
    read = read_statement(api, repo, found.commit, files)
    if read is None:
        raise PromotionRefused(f"{shown}: has no {version.STATEMENT}, so it is no version")
    made, facts = read
    version.check_files(files, made, shown)
    if facts["build"] != found.build:
        raise PromotionRefused(f"{shown}: says that it is build {found.build}, its statement says {facts['build']}")
    if target is not None and gate is not None:
        listed = version.subjects(made)
        known = {path: {"size": entry["size"], **listed.get(path, {})} for path, entry in files.items()}
        known = {path: entry for path, entry in known.items() if "sha256" in entry}
        version.check_roles(known, target, gate, shown)
    return _facts_of(repo, found, facts)


def _facts_of(repo: str, found: Promotion, facts: dict[str, Any]) -> dict[str, Any]:
    """What the record keeps; a commit whose statement names another version went back to that one."""
    facts = {**facts, "place": repo, "commit": found.commit}
    if facts["version"] == found.version:
        return facts
    return {**facts, "version": found.version, "same_as": facts["version"], "time": found.time}


def _tag(api: "HfApi", repo: str, found: Promotion) -> None:
    """Tag a commit, or see that it is; never move a tag."""
    error: Exception | None = None
    for left in reversed(range(TRIES)):
        try:
            tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
            if tags.get(found.version) == found.commit:
                return
            if found.version in tags:
                raise PromotionRefused(
                    f"{repo}: tag {found.version} is at commit {tags[found.version][:8]}, not at {found.commit[:8]}, which was "
                    "to be tagged; somebody set it by hand: delete it on the Hub, and promote again"
                )
            api.create_tag(repo, tag=found.version, revision=found.commit)
        except PromotionRefused:
            raise
        except Exception as failed:
            error = failed
            if not left or _is_final(failed):
                break
            sleep(2.0 ** (TRIES - left - 2))
    raise PromotionRefused(
        f"{repo}: commit {found.commit[:8]} is on main, and could not be tagged {found.version} "
        f"({explain(repo, error) if error else 'the tag does not show'}); promote again: it only sets the tag"
    )


def _earlier(repo: str, state: State, to: str | None, current: str) -> Promotion:
    """The version to go back to: the one asked for, or the one before the one whose files are current."""
    tagged = [one for one in state.promotions if state.tags.get(one.version) == one.commit]
    if to is not None:
        found = next((one for one in tagged if one.version == to), None)
        if found is None:
            have = ", ".join(one.version for one in reversed(tagged)) or "none"
            raise PromotionRefused(f"{repo}: has no version {to}; it has {have}")
        return found
    before = [one for one in tagged if int(one.version[1:]) < int(current[1:])]
    if not before:
        raise PromotionRefused(f"{repo}: main holds {current}, and no version was promoted before it")
    return max(before, key=lambda one: int(one.version[1:]))
