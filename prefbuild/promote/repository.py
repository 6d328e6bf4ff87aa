"""What a repository on the Hub holds: main, tags, promotions, files. Asks, and changes nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild.artifact import git_blob, sha256_file
from prefbuild.errors import PromotionRefused
from prefbuild.promote import version
from prefbuild.promote.version import Files
from prefbuild.sources.hub import forget

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Lines of a commit's message that make it a promotion.
BUILD_LINE = "prefbuild-build: "
VERSION_LINE = "prefbuild-version: "


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A commit on main that is a version, by its message."""

    commit: str
    version: str
    build: str
    time: str  # ISO, UTC


@dataclass(frozen=True, kw_only=True)
class State:
    """What a repository held when it was asked."""

    exists: bool
    private: bool
    head: str | None  # commit that main is at
    tags: dict[str, str]  # commit by tag
    promotions: list[Promotion]  # newest first

    def find(self, build: str) -> Promotion | None:
        """The newest promotion of a build."""
        return next((one for one in self.promotions if one.build == build), None)

    def next_version(self) -> str:
        """One above every version there is or was begun: a number is never given twice."""
        used = [int(found[1]) for name in self.tags if (found := version.NUMBER.fullmatch(name))]
        used += [int(one.version[1:]) for one in self.promotions]
        return f"v{max(used, default=0) + 1}"


def client() -> "HfApi":
    """The client, with its own places for token, cache and endpoint; no bars where nobody looks."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="prefbuild")


def look(api: "HfApi", repo: str, *, at: str | None = None) -> State:
    """Ask for main, tags, and the promotions in the history of main, or of the commit `at`."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return State(exists=False, private=True, head=None, tags={}, promotions=[])
    refs = api.list_repo_refs(repo)
    head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
    promotions = []
    for commit in api.list_repo_commits(repo, revision=at or head) if head else ():
        lines = (commit.message or "").splitlines()
        values = {key: line.removeprefix(key) for line in lines for key in (BUILD_LINE, VERSION_LINE) if line.startswith(key)}  # fmt: skip
        if len(values) == 2 and version.NUMBER.fullmatch(values[VERSION_LINE]):
            time = commit.created_at.astimezone(UTC).isoformat(timespec="seconds")
            promotions.append(
                Promotion(commit=commit.commit_id, version=values[VERSION_LINE], build=values[BUILD_LINE], time=time)
            )
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    return State(exists=True, private=bool(info.private), head=head, tags=tags, promotions=promotions)


def list_files(api: "HfApi", repo: str, commit: str) -> Files:
    """Every file of a commit with size and digest, as the Hub lists it."""
    from huggingface_hub import RepoFile

    listed = api.list_repo_tree(repo, revision=commit, recursive=True)
    return {
        file.path: {"size": file.size, "sha256": file.lfs.sha256}
        if file.lfs
        else {"size": file.size, "gitBlob": file.blob_id}
        for file in listed
        if isinstance(file, RepoFile)
    }


def read_file(api: "HfApi", repo: str, commit: str, path: str, entry: dict[str, Any]) -> bytes:
    """A small file's bytes, which have the digest that the Hub lists. A damaged one is fetched once more."""
    for _ in range(2):
        cached = Path(api.hf_hub_download(repo, path, revision=commit))
        content = cached.read_bytes()
        if "sha256" in entry and sha256_file(cached) == entry["sha256"]:
            return content
        if "sha256" not in entry and git_blob(content) == entry["gitBlob"]:
            return content
        forget(cached)
    raise PromotionRefused(f"{repo}/{path}: other bytes came than the Hub lists for commit {commit[:8]}; try again")


def read_statement(api: "HfApi", repo: str, commit: str, files: Files) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The statement of a version and its facts; None where there is none."""
    entry = files.get(version.STATEMENT)
    if entry is None:
        return None
    data = read_file(api, repo, commit, version.STATEMENT, entry)
    return version.read_statement(data, f"{repo} at commit {commit[:8]}: {version.STATEMENT}")


# ---- what went wrong


@contextmanager
def plainly(repo: str) -> Iterator[None]:
    """Make the client's errors refusals that say what is the matter, and what to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PromotionRefused(
            f"{repo}: {explain(repo, error)}; then promote again: nothing is published twice"
        ) from None


def explain(repo: str, error: Exception) -> str:
    import httpx2
    from huggingface_hub import constants, errors

    response = getattr(error, "response", None)
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it"
        case errors.RepositoryNotFoundError():
            return "there is no such repository, or your token can't see it; correct `promote.repo`, or log in with `hf auth login`"
        case errors.HfHubHTTPError() if response is not None and response.status_code == 401:
            return "the Hub does not accept your token: it is mistyped, expired or revoked; log in with `hf auth login`"
        case errors.HfHubHTTPError() if response is not None and response.status_code == 403:
            return "your token may not write there; log in with one that may (`hf auth login`)"
        case errors.HfHubHTTPError() if response is not None:
            return f"the Hub answered {response.status_code} for {response.url.path}; try later"
        case httpx2.HTTPError():
            why = str(error) or type(error).__name__
            return f"the Hub can't be reached at {constants.ENDPOINT} ({why}); check the network, proxy and HF_ENDPOINT"
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; mend that"
