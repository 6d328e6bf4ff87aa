"""Every method on the real model on a GPU, and runs that were killed there."""

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
from trained import digest, train, train_and_die, write_prepared

from prefbuild.methods import METHODS, SHAPES, TRAIN_METRICS

pytestmark = pytest.mark.gpu
SETTINGS: dict[str, Any] = {"precision": "bf16", "deterministic": True, "lora": {"r": 8}, "learning_rate": 1e-4}
# Without a reference, or with a reward of length: kl is of a beta, and a terminated length of answers that ended.
MAY_LACK = {"kl"}


@pytest.mark.parametrize(
    ("method", "how"),
    # A reward model is trained with an adapter.
    [(method, how) for method in METHODS for how in ("lora", "qlora", "full") if (method, how) != ("reward", "full")],
)
def test_two_steps_on_the_real_model(method: str, how: str, smollm2: Path, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", smollm2, SHAPES[method])
    settings = SETTINGS | ({"quantization": "nf4"} if how == "qlora" else {})
    if how == "full":
        settings = {key: value for key, value in SETTINGS.items() if key != "lora"} | {"use_peft": False}
    metrics = train(tmp_path, method, smollm2, prepared, max_steps=2, **settings)
    assert metrics["steps"] == 2 and metrics["grad_norm"]["max"] > 0
    assert metrics["machine"]["precision"] == "bf16" and "NVIDIA" in metrics["machine"]["device"]
    for key in set(TRAIN_METRICS[method]) - MAY_LACK:
        value: Any = metrics
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, int | float), key
    assert ("model" if how == "full" else "adapter_model") + ".safetensors" in digest(tmp_path)
    if method == "dpo":
        assert metrics["step_0"]["margins"] == 0  # a second model computes what the first does


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_killed_training_goes_on_and_ends_with_the_bytes_of_another(
    method: str, smollm2: Path, tmp_path: Path
) -> None:
    prepared = write_prepared(tmp_path / "prepared", smollm2, SHAPES[method])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = SETTINGS | {
        "max_steps": 5,
        "save_steps": 2,
        "lora": {"r": 8, "lora_dropout": 0.1},
        "disable_dropout": False,
    }
    train(straight, method, smollm2, prepared, **settings)
    # A GPU that is in use can't be forked.
    process = multiprocessing.get_context("spawn").Process(
        target=train_and_die, args=(3, killed, method, smollm2, prepared), kwargs=settings
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (killed / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    train(killed, method, smollm2, prepared, **settings)
    assert digest(killed) == digest(straight)
