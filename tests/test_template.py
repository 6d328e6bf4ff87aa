"""prefbuild/template.py: what is rendered is what is generated from, and templates that break that are refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from prefbuild.errors import DataError
from prefbuild.rows import Message
from prefbuild.template import (
    check_template,
    generation_eos_ids,
    load_tokenizer,
    render,
    render_prompt,
    special_tokens,
    stop_ids,
    tokenize,
)

USER: Message = {"role": "user", "content": "Name a colour."}
BLUE: Message = {"role": "assistant", "content": "Blue."}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One BOS at the start (here <|endoftext|>), an end-of-turn token, no other special token: the shape of Mistral's.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}{{ raise_exception('no system messages here') }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(smollm2)


def with_template(tokenizer: Any, template: str, bos: str | None = "<|endoftext|>") -> Any:
    tokenizer.chat_template = template
    tokenizer.bos_token = bos
    return tokenizer


def test_prompt_and_completion(tokenizer: Any) -> None:
    prompt, completion = render(tokenizer, [{"role": "system", "content": "Be terse."}, USER], [BLUE])
    assert prompt == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert completion == "Blue.<|im_end|>\n"


def test_tokenising_adds_nothing(tokenizer: Any) -> None:
    ids = tokenize(tokenizer, ["<|im_start|>assistant\n", "Blue.<|im_end|>\n"])
    assert [ids[0][0], ids[1][-2]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [tokenizer.decode(part) for part in ids] == ["<|im_start|>assistant\n", "Blue.<|im_end|>\n"]
    assert tokenize(tokenizer, []) == []


def test_special_tokens_are_found_whole(tokenizer: Any) -> None:
    pattern = special_tokens(tokenizer)
    text = "a <repo_name> and <|im_end|><|im_end|> but not <|im_en|> or <b>"
    assert pattern.findall(text) == ["<repo_name>", "<|im_end|>", "<|im_end|>"]
    # Each of them does become one control token, and nothing else in the text does.
    special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert sum(token in special_ids for token in tokenize(tokenizer, [text])[0]) == 3


def test_special_tokens_that_start_alike_and_none_at_all() -> None:
    class Bare:
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens: list[str] = []

    assert special_tokens(Bare()).search("anything <s>") is None
    Bare.all_special_tokens = ["<s", "<s>"]
    assert special_tokens(Bare()).findall("<s> <s") == ["<s>", "<s"]


def test_todays_date_is_not_in_a_build(tokenizer: Any) -> None:
    plain = "\n" + CHATML
    with_template(tokenizer, plain + "{{ strftime_now('%d %b %Y, %Y-%m-%d, %A %-d %B') }}")
    dated = render_prompt(tokenizer, [USER])
    assert dated == render_prompt(with_template(tokenizer, plain), [USER]) + ("26 Jul 2024, 2024-07-26, Friday 26 July")


def test_an_answer_that_the_template_changes_is_refused(tokenizer: Any) -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    with_template(tokenizer, template)
    assert render(tokenizer, [USER], [BLUE])[1] == "Blue.<|im_end|>\n"
    with pytest.raises(DataError, match=re.escape("changes the answer's text: 'Hm.</think>Blue.' became")):
        render(tokenizer, [USER], [{"role": "assistant", "content": "Hm.</think>Blue."}])


def test_a_refusal_of_the_template_is_told(tokenizer: Any) -> None:
    with_template(tokenizer, INST)
    with pytest.raises(DataError, match=r"refuses the messages \(system, user\): no system messages here$"):
        render(tokenizer, [{"role": "system", "content": "Be terse."}, USER], [BLUE])


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(
    tokenizer: Any, smollm2: Path, tmp_path: Path
) -> None:
    assert generation_eos_ids(smollm2) == [2] and stop_ids(tokenizer, []) == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert generation_eos_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert generation_eos_ids(tmp_path) == [7, 8] and stop_ids(tokenizer, [7, 8]) == {2, 7, 8}
    (tmp_path / "generation_config.json").write_text("{}")
    assert generation_eos_ids(tmp_path) == []


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its tokenizer can't be loaded"):
        load_tokenizer(tmp_path)


# ---- conformance


def test_smollm2_conforms(tokenizer: Any, smollm2: Path) -> None:
    """Its BOS token opens every turn, which is not the error of writing BOS twice."""
    assert tokenizer.bos_token == "<|im_start|>"
    check_template(tokenizer, generation_eos_ids(smollm2))


@pytest.mark.parametrize(
    ("template", "bos"),
    [
        (CHATML, None),  # no BOS at all, as Qwen
        ("{{ bos_token }}" + CHATML, "<|endoftext|>"),
        (INST, "<|endoftext|>"),  # no system messages, no generation prompt
        (CHATML, "<|im_end|>"),  # one token opens and ends, as GPT-2
        # An assistant turn that opens with more than the generation prompt, as Qwen 3.
        (CHATML.replace("{{ m['content'] }}", "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
                        "{% endif %}{{ m['content'] }}"), None),
    ],
    ids=["no bos", "one bos", "inst", "bos is eos", "think"],
)  # fmt: skip
def test_templates_that_conform(tokenizer: Any, template: str, bos: str | None) -> None:
    check_template(with_template(tokenizer, template, bos), [])


@pytest.mark.parametrize(
    ("template", "bos", "says"),
    [
        (None, None, "has no chat template. Use an instruction-tuned base, or put a chat_template.jinja"),
        (
            "{{ messages | nonsense }}",
            None,
            "the chat template refuses the messages (user): No filter named 'nonsense'",
        ),
        (INST.replace("'user'", "'human'"), None, "the chat template refuses the messages (user): no system messages"),
        (
            CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
            None,
            "renders the prompt otherwise once an answer follows, so what is trained is not what is generated.\n"
            r"  prompt with add_generation_prompt: '<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant"
            r"\n<think>",
        ),
        (
            CHATML.partition("{% if add")[0],
            None,
            "rule `generation prompt`: the chat template takes no notice of add_generation_prompt",
        ),
        (
            CHATML.replace("<|im_end|>", ""),
            None,
            "rule `end of turn`: the completion must end in a stop token ('<|im_end|>'), or the model learns never to "
            r"stop; the chat template renders it as 'Green.\n'",
        ),
        # An end-of-turn token, but not one that stops generation.
        (CHATML.replace("<|im_end|>", "<|endoftext|>"), None, "rule `end of turn`: "),
        (CHATML.replace("<|im_end|>", "<|im_end|>."), None, "rule `end of turn`: "),
        (
            "{{ bos_token }}{{ bos_token }}" + CHATML,
            "<|endoftext|>",
            "rule `one BOS`: the chat template writes '<|endoftext|>' twice in a row: '<|endoftext|><|endoftext|><|im",
        ),
        ("{{ bos_token }}\n{{ bos_token }}" + CHATML, "<|endoftext|>", "writes '<|endoftext|>' 2 times: "),
        (
            CHATML.replace("{{ m['content'] }}", "{{ bos_token if m.role == 'assistant' }}{{ m.content }}"),
            "<|endoftext|>",
            "rule `one BOS`: the chat template writes '<|endoftext|>' into the completion: ",
        ),
        (
            "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2],
            None,
            "rule `nothing lost`: the chat template leaves out the system message 'Be terse.'",
        ),
        (
            # Only the last question is shown.
            "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
            "{% set ns.last = loop.index0 * 2 %}{% endfor %}" + CHATML.replace("in messages", "in messages[ns.last:]"),
            None,
            "rule `nothing lost`: the chat template leaves out the user message 'Name a colour.'",
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"),
            None,
            "the chat template changes the answer's text: 'Green.' became 'GREEN.<|im_end|>",
        ),
    ],
)
def test_templates_that_are_refused(tokenizer: Any, template: str | None, bos: str | None, says: str) -> None:
    tokenizer.chat_template = template
    tokenizer.bos_token = bos
    with pytest.raises(DataError) as error:
        check_template(tokenizer, [])
    assert says in str(error.value)


def test_no_stop_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither the tokenizer nor generation_config"):
        check_template(tokenizer, [])
    check_template(tokenizer, [2])
