"""A folder as registry: going back, and what interrupts it. Publishing is in test_promote.py."""

import json
import shutil
from pathlib import Path

import pytest
from onhub import rebuild, records

from prefbuild.errors import PromotionRefused
from prefbuild.promote import directory, promote, record, rollback
from prefbuild.promote.verify import verify


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def twice(root: Path) -> Path:
    """A project that promoted v1 and v2."""
    promote(root, "x")
    rebuild(root, 0.4)
    promote(root, "x")
    return root


def test_going_back_adds_a_version_with_the_earlier_files(twice: Path) -> None:
    made = rollback(twice, "x")
    assert (made["version"], made["same_as"], made["recorded"]) == ("v3", "v1", True)
    registry = twice / "registry/x"
    assert contents(registry / "v3") == contents(registry / "v1") != contents(registry / "v2")
    assert [(line["version"], line.get("same_as")) for line in records(twice)] == [("v1", None), ("v2", None), ("v3", "v1")]  # fmt: skip
    assert verify(str(registry / "v3"), root=twice).facts["version"] == "v1"
    rebuild(twice, 0.3)
    assert promote(twice, "x")["version"] == "v4"
    assert rollback(twice, "x")["same_as"] == "v1"  # v3 was current before v4


def test_there_is_nothing_before_the_first(root: Path) -> None:
    with pytest.raises(PromotionRefused, match="holds no version"):
        rollback(root, "x")
    promote(root, "x")
    with pytest.raises(PromotionRefused, match="v1 is v1, and no version was promoted before it"):
        rollback(root, "x")
    with pytest.raises(PromotionRefused, match="has no version v7; it has v1"):
        rollback(root, "x", to="v7")
    with pytest.raises(PromotionRefused, match="v1 holds the files of v1 already"):
        rollback(root, "x", to="v1")


def test_a_damaged_version_is_not_gone_back_to(twice: Path) -> None:
    (twice / "registry/x/v1/README.md").write_text("# other\n")
    with pytest.raises(PromotionRefused, match="registry/x/v1: is not what was published:\n  README.md: sha256"):
        rollback(twice, "x")
    assert sorted(path.name for path in (twice / "registry/x").iterdir()) == ["v1", "v2"]


def test_going_back_that_was_cut_off_is_finished(twice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(directory, "_sync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rollback(twice, "x")
    assert sorted(path.name for path in (twice / "registry/x").iterdir()) == ["v1", "v2"]
    with monkeypatch.context() as patch:
        patch.setattr(record, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rollback(twice, "x")
    assert len(records(twice)) == 2
    assert rollback(twice, "x")["version"] == "v3"
    assert [line["version"] for line in records(twice)] == ["v1", "v2", "v3"]
    assert sorted(path.name for path in (twice / "registry/x").iterdir()) == ["v1", "v2", "v3"]


def test_a_recipe_need_not_be_built_to_go_back(twice: Path) -> None:
    shutil.rmtree(twice / "build/x")
    assert rollback(twice, "x")["same_as"] == "v1"


def test_the_record_is_a_table(twice: Path) -> None:
    rollback(twice, "x")
    head, *lines = record.table(record.read(twice)).splitlines()
    assert head.split() == ["when", "recipe", "version", "where", "from", "commit", "signed", "by"]
    assert [line.startswith("*") for line in lines] == [False, False, True] and "v3 (= v1)" in lines[2]
    assert all("registry" in line and line.endswith("nobody") for line in lines)


def test_a_damaged_record_is_refused(twice: Path) -> None:
    path = twice / record.RECORD
    path.write_text(path.read_text().replace("{", "[", 1))
    with pytest.raises(PromotionRefused, match="promotions.jsonl: a line is not JSON .* restore the record from git"):
        record.read(twice)
    path.write_text(json.dumps({}) + "\n")
    assert record.read(twice) == [{}]
