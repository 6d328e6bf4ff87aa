"""Fetch a source's files of rows, byte for byte what was locked."""

import shutil
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST
from prefbuild.errors import StageError
from prefbuild.sources import fetch


def run(
    settings: dict[str, Any], inputs: dict[str, Path | list[Path]], outputs: dict[str, Path], work: Path, name: str
) -> None:
    """Leave the locked files in outputs["data"]. LockError when one is not what was locked."""
    if any(entry["path"] == MANIFEST for entry in settings["files"]):
        raise StageError(
            f"{MANIFEST}: a folder of data can't have a file of that name, the build writes its own; rename it"
        )
    source = settings["source"]
    if "source" in inputs:
        source = {**source, "path": str(inputs["source"])}
    into = outputs["data"]
    shutil.rmtree(into, ignore_errors=True)  # what a killed run left
    into.mkdir(parents=True)
    work.mkdir(parents=True, exist_ok=True)
    fetch(source, settings, into, work)
