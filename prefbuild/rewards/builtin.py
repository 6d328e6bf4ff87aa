"""The rewards that come with prefbuild. Each is a pure function of one completion.

Covered: Python's regular expressions. Not covered: a pattern that takes exponential time on some completion.
"""

import json
import re
import string
from decimal import Decimal
from typing import Any

from prefbuild.errors import StageError
from prefbuild.rewards.schema import SCRIPTS, Exact, Format, Json, Language, Length, Numeric, Regex, Repetition

NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
MARK = "####"
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def length(reward: Length, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """-|target - length|."""
    counts = {"characters": len(completion), "words": len(completion.split()), "tokens": num_tokens}
    return -float(abs(reward.target - counts[reward.unit]))


def regex(reward: Regex, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """1 when the pattern matches."""
    match = re.fullmatch if reward.match == "full" else re.search
    return float(match(reward.pattern, completion) is not None)


def format(reward: Format, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """1 when the whole completion matches, and no named part is blank."""
    found = re.fullmatch(reward.pattern, completion.strip(), re.DOTALL)
    return float(found is not None and all((part or "").strip() for part in found.groupdict().values()))


def exact(reward: Exact, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """1 when completion and column are equal once normalised."""
    return float(_normal(reward, completion) == _normal(reward, str(columns[reward.column])))


def _normal(reward: Exact, text: str) -> str:
    if reward.ignore_case:
        text = text.casefold()
    if reward.ignore_punctuation:
        text = text.translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(text.split()) if reward.ignore_white_space else text


def numeric(reward: Numeric, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """1 when the numbers are equal. StageError when the column holds none."""
    given = str(columns[reward.column])
    wanted = _marked(given) if MARK in given else _last(given)
    if wanted is None:
        raise StageError(f"reward numeric: column {reward.column} holds no number: {given[:80]!r}")
    found = _marked(completion) if reward.take == "marked" else _last(completion)
    return float(found is not None and abs(found - wanted) <= Decimal(str(reward.tolerance)))


def _marked(text: str) -> Decimal | None:
    _, mark, rest = text.rpartition(MARK)
    found = NUMBER.search(rest) if mark else None
    return Decimal(found[0].replace(",", "")) if found else None


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def repetition(reward: Repetition, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """Minus the share of word n-grams that came before; 0 for a text of fewer words."""
    words = completion.casefold().split()
    ngrams = list(zip(*(words[i:] for i in range(reward.ngram_size)), strict=False))
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def json_(reward: Json, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """1 when it is JSON, and an object with the keys if any are asked for."""
    try:
        value = json.loads(completion)
    except (ValueError, RecursionError):
        return 0.0
    if reward.keys is None:
        return 1.0
    if not isinstance(value, dict):
        return 0.0
    return float(all(key in value and _is(value[key], kind) for key, kind in reward.keys.items()))


def _is(value: Any, kind: str) -> bool:
    # Python's True is an int, JSON's is none.
    return isinstance(value, JSON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def language(reward: Language, completion: str, columns: dict[str, Any], num_tokens: int) -> float:
    """The share of letters that are of the script or alphabet."""
    letters = [letter for letter in completion if letter.isalpha()]
    if reward.alphabet is not None:
        known = set(reward.alphabet.lower())
        counted = sum(letter.lower() in known for letter in letters)
    else:
        ranges = SCRIPTS[str(reward.script)]
        counted = sum(any(low <= ord(letter) <= high for low, high in ranges) for letter in letters)
    return counted / len(letters) if letters else 0.0
