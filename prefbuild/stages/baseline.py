"""Measure a base model with lm-evaluation-harness, as its recipes' merged models are: what they are compared with."""

from pathlib import Path
from typing import Any

from prefbuild.artifact import write_json
from prefbuild.measure import measure


def run(
    settings: dict[str, Any], inputs: dict[str, Path | list[Path]], outputs: dict[str, Path], work: Path, name: str
) -> None:
    """Write <key>.json and <key>.jsonl a measurement, and metrics.json with every metric, into `samples`."""
    model = inputs["model"]
    assert isinstance(model, Path)
    metrics = measure(model, settings, outputs["samples"], work)
    write_json(outputs["samples"] / "metrics.json", metrics)
