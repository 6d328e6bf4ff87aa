"""Train an adapter, or all weights, on prepared rows, by the recipe's method."""

from pathlib import Path
from typing import Any

from prefbuild.artifact import read_manifest, verify_artifact, write_json
from prefbuild.methods import METHODS
from prefbuild.rewards.file import verify as verify_rewards
from prefbuild.track import asked_for, check_installed


def run(settings: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Path], work: Path, name: str) -> None:
    """Leave the adapter (with use_peft: false all weights), train.json and DVCLive's curves.

    Goes on from a checkpoint in `work` when there is one.
    """
    check_installed(asked_for())
    verify_artifact(inputs["prepared"])
    verify_rewards(settings.get("rewards", []))
    if "reference_log_probs" in inputs:
        verify_artifact(inputs["reference_log_probs"])
    for judge in inputs.get("reward_models", []):
        verify_artifact(judge)
    from prefbuild.training import Run, ranks, trainer

    method, engine = settings["train"]["method"], settings["train"].get("engine")
    asked = METHODS[method].model_validate(settings["train"])
    if engine == "packed" and ("reference" not in inputs or "reference_log_probs" in inputs):
        from prefbuild.training.ahead import read_ahead

        read_ahead(asked, inputs["model"])
    one = Run(
        name=name,
        seed=settings["seed"],
        base={"name": settings["base"]["name"], "revision": read_manifest(inputs["model"])["digest"]},
        model=inputs["model"],
        reference=inputs.get("reference"),
        log_probs=inputs.get("reference_log_probs"),
        prepared=inputs["prepared"],
        trained=outputs["adapter" if "adapter" in outputs else "trained"],
        live=outputs["live"].parent,
        work=work,
    )
    metrics = trainer(method, engine)(asked, one)
    if ranks.is_main():
        write_json(outputs["metrics"], metrics)
    ranks.leave()
