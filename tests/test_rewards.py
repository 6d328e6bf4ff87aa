"""What rewards make of completions, and what is said of a user's file that can't be used."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from prefbuild.errors import StageError
from prefbuild.rewards import REWARDS, Scorer, columns_of, files_of
from prefbuild.rewards.file import verify
from prefbuild.rewards.schema import SCRIPTS, Reward, Script


def make(**keys: Any) -> Any:
    return TypeAdapter(Reward).validate_python(keys)


def score(completion: str, *, row: dict[str, Any] | None = None, num_tokens: int = 0, **keys: Any) -> float:
    return Scorer(make(**keys))([[]], [completion], [row or {}], [num_tokens])[0]


@pytest.mark.parametrize(
    ("keys", "completion", "wanted"),
    [
        ({"target": 50}, "x" * 50, 0.0),
        ({"target": 50}, "", -50.0),
        ({"target": 50}, "x" * 80, -30.0),
        ({"target": 2}, "ä😀", 0.0),
        ({"target": 3, "unit": "words"}, " one\ntwo  three four", -1.0),
        ({"target": 3, "unit": "tokens"}, "whatever", -4.0),
    ],
)
def test_length_is_minus_the_distance_from_the_target(keys: dict, completion: str, wanted: float) -> None:
    assert score(completion, reward="length", num_tokens=7, **keys) == wanted


@pytest.mark.parametrize(
    ("match", "completion", "wanted"),
    [("search", "it is 42.", 1), ("search", "it is so", 0), ("full", "42", 1), ("full", "it is 42", 0)],
)
def test_regex_matches_somewhere_or_all(match: str, completion: str, wanted: float) -> None:
    assert score(completion, reward="regex", pattern=r"\d+", match=match) == wanted


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("<think>six\nsevens</think>\n<answer>42</answer>\n", 1),
        ("<think> </think><answer>42</answer>", 0),
        ("<think>x</think><answer>42</answer> so", 0),
        ("<answer>42</answer>", 0),
    ],
)
def test_format_wants_every_part_and_nothing_around(completion: str, wanted: float) -> None:
    assert score(completion, reward="format") == wanted


@pytest.mark.parametrize(
    ("keys", "completion", "wanted"),
    [
        ({}, "  new\n YORK ", 1),
        ({}, "New York.", 0),
        ({"ignore_punctuation": True}, "New York.", 1),
        ({"ignore_case": False}, "new york", 0),
        ({"ignore_white_space": False}, "New  York", 0),
    ],
)
def test_exact_ignores_what_it_is_told_to(keys: dict, completion: str, wanted: float) -> None:
    assert score(completion, reward="exact", column="city", row={"city": "New York"}, **keys) == wanted


@pytest.mark.parametrize(
    ("keys", "completion", "answer", "wanted"),
    [
        ({}, "6 times 7 is 42.", "so\n#### 42", 1),
        ({}, "It is $1,250.50 in all", "#### 1250.5", 1),
        ({}, "42, that is 6 times 7", "#### 42", 0),
        ({"take": "marked"}, "6\n#### 42 apples of 50", "#### 42", 1),
        ({"take": "marked"}, "it is 42", "#### 42", 0),
        ({}, "minus: -3", "-3", 1),
        ({}, "5-3", "3", 1),
        ({}, "v1.2.3", 3, 0),
        ({}, "none", 0, 0),
        ({"tolerance": 0.01}, "3.14", 3.1415, 1),
        ({}, "3.14", 3.1415, 0),
        ({}, "12,34", 34, 1),
    ],
)
def test_numeric_compares_numbers(keys: dict, completion: str, answer: Any, wanted: float) -> None:
    assert score(completion, reward="numeric", column="answer", row={"answer": answer}, **keys) == wanted


def test_gsm8k_answers_are_their_own_reward(real_data: Path) -> None:
    import json

    lines = (real_data / "prompts/gsm8k_train_1000.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert score(row["answer"], reward="numeric", column="answer", row=row, take="marked") == 1
        assert score(row["answer"] + "\nso no: 123456789", reward="numeric", column="answer", row=row) == 0


def test_a_column_without_a_number_is_an_error() -> None:
    with pytest.raises(StageError, match=r"reward numeric: column answer holds no number: 'many'"):
        score("42", reward="numeric", column="answer", row={"answer": "many"})


def test_a_row_without_the_column_is_an_error() -> None:
    with pytest.raises(StageError, match=r"reward right: row 1 has no answer; it is null, or not in the data"):
        score("42", reward="exact", name="right", column="answer", row={"answer": None})


@pytest.mark.parametrize(
    ("completion", "wanted"), [("a b c d", 0), ("a b", 0), ("", 0), ("a A a a", -0.5), ("a b c a b c", -0.25)]
)
def test_repetition_counts_ngrams_that_came_before(completion: str, wanted: float) -> None:
    assert score(completion, reward="repetition") == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("keys", "completion", "wanted"),
    [
        (None, "[1]", 1),
        (None, "{'a': 1}", 0),
        (None, "[" * 100_000, 0),
        ({"name": "string", "age": "integer"}, '{"name": "Ann", "age": 7, "more": []}', 1),
        ({"name": "string", "age": "integer"}, '{"name": "Ann", "age": "7"}', 0),
        ({"age": "integer"}, '{"age": true}', 0),
        ({"age": "number"}, "[]", 0),
        ({"ok": "boolean"}, '{"ok": true}', 1),
        ({"ok": "null"}, '{"ok": null}', 1),
    ],
)
def test_json_wants_the_keys_and_their_types(keys: Any, completion: str, wanted: float) -> None:
    assert score(completion, reward="json", keys=keys) == wanted


@pytest.mark.parametrize(
    ("keys", "completion", "wanted"),
    [
        ({"script": "latin"}, "Grüße, 123!", 1),
        ({"script": "cyrillic"}, "Да yes", 0.4),
        ({"script": "japanese"}, "日本語です", 1),
        ({"script": "greek"}, "123 !", 0),
        ({"alphabet": "abcdefghijklmnopqrstuvwxyz"}, "Über", 0.75),
    ],
)
def test_language_is_the_share_of_letters(keys: dict, completion: str, wanted: float) -> None:
    assert score(completion, reward="language", **keys) == wanted


def test_every_script_has_ranges_and_every_reward_a_function() -> None:
    from typing import get_args

    assert set(get_args(Script)) == set(SCRIPTS)
    kinds = {get_args(one.model_fields["reward"].annotation)[0] for one in get_args(get_args(Reward)[0])}
    assert kinds == {*REWARDS, "file", "model"}


def test_columns_and_files_are_those_that_rewards_name() -> None:
    rewards = [
        make(reward="numeric", column="answer"),
        make(reward="file", path="recipes/b.py", function="score", columns=["level", "answer"]),
        make(reward="length", target=3),
    ]
    assert columns_of(rewards) == ["answer", "level"]
    assert files_of(rewards) == ["recipes/b.py"]


# ---- a user's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes recipes/own.py and scores two completions with its function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()

    def run(text: str, function: str = "score", columns: tuple[str, ...] = ()) -> list[float]:
        (tmp_path / "recipes/own.py").write_text(text)
        reward = make(reward="file", path="recipes/own.py", function=function, columns=list(columns))
        prompts = [[{"role": "user", "content": f"prompt {i}"}] for i in range(2)]
        return Scorer(reward)(prompts, ["one", "three"], [{"n": 1, "m": 0}, {"n": 2, "m": 0}], [1, 1])

    return run


def test_a_file_is_given_prompts_completions_and_its_columns(own: Any, tmp_path: Path) -> None:
    text = """\
def score(prompts, completions, n):
    assert [p[0]["content"] for p in prompts] == ["prompt 0", "prompt 1"]
    return [len(c) * k for c, k in zip(completions, n)]
"""
    assert own(text, columns=("n",)) == [3.0, 10.0]
    assert not (tmp_path / "recipes/__pycache__").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def score(prompts, completions):\n    return [1]",
            "recipes/own.py: score: returned 1 values for 2 completions",
        ),
        (
            "def score(prompts, completions):\n    return [1, None]",
            "recipes/own.py: score: row 2: returned None for the completion 'three'; a finite number is wanted",
        ),
        (
            "def score(prompts, completions):\n    return [float('nan'), 1]",
            "recipes/own.py: score: row 1: returned nan",
        ),
        ("def score(prompts, completions):\n    return 3", "recipes/own.py: score: returned int"),
        (
            "def score(prompts, completions):\n    a = 1\n    return helper(completions)\ndef helper(x):\n    return x[9]",
            "recipes/own.py:5: score: IndexError: list index out of range",
        ),
        ("def score(prompts):\n    return []", "recipes/own.py: score: TypeError: score() got an unexpected keyword"),
        ("x = (\n", "recipes/own.py:1: SyntaxError"),
        ("a = 1\nimport no_such_module\n", "recipes/own.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def other(prompts, completions): ...", "recipes/own.py: has no function score; there are other"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(own: Any, text: str, message: str) -> None:
    with pytest.raises(StageError) as caught:
        own(text)
    assert str(caught.value).startswith(message)


def test_a_file_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"^recipes/own.py: no such file"):
        Scorer(make(reward="file", path="recipes/own.py", function="score"))


def test_a_file_that_changed_since_it_was_locked_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefbuild.artifact import sha256_file

    monkeypatch.chdir(tmp_path)
    path = Path("own.py")
    path.write_text("x = 1\n")
    pin = {"path": "own.py", "size": 6, "sha256": sha256_file(path)}
    verify([pin])
    path.write_text("x = 2\n")
    with pytest.raises(StageError, match="^own.py: changed since it was locked; run `prefbuild lock`"):
        verify([pin])
    path.unlink()
    with pytest.raises(StageError, match="^own.py: is gone since it was locked"):
        verify([pin])
