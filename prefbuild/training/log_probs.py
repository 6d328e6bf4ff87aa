"""Log-probabilities that a reference gives to the answers of prepared rows: how they are kept, and read again.

An artifact has `log_probs.safetensors` (one float32 tensor: all answers' tokens one after the other, chosen and rejected
by turns) and `rows.jsonl`, a line a row: its file and number there, the sha256 of its token ids, and how many tokens of
its answers are scored. Rows are found by that digest.

The cache, shared by all recipes, has what was computed at once under one key. Another number of rows at once would give
the same numbers but for rounding, so nothing is taken from the cache that a build without one would not have computed:
it changes no byte of the result. Not covered: a cache that somebody means to falsify.
"""

import hashlib
import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefbuild.artifact import digest_of, write_atomic
from prefbuild.errors import StageError
from prefbuild.training.prepared import LogProbs, Row

if TYPE_CHECKING:
    import numpy as np

LOG_PROBS, ROWS = "log_probs.safetensors", "rows.jsonl"


def row_digest(row: Row) -> str:
    """Hex sha256 of a row's token ids, part by part."""
    import numpy as np

    parts = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    numbers = [len(part) for part in parts] + [token for part in parts for token in part]
    return hashlib.sha256(np.array(numbers, "<i8").tobytes()).hexdigest()


def part_key(rows: list[Row]) -> str:
    """What rows that are scored at once are called in the cache."""
    return digest_of([row_digest(row) for row in rows]).removeprefix("sha256:")


# ---- an artifact


def write_log_probs(folder: Path, rows: dict[str, list[tuple[int, Row]]], values: "list[np.ndarray]") -> None:
    """Write an artifact's files: of rows (number and token ids, by the file that they are in), all values in order."""
    import numpy as np
    from safetensors.numpy import save

    lines = []
    for name, numbered in rows.items():
        for number, row in numbered:
            lengths = {answer: len(row[f"{answer}_ids"]) for answer in ("chosen", "rejected")}
            lines.append(json.dumps({"file": name, "row": number, "sha256": row_digest(row), **lengths}) + "\n")
    write_atomic(folder / LOG_PROBS, save({"log_probs": np.concatenate(values).astype("<f4")}))
    write_atomic(folder / ROWS, "".join(lines))


def read_log_probs(folder: Path, rows: list[Row]) -> list[LogProbs]:
    """Log-probabilities of (chosen, rejected) tokens of rows, in order. StageError when a row is not among them."""
    from safetensors.numpy import load_file

    values = load_file(folder / LOG_PROBS)["log_probs"]
    places: dict[str, tuple[int, int, int]] = {}
    end = 0
    with open(folder / ROWS, encoding="utf-8") as file:
        for line in map(json.loads, file):
            start, middle, end = end, end + line["chosen"], end + line["chosen"] + line["rejected"]
            places[line["sha256"]] = start, middle, end
    if end != len(values):
        raise StageError(f"{folder}: {ROWS} lists {end} tokens, and {LOG_PROBS} has {len(values)}; run `dvc repro`")
    found = []
    for number, row in enumerate(rows, start=1):
        if (digest := row_digest(row)) not in places:
            raise StageError(
                f"{folder}: has no log-probabilities of a row with these token ids ({number} of {len(rows)} asked for, "
                f"sha256 {digest[:12]}...): it is of other rows than those to train on; run `dvc repro`"
            )
        start, middle, end = places[digest]
        found.append((values[start:middle], values[middle:end]))
    return found


# ---- the cache


class Cache:
    """Values of parts, by their keys, in one file a model and arithmetic. Builds may share it at the same time."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection

    def get(self, key: str, num_values: int) -> "np.ndarray | None":
        """The values of a part, [num_values] float32; None where there are none, or they are not what was put there."""
        import numpy as np

        found = self.connection.execute("SELECT sha256, log_probs FROM parts WHERE key = ?", (key,)).fetchone()
        if found is None or len(found[1]) != 4 * num_values or hashlib.sha256(found[1]).hexdigest() != found[0]:
            return None
        return np.frombuffer(found[1], "<f4")

    def put(self, key: str, values: "np.ndarray") -> None:
        """Keep a part, from now on, even if this process is killed."""
        data = values.astype("<f4").tobytes()
        row = key, hashlib.sha256(data).hexdigest(), data
        with self.connection:
            self.connection.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", row)


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """The cache in a file, which is made where there is none, and made anew where it is broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = _connect(path)
    except sqlite3.DatabaseError as error:
        print(f"reference: {path} is not used: {error}", file=sys.stderr)
        path.unlink()
        connection = _connect(path)
    try:
        yield Cache(connection)
    finally:
        connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60)  # seconds to wait for another build that writes
    try:
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS parts (key TEXT PRIMARY KEY, sha256 TEXT, log_probs BLOB)")
        if (problem := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(problem)
    except BaseException:
        connection.close()
        raise
    return connection
