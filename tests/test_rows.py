"""prefbuild/rows.py: every row of a file comes back, as messages or with the reason why not."""

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from prefbuild.errors import DataError
from prefbuild.methods import PARTS
from prefbuild.recipe import Data, data_settings
from prefbuild.rows import Dropped, Row, check_columns, read_rows, read_source, reasons

GOOD = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "A colour is blue."}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def settings(**keys: Any) -> dict[str, Any]:
    """The Data section as a resolved recipe has it."""
    source = {"source": "file", "path": "rows.jsonl"}
    shape, keep = keys.pop("shape", "pairs"), keys.pop("keep", [])
    return data_settings(Data.model_validate({"sources": [source], **keys}), shape, keep)


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    """A data folder; a row given as bytes is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder


def read(folder: Path, **keys: Any) -> tuple[list[Row], list[Dropped]]:
    return read_rows(settings(**keys), [folder])


def one_drop(tmp_path: Path, row: Any, **keys: Any) -> Dropped:
    """What becomes of a row between two good ones, which both must be kept."""
    rows, dropped = read(jsonl(tmp_path / "data", [GOOD, row, GOOD]), **{"on_broken": "drop", **keys})
    assert [kept.where for kept in rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert len(dropped) == 1 and dropped[0].where == "rows.jsonl:2"
    return dropped[0]


# ---- messages


def test_text_becomes_messages(tmp_path: Path) -> None:
    rows, dropped = read(jsonl(tmp_path, [{**GOOD, "s": "Be terse."}]), columns={"system": "s"})
    assert dropped == []
    assert rows == [
        Row(
            id="0:1",
            where="rows.jsonl:1",
            prompt=[system("Be terse."), user("Name a colour.")],
            answers={"chosen": [assistant("Blue.")], "rejected": [assistant("A colour is blue.")]},
        )
    ]


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_an_empty_system_message_is_none(tmp_path: Path, nothing: str | None) -> None:
    folder = jsonl(tmp_path, [{**GOOD, "s": nothing}, {**GOOD, "s": "Be terse."}, GOOD])
    rows, dropped = read(folder, columns={"system": "s"})
    assert [len(row.prompt) for row in rows] == [1, 2, 1] and dropped == []


def test_message_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    prompt = [system("Be terse."), user("Hi."), assistant("Hello."), user("Name a colour.")]
    rows, _ = read(jsonl(tmp_path, [{"prompt": prompt, "chosen": [assistant("Blue.")], "rejected": "Red?"}]))
    assert rows[0].prompt == prompt
    assert rows[0].answers == {"chosen": [assistant("Blue.")], "rejected": [assistant("Red?")]}


def test_contents_in_parts_of_text_are_joined(tmp_path: Path) -> None:
    # Parquet fills what other parts have with null.
    parts: Any = [{"type": "text", "text": "Name ", "image_url": None}, {"type": "text", "text": "a colour."}]
    row = {"prompt": [user(parts)], "chosen": [user("Name a colour."), assistant("Blue.")], "rejected": [assistant([])]}
    rows, _ = read(jsonl(tmp_path, [row, {**row, "rejected": "Red?"}]), on_broken="drop")
    assert [kept.prompt for kept in rows] == [[user("Name a colour.")]]  # no part is no text: an empty answer
    assert rows[0].answers["chosen"] == [assistant("Blue.")]


def test_a_content_that_is_not_all_text_fails_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape("rows.jsonl:2: part 2 of the content of message 1 of m is of type 'im")
    ):
        read(jsonl(tmp_path, [{"m": [user("a"), assistant("b")]}, {"m": [user(PARTS_OF_AN_IMAGE), assistant("b")]}]),
             shape="answers", columns={"messages": "m"})  # fmt: skip


@pytest.mark.parametrize("with_system", [True, False])
def test_the_prompts_own_messages_are_stripped_from_answers(tmp_path: Path, with_system: bool) -> None:
    start = [system("Be terse.")] * with_system + [user("Name a colour.")]
    row = {**GOOD, "s": "Be terse.", "chosen": [*start, assistant("Blue.")], "rejected": [assistant("Red?")]}
    rows, _ = read(jsonl(tmp_path, [row]), columns={"system": "s"})
    assert rows[0].answers == {"chosen": [assistant("Blue.")], "rejected": [assistant("Red?")]}


def test_a_line_break_of_unicode_does_not_break_a_row(tmp_path: Path) -> None:
    row = json.dumps({**GOOD, "prompt": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    rows, dropped = read(jsonl(tmp_path, [row, GOOD]))
    assert [kept.where for kept in rows] == ["rows.jsonl:1", "rows.jsonl:2"] and dropped == []
    assert rows[0].prompt == [user("a\u2028b\u0085c")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    folder = jsonl(tmp_path, [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"   ", GOOD])
    rows, dropped = read(folder)
    assert [row.id for row in rows] == ["0:1", "0:4"] and dropped == []


# ---- broken, empty, identical

TEXT = {"type": "text", "text": "What is "}
PARTS_OF_AN_IMAGE: Any = [TEXT, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
BROKEN: list[tuple[Any, str]] = [
    (b'{"prompt": "Name a', "is not JSON: "),
    (b'{"prompt": "\xff"}', "is not JSON: 'utf-8' codec can't decode"),
    (b"[" * 100_000, "is not JSON: "),
    (["a", "list"], "is a list, not an object"),
    ("text", "is text, not an object"),
    (None, "is null, not an object"),
    ({"prompt": "Hi.", "chosen": "Yes."}, "has no column rejected"),
    ({**GOOD, "prompt": 7}, "prompt is a number, not text or a list of messages"),
    ({**GOOD, "chosen": {"role": "assistant", "content": "x"}}, "chosen is an object, not text or a list of messages"),
    ({**GOOD, "rejected": True}, "rejected is a truth value, not text or a list of messages"),
    ({**GOOD, "prompt": ["Hi."]}, "message 1 of prompt is text, not an object"),
    ({**GOOD, "prompt": [{"from": "human", "value": "Hi."}]}, "message 1 of prompt has no role; a message is"),
    ({**GOOD, "prompt": [{"role": "user"}]}, "message 1 of prompt has no content; a message is"),
    ({**GOOD, "prompt": [{"role": "human", "content": "Hi."}]}, "message 1 of prompt is from 'human'; roles are"),
    ({**GOOD, "prompt": [{"role": ["user"], "content": "Hi."}]}, "message 1 of prompt is from ['user']; roles are"),
    ({**GOOD, "prompt": [user("Hi."), {"role": "tool", "content": "7"}]}, "message 2 of prompt is from 'tool'"),
    ({**GOOD, "chosen": [{**assistant("x"), "tool_calls": [1]}]}, "message 1 of chosen has tool_calls, which would"),
    ({**GOOD, "prompt": [user(PARTS_OF_AN_IMAGE)]}, "part 2 of the content of message 1 of prompt is of type 'image_url'; only"),
    ({**GOOD, "chosen": [assistant([{"text": "x"}])]}, "part 1 of the content of message 1 of chosen is of no type; only"),
    ({**GOOD, "chosen": [assistant(["x"])]}, "part 1 of the content of message 1 of chosen is text, not an object"),
    ({**GOOD, "chosen": [assistant([{"type": "text"}])]}, "part 1 of the content of message 1 of chosen has no text"),
    ({**GOOD, "chosen": [assistant([{"type": "text", "text": "x", "note": "y"}])]}, "part 1 of the content of message 1 of chosen has note, which would be lost"),
    ({**GOOD, "prompt": [user("Hi."), assistant("Hello.")]}, "the prompt's last message is from assistant; it must be"),
    ({**GOOD, "prompt": [system("Be terse.")]}, "the prompt's last message is from system; it must be from user"),
    ({**GOOD, "chosen": [user("Another?"), assistant("x")]}, "chosen has a message from user; an answer is assistant"),
    ({**GOOD, "rejected": [assistant("x"), user("y")]}, "rejected has a message from user; an answer is assistant"),
    ({**GOOD, "chosen": "half \ud83d"}, "chosen holds half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says"), BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_broken(tmp_path: Path, row: Any, says: str) -> None:
    dropped = one_drop(tmp_path, row)
    assert dropped.reason == "broken" and dropped.what.startswith(says)


def test_broken_system(tmp_path: Path) -> None:
    prompt = [system("Be terse."), user("Hi.")]
    rows = [{**GOOD, "s": 3}, {**GOOD, "s": "Be kind.", "prompt": prompt}]
    kept, dropped = read(jsonl(tmp_path, rows), columns={"system": "s"}, on_broken="drop")
    assert kept == []
    assert [row.what for row in dropped] == [
        "s is a number, not text",
        "the prompt's messages have a system message, and the row has another",
    ]


@pytest.mark.parametrize("role", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("nothing", [None, "", " \n\t", [], [{"role": "assistant", "content": None}]])
def test_empty(tmp_path: Path, role: str, nothing: Any) -> None:
    if role == "prompt" and nothing:
        nothing = [user(" ")]
    dropped = one_drop(tmp_path, {**GOOD, role: nothing})
    assert dropped == Dropped("empty", "rows.jsonl:2", f"{role} is empty, or has an empty message")


def test_an_answer_that_is_only_the_prompt_is_empty(tmp_path: Path) -> None:
    assert one_drop(tmp_path, {**GOOD, "chosen": [user("Name a colour.")]}).reason == "empty"


def test_identical_pair(tmp_path: Path) -> None:
    dropped = one_drop(tmp_path, {**GOOD, "chosen": "Blue.\n", "rejected": [assistant(" Blue.")]})
    assert dropped == Dropped("identical_pair", "rows.jsonl:2", "chosen and rejected are both 'Blue.'")


def test_broken_rows_fail_by_default_and_the_first_ten_are_listed(tmp_path: Path) -> None:
    folder = jsonl(tmp_path, [GOOD, *[{**GOOD, "prompt": number} for number in range(12)]])
    lines = [f"  rows.jsonl:{line}: prompt is a number, not text or a list of messages" for line in range(2, 12)]
    with pytest.raises(DataError) as error:
        read(folder)
    assert str(error.value).splitlines() == [
        "12 broken rows:",
        *lines,
        "  and 2 more",
        "Mend the data, or write `on_broken: drop` under `data` to drop such rows and count them.",
    ]


# ---- filters


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ({"in": ["a", 2]}, [1, 3]),
        ({"not_in": ["a"]}, [2, 3, 4, 5, 6]),
        ({"in": [1]}, [2]),  # and not true, which equals 1 in Python
        ({"in": [True]}, [5]),
    ],
)
def test_filter_by_value(tmp_path: Path, conditions: dict[str, Any], kept: list[int]) -> None:
    rows = [{**GOOD, "k": value} for value in ("a", 1, 2, None, True)] + [GOOD]
    found, dropped = read(jsonl(tmp_path, rows), filters=[{"column": "k", **conditions}])
    assert [int(row.id[2:]) for row in found] == kept
    assert {row.reason for row in dropped} == {"filtered"} and len(dropped) == 6 - len(kept)


def test_filter_by_number_keeps_the_bounds(tmp_path: Path) -> None:
    values = [0.5, 1, 2.5, 3, 3.5, None, float("nan")]
    folder = jsonl(tmp_path, [{**GOOD, "k": value} for value in values])
    found, dropped = read(folder, filters=[{"column": "k", "min": 1, "max": 3}])
    assert [row.id for row in found] == ["0:2", "0:3", "0:4"]
    assert [row.what for row in dropped] == [
        "k is 0.5, min is 1", "k is 3.5, max is 3", "k is null, min is 1", "k is nan, min is 1",
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["high", True, [1]])
def test_a_filtered_column_of_the_wrong_type_is_broken(tmp_path: Path, value: Any) -> None:
    rows = [{**GOOD, "k": 5}, {**GOOD, "k": value}]
    _, dropped = read(jsonl(tmp_path, rows), filters=[{"column": "k", "min": 1}], on_broken="drop")
    assert [(row.where, row.reason) for row in dropped] == [("rows.jsonl:2", "broken")]


def test_a_filtered_row_may_be_broken(tmp_path: Path) -> None:
    rows = [{**GOOD, "k": "good"}, {**GOOD, "prompt": 7, "k": "bad"}]
    kept, dropped = read(jsonl(tmp_path, rows), filters=[{"column": "k", "in": ["good"]}])
    assert len(kept) == 1 and [row.reason for row in dropped] == ["filtered"]


# ---- columns


def test_unused_columns_are_named(tmp_path: Path) -> None:
    folder = jsonl(tmp_path, [GOOD, {**GOOD, "kind": 1, "the judge": 2}])
    with pytest.raises(DataError) as error:
        read(folder)
    assert str(error.value) == (
        'rows.jsonl: columns kind, "the judge" would be used nowhere. '
        'Write `ignore: [kind, "the judge"]` under `data`, or map them under `columns`'
    )
    assert len(read(folder, ignore=["kind", "the judge"])[0]) == 2
    assert len(read(folder, ignore=["the judge"], filters=[{"column": "kind", "not_in": [1]}])[0]) == 1


def test_an_unmapped_system_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape("`columns: {system: system}` makes it the system message")):
        read(jsonl(tmp_path, [{**GOOD, "system": "Be terse."}]))


def test_orca_columns_get_a_hint(tmp_path: Path) -> None:
    row = {"system": "Be terse.", "question": "Name a colour.", "chosen": "Blue.", "rejected": "Red?"}
    with pytest.raises(DataError) as error:
        read(jsonl(tmp_path, [row]))
    missing, unused = str(error.value).splitlines()
    assert missing == (
        "rows.jsonl: data.columns.prompt: no row has a column prompt; there are system, question, chosen, rejected. "
        "The prompt seems to be in question: write `prompt: question` under `columns`"
    )
    assert unused.startswith("rows.jsonl: column system would be used nowhere.")


def test_missing_columns_get_close_matches(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"columns": {"system": "sistem", "chosen": "choosen"}, "ignore": ["kindd"]}
    keys["filters"] = [{"column": "scor", "min": 1}]
    with pytest.raises(DataError) as error:
        read(jsonl(tmp_path, [{**GOOD, "system": "x", "kind": 1, "score": 2}]), **keys)
    problems = str(error.value).splitlines()
    assert [line.partition(": no row has a column ")[0] for line in problems[:4]] == [
        "rows.jsonl: data.columns.chosen", "data.columns.system", "data.filters[0].column", "data.ignore",
    ]  # fmt: skip
    assert [line.rpartition(". ")[2] for line in problems[:4]] == [
        "Did you mean chosen?", "Did you mean system?", "Did you mean score?", "Did you mean kind?",
    ]  # fmt: skip


def test_each_source_must_have_the_mapped_columns(tmp_path: Path) -> None:
    folders = [jsonl(tmp_path / "one", [GOOD]), jsonl(tmp_path / "two", [{"chosen": "x", "rejected": "y"}])]
    with pytest.raises(DataError, match=r"^two/rows\.jsonl: data\.columns\.prompt: no row has a column prompt"):
        read_rows(settings(on_broken="drop"), folders)


def test_alpaca_judge_columns_must_be_ignored(real_data: Path, tmp_path: Path) -> None:
    text = (real_data / "preference/alpaca_eval_789.jsonl").read_bytes()
    (tmp_path / "alpaca.jsonl").write_bytes(text)
    unused = ["chosen_model", "rejected_model", "preference", "judge", "subset"]
    with pytest.raises(DataError, match=re.escape(f"Write `ignore: [{', '.join(unused)}]` under `data`")):
        read(tmp_path)
    rows, dropped = read(tmp_path, ignore=unused)
    assert len(rows) + len(dropped) == 789


def test_columns_are_not_judged_by_broken_rows(tmp_path: Path) -> None:
    check_columns(settings(), [read_source(0, jsonl(tmp_path, [b"{", ["a"]]), several=False)])


# ---- file formats

ROWS = [
    {"prompt": 'Say "a", then\nb.', "chosen": "é\u2028ü", "rejected": "a", "score": 3.5, "s": "x"},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "score": 2, "s": ""},
    {"prompt": "", "chosen": "4", "rejected": "5", "score": 4, "s": ""},
    {"prompt": "Low.", "chosen": "4", "rejected": "5", "score": 1, "s": ""},
]


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize("form", ["json", "json data", "parquet", "csv"])
def test_every_format_gives_the_rows_of_jsonl(tmp_path: Path, form: str) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / form
    folder.mkdir()
    if form == "json":
        (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    elif form == "json data":
        (folder / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    else:
        write_csv(folder / "rows.csv", [list(ROWS[0]), *[list(row.values()) for row in ROWS]])
    keys: dict[str, Any] = {"columns": {"system": "s"}, "filters": [{"column": "score", "min": 2, "not_in": [7]}]}
    expected, expected_drops = read(jsonl(tmp_path / "lines", ROWS), **keys)
    found, drops = read(folder, **keys)

    def bare(rows: list[Row]) -> list[Any]:
        return [(row.prompt, row.answers) for row in rows]

    assert len(expected) == 2 and bare(found) == bare(expected)
    assert [drop.reason for drop in drops] == [drop.reason for drop in expected_drops] == ["empty", "filtered"]


def test_parquet_messages_are_those_of_jsonl(real_data: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text = (real_data / "preference/conversational_299.jsonl").read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/rows.jsonl").write_bytes(text)
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet/rows.parquet")
    lines, parquet = read(tmp_path / "lines"), read(tmp_path / "parquet")
    assert [row.id for row in lines[0]] == [row.id for row in parquet[0]]
    assert [row.prompt for row in lines[0]] == [row.prompt for row in parquet[0]]
    assert len(lines[0]) + len(lines[1]) == 299


def test_parquet_fills_missing_keys_of_messages_with_null(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**GOOD, "prompt": [{"role": "user", "content": "Hi.", "name": None}]}]
    schema = pyarrow.schema(
        [
            ("prompt", pyarrow.list_(pyarrow.struct([(key, pyarrow.string()) for key in ("role", "content", "name")]))),
            ("chosen", pyarrow.string()),
            ("rejected", pyarrow.string()),
        ]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    assert read(tmp_path)[0][0].prompt == [user("Hi.")]


def test_csv_counts_lines_and_cells(tmp_path: Path) -> None:
    text = 'prompt,chosen,rejected\n"two\nlines",a,b\n\nshort,a\nlast,a,b\n'
    (tmp_path / "rows.csv").write_text(text)
    rows, dropped = read(tmp_path, on_broken="drop")
    assert [row.where for row in rows] == ["rows.csv:2", "rows.csv:6"]
    assert dropped == [Dropped("broken", "rows.csv:5", "has 2 cells, the header has 3")]


def test_csv_messages_are_not_trained_on_as_text(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "rows.csv", [["prompt", "chosen", "rejected"], [str([user("Hi.")]), "a", "b"], ["Hi.", "a", "b"]]
    )
    rows, dropped = read(tmp_path, on_broken="drop")
    assert len(rows) == 1
    assert dropped[0].what == "prompt holds messages written as text; give such data as JSONL or Parquet"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.csv", 'prompt,chosen,rejected\na,b,c\n"open,b,c\nd,e,f\n', r"^rows\.csv:3: is not CSV from here on: "),
        ("rows.csv", "prompt,prompt,rejected\n", r"^rows\.csv:1: a column's name comes twice in prompt, prompt"),
        ("rows.json", '{"a": 1}\n{"a": 2}\n', r"^rows\.json: is not JSON: .* name it \.jsonl$"),
        ("rows.json", '{"rows": []}', r'^rows\.json: is neither a list of objects nor {"data": \[\.\.\.\]}$'),
        ("rows.parquet", "PAR1", r"^rows\.parquet: is not Parquet that can be read: "),
        ("rows.jsonl.gz", "", r"rows\.jsonl\.gz: is not read; rows come in \.jsonl, \.json, \.parquet, \.csv\. Give"),
        ("rows.jsonl", "\n", r": holds no rows; check `path`"),
        ("README.md", "", r": holds no file of rows"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        read(tmp_path, on_broken="drop")


def test_several_files_and_sources_keep_their_order_and_ids_differ(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one", [GOOD, GOOD], "b.jsonl")
    jsonl(one, [GOOD], "a.jsonl")
    (one / "README.md").write_text("about the rows")
    (one / "manifest.json").write_text("{}")
    rows, _ = read_rows(settings(), [one, jsonl(tmp_path / "two", [GOOD])])
    assert [row.id for row in rows] == ["0:a.jsonl:1", "0:b.jsonl:1", "0:b.jsonl:2", "1:1"]
    assert [row.where for row in rows][::3] == ["one/a.jsonl:1", "two/rows.jsonl:1"]


# ---- other shapes than pairs

ANSWER = {"prompt": "Name a colour.", "completion": "Blue."}
TALK = [user("Hi."), assistant("Hello."), user("Name a colour."), assistant("Blue."), assistant("Or red.")]


def test_an_answer_is_prompt_and_completion(tmp_path: Path) -> None:
    rows, dropped = read(jsonl(tmp_path, [{**ANSWER, "s": "Be terse."}]), shape="answers", columns={"system": "s"})
    prompt = [system("Be terse."), user("Name a colour.")]
    assert dropped == []
    assert rows == [
        Row(id="0:1", where="rows.jsonl:1", prompt=prompt, answers={"completion": [assistant("Blue.")]}),
    ]


@pytest.mark.parametrize("shape", ["answers", "labelled", "prompts"])
def test_a_conversation_is_split_before_its_last_answer(tmp_path: Path, shape: str) -> None:
    folder = jsonl(tmp_path, [{"m": TALK, "s": "Be terse.", "label": True}])
    ignore = [] if shape == "labelled" else ["label"]
    rows, _ = read(folder, shape=shape, columns={"messages": "m", "system": "s"}, ignore=ignore)
    assert rows[0].prompt == [system("Be terse."), *TALK[:3]]
    assert rows[0].answers == ({} if shape == "prompts" else {"completion": TALK[3:]})


def test_a_prompts_conversation_may_end_in_a_question(tmp_path: Path) -> None:
    rows, _ = read(jsonl(tmp_path, [{"m": TALK[:3]}]), shape="prompts", columns={"messages": "m"})
    assert rows[0].prompt == TALK[:3]


@pytest.mark.parametrize(
    ("messages", "reason", "what"),
    [
        (TALK[:3], "broken", "the last message of m is from user; it must be the answer"),
        ("Hi.", "broken", "m is text, not a list of messages"),
        (7, "broken", "m is a number, not text or a list of messages"),
        ([system("Be terse."), assistant("Blue.")], "broken", "the prompt's last message is from system; it must be"),
        ([user("Hi."), {"role": "tool", "content": "x"}], "broken", "message 2 of m is from 'tool'; roles are"),
        (None, "empty", "m is empty, or has an empty message"),
        ([], "empty", "m is empty, or has an empty message"),
        ([assistant("Blue.")], "empty", "m is empty, or has an empty message"),
        ([user("Hi."), assistant(" ")], "empty", "m is empty, or has an empty message"),
        ([user(" "), assistant("Blue.")], "empty", "m is empty, or has an empty message"),
    ],
)
def test_a_conversation_that_is_no_answer(tmp_path: Path, messages: Any, reason: str, what: str) -> None:
    rows = [{"m": TALK}, {"m": messages}]
    kept, dropped = read(jsonl(tmp_path, rows), shape="answers", columns={"messages": "m"}, on_broken="drop")
    assert len(kept) == 1 and (dropped[0].reason, dropped[0].where) == (reason, "rows.jsonl:2")
    assert dropped[0].what.startswith(what)


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False)])
def test_a_label_is_true_or_false(tmp_path: Path, label: Any, good: bool) -> None:
    rows, _ = read(jsonl(tmp_path, [{**ANSWER, "label": label}]), shape="labelled")
    assert rows[0].label is good


@pytest.mark.parametrize(
    ("label", "shown"),
    [(None, "null"), ("true", "'true'"), ("1", "'1'"), (2, "2"), (-1, "-1"), (1.0, "1.0"), ([], "[]"), ("", "''")],
)
def test_what_is_no_label_is_broken(tmp_path: Path, label: Any, shown: str) -> None:
    rows = [{**ANSWER, "label": True}, {**ANSWER, "label": label}]
    kept, dropped = read(jsonl(tmp_path, rows), shape="labelled", on_broken="drop")
    assert [row.label for row in kept] == [True]
    assert dropped == [Dropped("broken", "rows.jsonl:2", f"label is {shown}, not true or false")]


def test_labels_of_csv_are_text(tmp_path: Path) -> None:
    said = ["true", "False", " TRUE ", "1", "0", "yes", "", "1.0", "null"]
    write_csv(
        tmp_path / "rows.csv", [["prompt", "completion", "good"], *[["Hi.", f"{n}", x] for n, x in enumerate(said)]]
    )
    kept, dropped = read(tmp_path, shape="labelled", columns={"label": "good"}, on_broken="drop")
    assert [row.label for row in kept] == [True, False, True, True, False]
    assert [drop.what for drop in dropped] == [f"good is '{x}', not true or false" for x in said[5:]]


def test_a_row_keeps_what_rewards_read(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2?", "answer": "4", "tests": [{"a": None}]}, {"prompt": "3?", "answer": None, "tests": 1.5}]
    kept, dropped = read(jsonl(tmp_path, rows), shape="prompts", keep=["answer", "tests"])
    assert [row.columns for row in kept] == [{"answer": "4", "tests": [{"a": None}]}, {"answer": None, "tests": 1.5}]
    assert dropped == [] and kept[0].answers == {}


def test_what_json_can_not_hold_is_not_handed_to_a_reward(tmp_path: Path) -> None:
    rows = [b'{"prompt": "a", "x": NaN}', b'{"prompt": "b", "x": "\\ud83d"}', {"prompt": "c", "x": 1}, {"prompt": "d"}]
    kept, dropped = read(jsonl(tmp_path, rows), shape="prompts", keep=["x"], on_broken="drop")
    assert [row.prompt[0]["content"] for row in kept] == ["c"]
    assert [drop.what for drop in dropped] == [
        "x is a number that JSON can't hold", "x is text that JSON can't hold", "has no column x",
    ]  # fmt: skip


def columns_error(tmp_path: Path, row: dict[str, Any], **keys: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        read(jsonl(tmp_path, [row]), **keys)
    return str(error.value).splitlines()


def test_a_column_that_a_reward_reads_must_be_there(tmp_path: Path) -> None:
    assert columns_error(
        tmp_path, {"prompt": "a", "answr": "4"}, shape="prompts", keep=["answer"], ignore=["answr"]
    ) == ["rows.jsonl: train.rewards: no row has a column answer; there are prompt, answr. Did you mean answr?"]


def test_a_conversation_is_hinted_at_once(tmp_path: Path) -> None:
    assert columns_error(tmp_path, {"messages": TALK, "good": True}, shape="labelled") == [
        "rows.jsonl: data.columns.prompt: no row has a column prompt; there are messages, good. If messages holds whole "
        "conversations, write `messages: messages` under `columns`",
        "rows.jsonl: data.columns.label: no row has a column label; there are messages, good.",
        "rows.jsonl: column good would be used nowhere. Write `ignore: [good]` under `data`, or map them under `columns`",
    ]


def test_the_usual_names_of_an_answer_are_hinted(tmp_path: Path) -> None:
    assert columns_error(tmp_path, {"prompt": "a", "response": "b"}, shape="answers") == [
        "rows.jsonl: data.columns.completion: no row has a column completion; there are prompt, response. The completion "
        "seems to be in response: write `completion: response` under `columns`"
    ]


@pytest.mark.parametrize("shape", PARTS)
def test_no_row_of_any_shape_is_lost(tmp_path: Path, shape: str) -> None:
    values = [None, "", "x", 3, 0, True, [], {}, TALK, TALK[:3], [user("Hi.")], [{"role": "user"}], "\ud83d"]
    names = ["prompt", "chosen", "rejected", "completion", "label", "answer"]
    noise = random.Random(shape)
    rows = [{name: noise.choice(values) for name in names if noise.random() < 0.9} for _ in range(400)]
    rows.append({"prompt": "x", "chosen": "x", "rejected": "y", "completion": "x", "label": 1, "answer": 1})
    folder = jsonl(tmp_path, [*rows, b"{", b"[]"])
    keep = ["answer"] if shape == "prompts" else []
    used = {*PARTS[shape], *keep, *(["label"] if shape == "labelled" else [])}
    ignore = [name for name in names if name not in used]
    kept, dropped = read(folder, shape=shape, keep=keep, ignore=ignore, on_broken="drop")
    lines = [int(row.where.partition(":")[2]) for row in (*kept, *dropped)]
    assert sorted(lines) == list(range(1, 404))
    assert {drop.reason for drop in dropped} <= set(reasons(shape))
    for row in kept:
        assert tuple(row.answers) == PARTS[shape][1:] and row.prompt[-1]["role"] == "user"
        assert all(m["role"] == "assistant" for messages in row.answers.values() for m in messages)
        assert (row.label is not None) == (shape == "labelled") and set(row.columns) == set(keep)
    assert kept


# ---- formats


def hh(*turns: str) -> str:
    """A transcript as hh-rlhf has it, the human first."""
    return "".join(f"\n\n{who}: {text}" for who, text in zip(["Human", "Assistant"] * len(turns), turns, strict=False))


def one_row(tmp_path: Path, row: dict[str, Any], **keys: Any) -> Row:
    rows, dropped = read(jsonl(tmp_path, [row]), **keys)
    assert dropped == [] and len(rows) == 1
    return rows[0]


HELLO = [user("Hi."), assistant("Hello."), user("Name a\n\ncolour.")]


def test_hh_transcripts_share_their_prompt(tmp_path: Path) -> None:
    start = ("Hi.", "Hello.", "Name a\n\ncolour.")
    row = one_row(tmp_path, {"chosen": hh(*start, "Blue."), "rejected": hh(*start, "Human: no.")}, format="hh")
    assert row.prompt == HELLO
    assert row.answers == {"chosen": [assistant("Blue.")], "rejected": [assistant("Human: no.")]}


@pytest.mark.parametrize("shape", ["answers", "prompts"])
def test_an_hh_transcript_is_a_conversation(tmp_path: Path, shape: str) -> None:
    text = {"chosen": hh("Hi.", "Hello.", "Name a\n\ncolour.", "Blue."), "rejected": "x"}
    row = one_row(tmp_path, text, shape=shape, format="hh", columns={"messages": "chosen"}, ignore=["rejected"])
    assert row.prompt == HELLO
    assert row.answers == ({"completion": [assistant("Blue.")]} if shape == "answers" else {})


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "what"),
    [
        ("Name a colour.", hh("Hi.", "Red."), "broken", "chosen is no transcript: it does not begin with"),
        ("Well. " + hh("Hi.", "a"), hh("Hi.", "Red."), "broken", "chosen is no transcript"),
        (hh("Hi.", "a"), hh("Ho.", "b"), "broken", "chosen and rejected differ before their last message"),
        (hh("Hi.", "a", "Ho."), hh("Hi.", "a", "Hm."), "broken", "the prompt's last message is from assistant"),
        (hh("Hi."), hh("Ho."), "broken", "chosen has a message from user"),
        (hh("Hi.", "a"), hh("Hi.", " a "), "identical_pair", "chosen and rejected are both 'a'"),
        (hh("Hi.", ""), hh("Hi.", "b"), "empty", "chosen is empty"),
        (None, hh("Hi.", "b"), "broken", "chosen and rejected differ"),
        (7, hh("Hi.", "b"), "broken", "chosen is a number"),
    ],
)
def test_what_is_no_pair_of_transcripts(tmp_path: Path, chosen: Any, rejected: Any, reason: str, what: str) -> None:
    rows = [{"chosen": hh("Hi.", "a"), "rejected": hh("Hi.", "b")}, {"chosen": chosen, "rejected": rejected}]
    kept, dropped = read(jsonl(tmp_path, rows), format="hh", on_broken="drop")
    assert len(kept) == 1 and dropped[0].reason == reason and dropped[0].what.startswith(what)


SHAREGPT = [
    {"from": "system", "value": "Be terse."},
    {"from": "human", "value": "Hi."},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "Name a colour."},
]


def test_sharegpt_conversations(tmp_path: Path) -> None:
    talk = [system("Be terse."), user("Hi."), assistant("Hello."), user("Name a colour.")]
    blue, red = {"from": "gpt", "value": "Blue."}, {"from": "gpt", "value": "Red."}
    row = one_row(tmp_path / "answers", {"conversations": [*SHAREGPT, blue]}, shape="answers", format="sharegpt")
    assert (row.prompt, row.answers) == (talk, {"completion": [assistant("Blue.")]})
    pair = {"conversations": SHAREGPT, "chosen": blue, "rejected": [red]}
    row = one_row(tmp_path / "pairs", pair, format="sharegpt")
    assert (row.prompt, row.answers) == (talk, {"chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]})
    row = one_row(
        tmp_path / "c",
        {"c": [*SHAREGPT, blue], "label": 1},
        shape="labelled",
        format="sharegpt",
        columns={"messages": "c"},
    )
    assert row.prompt == talk and row.label is True


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"from": "function_call", "value": "x"}, "message 1 of conversations is from 'function_call'; roles are"),
        ({"role": "user", "content": "Hi."}, "conversations has a message without from or value"),
        ({"from": "human", "value": "Hi.", "weight": 1}, "message 1 of conversations has weight, which would be lost"),
        ({"from": ["human"], "value": "Hi."}, "message 1 of conversations is from ['human']; roles are"),
        ("Hi.", "message 1 of conversations is text, not an object"),
    ],
)
def test_what_is_no_sharegpt_message_is_broken(tmp_path: Path, message: Any, what: str) -> None:
    rows = [{"conversations": [message, {"from": "gpt", "value": "Blue."}]}]
    _, dropped = read(jsonl(tmp_path, rows), shape="answers", format="sharegpt", on_broken="drop")
    assert dropped[0].reason == "broken" and dropped[0].what.startswith(what)


def test_openai_preferences(tmp_path: Path) -> None:
    talk = {"messages": HELLO, "tools": [], "parallel_tool_calls": True}
    data = {"input": talk, "preferred_output": [assistant("Blue.")], "non_preferred_output": [assistant("Red.")]}
    row = one_row(tmp_path / "a", data, format="openai")
    assert (row.prompt, row.answers) == (HELLO, {"chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]})
    for given, what in (
        ({"messages": HELLO, "tools": [{}]}, "input has tools, which would be lost"),
        ({"prompt": "Hi."}, "input has no messages; format: openai has {messages: [...]}"),
    ):
        _, dropped = read(jsonl(tmp_path / "b", [{**data, "input": given}]), format="openai", on_broken="drop")
        assert dropped == [Dropped("broken", "rows.jsonl:1", what)]
    other = {"talk": talk, "chosen": "Blue.", "non_preferred_output": "Red."}
    columns = {"prompt": "talk", "chosen": "chosen"}
    assert one_row(tmp_path / "c", other, format="openai", columns=columns).prompt == HELLO
