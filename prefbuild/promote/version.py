"""A published version: the same files in a directory registry and on the Hub, and how they are told from others.

    README.md                                 the model card
    config.json, model.safetensors, ...       the merged model; the adapter where only that is published
    adapter/                                  the adapter beside a merged model
    prefbuild/                                recipe, resolved recipe, verdict, metrics, plots, ML-BOM
    prefbuild/provenance.intoto.jsonl         the statement: the digest of every file above, and where they came from
    model.sig                                 an OpenSSF signature over all of it, of a version that is signed

The statement's subjects are the manifest; there is no other.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST, canonical_json, digest_of, git_blob, list_special, sha256_file, write_atomic
from prefbuild.errors import PromotionRefused
from prefbuild.gates import METRICS, metric_stages, titles
from prefbuild.promote import signing
from prefbuild.promote.bom import bom
from prefbuild.promote.card import render_card, stated_license
from prefbuild.promote.gated import judged_bytes
from prefbuild.promote.plots import write_plots
from prefbuild.promote.provenance import facts_of, statement
from prefbuild.promote.publishable import check_publishable

RECORDS = "prefbuild"
STATEMENT = f"{RECORDS}/provenance.intoto.jsonl"
CARD, SIGNATURE = "README.md", signing.SIGNATURE
NUMBER = re.compile(r"v([1-9][0-9]*)")  # what versions are called
OF_THE_HUB = ".gitattributes"  # the Hub writes it, and reads it alone
# The role of each folder that may be published, and where gate.json keeps its digest.
DIGEST_OF = {"adapter": "adapter", "merged": "artifact"}
LISTED_AS_BLOB = 2**25  # bytes; the Hub lists what is larger, and some that is smaller, by its sha256

Files = dict[str, dict[str, Any]]  # by path: size, and sha256 or gitBlob or both, in hex


def places(target: dict[str, Any]) -> dict[str, str]:
    """Where each published role lies: `""` is the top, where libraries look for a model."""
    if not target["merged"]:
        return {"adapter": ""}
    return {"adapter": "adapter/", "merged": ""} if target["adapter"] else {"merged": ""}


def write_version(
    root: Path,
    folder: Path,
    *,
    resolved: dict[str, Any],
    gate: dict[str, Any],
    facts: dict[str, Any],
    keys: signing.Keys | None,
    copy: Callable[[Path, Path], Any] = shutil.copyfile,
) -> Files:
    """Write a version into an empty folder; returns its files. PromotionRefused names what must not be published."""
    section = resolved["promote"]
    inputs, target = section["inputs"], section["settings"]["promote"]
    for role, place in places(target).items():
        _copy_role(root / inputs[role], folder, place, copy)
    published = read_files(folder)
    check_roles(published, target, gate, str(folder))
    metrics = _metrics(root, resolved, gate)
    records = folder / RECORDS
    records.mkdir()
    (records / "recipe.yaml").write_bytes((root / "recipes" / f"{facts['name']}.yaml").read_bytes())
    for name, value in (("resolved", resolved), ("gate", gate), ("metrics", metrics)):
        (records / f"{name}.json").write_text(canonical_json(value), encoding="utf-8")
    plots = write_plots(root, records, resolved=resolved, metrics=metrics)
    about = {
        "base": resolved["train"]["settings"]["base"]["name"],
        "license": stated_license(root / inputs["base_model"]),
        "description": section["settings"]["description"],
    }
    listed = bom(facts, read_files(folder, published), metrics, **about)
    (records / "bom.json").write_text(canonical_json(listed), encoding="utf-8")
    card = render_card(root, resolved=resolved, gate=gate, metrics=metrics, facts=facts, plots=plots)
    (folder / CARD).write_text(card, encoding="utf-8")
    check_publishable(folder)
    published = read_files(folder, published)
    made = statement(facts, published, metrics)
    write_atomic(folder / STATEMENT, signing.sign_statement(made, keys))
    check_publishable(folder)
    if keys is not None:
        signing.sign_folder(folder, keys)
    return read_files(folder, published)


def read_files(folder: Path, known: Files | None = None) -> Files:
    """Every file of a version on this machine, hashed but for those `known`. PromotionRefused for links and the like."""
    from tqdm import tqdm

    special = list_special(folder, any_owner=True)
    if special:
        raise PromotionRefused(f"{special[0]}; a published version is plain files and folders")
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    files = {name: entry for name, entry in (known or {}).items() if sizes.get(name) == entry["size"]}
    new = sorted(paths.keys() - files.keys())
    total = sum(sizes[name] for name in new)
    quiet = total < 10**9 or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=quiet, file=sys.stderr) as bar:
        for name in new:
            files[name] = {"size": sizes[name], "sha256": sha256_file(paths[name])}
            if sizes[name] <= LISTED_AS_BLOB:
                files[name]["gitBlob"] = git_blob(paths[name].read_bytes())
            bar.update(sizes[name])
    return dict(sorted(files.items()))


def read_statement(data: bytes, shown: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A statement, and the facts that the record keeps of it. PromotionRefused when it is none, or contradicts itself."""
    made, signer = signing.read_statement(data, shown)
    facts = facts_of(made)
    if facts["key"] != signer:
        raise PromotionRefused(f"{shown}: says that key {facts['key']} signs it, and it is signed by {signer}")
    return made, {**facts, "provenance": hashlib.sha256(data).hexdigest()}


def subjects(made: dict[str, Any]) -> Files:
    """The files that a statement is about, with their digests and no sizes."""
    return {subject["name"]: dict(subject["digest"]) for subject in made["subject"]}


def differences(wanted: Files, found: Files) -> list[str]:
    """A sentence for every file that is not as it should be: changed, missing, renamed, or too many."""
    lost = [path for path in wanted if path not in found]
    new = [path for path in found if path not in wanted]
    lines = []
    for path in list(lost):
        renamed = next((other for other in new if _same(wanted[path], found[other])), None)
        if renamed is not None:
            lost.remove(path)
            new.remove(renamed)
            lines.append(f"{path}: is called {renamed}")
    lines += [f"{path}: is missing" for path in lost]
    lines += [f"{path}: does not belong there" for path in new]
    for path in sorted(set(wanted) & set(found)):
        if not _same(wanted[path], found[path]):
            kind = "sha256" if "sha256" in found[path] else "gitBlob"
            lines.append(f"{path}: {kind} is {found[path][kind]}, not {wanted[path].get(kind, 'listed')}")
    return sorted(lines)


def wrong_files(files: Files, made: dict[str, Any]) -> list[str]:
    """A sentence for every file that is not as a version's statement says."""
    beside = {STATEMENT, SIGNATURE, OF_THE_HUB}
    return differences(subjects(made), {path: entry for path, entry in files.items() if path not in beside})


def check_files(files: Files, made: dict[str, Any], shown: str) -> None:
    """A version's files are those of its statement, and no others. PromotionRefused names those that are not."""
    wrong = wrong_files(files, made)
    if wrong:
        raise PromotionRefused(f"{shown}: is not what was published:\n  " + "\n  ".join(wrong))


def check_roles(files: Files, target: dict[str, Any], gate: dict[str, Any], shown: str) -> None:
    """Adapter and merged model are the bytes that the gate judged. `files` have sizes and sha256."""
    for role, place in places(target).items():
        own = {
            path.removeprefix(place): {"size": entry["size"], "sha256": entry["sha256"]}
            for path, entry in files.items()
            if _is_of_role(path, place)
        }
        if digest_of(own) != gate[DIGEST_OF[role]]:
            raise PromotionRefused(f"{shown}: its {role} is {digest_of(own)}, the gate judged {gate[DIGEST_OF[role]]}")


def _is_of_role(path: str, place: str) -> bool:
    if place:
        return path.startswith(place)
    return path not in (CARD, SIGNATURE, OF_THE_HUB) and not path.startswith((f"{RECORDS}/", "adapter/"))


def _same(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """One kind of digest that both have is equal, sha256 before gitBlob; with none in common nothing is."""
    kind = next((kind for kind in ("sha256", "gitBlob") if kind in wanted and kind in found), None)
    return kind is not None and wanted[kind] == found[kind]


def _copy_role(source: Path, folder: Path, place: str, copy: Callable[[Path, Path], Any]) -> None:
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for path in names:
        if path == MANIFEST:
            continue  # the statement takes its place
        if not _is_of_role(f"{place}{path}", place):
            raise PromotionRefused(f"{source / path}: has a name that a published version uses for something else")
        target = folder / place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(source / path, target)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file of this user's, which takes no space, or a copy where the disk can't."""
    try:
        if source.stat().st_uid != os.getuid():
            raise PermissionError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _metrics(root: Path, resolved: dict[str, Any], gate: dict[str, Any]) -> dict[str, Any]:
    inputs = resolved["promote"]["inputs"]
    metrics: dict[str, Any] = {stage: {} for stage in METRICS}
    metrics |= {stage: json.loads(judged_bytes(root, inputs[stage], gate)) for stage in metric_stages(inputs)}
    metrics["baseline"] = {}
    for key, title in titles(resolved["gate"]["settings"]["measurements"]).items():
        base = root / inputs["baseline"] / f"{key}.json"
        if base.exists():
            metrics["baseline"][title] = json.loads(base.read_text(encoding="utf-8"))["metrics"]
    return metrics
