"""`prefbuild plan`: what it says of a recipe on a machine without a GPU, and for GPUs that are not here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from project import RECIPE, ROOT, TASK, git, run, write_rows

from prefbuild.device import KNOWN, find_device, known_kind, known_speed, parse_size
from prefbuild.errors import UsageError
from prefbuild.forecast import forecast
from prefbuild.lock import lock
from prefbuild.recipe import load_recipes

MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "vocab_size": 32002, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose base has Mistral 7B's config and, by the header of its file, that many weights."""
    for name in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    base = tmp_path / "models/tiny"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(MISTRAL))
    header = json.dumps({"all": {"dtype": "BF16", "shape": [7_241_748_480], "data_offsets": [0, 0]}}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    write_rows(tmp_path / "recipes/rows/train.jsonl", 10)
    (tmp_path / "recipes/rows/sums.yaml").write_text(TASK)
    (tmp_path / "recipes/rows/held_out.jsonl").write_text('{"question": "1 plus 5?", "answer": "6"}\n')
    (tmp_path / "recipes/a.yaml").write_text(RECIPE)
    git(tmp_path, "init", "-q")
    lock(tmp_path, load_recipes(tmp_path))
    return tmp_path


def prepare(project: Path, lengths: list[tuple[int, int, int]]) -> None:
    """Prepared rows of these lengths."""
    path = project / "build/a/prepared/train.jsonl"
    path.parent.mkdir(parents=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: [0] * length for name, length in zip(names, row, strict=True)} for row in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_train(project: Path, **train: Any) -> None:
    path = project / "recipes/a.yaml"
    lines = "".join(f"\n  {key}: {json.dumps(value)}" for key, value in train.items())
    path.write_text(path.read_text().replace("method: dpo", f"method: dpo{lines}"))


def test_a_large_gpu_takes_a_step_at_once_and_a_small_one_in_parts(project: Path) -> None:
    prepare(project, [(258, 135, 238)] * 64)
    set_train(project, gradient_accumulation_steps=2)
    large, small = (forecast(project, "a", gpu=gpu) for gpu in ("H200", "RTX 4090"))
    batch = load_recipes(project)["a"].train.per_device_train_batch_size
    assert large.token_budget == 2 * batch * (258 + 135 + 238) and large.micro_batches == 1
    assert small.micro_batches is not None and small.micro_batches > 1 and small.fits
    assert small.seconds_per_step is not None and large.seconds_per_step is not None
    assert small.seconds_per_step > 3 * large.seconds_per_step
    assert large.seconds is not None and large.reference_seconds is not None and large.num_steps is not None
    assert large.seconds > large.reference_seconds + large.num_steps * large.seconds_per_step


def test_what_does_not_fit_says_what_would(project: Path) -> None:
    prepare(project, [(258, 135, 238)] * 64)
    text = run(project, "prefbuild", "plan", "a", "--gpu", "H100", "--gpu-memory", "12GB")
    assert "of 12.0 GB: DOES NOT FIT" in text and "train.quantization: nf4 takes a quarter" in text
    set_train(project, quantization="nf4")
    assert forecast(project, "a", gpu="H100", gpu_memory="12GB").fits
    assert forecast(project, "a", gpu="H100", gpu_memory="12GB").dequantise is False
    assert forecast(project, "a", gpu="H100").dequantise is True


def test_rows_that_are_not_prepared_are_taken_as_long_as_the_recipe_says(project: Path) -> None:
    found = forecast(project, "a", gpu="H200")
    data = load_recipes(project)["a"].data
    answer = data.max_length - data.max_prompt_length
    assert found.rows == (
        f"none is prepared yet, so all are taken to be {data.max_prompt_length} and twice {answer} tokens"
    )
    assert found.mean_tokens == data.max_prompt_length + 2 * answer


def test_on_a_cpu_memory_is_said_and_no_time(project: Path) -> None:
    prepare(project, [(10, 5, 5)] * 8)
    text = run(project, "prefbuild", "plan", "a")
    assert "this CPU" in text and "micro-batches  " in text and "memory " in text and "\ntime " not in text


def test_other_engines_have_a_bound_of_memory_alone(project: Path) -> None:
    set_train(project, engine="trl")
    found = forecast(project, "a", gpu="H200")
    assert (found.engine, found.token_budget, found.seconds) == ("trl", None, None)
    assert found.peak_memory > 14e9 and "memory is a rough bound" in found.note


def test_prompts_are_decoded_and_trained_on(project: Path) -> None:
    path = project / "recipes/a.yaml"
    rewards = "\n  rewards: [{reward: length, target: 50}]\n  max_completion_length: 100"
    text = path.read_text().replace("method: dpo", f"method: grpo{rewards}\n  num_generations: 4")
    text = text.replace(", chosen: chosen, rejected: rejected", "").replace(
        "ignore: [kind]", "ignore: [kind, chosen, rejected]"
    )
    path.write_text(text.replace("  max_length: 96\n", ""))
    found = forecast(project, "a", gpu="H200")
    assert found.rollout is not None and found.seconds_per_step is not None
    assert found.peak_memory > 2 * 14.4e9  # the model, and the copy that decodes
    assert found.seconds_per_step > found.rollout.seconds > 99 * found.rollout.seconds_per_token


def test_json_is_for_programs(project: Path) -> None:
    found = json.loads(run(project, "prefbuild", "plan", "a", "--gpu", "H200", "--json"))
    assert {"token_budget", "peak_memory", "seconds_per_step", "fits"} <= set(found)
    assert found["device"]["memory"] == 141 * 10**9


def test_a_gpu_must_be_named_where_there_is_none(project: Path) -> None:
    path = project / "recipes/a.yaml"
    path.write_text(path.read_text().replace("train:\n", "compute: {gpus: 1}\ntrain:\n"))
    recipe = load_recipes(project)["a"]
    found = forecast(project, "a", gpu_memory="24GB")
    assert KNOWN[found.device.name][2] == 24 and found.device.memory == 24 * 10**9
    if not shutil.which("nvidia-smi"):
        text = run(project, "prefbuild", "plan", "a", code=2)
        assert "compute.gpus is 1, and there is no GPU here to plan for; name one, as in --gpu H100" in text
    with pytest.raises(UsageError, match="^X9: its speed is not known; one of B200, H200"):
        find_device(recipe, found.shape, "X9", None)
    with pytest.raises(UsageError, match="^--gpu-memory much: no size; write it as in 80GB or 24GiB"):
        parse_size("much")
    assert (parse_size("80GB"), parse_size("1.5 GiB")) == (80 * 10**9, 3 * 2**29)


def test_a_base_of_unknown_size_is_refused(project: Path) -> None:
    path = project / "recipes/a.yaml"
    path.write_text(path.read_text().replace("source: file\n  path: models/tiny", "source: hub\n  repo: me/tiny"))
    assert run(project, "prefbuild", "plan", "a", "--gpu", "H200", code=2) == (
        "prefbuild: a: nothing can be planned: its size is unknown, because the base is not pinned; run `prefbuild lock a`\n"
    )


def test_names_of_gpus() -> None:
    names = ("NVIDIA A10G", "NVIDIA A100-SXM4-80GB", "NVIDIA L40", "NVIDIA L4", "h200", "Tesla T4")
    assert [known_kind(name) for name in names] == ["A10", "A100", None, "L4", "H200", None]
    assert known_speed("Tesla T4") is None
