"""What benchmarks run on: random models of a known shape, and rows as the prepare stage leaves them."""

import json
import re
from pathlib import Path
from typing import Any


def make_model(folder: Path, tokenizer: Path, layers: int = 32, hidden: int = 4096, spread: float = 0.003) -> None:
    """Random bf16 weights in shards, of Mistral 7B's shape by default, with the tokenizer's files beside them.

    `spread` is the standard deviation of the weights. 0.003 is small, as the weights of a trained 7B are: bf16 has so few
    digits that adding a young adapter to larger ones would change nothing. `hidden` is a multiple of 64.
    """
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    vocabulary = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    config = MistralConfig(
        vocab_size=max(32_002, len(vocabulary)),
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if hidden < 4096 else hidden // 128,
        num_key_value_heads=hidden // 64 if hidden < 4096 else hidden // 512,
        max_position_embeddings=32_768,
        sliding_window=None,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
        initializer_range=spread,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes minutes for 7B random numbers
        model = MistralForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    vocabulary.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def read_pairs(tokenizer: Path, path: Path, max_length: int, max_prompt_length: int | None = None) -> list[Any]:
    """The pairs of a JSON lines file with question, chosen and rejected (system too, if there is one), rendered and tokenised.

    Pairs of more than `max_length` tokens, or with a prompt of more than `max_prompt_length`, are left out.
    """
    from prefbuild.template import load_tokenizer, render_prompt, tokenize

    vocabulary = load_tokenizer(tokenizer)
    pairs = []
    for row in _lines(path):
        messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        texts = {"prompt": render_prompt(vocabulary, [*messages, {"role": "user", "content": row["question"]}])}
        texts |= {part: f"{row[part]}{vocabulary.eos_token}\n" for part in ("chosen", "rejected")}
        ids = {f"{part}_ids": found for part, found in zip(texts, tokenize(vocabulary, [*texts.values()]), strict=True)}
        prompt, longer = len(ids["prompt_ids"]), max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        if prompt + longer <= max_length and prompt <= (max_prompt_length or max_length):
            pairs.append({**texts, **ids})
    return pairs


def read_prompts(tokenizer: Path, path: Path, max_prompt_length: int) -> list[Any]:
    """The `prompt`s of a JSON lines file, each as a user's message; those of more tokens than that are left out."""
    from prefbuild.template import load_tokenizer, render_prompt, tokenize

    vocabulary = load_tokenizer(tokenizer)
    prompts = []
    for row in _lines(path):
        messages = [{"role": "user", "content": row["prompt"]}]
        text = render_prompt(vocabulary, messages)
        (ids,) = tokenize(vocabulary, [text])
        if len(ids) <= max_prompt_length:
            prompts.append({"prompt": text, "prompt_ids": ids, "messages": messages, "columns": {}})
    return prompts


def shortened(rows: list[Any]) -> list[Any]:
    """A few rows with the last tokens of each text, to try a benchmark with."""
    ends = [{key: ids[-8:] for key, ids in row.items() if key.endswith("_ids")} for row in rows[:30]]
    return [row | end for row, end in zip(rows, ends, strict=False)]


def write_rows(folder: Path, train: list[Any], held_out: list[Any]) -> None:
    """Rows as the prepare stage leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_result(path: Path, found: dict[str, Any]) -> None:
    """What a benchmark found as JSON, a list of numbers a line."""
    text = json.dumps(found, indent=1)
    text = re.sub(
        r"\[[\s\d.,eE+-]*\]", lambda numbers: "[" + ", ".join(re.split(r"[\s,\[\]]+", numbers[0])[1:-1]) + "]", text
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _lines(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:  # not splitlines(): a text may hold U+2028
        return [json.loads(line) for line in file]
