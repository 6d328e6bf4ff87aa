"""Keys, and the two signatures of a published version.

    sign_statement / check_statement    the provenance: a DSSE envelope, ed25519
    sign_folder / verify_folder         every file: an OpenSSF model signature (model.sig), ECDSA on P-256

Two keys, since model-signing takes elliptic curves alone, and its signatures differ each time; those of ed25519 don't.
Covered: both are made and checked offline. Not covered: whose key it is, which people tell each other, and taking back a
key that was stolen.
"""

import ast
import base64
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefbuild.errors import PromotionRefused, StageError, UsageError
from prefbuild.promote.provenance import facts_of
from prefbuild.runners import settings_path

PAYLOAD_TYPE = "application/vnd.in-toto+json"
SIGNATURE = "model.sig"
PRIVATE = ("ed25519.key", "p256.key")
PUBLIC = ("ed25519.pub", "p256.pub")
# What a model signature leaves out: itself, and the file that the Hub adds.
UNSIGNED = (SIGNATURE, ".gitattributes")


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """What checks signatures: `id` is the sha256 of the ed25519 key's DER, in hex."""

    id: str
    ed25519: Any  # securesystemslib's Key
    p256: Path
    p256_id: str  # as model-signing names it: the sha256 of the PEM


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What signs."""

    id: str
    ed25519: Any = field(repr=False)  # securesystemslib's Signer
    p256: Path
    passphrase: bytes | None = field(repr=False)


# ---- keys


def keygen(folder: Path, passphrase: str | None) -> list[str]:
    """Make both keys in a folder of their own; returns lines for the user.

    UsageError when one of the files is there already, or others can enter the folder; StageError without the extra.
    """
    if passphrase == "":
        raise UsageError("the passphrase is empty; give one, or none at all")
    with _extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    if folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise UsageError(f"{folder}: others can enter it; run `chmod 700 {folder}`, or name a new folder")
    there = [name for name in (*PRIVATE, *PUBLIC) if os.path.lexists(folder / name)]
    if there:
        raise UsageError(f"{folder / there[0]}: is there already, and a key is never overwritten; name another folder")
    encryption: Any = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        for name, key in (
            ("ed25519", ed25519.Ed25519PrivateKey.generate()),
            ("p256", ec.generate_private_key(ec.SECP256R1())),
        ):
            pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            spki = serialization.PublicFormat.SubjectPublicKeyInfo
            _write_new(folder / f"{name}.key", key.private_bytes(pem, pkcs8, encryption), 0o600)
            _write_new(folder / f"{name}.pub", key.public_key().public_bytes(pem, spki), 0o644)
    except OSError as error:
        raise UsageError(f"{folder}: can't write keys there: {error.strerror}") from None
    return [
        f"wrote {', '.join((*PRIVATE, *PUBLIC))} to {folder}",
        f"key {load_public(folder).id}",
        f"share {' and '.join(PUBLIC)}: with them anybody can check what you sign; keep the .key files to yourself"
        + ("" if passphrase is not None else ", they are not encrypted"),
        "if you lose the keys, what is published stays as good as it was; make new ones for what comes next",
    ]


def default_keys() -> Path:
    """Where keys are kept unless said otherwise: beside the user's settings."""
    return settings_path().parent / "keys"


def find_keys(given: str | None) -> Path | None:
    """The folder of the keys: `--key`, else PREFBUILD_KEY, else the default one if it is there; None without any.

    Raises UsageError when it holds no public keys.
    """
    default = default_keys()
    named = [(given, "--key"), (os.environ.get("PREFBUILD_KEY"), "PREFBUILD_KEY")]
    named += [(str(default), "the default")] if default.exists() else []
    for path, where in named:
        if path:
            folder = Path(path).expanduser()
            _check_there(folder, PUBLIC, where)
            return folder
    return None


def load_keys(folder: Path) -> Keys:
    """The keys that sign; asks for a passphrase where one is needed and PREFBUILD_KEY_PASSPHRASE is not set.

    Raises UsageError for files that are missing, readable by others, encrypted otherwise, or no pair.
    """
    _check_there(folder, (*PRIVATE, *PUBLIC), "the keys")
    public = load_public(folder)
    for name in PRIVATE:
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        if mode & 0o077:
            raise UsageError(f"{folder / name}: others may read it (mode {mode:04o}); run `chmod 600 {folder / name}`")
    with _extra():
        from securesystemslib.signer import CryptoSigner
    ed25519, passphrase = _load_private(folder / "ed25519.key", None)
    p256, passphrase = _load_private(folder / "p256.key", passphrase)
    for name, key in (("ed25519", ed25519), ("p256", p256)):
        if key.public_key() != _load_public(folder / f"{name}.pub"):
            raise UsageError(f"{folder}: {name}.pub does not belong to {name}.key; restore both from one backup")
    return Keys(
        id=public.id,
        ed25519=CryptoSigner(ed25519, public.ed25519),
        p256=folder / "p256.key",
        passphrase=passphrase,
    )


def load_public(folder: Path) -> PublicKeys:
    """The keys that check. UsageError when a file is missing or holds another kind of key."""
    with _extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
        from securesystemslib.signer import SSlibKey
    _check_there(folder, PUBLIC, "the keys")
    key = _load_public(folder / "ed25519.pub")
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{folder / 'ed25519.pub'}: is no ed25519 key; `prefbuild keygen` makes one")
    p256 = _load_public(folder / "p256.pub")
    if not isinstance(p256, ec.EllipticCurvePublicKey) or not isinstance(p256.curve, ec.SECP256R1):
        raise UsageError(f"{folder / 'p256.pub'}: is no P-256 key; `prefbuild keygen` makes one")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    key_id = hashlib.sha256(der).hexdigest()
    pem = p256.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKeys(
        id=key_id,
        ed25519=SSlibKey.from_crypto(key, keyid=key_id),
        p256=folder / "p256.pub",
        p256_id=hashlib.sha256(pem).hexdigest(),
    )


def short(key_id: str) -> str:
    """A key's id as people see it."""
    return "".join(c if c.isprintable() else "?" for c in key_id[:16]) + ".."


def _check_there(folder: Path, names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder}: {where}: lacks {', '.join(missing)}; `prefbuild keygen` makes keys")


def _write_new(path: Path, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _load_public(path: Path) -> Any:
    with _extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        return load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm, OSError):
        raise UsageError(f"{path}: is no public key in PEM; `prefbuild keygen` makes one") from None


def _load_private(path: Path, passphrase: bytes | None) -> tuple[Any, bytes | None]:
    """A private key, and the passphrase by which it was opened."""
    with _extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    data = path.read_bytes()
    try:
        try:
            return load_pem_private_key(data, passphrase), passphrase
        except TypeError:  # cryptography's word for: it is encrypted; or it is not, and a passphrase was given
            if passphrase is not None:
                raise UsageError(f"{path}: is not encrypted, the other key is; restore both from one backup") from None
            passphrase = _passphrase(path)
            return load_pem_private_key(data, passphrase), passphrase
    except (ValueError, UnsupportedAlgorithm):
        what = "is not opened by this passphrase" if passphrase else "is no private key in PEM"
        raise UsageError(f"{path}: {what}") from None


def _passphrase(path: Path) -> bytes:
    given = os.environ.get("PREFBUILD_KEY_PASSPHRASE")
    if not given and sys.stdin is not None and sys.stdin.isatty():
        from getpass import getpass

        given = getpass(f"passphrase of {path}: ")
    if not given:
        raise UsageError(f"{path}: is encrypted; set PREFBUILD_KEY_PASSPHRASE, or run this on a terminal")
    return given.encode()


def new_passphrase() -> str:
    """A passphrase for new keys: PREFBUILD_KEY_PASSPHRASE, or asked for twice. UsageError when they differ."""
    given = os.environ.get("PREFBUILD_KEY_PASSPHRASE")
    if given:
        return given
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("--passphrase asks for one on a terminal; elsewhere set PREFBUILD_KEY_PASSPHRASE")
    from getpass import getpass

    given = getpass("passphrase: ")
    if getpass("once more: ") != given:
        raise UsageError("the two differ; run it again")
    return given


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise StageError("signing needs `pip install 'prefbuild[sign]'`") from None


# ---- the statement


def sign_statement(statement: dict[str, Any], keys: Keys | None) -> bytes:
    """A statement as one line of JSON: a DSSE envelope, signed where there are keys. The same bytes each time.

    PromotionRefused for what a statement can't say, such as a line break in a file's name.
    """
    try:
        key_id = facts_of(statement)["key"]
    except ValueError as error:
        raise PromotionRefused(f"the statement {error}") from None
    assert key_id == (keys.id if keys else None), "facts were gathered for another key"
    payload = _canonical(statement)
    if keys is None:
        envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": []}
        return _canonical(envelope) + b"\n"
    with _extra():
        from securesystemslib.dsse import Envelope
    signed = Envelope(payload, PAYLOAD_TYPE, {})
    signed.sign(keys.ed25519)
    return _canonical(signed.to_dict()) + b"\n"


def read_statement(data: bytes, shown: str) -> tuple[dict[str, Any], str | None]:
    """A statement, and the id of the key that is said to have signed it, None when unsigned. Checks no signature.

    PromotionRefused, which begins with the file's name as `shown`, for anything that is not built like one.
    """
    try:
        envelope = json.loads(data)
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its payloadType is not {PAYLOAD_TYPE}")
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        key_id = facts_of(statement)["key"]
        signatures = [(str(entry["keyid"]), base64.b64decode(entry["sig"], validate=True).hex())
                      for entry in envelope["signatures"]]  # fmt: skip
    except KeyError as error:
        raise PromotionRefused(f"{shown}: is no statement of prefbuild: lacks {error.args[0]}") from None
    except (TypeError, AttributeError, RecursionError):
        raise PromotionRefused(f"{shown}: is no statement of prefbuild: is not built like a DSSE envelope") from None
    except ValueError as error:
        raise PromotionRefused(f"{shown}: is no statement of prefbuild: {error}") from None
    if len(signatures) > 1:
        raise PromotionRefused(f"{shown}: has {len(signatures)} signatures; prefbuild makes one")
    if not signatures:
        if key_id is not None:
            raise PromotionRefused(f"{shown}: its signature was taken away; key {short(key_id)} had signed it")
        return statement, None
    signer = signatures[0][0]
    if signer != key_id:
        says = f"key {short(key_id)} signs it" if key_id else "nobody signs it"
        raise PromotionRefused(f"{shown}: says that {says}, and has a signature of key {short(signer)}")
    return statement, signer


def check_statement(data: bytes, public: PublicKeys, shown: str) -> dict[str, Any]:
    """The statement, once its signature was checked. PromotionRefused says what is wrong with it."""
    statement, key_id = read_statement(data, shown)
    if key_id is None:
        raise PromotionRefused(f"{shown}: is not signed")
    if key_id != public.id:
        raise PromotionRefused(f"{shown}: is signed by key {short(key_id)}, not by {short(public.id)}")
    with _extra():
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import VerificationError
    try:
        Envelope.from_dict(json.loads(data)).verify([public.ed25519], 1)
    except (VerificationError, ValueError, KeyError):
        raise PromotionRefused(
            f"{shown}: the signature does not fit the content; it was changed after key {short(public.id)} signed it, "
            "or never signed by it"
        ) from None
    return statement


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


# ---- the folder


def sign_folder(folder: Path, keys: Keys) -> None:
    """Write model.sig, over every other file of a folder but a .gitattributes at its top."""
    with _extra():
        from model_signing import signing
    password: Any = keys.passphrase  # the library says str, and needs bytes
    config = signing.Config().use_elliptic_key_signer(private_key=keys.p256, password=password)
    try:
        config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
    except (ValueError, OSError) as error:
        raise PromotionRefused(f"{folder}: can't be signed: {error}") from None


def verify_folder(folder: Path, public: PublicKeys) -> None:
    """Check model.sig and every file. PromotionRefused names the files that differ, or says what the signature lacks."""
    with _extra():
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying
    shown = folder / SIGNATURE
    if not os.path.lexists(shown):
        raise PromotionRefused(f"{shown}: is missing; the folder is not signed")
    for name in UNSIGNED:  # a folder of that name would be left out with all that is in it
        if os.path.lexists(folder / name) and not stat.S_ISREG((folder / name).lstat().st_mode):
            raise PromotionRefused(f"{folder / name}: is no plain file")
    _check_signer(shown, public)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public.p256).set_hashing_config(_hashing())
    try:
        config.verify(folder, shown)
    except InvalidSignature:
        raise PromotionRefused(
            f"{shown}: the signature does not fit the list of files; the list was changed after it was signed"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError) as error:
        raise PromotionRefused(f"{folder}: {_said(error)}") from None


def _hashing() -> Any:
    """Leaves out what UNSIGNED names. By its default the library would leave out all that is git's, .github too."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False)


def _check_signer(path: Path, public: PublicKeys) -> None:
    """The key that the signature names is the one at hand."""
    try:
        hint = str(json.loads(path.read_text(encoding="utf-8"))["verificationMaterial"]["publicKey"]["hint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PromotionRefused(f"{path}: is no model signature made with a key") from None
    if hint != public.p256_id:
        raise PromotionRefused(f"{path}: is signed by P-256 key {short(hint)}, not by {short(public.p256_id)}")


def _said(error: Exception) -> str:
    """The library's words: `Signature mismatch: ` and a list of what differs."""
    text = str(error)
    try:
        lines = ast.literal_eval(text.removeprefix("Signature mismatch: "))
        # What follows is two digests as Python shows bytes.
        text = "; ".join(line.partition(": Expected ")[0] for line in lines) if isinstance(lines, list) else text
    except (ValueError, SyntaxError, RecursionError):
        pass
    return "".join(c if c.isprintable() else "?" for c in f"is not what was signed: {text}")
