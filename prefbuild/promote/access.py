"""Whether a promotion to the Hub could write there, asked before hours go into a model for it.

Covered: no token, one that is not accepted or only reads, somebody else's namespace, a repository that can't be written
or that everybody can see. It only asks, and makes nothing. Not covered: storage limits, and what changes until then.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class CouldNotAsk(Exception):
    """The Hub gave no answer: offline, not reachable, or out of order."""


def write_access(repo: str, private: bool) -> str | None:
    """What hinders the user's token from writing to a model repository, or from making it, in a sentence; or None.

    Raises CouldNotAsk when there is no answer.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, errors, get_token

    if constants.is_offline_mode():
        raise CouldNotAsk("HF_HUB_OFFLINE is set")
    if get_token() is None:
        return "you are not logged in to the Hub; log in with `hf auth login`"
    try:
        return _problem(HfApi(library_name="prefbuild"), repo, private)
    except errors.HfHubHTTPError as error:
        raise CouldNotAsk(f"the Hub answered {error.response.status_code}") from None
    except (httpx2.HTTPError, OSError) as error:
        why = str(error) or type(error).__name__
        raise CouldNotAsk(f"the Hub can't be reached at {constants.ENDPOINT}: {why}") from None


def _problem(api: "HfApi", repo: str, private: bool) -> str | None:
    from huggingface_hub import errors

    try:
        me = api.whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        return (
            "the Hub does not accept your token: it is mistyped, expired or revoked; unset HF_TOKEN if it is set, "
            "and log in again with `hf auth login`"
        )
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return (
            f"your token can only read; make one that can write, at {api.endpoint}/settings/tokens, and log in with it"
        )
    owner = repo.partition("/")[0]
    orgs = {org["name"].casefold(): org.get("roleInOrg") for org in me["orgs"]}
    if owner.casefold() not in [me["name"].casefold(), *orgs]:
        teams = f" and in {', '.join(sorted(org['name'] for org in me['orgs']))}" if orgs else ", in no organisation"
        foreign = (
            f"{owner} is neither you nor an organisation of yours: you are {me['name']}{teams}; correct promote.repo"
        )
    else:
        foreign = ""
    grant = f"let the token write to {repo}, at {api.endpoint}/settings/tokens"
    try:
        info = api.repo_info(repo)
    except errors.RepositoryNotFoundError:  # it would be made, or is somebody's secret
        if not foreign and orgs.get(owner.casefold()) == "read":
            return f"you may only read in {owner}, where {repo} would be made; ask its owners for write access"
        if not foreign and token.get("role") == "fineGrained" and not _may_write(token, owner):
            return f"your fine-grained token can't make repositories of {owner}; {grant.replace(repo, owner)}"
        return foreign or None
    try:
        api.auth_check(repo, write=True)
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        fix = grant if token.get("role") == "fineGrained" else f"ask the owners of {owner} for write access"
        return foreign or f"{repo} is there, and you can't write to it; {fix}"
    if private and not info.private:
        return (
            f"everybody can see {repo}, and the recipe says promote.private: true; make it private in its settings on "
            "the Hub, or write private: false"
        )
    return None


def _may_write(token: dict[str, Any], owner: str) -> bool:
    """Whether a fine-grained token may make repositories of an owner; yes when its scopes can't be made out."""
    try:
        scopes = token["fineGrained"]["scoped"]
        allowed = [scope["entity"]["name"].casefold() for scope in scopes if "repo.write" in scope["permissions"]]
    except (KeyError, TypeError, AttributeError):
        return True
    return owner.casefold() in allowed
