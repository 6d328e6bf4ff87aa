"""Checkpoints count only when they are whole; every method can train on a base in 4 bits, and be stopped."""

from pathlib import Path

import pytest
from trained import train, write_prepared

from prefbuild.artifact import write_manifest
from prefbuild.methods import METHODS, SHAPES
from prefbuild.training.common import needed_files, newest_checkpoint

FILES = {"adapter_model.safetensors", *needed_files()}


def checkpoint(work: Path, step: int) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(f"{name} {step}")
    write_manifest(folder, stage="train", name="checkpoint", inputs={})
    return folder


def test_the_newest_by_number_is_taken(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_none_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    whole = checkpoint(tmp_path, 2)
    broken = checkpoint(tmp_path, 4) / name
    if damage == "missing":
        broken.unlink()
    elif damage == "cut":
        broken.write_bytes(broken.read_bytes()[:-1])
    else:
        broken.write_bytes(b"X" + broken.read_bytes()[1:])
    assert newest_checkpoint(tmp_path) == whole
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_manifest_without_a_needed_file_does_not_count(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / name).unlink()
    write_manifest(folder, stage="train", name="checkpoint", inputs={})
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_of_all_weights_has_a_model(tmp_path: Path, weights: str) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / "adapter_model.safetensors").rename(folder / weights)
    write_manifest(folder, stage="train", name="checkpoint", inputs={})
    assert newest_checkpoint(tmp_path, use_peft=False) == folder
    (folder / weights).unlink()
    write_manifest(folder, stage="train", name="checkpoint", inputs={})
    assert newest_checkpoint(tmp_path, use_peft=False) is None


def test_an_empty_checkpoint_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-99").mkdir()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dpo", "grpo", "rloo"}))  # dpo's are in test_dpo.py
def test_every_method_trains_on_four_bits_and_ends_by_a_rule(method: str, tiny_model: Path, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", tiny_model, SHAPES[method])
    rule = {"metric": "grad_norm", "above": 0.0, "for": 2}
    metrics = train(tmp_path, method, tiny_model, prepared, quantization="nf4", stop_if=[rule])
    assert metrics["stopped"] == {"step": 2, "rule": "grad_norm above 0 for 2 points"} and metrics["steps"] == 2
    assert (tmp_path / "adapter/adapter_model.safetensors").exists() and not (tmp_path / "work/checkpoint-2").exists()
