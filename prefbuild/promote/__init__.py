"""Publish exactly the artifact that passed its gates: verify -> publish -> read back -> record.

    promote(root, name) -> {"version": "v3", "place": "me/model", "already": False, ...}

Covered: stale, edited or foreign files between the evaluation and the publication, sources that are not committed,
secrets and pickles in what is published, several promotions at once, a promotion killed or cut off at any point. Not
covered: a forger who rewrites samples, every digest and every lock, commits that, and has the key.
"""

import sys
from pathlib import Path
from typing import Any

from prefbuild.artifact import digest_of, sha256_file
from prefbuild.errors import PromotionRefused
from prefbuild.promote import directory, hub, provenance, record, signing
from prefbuild.promote.gated import read_resolved, verified_gate
from prefbuild.promote.verify import verify
from prefbuild.promote.version import Files, link_or_copy, write_version
from prefbuild.recipe import known_recipes, load_recipes

DIRTY = "promoting all the same; nobody can rebuild this from git commit {commit}, which these are not in:"


def promote(
    root: Path, name: str, *, allow_dirty: bool = False, key: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Publish a recipe's gated artifact where its recipe says, and record it in promotions.jsonl.

    `key` is the folder of the keys to sign with; without it the user's own, or none. `replace` publishes over files in a
    Hub repository that no promotion put there. Returns the record with `already` (it is public, and nothing there was
    changed) and `recorded`. Raises PromotionRefused naming what is in the way.
    """
    resolved = read_resolved(root, name)
    if resolved["promote"]["settings"]["promote"]["to"] == "hub":
        _check_paths(root, name)
    section = resolved["promote"]
    target = section["settings"]["promote"]
    gate = verified_gate(root, name, resolved)
    source = provenance.source_state(root, name)
    if source.dirty and not allow_dirty:
        raise PromotionRefused(
            f"{name}: not built from committed sources: {', '.join(source.dirty)}; commit and run `dvc repro`, "
            "or promote with --allow-dirty"
        )
    if source.dirty:
        print(DIRTY.format(commit=source.commit or "(none)"), *source.dirty, sep="\n  ", file=sys.stderr)
    folder = signing.find_keys(key)
    keys = signing.load_keys(folder) if folder else None
    words = {"card": sha256_file(root / target["card"])} if target["card"] else {}
    build = digest_of({"gate": sha256_file(root / section["inputs"]["gate"]), "promote": section, **words})

    def write(folder: Path, version: str) -> Files:
        if keys is None:
            print("prefbuild: publishing unsigned: there is no key; `prefbuild keygen` makes one", file=sys.stderr)
        facts = provenance.gather(
            root,
            name,
            version=version,
            build=build,
            resolved=resolved,
            gate=gate,
            source=source,
            key=keys.id if keys else None,
        )
        copies = {"copy": link_or_copy} if target["to"] == "hub" else {}
        return write_version(root, folder, resolved=resolved, gate=gate, facts=facts, keys=keys, **copies)

    if target["to"] == "hub":
        work = root / "build/.work" / f"promote-{name}"
        with directory.locked(work.parent):
            facts, already = hub.publish(target, name, build=build, gate=gate, work=work, write=write, replace=replace)
    else:
        registry = root / target["path"]
        taken = record.versions(root, name, target["path"])
        facts, already = directory.publish(registry, target, name, build=build, gate=gate, taken=taken, write=write)
    return {**_record(root, target, facts), "already": already}


def rollback(
    root: Path, name: str, *, to: str | None = None, key: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Make the previous promoted version, or the version `to`, current again; its history stays.

    Returns the record, with `same_as` the version gone back to. Raises PromotionRefused when there is none, or it is not
    what was promoted.
    """
    target = _target(root, name)
    if target["to"] == "hub":

        def check(commit: str) -> None:
            verify(f"{target['repo']}@{commit}", root=root, key=key, quick=True)

        recorded = record.versions(root, name, target["repo"])
        with directory.locked(root / "build/.work"):
            facts = hub.roll_back(target, name, to, check=check, recorded=recorded, replace=replace)
    else:
        facts = directory.roll_back(root / target["path"], name, to, record.versions(root, name, target["path"]))
    return _record(root, target, facts)


def _target(root: Path, name: str) -> dict[str, Any]:
    """Where a recipe is promoted to, built or not: going back must not wait for a build."""
    recipes = load_recipes(root)
    known_recipes([name], recipes)
    where = recipes[name].publishes
    if where is None:
        raise PromotionRefused(f"recipes/{name}.yaml: has no `promote:`, which says where to publish")
    return where


def _check_paths(root: Path, name: str) -> None:
    """The recipe is published with the model, so it must not name folders of this machine, and with them its people."""
    recipe = load_recipes(root)[name]
    paths = [getattr(source, "path", "") for source in (recipe.base, *recipe.data.sources)]
    paths += [path for task in recipe.evaluate.tasks for path in (task.task, *(task.data or {}).values())]
    private = [path for path in paths if path.startswith("/")]
    if private:
        raise PromotionRefused(
            f"recipes/{name}.yaml: is published with the model, and names {private[0]}, a place on this machine; put it "
            "below the project, and write its path from there"
        )


def _record(root: Path, target: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Append a promotion to the project's record, unless it is there."""
    keys = ("name", "version", "place", "commit", "build", "artifact", "adapter", "trained", "git_commit", "dirty", "time",
            "key", "provenance", "same_as")  # fmt: skip
    entry = {"to": target["to"], **{key: facts[key] for key in keys if key in facts}}
    if target["to"] == "directory":
        entry["place"] = target["path"]
    return {**entry, "recorded": record.append(root, entry)}
