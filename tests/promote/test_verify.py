"""`prefbuild verify`: what it believes, and that it names what was changed."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub
from onhub import REPO, prefbuild, rebuild, tags, to_hub
from project import run

from prefbuild.errors import PromotionRefused
from prefbuild.promote import signing, version
from prefbuild.promote.verify import verify


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def edited_card(files: dict[str, bytes]) -> None:
    files["README.md"] = files["README.md"].replace(b"0.75", b"0.95")


def renamed(files: dict[str, bytes]) -> None:
    files["weights.safetensors"] = files.pop("model.safetensors")


def other_verdict(files: dict[str, bytes]) -> None:
    files["prefbuild/gate.json"] = files["prefbuild/gate.json"].replace(b"false", b"true") + b"\n"


def signed_by_another(files: dict[str, bytes], folder: Path) -> None:
    signing.keygen(folder, None)
    keys = signing.load_keys(folder)
    made = signing.read_statement(files[version.STATEMENT], "it")[0]
    made["predicate"]["buildDefinition"]["internalParameters"]["key"] = keys.id
    files[version.STATEMENT] = signing.sign_statement(made, keys)


CHANGES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "changed byte": (lambda f: f.update({"model.safetensors": flip(f["model.safetensors"])}), "model.safetensors: "),
    "changed adapter": (lambda f: f.update({p: flip(f[p]) for p in f if p.endswith("adapter_model.safetensors")}), "adapter/adapter_model.safetensors: "),
    "extra file": (lambda f: f.update({"more.json": b"{}"}), "more.json: does not belong there"),
    "extra pickle": (lambda f: f.update({"pytorch_model.bin": b"x"}), "pytorch_model.bin: does not belong there"),
    "missing file": (lambda f: f.pop("tokenizer_config.json"), "tokenizer_config.json: is missing"),
    "renamed file": (renamed, "model.safetensors: is called weights.safetensors"),
    "card edited": (edited_card, "README.md: "),
    "verdict edited": (other_verdict, "prefbuild/gate.json: "),
    "no statement": (lambda f: f.pop(version.STATEMENT), "has no prefbuild/provenance.intoto.jsonl"),
    "no signature": (lambda f: f.pop(version.SIGNATURE), "model.sig is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def promoted(template: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project that promoted, signed, and the folder of the hub that it promoted to."""
    folder = tmp_path_factory.mktemp("promoted")
    root = Path(shutil.copytree(template, folder / "project"))
    to_hub(root)
    with Hub(folder / "hub") as hub:
        prefbuild(hub, root, "promote", "x", PREFBUILD_KEY=str(keys))
    return root, folder / "hub"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_what_was_changed_on_the_hub(
    promoted: tuple[Path, Path], keys: Path, tmp_path: Path, change: str, quick: bool
) -> None:
    root, held = promoted
    act, says = CHANGES[change]
    with Hub(Path(shutil.copytree(held, tmp_path / "hub"))) as hub:
        before = {path: hub.read(REPO, path) for path in hub.tree(REPO)}
        files = dict(before)
        act(files)
        changed = {path: content for path, content in files.items() if before.get(path) != content}
        hub.put(REPO, changed, delete=tuple(before.keys() - files.keys()))
        options = ("--quick",) if quick else ()
        said = prefbuild(hub, root, "verify", REPO, *options, code=9, PREFBUILD_KEY=str(keys))
        assert says in said, said


@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_what_was_changed_in_a_folder(
    promoted: tuple[Path, Path], keys: Path, tmp_path: Path, change: str
) -> None:
    folder = download(promoted[1], tmp_path)
    assert len(verify(str(folder), root=None, key=str(keys)).lines) == 5
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    after = dict(files)
    CHANGES[change][0](after)
    for path in files.keys() - after.keys():
        (folder / path).unlink()
    for path in after:
        (folder / path).write_bytes(after[path])
    with pytest.raises(PromotionRefused, match=re.escape(CHANGES[change][1])):
        verify(str(folder), root=None, key=str(keys))


def download(held: Path, tmp_path: Path) -> Path:
    """What a stranger has: the files of v1 in a folder."""
    folder = tmp_path / "downloaded"
    with Hub(held) as hub:
        for path in hub.tree(REPO, "v1"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(hub.read(REPO, path, "v1"))
    (folder / version.OF_THE_HUB).unlink()
    return folder


def test_a_stranger_needs_the_signers_key(promoted: tuple[Path, Path], keys: Path, tmp_path: Path) -> None:
    folder = download(promoted[1], tmp_path)
    empty = {"XDG_CONFIG_HOME": str(tmp_path)}
    said = run(tmp_path, "prefbuild", "verify", str(folder), code=9, **empty)
    assert "is signed by key " in said and "--key FOLDER" in said
    public = tmp_path / "public"
    public.mkdir()
    for name in signing.PUBLIC:
        shutil.copy(keys / name, public)
    said = run(tmp_path, "prefbuild", "verify", str(folder), "--key", str(public), **empty)
    assert "model.sig is a good OpenSSF signature of them" in said
    other = tmp_path / "other"
    signing.keygen(other, None)
    said = run(tmp_path, "prefbuild", "verify", str(folder), "--key", str(other), code=9, **empty)
    assert "key" in said and signing.short(signing.load_public(other).id) in said
    files = {version.STATEMENT: (folder / version.STATEMENT).read_bytes()}
    signed_by_another(files, tmp_path / "forger")
    (folder / version.STATEMENT).write_bytes(files[version.STATEMENT])
    run(tmp_path, "prefbuild", "verify", str(folder), "--key", str(public), code=9, **empty)


def test_an_unsigned_version_is_believed_for_the_projects_own_record(hub: Hub, promoting: Path, keys: Path) -> None:
    assert "publishing unsigned" in prefbuild(hub, promoting, "promote", "x")
    assert version.SIGNATURE not in hub.tree(REPO)
    assert "promotions.jsonl has it, as promoted at " in prefbuild(hub, promoting, "verify", REPO)
    said = prefbuild(hub, promoting, "verify", REPO, "--key", str(keys), code=9)
    assert "not signed" in said or "unsigned" in said
    (promoting / "promotions.jsonl").unlink()
    assert "is not signed, and no promotions.jsonl here has it" in prefbuild(hub, promoting, "verify", REPO, code=9)


def test_a_moved_tag_is_found(hub: Hub, promoting: Path) -> None:
    prefbuild(hub, promoting, "promote", "x")
    rebuild(promoting, 0.4)
    prefbuild(hub, promoting, "promote", "x")
    first, second = tags(hub)["v1"], tags(hub)["v2"]
    hub.tag(REPO, "v2", first)
    said = prefbuild(hub, promoting, "verify", f"{REPO}@v2", code=9)
    assert f"the tag was moved: it is at commit {first[:8]}, which is v1 (promotions.jsonl says {second[:8]})" in said
    hub.tag(REPO, "v2", hub.put(REPO, {"more.json": b"{}"}))
    assert "which is no promotion" in prefbuild(hub, promoting, "verify", f"{REPO}@v2", code=9)
    said = prefbuild(hub, promoting, "promote", "x", code=9)
    assert "tag v2 is at commit " in said and "somebody set it by hand" in said


def test_a_bit_flipped_on_the_way_is_caught_and_not_kept(hub: Hub, promoting: Path) -> None:
    prefbuild(hub, promoting, "promote", "x")
    shutil.rmtree(hub.folder / "home")
    hub.fault("flip", "GET", "/storage/")
    said = prefbuild(hub, promoting, "verify", REPO, code=9)
    assert "damaged on the way, or in the cache; try again" in said
    assert "all as the statement says" in prefbuild(hub, promoting, "verify", REPO)


@pytest.mark.parametrize("what", ["nobody/nothing", "me/x@v7", "/no/such/folder", "one/two/three"])
def test_what_is_not_there(hub: Hub, promoting: Path, what: str) -> None:
    prefbuild(hub, promoting, "promote", "x")
    code = 9 if what in ("nobody/nothing", "me/x@v7") else 2
    said = prefbuild(hub, promoting, "verify", what, code=code)
    assert what.partition("@")[0] in said
    said = prefbuild(hub, promoting, "verify", what, token=None, code=code)
    assert "token: it is mistyped" not in said  # there is none


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_registry_of_somebody_else_can_be_checked(promoted: tuple[Path, Path], keys: Path, tmp_path: Path) -> None:
    folder = download(promoted[1], tmp_path)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 4711, 4711)
    assert verify(str(folder), root=None, key=str(keys)).facts["name"] == "x"
