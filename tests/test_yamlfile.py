"""YAML is read strictly, and written so that every parser reads the same."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from prefbuild.errors import RecipeError
from prefbuild.yamlfile import MAX_BYTES, MAX_DEPTH, Document, dotted, dump, load, looks_secret, show, show_path

X = Path("x.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(X, text)
    return caught.value.problems


# ---- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, None) for word in ("", "~", "null", "Null", "NULL")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *(("5e-5", 5e-5), ("1e-5", 1e-5), ("1E5", 1e5), ("1.e+3", 1e3), (".5", 0.5), ("-1.5", -1.5), ("0.0", 0.0)),
        *(("0o17", 15), ("0x1F", 31), ("017", 17), ("-3", -3), ("+3", 3), ("9223372036854775807", 2**63 - 1)),
        *((".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf)),
        *((word, word) for word in ("on", "off", "yes", "no", "y", "n", "On", "YES")),
        *((word, word) for word in ("12:30:45", "12:30", "2024-01-01", "2024-01-01T00:00:00Z", "0b11", "1_000", "=")),
        *((word, word) for word in ("nulL", "tRue", "1e", ".", "-.", "inf", "nan", "e5", "0o8", "-0x1", "1.2.3")),
        *(
            ("'5'", "5"),
            ('"true"', "true"),
            ("'null'", "null"),
            ('"\\u00e9"', "é"),
            ("|\n  5\n", "5\n"),
            ("é ü", "é ü"),
        ),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    found = load(X, f"key: {text}\n").data["key"]
    assert (type(found), found) == (type(value), value)


def test_nan_is_a_number() -> None:
    assert math.isnan(load(X, "key: .nan\n").data["key"])


def test_words_of_yaml_1_1_are_keys_as_written() -> None:
    assert load(X, "on: 1\nno: 2\n2024-01-01: 3\n").data == {"on": 1, "no": 2, "2024-01-01": 3}


def test_lists_and_mappings_nest_in_block_and_flow() -> None:
    assert load(X, "a:\n  - b: 1\n    c: [x, {d: }]\n  - []\ne: {}\n").data == {
        "a": [{"b": 1, "c": ["x", {"d": None}]}, []],
        "e": {},
    }


# ---- lines


def test_every_key_and_item_has_its_line() -> None:
    document = load(
        X, "# comment\n\na:\n  b: 1\n  c:\n    - x\n    - d: 1\n      e: |\n        two\n        lines\nf: [1,\n  2]\n"
    )
    assert document.lines == {
        (): 1,
        ("a",): 3,
        ("a", "b"): 4,
        ("a", "c"): 5,
        ("a", "c", 0): 6,
        ("a", "c", 1): 7,
        ("a", "c", 1, "d"): 7,
        ("a", "c", 1, "e"): 8,
        ("f",): 11,
        ("f", 0): 11,
        ("f", 1): 12,
    }


def test_where_falls_back_to_the_nearest_key_around() -> None:
    document = load(X, "\na:\n  b: 1\n")
    assert document.where(("a", "b")) == "x.yaml:3"
    assert document.where(("a", "missing", 0)) == "x.yaml:2"
    assert document.where(("missing",)) == "x.yaml:1"


def test_windows_line_ends_count_once() -> None:
    assert load(X, "a: 1\r\nb: 2\r\n").lines[("b",)] == 2


def test_a_document_is_frozen() -> None:
    with pytest.raises(AttributeError):
        load(X, "a: 1\n").path = Path("y")  # type: ignore[misc]


# ---- what is refused, whole messages

REFUSED = {
    "twice": ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a: written twice, first on line 1; keep one"),
    "twice below": ("a:\n- b: 1\n  b: 2\n", "x.yaml:3: a[0].b: written twice, first on line 2; keep one"),
    "twice in flow": ("{a: 1, 'a': 2}", "x.yaml:1: a: written twice, first on line 1; keep one"),
    "anchor": ("a: &x 1\n", "x.yaml:1: a: an anchor (&x); remove it, and write values out"),
    "anchored key": ("&x a: 1\n", "x.yaml:1: an anchor (&x); remove it, and write values out"),
    "alias": ("a: *x\n", "x.yaml:1: a: an alias (*x); write the value out"),
    "merge key": ("a: {<<: {b: 1}}\n", "x.yaml:1: a: a merge key (<<); write the keys out"),
    "python tag": (
        "a: !!python/object/apply:os.system [x]\n",
        "x.yaml:1: a: a tag (!!python/object/apply:os.system); remove it, values are plain YAML",
    ),
    "own tag": ("a: !function x.y\n", "x.yaml:1: a: a tag (!function); remove it, values are plain YAML"),
    "standard tag": ("a: !!str 5\n", "x.yaml:1: a: a tag (!!str); remove it, values are plain YAML"),
    "bare tag": ("a: ! 5\n", "x.yaml:1: a: a tag (!); remove it, values are plain YAML"),
    "tag at the top": ("!x\na: 1\n", "x.yaml:1: a tag (!x); remove it, values are plain YAML"),
    "tag handle": (
        "a: !x!y 1\n",
        "x.yaml:1: not YAML (found undefined tag handle '!x!'); check quotes and indentation",
    ),
    "documents": ("a: 1\n---\nb: 1\n", "x.yaml:2: a second document begins; keep one, without '---' between"),
    "directive": ("%YAML 1.1\n---\na: 1\n", "x.yaml:1: directives (%YAML, %TAG) are not used here; remove the line"),
    "number as key": ("1: 2\n", "x.yaml:1: a key that is the number 1; a key is text, in quotes if need be"),
    "bool as key": ("a:\n  true: 2\n", "x.yaml:2: a: a key that is true; a key is text, in quotes if need be"),
    "null as key": ("~: 2\n", "x.yaml:1: a key that is empty; a key is text, in quotes if need be"),
    "list as key": ("? [a]\n: 2\n", "x.yaml:1: a key that is a list; a key is text, in quotes if need be"),
    "tab": ("a:\n\tb: 1\n", "x.yaml:2: a tab where only spaces may be; indent with spaces"),
    "bracket at the end": ("a: 1\nb: [1,\nc: 2\n", "x.yaml:2: a '[' that is not closed; close it"),
    "bracket alone": ("a: 1\nb: [{\n", "x.yaml:2: a '{' that is not closed; close it"),
    "bracket": ("a: [1\nb: 2\n", "x.yaml:2: a '[' of line 1 that is not closed, or a comma is missing; close it"),
    "brace": ("a: {b: 1\nc: 2\n", "x.yaml:2: a '{' of line 1 that is not closed, or a comma is missing; close it"),
    "quote": ("a: 1\nb: 'x\nc: 1\n", "x.yaml:2: a quote that is not closed; close it"),
    "quote inside": (
        "a: 'it's'\n",
        "x.yaml:1: text after the end of a value; put the whole value in one pair of quotes",
    ),
    "escape": (
        'a: "\\d"\n',
        "x.yaml:1: a backslash in double quotes that YAML does not know; use single quotes",
    ),
    "colons": (
        "a: b: c\n",
        "x.yaml:1: a ':' where none may be; check the indentation, or put the text in quotes",
    ),
    "no colon": (
        "a: 1\nb\n",
        "x.yaml:2: a line without 'key: value'; a ':' and a space are wanted after a key",
    ),
    "dedent": (
        "a:\n  b: 1\n c: 2\n",
        "x.yaml:3: indentation that differs from the lines before; align the keys of a section",
    ),
    "at sign": ("a: @x\n", "x.yaml:1: a value that begins with @; put text that does in quotes"),
    "star": ("a: **x**\n", "x.yaml:1: a value that begins with *; put text that does in quotes"),
    "stray bracket": ("a: ]\n", "x.yaml:1: a value that begins with ]; put text that does in quotes"),
    "conflict": (
        "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n",
        "x.yaml:2: a line without 'key: value'; a ':' and a space are wanted after a key (merge conflict?)",
    ),
    "control character": ("a: 1\nb: \x07\n", "x.yaml:2: a character that YAML does not allow (\\x07); remove it"),
    "nul": ("a: \0\n", "x.yaml:1: a character that YAML does not allow (\\x00); remove it"),
    "no such character": (
        'a: 1\nb: "\\UFFFFFFFF"\n',
        "x.yaml:2: an escape that is no character; use \\u and four hex digits",
    ),
    "character past the last": (
        'a: "\\U00110000"\n',
        "x.yaml:1: an escape that is no character; use \\u and four hex digits",
    ),
    "half a character": (
        'a: "\\ud83d"\n',
        "x.yaml:1: a: half a character (\\ud800 to \\udfff); write the character itself",
    ),
    "large number": (
        "a: 9223372036854775808\n",
        "x.yaml:1: a: a number of more than 64 bits; write it in quotes if it is text",
    ),
    "very large number": (
        f"a: {'9' * 10_000}\n",
        "x.yaml:1: a: a number of more than 64 bits; write it in quotes if it is text",
    ),
    "empty": ("", "x.yaml:1: is empty; a mapping of keys is wanted"),
    "comments": ("# a\n", "x.yaml:1: is empty; a mapping of keys is wanted"),
    "list at the top": ("- a\n", "x.yaml:1: is a list at the top; a mapping of keys is wanted"),
    "text at the top": ("hello\n", "x.yaml:1: is text 'hello' at the top; a mapping of keys is wanted"),
    "size": (f"a: {'x' * MAX_BYTES}\n", "x.yaml:1: is larger than 1,000,000 bytes; keep data in files of its own"),
    "brackets": ("a: " + "[" * 20_000, "x.yaml:1: is nested more than 40 deep; no key is"),
    "braces": ("{a: " * 20_000, "x.yaml:1: is nested more than 40 deep; no key is"),
    "dashes": ("- " * 20_000, "x.yaml:1: is nested more than 40 deep; no key is"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused_with_line_and_remedy(text: str, message: str) -> None:
    start = time.monotonic()
    assert problems(text) == [message]
    assert time.monotonic() - start < 3


def test_all_problems_come_at_once() -> None:
    text = "a: &x 1\nb: *x\nc: !y 2\na: 2\n3: 4\nd: [\n"
    assert problems(text) == [
        "x.yaml:1: a: an anchor (&x); remove it, and write values out",
        "x.yaml:2: b: an alias (*x); write the value out",
        "x.yaml:3: c: a tag (!y); remove it, values are plain YAML",
        "x.yaml:4: a: written twice, first on line 1; keep one",
        "x.yaml:5: a key that is the number 3; a key is text, in quotes if need be",
        "x.yaml:6: a '[' that is not closed; close it",
    ]


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor() -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert problems(text)[0] == "x.yaml:1: a0: an anchor (&a0); remove it, and write values out"


def test_nesting_up_to_the_limit_is_read() -> None:
    depth = MAX_DEPTH - 1  # the top is one
    assert load(X, "a: " + "[" * depth + "]" * depth).data
    assert problems("a: " + "[" * (depth + 1) + "]" * (depth + 1)) == [
        "x.yaml:1: is nested more than 40 deep; no key is"
    ]


def test_a_marker_of_a_conflict_in_a_block_is_text() -> None:
    assert load(X, "a: |\n  <<<<<<< HEAD\n  =======\n").data == {"a": "<<<<<<< HEAD\n=======\n"}


# ---- files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused_file(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path)
    return str(caught.value)


def test_a_file_is_read_with_or_without_a_byte_order_mark(folder: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        X.write_bytes(mark + "a: é\n".encode())
        assert load(X) == Document(X, {"a": "é"}, {(): 1, ("a",): 1})


def test_other_encodings_are_refused(folder: Path) -> None:
    X.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    assert refused_file(X) == "x.yaml:2: is not UTF-8 (byte 0xe9); save it as UTF-8"
    X.write_bytes("a: 1\n".encode("utf-16"))
    assert refused_file(X) == "x.yaml:1: is UTF-16; save it as UTF-8"


def test_files_that_cannot_be_read_are_refused(folder: Path) -> None:
    assert refused_file(X) == "x.yaml:1: is not there; a YAML file is wanted"
    os.mkfifo("pipe.yaml")
    assert refused_file(Path("pipe.yaml")) == "pipe.yaml:1: is not a plain file; a YAML file is wanted"
    Path("folder.yaml").mkdir()
    assert refused_file(Path("folder.yaml")) == "folder.yaml:1: is not a plain file; a YAML file is wanted"
    Path("loop.yaml").symlink_to("loop.yaml")
    assert refused_file(Path("loop.yaml")).startswith("loop.yaml:1: cannot be read (")
    assert refused_file(Path("a\0b")).startswith("a\\x00b:1: cannot be read (")


def test_a_file_that_is_too_large_is_not_read_whole(folder: Path) -> None:
    with X.open("wb") as file:
        file.truncate(10**12)  # sparse: a terabyte in name only
    assert refused_file(X) == "x.yaml:1: is larger than 1,000,000 bytes; keep data in files of its own"


def test_paths_are_shown_from_the_working_directory(folder: Path) -> None:
    assert show_path(folder / "recipes" / "a.yaml") == "recipes/a.yaml"
    assert show_path(Path("/elsewhere/a.yaml")) == "/elsewhere/a.yaml"
    assert show_path(Path("a\nb\udcff.yaml")) == "a\\nb\\udcff.yaml"


# ---- what messages show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("40", "'40'"),
        ("a\nb", "'a\\nb'"),
        ("x" * 100, "'" + "x" * 35 + "...'"),
        ("hf_abcdefghijklmnop", "'hf_***'"),
        ("Bearer ghp_0123456789abcdef", "'***'"),
        ("c2VjcmV0IHRva2VuIHRoYXQgaXM0", "'***'"),
        ("models/SmolLM2-135M-Instruct-GGUF.Q4_1.gguf", "'models/SmolLM2-135M-Instruct-GGUF.Q...'"),
        ("per_device_train_batch_size", "'per_device_train_batch_size'"),
        ("a" * 40 + "1", "'***'"),
        ("sha256:" + "0a" * 32, "'sha256:" + "0a" * 14 + "...'"),
        (["hf_abcdefghijklmnop"], "***"),
        (["a", 1, None], '["a", 1, null]'),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11..."),
        (1e-5, "1e-05"),
        (math.nan, ".nan"),
        (True, "true"),
    ],
)
def test_values_are_shown_short_and_without_tokens(value: object, shown: str) -> None:
    assert show(value) == shown
    assert len(shown) <= 40


def test_keys_are_shown_dotted() -> None:
    assert dotted(("gates", 0, "min")) == "gates[0].min"
    assert dotted(("a", "b c\n", 1)) == "a.'b c\\n'[1]"
    assert dotted(("hf_abcdefghijklmnop",)) == "'hf_***'"
    assert dotted(()) == ""


def test_names_of_models_and_tasks_do_not_look_secret() -> None:
    for text in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "recipes/concise/common_sense.yaml",
        "task-specific",
        "paged_adamw_32bit",
    ):
        assert not looks_secret(text)


# ---- out

AWKWARD = (
    *("1e5", "1e-5", "5e-5", "on", "off", "Yes", "NO", "y", "n", "true", "False", "null", "Null", "~", "", " ", "."),
    *("12:30", "12:30:45", "2024-01-01", "2024-01-01 10:00:00", "0o17", "017", "0x1F", "0b11", "1_000", "+1", "-1"),
    *(
        ".5",
        ".inf",
        "-.INF",
        ".nan",
        "=",
        "<<",
        "---",
        "...",
        "- a",
        "? a",
        ": a",
        "a: b",
        "a:",
        "a #b",
        "#a",
        "a ",
        " a",
    ),
    *("[a]", "{a}", "a,b", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "'a'", '"a"', "a'b", "\\", "a\\nb", "a\nb"),
    *("a\n", "\n", "\t", "a\tb", "\r", "\x07", "\0", "\x7f", "\x85", "\xa0", "\u2028", "\ufeff", "\uffff", "é", "日本"),
    *("😀", "x" * 500, "word " * 100, "sha256:ab12", "a/b.c", "/abs", "./rel", "_x", "a:b", "key: [", "yes please"),
)
PARSERS = {
    "own": lambda text: load(X, text).data,
    "PyYAML": yaml.safe_load,
    "ruamel": YAML(typ="safe", pure=True).load,
    "ruamel with libyaml": YAML(typ="safe").load,
    "ruamel round trip": YAML().load,
}


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_awkward_text_is_the_same_for_every_parser(parser: Any) -> None:
    value = {text: text for text in AWKWARD}
    assert parser(dump({"all": [*AWKWARD], "keys": value})) == {"all": [*AWKWARD], "keys": value}


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_numbers_keep_value_and_type_in_every_parser(parser: Any) -> None:
    value = [
        0,
        -7,
        2**63 - 1,
        0.1,
        1e-05,
        5e-5,
        1e16,
        1e22,
        -2.5e-300,
        1.0,
        -0.0,
        math.inf,
        -math.inf,
        True,
        False,
        None,
    ]
    found = parser(dump({"a": value}))["a"]
    assert [repr(float(x) if isinstance(x, float) else x) for x in found] == [repr(x) for x in value]
    assert math.isnan(parser(dump({"a": math.nan}))["a"])


def test_style_is_block_with_keys_in_given_order() -> None:
    assert dump({"b": [{"z": 1, "x": [1, [2]]}, "t", []], "a": {"c": {}, "d": "5e-5", "e": 5e-5}}) == (
        'b:\n  - z: 1\n    x:\n      - 1\n      - - 2\n  - t\n  - []\na:\n  c: {}\n  d: "5e-5"\n  e: 5.0e-05\n'
    )


@pytest.mark.parametrize("word", ["y", "N", "on", "Off", "YES", "null", "1e5", "12:30", "<<", "0o17"])
def test_what_some_parser_takes_for_something_else_is_quoted(word: str) -> None:
    assert dump({word: word}) == f'"{word}": "{word}"\n'


@pytest.mark.parametrize("value", [{1: 2}, {"a": (1,)}, {"a": {1}}, {"a": Path("x")}])
def test_other_types_are_not_written(value: Any) -> None:
    with pytest.raises(TypeError):
        dump(value)


@pytest.mark.parametrize("value", [{"k" * 1001: 1}, {"a": "\ud800"}, {"a": 2**63}])
def test_what_could_not_be_read_back_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError):
        dump(value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    text = dump(value)
    for parser in (PARSERS["own"], PARSERS["PyYAML"], PARSERS["ruamel"]):
        assert parser(text) == value


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab1:-[]{}'\"\\#&*!|>%@?,. \n\t\r\0\x85\ufeff~=<uU\ud800é"), max_size=60))
def test_any_text_gives_a_document_or_one_line_problems(text: str) -> None:
    try:
        load(X, text)
    except RecipeError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.startswith("x.yaml:") and problem.isprintable()


def test_importing_it_imports_no_parser() -> None:
    code = "import prefbuild.yamlfile, sys; print([m for m in ('yaml', 'ruamel', 'pydantic') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "[]\n"
