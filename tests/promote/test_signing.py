"""Keys and signatures: made and checked offline, and whatever was changed is found and named."""

import base64
import builtins
import json
import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.dsse import Envelope

from prefbuild.errors import PromotionRefused, StageError, UsageError
from prefbuild.promote import signing
from prefbuild.promote.publishable import find_secret
from prefbuild.promote.signing import (
    check_statement,
    find_keys,
    keygen,
    load_keys,
    load_public,
    read_statement,
    short,
    sign_folder,
    sign_statement,
    verify_folder,
)

PASSPHRASE = "correct horse battery"
SHOWN = "prefbuild/provenance.intoto.jsonl"


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """No key or passphrase of whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("PREFBUILD_KEY", "PREFBUILD_KEY_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two people's keys."""
    ours, theirs = tmp_path_factory.mktemp("keys") / "ours", tmp_path_factory.mktemp("keys") / "theirs"
    keygen(ours, None)
    keygen(theirs, None)
    return ours, theirs


@pytest.fixture
def keys(folders):
    return load_keys(folders[0])


@pytest.fixture
def public(folders):
    return load_public(folders[0])


@pytest.fixture
def others(folders):
    return load_keys(folders[1])


@pytest.fixture
def version(tmp_path, keys) -> Path:
    """A signed folder."""
    folder = tmp_path / "version"
    for path, text in {
        "README.md": "# x\n", "config.json": "{}\n", "model.safetensors": "weights", "adapter/adapter_config.json": "{}\n",
        "prefbuild/gate.json": "{}\n", ".hidden": "h", ".gitignore": "*.tmp\n", ".github/workflow.yaml": "on: push\n",
        "adapter/.gitattributes": "* text\n",
    }.items():  # fmt: skip
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    sign_folder(folder, keys)
    return folder


def make_statement(key: str | None) -> dict:
    digest = "sha256:" + "a" * 64
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "README.md", "digest": {"sha256": "1" * 64}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:prefbuild:build:v1",
                "externalParameters": {"name": "x"},
                "internalParameters": {
                    "version": "v1",
                    "artifact": digest,
                    "adapter": digest,
                    "dirty": [],
                    "key": key,
                    "note": "Größe ± 1",
                },
                "resolvedDependencies": [{"name": "git", "digest": {"gitCommit": "b" * 40}}],
            },
            "runDetails": {
                "builder": {"id": "urn:prefbuild:promote:v1"},
                "metadata": {"invocationId": digest, "finishedOn": "2026-01-01T00:00:00Z"},
            },
        },
    }


def edit(data: bytes, change) -> bytes:
    envelope = json.loads(data)
    change(envelope)
    return json.dumps(envelope).encode()


def edit_payload(data: bytes, change) -> bytes:
    statement = json.loads(base64.b64decode(json.loads(data)["payload"]))
    change(statement)
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    return edit(data, lambda envelope: envelope.update(payload=payload))


# ---- keys


def test_keygen_writes_two_pairs_that_only_their_owner_reads(tmp_path):
    folder = tmp_path / "new" / "keys"
    old = os.umask(0)  # not left to the user's umask
    try:
        lines = keygen(folder, None)
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"ed25519.key": 0o600, "ed25519.pub": 0o644, "p256.key": 0o600, "p256.pub": 0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "ed25519.key").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert (folder / "p256.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")
    assert lines == [
        f"wrote ed25519.key, p256.key, ed25519.pub, p256.pub to {folder}",
        f"key {load_keys(folder).id}",
        "share ed25519.pub and p256.pub: with them anybody can check what you sign; keep the .key files to yourself, "
        "they are not encrypted",
        "if you lose the keys, what is published stays as good as it was; make new ones for what comes next",
    ]


def test_the_id_is_the_sha256_of_the_public_keys_der(folders):
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", str(folders[0] / "ed25519.pub"), "-outform", "DER"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    digest = subprocess.run(["sha256sum"], input=der, check=True, capture_output=True).stdout.split()[0].decode()
    assert load_public(folders[0]).id == load_keys(folders[0]).id == digest
    assert short(digest) == digest[:16] + ".."


@pytest.mark.parametrize("name", ["ed25519.key", "ed25519.pub", "p256.key", "p256.pub"])
def test_keygen_never_overwrites(tmp_path, name):
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{folder / name}: is there already, and a key is never overwritten"):
        keygen(folder, None)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]


def test_keygen_does_not_write_through_a_link(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "p256.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is there already"):
        keygen(folder, None)
    assert not (tmp_path / "elsewhere").exists()


def test_keygen_refuses_a_folder_that_others_can_enter(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)
    with pytest.raises(UsageError, match=f"{folder}: others can enter it; run `chmod 700 {folder}`"):
        keygen(folder, None)
    assert list(folder.iterdir()) == []


def test_keygen_says_where_it_can_not_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"{tmp_path / 'file' / 'keys'}: can't write keys there: File exists"):
        keygen(tmp_path / "file" / "keys", None)


def test_an_empty_passphrase_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the passphrase is empty"):
        keygen(tmp_path / "keys", "")
    assert not (tmp_path / "keys").exists()


# ---- encrypted keys


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "encrypted"
    keygen(folder, PASSPHRASE)
    return folder


def test_a_passphrase_encrypts_both_private_keys(encrypted):
    for name in ("ed25519.key", "p256.key"):
        data = (encrypted / name).read_bytes()
        assert data.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        with pytest.raises(TypeError):
            serialization.load_pem_private_key(data, None)


def test_encrypted_keys_sign(encrypted, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFBUILD_KEY_PASSPHRASE", PASSPHRASE)
    keys, public = load_keys(encrypted), load_public(encrypted)
    assert PASSPHRASE not in repr(keys)
    data = sign_statement(make_statement(keys.id), keys)
    assert check_statement(data, public, SHOWN) == make_statement(keys.id)
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a").write_text("a")
    sign_folder(tmp_path / "f", keys)
    verify_folder(tmp_path / "f", public)


def test_public_keys_need_no_passphrase(encrypted, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("ed25519.pub", "p256.pub"):
        shutil.copy(encrypted / name, shared)
    assert load_public(shared).id == load_public(encrypted).id


def test_a_wrong_passphrase_is_said(encrypted, monkeypatch):
    monkeypatch.setenv("PREFBUILD_KEY_PASSPHRASE", "wrong")
    with pytest.raises(UsageError) as error:
        load_keys(encrypted)
    assert str(error.value) == f"{encrypted / 'ed25519.key'}: is not opened by this passphrase"


def test_without_a_terminal_the_passphrase_comes_from_the_environment(encrypted):
    code = "import sys; from pathlib import Path; from prefbuild.promote.signing import load_keys; load_keys(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(encrypted)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert "UsageError" in done.stderr
    assert f"{encrypted / 'ed25519.key'}: is encrypted; set PREFBUILD_KEY_PASSPHRASE, or run this on a terminal" in (
        done.stderr
    )


def test_on_a_terminal_the_passphrase_is_asked_for_once(encrypted):
    code = "import sys; from pathlib import Path; from prefbuild.promote.signing import load_keys; print(load_keys(Path(sys.argv[1])).id)"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, str(encrypted)])
    shown = b""
    while b"passphrase" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, PASSPHRASE.encode() + b"\n")
    while True:
        try:
            data = os.read(terminal, 1024)
        except OSError:  # how a terminal ends
            break
        if not data:
            break
        shown += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert load_public(encrypted).id in shown.decode()
    assert shown.count(b"passphrase of") == 1 and PASSPHRASE.encode() not in shown


def test_keys_of_which_one_is_encrypted_are_refused(encrypted, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFBUILD_KEY_PASSPHRASE", PASSPHRASE)
    mixed = Path(shutil.copytree(encrypted, tmp_path / "mixed"))
    for name in ("p256.key", "p256.pub"):
        shutil.copy(folders[0] / name, mixed)
    with pytest.raises(UsageError, match="p256.key: is not encrypted, the other key is"):
        load_keys(mixed)


# ---- finding and loading keys


def test_keys_are_found_by_option_variable_and_default(folders, tmp_path, monkeypatch):
    ours, theirs = folders
    assert find_keys(None) is None
    default = tmp_path / "config/prefbuild/keys"
    assert signing.default_keys() == default
    keygen(default, None)
    assert find_keys(None) == default
    monkeypatch.setenv("PREFBUILD_KEY", str(theirs))
    assert find_keys(None) == theirs
    assert find_keys(str(ours)) == ours


def test_a_home_folder_is_expanded(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders[0].parent))
    monkeypatch.setenv("PREFBUILD_KEY", "~/ours")
    assert find_keys(None) == folders[0]


@pytest.mark.parametrize("where", ["--key", "PREFBUILD_KEY", "the default"])
def test_a_folder_without_keys_is_refused_where_it_was_named(tmp_path, monkeypatch, where):
    folder = signing.default_keys()
    folder.mkdir(parents=True)
    if where == "PREFBUILD_KEY":
        monkeypatch.setenv("PREFBUILD_KEY", str(folder))
    with pytest.raises(UsageError) as error:
        find_keys(str(folder) if where == "--key" else None)
    assert str(error.value) == f"{folder}: {where}: lacks ed25519.pub, p256.pub; `prefbuild keygen` makes keys"


@pytest.mark.parametrize("name", ["ed25519.key", "p256.key", "ed25519.pub", "p256.pub"])
def test_a_missing_key_is_named(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders[0], tmp_path / "keys"))
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"lacks {name}"):
        load_keys(folder)


@pytest.mark.parametrize("name", ["ed25519.key", "p256.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_private_key_that_others_may_read_is_refused(folders, tmp_path, name, mode):
    folder = Path(shutil.copytree(folders[0], tmp_path / "keys"))
    (folder / name).chmod(mode)
    with pytest.raises(UsageError) as error:
        load_keys(folder)
    path = folder / name
    assert str(error.value) == f"{path}: others may read it (mode {mode:04o}); run `chmod 600 {path}`"


@pytest.mark.parametrize("name", ["ed25519", "p256"])
def test_halves_that_do_not_belong_together_are_refused(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders[0], tmp_path / "keys"))
    shutil.copy(folders[1] / f"{name}.pub", folder)
    with pytest.raises(UsageError, match=f"{name}.pub does not belong to {name}.key"):
        load_keys(folder)


@pytest.mark.parametrize("name", ["ed25519", "p256"])
def test_files_that_are_no_keys_are_refused(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders[0], tmp_path / "keys"))
    (folder / f"{name}.key").write_text("junk")
    with pytest.raises(UsageError, match=f"{name}.key: is no private key in PEM"):
        load_keys(folder)
    (folder / f"{name}.pub").write_text("junk")
    with pytest.raises(UsageError, match=f"{name}.pub: is no public key in PEM"):
        load_public(folder)


def test_keys_of_another_kind_are_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders[0], tmp_path / "keys"))

    def write(name: str, key) -> None:
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        (folder / name).write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))

    write("p256.pub", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(UsageError, match="p256.pub: is no P-256 key"):
        load_public(folder)
    write("p256.pub", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UsageError, match="p256.pub: is no P-256 key"):
        load_public(folder)
    write("ed25519.pub", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(UsageError, match="ed25519.pub: is no ed25519 key"):
        load_public(folder)


# ---- the statement


def test_a_signed_statement_is_one_line_of_dsse(keys, public):
    data = sign_statement(make_statement(keys.id), keys)
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    envelope = json.loads(data)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert [set(entry) for entry in envelope["signatures"]] == [{"keyid", "sig"}]
    assert envelope["signatures"][0]["keyid"] == keys.id
    payload = base64.b64decode(envelope["payload"])
    assert payload.decode() == json.dumps(
        make_statement(keys.id), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert check_statement(data, public, SHOWN) == make_statement(keys.id)
    assert read_statement(data, SHOWN) == (make_statement(keys.id), keys.id)


def test_the_signature_is_dsses_and_ed25519s(keys, folders):
    """Checked without the library that made it: DSSE's pre-authentication encoding, and the raw signature."""
    envelope = json.loads(sign_statement(make_statement(keys.id), keys))
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    key = serialization.load_pem_public_key((folders[0] / "ed25519.pub").read_bytes())
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)


def test_the_same_statement_gives_the_same_bytes(keys, folders):
    statement = make_statement(keys.id)
    turned = dict(reversed(statement.items()))
    assert sign_statement(statement, keys) == sign_statement(turned, load_keys(folders[0]))
    unsigned = make_statement(None)
    assert sign_statement(unsigned, None) == sign_statement(dict(reversed(unsigned.items())), None)


def test_an_unsigned_statement_reads_as_such(public):
    data = sign_statement(make_statement(None), None)
    assert json.loads(data)["signatures"] == []
    assert read_statement(data, SHOWN) == (make_statement(None), None)
    with pytest.raises(PromotionRefused) as error:
        check_statement(data, public, SHOWN)
    assert str(error.value) == f"{SHOWN}: is not signed"


def test_another_key_is_named(keys, others, public):
    with pytest.raises(PromotionRefused) as error:
        check_statement(sign_statement(make_statement(others.id), others), public, SHOWN)
    assert str(error.value) == f"{SHOWN}: is signed by key {short(others.id)}, not by {short(keys.id)}"


def unfit(data: bytes, public) -> None:
    with pytest.raises(PromotionRefused) as error:
        check_statement(data, public, SHOWN)
    assert str(error.value) == (
        f"{SHOWN}: the signature does not fit the content; it was changed after key {short(public.id)} signed it, "
        "or never signed by it"
    )


def test_a_changed_statement_is_found(keys, public):
    data = sign_statement(make_statement(keys.id), keys)
    unfit(edit_payload(data, lambda s: s["subject"][0]["digest"].update(sha256="2" * 64)), public)
    unfit(edit_payload(data, lambda s: s["subject"].append({"name": "new", "digest": {"sha256": "2" * 64}})), public)
    unfit(edit_payload(data, lambda s: s["predicate"]["buildDefinition"]["internalParameters"].update(version="v2")),
          public)  # fmt: skip


def test_every_byte_of_the_payload_is_signed(keys, public):
    data = sign_statement(make_statement(keys.id), keys)
    payload = bytearray(base64.b64decode(json.loads(data)["payload"]))
    refused = 0
    for place in range(len(payload)):
        changed = bytearray(payload)
        changed[place] ^= 1
        text = base64.b64encode(bytes(changed)).decode()
        with pytest.raises(PromotionRefused):
            check_statement(edit(data, lambda e, text=text: e.update(payload=text)), public, SHOWN)
        refused += 1
    assert refused == len(payload) > 500


@pytest.mark.parametrize("sig", ["", "AAAA", base64.b64encode(bytes(64)).decode()])
def test_a_false_signature_is_found(keys, public, sig):
    unfit(edit(sign_statement(make_statement(keys.id), keys), lambda e: e["signatures"][0].update(sig=sig)), public)


def test_somebody_who_uses_our_id_is_found(others, public):
    """A statement that names our key, signed by another under our key's id."""
    envelope = Envelope(json.dumps(make_statement(public.id)).encode(), signing.PAYLOAD_TYPE, {})
    envelope.sign(others.ed25519)
    data = edit(json.dumps(envelope.to_dict()).encode(), lambda e: e["signatures"][0].update(keyid=public.id))
    unfit(data, public)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e.update(signatures=[]), "its signature was taken away; key {ours} had signed it"),
        (lambda e: e["signatures"].append(e["signatures"][0]), "has 2 signatures; prefbuild makes one"),
        (
            lambda e: e["signatures"][0].update(keyid="f" * 64),
            "says that key {ours} signs it, and has a signature of key ffffffffffffffff..",
        ),
        (lambda e: e["signatures"][0].pop("keyid"), "is no statement of prefbuild: lacks keyid"),
        (lambda e: e.pop("payload"), "is no statement of prefbuild: lacks payload"),
        (lambda e: e.pop("signatures"), "is no statement of prefbuild: lacks signatures"),
        (lambda e: e.update(payloadType="text/plain"), "its payloadType is not application/vnd.in-toto+json"),
        (lambda e: e.update(payload="e30"), "is no statement of prefbuild: Incorrect padding"),
        (lambda e: e.update(payload="!!!!"), "is no statement of prefbuild: Only base64 data is allowed"),
        (lambda e: e.update(payload="AAAA"), "is no statement of prefbuild: Expecting value"),
        (lambda e: e.update(payload="e30="), "is no statement of prefbuild: lacks _type"),
        (lambda e: e.update(payload=7), "is no statement of prefbuild: is not built like a DSSE envelope"),
        (lambda e: e.update(signatures=[7]), "is no statement of prefbuild: is not built like a DSSE envelope"),
        (lambda e: e["signatures"][0].update(sig="!!!!"), "is no statement of prefbuild: Only base64 data is allowed"),
    ],
)
def test_a_broken_envelope_is_refused(keys, change, says):
    data = edit(sign_statement(make_statement(keys.id), keys), change)
    with pytest.raises(PromotionRefused) as error:
        read_statement(data, SHOWN)
    assert str(error.value).startswith(f"{SHOWN}: ")
    assert says.format(ours=short(keys.id)) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"junk", b"\xff\xfe", b"{}\n{}\n", b"[" * 100_000])
def test_what_is_no_envelope_is_refused(data):
    with pytest.raises(PromotionRefused, match=f"^{SHOWN}: is no statement of prefbuild"):
        read_statement(data, SHOWN)


def test_a_signature_on_a_statement_that_says_it_has_none_is_refused(keys):
    data = sign_statement(make_statement(None), None)
    data = edit(data, lambda e: e.update(signatures=[{"keyid": keys.id, "sig": ""}]))
    with pytest.raises(PromotionRefused, match="says that nobody signs it, and has a signature of key"):
        read_statement(data, SHOWN)


def test_a_files_name_with_a_line_break_is_not_signed(keys):
    statement = make_statement(keys.id)
    statement["subject"][0]["name"] = "a\nb"
    with pytest.raises(PromotionRefused, match="the statement names the file 'a\\\\nb' twice, or it is no file's name"):
        sign_statement(statement, keys)


# ---- the folder


def refusal(folder: Path, public) -> str:
    with pytest.raises(PromotionRefused) as error:
        verify_folder(folder, public)
    return str(error.value)


def test_a_signed_folder_verifies_anywhere(version, public, tmp_path):
    verify_folder(version, public)
    moved = Path(shutil.copytree(version, tmp_path / "elsewhere"))
    verify_folder(moved, public)


def test_nothing_of_it_uses_the_network(version, keys, public, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"asked for the network: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    sign_folder(version, keys)
    verify_folder(version, public)
    check_statement(sign_statement(make_statement(keys.id), keys), public, SHOWN)


def test_what_the_hub_adds_does_not_break_the_signature(version, public):
    (version / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    verify_folder(version, public)


TAMPERED = {
    "a changed byte": (lambda f: (f / "model.safetensors").write_text("weightz"),
                       "Hash mismatch for 'model.safetensors'"),
    "an edited card": (lambda f: (f / "README.md").write_text("# y\n"), "Hash mismatch for 'README.md'"),
    "a changed file below": (lambda f: (f / "prefbuild/gate.json").write_text("[]\n"),
                             "Hash mismatch for 'prefbuild/gate.json'"),
    "an emptied file": (lambda f: (f / "config.json").write_text(""), "Hash mismatch for 'config.json'"),
    "an extra file": (lambda f: (f / "extra.py").write_text("x"), "Extra files found in model 'version': extra.py"),
    "an extra file below": (lambda f: (f / "adapter/extra.bin").write_text("x"),
                            "Extra files found in model 'version': adapter/extra.bin"),
    "an extra hidden file": (lambda f: (f / ".env").write_text("x"), "Extra files found in model 'version': .env"),
    "a missing file": (lambda f: (f / "config.json").unlink(), "Missing files in model 'version': config.json"),
    "a renamed file": (lambda f: (f / "config.json").rename(f / "config2.json"),
                       "Extra files found in model 'version': config2.json; "
                       "Missing files in model 'version': config.json"),
    "two files exchanged": (lambda f: (shutil.copy(f / "README.md", f / "config.json")),
                            "Hash mismatch for 'config.json'"),
    "a changed hidden file": (lambda f: (f / ".hidden").write_text("x"), "Hash mismatch for '.hidden'"),
    "a changed .gitignore": (lambda f: (f / ".gitignore").write_text("x"), "Hash mismatch for '.gitignore'"),
    "a file in .git": (lambda f: ((f / ".git").mkdir(), (f / ".git/config").write_text("x")),
                       "Extra files found in model 'version': .git/config"),
    "a file in .github": (lambda f: (f / ".github/new.yaml").write_text("x"),
                          "Extra files found in model 'version': .github/new.yaml"),
    "a .gitattributes below": (lambda f: (f / "adapter/.gitattributes").write_text("x"),
                               "Hash mismatch for 'adapter/.gitattributes'"),
    "a folder called .gitattributes": (lambda f: ((f / ".gitattributes").mkdir(),
                                                  (f / ".gitattributes/evil.py").write_text("x")),
                                       ".gitattributes: is no plain file"),
    "another model.sig below": (lambda f: (f / "adapter/model.sig").write_text("x"),
                                "Extra files found in model 'version': adapter/model.sig"),
    "a link to a file": (lambda f: (f / "link").symlink_to("config.json"), "because it is a symlink"),
    "a file that became a link": (lambda f: (shutil.copy(f / "config.json", f.parent / "c.json"),
                                             (f / "config.json").unlink(),
                                             (f / "config.json").symlink_to(f.parent / "c.json")),
                                  "because it is a symlink"),
    "a link to a folder": (lambda f: (f / "link").symlink_to(f.parent), "because it is a symlink"),
    "a FIFO": (lambda f: os.mkfifo(f / "fifo"), "as file or directory"),
    "no model.sig": (lambda f: (f / "model.sig").unlink(), "model.sig: is missing; the folder is not signed"),
    "a model.sig that is a link": (lambda f: ((f / "model.sig").rename(f.parent / "sig"),
                                              (f / "model.sig").symlink_to(f.parent / "sig")),
                                   "model.sig: is no plain file"),
    "an empty model.sig": (lambda f: (f / "model.sig").write_text(""), "is no model signature made with a key"),
    "a model.sig of another form": (lambda f: (f / "model.sig").write_text("{}"),
                                    "is no model signature made with a key"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_changed_is_named(version, public, case):
    change, says = TAMPERED[case]
    change(version)
    assert says in refusal(version, public)


def test_another_p256_key_is_named(version, public, others, folders):
    theirs = load_public(folders[1])
    assert refusal(version, theirs) == (
        f"{version / 'model.sig'}: is signed by P-256 key {short(public.p256_id)}, not by {short(theirs.p256_id)}"
    )
    sign_folder(version, others)  # whoever replaces the signature too
    assert refusal(version, public) == (
        f"{version / 'model.sig'}: is signed by P-256 key {short(theirs.p256_id)}, not by {short(public.p256_id)}"
    )


def test_a_signature_of_another_under_our_keys_name_is_found(version, public, others):
    sign_folder(version, others)
    signature = json.loads((version / "model.sig").read_text())
    signature["verificationMaterial"]["publicKey"]["hint"] = public.p256_id
    (version / "model.sig").write_text(json.dumps(signature))
    assert refusal(version, public) == (
        f"{version / 'model.sig'}: the signature does not fit the list of files; "
        "the list was changed after it was signed"
    )


def test_an_edited_list_of_files_is_found(version, public):
    (version / "config.json").write_text("[]\n")
    signature = json.loads((version / "model.sig").read_text())
    payload = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    payload["predicate"]["serialization"]["ignore_paths"].append("config.json")
    payload["predicate"]["resources"] = [
        entry for entry in payload["predicate"]["resources"] if entry["name"] != "config.json"
    ]
    signature["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (version / "model.sig").write_text(json.dumps(signature))
    assert "the signature does not fit the list of files" in refusal(version, public)


def test_a_name_that_could_move_the_cursor_is_shown_harmless(version, public):
    (version / "a\x1b[2Jb").write_text("x")
    assert "a?[2Jb" in refusal(version, public)


def test_signing_again_is_possible_and_leaves_one_signature(version, keys, public):
    (version / "README.md").write_text("# new\n")
    sign_folder(version, keys)
    verify_folder(version, public)


def test_a_folder_with_a_link_is_not_signed(version, keys):
    (version / "model.sig").unlink()
    (version / "link").symlink_to("/etc/hostname")
    with pytest.raises(PromotionRefused, match="can't be signed: .*symlink"):
        sign_folder(version, keys)
    assert not (version / "model.sig").exists()


def test_neither_signature_holds_a_path_or_a_secret(version, keys, tmp_path):
    text = (version / "model.sig").read_text()
    payload = base64.b64decode(json.loads(text)["dsseEnvelope"]["payload"]).decode()
    statement = sign_statement(make_statement(keys.id), keys).decode()
    for shown in (text, payload, statement):
        assert str(tmp_path) not in shown and find_secret(shown.encode()) is None
    assert json.loads(payload)["subject"][0]["name"] == "version"


# ---- the library's own command line


def library(folder: Path, key: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(key), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "no_proxy": "*"})


def test_the_librarys_own_command_verifies_it(version, folders):
    (version / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    options = ("--no-ignore-git-paths", "--ignore-paths", str(version / ".gitattributes"))
    done = library(version, folders[0] / "p256.pub", *options)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
    (version / "README.md").write_text("# y\n")
    done = library(version, folders[0] / "p256.pub", *options)
    assert done.returncode == 1 and "Hash mismatch for 'README.md'" in done.stderr


def test_the_librarys_own_command_needs_no_options_without_files_of_git(version, keys, folders):
    for path in (".gitignore", "adapter/.gitattributes"):
        (version / path).unlink()
    shutil.rmtree(version / ".github")
    sign_folder(version, keys)
    (version / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    done = library(version, folders[0] / "p256.pub")
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr


# ---- without the extra


@pytest.fixture
def without_extra(monkeypatch):
    """As if only prefbuild itself were installed."""
    lacking = ("model_signing", "OpenSSL", "securesystemslib", "cryptography")
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] in lacking:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_the_extra_signing_says_what_to_install(tmp_path, version, keys, public, folders, without_extra):
    data = (version / "model.sig").read_bytes()
    for act in (
        lambda: keygen(tmp_path / "keys", None),
        lambda: load_keys(folders[0]),
        lambda: load_public(folders[0]),
        lambda: sign_statement(make_statement(keys.id), keys),
        lambda: sign_folder(version, keys),
        lambda: verify_folder(version, public),
    ):
        with pytest.raises(StageError) as error:
            act()
        assert str(error.value) == "signing needs `pip install 'prefbuild[sign]'`"
    assert (version / "model.sig").read_bytes() == data
    assert not (tmp_path / "keys").exists()


def test_without_the_extra_unsigned_statements_are_written_and_read(without_extra):
    data = sign_statement(make_statement(None), None)
    assert read_statement(data, SHOWN) == (make_statement(None), None)


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, prefbuild.promote.signing, prefbuild.promote.bom; "
        "print([m for m in ('model_signing', 'cryptography', 'securesystemslib', 'sigstore') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
