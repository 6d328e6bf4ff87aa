"""A model or data set on the Hugging Face Hub, at one commit.

Covered: a model's config, tokenizer, chat template and safetensors, or pickled weights that a recipe allows by digest;
a data set's files of rows, all or a configuration's split; or the files a recipe names. Downloads go through the user's own cache, proxy and token, and every byte is hashed: the client checks sizes
only. A lost connection is taken up where it ended, and files that are whole in the cache are not fetched again.
Not covered: data sets made by a script, repositories' own code; the token is the client's affair.
"""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild.artifact import git_blob, sha256_file
from prefbuild.errors import LockError
from prefbuild.sources import splits
from prefbuild.sources.splits import ROWS
from prefbuild.sources.verify import copy_verified, slugify

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = f"{PICKLE}.index.json"
CHECKPOINT = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "README.md",  # its licence is that of what is made from it
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")

Tree = dict[str, "RepoFile"]


def reference(source: dict[str, Any]) -> dict[str, Any]:
    """Repository and revision, and what else the recipe says of which files."""
    said = ("files", "config", "split") if _kind(source) == "dataset" else ("files", "allow_pickle")
    return {key: source[key] for key in ("source", "repo", "revision", *(key for key in said if source[key]))}


def title(source: dict[str, Any]) -> str:
    """`org/name@revision`."""
    return f"{source['repo']}@{source['revision']}"


def slug(source: dict[str, Any]) -> str:
    """The repository's name, without its owner."""
    return slugify(source["repo"].split("/")[1])


def pin(source: dict[str, Any], root: Path) -> dict[str, Any]:
    """The revision's commit, and every needed file there. Small files that are not LFS are downloaded to hash them."""
    from huggingface_hub import HfApi, RepoFile

    repo: Any = {"repo_id": source["repo"], "repo_type": _kind(source)}
    with _plainly(source):
        api = HfApi(library_name="prefbuild")
        info = api.repo_info(**repo, revision=source["revision"])
        if info.gated:  # what it holds is listed to anybody
            api.auth_check(**repo)
        commit = str(info.sha)
        listed = api.list_repo_tree(**repo, revision=commit, recursive=True)
        tree = {file.path: file for file in listed if isinstance(file, RepoFile)}
        chosen = _chosen(source, tree, commit)
        return {"files": [_pin_file(source, tree[path], commit) for path in chosen], "commit": commit}


def fetch(source: dict[str, Any], locked: dict[str, Any], into: Path, work: Path) -> None:
    """Download the locked files at the locked commit. A file that came damaged is fetched once more."""
    commit = locked["commit"]
    # A container's home is a small disk in memory, so the cache is the stage's work folder there.
    cache = work / "hub" if "PREFBUILD_IMAGE" in os.environ else None
    size = sum(entry["size"] for entry in locked["files"])
    print(f"prefbuild: fetching {title(source)} at {commit[:8]}, {size / 1e6:.1f} MB", file=sys.stderr)
    for entry in locked["files"]:
        shown = f"{title(source)}/{entry['path']}"
        remedy = f"the Hub, or a cache on the way, gives other bytes than those of commit {commit[:8]}"
        for again in (True, False):
            with _plainly(source, commit):
                cached = _download(source, entry["path"], commit, cache)
            try:
                with open(cached, "rb") as stream:
                    copy_verified(stream, entry, into, shown=shown, remedy=remedy)
                break
            except LockError as error:
                forget(cached)
                if not again:
                    raise
                print(f"prefbuild: {error}; fetching it once more", file=sys.stderr)


def ask(source: dict[str, Any], locked: dict[str, Any], *, cache: bool) -> bool:
    """Ask for the locked commit, as fetching would; whether only a token opens it. LockError says what hinders.

    With `cache`, nobody is asked when the client's cache has every file.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    repo: Any = {"repo_id": source["repo"], "repo_type": _kind(source)}
    commit = locked["commit"]
    paths = [entry["path"] for entry in locked["files"]]
    if cache and all(isinstance(try_to_load_from_cache(filename=p, revision=commit, **repo), str) for p in paths):
        return False
    with _plainly(source, commit):
        api = HfApi(library_name="prefbuild")
        info = api.repo_info(**repo, revision=commit)
        if info.gated:
            api.auth_check(**repo)
        return bool(info.private or info.gated)


def _kind(source: dict[str, Any]) -> str:
    return "model" if "dtype" in source else "dataset"  # as only a base model has one


# ---- which files


def _chosen(source: dict[str, Any], tree: Tree, commit: str) -> list[str]:
    """The paths to pin, sorted. LockError for what can't be used."""
    paths = _named(source, tree) if source["files"] else None
    if _kind(source) == "dataset":
        return _data_files(source, tree, paths, commit)
    paths = _checkpoint_files(source, tree, commit) if paths is None else paths
    for path in paths:
        if path.endswith(".py"):
            raise LockError(f"{title(source)}/{path}: is code; leave it out of `files`")
    _check_pickles(source, tree, [path for path in paths if path.endswith(PICKLES)], commit)
    return paths


def _named(source: dict[str, Any], tree: Tree) -> list[str]:
    paths: set[str] = set()
    visible = [path for path in sorted(tree) if not any(part.startswith(".") for part in path.split("/"))]
    for pattern in source["files"]:
        found = {path for path in visible if fnmatchcase(path, pattern)}
        if not found:
            there = get_close_matches(pattern, visible, n=3, cutoff=0.3) or visible[:8]
            raise LockError(f"{title(source)}: no file is called {pattern}; there are {', '.join(there)}")
        paths |= found
    return sorted(paths)


def _checkpoint_files(source: dict[str, Any], tree: Tree, commit: str) -> list[str]:
    """Config, tokenizer and safetensors of the repository's top folder; pickled weights where there are no others."""
    if INDEX in tree:
        weights = _indexed(source, tree, INDEX, commit)
    elif "model.safetensors" in tree:
        weights = {"model.safetensors"}
    elif ggufs := sorted(path for path in tree if path.endswith(".gguf")):
        raise LockError(f"{title(source)}: holds GGUF files; name the one to use, as in files: [{ggufs[0]}]")
    elif PICKLE_INDEX in tree:
        weights = _indexed(source, tree, PICKLE_INDEX, commit)
    elif PICKLE in tree:
        weights = {PICKLE}
    elif pickles := sorted(path for path in tree if path.endswith(PICKLES)):
        raise LockError(
            f"{title(source)}: its weights are a pickle ({pickles[0]}), which can run code when loaded; "
            "choose a repository or revision with safetensors"
        )
    else:
        raise LockError(f"{title(source)}: has no model.safetensors; is it a model with an adapter's weights only?")
    if "config.json" not in tree:
        raise LockError(f"{title(source)}: has no config.json, so it is no checkpoint; choose another repository")
    return sorted(weights | (CHECKPOINT & set(tree)))


def _indexed(source: dict[str, Any], tree: Tree, index: str, commit: str) -> set[str]:
    """An index and the files it names."""
    content = json.loads(_verified(source, tree[index], commit).read_text(encoding="utf-8"))
    weights = {index, *content["weight_map"].values()}
    if lost := sorted(weights - set(tree)):
        raise LockError(f"{title(source)}: {index} names {lost[0]}, which is not there; choose another revision")
    return weights


def _check_pickles(source: dict[str, Any], tree: Tree, pickles: list[str], commit: str) -> None:
    """LockError unless the recipe allows exactly these pickles, with the digests that they have."""
    allowed = source["allow_pickle"] or {}
    digests = {path: f"sha256:{_pin_file(source, tree[path], commit)['sha256']}" for path in pickles}
    for path in pickles:
        if path in allowed and allowed[path] != digests[path]:
            raise LockError(
                f"{title(source)}/{path}: is a pickle with the digest {digests[path]}, and `allow_pickle` says "
                f"{allowed[path]}; find out why it is another before you correct the recipe"
            )
    if lacking := [path for path in pickles if path not in allowed]:
        entries = ", ".join(f'{path}: "{digests[path]}"' for path in pickles)
        raise LockError(
            f"{title(source)}/{lacking[0]}: is a pickle, which can run code when loaded; choose a repository or "
            f"revision with safetensors, or allow that its tensors are read: allow_pickle: {{{entries}}}"
        )
    if unread := sorted(set(allowed) - set(pickles)):
        raise LockError(f"{title(source)}/{unread[0]}: is in `allow_pickle` and is not read; take it out")


def _data_files(source: dict[str, Any], tree: Tree, named: list[str] | None, commit: str) -> list[str]:
    """Files of rows: those that are named, a configuration's split, or all when they are one set of rows."""
    paths = named or splits.rows_of(list(tree))
    for path in named or []:
        if not path.endswith(ROWS):
            raise LockError(f"{title(source)}/{path}: is no file of rows; those end in {', '.join(ROWS)}")
    scripts = sorted(path for path in tree if path.endswith(".py"))
    if not paths and scripts:
        raise LockError(
            f"{title(source)}: its rows are made by a script ({scripts[0]}), which is not run; "
            "the Hub's own copy in Parquet may be there: revision: refs/convert/parquet"
        )
    if not paths:
        raise LockError(f"{title(source)}: holds no file of rows; those end in {', '.join(ROWS)}")
    if source["config"] or source["split"]:
        card = _card(source, tree, commit)
        return splits.choose(paths, card, source["config"], source["split"], title(source))
    sets = splits.sets_of(paths)
    if named is None and len(sets) > 1:
        there = splits.listing(paths, _card(source, tree, commit), title(source))
        how = f"with config and split (there are {there}), or " if there else ""
        raise LockError(
            f"{title(source)}: has several sets of rows ({', '.join(sets[:6])}); say which, {how}"
            f"as in files: [{paths[0]}]"
        )
    return paths


def _card(source: dict[str, Any], tree: Tree, commit: str) -> dict[str, Any]:
    """What the YAML on top of README.md says. LockError when it can't be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if "README.md" not in tree:
        return {}
    try:
        return metadata_load(_verified(source, tree["README.md"], commit)) or {}
    except (yaml.YAMLError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise LockError(
            f"{title(source)}/README.md: the YAML on its top can't be read ({why}); name the files, with files: [...]"
        ) from None


# ---- one file


def _pin_file(source: dict[str, Any], file: "RepoFile", commit: str) -> dict[str, Any]:
    if file.lfs is not None:
        return {"path": file.path, "size": file.lfs.size, "sha256": file.lfs.sha256}
    path = _verified(source, file, commit)
    return {"path": file.path, "size": path.stat().st_size, "sha256": sha256_file(path)}


def _verified(source: dict[str, Any], file: "RepoFile", commit: str) -> Path:
    """A file in the cache that has the digest the Hub lists. LockError when it has another one twice."""
    for _ in range(2):
        path = _download(source, file.path, commit, None)
        content = path.read_bytes()
        if file.lfs is not None:
            digest, listed = hashlib.sha256(content).hexdigest(), file.lfs.sha256
        else:
            digest, listed = git_blob(content), file.blob_id
        if digest == listed:
            return path
        forget(path)
    raise LockError(f"{title(source)}/{file.path}: its digest is {digest}, the Hub lists {listed}; try again")


def _download(source: dict[str, Any], path: str, commit: str, cache: Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return Path(hf_hub_download(source["repo"], path, repo_type=_kind(source), revision=commit, cache_dir=cache))


def forget(cached: Path) -> None:
    """Remove a damaged file from the client's cache, where it would be taken for good."""
    blob = cached.resolve()
    cached.unlink()
    blob.unlink(missing_ok=True)


# ---- what went wrong


@contextmanager
def _plainly(source: dict[str, Any], pinned: str | None = None) -> Iterator[None]:
    """Make the client's errors LockErrors that say what is the matter and what to do; `pinned` is a commit asked for."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except LockError:
        raise
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LockError(f"{title(source)}: {_explain(source, error, pinned)}") from None


def _explain(source: dict[str, Any], error: Exception, pinned: str | None) -> str:
    import httpx2
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client tells that the cache has it not, and this is why it could not get it
    page = f"{constants.ENDPOINT}/{'' if _kind(source) == 'model' else 'datasets/'}{source['repo']}"
    what, token = ("model" if _kind(source) == "model" else "data set"), get_token()
    login = "log in with `hf auth login`"
    if "PREFBUILD_IMAGE" in os.environ:  # a container gets no token
        login = "fetch it outside of a container, with `--runner local`, where you are logged in"
    match error:
        case errors.GatedRepoError() if token:
            return f"is gated, and your account has no access; ask for it at {page}"
        case errors.GatedRepoError():
            return f"is gated; ask for access at {page}, and {login}"
        case errors.RepositoryNotFoundError() if _exists_as_other(source):
            return f"is no {what} but a {'data set' if what == 'model' else 'model'}; correct `repo`"
        case errors.RepositoryNotFoundError() if token:
            return (
                f"there is no such {what}, or it is private and your token can't see it; correct `repo`, or use the "
                "token of an account that has access"
            )
        case errors.RepositoryNotFoundError():
            return f"there is no such {what}, or it is private; correct `repo`, or {login}"
        case errors.RevisionNotFoundError() if pinned:
            return f"has the pinned commit {pinned[:8]} no more; `prefbuild lock --update` pins what is there now"
        case errors.RevisionNotFoundError():
            return f"has no branch, tag or commit of that name; it has {_revisions(source)}; correct `revision`"
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return f"HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) has it not; unset it for once"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return (
                "the Hub does not accept your token: it is mistyped, expired or revoked; unset HF_TOKEN if it is set, "
                "and log in again with `hf auth login`"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return "your token is not allowed to read it; use one with read access to this repository"
        case errors.HfHubHTTPError():
            return f"the Hub answered {error.response.status_code} for {error.response.url.path}; try again later"
        case httpx2.HTTPError():
            why = str(error) or type(error).__name__
            return f"the Hub can't be reached at {constants.ENDPOINT} ({why}); check the network, proxy and HF_ENDPOINT"
    return f"could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}; try again"


def _exists_as_other(source: dict[str, Any]) -> bool:
    from huggingface_hub import HfApi

    other = "dataset" if _kind(source) == "model" else "model"
    try:
        return HfApi().repo_exists(source["repo"], repo_type=other)
    except Exception:  # only a hint is wanted
        return False


def _revisions(source: dict[str, Any]) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(source["repo"], repo_type=_kind(source))
    except Exception:  # only a hint is wanted
        return "others"
    return ", ".join([ref.name for ref in (*refs.branches, *refs.tags)][:12])
