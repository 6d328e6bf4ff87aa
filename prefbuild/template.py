"""Render messages with a tokenizer's own chat template.

`check_template` refuses a template that would train something else than what is generated later: the prompt must be
what generation starts from, and the answer must end in a token that stops generation. Rendered text holds its special
tokens already, so it is always tokenised with add_special_tokens=False.
"""

import json
import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefbuild.errors import DataError
from prefbuild.rows import Message

# Some templates (Llama 3) print today's date; a build may not depend on the day. This is the date they fall back on.
FIXED_DATE = datetime(2024, 7, 26)
DATE_CODES = ("%-d", "%d", "%a", "%A", "%b", "%B", "%m", "%y", "%Y", "%H", "%M", "%S", "%j")


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a checkpoint folder, from its files alone. DataError when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{model}: its tokenizer can't be loaded: {error}") from None


def padding_tokenizer(model: Path) -> Any:
    """The same with a token to pad with: the end of the sequence's, where it has none of its own."""
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_eos_ids(model: Path) -> list[int]:
    """Token ids that stop generation: of generation_config.json, else config.json; [] when neither says."""
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            ids = json.loads((model / name).read_text(encoding="utf-8")).get("eos_token_id")
            return ids if isinstance(ids, list) else [ids] * (ids is not None)
    return []


def stop_ids(tokenizer: Any, generation_config_eos_ids: list[int]) -> set[int]:
    """The tokenizer's end-of-sequence id and those of the generation config."""
    return {*generation_config_eos_ids} | ({tokenizer.eos_token_id} - {None})


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the literal text of any special token; such text in a row would become a control token."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    # Longest first, or a token that starts like another would be matched in half. (?!) never matches.
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=lambda t: (-len(t), t)) if text) or "(?!)")


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered texts; nothing is added to them."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


# ---- rendering


def render_prompt(tokenizer: Any, messages: list[Message]) -> str:
    """What generation starts from: the messages and the opening of the assistant's turn. DataError as in `render`."""
    return _apply(tokenizer, messages, True)


def render(tokenizer: Any, prompt_messages: list[Message], completion_messages: list[Message]) -> tuple[str, str]:
    """(prompt, completion) as text, special tokens included.

    DataError when the template refuses the messages, when the rendered prompt is not how the rendered conversation
    starts, or when the completion's own words are changed.
    """
    prompt = render_prompt(tokenizer, prompt_messages)
    return prompt, render_completion(tokenizer, prompt_messages, prompt, completion_messages)


def render_completion(tokenizer: Any, prompt_messages: list[Message], prompt: str, completion: list[Message]) -> str:
    """The completion after `prompt`, which is what `render_prompt` makes of those messages. DataError as `render`."""
    whole = _apply(tokenizer, prompt_messages + completion, False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the prompt otherwise once an answer follows, so what is trained is not what is "
            f"generated.\n  prompt with add_generation_prompt: {_shown(prompt)}\n  whole conversation: {_shown(whole)}"
        )
    rendered = whole[len(prompt) :]
    for message in completion:
        # Templates of reasoning models cut text before </think>.
        if message["content"].strip() not in rendered:
            raise DataError(
                f"the chat template changes the answer's text: {_shown(message['content'])} became {_shown(rendered)}"
            )
    return rendered


def dated_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, with the date that it prints, if any, fixed: to pass as `chat_template`.

    transformers turns functions among a template's arguments into text, so strftime_now is shadowed by a macro.
    """
    template: str = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('{code}', '{FIXED_DATE.strftime(code)}')" for code in DATE_CODES)
    # With trim_blocks the line break goes, and only that: what the template starts with is left alone.
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + template


def _apply(tokenizer: Any, messages: list[Message], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=dated_template(tokenizer),
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses the messages ({roles}): {error}") from None
    return text


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 600 else f"{text[:300]!r} ... {text[-300:]!r}"


# ---- conformance

_SYSTEM: Message = {"role": "system", "content": "Be terse."}
_FIRST: list[Message] = [{"role": "user", "content": "Name a colour."}]
_LATER: list[Message] = [
    *_FIRST,
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one?"},
]
_ANSWER: list[Message] = [{"role": "assistant", "content": "Green."}]


def check_template(tokenizer: Any, generation_config_eos_ids: list[int]) -> None:
    """Render fixed conversations, with and without a system message and earlier turns, and hold them to the rules.

    1. there is a template, and it renders a conversation;
    2. the rendered prompt is how the rendered conversation starts, and its last part opens the assistant's turn;
    3. the text of every message is in it (a template may refuse a system message, but not drop it);
    4. the completion ends in a stop token, white space aside;
    5. the BOS token comes at most once, or, when it opens every turn, never twice in a row; never in a completion.

    DataError names the rule and shows the text.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the base model's tokenizer has no chat template. Use an instruction-tuned base, or put a "
            "chat_template.jinja into the checkpoint folder"
        )
    stops = stop_ids(tokenizer, generation_config_eos_ids)
    if not stops:
        raise DataError(
            "neither the tokenizer nor generation_config.json names an end-of-sequence token, so nothing would stop an "
            "answer. Set eos_token in the checkpoint's tokenizer_config.json"
        )

    counts = {}  # BOS tokens in a rendered conversation, by its number of messages
    for messages in (_FIRST, _LATER, [_SYSTEM, *_FIRST], [_SYSTEM, *_LATER]):
        try:
            render_prompt(tokenizer, messages)
        except DataError:
            if messages[0]["role"] == "system":
                continue  # rows with a system message are then broken, and say so
            raise
        prompt, completion = render(tokenizer, messages, _ANSWER)
        _check_text(tokenizer, messages, prompt, completion)
        _check_stop(tokenizer, stops, completion)
        if tokenizer.bos_token_id is not None:
            ids, completion_ids = tokenize(tokenizer, [prompt + completion, completion])
            counts[len(messages)] = (ids.count(tokenizer.bos_token_id), prompt + completion)
            _check_bos(tokenizer, stops, ids, completion_ids, prompt + completion)
    if counts:
        bos_opens_turns = counts[len(_LATER)][0] > counts[len(_FIRST)][0]
        for count, text in counts.values():
            if count > 1 and not bos_opens_turns:
                raise _bos_error(tokenizer, f"{count} times", text)


def _check_text(tokenizer: Any, messages: list[Message], prompt: str, completion: str) -> None:
    for message in messages:
        if message["content"] not in prompt:
            raise DataError(
                f"rule `nothing lost`: the chat template leaves out the {message['role']} message "
                f"{message['content']!r}: {_shown(prompt)}"
            )
    opening = completion[: completion.index(_ANSWER[0]["content"])]
    if special_tokens(tokenizer).search(opening) and prompt == _apply(tokenizer, messages, False):
        raise DataError(
            "rule `generation prompt`: the chat template takes no notice of add_generation_prompt, so the model would "
            f"be trained to open its own turn. Prompt: {_shown(prompt)}, completion: {_shown(completion)}"
        )


def _check_stop(tokenizer: Any, stops: set[int], completion: str) -> None:
    if tokenize(tokenizer, [completion.rstrip()])[0][-1] not in stops:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops))
        raise DataError(
            f"rule `end of turn`: the completion must end in a stop token ({names}), or the model learns never to "
            f"stop; the chat template renders it as {_shown(completion)}"
        )


def _check_bos(tokenizer: Any, stops: set[int], ids: list[int], completion_ids: list[int], text: str) -> None:
    bos = tokenizer.bos_token_id
    if any(a == b == bos for a, b in pairwise(ids)):
        raise _bos_error(tokenizer, "twice in a row", text)
    # One token may be both the beginning and the end of a sequence, as in GPT-2.
    if bos in completion_ids and bos not in stops:
        raise _bos_error(tokenizer, "into the completion", text)


def _bos_error(tokenizer: Any, how: str, text: str) -> DataError:
    return DataError(f"rule `one BOS`: the chat template writes {tokenizer.bos_token!r} {how}: {_shown(text)}")
