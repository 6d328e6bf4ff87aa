"""YAML in and out: strict, with line numbers.

Read is YAML 1.2's core schema and less: one UTF-8 document, a mapping with text keys, without anchors, aliases, merge
keys, tags and directives, each key once. `5e-5` is a number; `on`, `yes`, `12:30:45` and `2024-01-01` are text.
Every problem is a line `file:line: key: what; what instead` of one RecipeError, and no input gives another exception.

Not covered: comments are lost, and a line break that only YAML 1.1 knows (U+0085, U+2028, U+2029) counts as a line.
"""

import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild.errors import RecipeError

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_KEY = 1000  # characters; YAML's own limit for a key on one line is 1024

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A YAML file's data, and the 1-based line of every key and list item in it."""

    path: Path
    data: dict[str, Any]
    lines: dict[Loc, int]

    def line(self, loc: Loc) -> int:
        """The line of a key or item; of the nearest one around it where it is not written."""
        return next(self.lines[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in self.lines)

    def where(self, loc: Loc) -> str:
        """`file:line` of a key or item."""
        return f"{show_path(self.path)}:{self.line(loc)}"


# ---- what messages show


def show_path(path: Path) -> str:
    """A path as messages print it: relative to the working directory where it is below it, one line, printable."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return printable(str(path))


def dotted(loc: Loc) -> str:
    """`("gates", 0, "min")` as `gates[0].min`."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if re.fullmatch(r"[\w-]{1,40}", part) and not looks_secret(part) else show(part)
            text += f".{key}" if text else key
    return text


def show(value: object) -> str:
    """A value as messages print it: at most 40 characters of one line, and nothing that could be a token."""
    if isinstance(value, str):
        if looks_secret(value):
            return f"'{value[:3] if value.startswith('hf_') else ''}***'"
        text = printable(value)
        return f"'{text[:35]}...'" if len(text) > 38 else f"'{text}'"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else scalar(value)
    text = json.dumps(value, ensure_ascii=True, default=str)
    return "***" if looks_secret(text) else text if len(text) <= 40 else f"{text[:37]}..."


def printable(text: str) -> str:
    """Text without line breaks, control characters and half characters, which stand as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def looks_secret(text: str) -> bool:
    """Whether text holds what could be an access token: a known prefix, or a long run of letters and digits.

    Hex of 64 digits is none: that is what a sha256 looks like.
    """
    if re.search(r"(?i)(?<![a-z0-9])(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[a-z0-9_-]{8}", text):
        return True
    runs = re.findall(r"[A-Za-z0-9+]{16,}", text)
    return any(
        re.search("[0-9]", run) and re.search("[A-Za-z]", run) and not re.fullmatch("[0-9a-f]{64}", run) for run in runs
    )


# ---- in


def load(path: Path, text: str | None = None) -> Document:
    """Read a YAML file, or `text` as if it stood in that file.

    Raises RecipeError with all problems of the file, as far as it can be read.
    """
    label = show_path(path)
    raw = _read(path, label) if text is None else text.encode(errors="surrogatepass")
    if len(raw) > MAX_BYTES:
        raise RecipeError([f"{label}:1: is larger than {MAX_BYTES:,} bytes; keep data in files of its own"])
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([f"{label}:1: is UTF-16; save it as UTF-8"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        raise RecipeError([f"{label}:{line}: {what}"]) from None
    reader = _Reader(label, text)
    data = reader.document()
    if not reader.problems and data is None:
        reader.problems.append(f"{label}:1: is empty; a mapping of keys is wanted")
    elif not reader.problems and not isinstance(data, dict):
        reader.problems.append(f"{label}:1: is {kind(data)} at the top; a mapping of keys is wanted")
    if reader.problems:
        raise RecipeError(reader.problems)
    return Document(path, data, reader.lines)


def kind(value: object) -> str:
    """What a value is, in the words of messages."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {show(value)}"
    if isinstance(value, str):
        return f"text {show(value)}"
    return "a list" if isinstance(value, list) else "a section"


def _read(path: Path, label: str) -> bytes:
    """A file's first MAX_BYTES and one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for its writer
            raise RecipeError([f"{label}:1: is not a plain file; a YAML file is wanted"])
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError([f"{label}:1: is not there; a YAML file is wanted"]) from None
    except (OSError, ValueError) as error:
        why = printable(getattr(error, "strerror", None) or str(error))
        raise RecipeError([f"{label}:1: cannot be read ({why}); a readable YAML file is wanted"]) from None


class _TooDeep(Exception):
    pass


class _Reader:
    """Builds data from the events of PyYAML's parser, which neither recurses nor resolves anything by itself."""

    def __init__(self, label: str, text: str):
        self.label = label
        self.text = text
        self.problems: list[str] = []
        self.lines: dict[Loc, int] = {(): 1}
        self.depth = 0
        self.open: list[tuple[int, str]] = []  # line and sign of the brackets around what is being read

    def _character(self, mark: "yaml.Mark | None") -> str:
        return printable(self.text[mark.index : mark.index + 1]) if mark else ""

    def problem(self, line: int, loc: Loc, what: str) -> None:
        self.problems.append(f"{self.label}:{line}: {dotted(loc)}{': ' if loc else ''}{what}")

    def document(self) -> Any:
        """The data of the one document; problems go to self.problems."""
        import yaml

        loader: yaml.SafeLoader | None = None
        try:
            loader = yaml.SafeLoader(self.text)
            return self._document(_events(loader))
        except _TooDeep:
            pass
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            self.problem(line, (), f"a character that YAML does not allow ({printable(chr(_code(error)))}); remove it")
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        except (ValueError, OverflowError):  # PyYAML's scanner does not check the number in "\UFFFFFFFF"
            line = loader.line + 1 if loader else 1
            self.problem(line, (), "an escape that is no character; use \\u and four hex digits")
        return None

    def _document(self, events: Iterator["yaml.Event"]) -> Any:
        import yaml

        data = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if event.version or event.tags:
                    self.problem(_line(event), (), "directives (%YAML, %TAG) are not used here; remove the line")
                if documents == 2:
                    self.problem(_line(event), (), "a second document begins; keep one, without '---' between")
            elif isinstance(event, yaml.NodeEvent):
                value = self._node(event, events, ())
                data = value if documents == 1 else data
        return data

    def _node(self, event: "yaml.Event", events: Iterator["yaml.Event"], loc: Loc) -> Any:
        import yaml

        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            self.problem(line, loc, f"an alias ({_sign('*' + str(event.anchor))}); write the value out")
            return None
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if event.anchor is not None:
            self.problem(line, loc, f"an anchor ({_sign('&' + event.anchor)}); remove it, and write values out")
        if event.tag is not None:
            self.problem(
                line,
                loc,
                f"a tag ({_sign(event.tag.replace('tag:yaml.org,2002:', '!!'))}); remove it, values are plain YAML",
            )
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, loc)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.problem(line, (), f"is nested more than {MAX_DEPTH} deep; no key is")
            raise _TooDeep
        if event.flow_style:
            self.open.append((line, "{" if isinstance(event, yaml.MappingStartEvent) else "["))
        value = (self._mapping if isinstance(event, yaml.MappingStartEvent) else self._sequence)(events, loc)
        if event.flow_style:
            self.open.pop()
        self.depth -= 1
        return value

    def _sequence(self, events: Iterator["yaml.Event"], loc: Loc) -> list[Any]:
        import yaml

        items: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            here = (*loc, len(items))
            self.lines[here] = _line(event)
            items.append(self._node(event, events, here))
        return items

    def _mapping(self, events: Iterator["yaml.Event"], loc: Loc) -> dict[str, Any]:
        import yaml

        items: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            line = _line(event)
            key = self._node(event, events, loc)
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and key == "<<":
                self.problem(line, loc, "a merge key (<<); write the keys out")
            elif not isinstance(key, str):
                if not isinstance(event, yaml.AliasEvent):
                    self.problem(line, loc, f"a key that is {kind(key)}; a key is text, in quotes if need be")
                key = ""  # its value is still read, for the problems in it
            elif key in items:
                first = self.lines[(*loc, key)]
                self.problem(line, (*loc, key), f"written twice, first on line {first}; keep one")
            here = (*loc, key)
            self.lines.setdefault(here, line)
            items[key] = self._node(next(events), events, here)
        return items

    def _scalar(self, event: "yaml.ScalarEvent", loc: Loc) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # in quotes, or a block
            value: Any = text
        else:
            value = plain(text)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                self.problem(_line(event), loc, "a number of more than 64 bits; write it in quotes if it is text")
                return 0
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            self.problem(_line(event), loc, "half a character (\\ud800 to \\udfff); write the character itself")
            return ""
        return value

    def _syntax(self, error: "yaml.MarkedYAMLError") -> None:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        opened = error.context_mark.line + 1 if error.context_mark else line
        what = error.problem or ""
        context = error.context or ""
        found = re.search(r"(?:found character|but found|but got) '(.*)'", what)
        if "'\\t'" in what:
            says = "a tab where only spaces may be; indent with spaces"
        elif "could not find expected ':'" in what:
            line, says = opened, "a line without 'key: value'; a ':' and a space are wanted after a key"
        elif "mapping values are not allowed" in what:
            says = "a ':' where none may be; check the indentation, or put the text in quotes"
        elif "end of stream" in what and "quoted scalar" in context:
            line, says = opened, "a quote that is not closed; close it"
        elif found and found[1] == "<stream end>" and self.open:
            line, sign = self.open[-1]
            says = f"a '{sign}' that is not closed; close it"
        elif "unknown escape character" in what:
            says = "a backslash in double quotes that YAML does not know; use single quotes"
        elif "scanning an" in context or (found and ("cannot start" in what or "node content" in what)):
            sign = found[1] if found and "scanning an" not in context else self._character(error.context_mark)
            says = f"a value that begins with {sign}; put text that does in quotes"
        elif "flow" in context:
            bracket = "[" if "sequence" in context else "{"
            says = f"a '{bracket}' of line {opened} that is not closed, or a comma is missing; close it"
        elif found and found[1] == "<scalar>":
            says = "text after the end of a value; put the whole value in one pair of quotes"
        elif found and ("<block end>" in what or "<document start>" in what):
            says = "indentation that differs from the lines before; align the keys of a section"
        else:
            says = f"not YAML ({'***' if looks_secret(what) else printable(what)[:80]}); check quotes and indentation"
        if re.search(r"^(<{7}|>{7}) |^={7}$", self.text, re.MULTILINE):
            says += " (merge conflict?)"
        self.problem(line, (), says)


def _events(loader: "yaml.SafeLoader") -> Iterator["yaml.Event"]:
    while loader.check_event():
        yield loader.get_event()


def _line(event: "yaml.Event") -> int:
    mark = event.start_mark
    return int(mark.line) + 1 if mark else 1


def _code(error: "yaml.reader.ReaderError") -> int:
    return error.character if isinstance(error.character, int) else 0


def _sign(text: str) -> str:
    return "***" if looks_secret(text) else printable(text)[:40]


INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain(text: str) -> Any:
    """The value of an unquoted scalar in YAML 1.2's core schema."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if INT.fullmatch(text):
        if len(text) > 100:  # int() refuses some thousand digits; 64 bits is the limit anyway
            return 10**100
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if FLOAT.fullmatch(text) or INFINITE.fullmatch(text):
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    return text


# ---- out


def dump(value: Any) -> str:
    """Block-style YAML of dicts (keys as ordered), lists, text, numbers, bools and None.

    This module, PyYAML's YAML 1.1 and YAML 1.2 parsers read the same values from it. Raises TypeError for another
    type, ValueError for a key over MAX_KEY characters, half a character, or a whole number over 64 bits.
    """
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is text, not {key!r}")
            if len(scalar(key)) > MAX_KEY:
                raise ValueError(f"a key of more than {MAX_KEY} characters")
            inner = _lines(item)
            if isinstance(item, (dict, list)) and item:
                lines += [f"{scalar(key)}:", *(f"  {line}" for line in inner)]
            else:
                lines.append(f"{scalar(key)}: {inner[0]}")
        return lines
    if isinstance(value, list) and value:
        lines = []
        for item in value:
            first, *rest = _lines(item)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
        return lines
    return ["{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else scalar(value)]


# What YAML 1.1 or 1.2 takes for something else than text begins with a digit, a sign, a dot or `~`, or is one of these
WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
PLAIN = re.compile(r"[A-Za-z_/]([A-Za-z0-9_./@+:(), -]*[A-Za-z0-9_./@+)-])?")


def scalar(value: Any) -> str:
    """One value in YAML: text without quotes only where every parser takes it for text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("a whole number of more than 64 bits")
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        if text in ("inf", "-inf", "nan"):
            return text.replace("inf", ".inf").replace("nan", ".nan")
        # YAML 1.1 takes 1e-05 for text: its numbers have a dot
        return text.replace("e", ".0e") if "." not in text else text
    if not isinstance(value, str):
        raise TypeError(f"YAML of a {type(value).__name__} is not written here")
    if PLAIN.fullmatch(value) and ": " not in value and value.lower() not in WORDS:
        return value
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("text with half a character")
    quoted = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", quoted)
