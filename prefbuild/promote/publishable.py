"""What may be published: kinds of files, and no secrets in them.

Covered: the secrets' own bytes in any file but tensors, and in a safetensors header. Not covered: a secret that is
encoded, split or trained into weights.
"""

import json
import os
import re
from pathlib import Path

from prefbuild.errors import PromotionRefused

SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md", ".yaml", ".svg")
BINARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
NAMES = (*BINARY, "LICENSE", "NOTICE", "provenance.intoto.jsonl", "model.sig")
# Allowed by suffix, and still not to be let out: state of a training run.
TRAINING = re.compile(r"(optimizer|scheduler|rng_state|training_args|trainer_state|scaler)([._-].*)?")

SECRETS = {
    "a Hugging Face token": re.compile(rb"hf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(rb"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,}"),
    "an AWS access key": re.compile(rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an AWS secret key": re.compile(rb"(?i)aws_secret_access_key\W{1,6}[A-Za-z0-9/+=]{40}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
SHORTEST_SECRET = 12  # a shorter value of a variable is found by chance


def check_publishable(folder: Path) -> None:
    """Every file of a folder may be published, or PromotionRefused naming file and kind; never the secret itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        shown = path.relative_to(folder).as_posix()
        if TRAINING.fullmatch(path.name):
            raise PromotionRefused(f"{shown}: is state of a training run, which is not published")
        if path.suffix not in SUFFIXES and path.name not in NAMES:
            raise PromotionRefused(f"{shown}: is no kind of file that is published ({', '.join(SUFFIXES + NAMES)})")
        text = _text(path)
        if path.name not in BINARY and not _is_text(text, path.suffix):
            raise PromotionRefused(f"{shown}: is not what its name says: {_magic(text)}; it is not published")
        kind = find_secret(text)
        if kind:
            raise PromotionRefused(f"{shown}: holds {kind}; take it out, and change it: it may have been seen")


def find_secret(data: bytes) -> str | None:
    """The kind of the first secret in some bytes, or None."""
    for kind, pattern in SECRETS.items():
        if pattern.search(data):
            return kind
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET:
            for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
                if form.encode(errors="surrogateescape") in data:
                    return f"the value of the environment variable {name}"
    return None


def _text(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with open(path, "rb") as file:  # eight bytes of length, then the header: JSON, with free text in __metadata__
        return file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))


def _is_text(data: bytes, suffix: str) -> bool:
    """Whether a text file is text, and a safetensors file begins with its header: a pickle by another name does neither."""
    try:
        text = data.decode()
        return suffix != ".safetensors" or isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _magic(data: bytes) -> str:
    if data[:1] == b"\x80":
        return "it begins like a pickle"
    return "it begins like a zip, as PyTorch's pickles do" if data[:2] == b"PK" else "it is no text"
