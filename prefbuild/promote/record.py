"""The record of promotions: promotions.jsonl at the project's top, a line a promotion, in git."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from prefbuild.errors import PromotionRefused

RECORD = "promotions.jsonl"


def append(root: Path, entry: dict[str, Any]) -> bool:
    """Append a promotion, unless it is there. Returns whether it was appended."""
    with open(root / RECORD, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        entries, whole = _read(root)
        if entry in entries:
            return False
        file.truncate(whole)
        file.write((json.dumps(entry, sort_keys=True, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return True


def read(root: Path) -> list[dict[str, Any]]:
    """All promotions, oldest first. PromotionRefused when the file was damaged."""
    return _read(root)[0]


def versions(root: Path, name: str, place: str) -> list[str]:
    """The versions of a recipe that were promoted to a place."""
    return [entry["version"] for entry in read(root) if (entry["name"], entry["place"]) == (name, place)]


def table(entries: list[dict[str, Any]]) -> str:
    """The record for people; `*` marks what is current at its place."""
    current = {(entry["name"], entry["place"]): entry["version"] for entry in entries}
    rows = [("", "when", "recipe", "version", "where", "from commit", "signed by")]
    for entry in entries:
        place = entry["place"] + (f" at {entry['commit'][:8]}" if entry.get("commit") else "")
        again = f" (= {entry['same_as']})" if "same_as" in entry else ""
        mark = "*" if current[entry["name"], entry["place"]] == entry["version"] else ""
        source = (entry["git_commit"] or "none")[:8] + (" with changes" if entry["dirty"] else "")
        key = (entry["key"] or "nobody")[:16]
        rows.append((mark, entry["time"], entry["name"], f"{entry['version']}{again}", place, source, key))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)  # fmt: skip


def _read(root: Path) -> tuple[list[dict[str, Any]], int]:
    """The record's entries, and its length without the half line that a promotion killed while writing left."""
    path = root / RECORD
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.split(b"\n")[:-1]], len(whole)
    except ValueError as error:
        raise PromotionRefused(f"{path}: a line is not JSON ({error}); restore the record from git") from None
