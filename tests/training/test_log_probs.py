"""Log-probabilities of a reference, as an artifact keeps them and a training reads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from prefbuild.errors import StageError
from prefbuild.training.log_probs import part_key, read_log_probs, row_digest, write_log_probs
from prefbuild.training.prepared import Row

ROWS: list[Row] = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
    {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4, 5]},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The second and the first row to train on, and one held out, whose tokens have 0, -1, -2, ..."""
    numbered = {"train.jsonl": [(1, ROWS[1]), (0, ROWS[0])], "held_out.jsonl": [(0, ROWS[2])]}
    write_log_probs(tmp_path, numbered, [-np.arange(7.0), -np.arange(7.0, 9.0)])
    return tmp_path


def test_rows_are_found_by_their_ids_in_any_order_and_as_often_as_they_are_asked_for(folder: Path) -> None:
    first, second, held_out = ([-4.0], [-5.0, -6.0]), ([0.0, -1.0], [-2.0, -3.0]), ([-7.0], [-8.0])

    def read(rows: list[Row]) -> list[tuple[list[float], list[float]]]:
        return [(chosen.tolist(), rejected.tolist()) for chosen, rejected in read_log_probs(folder, rows)]

    assert read(ROWS) == [first, second, held_out]
    assert read([ROWS[2], ROWS[0], ROWS[2]]) == [held_out, first, held_out]
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][2] == {
        "file": "held_out.jsonl", "row": 0, "sha256": row_digest(ROWS[2]), "chosen": 1, "rejected": 1,
    }  # fmt: skip


def test_a_row_with_other_ids_is_not_found(folder: Path) -> None:
    other = {**ROWS[0], "rejected_ids": [4, 6]}
    with pytest.raises(StageError) as caught:
        read_log_probs(folder, [ROWS[1], other])
    assert str(caught.value) == (
        f"{folder}: has no log-probabilities of a row with these token ids (2 of 2 asked for, sha256 "
        f"{row_digest(other)[:12]}...): it is of other rows than those to train on; run `dvc repro`"
    )


def test_files_that_do_not_belong_together_are_told(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(StageError, match="rows.jsonl lists 7 tokens, and log_probs.safetensors has 9; run `dvc repro`"):
        read_log_probs(folder, ROWS[:1])


def test_a_digest_tells_where_parts_begin_and_a_part_which_rows_it_has() -> None:
    # The first two have the same ids one after the other.
    assert len({row_digest(row) for row in ROWS}) == 3
    assert part_key(ROWS) != part_key(ROWS[::-1]) and part_key(ROWS[:2]) != part_key(ROWS)
