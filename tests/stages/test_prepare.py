"""prefbuild/stages/prepare.py: every row is accounted for, cut where it says, and the same bytes come out each time."""

import csv
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prefbuild.errors import DataError
from prefbuild.recipe import Data, data_settings
from prefbuild.rows import REASONS, reasons
from prefbuild.stages.prepare import Answer, PreparedRow, histogram, prepare, preview, run, split
from prefbuild.template import load_tokenizer

FIVE = "one two three four five"  # 5 tokens, and 2 more for the end of turn and the line break after it


def settings(**keys: Any) -> dict[str, Any]:
    """The section of a resolved recipe."""
    source = {"source": "file", "path": "rows.jsonl"}
    seed, shape, keep = keys.pop("seed", 1), keys.pop("shape", "pairs"), keys.pop("keep", [])
    return {"data": data_settings(Data.model_validate({"sources": [source], **keys}), shape, keep), "seed": seed}


def data_folder(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(prompt: Any, chosen: Any = "Yes.", rejected: Any = "No.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class Built:
    """What the stage left in a folder."""

    def __init__(self, folder: Path, model: Path, *data: Path, **keys: Any):
        told = keys.pop("settings", None) or settings(**keys)
        outputs = {
            "prepared": folder / "prepared",
            "metrics": folder / "prepare.json",
            "lengths": folder / "lengths.csv",
        }
        run(told, {"model": model, "data": list(data)}, outputs, folder / "work", "test")
        self.files = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.metrics = json.loads(self.files["prepare.json"])
        self.train = [json.loads(line) for line in self.files["train.jsonl"].decode().splitlines()]
        self.held_out = [json.loads(line) for line in self.files["held_out.jsonl"].decode().splitlines()]


def build(tmp_path: Path, model: Path, rows: list[Any], **keys: Any) -> Built:
    return Built(tmp_path / "build", model, data_folder(tmp_path / "data", rows), **keys)


@pytest.fixture(scope="module")
def orca(smollm2: Path, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("orca")
    (folder / "data").mkdir()
    (folder / "data/orca.jsonl").write_bytes((real_data / "preference/orca_dpo_pairs_284.jsonl").read_bytes())
    columns = {"system": "system", "prompt": "question"}
    return Built(folder / "build", smollm2, folder / "data", columns=columns, held_out=0.1)


# ---- real data


def test_all_orca_rows_are_accounted_for(orca: Built) -> None:
    dropped = {reason: 36 if reason == "prompt_too_long" else 0 for reason in REASONS}
    assert orca.metrics["rows"] == {"in": 284, "out": 248, "train": 223, "held_out": 25}
    assert orca.metrics["dropped"] == dropped
    assert orca.metrics["truncated"] == orca.metrics["end_of_turn_lost"] == {"chosen": 0, "rejected": 4}
    assert orca.metrics["boundary_differs"] == 0
    assert (len(orca.train), len(orca.held_out)) == (223, 25)


def test_orca_rows_keep_question_and_system(orca: Built, real_data: Path) -> None:
    with open(real_data / "preference/orca_dpo_pairs_284.jsonl", encoding="utf-8") as file:
        source = [json.loads(line) for line in file]
    for prepared in orca.train + orca.held_out:
        raw = source[int(prepared["id"].removeprefix("0:")) - 1]
        assert prepared["prompt"] == (
            f"<|im_start|>system\n{raw['system']}<|im_end|>\n<|im_start|>user\n{raw['question']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert [prepared[part] for part in ("chosen", "rejected")] == [
            f"{raw[part]}<|im_end|>\n" for part in ("chosen", "rejected")
        ]


def test_rows_are_in_source_order_and_no_prompt_is_on_both_sides(orca: Built) -> None:
    for part in (orca.train, orca.held_out):
        lines = [int(prepared["id"].removeprefix("0:")) for prepared in part]
        assert lines == sorted(lines)
    assert not {r["prompt"] for r in orca.train} & {r["prompt"] for r in orca.held_out}
    assert not {r["id"] for r in orca.train} & {r["id"] for r in orca.held_out}


def test_ids_are_those_of_the_texts_up_to_the_limit(orca: Built, smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    cut = 0
    for prepared in orca.train + orca.held_out:
        assert tokenizer.decode(prepared["prompt_ids"]) == prepared["prompt"]
        for part in ("chosen", "rejected"):
            text, ids = prepared[part], prepared[f"{part}_ids"]
            whole = len(prepared["prompt_ids"]) + len(ids)
            assert whole <= 1024
            if tokenizer.decode(ids) != text:
                assert whole == 1024 and text.startswith(tokenizer.decode(ids).rstrip("\ufffd"))
                cut += 1
    assert cut == 4


def test_conversations_are_accounted_for(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = (real_data / "preference/conversational_299.jsonl").read_bytes()
    (tmp_path / "data/conversations.jsonl").write_bytes(text)
    built = Built(tmp_path / "build", smollm2, tmp_path / "data", held_out=0.2)
    expected = {"prompt_too_long": 97, "duplicate": 5}
    assert built.metrics["dropped"] == {reason: expected.get(reason, 0) for reason in REASONS}
    assert built.metrics["rows"] == {"in": 299, "out": 197, "train": len(built.train), "held_out": len(built.held_out)}
    assert len(built.held_out) >= 40 and len(built.train) + len(built.held_out) == 197
    # Reckoned anew from the source: the rows that are there twice.
    assert len(set(text.splitlines())) == 294
    assert built.metrics["truncated"] == built.metrics["end_of_turn_lost"] == {"chosen": 4, "rejected": 5}


def test_the_same_inputs_give_the_same_bytes(orca: Built, smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/orca.jsonl").write_bytes((real_data / "preference/orca_dpo_pairs_284.jsonl").read_bytes())
    columns = {"system": "system", "prompt": "question"}
    again = Built(tmp_path / "build", smollm2, tmp_path / "data", columns=columns, held_out=0.1)
    assert again.files == orca.files
    assert list(again.files) == ["lengths.csv", "prepare.json", "held_out.jsonl", "train.jsonl"]


# ---- accounting


def test_each_reason_is_counted_once(smollm2: Path, tmp_path: Path) -> None:
    rows = [
        row("Is it?"),
        row(3),  # broken
        ["not an object"],  # broken
        {**row("Is it?"), "score": 1},  # filtered
        row("", "a"),  # empty
        row("Is it?", "Yes.", " Yes.\n"),  # identical_pair
        row("Is it <|im_end|>?"),  # special_token
        row("Is it?", "Yes.", "<repo_name>No."),  # special_token
        row([{"role": "user", "content": "Is it?"}]),  # duplicate, though it is written otherwise
        row("Is " * 60 + "it?"),  # prompt_too_long
        row("Is it?", "Yes. " * 60),  # too_long
        row("Is it?", "No.", "Yes."),
    ]
    keys: dict[str, Any] = {"filters": [{"column": "score", "not_in": [1]}], "on_broken": "drop", "on_too_long": "drop"}
    built = build(tmp_path, smollm2, rows, max_prompt_length=60, max_length=80, **keys)
    assert built.metrics["dropped"] == {
        "broken": 2, "filtered": 1, "empty": 1, "identical_pair": 1, "special_token": 2, "duplicate": 1,
        "prompt_too_long": 1, "too_long": 1,
    }  # fmt: skip
    assert built.metrics["rows"] == {"in": 12, "out": 2, "train": 2, "held_out": 0}
    assert [prepared["id"] for prepared in built.train] == ["0:1", "0:12"]
    assert built.files["held_out.jsonl"] == b""


def test_duplicates_are_kept_when_asked(smollm2: Path, tmp_path: Path) -> None:
    built = build(tmp_path, smollm2, [row("Is it?"), row("Is it?")], drop_duplicates=False)
    assert built.metrics["rows"]["out"] == 2 and built.metrics["dropped"]["duplicate"] == 0


def test_no_row_left_shows_the_accounting(smollm2: Path, tmp_path: Path) -> None:
    rows = [row("", "a"), row("Is it?", "Yes.", "Yes."), row("Is it?", "No.", "No.")]
    with pytest.raises(DataError) as error:
        build(tmp_path, smollm2, rows)
    assert str(error.value).splitlines()[:5] == [
        "no row is left, so there is nothing to train on:",
        "rows in                  3",
        "  empty                 -1   rows.jsonl:1: prompt is empty, or has an empty message",
        "  identical_pair        -2   rows.jsonl:2: chosen and rejected are both 'Yes.'",
        "rows out                 0   0 to train on, 0 held out",
    ]
    assert not (tmp_path / "build").exists()


def test_all_rows_held_out_is_refused(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every row is held out: there are too few prompts"):
        build(tmp_path, smollm2, [row("Is it?")], held_out=0.1)


def test_rows_that_the_template_refuses_are_broken(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "manifest.json":
            (model / path.name).write_bytes(path.read_bytes())
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    rows = [row("Is it?"), row([{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Is it?"}])]
    with pytest.raises(DataError) as error:
        build(tmp_path / "fail", model, rows)
    assert str(error.value).splitlines()[:2] == [
        "1 broken row:",
        "  rows.jsonl:2: the chat template refuses the messages (system, user): no system message, please",
    ]
    built = build(tmp_path / "drop", model, rows, on_broken="drop")
    assert built.metrics["rows"]["out"] == 1 and built.metrics["dropped"]["broken"] == 1


def test_a_template_that_breaks_a_rule_stops_the_stage(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "manifest.json":
            (model / path.name).write_bytes(path.read_bytes())
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content'] + '<|im_end|>'", "message['content'] + ''"))
    with pytest.raises(DataError, match=r"^rule `end of turn`: "):
        build(tmp_path, model, [row("Is it?")])
    template.unlink()
    with pytest.raises(DataError, match="has no chat template"):
        build(tmp_path / "none", model, [row("Is it?")])


# ---- lengths


@pytest.mark.parametrize(
    ("room", "truncated", "lost"),
    [(7, 0, 0), (6, 1, 0), (5, 1, 1), (1, 1, 1)],
    ids=["fits", "only the line break", "the end of turn", "all but a token"],
)
def test_truncation_and_loss_of_the_end_of_turn(
    smollm2: Path, tmp_path: Path, room: int, truncated: int, lost: int
) -> None:
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    built = build(
        tmp_path,
        smollm2,
        [row("Count.", "1", FIVE)],
        max_prompt_length=prompt,
        max_length=max(prompt + room, prompt + 1),
    )
    whole = prepare_one(smollm2, tmp_path / "second").answers["rejected"].ids
    assert len(whole) == 7
    assert built.train[0]["rejected_ids"] == whole[:room]
    assert built.train[0]["rejected"] == FIVE + "<|im_end|>\n"
    # "1" is 3 tokens long.
    short = {"truncated": int(room < 3), "lost": int(room < 2)}
    assert built.metrics["truncated"] == {"chosen": short["truncated"], "rejected": truncated}
    assert built.metrics["end_of_turn_lost"] == {"chosen": short["lost"], "rejected": lost}


def prepare_one(model: Path, folder: Path) -> PreparedRow:
    data = data_folder(folder, [row("Count.", "1", FIVE)])
    return prepare(settings(), {"model": model, "data": [data]}).rows[0]


def test_a_prompt_may_be_as_long_as_the_limit(smollm2: Path, tmp_path: Path) -> None:
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    assert build(tmp_path / "at", smollm2, [row("Count.")], max_prompt_length=prompt).metrics["rows"]["out"] == 1
    with pytest.raises(DataError, match=f"prompt of {prompt} tokens, max_prompt_length is {prompt - 1}"):
        build(tmp_path / "over", smollm2, [row("Count.")], max_prompt_length=prompt - 1)


def test_too_long_rows_are_dropped_when_asked(smollm2: Path, tmp_path: Path) -> None:
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    keys = {"max_prompt_length": prompt, "max_length": prompt + 6, "on_too_long": "drop"}
    built = build(tmp_path, smollm2, [row("Count.", "1", FIVE), row("Count.", "1", "2")], **keys)
    assert built.metrics["dropped"]["too_long"] == 1 and built.metrics["truncated"] == {"chosen": 0, "rejected": 0}
    assert [prepared["id"] for prepared in built.train] == ["0:2"]


def test_a_pair_that_the_cut_makes_equal_is_dropped(smollm2: Path, tmp_path: Path) -> None:
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    rows = [row("Count.", FIVE + " six", FIVE + " seven"), row("Count.", "1", FIVE)]
    built = build(tmp_path, smollm2, rows, max_prompt_length=prompt, max_length=prompt + 5)
    assert built.metrics["dropped"]["identical_pair"] == 1 and built.metrics["rows"]["out"] == 1


def test_token_summary_is_of_rows_before_the_length_rules(smollm2: Path, tmp_path: Path) -> None:
    answers = [" ".join(["one"] * words) for words in range(1, 21)]  # 3 to 22 tokens
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    rows = [row("Count.", answer, "two") for answer in answers]
    built = build(tmp_path, smollm2, rows, max_prompt_length=prompt, max_length=prompt + 10)
    assert built.metrics["tokens"]["chosen"] == {"mean": 12.5, "p50": 12, "p95": 21, "max": 22}
    assert built.metrics["tokens"]["rejected"] == {"mean": 3.0, "p50": 3, "p95": 3, "max": 3}
    assert built.metrics["truncated"]["chosen"] == 12  # those of 11 to 22 tokens
    assert built.metrics["end_of_turn_lost"]["chosen"] == 11  # and not the one of 11, which loses its line break


def test_histogram_counts_every_row_in_even_bins(orca: Built) -> None:
    table = list(csv.DictReader(orca.files["lengths.csv"].decode().splitlines()))
    assert list(table[0]) == ["part", "tokens", "rows"]
    for part in ("prompt", "chosen", "rejected"):
        bins = [(int(line["tokens"]), int(line["rows"])) for line in table if line["part"] == part]
        assert sum(rows for _, rows in bins) == 284
        assert {b - a for (a, _), (b, _) in pairwise(bins)} == {bins[1][0]} and 15 <= len(bins) <= 30
    assert histogram({"prompt": [0, 1, 59], "chosen": [2], "rejected": []}).splitlines()[1:4] == [
        "prompt,0,2", "prompt,2,0", "prompt,4,0",
    ]  # fmt: skip


def test_boundary_is_counted(smollm2: Path, tmp_path: Path) -> None:
    """With a prompt that ends in a space, the space and the answer's first word would be one token."""
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "manifest.json":
            (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [row("Is it?"), row("Is it?", "7", "no"), row("Is it?", "no", "7"), row("Is it?", "7", "8")]
    built = build(tmp_path, model, rows)
    tokenizer = load_tokenizer(model)
    differs = [
        tokenizer(r["prompt"] + r[part])["input_ids"] != r["prompt_ids"] + r[f"{part}_ids"]
        for r in built.train
        for part in ("chosen", "rejected")
    ]
    assert differs == [True, True, False, True, True, False, False, False]
    assert built.metrics["boundary_differs"] == 3


# ---- split


def pairs(prompts: list[str]) -> list[PreparedRow]:
    answer = Answer("", [], 0, False)
    answers = {"chosen": answer, "rejected": answer}
    return [PreparedRow(str(number), "", prompt, [], answers, None, [], {}) for number, prompt in enumerate(prompts)]


def test_split_fills_the_fraction_by_whole_prompts() -> None:
    assert len(split(pairs([f"p{i}" for i in range(30)]), 0.1, 1)) == 3
    assert len(split(pairs([f"p{i}" for i in range(31)]), 0.1, 1)) == 4
    assert len(split(pairs([f"p{i}" for i in range(100)]), 0.07, 1)) == 7
    assert split(pairs(["p"] * 5), 0.0, 1) == set()
    thrice = [f"p{i}" for i in range(20) for _ in range(3)]
    assert len(split(pairs(thrice), 0.1, 1)) == 2


def test_split_depends_on_the_seed_and_not_on_the_order() -> None:
    prompts = [f"p{i}" for i in range(200)]
    one = split(pairs(prompts), 0.2, 1)
    assert split(pairs(prompts[::-1]), 0.2, 1) == one
    assert 0 < len(split(pairs(prompts), 0.2, 2) & one) < 20


def test_a_row_more_moves_few_others() -> None:
    prompts = [f"p{i}" for i in range(200)]
    before = split(pairs(prompts), 0.2, 1)
    for extra in range(20):
        assert len(split(pairs([*prompts, f"new {extra}"]), 0.2, 1) ^ before) <= 2


def test_the_split_is_pinned() -> None:
    """A change here gives every project other held-out rows: raise the stage's version with it."""
    assert sorted(split(pairs([f"p{i}" for i in range(40)]), 0.1, 7)) == ["p18", "p2", "p27", "p39"]


# ---- written lines


def test_lines_are_plain_and_survive_splitlines(smollm2: Path, tmp_path: Path) -> None:
    built = build(tmp_path, smollm2, [row("Ünï\u2028code\x85 日本?")])
    assert "Ünï\\u2028code\\u0085 日本?".encode() in built.files["train.jsonl"]
    assert len(built.train) == 1 and "Ünï\u2028code\x85 日本?" in built.train[0]["prompt"]
    assert list(built.train[0]) == ["id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"]


# ---- preview


def preview_of(tmp_path: Path, model: Path, rows: list[Any], count: int, **keys: Any) -> str:
    show = {key: keys.pop(key) for key in ("wide", "color") if key in keys}
    data = data_folder(tmp_path / "data", rows)
    return preview(settings(**keys), {"model": model, "data": [data]}, count, **show)


def test_preview_shows_rows_and_accounting(smollm2: Path, tmp_path: Path) -> None:
    rows = [row("", "a"), row("Is it?", "Yes."), row("Is it not?")]
    text = preview_of(tmp_path, smollm2, rows, 1)
    assert text.splitlines()[0] == "==== row 0:2  rows.jsonl:2  to train on"
    assert "⟦<|im_start|>⟧user\nIs it?⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n" in text
    assert "---- chosen: 4 tokens\nYes.⟦<|im_end|>⟧\n---- rejected: 4 tokens\nNo.⟦<|im_end|>⟧\n" in text
    assert "Is it not?" not in text
    assert "  empty                 -1   rows.jsonl:1: prompt is empty, or has an empty message\n" in text


def test_preview_in_color(smollm2: Path, tmp_path: Path) -> None:
    text = preview_of(tmp_path, smollm2, [row("Is it?")], 1, color=True)
    assert "Yes.\x1b[7m<|im_end|>\x1b[0m\n" in text and "⟦" not in text


def test_preview_shows_what_is_cut(smollm2: Path, tmp_path: Path) -> None:
    prompt = len(prepare_one(smollm2, tmp_path / "first").prompt_ids)
    keys = {"max_prompt_length": prompt, "max_length": prompt + 3}
    text = preview_of(tmp_path, smollm2, [row("Count.", "1", FIVE)], 1, **keys)
    assert "rejected: 3 tokens, 4 more cut at max_length: its end-of-turn token is lost\none two three\n" in text
    assert "  rejected cut           1   1 lost the end-of-turn token\n" in text


def test_preview_shortens_long_texts_unless_wide(smollm2: Path, tmp_path: Path) -> None:
    rows = [row("Is it?", "yes " * 300 + "end")]
    short = preview_of(tmp_path / "short", smollm2, rows, 1)
    assert " [... 614 characters ...] " in short and "yes end⟦<|im_end|>⟧" in short
    assert "yes " * 300 + "end⟦<|im_end|>⟧" in preview_of(tmp_path / "wide", smollm2, rows, 1, wide=True)


def test_preview_spells_out_control_characters(smollm2: Path, tmp_path: Path) -> None:
    text = preview_of(tmp_path, smollm2, [row("Is \x1b[31mit?"), row("", {"a\x1b[2J": 1})], 1, on_broken="drop")
    assert "Is \\x1b[31mit?" in text and "\x1b" not in text


# ---- other shapes than pairs


def test_real_labelled_conversations_are_accounted_for(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    rows = json.loads((real_data / "preference/kto_300.json").read_text(encoding="utf-8"))
    columns = {"messages": "messages"}
    built = build(tmp_path, smollm2, rows, shape="labelled", columns=columns, held_out=0.1, max_prompt_length=400)
    counted, dropped = built.metrics["rows"], built.metrics["dropped"]
    assert counted["in"] == 300 == counted["out"] + sum(dropped.values())
    assert list(dropped) == sorted(reasons("labelled")) and "identical_pair" not in dropped
    assert (len(built.train), len(built.held_out)) == (counted["train"], counted["held_out"])
    assert built.metrics["labels"] == {
        "true": sum(r["label"] is True for r in built.train), "false": sum(r["label"] is False for r in built.train),
    }  # fmt: skip
    tokenizer = load_tokenizer(smollm2)
    for prepared in built.train + built.held_out:
        assert list(prepared) == ["id", "prompt", "completion", "prompt_ids", "completion_ids", "label"]
        source = rows[int(prepared["id"].removeprefix("0:")) - 1]
        assert prepared["label"] is source["label"]
        assert prepared["completion"] == f"{source['messages'][-1]['content']}<|im_end|>\n"
        assert all(message["content"].strip() in prepared["prompt"] for message in source["messages"][:-1])
        assert tokenizer.decode(prepared["prompt_ids"]) == prepared["prompt"]
        assert len(prepared["prompt_ids"]) <= 400
        assert len(prepared["prompt_ids"]) + len(prepared["completion_ids"]) <= 1024
    cut = sum(tokenizer.decode(r["completion_ids"]) != r["completion"] for r in built.train + built.held_out)
    assert built.metrics["truncated"] == {"completion": cut}
    assert list(built.metrics["tokens"]) == ["completion", "prompt"]
    assert counted["out"] > 200


def test_real_answers_are_prompt_and_completion(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    with open(real_data / "sft/v1_sft_demo.jsonl", encoding="utf-8") as file:
        talks = [json.loads(line)["messages"] for line in file]
    # Its contents are lists of parts, one text each.
    rows = [
        {"messages": [{"role": m["role"], "content": "".join(part["value"] for part in m["content"])} for m in talk]}
        for talk in talks
    ]
    built = build(tmp_path, smollm2, rows, shape="answers", columns={"messages": "messages"}, held_out=0.1)
    seen = {json.dumps(r) for r in rows}
    assert built.metrics["rows"]["in"] == 500 and built.metrics["dropped"]["duplicate"] == 500 - len(seen)
    assert built.metrics["rows"]["out"] == len(seen) == len(built.train) + len(built.held_out)
    for prepared in built.train:
        question, answer = rows[int(prepared["id"].removeprefix("0:")) - 1]["messages"]
        assert list(prepared) == ["id", "prompt", "completion", "prompt_ids", "completion_ids"]
        assert prepared["prompt"].endswith(
            f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert prepared["completion"] == f"{answer['content']}<|im_end|>\n"


def test_real_posts_are_prompts_with_what_rewards_read(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    with open(real_data / "prompts/tldr_100.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    built = build(tmp_path, smollm2, rows, shape="prompts", keep=["completion"], held_out=0.2, max_prompt_length=300)
    long = built.metrics["dropped"]["prompt_too_long"]
    assert built.metrics["rows"] == {
        "in": 100,
        "out": 100 - long,
        "train": len(built.train),
        "held_out": len(built.held_out),
    }
    assert 0 < long < 80 and sum(built.metrics["dropped"].values()) == long
    for prepared in built.train + built.held_out:
        source = rows[int(prepared["id"].removeprefix("0:")) - 1]
        assert list(prepared) == ["id", "prompt", "prompt_ids", "messages", "columns"]
        assert prepared["messages"] == [{"role": "user", "content": source["prompt"]}]
        assert prepared["columns"] == {"completion": source["completion"]}
        assert len(prepared["prompt_ids"]) <= 300
    assert built.metrics["truncated"] == built.metrics["end_of_turn_lost"] == {}
    assert list(built.metrics["tokens"]) == ["prompt"] and "boundary_differs" not in built.metrics
    assert {line.partition(",")[0] for line in built.files["lengths.csv"].decode().splitlines()[1:]} == {"prompt"}


def answer(prompt: Any, completion: Any = "Yes.", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


@pytest.mark.parametrize("shape", ["answers", "labelled"])
def test_each_reason_is_counted_once_for_answers(smollm2: Path, tmp_path: Path, shape: str) -> None:
    rows = [
        answer("Is it?", label=True),
        answer(3, label=True),  # broken
        {**answer("Is it?", "No.", label=True), "score": 1},  # filtered
        answer("", "a", label=True),  # empty
        answer("Is it?", "", label=True),  # empty
        answer("Is it <|im_end|>?", label=True),  # special_token
        answer("Is it?", "<repo_name>No.", label=True),  # special_token
        answer([{"role": "user", "content": "Is it?"}], label=1),  # duplicate
        answer("Is " * 60 + "it?", label=True),  # prompt_too_long
        answer("Is it?", "Yes. " * 60, label=True),  # too_long
        answer("Is it?", "No.", label=False),
    ]
    if shape == "answers":
        rows = [{key: value for key, value in one.items() if key != "label"} for one in rows]
    keys: dict[str, Any] = {"filters": [{"column": "score", "not_in": [1]}], "on_broken": "drop", "on_too_long": "drop"}
    built = build(tmp_path, smollm2, rows, shape=shape, max_prompt_length=60, max_length=80, **keys)
    assert built.metrics["dropped"] == {
        "broken": 1, "filtered": 1, "empty": 2, "special_token": 2, "duplicate": 1, "prompt_too_long": 1, "too_long": 1,
    }  # fmt: skip
    assert [prepared["id"] for prepared in built.train] == ["0:1", "0:11"]
    assert built.metrics.get("labels") == ({"true": 1, "false": 1} if shape == "labelled" else None)


def test_an_answer_with_another_label_or_column_is_no_duplicate(smollm2: Path, tmp_path: Path) -> None:
    rows = [answer("Is it?", label=label) for label in (True, False, 1, 0)]
    labelled = build(tmp_path / "a", smollm2, rows, shape="labelled")
    assert [prepared["label"] for prepared in labelled.train] == [True, False]
    prompts = [{"prompt": "Is it?", "x": x} for x in (1, "1", 1, None)]
    kept = build(tmp_path / "b", smollm2, prompts, shape="prompts", keep=["x"])
    assert [prepared["columns"]["x"] for prepared in kept.train] == [1, "1", None]
    plain = build(tmp_path / "c", smollm2, prompts, shape="prompts", ignore=["x"])
    assert len(plain.train) == 1 and plain.train[0]["columns"] == {}


def test_an_answer_is_cut_like_those_of_a_pair(smollm2: Path, tmp_path: Path) -> None:
    rows = [answer("Count.", FIVE)]
    whole = build(tmp_path / "whole", smollm2, rows, shape="answers").train[0]
    prompt = len(whole["prompt_ids"])
    keys = {"shape": "answers", "max_prompt_length": prompt, "max_length": prompt + 3}
    cut = build(tmp_path / "cut", smollm2, rows, **keys)
    assert cut.train[0]["completion_ids"] == whole["completion_ids"][:3]
    assert cut.train[0]["completion"] == whole["completion"]
    assert cut.metrics["truncated"] == cut.metrics["end_of_turn_lost"] == {"completion": 1}
    assert cut.metrics["tokens"]["completion"]["max"] == 7


def test_a_pairs_sides_are_prepared_like_answers(smollm2: Path, tmp_path: Path) -> None:
    """The chosen answer of a pair, and the same row as an answer, have the same texts and ids."""
    pair = build(tmp_path / "pair", smollm2, [row("Is it?", FIVE, "No.")]).train[0]
    alone = build(tmp_path / "alone", smollm2, [answer("Is it?", FIVE)], shape="answers").train[0]
    assert (alone["prompt"], alone["prompt_ids"]) == (pair["prompt"], pair["prompt_ids"])
    assert (alone["completion"], alone["completion_ids"]) == (pair["chosen"], pair["chosen_ids"])
    prompts = build(tmp_path / "prompt", smollm2, [{"prompt": "Is it?"}], shape="prompts").train[0]
    assert (prompts["prompt"], prompts["prompt_ids"]) == (pair["prompt"], pair["prompt_ids"])


def test_preview_of_other_shapes(smollm2: Path, tmp_path: Path) -> None:
    rows = [answer("Is it?", label=True), answer("Is it?", "No.", label=False)]
    text = preview_of(tmp_path / "labelled", smollm2, rows, 2, shape="labelled")
    assert "==== row 0:1  rows.jsonl:1  to train on, good\n" in text and "to train on, bad\n" in text
    assert "---- completion: 4 tokens\nYes.⟦<|im_end|>⟧\n" in text
    assert "  to train on            2   1 good, 1 bad\n" in text
    text = preview_of(
        tmp_path / "prompts", smollm2, [{"prompt": "Is it?", "x": [1, "é"]}], 1, shape="prompts", keep=["x"]
    )
    assert '---- column x\n[1, "é"]\n' in text and "completion" not in text


# ---- sources by weight


def mixed(tmp_path: Path, model: Path, counts: list[int], weights: list[float | None], **keys: Any) -> Built:
    """Sources of so many rows each, mixed by weight."""
    names = "abcdefgh"
    folders = [
        data_folder(tmp_path / names[number], [row(f"{names[number]} {n}?") for n in range(count)])
        for number, count in enumerate(counts)
    ]
    sources = [
        {"source": "file", "path": f"{name}.jsonl", "weight": w} for name, w in zip(names, weights, strict=False)
    ]
    seed = keys.pop("seed", 1)
    data = data_settings(Data.model_validate({"sources": sources, **keys}), "pairs")
    return Built(tmp_path / "build", model, *folders, settings={"data": data, "seed": seed})


def sources_of(built: Built) -> dict[str, int]:
    return dict(Counter(prepared["id"].partition(":")[0] for prepared in built.train + built.held_out))


@pytest.mark.parametrize(
    ("counts", "weights", "kept"),
    [
        ([40, 40], [1, 1], [40, 40]),
        ([40, 10], [1, 1], [10, 10]),
        ([40, 40], [3, 1], [40, 13]),
        ([40, 40, 7], [0.5, 0.25, None], [40, 20, 7]),
        ([7, 30, 30], [None, 0.1, 0.3], [7, 10, 30]),
        ([10, 30], [None, None], [10, 30]),
        ([3, 40], [1000, 1], [3, 0]),
    ],
)
def test_sources_are_mixed_by_weight(
    smollm2: Path, tmp_path: Path, counts: list[int], weights: list[float | None], kept: list[int]
) -> None:
    built = mixed(tmp_path, smollm2, counts, weights)
    assert sources_of(built) == {str(source): count for source, count in enumerate(kept) if count}
    dropped = built.metrics["dropped"]
    assert dropped.get("sampled_out") == (None if set(weights) == {None} else sum(counts) - sum(kept))
    assert built.metrics["rows"]["in"] == sum(counts) == built.metrics["rows"]["out"] + sum(dropped.values())
    ids = [tuple(map(int, prepared["id"].split(":"))) for prepared in built.train]
    assert ids == sorted(set(ids))  # in source order, and none twice


def test_what_is_sampled_depends_on_the_seed_alone(smollm2: Path, tmp_path: Path) -> None:
    def ids(folder: str, seed: int, counts: list[int]) -> set[str]:
        built = mixed(tmp_path / folder, smollm2, counts, [1, 1], seed=seed)
        return {prepared["id"] for prepared in built.train if prepared["id"].startswith("0:")}

    first = ids("first", 1, [30, 10])
    assert first == ids("again", 1, [30, 10]) != ids("other", 2, [30, 10])
    assert len(first & ids("more", 1, [31, 10])) >= 9  # a row more moves one


def test_rows_are_sampled_once_the_others_are_dropped(smollm2: Path, tmp_path: Path) -> None:
    """The proportion is that of the rows kept, whatever was dropped before."""
    rows = [[row("", "a")] * 5 + [row(f"a {n}?") for n in range(10)], [row(f"b {n}?") for n in range(40)]]
    folders = [data_folder(tmp_path / str(number), one) for number, one in enumerate(rows)]
    sources = [{"source": "file", "path": "x", "weight": weight} for weight in (1, 2)]
    told = {"data": data_settings(Data.model_validate({"sources": sources}), "pairs"), "seed": 1}
    built = Built(tmp_path / "build", smollm2, *folders, settings=told)
    assert sources_of(built) == {"0": 10, "1": 20}
    assert {reason: n for reason, n in built.metrics["dropped"].items() if n} == {"empty": 5, "sampled_out": 20}


def test_a_weighed_source_without_rows_is_an_error(smollm2: Path, tmp_path: Path) -> None:
    says = r"^data\.sources\[1\]\.weight: is 2, and no row of this source is left to sample$"
    with pytest.raises(DataError, match=says):
        mixed(tmp_path, smollm2, [3, 2], [1, 2], filters=[{"column": "prompt", "not_in": ["b 0?", "b 1?"]}])
