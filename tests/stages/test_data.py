"""The data stage: exactly the locked files, or an error."""

from pathlib import Path

import pytest

from prefbuild.errors import LockError, StageError
from prefbuild.sources import pin
from prefbuild.stages import data


def test_the_locked_files_are_left_and_what_a_killed_run_left_is_not(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("row\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/half.jsonl").write_text("half")
    source = {"source": "file", "path": "rows.jsonl"}
    settings = {"source": source, **pin(source, tmp_path)}
    # The runner may have put the file elsewhere than the recipe says.
    data.run(settings, {"source": tmp_path / "rows.jsonl"}, {"data": tmp_path / "out"}, tmp_path / "work", "x")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"rows.jsonl": "row\n"}


def test_a_changed_file_stops_the_stage(tmp_path: Path) -> None:
    source = {"source": "file", "path": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text("row\n")
    settings = {"source": source, **pin(source, tmp_path)}
    (tmp_path / "rows.jsonl").write_text("ROW\n")
    with pytest.raises(LockError, match=r"rows\.jsonl: sha256 is .* was locked; .*prefbuild lock"):
        data.run(settings, {}, {"data": tmp_path / "out"}, tmp_path / "work", "x")


def test_a_data_file_may_not_take_the_manifests_name(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/manifest.json").write_text("[]")
    source = {"source": "file", "path": str(tmp_path / "rows")}
    with pytest.raises(StageError, match=r"manifest\.json: a folder of data can't have a file of that name"):
        data.run({"source": source, **pin(source, tmp_path)}, {}, {"data": tmp_path / "out"}, tmp_path / "work", "x")
