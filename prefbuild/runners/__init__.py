"""What can run a job: a module with `run(job) -> exit code` each. Which one is the user's choice, never a recipe's."""

import os
from pathlib import Path

from prefbuild.errors import RecipeError, UsageError
from prefbuild.job import Runner
from prefbuild.runners import docker, local

RUNNERS: dict[str, Runner] = {"local": local.run, "docker": docker.run}


def choose_runner(name: str | None = None) -> str:
    """The runner's name: `--runner`, else PREFBUILD_RUNNER, else `runner:` in the user's settings, else local.

    Raises UsageError for one that is not known, saying where it was named.
    """
    named = [(name, "--runner"), (os.environ.get("PREFBUILD_RUNNER"), "PREFBUILD_RUNNER"), _from_settings()]
    chosen, where = next(((name, where) for name, where in named if name), ("local", ""))
    if chosen not in RUNNERS:
        raise UsageError(f"{where}: there is no runner {chosen!r}; known: {', '.join(RUNNERS)}")
    return chosen


def settings_path() -> Path:
    """The user's settings, which are of a person and a machine, not of a project."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "prefbuild", "settings.yaml")


def _from_settings() -> tuple[str | None, str]:
    from prefbuild import yamlfile

    path = settings_path()
    if not path.exists():
        return None, str(path)
    document = yamlfile.load(path)
    unknown = sorted(set(document.data) - {"runner"})
    if unknown:
        raise RecipeError([f"{document.where((unknown[0],))}: {unknown[0]}: unknown key; known here: runner"])
    runner = document.data.get("runner")
    where = f"{document.where(('runner',))}: runner"
    if runner is not None and not isinstance(runner, str):
        raise RecipeError([f"{where}: one of {', '.join(RUNNERS)} is wanted"])
    return runner, where
