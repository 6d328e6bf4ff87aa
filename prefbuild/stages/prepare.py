"""Stage `prepare`: rows of data become token ids to train on, and every row is accounted for.

Rows are read, mapped to messages, rendered with the model's own chat template, tokenised, cut to length and split
by prompt. The same inputs give the same bytes. Writes
    prepared/train.jsonl, held_out.jsonl   rendered texts, whole, and their ids as trained on, after the cut:
        pairs      {id, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids}
        answers    {id, prompt, completion, prompt_ids, completion_ids}
        labelled   the same, and label: whether the answer is a good one
        prompts    {id, prompt, prompt_ids, messages, columns}: the prompt's messages, and what rewards read beside it
    prepare.json                           how many rows came in, were dropped (by reason), cut, and how long they are
    lengths.csv                            histogram of lengths in tokens, for `dvc plots`
Lengths are those before the length rules: they tell what max_length and max_prompt_length would lose nothing.
"""

import csv
import hashlib
import io
import json
import math
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from prefbuild.artifact import write_atomic, write_json
from prefbuild.errors import DataError
from prefbuild.methods import PARTS
from prefbuild.rows import SAMPLED_OUT, Dropped, Message, Row, fail_on_broken, read_rows, reasons
from prefbuild.template import (
    check_template,
    generation_eos_ids,
    load_tokenizer,
    render_completion,
    render_prompt,
    special_tokens,
    stop_ids,
    tokenize,
)

BATCH = 1000  # rows tokenised in one call
BINS = 30
WINDOW = 100  # characters either side of the boundary between prompt and answer


@dataclass(frozen=True)
class Answer:
    """A rendered completion: `ids` are trained on, `cut` more were left out; `lost`: a stop token was among those."""

    text: str
    ids: list[int]
    cut: int
    lost: bool


@dataclass(frozen=True)
class PreparedRow:
    """A row as it is trained on."""

    id: str
    where: str
    prompt: str
    prompt_ids: list[int]
    answers: dict[str, Answer]  # chosen and rejected, or completion, or none
    label: bool | None
    messages: list[Message]  # the prompt's
    columns: dict[str, Any]  # what rewards read beside the prompt


@dataclass(frozen=True)
class Prepared:
    """All rows of a recipe: those kept in source order, the prompts held out, and what became of the others."""

    rows: list[PreparedRow]
    held_out: set[str]
    dropped: list[Dropped]
    metrics: dict[str, Any]
    lengths: dict[str, list[int]]


def run(settings: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Path], work: Path, name: str) -> None:
    """Prepare the rows of recipe `name`. DataError: columns, rows or a template that can't be used, or no row left."""
    prepared = prepare(settings, inputs)
    outputs["prepared"].mkdir(parents=True)
    for part, held_out in (("train", False), ("held_out", True)):
        lines = [
            _json_line(row, settings["data"]["shape"])
            for row in prepared.rows
            if (row.prompt in prepared.held_out) == held_out
        ]
        write_atomic(outputs["prepared"] / f"{part}.jsonl", "".join(lines))
    write_json(outputs["metrics"], prepared.metrics)
    write_atomic(outputs["lengths"], histogram(prepared.lengths))
    print(f"{name}:\n{accounting(prepared.metrics, prepared.dropped)}", file=sys.stderr)


def prepare(settings: dict[str, Any], inputs: dict[str, Any]) -> Prepared:
    """Everything `run` does but writing. DataError as there."""
    data = settings["data"]
    tokenizer = load_tokenizer(inputs["model"])
    eos_ids = generation_eos_ids(inputs["model"])
    check_template(tokenizer, eos_ids)

    rows, dropped = read_rows(data, inputs["data"])
    rows_in = len(rows) + len(dropped)
    kept, lengths = _kept(rows, dropped, data, tokenizer, stop_ids(tokenizer, eos_ids))
    fail_on_broken(data, dropped)
    if "weights" in data:
        kept, sampled_out = sample(kept, data["weights"], settings["seed"])
        dropped += sampled_out

    held_out = split(kept, data["held_out"], settings["seed"])
    boundary_differs = _boundary_differs(tokenizer, kept)
    known = reasons(data["shape"], sampled="weights" in data)
    metrics = _metrics(data["shape"], known, rows_in, kept, held_out, dropped, lengths, boundary_differs)
    if metrics["rows"]["train"] == 0:
        lost = "no row is left" if not kept else "every row is held out: there are too few prompts for this `held_out`"
        raise DataError(f"{lost}, so there is nothing to train on:\n{accounting(metrics, dropped)}")
    return Prepared(kept, held_out, dropped, metrics, lengths)


def _kept(
    rows: list[Row], dropped: list[Dropped], data: dict[str, Any], tokenizer: Any, stops: set[int]
) -> tuple[list[PreparedRow], dict[str, list[int]]]:
    """Render, tokenise and cut, adding to `dropped`. Returns the kept rows and the lengths of all that were tokenised."""
    from tqdm import tqdm

    parts = PARTS[data["shape"]]
    kept: list[PreparedRow] = []
    lengths: dict[str, list[int]] = {part: [] for part in parts}
    special, seen = special_tokens(tokenizer), set[tuple[str, ...]]()
    with tqdm(total=len(rows), desc="prepare", unit=" rows", file=sys.stderr, mininterval=1) as bar:
        for start in range(0, len(rows), BATCH):
            batch: list[tuple[Row, tuple[str, ...]]] = []
            for row in rows[start : start + BATCH]:
                texts = _rendered(row, tokenizer, special)
                if isinstance(texts, tuple) and data["drop_duplicates"] and _identity(row, texts) in seen:
                    texts = Dropped("duplicate", row.where, _DUPLICATE[data["shape"]])
                if isinstance(texts, Dropped):
                    dropped.append(texts)
                else:
                    seen.add(_identity(row, texts))
                    batch.append((row, texts))
            ids = tokenize(tokenizer, [text for _, texts in batch for text in texts])
            for number, (row, texts) in enumerate(batch):
                token_ids = ids[len(parts) * number : len(parts) * (number + 1)]
                for part, part_ids in zip(parts, token_ids, strict=True):
                    lengths[part].append(len(part_ids))
                fitted = _fitted(row, texts, token_ids, data, stops)
                if isinstance(fitted, PreparedRow):
                    kept.append(fitted)
                else:
                    dropped.append(fitted)
            bar.update(min(BATCH, len(rows) - start))
    return kept, lengths


_DUPLICATE = {
    "pairs": "has the prompt and answers of an earlier row",
    "answers": "has the prompt and answer of an earlier row",
    "labelled": "has the prompt, answer and label of an earlier row",
    "prompts": "has the prompt of an earlier row, and all that rewards read",
}


def _identity(row: Row, texts: tuple[str, ...]) -> tuple[str, ...]:
    """What two rows share that are one row twice."""
    more = [] if row.label is None else [str(row.label)]
    more += [json.dumps(row.columns, sort_keys=True)] if row.columns else []
    return (*texts, *more)


def _rendered(row: Row, tokenizer: Any, special: re.Pattern[str]) -> tuple[str, ...] | Dropped:
    """Texts of the prompt and of each answer."""
    for message in chain(row.prompt, *row.answers.values()):
        if found := special.search(message["content"]):
            says = f"{found[0]!r} in a {message['role']} message would become a control token"
            return Dropped("special_token", row.where, says)
    try:
        prompt = render_prompt(tokenizer, row.prompt)
        answers = [render_completion(tokenizer, row.prompt, prompt, answer) for answer in row.answers.values()]
    except DataError as error:
        return Dropped("broken", row.where, str(error))
    return prompt, *answers


def _fitted(
    row: Row, texts: tuple[str, ...], ids: list[list[int]], data: dict[str, Any], stops: set[int]
) -> PreparedRow | Dropped:
    """The row within max_prompt_length and max_length, or why it can't be."""
    prompt_ids, *answer_ids = ids
    if len(prompt_ids) > data["max_prompt_length"]:
        says = f"prompt of {len(prompt_ids)} tokens, max_prompt_length is {data['max_prompt_length']}"
        return Dropped("prompt_too_long", row.where, says)
    answers = {}
    if answer_ids:
        room = data["max_length"] - len(prompt_ids)
        longest = max(len(answer) for answer in answer_ids)
        if longest > room and data["on_too_long"] == "drop":
            says = f"prompt and answer of {len(prompt_ids) + longest} tokens, max_length is {data['max_length']}"
            return Dropped("too_long", row.where, says)
        answers = {
            # What follows the last stop token (often a line break) may be cut without harm.
            part: Answer(text, answer[:room], max(0, len(answer) - room), not stops.isdisjoint(answer[room:]))
            for part, text, answer in zip(row.answers, texts[1:], answer_ids, strict=True)
        }
    if data["shape"] == "pairs" and answers["chosen"].ids == answers["rejected"].ids:
        says = f"chosen and rejected are equal once cut to max_length {data['max_length']}"
        return Dropped("identical_pair", row.where, says)
    return PreparedRow(row.id, row.where, texts[0], prompt_ids, answers, row.label, row.prompt, row.columns)


def _boundary_differs(tokenizer: Any, rows: list[PreparedRow]) -> int:
    special = special_tokens(tokenizer)
    return sum(_boundaries(tokenizer, rows[at : at + BATCH], special) for at in range(0, len(rows), BATCH))


def _boundaries(tokenizer: Any, rows: list[PreparedRow], special: re.Pattern[str]) -> int:
    """How many rows have an answer whose first tokens merge with the prompt's last ones when both are one text.

    Tokens merge locally, so a window around the boundary tells.
    """
    windows: list[list[tuple[str, str]]] = []
    for row in rows:
        tail = row.prompt[-WINDOW:]
        for found in special.finditer(tail):
            tail = tail[found.start() :]  # nothing merges across a special token
            break
        windows.append([(tail, answer.text[:WINDOW]) for answer in row.answers.values()])
    texts = list(dict.fromkeys(text for tail, head in chain(*windows) for text in (tail, head, tail + head)))
    ids = dict(zip(texts, tokenize(tokenizer, texts), strict=True))
    return sum(any(ids[tail + head] != ids[tail] + ids[head] for tail, head in of_row) for of_row in windows)


def sample(kept: list[PreparedRow], weights: list[float | None], seed: int) -> tuple[list[PreparedRow], list[Dropped]]:
    """As many rows of the sources that have weights as are in proportion to these, and those left out.

    None comes twice, so the source that has least for its weight keeps all of its own. The order of a hash of seed and
    row decides which are kept. DataError when a source that has a weight has no row.
    """
    by_source = {source: [row for row in kept if _source(row) == source] for source in range(len(weights))}
    weighed = {source: weight for source, weight in enumerate(weights) if weight is not None}
    for source, weight in weighed.items():
        if not by_source[source]:
            raise DataError(
                f"data.sources[{source}].weight: is {weight:g}, and no row of this source is left to sample"
            )
    most = min(len(by_source[source]) / weight for source, weight in weighed.items())
    left_out: dict[str, Dropped] = {}
    for source, weight in weighed.items():
        wanted = math.floor(weight * most + 1e-9)
        order = sorted(by_source[source], key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())
        says = f"beyond the {wanted} rows that weight {weight:g} gives its source"
        left_out |= {row.id: Dropped(SAMPLED_OUT, row.where, says) for row in order[wanted:]}
    return [row for row in kept if row.id not in left_out], list(left_out.values())


def _source(row: PreparedRow) -> int:
    return int(row.id.partition(":")[0])


def split(kept: list[PreparedRow], held_out: float, seed: int) -> set[str]:
    """The prompts held out: in the order of a hash of seed and prompt, until that fraction of rows is reached.

    All rows of a prompt are on one side, and a row that is added or taken away moves few others.
    """
    rows = Counter(row.prompt for row in kept)
    wanted = math.ceil(held_out * len(kept) - 1e-9)  # 0.07 * 100 is a little over 7 in floating point
    prompts: set[str] = set()
    taken = 0
    for prompt in sorted(rows, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest()):
        if taken >= wanted:
            break
        prompts.add(prompt)
        taken += rows[prompt]
    return prompts


# ---- what is written


def _metrics(
    shape: str,
    known: tuple[str, ...],
    rows_in: int,
    kept: list[PreparedRow],
    held_out: set[str],
    dropped: list[Dropped],
    lengths: dict[str, list[int]],
    boundary_differs: int,
) -> dict[str, Any]:
    lost, answers = Counter(row.reason for row in dropped), PARTS[shape][1:]
    assert rows_in == len(kept) + sum(lost.values()) and set(lost) <= set(known), "a row is not accounted for"
    held = sum(row.prompt in held_out for row in kept)
    metrics: dict[str, Any] = {
        "rows": {"in": rows_in, "out": len(kept), "train": len(kept) - held, "held_out": held},
        "dropped": {reason: lost[reason] for reason in known},
        "truncated": {part: sum(row.answers[part].cut > 0 for row in kept) for part in answers},
        "end_of_turn_lost": {part: sum(row.answers[part].lost for row in kept) for part in answers},
        "tokens": {part: _summary(sorted(lengths[part])) for part in PARTS[shape]},
    }
    if answers:
        metrics["boundary_differs"] = boundary_differs
    if shape == "labelled":
        labels = Counter(row.label for row in kept if row.prompt not in held_out)
        metrics["labels"] = {"true": labels[True], "false": labels[False]}  # of the rows to train on
    return metrics


def _summary(ordered: list[int]) -> dict[str, float]:
    """Percentiles are the nearest rank: a length that some row has."""
    if not ordered:
        return {"mean": 0.0, "p50": 0, "p95": 0, "max": 0}
    rank = {p: ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 95)}
    return {"mean": round(statistics.fmean(ordered), 2), "p50": rank[50], "p95": rank[95], "max": ordered[-1]}


def histogram(lengths: dict[str, list[int]]) -> str:
    """CSV of part, tokens (lower edge of a bin), rows. All parts have the same bins, at most 30 of equal width."""
    longest = max(chain.from_iterable(lengths.values()), default=0)
    width = max(1, math.ceil((longest + 1) / BINS))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["part", "tokens", "rows"])
    for part, of_part in lengths.items():
        rows = Counter(length // width for length in of_part)
        table.writerows([part, number * width, rows[number]] for number in range(longest // width + 1))
    return text.getvalue()


def _json_line(row: PreparedRow, shape: str) -> str:
    texts = {part: answer.text for part, answer in row.answers.items()}
    ids = {f"{part}_ids": answer.ids for part, answer in row.answers.items()}
    more: dict[str, Any] = {}
    if shape == "labelled":
        more = {"label": row.label}
    elif shape == "prompts":
        more = {"messages": row.messages, "columns": row.columns}
    line = json.dumps(
        {"id": row.id, "prompt": row.prompt, **texts, "prompt_ids": row.prompt_ids, **ids, **more},
        ensure_ascii=False,
    )
    # JSON allows these in a string, but str.splitlines() breaks lines at them.
    for character in "\x85\u2028\u2029":
        line = line.replace(character, f"\\u{ord(character):04x}")
    return line + "\n"


def accounting(metrics: dict[str, Any], dropped: list[Dropped]) -> str:
    """The table of what became of every row, with one dropped row of each reason."""
    rows, cut, lost = metrics["rows"], metrics["truncated"], metrics["end_of_turn_lost"]
    lines = [f"{'rows in':<18}{rows['in']:>8,}"]
    for reason, count in metrics["dropped"].items():
        if count:
            example = next(row for row in dropped if row.reason == reason)
            what = _printable(example.what.partition("\n")[0])
            lines.append(f"  {reason:<16}{-count:>8,}   {example.where}: {what[:120]}")
    lines.append(f"{'rows out':<18}{rows['out']:>8,}   {rows['train']:,} to train on, {rows['held_out']:,} held out")
    if labels := metrics.get("labels"):
        lines.append(f"  {'to train on':<16}{rows['train']:>8,}   {labels['true']:,} good, {labels['false']:,} bad")
    for part, count in cut.items():
        if count:
            lines.append(f"  {part + ' cut':<16}{count:>8,}   {lost[part]:,} lost the end-of-turn token")
    if metrics.get("boundary_differs"):
        says = "prompt and answer would be tokenised otherwise as one text"
        lines.append(f"  {'boundary':<16}{metrics['boundary_differs']:>8,}   {says}")
    for part, tokens in metrics["tokens"].items():
        lines.append(
            f"{part + ' tokens':<18}{tokens['mean']:>8,.0f}   on average; half up to {tokens['p50']:,}, "
            f"95 % up to {tokens['p95']:,}, longest {tokens['max']:,}"
        )
    return "\n".join(lines)


# ---- preview


def preview(
    settings: dict[str, Any], inputs: dict[str, Any], count: int, wide: bool = False, color: bool = False
) -> str:
    """The first `count` kept rows as the model will see them, then what became of all rows.

    Special tokens are reversed with `color`, else in ⟦ ⟧. Long texts are shortened in the middle unless `wide`.
    DataError as `run`.
    """
    prepared = prepare(settings, inputs)
    tokenizer = load_tokenizer(inputs["model"])
    special = special_tokens(tokenizer)
    shown = []
    for row in prepared.rows[:count]:
        part = "held out" if row.prompt in prepared.held_out else "to train on"
        label = "" if row.label is None else f", {'good' if row.label else 'bad'}"
        shown.append(_heading(f"row {row.id}  {row.where}  {part}{label}", color))
        shown.append(_part("prompt", len(row.prompt_ids), "", _marked(row.prompt, special, wide, color), color))
        for name, answer in row.answers.items():
            text, note = answer.text, ""
            if answer.cut:
                text = tokenizer.decode(answer.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                lost = ": its end-of-turn token is lost" if answer.lost else ""
                note = f", {answer.cut:,} more cut at max_length{lost}"
            shown.append(_part(name, len(answer.ids), note, _marked(text, special, wide, color), color))
        for name, value in row.columns.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown.append(_titled(f"column {_printable(name)}", _marked(text, special, wide, color), color))
    shown += [_heading("what became of the rows", color), accounting(prepared.metrics, prepared.dropped)]
    return "\n".join(shown) + "\n"


def _heading(text: str, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if color else f"==== {text}"


def _part(name: str, tokens: int, note: str, text: str, color: bool) -> str:
    return _titled(f"{name}: {tokens:,} token{'s' * (tokens != 1)}{note}", text, color)


def _titled(heading: str, text: str, color: bool) -> str:
    return (f"\x1b[2m{heading}\x1b[0m" if color else f"---- {heading}") + f"\n{text}"


def _marked(text: str, special: re.Pattern[str], wide: bool, color: bool) -> str:
    """Text for a terminal: special tokens stand out, control characters of the data are spelt out."""
    before, after = ("\x1b[7m", "\x1b[0m") if color else ("⟦", "⟧")
    if not wide and len(text) > 700:
        start, end = 400, len(text) - 200
        for found in special.finditer(text):  # none may be halved
            if found.start() < start < found.end():
                start = found.end()
            if found.start() < end < found.end():
                end = found.start()
        middle = f" [... {end - start:,} characters ...] "
        return _marked(text[:start], special, True, color) + middle + _marked(text[end:], special, True, color)
    pieces, end = [], 0
    for found in special.finditer(text):
        pieces += [_printable(text[end : found.start()]), before, found[0], after]
        end = found.end()
    return "".join([*pieces, _printable(text[end:])]).rstrip("\n")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
