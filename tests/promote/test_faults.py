"""A promotion to the Hub with every request going wrong."""

from pathlib import Path

import pytest

from tests.promote.faults import KINDS, sweep


@pytest.mark.timeout(600)
def test_every_request_goes_wrong_once(tmp_path: Path) -> None:
    """Half of the table that `python tests/promote/faults.py` prints; each point asserts what may be visible."""
    points = list(sweep(tmp_path, ("lost before", "client killed", "answer lost")))
    assert len(points) >= 60 and {point.at_tag for point in points} == {"nothing", "gated bytes"}
    assert {point.exit for point in points} == {"0", "9", "killed"} and {point.again for point in points} == {"0"}
    commits = [point for point in points if "/commit/main" in point.request]
    assert [(point.wrong, point.exit) for point in commits] == [
        ("lost before", "9"),
        ("client killed", "killed"),
        ("answer lost", "0"),
    ]
    assert set(KINDS) > {point.wrong for point in points}
