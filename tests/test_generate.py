"""prefbuild/generate.py: one question through the chat template."""

import json
import shutil
from pathlib import Path

import pytest

from prefbuild.errors import UsageError
from prefbuild.generate import generate

QUESTION = "What is the capital of France?"


def tokenizer_only(folder: Path, base: Path, template: str | None) -> Path:
    """A checkpoint without weights: enough to fail before they are loaded."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_greedy_answer_is_streamed_and_returned(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = generate(smollm2, QUESTION, None, max_new_tokens=8, temperature=0.0, seed=1, stream=True)
    assert "Paris" in answer
    assert capsys.readouterr().out.strip() == answer.strip()
    assert generate(smollm2, QUESTION, None, max_new_tokens=8, temperature=0.0, seed=2, stream=False) == answer
    assert capsys.readouterr().out == ""


def test_sampling_depends_on_the_seed(smollm2: Path) -> None:
    def sample(seed: int) -> str:
        return generate(smollm2, "Invent a name.", None, max_new_tokens=8, temperature=2.0, seed=seed, stream=False)

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first


def test_min_p_and_top_p_leave_unlikely_tokens_out(smollm2: Path) -> None:
    # Not compared with the greedy answer: in bf16 several tokens can be likeliest.
    wild = {"max_new_tokens": 8, "temperature": 4.0, "stream": False}
    assert "Paris" in generate(smollm2, QUESTION, min_p=1.0, **wild)
    assert "Paris" in generate(smollm2, QUESTION, top_p=1e-6, **wild)
    assert "Paris" not in generate(smollm2, QUESTION, **wild)


def test_missing_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"merged: holds no model; build it with `dvc repro`"):
        generate(tmp_path / "merged", QUESTION, None, max_new_tokens=1, temperature=0.0, seed=0, stream=False)


def test_model_without_chat_template_is_told(smollm2: Path, tmp_path: Path) -> None:
    folder = tokenizer_only(tmp_path / "plain", smollm2, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    with pytest.raises(UsageError, match=r"plain: .*chat.template"):
        generate(folder, QUESTION, None, max_new_tokens=1, temperature=0.0, seed=0, stream=False)


def test_refused_system_message_is_told(smollm2: Path, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    folder = tokenizer_only(tmp_path / "strict", smollm2, template)
    with pytest.raises(UsageError, match=r"refuses the messages \(system, user\): no system role"):
        generate(folder, QUESTION, "Be terse.", max_new_tokens=1, temperature=0.0, seed=0, stream=False)
