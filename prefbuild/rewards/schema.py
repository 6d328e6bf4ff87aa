"""What a recipe may write under `train: rewards:`: one class a reward."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Union

from pydantic import AfterValidator, Field, model_validator

from prefbuild.strict import Strict, Wrong

# Letters of a script, as ranges of Unicode code points. Digits, signs and white space belong to none.
SCRIPTS = {
    "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "devanagari": ((0x0900, 0x097F), (0xA8E0, 0xA8FF)),
    "greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "han": ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "hebrew": ((0x0590, 0x05FF), (0xFB1D, 0xFB4F)),
    "japanese": ((0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xFF66, 0xFF9F)),
    "latin": ((0x0041, 0x007A), (0x00AA, 0x00AA), (0x00BA, 0x00BA), (0x00C0, 0x024F), (0x1E00, 0x1EFF)),
    "thai": ((0x0E00, 0x0E7F),),
}  # fmt: skip
Script = Literal[
    "arabic", "cyrillic", "devanagari", "greek", "han", "hangul", "hebrew", "japanese", "latin", "thai"
]  # fmt: skip
JsonType = Literal["string", "number", "integer", "boolean", "array", "object", "null"]


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression of Python's: {error}") from None
    return pattern


def _named_parts(pattern: str) -> str:
    if not re.compile(_regex(pattern)).groupindex:
        raise ValueError("names no part; write (?P<answer>.*) around each, or use the reward regex")
    return pattern


def _python_file(path: str) -> str:
    parts = PurePosixPath(path).parts
    if "\0" in path or "\\" in path or ".." in parts or parts[:1] != ("recipes",) or not path.endswith(".py"):
        raise ValueError("is no .py file below recipes/; put it there, where it is committed with the recipe")
    return path


Pattern = Annotated[str, AfterValidator(_regex)]


class _Reward(Strict):
    """What every reward has."""

    weight: float = Field(default=1.0, description="The reward is multiplied by this, and the rewards are summed.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="What its metric is called. Default: the reward's own name.",
    )

    @property
    def metric(self) -> str:
        """The name that its metric has under `rewards`."""
        return self.name or self.reward  # type: ignore[attr-defined]


class Length(_Reward):
    """-|target - length|: nearer is better."""

    reward: Literal["length"] = Field(description="Minus the distance of the completion's length from a target.")
    target: int = Field(ge=1, description="The length wanted.")
    unit: Literal["characters", "words", "tokens"] = Field(
        default="characters", description="What is counted. Tokens are those generated, without the stop token."
    )


class Regex(_Reward):
    """1 when a regular expression matches, else 0."""

    reward: Literal["regex"] = Field(description="1 when a pattern matches the completion, else 0.")
    pattern: Pattern = Field(description="A regular expression of Python's; (?s) lets the dot match line breaks.")
    match: Literal["search", "full"] = Field(default="search", description="Somewhere in the completion, or all of it.")


class Format(_Reward):
    """1 when the whole completion has a form whose named parts are not blank, else 0."""

    reward: Literal["format"] = Field(description="1 when the completion has a form with named parts, else 0.")
    pattern: Annotated[str, AfterValidator(_named_parts)] = Field(
        default=r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>",
        description="A regular expression for the whole completion, white space around it aside. The dot matches line "
        "breaks, and no named part may be blank.",
    )


class Exact(_Reward):
    """1 when the completion is what a column says, else 0."""

    reward: Literal["exact"] = Field(description="1 when the completion equals a column, else 0.")
    column: str = Field(description="The column with the answer.")
    ignore_case: bool = Field(default=True, description="Capitals count as small letters.")
    ignore_white_space: bool = Field(default=True, description="Runs of white space count as one space, at ends none.")
    ignore_punctuation: bool = Field(default=False, description="Punctuation does not count.")


class Numeric(_Reward):
    """1 when the completion's number is the column's, else 0."""

    reward: Literal["numeric"] = Field(description="1 when the completion's number equals a column's, else 0.")
    column: str = Field(description="The column with the number, or a text such as GSM8K's that ends in #### 72.")
    take: Literal["last", "marked"] = Field(
        default="last", description="The completion's last number, or the first one after its last ####."
    )
    tolerance: float = Field(default=0.0, ge=0, description="Numbers that differ by no more than this are equal.")


class Repetition(_Reward):
    """0 when no run of words comes twice, -1 when all are the same."""

    reward: Literal["repetition"] = Field(description="Minus the share of word n-grams that came before.")
    ngram_size: int = Field(default=3, ge=1, description="Words in a run.")


class Json(_Reward):
    """1 when the completion is JSON with the keys wanted, else 0."""

    reward: Literal["json"] = Field(description="1 when the completion is valid JSON, else 0.")
    keys: dict[str, JsonType] | None = Field(
        default=None, description="Keys that the object must have, and the type of each, as in {name: string}."
    )


class Language(_Reward):
    """The share of letters that belong to a script or an alphabet."""

    reward: Literal["language"] = Field(description="Share of the letters that are of a script; 0 without letters.")
    script: Script | None = Field(default=None, description="The script. Japanese is kana and Han.")
    alphabet: str | None = Field(
        default=None, min_length=1, description="The letters, as in abcdefghijklmnopqrstuvwxyzäöüß; capitals count too."
    )

    @model_validator(mode="after")
    def _one_set(self) -> "Language":
        if self.script is None and self.alphabet is None:
            raise Wrong("script", "missing, and so is alphabet; give one of them, which says what letters count")
        if self.script is not None and self.alphabet is not None:
            raise Wrong("script", "says what letters count, and so does alphabet; give one of them")
        return self


class FileReward(_Reward):
    """A function of a Python file of the project, whose digest the lock pins."""

    reward: Literal["file"] = Field(description="A function of yours, in a file that the lock pins.")
    path: Annotated[str, AfterValidator(_python_file)] = Field(description="The Python file, below recipes/.")
    function: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Its function: f(prompts, completions, **columns) -> a list of numbers, one a completion.",
    )
    columns: list[str] = Field(default=[], description="Columns of the data that the function is given.")

    @property
    def metric(self) -> str:
        """The name that its metric has under `rewards`."""
        return self.name or self.function

    @model_validator(mode="after")
    def _no_column_in_the_way(self) -> "FileReward":
        for column in self.columns:
            if column in ("prompts", "completions") or not column.isidentifier():
                raise Wrong("columns", f"{column!r} can't be an argument of a function; rename the column in the data")
        return self


class ModelReward(_Reward):
    """The score of a reward model: another recipe's, of method reward."""

    reward: Literal["model"] = Field(description="The score that a reward model of another recipe gives.")
    recipe: str = Field(description="The other recipe's name; its method is reward.")

    @property
    def metric(self) -> str:
        """The name that its metric has under `rewards`."""
        return self.name or re.sub(r"\W", "_", self.recipe)


Reward = Annotated[
    Union[Length, Regex, Format, Exact, Numeric, Repetition, Json, Language, FileReward, ModelReward],
    Field(discriminator="reward"),
]


def columns_of(rewards: list[Reward]) -> list[str]:
    """The columns that rewards read, sorted."""
    read: set[str] = set()
    for reward in rewards:
        if isinstance(reward, Exact | Numeric):
            read.add(reward.column)
        elif isinstance(reward, FileReward):
            read.update(reward.columns)
    return sorted(read)


def files_of(rewards: list[Reward]) -> list[str]:
    """The Python files that rewards are in, sorted."""
    return sorted({reward.path for reward in rewards if isinstance(reward, FileReward)})


def models_of(rewards: list[Reward]) -> list[str]:
    """The recipes whose reward models are asked, sorted."""
    return sorted({reward.recipe for reward in rewards if isinstance(reward, ModelReward)})
