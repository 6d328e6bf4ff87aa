"""What every method on answers and pairs does alike: same bytes twice and after a kill, refusals, metrics, adapters."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from trained import BASE, digest, train, train_and_die, write_prepared

from prefbuild.artifact import read_manifest, write_manifest
from prefbuild.errors import StageError
from prefbuild.methods import METHODS, SHAPES, TRAIN_METRICS, TrainOptions
from prefbuild.stages import merge

Trained = dict[str, tuple[Path, dict[str, Any]]]
NAMES = ("sft", "kto", "orpo", "simpo", "reward")
SETTINGS: dict[str, Any] = {
    # Six rows are two steps: the checkpoint is amid the second pass, which has an order of its own.
    "max_steps": 5,
    "save_steps": 3,
    # Dropout draws random numbers at every step: a resumed run that had other ones would end elsewhere.
    "disable_dropout": False,
    "lora": {"r": 4, "lora_dropout": 0.1},
}

each_method = pytest.mark.parametrize("method", NAMES)


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    return {
        shape: write_prepared(folder / shape, tiny_model, shape, train=6) for shape in ("pairs", "answers", "labelled")
    }


@pytest.fixture(scope="module")
def trained(tiny_model: Path, prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each method's folder and metrics after its steps."""
    result = {}
    for method in NAMES:
        folder = tmp_path_factory.mktemp(method)
        result[method] = folder, train(folder, method, tiny_model, prepared[SHAPES[method]], **SETTINGS)
    return result


@each_method
def test_a_killed_training_goes_on_and_ends_with_the_bytes_of_another(
    method: str,
    trained: Trained,
    tiny_model: Path,
    prepared: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pid = os.fork()  # what was imported is there: a new process would take ten seconds to get so far
    if pid == 0:
        train_and_die(4, tmp_path, method, tiny_model, prepared[SHAPES[method]], **SETTINGS)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "adapter").exists()

    metrics = train(tmp_path, method, tiny_model, prepared[SHAPES[method]], **SETTINGS)
    assert "going on from checkpoint-3" in capfd.readouterr().err
    folder, straight = trained[method]
    assert digest(tmp_path) == digest(folder)
    for curve in ("loss", "grad_norm", "num_tokens"):
        path = f"live/plots/metrics/train/{curve}.tsv"
        assert (tmp_path / path).read_text() == (folder / path).read_text()
    assert metrics | {"seconds": 0} == straight | {"seconds": 0}


@each_method
def test_settings_have_the_names_that_trl_gives_them(method: str) -> None:
    from trl import KTOConfig, RewardConfig, SFTConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    config = {"sft": SFTConfig, "kto": KTOConfig, "orpo": ORPOConfig, "simpo": CPOConfig, "reward": RewardConfig}[
        method
    ]
    own = set(METHODS[method].model_fields) - set(TrainOptions.model_fields) - {"method", "reference"}
    assert own
    assert own <= {field.name for field in dataclasses.fields(config)}


@each_method
def test_every_number_that_a_gate_can_ask_for_is_written(method: str, trained: Trained) -> None:
    metrics = trained[method][1]
    for key in TRAIN_METRICS[method]:
        value = metrics
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, int | float), key


@each_method
def test_the_adapter_names_its_base_and_changes_it(method: str, trained: Trained) -> None:
    folder, metrics = trained[method]
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE["name"], BASE["revision"])
    merge.check_adapter(folder / "adapter")
    assert metrics["loss"] < metrics["step_0"]["loss"]
    assert metrics["tokens"] > 0


@each_method
def test_a_loss_that_is_no_number_is_refused(
    method: str, tiny_model: Path, prepared: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"the loss became nan; lower train.learning_rate \(now 1e\+30\)"):
        train(tmp_path, method, tiny_model, prepared[SHAPES[method]], learning_rate=1e30, max_steps=2)
    assert not (tmp_path / "adapter").exists()


def test_merge_takes_adapter_and_base(trained: Trained, tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, outputs = tmp_path / "base", tmp_path / "adapter", {"merged": tmp_path / "merged"}
    shutil.copytree(tiny_model, base)
    write_manifest(base, stage="model", name="tiny", inputs={})
    shutil.copytree(trained["sft"][0] / "adapter", adapter)
    write_manifest(adapter, stage="train", name="test", inputs={"model": read_manifest(base)["digest"]})
    inputs: dict[str, Any] = {"model": base, "adapter": adapter}
    merge.run({"merge": {"max_kl": 0.5}}, inputs, outputs | {"metrics": tmp_path / "merge.json"}, tmp_path, "test")
    assert (tmp_path / "merged/model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
