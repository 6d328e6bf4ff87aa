"""All weights are trained (use_peft: false), and the reference is another recipe's model."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trained import answer_log_probs, digest, read_prepared, train, train_and_die, write_prepared

from prefbuild.artifact import read_manifest, write_manifest
from prefbuild.errors import StageError
from prefbuild.methods import METHODS, PARTS, SHAPES
from prefbuild.stages import merge
from prefbuild.training.common import needed_files
from prefbuild.training.reference import check_tokenizer

# Of GRPO both: with KL a second model is the reference, without it there is none.
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1},
    "rloo": {"beta": 0.0},
    "dpo": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module", autouse=True)
def few_prompts() -> Iterator[None]:
    """What merging did is measured on two prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "PROMPTS", merge.PROMPTS[:2])
        yield


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an artifact."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_model, folder)
    write_manifest(folder, stage="model", name="tiny", inputs={})
    return folder


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    return {shape: write_prepared(folder / shape, base, shape, train=6) for shape in sorted(set(SHAPES.values()))}


@pytest.fixture(scope="module")
def full_dpo(base: Path, prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four steps of DPO on all weights."""
    folder = tmp_path_factory.mktemp("full")
    train(folder, "dpo", base, prepared["pairs"], use_peft=False)
    return folder


def sealed(folder: Path, base: Path) -> Path:
    """Trained weights as the worker leaves them."""
    write_manifest(folder, stage="train", name="test", inputs={"model": read_manifest(base)["digest"]})
    return folder


def merged(folder: Path, base: Path, trained: Path, max_kl: float = 0.5) -> Path:
    outputs = {"merged": folder / "merged", "metrics": folder / "merge.json"}
    merge.run({"merge": {"max_kl": max_kl}}, {"model": base, "trained": trained}, outputs, folder, "test")
    return outputs["merged"]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"reward"}))
def test_each_method_trains_all_weights_in_float32(
    method: str, base: Path, prepared: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    more = {"use_peft": False, "precision": "bf16", "max_steps": 2, "save_steps": 2, "disable_dropout": True}
    metrics = train(tmp_path, method, base, prepared[SHAPES[method]], **more, **SETTINGS.get(method, {}))
    assert metrics["steps"] == 2 and metrics["grad_norm"]["max"] > 0 and metrics["machine"]["precision"] == "bf16"
    trained = tmp_path / "adapter"
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in trained.iterdir()) == names
    before, after = load_file(base / names[2]), load_file(trained / names[2])
    assert {tensor.dtype for tensor in after.values()} == {torch.float32} and before.keys() == after.keys()
    assert all(not torch.equal(before[key].float(), after[key]) for key in after)
    # What bf16 weights would have lost: a step smaller than they can hold.
    small = [(after[key].bfloat16() == before[key]) & (after[key] != before[key].float()) for key in after]
    assert sum(int(part.sum()) for part in small) > 0
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (trained, base))
    assert config | {"dtype": 0} == own | {"dtype": 0} and config["dtype"] == "float32"
    if method == "dpo":
        # The reference is scored in other rows than the policy, in which bf16 rounds otherwise.
        assert metrics["step_0"] == pytest.approx({"loss": math.log(2), "margins": 0}, abs=1e-3)
    if method == "kto":
        assert metrics["step_0"]["loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0): policy is reference
    if SHAPES[method] == "prompts":
        assert ("kl" in metrics) == (method == "grpo")


def test_a_killed_training_of_all_weights_goes_on_to_the_same_bytes(
    base: Path, prepared: dict[str, Path], full_dpo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()
    if pid == 0:
        train_and_die(3, tmp_path, "dpo", base, prepared["pairs"], use_peft=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    assert {path.name for path in checkpoint.iterdir()} >= {"model.safetensors", *needed_files()}
    train(tmp_path, "dpo", base, prepared["pairs"], use_peft=False)
    assert "going on from checkpoint-2" in capfd.readouterr().err
    assert digest(tmp_path) == digest(full_dpo)


def test_merged_are_the_trained_weights_in_the_bases_number_format(base: Path, full_dpo: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    trained = sealed(Path(shutil.copytree(full_dpo / "adapter", tmp_path / "trained")), base)
    folder = merged(tmp_path, base, trained)
    wanted, found = load_file(trained / "model.safetensors"), load_file(folder / "model.safetensors")
    assert wanted.keys() == found.keys() and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for key, tensor in found.items():  # one of the two that bf16 has next to it
        up = tensor.float().view(torch.int32) - (wanted[key].view(torch.int32) & -(1 << 16))
        assert set(up.unique().tolist()) <= {0, 1 << 16}, key
    same = {path.name for path in base.iterdir()} - {"model.safetensors", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == same | {"model.safetensors"}
    for name in same:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    metrics = json.loads((tmp_path / "merge.json").read_text())
    assert set(metrics) == {"kl", "max_logit_difference", "greedy_agreement", "tolerance", "bytes"}
    assert 0 < metrics["kl"] < 0.5
    before = (folder / "model.safetensors").read_bytes()
    merge.round_weights(base, trained, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == before

    with pytest.raises(StageError, match=r"merged: is not .*/trained: KL .* is over merge.max_kl 1e-12"):
        merged(tmp_path / "tight", base, trained, max_kl=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_steps_survive_rounding_on_average(dtype: str) -> None:
    import torch

    short = getattr(torch, dtype)
    weights = torch.linspace(-0.2, 0.2, 100_001)[:-1].to(short).float()
    step = weights.abs() * 2.0**-13  # a 16th of bf16's, or half of float16's
    generator = torch.Generator().manual_seed(0)
    rounded = merge.round_at_random(weights + step, short, generator)
    assert rounded.dtype == short
    assert float((rounded.float() - weights).sum() / step.sum()) == pytest.approx(1, abs=0.05)
    if dtype == "bfloat16":
        assert torch.equal((weights + step).to(short).float(), weights)  # to nearest nothing is left of it
    assert torch.equal(merge.round_at_random(weights, short, generator).float(), weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.float(), r"all 20 weights are those of .*/tiny, as before training; look at the loss"),
        (lambda tensor: tensor.float() * math.nan, r"model.embed_tokens.weight holds NaN or infinity"),
        (lambda tensor: tensor.float() * (1 + 1e-6), r"is no nearer to .*/trained .* lost in rounding"),
        (lambda tensor: tensor.float().repeat(2, 1) if len(tensor) == 49152 else tensor, "is not shaped as in"),
    ],
    ids=["as before", "no numbers", "lost in rounding", "another shape"],
)
def test_weights_that_learnt_nothing_or_broke_are_refused(base: Path, tmp_path: Path, change: Any, said: str) -> None:
    from safetensors.torch import load_file, save_file

    trained = tmp_path / "trained"
    trained.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    changed = {key: change(tensor) for key, tensor in load_file(base / "model.safetensors").items()}
    config["vocab_size"] = len(changed["model.embed_tokens.weight"])
    (trained / "config.json").write_text(json.dumps(config))
    save_file(changed, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=said):
        merged(tmp_path, base, sealed(trained, base))


# ---- another recipe's model as reference


@pytest.fixture(scope="module")
def other(base: Path, full_dpo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model of another recipe on the same base."""
    folder = tmp_path_factory.mktemp("other")
    trained = sealed(Path(shutil.copytree(full_dpo / "adapter", folder / "trained")), base)
    whole = merged(folder, base, trained)
    write_manifest(whole, stage="merge", name="other", inputs={})
    return whole


def log_ratio(model: Path, row: dict[str, Any]) -> float:
    """By how many nats a model finds the chosen answer likelier than the rejected one."""
    chosen, rejected = (
        answer_log_probs(model, None, row["prompt_ids"], row[f"{answer}_ids"]).sum()
        for answer in ("chosen", "rejected")
    )
    return float(chosen - rejected)


@pytest.mark.parametrize("use_peft", [True, False])
def test_dpo_holds_on_to_the_named_model(
    use_peft: bool, base: Path, prepared: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    rows = read_prepared(prepared["pairs"])
    more = {"use_peft": use_peft, "max_steps": 1, "per_device_train_batch_size": len(rows), "beta": 2.0}
    found = train(tmp_path, "dpo", base, prepared["pairs"], other, reference={"recipe": "other"}, **more)
    margins = [2.0 * (log_ratio(base, row) - log_ratio(other, row)) for row in rows]
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(rows)
    assert found["step_0"]["loss"] == pytest.approx(wanted, abs=1e-4) and abs(wanted - math.log(2)) > 1e-3
    assert found["step_0"]["margins"] == pytest.approx(sum(margins) / len(rows), abs=1e-4)


def test_kto_holds_on_to_the_named_model(base: Path, prepared: dict[str, Path], other: Path, tmp_path: Path) -> None:
    more = {"reference": {"recipe": "other"}, "max_steps": 1, "beta": 2.0}
    found = train(tmp_path, "kto", base, prepared["labelled"], other, **more)
    assert abs(found["step_0"]["loss"] - 0.5) > 1e-4  # 0.5: policy is reference


def test_a_reference_that_reads_or_scores_otherwise_is_refused(
    base: Path, prepared: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    def refused(said: str, name: str, change: Callable[[Any], Any]) -> None:
        folder = Path(shutil.copytree(other, tmp_path / str(len(list(tmp_path.iterdir())))))
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))
        write_manifest(folder, stage="merge", name="other", inputs={})
        with pytest.raises(StageError, match=said):
            check_tokenizer(base, folder, prepared["pairs"] / "train.jsonl", PARTS["pairs"])

    refused(r"scores 7 tokens, and the base .* scores 49152", "config.json", lambda c: c.update(vocab_size=7))
    refused("has another vocabulary than the base", "tokenizer.json", lambda t: t["model"]["vocab"].update(new=49152))
    said = r"train.jsonl:1: prompt has other token ids in .* than in the base .* starts from the same base"
    refused(said, "tokenizer.json", lambda t: t["model"]["merges"].reverse())
    check_tokenizer(base, other, prepared["pairs"] / "train.jsonl", PARTS["pairs"])
