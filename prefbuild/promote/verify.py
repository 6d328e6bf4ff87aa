"""Are these the bytes that passed their gates? `prefbuild verify me/model@v1`, or a folder.

Every file is hashed and compared with the signed statement that lies among them; the statement is trusted for its
signature, or because the project's own promotions.jsonl, in git, has its digest. Covered: files that were changed,
added, removed or renamed, another key, an edited card, a moved tag, a verdict that is not a pass, adapter and weights
that are not those judged. Not covered: a signer who lies.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild.errors import PromotionRefused, UsageError
from prefbuild.promote import record, repository, signing, version
from prefbuild.promote.version import Files
from prefbuild.sources.hub import forget

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A version that is what it says, and the lines that say what was seen."""

    facts: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A version as it was found: its files, and those that are read."""

    shown: str
    files: Files
    small: dict[str, bytes]
    folder: Path | None  # with every file in it, when all were read
    commit: str | None


def verify(what: str, *, root: Path | None, key: str | None = None, quick: bool = False) -> Verified:
    """Check a version on the Hub (`owner/name`, `owner/name@revision`) or in a folder.

    `quick` downloads no weights: the Hub's own list is taken for their digests. Raises PromotionRefused that names the
    file that differs, UsageError when there is no such thing to check.
    """
    records = record.read(root) if root else []
    keys = signing.find_keys(key)
    if Path(what).is_dir():
        with _folder(Path(what)) as seen:
            return _verify(seen, records, keys, given=key is not None)
    found = REPOSITORY.fullmatch(what)
    if not found:
        raise UsageError(f"{what}: is neither a folder nor owner/name or owner/name@revision")
    repo, revision = found[1], found[2] or "main"
    with repository.plainly(repo):
        api = repository.client()
        commit = str(api.repo_info(repo, revision=revision).sha)
        _check_tag(api, repo, revision, commit, records)
        with _downloaded(api, repo, commit, what, quick) as seen:
            return _verify(seen, records, keys, given=key is not None)


def _verify(seen: _Seen, records: list[dict[str, Any]], keys: Path | None, *, given: bool) -> Verified:
    data = seen.small.get(version.STATEMENT)
    if data is None:
        raise PromotionRefused(f"{seen.shown}: has no {version.STATEMENT}, so it was not published by prefbuild")
    made, facts = version.read_statement(data, f"{seen.shown}: {version.STATEMENT}")
    signer = facts["key"]
    lines = _check_trust(seen, data, facts, records, keys, given=given)
    version.check_files(seen.files, made, seen.shown)
    if (version.SIGNATURE in seen.files) != (signer is not None):
        there = "does not belong to an unsigned version" if signer is None else "is missing"
        raise PromotionRefused(f"{seen.shown}: {version.SIGNATURE} {there}")
    size = sum(entry["size"] for entry in seen.files.values()) / 1e6
    how = "hashed here" if seen.folder else "as the Hub lists them; weights were not downloaded"
    lines.insert(0, f"{len(seen.files)} files, {size:.1f} MB, {how}: all as the statement says, none too many")
    if signer is not None and keys is not None and seen.folder is not None:
        signing.verify_folder(seen.folder, signing.load_public(keys))
        lines.append(f"{version.SIGNATURE} is a good OpenSSF signature of them")
    lines.append(_check_gate(seen, made, facts))
    source = f"git commit {facts['git_commit'][:8]}" if facts["git_commit"] else "sources that were in no commit"
    at = f", commit {seen.commit[:8]}" if seen.commit else ""
    lines.insert(0, f"{seen.shown} is {facts['name']} {facts['version']}{at}, built from {source}")
    return Verified(facts=facts, lines=lines)


def _check_trust(
    seen: _Seen,
    data: bytes,
    facts: dict[str, Any],
    records: list[dict[str, Any]],
    keys: Path | None,
    *,
    given: bool,
) -> list[str]:
    """Why the statement is believed; PromotionRefused when nothing speaks for it."""
    lines, signer = [], facts["key"]
    known = [entry for entry in records if entry["provenance"] == facts["provenance"]]
    if known:
        lines.append(f"{record.RECORD} has it, as promoted at {known[0]['time']}")
    if keys is not None and (signer is not None or given):
        signing.check_statement(data, signing.load_public(keys), f"{seen.shown}: {version.STATEMENT}")
        lines.append(f"its statement is signed by key {str(signer)[:16]} ({keys})")
    if not lines:
        if signer is None:
            raise PromotionRefused(
                f"{seen.shown}: is not signed, and no {record.RECORD} here has it: anybody can have made it"
            )
        raise PromotionRefused(
            f"{seen.shown}: is signed by key {signer[:16]}, which is not here to check it with; give the folder of its "
            "public halves: --key FOLDER"
        )
    return lines


def _check_gate(seen: _Seen, made: dict[str, Any], facts: dict[str, Any]) -> str:
    """The verdict that was published is a pass, on this recipe and on these bytes."""
    shown = f"{seen.shown}: {version.RECORDS}/gate.json"
    try:
        gate = json.loads(seen.small[f"{version.RECORDS}/gate.json"])
        target = json.loads(seen.small[f"{version.RECORDS}/resolved.json"])["promote"]["settings"]["promote"]
        passed, rules = gate["passed"] is True and gate["recipe"] == facts["name"], gate["rules"]
    except (KeyError, TypeError, ValueError) as error:
        raise PromotionRefused(f"{shown}: is no verdict ({type(error).__name__}: {error})") from None
    if not passed or not all(rule["passed"] is True for rule in rules):
        raise PromotionRefused(f"{shown}: is no pass of {facts['name']}")
    digests = version.subjects(made)
    sized = {path: {"size": entry["size"], **digests.get(path, {})} for path, entry in seen.files.items()}
    version.check_roles({path: entry for path, entry in sized.items() if "sha256" in entry}, target, gate, seen.shown)
    exactly = "this adapter and these weights" if "adapter" in facts else "these weights"
    return f"{len(rules)} of {len(rules)} rules passed, on exactly {exactly}"


def _check_tag(api: "HfApi", repo: str, revision: str, commit: str, records: list[dict[str, Any]]) -> None:
    """A tag vN is where prefbuild set it. PromotionRefused when it was moved."""
    if not version.NUMBER.fullmatch(revision):
        return
    state = repository.look(api, repo, at=commit)
    there = next((one.version for one in state.promotions if one.commit == commit), None)
    recorded = next((e["commit"] for e in records if (e["place"], e["version"]) == (repo, revision)), commit)
    if there != revision or recorded != commit:
        where = f" ({record.RECORD} says {recorded[:8]})" if recorded != commit else ""
        raise PromotionRefused(
            f"{repo}@{revision}: the tag was moved: it is at commit {commit[:8]}, which is {there or 'no promotion'}{where}"
        )


@contextmanager
def _folder(folder: Path) -> Iterator[_Seen]:
    files = version.read_files(folder)
    small = {path: (folder / path).read_bytes() for path in files if path.startswith(f"{version.RECORDS}/")}
    yield _Seen(shown=str(folder), files=files, small=small, folder=folder, commit=None)


@contextmanager
def _downloaded(api: "HfApi", repo: str, commit: str, shown: str, quick: bool) -> Iterator[_Seen]:
    """A commit's files: the small ones' bytes, and unless `quick` a folder with all of them, hashed."""
    from huggingface_hub import constants

    listed = repository.list_files(api, repo, commit)
    if quick:
        records = [path for path in listed if path.startswith(f"{version.RECORDS}/")]
        small = {path: repository.read_file(api, repo, commit, path, listed[path]) for path in records}
        yield _Seen(shown=shown, files=listed, small=small, folder=None, commit=commit)
        return
    # Beside the cache, so that its files get a second name there and no second copy.
    os.makedirs(constants.HF_HUB_CACHE, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=constants.HF_HUB_CACHE, prefix=".prefbuild-verify-"))
    try:
        for path in listed:
            if path == version.OF_THE_HUB:
                continue
            cached = Path(api.hf_hub_download(repo, path, revision=commit)).resolve()
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            version.link_or_copy(cached, folder / path)
        with _folder(folder) as seen:
            wrong = version.differences({p: e for p, e in listed.items() if p != version.OF_THE_HUB}, seen.files)
            if wrong:  # what came is not what the Hub lists: the transfer, or the cache, damaged it
                for path in {line.split(":")[0] for line in wrong} & set(listed):
                    forget(Path(api.hf_hub_download(repo, path, revision=commit)))
                raise PromotionRefused(
                    f"{shown}: damaged on the way, or in the cache; try again:\n  " + "\n  ".join(wrong)
                )
            yield _Seen(shown=shown, files=seen.files, small=seen.small, folder=folder, commit=commit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
