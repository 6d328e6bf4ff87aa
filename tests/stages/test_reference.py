"""prefbuild/stages/reference.py: what it leaves, what it keeps, and when it computes nothing."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained import answer_log_probs, read_prepared, run_in, write_prepared

from prefbuild.artifact import write_manifest
from prefbuild.errors import StageError
from prefbuild.methods import DPO, reference_settings
from prefbuild.stages import reference
from prefbuild.training import packed_model, prepared, trainer
from prefbuild.training.log_probs import read_log_probs

Stage = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and prepared rows: 9 to train on and 3 held out."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny_model, folder / "base")
    write_manifest(folder / "base", stage="model", name="tiny", inputs={})
    write_manifest(write_prepared(folder / "prepared", tiny_model, "pairs"), stage="prepare", name="x", inputs={})
    return folder


@pytest.fixture
def stage(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Run the stage, with DPO's settings, in a project of its own; returns the folder it leaves. Parts are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(prepared.SCORED_AT_ONCE, "cpu", 150)

    def run(name: str, seed: int = 42, inputs: dict[str, Path] | None = None, **settings: Any) -> Path:
        asked = DPO.model_validate({"method": "dpo", "precision": "float32", **settings})
        out = Path("build", name, "reference")
        known = {"model": built / "base", "prepared": built / "prepared", **(inputs or {})}
        reference.run(reference_settings(asked, seed), known, {"reference_log_probs": out}, Path("work"), name)
        return out

    return run


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each part that the model scored had."""
    seen: list[int] = []
    score_rows = packed_model.score_rows

    def count(model: Any, rows: list[Any], **named: Any) -> Any:
        seen.append(len(rows))
        return score_rows(model, rows, **named)

    monkeypatch.setattr(packed_model, "score_rows", count)
    monkeypatch.setattr(packed_model, "check_packed", lambda *_: None)  # which scores rows too
    return seen


def changed_model(base: Path, folder: Path) -> Path:
    """A model as another recipe may have left it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    weights = {key: value + 0.1 * torch.randn_like(value) for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder, stage="merge", name="other", inputs={})
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_answers_tokens_have_the_log_probabilities_that_the_model_gives_it_alone(
    built: Path, stage: Stage
) -> None:
    out = stage("x")
    rows = [*read_prepared(built / "prepared"), *read_prepared(built / "prepared", "held_out")]
    found = read_log_probs(out, rows)
    assert len(found) == 12
    for row, log_probs in zip(rows, found, strict=True):
        for answer, values in zip(("chosen", "rejected"), log_probs, strict=True):
            alone = answer_log_probs(built / "base", None, row["prompt_ids"], row[f"{answer}_ids"])
            assert values == pytest.approx(alone.tolist(), rel=1e-4, abs=1e-5)
    assert [(line["file"], line["row"]) for line in lines(out)] == [
        *(("train.jsonl", number) for number in range(9)),
        *(("held_out.jsonl", number) for number in range(3)),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["log_probs.safetensors", "rows.jsonl"]


def test_only_rows_that_the_run_uses_are_scored_and_a_longer_run_computes_the_rest(
    stage: Stage, computed: list[int]
) -> None:
    short = stage("short", max_steps=2, per_device_train_batch_size=2)
    numbers = [line["row"] for line in lines(short) if line["file"] == "train.jsonl"]
    assert len(set(numbers)) == 4 and sum(computed) == 4 + 3
    computed.clear()
    longer = stage("longer", max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    after = [line["row"] for line in lines(longer) if line["file"] == "train.jsonl"]
    assert after[:4] == numbers and len(set(after)) == 8
    assert 4 <= sum(computed) < 8  # the last part of the short run may have had room
    other_seed = [line["row"] for line in lines(stage("other", max_steps=2, per_device_train_batch_size=2, seed=7))]
    assert other_seed[:4] != numbers


def test_another_recipe_on_the_same_rows_computes_nothing_and_leaves_the_same_bytes(
    built: Path, stage: Stage, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage("first")
    assert sum(computed) == 12
    computed.clear()
    monkeypatch.setattr(packed_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    second = stage("second", beta=0.5, learning_rate=1e-3, lora={"r": 2}, loss_type=["ipo"], num_train_epochs=3.0)
    assert not computed
    for file in ("log_probs.safetensors", "rows.jsonl"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        stage("third", precision="bf16")


def test_what_a_killed_run_computed_is_kept_and_the_end_is_the_same(
    stage: Stage, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (stage("whole") / "log_probs.safetensors").read_bytes()
    shutil.rmtree(reference.CACHE)
    computed.clear()
    score_rows = packed_model.score_rows

    def die(model: Any, rows: list[Any], **named: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        return score_rows(model, rows, **named)

    monkeypatch.setattr(packed_model, "score_rows", die)
    with pytest.raises(KeyboardInterrupt):
        stage("x")
    done = sum(computed[:2])  # the third's numbers were not asked for yet
    computed.clear()
    monkeypatch.setattr(packed_model, "score_rows", score_rows)
    assert (stage("x") / "log_probs.safetensors").read_bytes() == whole
    assert sum(computed) == 12 - done


def test_a_broken_cache_is_said_and_made_anew(
    stage: Stage, computed: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (stage("x") / "log_probs.safetensors").read_bytes()
    (kept,) = reference.CACHE.iterdir()
    kept.write_bytes(b"no database, but as long as one" * 1000)
    computed.clear()
    assert (stage("y") / "log_probs.safetensors").read_bytes() == whole
    assert sum(computed) == 12
    assert f"{kept} is not used: file is not a database" in capfd.readouterr().err


def test_values_that_were_changed_in_the_cache_are_computed_again(stage: Stage, computed: list[int]) -> None:
    import sqlite3

    whole = (stage("x") / "log_probs.safetensors").read_bytes()
    (kept,) = reference.CACHE.iterdir()
    with sqlite3.connect(kept) as connection:
        connection.execute("UPDATE parts SET log_probs = zeroblob(length(log_probs)) WHERE rowid = 1")
    connection.close()
    computed.clear()
    assert (stage("y") / "log_probs.safetensors").read_bytes() == whole
    assert 0 < sum(computed) < 12


def test_another_recipes_model_is_the_reference_where_it_is_named_and_must_have_the_bases_tokenizer(
    built: Path, stage: Stage, tmp_path: Path
) -> None:
    other = changed_model(built / "base", tmp_path / "other")
    (row, *_) = rows = read_prepared(built / "prepared")
    by_base, by_other = (read_log_probs(stage(*asked), rows) for asked in (("x",), ("y", 42, {"reference": other})))
    assert by_other[0][0] == pytest.approx(
        answer_log_probs(other, None, row["prompt_ids"], row["chosen_ids"]).tolist(), rel=1e-4, abs=1e-5
    )
    assert by_other[0][0] != pytest.approx(by_base[0][0], abs=0.01)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    write_manifest(other, stage="merge", name="other", inputs={})
    with pytest.raises(StageError, match=r"train.reference: .*other scores 10 tokens, and the base .*base scores"):
        stage("z", inputs={"reference": other})


def test_a_reference_that_gives_no_numbers_is_none(
    built: Path, stage: Stage, computed: list[int], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(built / "base", broken)
    weights = load_file(broken / "model.safetensors")
    row = max(read_prepared(built / "prepared"), key=lambda row: len(row["prompt_ids"]))
    rare = next(t for t in row["rejected_ids"] if t not in row["chosen_ids"] + row["prompt_ids"])
    weights["model.embed_tokens.weight"][rare] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_manifest(broken, stage="model", name="broken", inputs={})
    with pytest.raises(StageError, match="log-probability that is no number; it can be no reference"):
        stage("x", inputs={"model": broken})


@pytest.mark.parametrize("other", [None, "other"])
def test_a_training_that_reads_them_is_the_one_that_computes_them_itself_and_trls(
    built: Path, stage: Stage, other: str | None
) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"lora": {"r": 4}, "precision": "float32", "lr_scheduler_type": "constant"}
    held = None
    if other:
        held = changed_model(built / "base", Path(other))
        settings["reference"] = {"recipe": other}
    out = stage("x", inputs={"reference": held} if held else {}, **settings)

    def train(folder: str, engine: str, log_probs: Path | None) -> dict[str, Any]:
        asked = DPO.model_validate({"method": "dpo", "engine": engine, **settings})
        run = run_in(Path(folder), built / "base", built / "prepared", reference=held, log_probs=log_probs)
        metrics = trainer("dpo", engine)(asked, run)
        told = {key: metrics[key] for key in ("loss", "mean_loss", "tokens")}
        return told | {"step_0": metrics["step_0"]["loss"], "held_out": metrics["held_out"]["loss"]}

    read = train("read", "packed", out)
    assert read == pytest.approx(train("own", "packed", None), rel=1e-5)
    assert read == pytest.approx(train("trl", "trl", None), rel=1e-4)
    assert (read["step_0"] == pytest.approx(math.log(2), abs=1e-6)) is (other is None)
    out_of_other_rows = stage("short", **{**settings, "max_steps": 1}, inputs={"reference": held} if held else {})
    with pytest.raises(StageError, match="it is of other rows than those to train on"):
        train("wrong", "packed", out_of_other_rows)


def test_neither_torch_nor_transformers_is_imported_where_all_is_known(built: Path, stage: Stage) -> None:
    stage("x")
    settings = reference_settings(DPO.model_validate({"method": "dpo", "precision": "float32"}), 42)
    program = (
        "import sys; from pathlib import Path; from prefbuild.stages import reference; from prefbuild.training import prepared;"
        f"prepared.SCORED_AT_ONCE['cpu'] = 150; inputs = {{'model': Path({str(built / 'base')!r}), "
        f"'prepared': Path({str(built / 'prepared')!r})}};"
        f"reference.run({settings!r}, inputs, {{'reference_log_probs': Path('again')}}, Path('work'), 'x');"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr
    assert "reference: 12 rows, 12 kept from before" in done.stderr
    assert Path("again/rows.jsonl").read_bytes() == Path("build/x/reference/rows.jsonl").read_bytes()
