"""Score completions with a recipe's rewards, as training would: to try a reward before a GPU does.

A recipe of method reward has one reward, the model that it made.

Completions come from JSON Lines, {prompt, completion, and the columns that the rewards read}, or from a column of the
recipe's own rows. A user's Python file is run here as it is now, whatever the lock says.
"""

import json
import sys
from pathlib import Path
from typing import Any

from prefbuild.build import inputs_of
from prefbuild.errors import StageError, UsageError
from prefbuild.recipe import Recipe, known_recipes, load_recipes
from prefbuild.rewards import Scorer
from prefbuild.rewards.schema import Length, ModelReward

WIDTH = 48  # characters shown of a completion
Completion = dict[str, Any]  # where, prompt (messages), completion (text), columns


def try_rewards(root: Path, name: str, given: str, num_rows: int, column: str | None) -> str:
    """A table: each reward, its weight, and what it says of the first completions, with their total.

    `given` is a file, or - for stdin; with `column` the completions are in that column of the recipe's rows.
    UsageError: no such recipe, one without rewards, or rows that can't be used; StageError: a reward fails.
    """
    recipes = load_recipes(root)
    known_recipes([name], recipes)
    recipe = recipes[name]
    rewards: list[Any] = getattr(recipe.train, "rewards", [])
    if recipe.train.method == "reward":
        rewards = [ModelReward(reward="model", recipe=name)]
    if not rewards:
        raise UsageError(
            f"{name}: method {recipe.train.method} has no rewards; grpo and rloo have, and reward makes one"
        )
    rows = _own_rows(root, name, recipe, column) if column is not None else _given_rows(given)
    rows = rows[:num_rows]
    if not rows:
        raise UsageError(f"{given}: holds no completion; give JSON Lines of {{prompt, completion, ...columns}}")
    num_tokens = [0] * len(rows)
    if any(isinstance(reward, Length) and reward.unit == "tokens" for reward in rewards):
        num_tokens = _num_tokens(root, name, [row["completion"] for row in rows])
    scorers = [Scorer(reward) for reward in rewards]
    texts, columns = [row["completion"] for row in rows], [row["columns"] for row in rows]
    scores = [scorer([row["prompt"] for row in rows], texts, columns, num_tokens) for scorer in scorers]
    totals = [sum(s.weight * score[i] for s, score in zip(scorers, scores, strict=True)) for i in range(len(rows))]
    lines = [
        ["", *(scorer.name for scorer in scorers), "total", "completion"],
        ["weight", *(f"{scorer.weight:g}" for scorer in scorers), "", ""],
        *(
            [row["where"], *(f"{score[i]:g}" for score in scores), f"{totals[i]:g}", _short(row["completion"])]
            for i, row in enumerate(rows)
        ),
    ]
    return _table(lines)


def _given_rows(given: str) -> list[Completion]:
    """Rows of JSON Lines in a file, or in stdin."""
    try:
        text = sys.stdin.read() if given == "-" else Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{given}: {error.strerror}; give a file of JSON Lines, or - for stdin") from None
    shown = "stdin" if given == "-" else given
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{shown}:{number}: is not JSON: {error}; give one object a line") from None
            rows.append(_row(f"{shown}:{number}", value, "prompt", "completion"))
    return rows


def _own_rows(root: Path, name: str, recipe: Recipe, column: str) -> list[Completion]:
    """The recipe's rows, their completions in a column."""
    from prefbuild.rows import read_source

    _, inputs = inputs_of(root, "prepare", name)
    folders = inputs["data"]
    raws = [raw for i, folder in enumerate(folders) for raw in read_source(i, folder, len(folders) > 1)]
    return [_row(raw.where, raw.value, recipe.data.columns.prompt or "prompt", column) for raw in raws]


def _row(where: str, value: Any, prompt: str, completion: str) -> Completion:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is no object; give {{{prompt}, {completion}, ...columns}}")
    text = value.get(completion)
    if not isinstance(text, str):
        there = ", ".join(map(str, value))
        raise UsageError(f"{where}: {completion} is {type(text).__name__}, not text; there are {there}")
    messages = value.get(prompt, "")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"where": where, "prompt": messages, "completion": text, "columns": value}


def _num_tokens(root: Path, name: str, completions: list[str]) -> list[int]:
    """Tokens of each completion, by the base model's tokenizer."""
    from prefbuild.template import load_tokenizer, tokenize

    _, inputs = inputs_of(root, "prepare", name)
    if not inputs["model"].exists():
        raise StageError(f"{inputs['model']}: is not built, and length in tokens needs its tokenizer")
    return [len(ids) for ids in tokenize(load_tokenizer(inputs["model"]), completions)]


def _short(text: str) -> str:
    text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= WIDTH else text[: WIDTH - 2] + '.."'


def _table(lines: list[list[str]]) -> str:
    """Numbers to the right, the completion to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
