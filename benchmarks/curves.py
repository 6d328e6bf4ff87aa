"""The same DPO recipe by both engines: do their curves agree, and what they measure on held-out pairs?

    python benchmarks/curves.py FOLDER --model SmolLM2-135M-Instruct --rows orca_dpo_pairs_284.jsonl

FOLDER is a new folder. TRL trains twice, in micro-batches of 4 and of 8 pairs, which is the same training but for rounding:
how far these two are apart says how much of a difference is noise. Writes the curves as JSON and draws them.
"""

import argparse
from pathlib import Path
from typing import Any

import speed_arms
from material import read_pairs, shortened, write_result, write_rows

from prefbuild.report.pictures import Panel, figure, line_chart
from prefbuild.stages.report import read_curve

ROOT = Path(__file__).resolve().parent.parent
A_STEP = 16  # pairs
RUNS = {"packed": ("packed", 4, 4), "TRL, 8 x 2": ("trl", 8, 2), "TRL": ("trl", 4, 4)}
DRAWN = {"loss": "Loss", "rewards/margins": "Reward margin"}
CURVES = (*DRAWN, "rewards/accuracies", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument(
        "--rows", type=Path, required=True, help="preference pairs as JSON lines; every tenth is held out"
    )
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="default: auto")
    parser.add_argument("--quick", action="store_true", help="try it on a CPU, with texts of 8 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/curves-h200.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/speed-curves.svg")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    pairs = read_pairs(asked.model, asked.rows, 1536, 1024)
    if asked.quick:
        pairs = shortened(pairs)
    held_out = pairs[9::10]
    train = [pair for place, pair in enumerate(pairs) if place % 10 != 9]
    # Whole steps: in a last, smaller one pairs weigh by how micro-batches are cut.
    train = train[: len(train) // A_STEP * A_STEP]
    write_rows(folder / "prepared", train, held_out)
    found: dict[str, Any] = {"steps": asked.steps, "rows": len(train), "held_out_rows": len(held_out), "runs": {}}
    for name, (engine, batch, accumulation) in RUNS.items():
        found["runs"][name] = one(folder, asked, engine, batch, accumulation)
    found["from_trl"] = {name: apart(found["runs"]["TRL"], found["runs"][name]) for name in RUNS if name != "TRL"}
    write_result(asked.out, found)
    asked.picture.write_text(picture(found["runs"]), encoding="utf-8")
    for name, far in found["from_trl"].items():
        print(f"{name} against TRL: " + ", ".join(f"{what} {value:.2g}" for what, value in far.items()))


def one(folder: Path, asked: argparse.Namespace, engine: str, batch: int, accumulation: int) -> dict[str, Any]:
    """Train in a process of its own; returns curves, as (step, value), and the metrics of train.json."""
    train = {
        "method": "dpo",
        "engine": engine,
        "learning_rate": 5e-5,
        "max_steps": asked.steps,
        "warmup_steps": asked.steps // 6,
        "save_steps": asked.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "precision": asked.precision,
        "deterministic": False,
    }
    name = f"{engine}-{batch}x{accumulation}"
    found = speed_arms.run(
        folder, name, "any_dpo", {"train": train, "model": str(asked.model.resolve())}, alone=not asked.quick
    )
    if "failed" in found:
        raise SystemExit(f"{name}: {found['failed']}")
    where = folder / name / "live/plots/metrics/train"
    curves = {curve: read_curve(where / f"{curve}.tsv") for curve in CURVES}
    return {"curves": curves, "metrics": found["metrics"], "seconds": found["seconds"]}


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The largest differences between two runs."""
    curves = [(one["curves"][name], other["curves"][name]) for name in ("loss", "rewards/margins")]
    far = [max(abs(a - b) for (_, a), (_, b) in zip(*both, strict=True)) for both in curves]
    mine, theirs = one["metrics"]["held_out"], other["metrics"]["held_out"]
    return {
        "largest difference of a step's loss": far[0],
        "of its margin": far[1],
        "of the held-out loss": abs(mine["loss"] - theirs["loss"]),
        "of the held-out margin": abs(mine["rewards"]["margins"] - theirs["rewards"]["margins"]),
        "of the held-out accuracy": abs(mine["rewards"]["accuracies"] - theirs["rewards"]["accuracies"]),
    }


def picture(runs: dict[str, Any]) -> str:
    """The curves of all runs, and how far each is from TRL's: what lies on one line is seen as one."""
    panels = []
    for curve, title in DRAWN.items():
        lines = {name: run["curves"][curve] for name, run in runs.items()}
        panels.append(panel(title, lines))
        far = {
            name: [(step, value - of_trl) for (step, value), (_, of_trl) in zip(line, lines["TRL"], strict=True)]
            for name, line in lines.items()
            if name != "TRL"
        }
        panels.append(panel(f"{title} less TRL's", far))
    return figure("DPO of one recipe by step: the packed engine, and TRL in two micro-batches", panels)


def panel(title: str, lines: dict[str, list[tuple[float, float]]]) -> Panel:
    legend = [(f"dot c{place}", name) for place, name in enumerate(lines, 1)]
    return Panel(heading=title, svg=line_chart(title, lines, "step"), legend=legend)


if __name__ == "__main__":
    main()
