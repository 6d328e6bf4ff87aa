"""Read rows of preference data and map their columns to messages.

Covered: JSONL, JSON (a list of objects, or {"data": [...]}), Parquet and CSV with a header, in folders. No row is
lost in silence: each one comes back as a Row or as a Dropped with a reason.
Not covered: tool calls, images, messages in CSV cells.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST
from prefbuild.errors import DataError

Message = dict[str, str]  # {role, content}

# Every way to lose a row, in the order they are looked for.
REASONS = (
    "broken", "filtered", "empty", "identical_pair", "special_token", "duplicate", "prompt_too_long", "too_long",
)  # fmt: skip

# What public data sets call our columns; only ever used to word a hint.
USUAL_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "messages"),
    "chosen": ("chatgpt", "preferred", "accepted", "chosen_response", "response_chosen"),
    "rejected": ("llama2-13b-chat", "dispreferred", "rejected_response", "response_rejected"),
}
DOCUMENTS = (".md", ".txt")  # beside the rows of a data folder, and never rows themselves
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair: the messages before the answer, and the assistant messages of either answer."""

    id: str  # "<source index>:<line>", with the file's name between them when a source has several files
    where: str  # "file.jsonl:12"
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on: one of REASONS, where it is, and what is the matter in words."""

    reason: str
    where: str
    what: str


@dataclass(frozen=True)
class Unreadable:
    """Stands for the value of a row that could not be parsed."""

    what: str


@dataclass(frozen=True)
class Raw:
    """A row as it was read: `value` should be an object. `text_only`: it is CSV, where a number is text too."""

    id: str
    where: str
    value: Any
    text_only: bool


class _Drop(Exception):
    def __init__(self, reason: str, what: str):
        self.reason, self.what = reason, what


def read_rows(data: dict[str, Any], folders: list[Path]) -> tuple[list[Row], list[Dropped]]:
    """Read the folders of a recipe's data in order and map each row; together the two lists hold every row.

    `data` is the recipe's Data section dumped by alias. DataError: a file that can't be read, a column that is not
    there or used nowhere, or (on_broken: fail) broken rows.
    """
    sources = [read_source(index, folder, len(folders) > 1) for index, folder in enumerate(folders)]
    check_columns(data, sources)
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for raw in (raw for source in sources for raw in source):
        try:
            rows.append(map_row(raw, data))
        except _Drop as drop:
            dropped.append(Dropped(drop.reason, raw.where, drop.what))
    fail_on_broken(data, dropped)
    return rows, dropped


def fail_on_broken(data: dict[str, Any], dropped: list[Dropped]) -> None:
    """DataError listing the first ten broken rows, unless the recipe says `on_broken: drop`."""
    broken = [row for row in dropped if row.reason == "broken"]
    if not broken or data["on_broken"] == "drop":
        return
    lines = [f"{len(broken)} broken row{'s' * (len(broken) > 1)}:"]
    lines += [f"  {row.where}: {row.what}" for row in broken[:10]]
    if len(broken) > 10:
        lines.append(f"  and {len(broken) - 10} more")
    lines.append("Mend the data, or write `on_broken: drop` under `data` to drop such rows and count them.")
    raise DataError("\n".join(lines))


# ---- files


def read_source(index: int, folder: Path, several: bool) -> list[Raw]:
    """Every row of one data folder, files in order of their paths. DataError on a file that can't be read."""
    files = data_files(folder)
    rows = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        where = f"{folder.name}/{name}" if several else name
        start = f"{index}:" if len(files) == 1 else f"{index}:{name}:"
        text_only = path.suffix.lower() == ".csv"
        for line, value in READERS[path.suffix.lower()](path, where):
            rows.append(Raw(f"{start}{line}", f"{where}:{line}", value, text_only))
    if not rows:
        raise DataError(f"{folder}: holds no rows; check `path` of this source under `data: sources`")
    return rows


def data_files(folder: Path) -> list[Path]:
    """The files of rows in a data folder, sorted. DataError on a file that may hold rows we can't read."""
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        document = path.suffix.lower() in DOCUMENTS or path.name in ("LICENSE", "NOTICE", "README")
        if path.is_dir() or hidden or document or relative.as_posix() == MANIFEST:
            continue
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{path}: is not read; rows come in {', '.join(READERS)}. "
                "Give the file meant as `path` of the source, or convert it"
            )
        files.append(path)
    if not files:
        raise DataError(f"{folder}: holds no file of rows; they come in {', '.join(READERS)}")
    return files


def _read_jsonl(path: Path, where: str) -> Iterator[tuple[int, Any]]:
    # Bytes, because a text file would also break lines at characters that JSON allows inside a string.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                yield number, Unreadable(f"is not JSON: {error}")


def _read_json(path: Path, where: str) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}. If it has one object a line, name it .jsonl") from None
    rows = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else value
    if not isinstance(rows, list):
        raise DataError(f'{where}: is neither a list of objects nor {{"data": [...]}}')
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path, where: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where}: is not Parquet that can be read: {error}") from None
    yield from enumerate(rows, start=1)


def _read_csv(path: Path, where: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 131,072 characters
    end = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            if len(set(header)) != len(header):
                raise DataError(f"{where}:1: a column's name comes twice in {', '.join(header)}; rename one")
            end = lines.line_num
            for cells in lines:
                start, end = end + 1, lines.line_num
                if len(cells) == len(header):
                    yield start, dict(zip(header, cells, strict=True))
                elif cells:  # a blank line has none and is no row
                    yield start, Unreadable(f"has {len(cells)} cells, the header has {len(header)}")
    except (csv.Error, UnicodeDecodeError) as error:
        # An open quote swallows all rows after it, so this can't be counted as one row.
        raise DataError(f"{where}:{end + 1}: is not CSV from here on: {error}") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


# ---- columns


def check_columns(data: dict[str, Any], sources: list[list[Raw]]) -> None:
    """DataError naming every mapped column that is in no row, and every column of the rows that is used nowhere."""
    columns, filtered, ignored = data["columns"], [rule["column"] for rule in data["filters"]], data["ignore"]
    problems, guesses = [], set()
    everywhere: dict[str, str] = {}  # column -> the first file it was seen in
    for source in sources:
        names: dict[str, str] = {}
        for raw in source:
            if isinstance(raw.value, dict):
                for name in raw.value:
                    names.setdefault(name, raw.where.rpartition(":")[0])
        everywhere = names | everywhere
        for role in ("prompt", "chosen", "rejected"):
            if names and columns[role] not in names:
                says, guess = _not_there(role, columns[role], names)
                problems.append(f"{source[0].where.rpartition(':')[0]}: data.columns.{role}: {says}")
                guesses.add(guess)
    elsewhere = [("data.columns.system", columns["system"])] if columns["system"] is not None else []
    elsewhere += [(f"data.filters[{i}].column", name) for i, name in enumerate(filtered)]
    elsewhere += [("data.ignore", name) for name in ignored]
    for key, name in elsewhere:
        if everywhere and name not in everywhere:
            problems.append(f"{key}: {_not_there('system', name, everywhere)[0]}")

    used = {*columns.values(), *filtered, *ignored, *guesses}
    unused = [name for name in everywhere if name not in used]
    if unused:
        listed = ", ".join(_yaml_name(name) for name in unused)
        says = (
            f"{everywhere[unused[0]]}: column{'s' * (len(unused) > 1)} {listed} would be used nowhere. "
            f"Write `ignore: [{listed}]` under `data`, or map them under `columns`"
        )
        if "system" in unused and columns["system"] is None:
            says += "; `columns: {system: system}` makes it the system message"
        problems.append(says)
    if problems:
        raise DataError("\n".join(problems))


def _not_there(role: str, column: str, names: dict[str, str]) -> tuple[str, str | None]:
    usual = [name for name in USUAL_NAMES.get(role, ()) if name in names]
    close = difflib.get_close_matches(column, names, n=3, cutoff=0.6) or usual
    says = f"no row has a column {_yaml_name(column)}; there are {', '.join(_yaml_name(name) for name in names)}."
    if usual and close == usual:
        name = _yaml_name(usual[0])
        says += f" The {role} seems to be in {name}: write `{role}: {name}` under `columns`"
    elif close:
        says += f" Did you mean {' or '.join(_yaml_name(name) for name in close)}?"
    return says, close[0] if close else None


def _yaml_name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else json.dumps(name, ensure_ascii=False)


# ---- one row


def map_row(raw: Raw, data: dict[str, Any]) -> Row:
    """The messages of one row; raises _Drop with the reason it can't be, or may not be, trained on."""
    if isinstance(raw.value, Unreadable):
        raise _Drop("broken", raw.value.what)
    if not isinstance(raw.value, dict):
        raise _Drop("broken", f"is {_kind(raw.value)}, not an object")
    for rule in data["filters"]:
        _filter(rule, raw)

    columns = data["columns"]
    for role in ("prompt", "chosen", "rejected"):
        if columns[role] not in raw.value:
            raise _Drop("broken", f"has no column {_yaml_name(columns[role])}")
    prompt = _messages(raw, columns["prompt"], "user")
    system = raw.value.get(columns["system"]) if columns["system"] is not None else None
    if system is not None and not isinstance(system, str):
        raise _Drop("broken", f"{_yaml_name(columns['system'])} is {_kind(system)}, not text")
    if system and system.strip():
        if prompt and prompt[0]["role"] == "system":
            raise _Drop("broken", "the prompt's messages have a system message, and the row has another")
        prompt = [{"role": "system", "content": _encodable(system, columns["system"])}, *prompt]
    if prompt and prompt[-1]["role"] != "user":
        raise _Drop("broken", f"the prompt's last message is from {prompt[-1]['role']}; it must be from user")
    chosen = _answer(raw, columns["chosen"], prompt)
    rejected = _answer(raw, columns["rejected"], prompt)

    for role, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not messages or not all(m["content"].strip() for m in messages if m["role"] != "system"):
            raise _Drop("empty", f"{_yaml_name(columns[role])} is empty, or has an empty message")
    if [message["content"].strip() for message in chosen] == [message["content"].strip() for message in rejected]:
        raise _Drop("identical_pair", f"chosen and rejected are both {_short(chosen[-1]['content'])}")
    return Row(id=raw.id, where=raw.where, prompt=prompt, chosen=chosen, rejected=rejected)


def _messages(raw: Raw, column: str, role: str) -> list[Message]:
    """Text becomes one message of that role; a list of messages is checked; null becomes none."""
    value, name = raw.value[column], _yaml_name(column)
    if value is None:
        return []
    if isinstance(value, str):
        if raw.text_only and MESSAGES_AS_TEXT.match(value):
            raise _Drop("broken", f"{name} holds messages written as text; give such data as JSONL or Parquet")
        return [{"role": role, "content": _encodable(value, name)}]
    if not isinstance(value, list):
        raise _Drop("broken", f"{name} is {_kind(value)}, not text or a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        which = f"message {number} of {name}"
        if not isinstance(message, dict):
            raise _Drop("broken", f"{which} is {_kind(message)}, not an object")
        for key in ("role", "content"):
            if key not in message:
                raise _Drop("broken", f"{which} has no {key}; a message is {{role, content}}")
        if message["role"] not in ("system", "user", "assistant"):
            raise _Drop("broken", f"{which} is from {message['role']!r}; roles are system, user and assistant")
        # Parquet fills the keys that other messages have with null.
        if more := [key for key in message if key not in ("role", "content") and message[key] is not None]:
            raise _Drop("broken", f"{which} has {', '.join(more)}, which would be lost; a message is {{role, content}}")
        content = "" if message["content"] is None else message["content"]
        if not isinstance(content, str):
            raise _Drop("broken", f"the content of {which} is {_kind(content)}, not text")
        messages.append({"role": message["role"], "content": _encodable(content, which)})
    return messages


def _answer(raw: Raw, column: str, prompt: list[Message]) -> list[Message]:
    """The assistant messages of chosen or rejected, without the prompt's own messages if it starts with them."""
    messages = _messages(raw, column, "assistant")
    without_system = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    for start in (prompt, without_system):
        if start and messages[: len(start)] == start:
            messages = messages[len(start) :]
            break
    for message in messages:
        if message["role"] != "assistant":
            raise _Drop(
                "broken",
                f"{_yaml_name(column)} has a message from {message['role']}; an answer is assistant messages, "
                "which only the prompt's own messages, word for word, may precede",
            )
    return messages


def _filter(rule: dict[str, Any], raw: Raw) -> None:
    column = rule["column"]
    value = raw.value.get(column)
    if isinstance(value, list | dict):
        raise _Drop("broken", f"{_yaml_name(column)} is {_kind(value)}, which can't be filtered on")
    number = value
    if raw.text_only and isinstance(value, str):
        number = _parsed(value)

    def is_in(options: list[Any]) -> bool:
        # True == 1 in Python, but not in a recipe.
        return any(x == v and isinstance(x, bool) == isinstance(v, bool) for x in options for v in (value, number))

    for key in ("min", "max"):
        bound = rule.get(key)
        if bound is None:
            continue
        if number is None:
            raise _Drop("filtered", f"{_yaml_name(column)} is null, {key} is {bound:g}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _Drop("broken", f"{_yaml_name(column)} is {_kind(number)}, not a number, and filtered by {key}")
        if not (number >= bound if key == "min" else number <= bound):  # so that NaN is filtered too
            raise _Drop("filtered", f"{_yaml_name(column)} is {number}, {key} is {bound:g}")
    if rule.get("in") is not None and not is_in(rule["in"]):
        raise _Drop("filtered", f"{_yaml_name(column)} is {value!r}, not in {rule['in']}")
    if rule.get("not_in") is not None and is_in(rule["not_in"]):
        raise _Drop("filtered", f"{_yaml_name(column)} is {value!r}, in not_in")


def _parsed(text: str) -> Any:
    """What a CSV cell says: null, a truth value, a number or text."""
    if text.strip().lower() in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[text.strip().lower()]
    try:
        return float(text)
    except ValueError:
        return text


def _encodable(text: str, which: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Drop("broken", f"{which} holds half of a surrogate pair, which is no character") from None
    return text


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
