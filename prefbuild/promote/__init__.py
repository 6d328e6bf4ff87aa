"""Publish exactly the artifact that passed its gates: verify -> publish -> read back -> record.

    promote(root, name) -> {"version": "v3", "path": ..., "already": False, ...}

Covered: stale, edited or foreign files between the evaluation and the publication, sources that are not committed,
secrets and pickles in what is published, two promotions at once, a promotion killed at any point. Not covered: a forger
who rewrites samples, every digest and every lock, and commits that; nothing here is signed.
"""

import sys
from pathlib import Path
from typing import Any

from prefbuild.artifact import digest_of, sha256_file
from prefbuild.errors import PromotionRefused
from prefbuild.promote import directory, provenance
from prefbuild.promote.verify import read_resolved, verified_gate

DIRTY = "promoting all the same; nobody can rebuild this from git commit {commit}, which these are not in:"


def promote(root: Path, name: str, *, allow_dirty: bool = False) -> dict[str, Any]:
    """Publish a recipe's gated artifact in the directory registry its recipe names.

    Returns {name, version, path, build, artifact, git_commit, dirty, already, recorded}; `already` when this build is
    public already, in which case nothing on disk changes but a record that was missing.
    Raises PromotionRefused naming what is in the way, and leaves nothing behind.
    """
    resolved = read_resolved(root, name)
    section = resolved["promote"]
    gate = verified_gate(root, name, resolved)
    source = provenance.source_state(root, name)
    if source.dirty and not allow_dirty:
        raise PromotionRefused(
            f"{name}: not built from committed sources: {', '.join(source.dirty)}; commit and run `dvc repro`, "
            "or promote with --allow-dirty"
        )
    if source.dirty:
        print(DIRTY.format(commit=source.commit or "(none)"), *source.dirty, sep="\n  ", file=sys.stderr)
    build = digest_of({"gate": sha256_file(root / section["inputs"]["gate"]), "promote": section})

    registry = root / section["settings"]["promote"]["path"]
    with directory.locked(registry):
        version = directory.find(registry, name, build)
        already = version is not None
        if version is None:
            version = directory.publish(root, registry, name, resolved=resolved, gate=gate, source=source, build=build)
        facts = directory.verify(registry, name, version, gate)
        recorded = directory.record(registry, facts)
    return {**facts, "path": str(registry / name / version), "already": already, "recorded": recorded}
