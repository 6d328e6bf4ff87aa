"""SFT, then DPO, then GRPO of the real SmolLM2-135M in one `dvc repro`; then one change in the middle.

    python benchmarks/chain.py PROJECT --steps 4 --limit 20

PROJECT is a new folder; the recipes are recipes/examples/chain/. It fails unless another beta in chain-dpo runs again
exactly what follows from it: training, merge, evaluation and gate of chain-dpo, the baseline on its model, all of
chain-grpo, and the report; and unless the outputs of chain-sft keep their digests. With few steps and documents gates may
fail, which stops nothing. Needs the package index for the base model, 4 GB of memory and no GPU.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAIN = ("chain-sft", "chain-dpo", "chain-grpo")
OF_A_RECIPE = ("prepare", "train", "merge", "evaluate", "gate")
ALL = {"resolve", "report", "reference chain-dpo"} | {f"{stage} {name}" for name in CHAIN for stage in OF_A_RECIPE}
# Preparing chain-dpo reads rows and the tokenizer of chain-sft's model, its reference what that says, and no beta.
AFTER_BETA = {
    *("resolve", "report", "baseline recipe-chain-dpo"),
    *(f"{stage} chain-dpo" for stage in ("train", "merge", "evaluate", "gate")),
    *(f"{stage} chain-grpo" for stage in OF_A_RECIPE),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("project", type=Path)
    arguments.add_argument("--steps", type=int, help="optimizer steps of each training; default: the recipes' own")
    arguments.add_argument("--limit", type=int, help="documents of each task; default: all")
    arguments.add_argument("--beta", type=float, default=0.2, help="chain-dpo's beta in the second build; default: 0.2")
    asked = arguments.parse_args()
    make_project(asked.project, asked.steps, asked.limit)
    for command in ("lock", "sync"):
        subprocess.run(["prefbuild", command], cwd=asked.project, check=True)

    ran = repro(asked.project)
    if not ran >= ALL:
        sys.exit(f"the first build left out {', '.join(sorted(ALL - ran))}")
    before = outputs(asked.project, "chain-sft")

    change(asked.project / "recipes/chain-dpo.yaml", beta=asked.beta)
    print(f"\nchain-dpo: beta is {asked.beta:g} now", flush=True)
    ran = repro(asked.project)
    print(f"ran again: {', '.join(sorted(ran))}")
    if ran != AFTER_BETA:
        missing, more = sorted(AFTER_BETA - ran), sorted(ran - AFTER_BETA)
        sys.exit(f"that is not what follows from beta: missing {missing}, too many {more}")
    if outputs(asked.project, "chain-sft") != before:
        sys.exit("outputs of chain-sft changed")
    if repro(asked.project):
        sys.exit("a third dvc repro ran something")
    print("exactly what follows from beta, nothing of chain-sft, and nothing a third time")
    subprocess.run(["prefbuild", "gates", *CHAIN], cwd=asked.project)


def make_project(project: Path, steps: int | None, limit: int | None) -> None:
    """A git and DVC project with the three recipes, their rows and tasks."""
    shutil.copytree(ROOT / "recipes/concise", project / "recipes/concise")
    (project / ".dvc").mkdir()
    for path in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / path, project / path)
    for name in CHAIN:
        path = project / f"recipes/{name}.yaml"
        shutil.copy(ROOT / f"recipes/examples/chain/{name}.yaml", path)
        if steps is not None:
            change(path, max_steps=steps, warmup_steps=steps // 4)
        if limit is not None:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            for task in recipe["evaluate"]["tasks"]:
                task["limit"] = limit
            path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)


def change(path: Path, **settings: float) -> None:
    """Other settings of `train:` in a recipe."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["train"] |= settings
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def repro(project: Path) -> set[str]:
    """Run plain `dvc repro`, print how long each stage took; returns what ran, as in `train chain-sft`."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    ran: list[tuple[str, float]] = []
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"> prefbuild (?:stage )?(.*)", line):
            ran.append((found[1], time.monotonic()))
    if process.wait():
        sys.exit("".join(lines))
    ends = [began for _, began in ran[1:]] + [time.monotonic()]
    for (stage, began), end in zip(ran, ends, strict=False):  # when nothing ran there is an end alone
        print(f"{end - began:6.1f} s  {stage}")
    print(f"{time.monotonic() - start:6.1f} s  dvc repro, {len(ran)} stages", flush=True)
    return {stage for stage, _ in ran}


def outputs(project: Path, name: str) -> dict[str, str]:
    """The digest of every output of a recipe's stages, from DVC's lock."""
    locked = yaml.safe_load((project / f"pipelines/{name}/dvc.lock").read_text(encoding="utf-8"))
    return {out["path"]: out["md5"] for stage in locked["stages"].values() for out in stage["outs"]}


if __name__ == "__main__":
    main()
