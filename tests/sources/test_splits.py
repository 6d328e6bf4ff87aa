"""Configurations and splits told from a repository's names and its card."""

from typing import Any

import pytest

from prefbuild.errors import LockError
from prefbuild.sources.splits import choose, listing, rows_of, sets_of


def card(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"license": "mit", "configs": list(configs)}


SHARDS = [f"data/{name}-0000{n}-of-00002.parquet" for name in ("test", "train", "train_sft") for n in (0, 1)]
LANGUAGES = ["de/train.jsonl", "en/test.jsonl", "en/train-0.jsonl", "en/train-1.jsonl"]
CONVERTED = ["default/train_gen/0000.parquet", "default/train_sft/0000.parquet", "default/train_sft/0001.parquet"]


@pytest.mark.parametrize(
    ("paths", "config", "split", "found"),
    [
        (SHARDS, None, "train", SHARDS[2:4]),
        (SHARDS, "default", "train_sft", SHARDS[4:]),
        (["README.md", "train.jsonl", "test.jsonl", "eval.py"], None, "train", ["train.jsonl"]),
        (["train.jsonl", "dataset_infos.json"], None, "train", ["train.jsonl"]),
        (["rows.csv"], None, "train", ["rows.csv"]),
        (["data/train/0.csv", "data/train/1.csv", "data/dev/0.csv"], None, "validation", ["data/dev/0.csv"]),
        (["train/0.csv", "training/1.csv", "test/0.csv"], None, "train", ["train/0.csv", "training/1.csv"]),
        (LANGUAGES, "en", "train", LANGUAGES[2:]),
        (LANGUAGES, "de", None, LANGUAGES[:1]),
        ([f"data/{path}" for path in LANGUAGES], "en", "test", ["data/en/test.jsonl"]),
        (["v1.0 (new)/train.jsonl", "v2[x]/train.jsonl"], "v2[x]", "train", ["v2[x]/train.jsonl"]),
        (CONVERTED, None, "train_sft", CONVERTED[1:]),
        (["en/t[0]/0000.parquet", "de/t0/0000.parquet"], "en", "t[0]", ["en/t[0]/0000.parquet"]),
        ([*SHARDS, ".cache/train-00000-of-00001.parquet", "__x__/train.parquet"], None, "train", SHARDS[2:4]),
    ],
)
def test_usual_layouts(paths: list[str], config: str | None, split: str | None, found: list[str]) -> None:
    assert choose(paths, {}, config, split, "me/rows@main") == found


@pytest.mark.parametrize(
    ("said", "config", "split", "found"),
    [
        (card({"config_name": "en", "data_files": "en/*.jsonl"}), None, None, LANGUAGES[1:]),
        (card({"config_name": "en", "data_files": ["en/test.jsonl", "de/*"]}), "en", "train", LANGUAGES[:2]),
        (card({"config_name": "x", "data_files": [{"split": "a", "path": ["**/train*"]}]}), "x", "a", [*LANGUAGES[:1], *LANGUAGES[2:]]),
        (card({"config_name": "x", "data_files": "./de/train.jsonl"}), "x", None, LANGUAGES[:1]),
        (card({"config_name": "x", "data_dir": "en"}), "x", "test", ["en/test.jsonl"]),
        (card({"config_name": "x", "data_dir": "./en/", "data_files": "train-*"}), "x", None, LANGUAGES[2:]),
        (card({"config_name": "default", "data_files": "de/*"}, {"config_name": "b", "data_files": "en/*"}), None, "train", LANGUAGES[:1]),
        (card({"config_name": "a", "data_files": "de/*"}, {"config_name": "b", "default": True, "data_files": "en/t*t.jsonl"}), None, "train", ["en/test.jsonl"]),
        (card({"config_name": 2020, "data_files": "de/*", "features": [{"name": "x", "dtype": "no such type"}]}), "2020", None, LANGUAGES[:1]),
        ({"license": "mit"}, "de", "train", LANGUAGES[:1]),
    ],
)  # fmt: skip
def test_what_the_card_says(said: dict[str, Any], config: str | None, split: str | None, found: list[str]) -> None:
    assert choose(["README.md", *LANGUAGES], said, config, split, "me/rows@main") == found


ONE = {"config_name": "one", "data_files": "de/*"}
TWO = {"config_name": "two", "data_files": [{"split": "train", "path": "a/*.arrow"}, {"split": "test", "path": "x"}]}


@pytest.mark.parametrize(
    ("paths", "said", "config", "split", "message"),
    [
        (SHARDS, {}, None, "dev", "has no split dev in config default; there are default (train, test, train_sft)"),
        (SHARDS, {}, "en", "train", "has no config en; there are default (train, test, train_sft)"),
        (LANGUAGES, {}, None, "train", "has several configs; say which, as in config: de; there are de (train), en (train, test)"),
        (LANGUAGES, {}, "en", None, "has several splits; say which, as in split: test; there are de (train), en (train, test)"),
        (["a.jsonl", "b.jsonl"], {}, None, "train", "the names of config default tell no splits; name the files, with files: [...]"),
        (LANGUAGES, card(ONE, TWO), None, "train", "has several configs; say which, as in config: one; there are one (train), two (train, test)"),
        (LANGUAGES, card(ONE, TWO), "two", "train", "split train of config two is a/*.arrow, and no such file of rows is there; name the files, with files: [...]"),
        (LANGUAGES, card({"config_name": "x", "data_files": "https://example.org/x.csv"}), None, "train", "its card names https://example.org/x.csv, which is no file of the repository; name the files, with files: [...]"),
        (LANGUAGES, card({"config_name": "x", "data_files": "../../x.jsonl"}), None, "train", "split train of config x is ../../x.jsonl, and no such file of rows is there; name the files, with files: [...]"),
        (LANGUAGES, card({"config_name": "x", "data_files": "**x.jsonl"}), None, "train", "its card's pattern **x.jsonl can't be read (Invalid pattern: '**' can only be an entire path component); name the files, with files: [...]"),
        (LANGUAGES, card({"data_files": "x"}), None, "train", "`configs` in its card can't be read ('config_name'); name the files, with files: [...]"),
        (LANGUAGES, {"configs": "en"}, None, "train", "`configs` in its card can't be read (string indices must be integers, not 'str'); name the files, with files: [...]"),
        (LANGUAGES, card(ONE | {"default": True}, {**ONE, "config_name": "default"}), None, "train", "`configs` in its card can't be read (Dataset has several default configs: 'one' and 'default'.); name the files, with files: [...]"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_answered_with_what_is(
    paths: list[str], said: dict[str, Any], config: str | None, split: str | None, message: str
) -> None:
    with pytest.raises(LockError) as error:
        choose(paths, said, config, split, "me/rows@main")
    assert str(error.value) == f"me/rows@main: {message}"


def test_many_configurations_are_counted() -> None:
    paths = [f"lang{n:02}/train.jsonl" for n in range(40)]
    assert listing(paths, {}, "x").endswith("lang11 (train) and 28 more")
    assert listing(["a.jsonl", "b.jsonl"], {}, "x") == ""


def test_the_library_that_reads_rows_finds_the_same_files(tmp_path: Any) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    for paths in (SHARDS, ["train.jsonl", "test.jsonl"], ["a/dev/0.csv", "a/train/0.csv", "b/my-train.csv"]):
        folder = tmp_path / sets_of(paths)[0].replace("/", "_")
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        there = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
        patterns = {"config_name": "default", "data_dir": "."}
        for split, files in there.items():
            wanted = sorted(str(file).removeprefix(f"{folder}/") for file in files)
            assert choose(paths, card(patterns), None, str(split), "x") == wanted


def test_nothing_stays_in_memory() -> None:
    import fsspec

    memory: Any = fsspec.filesystem("memory")
    before = set(memory.store), list(memory.pseudo_dirs)
    choose(SHARDS, {}, None, "train", "x")
    with pytest.raises(LockError):
        choose(SHARDS, {}, None, "dev", "x")
    assert (set(memory.store), list(memory.pseudo_dirs)) == before


def test_rows_and_their_sets() -> None:
    assert rows_of(["b.jsonl", "a.txt", "dataset_infos.json", "x/a.csv"]) == ["b.jsonl", "x/a.csv"]
    assert sets_of(SHARDS) == [SHARDS[0], SHARDS[2], SHARDS[4]]
