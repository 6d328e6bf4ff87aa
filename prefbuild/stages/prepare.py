"""Stage `prepare`: rows of preference data become token ids to train on, and every row is accounted for.

Rows are read, mapped to messages, rendered with the model's own chat template, tokenised, cut to length and split
by prompt. The same inputs give the same bytes. Writes
    prepared/train.jsonl, held_out.jsonl   {id, prompt, chosen, rejected: rendered texts, whole;
                                            prompt_ids, chosen_ids, rejected_ids: as trained on, after the cut}
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
from prefbuild.rows import REASONS, Dropped, Row, fail_on_broken, read_rows
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
PARTS = ("prompt", "chosen", "rejected")
WINDOW = 100  # characters either side of the boundary between prompt and answer


@dataclass(frozen=True)
class Answer:
    """A rendered completion: `ids` are trained on, `cut` more were left out; `lost`: a stop token was among those."""

    text: str
    ids: list[int]
    cut: int
    lost: bool


@dataclass(frozen=True)
class Pair:
    """A row as it is trained on."""

    id: str
    where: str
    prompt: str
    prompt_ids: list[int]
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class Prepared:
    """All rows of a recipe: kept pairs in source order, the prompts held out, and what became of the other rows."""

    pairs: list[Pair]
    held_out: set[str]
    dropped: list[Dropped]
    metrics: dict[str, Any]
    lengths: dict[str, list[int]]


def run(settings: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Path], work: Path, name: str) -> None:
    """Prepare the rows of recipe `name`. DataError: columns, rows or a template that can't be used, or no row left."""
    prepared = prepare(settings, inputs)
    outputs["prepared"].mkdir(parents=True)
    for part, held_out in (("train", False), ("held_out", True)):
        lines = [_json_line(pair) for pair in prepared.pairs if (pair.prompt in prepared.held_out) == held_out]
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
    pairs, lengths, boundary_differs = _pairs(rows, dropped, data, tokenizer, stop_ids(tokenizer, eos_ids))
    fail_on_broken(data, dropped)

    held_out = split(pairs, data["held_out"], settings["seed"])
    metrics = _metrics(rows_in, pairs, held_out, dropped, lengths, boundary_differs)
    if metrics["rows"]["train"] == 0:
        lost = "no row is left" if not pairs else "every row is held out: there are too few prompts for this `held_out`"
        raise DataError(f"{lost}, so there is nothing to train on:\n{accounting(metrics, dropped)}")
    return Prepared(pairs, held_out, dropped, metrics, lengths)


def _pairs(
    rows: list[Row], dropped: list[Dropped], data: dict[str, Any], tokenizer: Any, stops: set[int]
) -> tuple[list[Pair], dict[str, list[int]], int]:
    """Render, tokenise and cut, adding to `dropped`.

    Returns the kept pairs, the lengths of all that were tokenised, and how many of the kept pairs would be tokenised
    otherwise if prompt and answer were one text.
    """
    from tqdm import tqdm

    pairs: list[Pair] = []
    lengths: dict[str, list[int]] = {part: [] for part in PARTS}
    special, seen, boundary_differs = special_tokens(tokenizer), set[tuple[str, ...]](), 0
    with tqdm(total=len(rows), desc="prepare", unit=" rows", file=sys.stderr, mininterval=1) as bar:
        for start in range(0, len(rows), BATCH):
            batch: list[tuple[Row, tuple[str, ...]]] = []
            for row in rows[start : start + BATCH]:
                texts = _rendered(row, tokenizer, special)
                if isinstance(texts, tuple) and data["drop_duplicates"] and texts in seen:
                    texts = Dropped("duplicate", row.where, "has the prompt and answers of an earlier row")
                if isinstance(texts, Dropped):
                    dropped.append(texts)
                else:
                    seen.add(texts)
                    batch.append((row, texts))
            ids = tokenize(tokenizer, [text for _, texts in batch for text in texts])
            before = len(pairs)
            for number, (row, texts) in enumerate(batch):
                token_ids = ids[3 * number : 3 * number + 3]
                for part, part_ids in zip(PARTS, token_ids, strict=True):
                    lengths[part].append(len(part_ids))
                pair = _fitted(row, texts, token_ids, data, stops)
                if isinstance(pair, Pair):
                    pairs.append(pair)
                else:
                    dropped.append(pair)
            boundary_differs += _boundary_differs(tokenizer, pairs[before:], special)
            bar.update(min(BATCH, len(rows) - start))
    return pairs, lengths, boundary_differs


def _rendered(row: Row, tokenizer: Any, special: re.Pattern[str]) -> tuple[str, ...] | Dropped:
    """Texts of prompt, chosen and rejected."""
    for message in (*row.prompt, *row.chosen, *row.rejected):
        if found := special.search(message["content"]):
            says = f"{found[0]!r} in a {message['role']} message would become a control token"
            return Dropped("special_token", row.where, says)
    try:
        prompt = render_prompt(tokenizer, row.prompt)
        answers = [render_completion(tokenizer, row.prompt, prompt, answer) for answer in (row.chosen, row.rejected)]
    except DataError as error:
        return Dropped("broken", row.where, str(error))
    return prompt, *answers


def _fitted(
    row: Row, texts: tuple[str, ...], ids: list[list[int]], data: dict[str, Any], stops: set[int]
) -> Pair | Dropped:
    """The pair within max_prompt_length and max_length, or why it can't be."""
    prompt_ids, *answer_ids = ids
    if len(prompt_ids) > data["max_prompt_length"]:
        says = f"prompt of {len(prompt_ids)} tokens, max_prompt_length is {data['max_prompt_length']}"
        return Dropped("prompt_too_long", row.where, says)
    room = data["max_length"] - len(prompt_ids)
    longest = max(len(answer) for answer in answer_ids)
    if longest > room and data["on_too_long"] == "drop":
        says = f"prompt and answer of {len(prompt_ids) + longest} tokens, max_length is {data['max_length']}"
        return Dropped("too_long", row.where, says)
    chosen, rejected = (
        # What follows the last stop token (often a line break) may be cut without harm.
        Answer(text, answer[:room], max(0, len(answer) - room), not stops.isdisjoint(answer[room:]))
        for text, answer in zip(texts[1:], answer_ids, strict=True)
    )
    if chosen.ids == rejected.ids:
        says = f"chosen and rejected are equal once cut to max_length {data['max_length']}"
        return Dropped("identical_pair", row.where, says)
    return Pair(row.id, row.where, texts[0], prompt_ids, chosen, rejected)


def _boundary_differs(tokenizer: Any, pairs: list[Pair], special: re.Pattern[str]) -> int:
    """How many pairs have an answer whose first tokens merge with the prompt's last ones when both are one text.

    Tokens merge locally, so a window around the boundary tells.
    """
    windows = []
    for pair in pairs:
        tail = pair.prompt[-WINDOW:]
        for found in special.finditer(tail):
            tail = tail[found.start() :]  # nothing merges across a special token
            break
        windows += [(tail, answer.text[:WINDOW]) for answer in (pair.chosen, pair.rejected)]
    texts = list(dict.fromkeys(chain.from_iterable((tail, head, tail + head) for tail, head in windows)))
    ids = dict(zip(texts, tokenize(tokenizer, texts), strict=True))
    differs = [ids[tail + head] != ids[tail] + ids[head] for tail, head in windows]
    return sum(chosen or rejected for chosen, rejected in zip(differs[::2], differs[1::2], strict=True))


def split(pairs: list[Pair], held_out: float, seed: int) -> set[str]:
    """The prompts held out: in the order of a hash of seed and prompt, until that fraction of rows is reached.

    All rows of a prompt are on one side, and a row that is added or taken away moves few others.
    """
    rows = Counter(pair.prompt for pair in pairs)
    wanted = math.ceil(held_out * len(pairs) - 1e-9)  # 0.07 * 100 is a little over 7 in floating point
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
    rows_in: int,
    pairs: list[Pair],
    held_out: set[str],
    dropped: list[Dropped],
    lengths: dict[str, list[int]],
    boundary_differs: int,
) -> dict[str, Any]:
    reasons = Counter(row.reason for row in dropped)
    assert rows_in == len(pairs) + sum(reasons.values()) and set(reasons) <= set(REASONS), "a row is not accounted for"
    held = sum(pair.prompt in held_out for pair in pairs)
    return {
        "rows": {"in": rows_in, "out": len(pairs), "train": len(pairs) - held, "held_out": held},
        "dropped": {reason: reasons[reason] for reason in REASONS},
        "truncated": {
            "chosen": sum(pair.chosen.cut > 0 for pair in pairs),
            "rejected": sum(pair.rejected.cut > 0 for pair in pairs),
        },
        "end_of_turn_lost": {
            "chosen": sum(pair.chosen.lost for pair in pairs),
            "rejected": sum(pair.rejected.lost for pair in pairs),
        },
        "tokens": {part: _summary(sorted(lengths[part])) for part in PARTS},
        "boundary_differs": boundary_differs,
    }


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
    for part in PARTS:
        rows = Counter(length // width for length in lengths[part])
        table.writerows([part, number * width, rows[number]] for number in range(longest // width + 1))
    return text.getvalue()


def _json_line(pair: Pair) -> str:
    line = json.dumps(
        {
            "id": pair.id,
            "prompt": pair.prompt,
            "chosen": pair.chosen.text,
            "rejected": pair.rejected.text,
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen.ids,
            "rejected_ids": pair.rejected.ids,
        },
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
    for part in ("chosen", "rejected"):
        if cut[part]:
            lines.append(f"  {part + ' cut':<16}{cut[part]:>8,}   {lost[part]:,} lost the end-of-turn token")
    if metrics["boundary_differs"]:
        says = "prompt and answer would be tokenised otherwise as one text"
        lines.append(f"  {'boundary':<16}{metrics['boundary_differs']:>8,}   {says}")
    for part in PARTS:
        tokens = metrics["tokens"][part]
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
    for pair in prepared.pairs[:count]:
        part = "held out" if pair.prompt in prepared.held_out else "to train on"
        shown.append(_heading(f"row {pair.id}  {pair.where}  {part}", color))
        shown.append(_part("prompt", len(pair.prompt_ids), "", _marked(pair.prompt, special, wide, color), color))
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            text, note = answer.text, ""
            if answer.cut:
                text = tokenizer.decode(answer.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                lost = ": its end-of-turn token is lost" if answer.lost else ""
                note = f", {answer.cut:,} more cut at max_length{lost}"
            shown.append(_part(name, len(answer.ids), note, _marked(text, special, wide, color), color))
    shown += [_heading("what became of the rows", color), accounting(prepared.metrics, prepared.dropped)]
    return "\n".join(shown) + "\n"


def _heading(text: str, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if color else f"==== {text}"


def _part(name: str, tokens: int, note: str, text: str, color: bool) -> str:
    heading = f"{name}: {tokens:,} token{'s' * (tokens != 1)}{note}"
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
