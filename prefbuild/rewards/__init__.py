"""Rewards: what a completion is worth, from its text and the row's columns. REWARDS holds what a recipe can name."""

from collections.abc import Callable
from typing import Any

from prefbuild.errors import StageError
from prefbuild.rewards import builtin, file
from prefbuild.rewards.schema import FileReward, ModelReward, columns_of, files_of

__all__ = ["REWARDS", "Scorer", "columns_of", "files_of"]

REWARDS: dict[str, Callable[[Any, str, dict[str, Any], int], float]] = {
    "length": builtin.length,  # -|target - length|, in characters, words or tokens
    "regex": builtin.regex,  # 1 when a pattern matches
    "format": builtin.format,  # 1 when the whole has a form with named parts, <think>..</think><answer>..</answer>
    "exact": builtin.exact,  # 1 when it equals a column
    "numeric": builtin.numeric,  # 1 when its last number, or the one after ####, is that of a column
    "repetition": builtin.repetition,  # minus the share of word n-grams that came before
    "json": builtin.json_,  # 1 when it is JSON with the keys wanted
    "language": builtin.language,  # share of letters of a script or an alphabet
}


class Scorer:
    """One reward of a recipe, ready to score: `scorer(prompts, completions, rows, num_tokens)`.

    `prompts` are lists of messages.
    """

    def __init__(self, reward: Any):
        """StageError when a user's file can't be loaded."""
        self.reward = reward
        self.name: str = reward.metric
        self.weight: float = reward.weight
        self._function = file.load(reward.path, reward.function) if isinstance(reward, FileReward) else None
        self._judge: Any = None
        if isinstance(reward, ModelReward):
            from prefbuild.rewards.model import Judge  # it reads rows' module, which reads methods', which reads this

            self._judge = Judge(reward.recipe)

    def __call__(
        self, prompts: list[Any], completions: list[str], rows: list[dict[str, Any]], num_tokens: list[int]
    ) -> list[float]:
        """A number a completion; `rows` hold the columns of each. StageError when it can't be told."""
        if self._judge is not None:
            return self._judge(prompts, completions)
        columns = columns_of([self.reward])
        for number, row in enumerate(rows, start=1):
            if missing := [column for column in columns if row.get(column) is None]:
                raise StageError(
                    f"reward {self.name}: row {number} has no {missing[0]}; it is null, or not in the data"
                )
        if self._function is not None:
            given = {column: [row[column] for row in rows] for column in columns}
            return file.call(self.reward.path, self.reward.function, self._function, prompts, completions, given)
        score = REWARDS[self.reward.reward]
        return [
            score(self.reward, completion, row, tokens)
            for completion, row, tokens in zip(completions, rows, num_tokens, strict=True)
        ]
