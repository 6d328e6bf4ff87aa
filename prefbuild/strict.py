"""What every section of a recipe is: frozen, strict, and without unknown keys."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Wrong(ValueError):
    """A rule between several keys is broken; `key` is the one that the message points at."""

    def __init__(self, key: str, text: str):
        self.key = key
        super().__init__(text)


class Wrongs(ValueError):
    """Rules between sections are broken: for each the keys that lead to what is wrong, and the message."""

    def __init__(self, problems: list[tuple[tuple[str | int, ...], str]]):
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text in problems))
