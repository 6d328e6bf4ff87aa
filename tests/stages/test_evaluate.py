"""prefbuild/stages/evaluate.py and baseline.py: what a measured model's stage leaves, from a real model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefbuild.artifact import read_manifest
from prefbuild.localtask import Measurement
from prefbuild.stages import baseline, evaluate
from prefbuild.taskfile import read_task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """The demonstration's own task, four documents of it, in a project of its own."""
    from prefbuild.artifact import sha256_file

    shutil.copytree(ROOT / "recipes/concise", tmp_path / "recipes/concise")
    monkeypatch.chdir(tmp_path)
    task = "recipes/concise/concise.yaml"
    files = read_task(Path(), task, "test").files
    pinned = [{"path": f, "size": Path(f).stat().st_size, "sha256": sha256_file(Path(f))} for f in files]
    asked = {"task": task, "name": "concise", "data": None, "files": pinned, "num_fewshot": None, "limit": 4}
    return {"key": "0123456789ab", **asked, "apply_chat_template": True, "fewshot_as_multiturn": False}


def test_evaluate_and_baseline_leave_what_the_gate_reads(smollm2: Path, measurement: Measurement) -> None:
    settings = {"measurements": [measurement], "batch_size": 4, "seed": 1234}
    inputs: dict[str, Any] = {"model": smollm2, "tasks": [Path(file["path"]) for file in measurement["files"]]}
    out = Path("build/x")
    outputs = {"samples": out / "evaluate", "metrics": out / "evaluate.json"}
    evaluate.run(settings, inputs, outputs, Path("build/.work/evaluate-x"), "x")

    metrics = json.loads(outputs["metrics"].read_text())
    assert set(metrics) == {"concise"}
    assert set(metrics["concise"]) == {"exact_match", "exact_match_stderr", "n"}
    assert metrics["concise"]["n"] == 4
    record = json.loads((out / "evaluate/0123456789ab.json").read_text())
    assert record["model_digest"] == read_manifest(smollm2)["digest"]
    files = {"0123456789ab.json", "0123456789ab.jsonl"}
    assert {path.name for path in outputs["samples"].iterdir()} == files

    # The base is measured once: by the same key on the same model, the baseline takes what was kept.
    kept = list(Path("build/.work/evaluations").iterdir())
    samples = Path("build/baselines/smollm2")
    baseline.run(settings, inputs, {"samples": samples}, Path("build/.work/baseline"), "smollm2")
    assert list(Path("build/.work/evaluations").iterdir()) == kept
    assert len(kept) == 1
    assert {path.name for path in samples.iterdir()} == files | {"metrics.json"}
    assert json.loads((samples / "metrics.json").read_text()) == metrics
    for name in files:
        assert (samples / name).read_bytes() == (outputs["samples"] / name).read_bytes()
