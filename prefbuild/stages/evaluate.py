"""Measure the merged model with lm-evaluation-harness: exactly the folder that would be published."""

from pathlib import Path
from typing import Any

from prefbuild.artifact import write_json
from prefbuild.measure import measure


def run(
    settings: dict[str, Any], inputs: dict[str, Path | list[Path]], outputs: dict[str, Path], work: Path, name: str
) -> None:
    """Write <key>.json and <key>.jsonl a measurement into `samples`, and every metric into `metrics`."""
    model = inputs["model"]
    assert isinstance(model, Path)
    write_json(outputs["metrics"], measure(model, settings, outputs["samples"], work))
