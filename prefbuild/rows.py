"""Read rows of data and map their columns to messages, in the shape that the method trains on.

`pairs` have a prompt and two answers, chosen and rejected; `answers` a prompt and its completion; `labelled` are
answers with a verdict, true or false; `prompts` have no answer. A conversation may stand for prompt and completion.
Conversations are lists of {role, content}, or written as the recipe's `format` says.
Covered: JSONL, JSON (a list of objects, or {"data": [...]}), Parquet and CSV with a header, in folders. No row is
lost in silence: each one comes back as a Row or as a Dropped with a reason.
Not covered: tool calls, images, messages in CSV cells.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST
from prefbuild.errors import DataError
from prefbuild.methods import PARTS

Message = dict[str, str]  # {role, content}

# Every way to lose a row, in the order they are looked for.
REASONS = (
    "broken", "filtered", "empty", "identical_pair", "special_token", "duplicate", "prompt_too_long", "too_long",
)  # fmt: skip

SAMPLED_OUT = "sampled_out"  # the reason of rows that the weights of the sources leave out, where there are weights

# What public data sets call our columns; only ever used to word a hint.
USUAL_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "messages"),
    "chosen": ("chatgpt", "preferred", "accepted", "chosen_response", "response_chosen"),
    "rejected": ("llama2-13b-chat", "dispreferred", "rejected_response", "response_rejected"),
    "completion": ("response", "answer", "output", "text", "chosen"),
    "label": ("labels", "desirable", "is_good", "thumbs_up"),
    "messages": ("messages", "conversation", "conversations"),
}
DOCUMENTS = (".md", ".txt")  # beside the rows of a data folder, and never rows themselves
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The messages before the answer, and the assistant messages of each answer, by the part it is."""

    id: str  # "<source index>:<line>", with the file's name between them when a source has several files
    where: str  # "file.jsonl:12"
    prompt: list[Message]
    answers: dict[str, list[Message]]  # chosen and rejected, or completion, or none
    label: bool | None = None  # of labelled rows
    columns: dict[str, Any] = field(default_factory=dict)  # what rewards read beside the prompt


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


def reasons(shape: str, *, sampled: bool = False) -> tuple[str, ...]:
    """Those of REASONS for which a row of this shape can be lost, and, when sources have weights, SAMPLED_OUT."""
    not_of = {"pairs": (), "answers": ("identical_pair",), "labelled": ("identical_pair",)}
    known = tuple(reason for reason in REASONS if reason not in not_of.get(shape, ("identical_pair", "too_long")))
    return (*known, SAMPLED_OUT) if sampled else known


def read_rows(data: dict[str, Any], folders: list[Path]) -> tuple[list[Row], list[Dropped]]:
    """Read the folders of a recipe's data in order and map each row; together the two lists hold every row.

    `data` is what prepare is told of a recipe's Data section. DataError: a file that can't be read, a column that is not
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
    kept = data.get("keep", [])
    problems: list[str] = []
    guesses: set[str | None] = set()
    everywhere: dict[str, str] = {}  # column -> the first file it was seen in
    for source in sources:
        names: dict[str, str] = {}
        for raw in source:
            if isinstance(raw.value, dict):
                for name in raw.value:
                    names.setdefault(name, raw.where.rpartition(":")[0])
        everywhere = names | everywhere
        file = source[0].where.rpartition(":")[0]
        missing = [role for role in _required(data) if columns[role] not in names] if names else []
        whole = next((name for name in USUAL_NAMES["messages"] if name in names), None)
        if data["shape"] != "pairs" and whole is not None and "prompt" in missing:
            # One hint for both parts of a conversation.
            missing = [role for role in missing if role not in ("prompt", "completion")]
            problems.append(
                f"{file}: data.columns.prompt: {_not_there('', columns['prompt'], names)[0]} "
                f"If {whole} holds whole conversations, write `messages: {whole}` under `columns`"
            )
            guesses.add(whole)
        for role in missing:
            says, guess = _not_there(role, columns[role], names)
            problems.append(f"{file}: data.columns.{role}: {says}")
            guesses.add(guess)
        for name in kept if names else []:
            if name not in names:
                problems.append(f"{file}: train.rewards: {_not_there('', name, names)[0]}")
    elsewhere = [("data.columns.system", columns["system"])] if columns["system"] is not None else []
    elsewhere += [(f"data.filters[{i}].column", name) for i, name in enumerate(filtered)]
    elsewhere += [("data.ignore", name) for name in ignored]
    for key, name in elsewhere:
        if everywhere and name not in everywhere:
            problems.append(f"{key}: {_not_there('system', name, everywhere)[0]}")

    used = {*columns.values(), *filtered, *ignored, *guesses, *kept}
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

    columns, parts = data["columns"], PARTS[data["shape"]][1:]
    for name in (*(columns[role] for role in _required(data)), *data.get("keep", [])):
        if name not in raw.value:
            raise _Drop("broken", f"has no column {_yaml_name(name)}")
    conversation, form = columns.get("messages"), data.get("format")
    if conversation is not None:
        prompt, answer = _split(raw, conversation, form, answered=bool(parts))
    elif "prompt" in columns:
        prompt = _messages(raw, columns["prompt"], "user", form)
    else:
        prompt = _shared_prompt(raw, columns, form)
    system = raw.value.get(columns["system"]) if columns["system"] is not None else None
    if system is not None and not isinstance(system, str):
        raise _Drop("broken", f"{_yaml_name(columns['system'])} is {_kind(system)}, not text")
    if system and system.strip():
        if prompt and prompt[0]["role"] == "system":
            raise _Drop("broken", "the prompt's messages have a system message, and the row has another")
        prompt = [{"role": "system", "content": _encodable(system, columns["system"])}, *prompt]
    if prompt and prompt[-1]["role"] != "user":
        raise _Drop("broken", f"the prompt's last message is from {prompt[-1]['role']}; it must be from user")
    if conversation is not None:
        answers = dict.fromkeys(parts, answer)
    else:
        answers = {part: _answer(raw, columns[part], prompt, form) for part in parts}
    label = _label(raw, columns["label"]) if "label" in columns else None

    for part, messages in (("prompt", prompt), *answers.items()):
        if not messages or not all(m["content"].strip() for m in messages if m["role"] != "system"):
            name = conversation or columns.get(part) or columns[parts[0]]
            raise _Drop("empty", f"{_yaml_name(name)} is empty, or has an empty message")
    if data["shape"] == "pairs":
        chosen, rejected = ([message["content"].strip() for message in answers[part]] for part in parts)
        if chosen == rejected:
            raise _Drop("identical_pair", f"chosen and rejected are both {_short(chosen[-1])}")
    kept = {name: _plain(raw, name) for name in data.get("keep", [])}
    return Row(id=raw.id, where=raw.where, prompt=prompt, answers=answers, label=label, columns=kept)


def _required(data: dict[str, Any]) -> list[str]:
    """The columns without which a row can't be mapped."""
    columns = data["columns"]
    return [role for role in ("messages", *PARTS[data["shape"]], "label") if role in columns]


def _shared_prompt(raw: Raw, columns: dict[str, Any], form: str | None) -> list[Message]:
    """The messages that chosen and rejected have in common: all but the last of each."""
    chosen, rejected = (_messages(raw, columns[part], "assistant", form)[:-1] for part in ("chosen", "rejected"))
    if chosen != rejected:
        raise _Drop("broken", "chosen and rejected differ before their last message, so they answer no same prompt")
    return chosen


def _split(raw: Raw, column: str, form: str | None, *, answered: bool) -> tuple[list[Message], list[Message]]:
    """A conversation's prompt, and the assistant messages that it ends with, which must be there if `answered`."""
    messages = _messages(raw, column, "user", form)
    if isinstance(raw.value[column], str) and form != "hh":
        raise _Drop("broken", f"{_yaml_name(column)} is text, not a list of messages")
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if answered and messages and end == len(messages):
        last = messages[-1]["role"]
        raise _Drop("broken", f"the last message of {_yaml_name(column)} is from {last}; it must be the answer")
    return messages[:end], messages[end:]


def _label(raw: Raw, column: str) -> bool:
    """Whether an answer is a good one: true or false, 1 or 0, and in CSV these as text."""
    value = raw.value[column]
    if raw.text_only and isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    shown = "null" if value is None else _short(value) if isinstance(value, str) else str(value)
    raise _Drop("broken", f"{_yaml_name(column)} is {shown[:60]}, not true or false")


def _plain(raw: Raw, column: str) -> Any:
    """A column's value as rewards get it: what JSON can hold."""
    value = raw.value[column]
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise _Drop("broken", f"{_yaml_name(column)} is {_kind(value)} that JSON can't hold") from None
    return value


def _messages(raw: Raw, column: str, role: str, form: str | None = None) -> list[Message]:
    """Text becomes one message of that role; a list of messages is checked; null becomes none.

    What is written in a format is first made what we read.
    """
    value, name = raw.value[column], _yaml_name(column)
    if form is not None:
        value = FORMATS[form](value, name)
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
        if isinstance(content, list):
            content = _joined(content, which)
        if not isinstance(content, str):
            raise _Drop("broken", f"the content of {which} is {_kind(content)}, not text")
        messages.append({"role": message["role"], "content": _encodable(content, which)})
    return messages


def _joined(parts: list[Any], which: str) -> str:
    """The text of a content that is a list of parts, {type: text, text: ...}, as OpenAI's exports have it."""
    texts = []
    for number, part in enumerate(parts, start=1):
        here = f"part {number} of the content of {which}"
        if not isinstance(part, dict):
            raise _Drop("broken", f"{here} is {_kind(part)}, not an object")
        if part.get("type") != "text":
            of = f"of type {part['type']!r}" if "type" in part else "of no type"
            raise _Drop("broken", f"{here} is {of}; only text can be trained on")
        if not isinstance(part.get("text"), str):
            raise _Drop("broken", f"{here} has no text")
        # Parquet fills the keys that other parts have with null.
        if more := [key for key, value in part.items() if key not in ("type", "text") and value is not None]:
            raise _Drop("broken", f"{here} has {', '.join(map(str, more))}, which would be lost")
        texts.append(part["text"])
    return "".join(texts)


def _transcript(value: Any, name: str) -> Any:
    """hh: text in which each turn begins with an empty line and Human: or Assistant:."""
    if value is None or not isinstance(value, str):
        return value
    start, *turns = re.split(r"(?:\A|\n\n)(Human|Assistant):", value)
    if start.strip() or not turns:
        raise _Drop("broken", f"{name} is no transcript: it does not begin with an empty line and Human:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def _sharegpt(value: Any, name: str) -> Any:
    """sharegpt: a list of {from, value}, or one such message."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    messages = []
    for message in value:
        if isinstance(message, dict) and "from" in message and "value" in message:
            who = message["from"]
            more = {key: one for key, one in message.items() if key not in ("from", "value")}
            role = roles.get(who, who) if isinstance(who, str) else who
            message = {"role": role, "content": message["value"], **more}
        elif isinstance(message, dict):
            raise _Drop("broken", f"{name} has a message without from or value; format: sharegpt has both")
        messages.append(message)
    return messages


def _openai(value: Any, name: str) -> Any:
    """openai: {messages: [...]}, and answers that are lists of messages."""
    if not isinstance(value, dict):
        return value
    if "messages" not in value:
        raise _Drop("broken", f"{name} has no messages; format: openai has {{messages: [...]}}")
    if more := [key for key, one in value.items() if key not in ("messages", "parallel_tool_calls") and one]:
        raise _Drop("broken", f"{name} has {', '.join(map(str, more))}, which would be lost")
    return value["messages"]


FORMATS = {"hh": _transcript, "sharegpt": _sharegpt, "openai": _openai}


def _answer(raw: Raw, column: str, prompt: list[Message], form: str | None) -> list[Message]:
    """The assistant messages of chosen or rejected, without the prompt's own messages if it starts with them."""
    messages = _messages(raw, column, "assistant", form)
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
