"""Two processes train as one does: the same rows a step, the same curves, the same adapter, and they go on when killed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trained import train, write_prepared

from prefbuild.errors import StageError
from prefbuild.launch import launch
from prefbuild.methods import METHODS, SHAPES, split_batch
from prefbuild.strict import Wrong
from prefbuild.training.ranks import rank_arguments

pytestmark = pytest.mark.timeout(600)
FOUR_STEPS = {"gradient_accumulation_steps": 2, "max_steps": 4, "disable_dropout": True}
PROMPTS = {
    "num_generations": 4,
    "max_completion_length": 12,
    "rewards": [{"reward": "length", "target": 5}],
}


def settings(method: str) -> dict[str, Any]:
    # KTO's batch is what is divided, and its KL needs two rows.
    # Both engines that write completions are had by two processes.
    prompts = PROMPTS | ({"rollout": {"engine": "graph"}} if method == "rloo" else {})
    return FOUR_STEPS | {"per_device_train_batch_size": 4} | (prompts if SHAPES[method] == "prompts" else {})


def prepare(folder: Path, model: Path, method: str) -> Path:
    """Sixteen rows to train on, and three held out: an odd number, which two processes can't share out evenly."""
    return write_prepared(folder, model, SHAPES[method], train=16, held_out=3)


def train_in_two(root: Path, model: Path, strategy: str, *methods: str, resumed: str) -> None:
    """Train each method in root/<method>, all in the same two processes, and `resumed` once more from its second step."""
    asked = [
        {"folder": str(root / method), "model": str(model), "prepared": str(root / f"{method}-rows"), "method": method}
        | settings(method)
        for method in methods
    ]
    asked += [one | {"resumed": True} for one in asked if one["method"] == resumed]
    for method in methods:
        prepare(root / f"{method}-rows", model, method)
        (root / method).mkdir()
    script = Path(__file__).parent / "one_rank.py"
    launch([str(script), json.dumps(asked)], 2, root / "work", strategy=strategy, env={"CUDA_VISIBLE_DEVICES": ""})


def train_in_one(root: Path, model: Path, method: str) -> tuple[dict[str, Any], Path]:
    """The same training in this process: its metrics and folder."""
    return train(
        root / f"{method}-one", method, model, root / f"{method}-rows", **settings(method)
    ), root / f"{method}-one"


def metrics(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"metrics-{rank}.json").read_text())
    return found


def curve(folder: Path) -> list[dict[str, float]]:
    """The logged points of a run, without the rates of time and epochs."""
    state = json.loads((folder / "work/checkpoint-4/trainer_state.json").read_text())
    return [{key: value for key, value in point.items() if "time" not in key} for point in state["log_history"]]


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: one for name, inner in value.items() for key, one in numbers(inner, f"{path}.{name}").items()}
    return {} if "seconds" in path or "machine" in path else {path: value}


def assert_same_adapter(one: Path, two: Path) -> None:
    import torch
    from safetensors.torch import load_file

    first, second = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.allclose(tensor, second[key], atol=1e-5), key
    config = [(folder / "adapter/adapter_config.json").read_text() for folder in (one, two)]
    assert config[0] == config[1]


def assert_close(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert two.keys() == one.keys()
    for key, value in one.items():
        # Means over tokens: of one process' batches one after another, of two processes' batches together.
        of_tokens = key.endswith(("mean_token_accuracy", "entropy"))
        of_batches = key.endswith(("min_reward", "max_reward"))  # the least and greatest of what all hold at once
        assert two[key] == pytest.approx(value, abs=0.05 if of_batches else 1e-3 if of_tokens else 1e-4), key


def assert_same_run(root: Path, model: Path, method: str) -> None:
    """Metrics, held-out rows among them, every logged point, and the adapter."""
    found, one = train_in_one(root, model, method)
    two = root / method
    assert_close(numbers(metrics(two)), numbers(found))
    first, second = curve(one), curve(two)
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert_close(b, a)
    assert_same_adapter(one, two)
    points = [(folder / "live/plots/metrics/train/loss.tsv").read_text().count("\n") for folder in (one, two)]
    assert points[0] == points[1] == 5


def assert_went_on(folder: Path) -> None:
    whole, again = (folder / f"{name}/adapter_model.safetensors" for name in ("adapter-whole", "adapter"))
    assert again.read_bytes() == whole.read_bytes()
    assert "going on from checkpoint-2" not in (folder.parent / "work/rank-1.log").read_text()  # said once, by rank 0
    assert metrics(folder)["mean_loss"] == metrics(folder, rank=1)["mean_loss"]


# ---- DDP


@pytest.fixture(scope="module")
def ddp(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    train_in_two(root, tiny_model, "ddp", "dpo", "sft", "kto", "orpo", "reward", "grpo", "rloo", resumed="dpo")
    return root


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "orpo", "reward"])
def test_two_processes_train_as_one(ddp: Path, tiny_model: Path, method: str) -> None:
    assert_same_run(ddp, tiny_model, method)


def test_a_run_of_two_that_was_killed_goes_on_to_the_same_bytes(ddp: Path) -> None:
    assert_went_on(ddp / "dpo")


def test_all_processes_log_the_same(ddp: Path) -> None:
    for method in ("dpo", "kto", "orpo", "grpo"):
        first, second = (numbers(metrics(ddp / method, rank)) for rank in (0, 1))
        assert first == second, method


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_groups_stay_whole_and_prompts_are_those_of_one_process(ddp: Path, tiny_model: Path, method: str) -> None:
    """What is sampled differs, by the seeds of the processes; a random model never ends a turn by itself."""
    found, one = train_in_one(ddp, tiny_model, method)
    two = metrics(ddp / method)
    assert two["tokens"] == found["tokens"]  # the tokens of the prompts, and completions that are all as long
    assert numbers(two["step_0"]) == pytest.approx(numbers(found["step_0"]))
    assert [point["num_tokens"] for point in curve(ddp / method)] == [point["num_tokens"] for point in curve(one)]
    assert two["reward_std"] > 0


# ---- FSDP


@pytest.fixture(scope="module")
def fsdp(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    # Every fifth token ends a turn, so that completions have all lengths: a process that is done must go on with the
    # others, or both wait for ever.
    model = root / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": list(range(0, 49152, 5))}))
    train_in_two(root, model, "fsdp", "dpo", "grpo", resumed="dpo")
    return root


def test_shards_train_as_one(fsdp: Path) -> None:
    assert_same_run(fsdp, fsdp / "model", "dpo")


def test_a_run_of_shards_that_was_killed_goes_on_to_the_same_bytes(fsdp: Path) -> None:
    assert_went_on(fsdp / "dpo")


def test_shards_write_completions_of_all_lengths(fsdp: Path) -> None:
    lengths = metrics(fsdp / "grpo")["completions"]
    assert lengths["min_length"] < lengths["max_length"] and metrics(fsdp / "grpo")["steps"] == 4


# ---- batches


@pytest.mark.parametrize(
    ("method", "batch", "accumulation", "num", "share"),
    [
        ("dpo", 4, 4, 1, (4, 4)),
        ("dpo", 4, 4, 2, (4, 2)),
        ("dpo", 4, 4, 8, (2, 1)),
        ("dpo", 8, 1, 4, (2, 1)),
        ("dpo", 6, 2, 4, (3, 1)),
        ("kto", 4, 4, 2, (2, 4)),  # its KL is a mean over what all hold at once
        ("kto", 2, 4, 2, (2, 2)),  # and needs two rows
        ("grpo", 2, 4, 2, (2, 2)),
    ],
)
def test_a_step_keeps_its_rows(method: str, batch: int, accumulation: int, num: int, share: tuple[int, int]) -> None:
    assert split_batch(options(method, batch, accumulation), num) == share
    assert share[0] * share[1] * num == batch * accumulation


@pytest.mark.parametrize(
    ("method", "batch", "accumulation", "num", "said"),
    [
        ("dpo", 4, 4, 3, "is 3, among which the 16 rows of a step can't be shared out evenly.* that 3 divides, as 6$"),
        ("kto", 2, 1, 2, "is 2, which leaves each one row of a batch of 2, but KTO .* that 2 divides, as 2$"),
    ],
)
def test_a_step_that_cannot_be_shared_out(method: str, batch: int, accumulation: int, num: int, said: str) -> None:
    with pytest.raises(Wrong, match=said) as caught:
        split_batch(options(method, batch, accumulation), num)
    assert caught.value.key == "gpus"


def options(method: str, batch: int, accumulation: int) -> Any:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return METHODS[method].model_validate({"method": method, **sizes, **(PROMPTS if method == "grpo" else {})})


def test_deepspeed_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, value in {"PREFBUILD_RANKS": ".", "PREFBUILD_STRATEGY": "zero3", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        StageError, match=r"which is not installed; install it with `pip install 'prefbuild\[deepspeed\]'`"
    ):
        rank_arguments(options("dpo", 4, 4), bf16=True)


# ---- GPUs


@pytest.mark.gpu
def test_two_gpus_train_as_one(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    """Needs two GPUs: DDP and FSDP through NCCL, with a thin model; benchmarks/multi_gpu.py states the speed of a thick one."""
    script = Path(__file__).parents[2] / "benchmarks/multi_gpu.py"
    argv = [sys.executable, str(script), str(tmp_path / "bench"), "--tokenizer", str(smollm2)]
    argv += ["--rows", str(real_data / "preference/orca_dpo_pairs_284.jsonl"), "--layers", "4", "--hidden", "256"]
    done = subprocess.run(
        [*argv, "--steps", "6", "--batch", "2", "--accumulation", "4"], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["one", "ddp", "fsdp"]
