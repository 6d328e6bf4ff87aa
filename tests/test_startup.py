"""A stage imports what it needs: start-up is a large part of a short build."""

import shutil
import sys
from pathlib import Path

import pytest
from project import make_project, run

# Libraries that take a second and more, or half of one.
HEAVY = (
    "torch", "transformers", "trl", "datasets", "peft", "accelerate", "bitsandbytes", "lm_eval", "pandas", "scipy",
    "pyarrow", "dvc", "dvclive", "docker", "huggingface_hub", "wandb", "mlflow", "trackio", "deepspeed", "chardet",
)  # fmt: skip
MODELS = {"torch", "transformers", "peft", "accelerate", "huggingface_hub"}
NEEDED = {
    "data": set(),
    "prepare": {"transformers", "huggingface_hub"},  # the tokenizer, and no torch
    "reference": MODELS,
    "train": MODELS | {"dvclive", "dvc"},
    "merge": MODELS,
}
RUN = """
import sys
from prefbuild.worker import main
code = main(sys.argv[1:])
print("imported", *(name for name in sys.modules if sys.modules[name] is not None and "." not in name))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one recipe of DPO, resolved, whose base is fetched."""
    project = make_project(tmp_path_factory.mktemp("startup") / "project", tiny_model)
    run(project, "prefbuild", "resolve")
    stage(project, "model")
    return project


def stage(project: Path, name: str) -> set[str]:
    """Run a stage as the worker does; returns which of HEAVY it imported."""
    folder = {"model": "models", "data": "data"}.get(name)
    resolved = next((project / "build/.resolved" / folder).iterdir()).stem if folder else "first"
    said = run(project, sys.executable, "-c", RUN, name, resolved, CUDA_VISIBLE_DEVICES="")
    assert "PyTorch was not found" not in said
    imported = next(line for line in said.splitlines() if line.startswith("imported "))
    return set(imported.split()) & set(HEAVY)


def test_stages_import_what_they_need_and_no_more(project: Path) -> None:
    imported = {name: stage(project, name) for name in NEEDED}
    assert {name: found - NEEDED[name] for name, found in imported.items()} == {name: set() for name in NEEDED}
    # What is left out is there all the same for those that ask.
    assert "torch" in imported["reference"] and "torch" not in imported["prepare"]
    # The reference is known by now, so no model is loaded; the order of rows is torch's.
    shutil.rmtree(project / "build/first/reference")
    assert stage(project, "reference") == {"torch"}
