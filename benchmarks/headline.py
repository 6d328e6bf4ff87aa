"""The headline recipes at their real size, through a whole build, where their models and data can't be reached.

    python benchmarks/headline.py PROJECT --tokenizer SmolLM2-135M-Instruct --rows orca_dpo_pairs.jsonl --steps 20

builds neuralhermes (or neuralhermes-h200) on a random model of Mistral 7B's shape: answers and scores mean nothing;
times, memory and curves do. --tokenizer is a checkpoint folder whose chat template is ChatML. It needs 60 GB of disk,
and on an H200 ten minutes.

    python benchmarks/headline.py PROJECT --recipe smolgrpo --base SmolLM2-135M-Instruct.gguf --rows tldr.jsonl \\
        --steps 72 --set data.held_out=0.1

builds smolgrpo on a real model: a checkpoint folder or a GGUF file.

PROJECT is a new folder. Every setting of recipes/headline/NAME.yaml stands but those that depend on what can be
reached: base and rows are local files, tasks are recipes/concise/common_sense.yaml, steps are fewer (of warm-up in
proportion), gates ask for the run's health, and it promotes to a folder. --set changes others, each as KEY=YAML;
KEY= takes it out.
"""

import argparse
import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from material import make_model

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("project", type=Path)
    arguments.add_argument("--recipe", default="neuralhermes", help="default: neuralhermes")
    base = arguments.add_mutually_exclusive_group(required=True)
    base.add_argument("--base", type=Path, help="train on this checkpoint folder or GGUF file")
    base.add_argument("--tokenizer", type=Path, help="train on random weights, with this checkpoint folder's tokenizer")
    arguments.add_argument("--rows", type=Path, required=True, help="rows of the recipe's data set as JSON lines")
    arguments.add_argument("--steps", type=int, default=20, help="default: 20")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=YAML", help="as in train.beta=0.2")
    arguments.add_argument("--gpus", type=int, default=1, help="default: 1; 0 trains on the CPU with adamw_torch")
    arguments.add_argument("--layers", type=int, default=32, help="default: 32, as Mistral 7B; fewer for a trial")
    arguments.add_argument("--hidden", type=int, default=4096, help="default: 4096, as Mistral 7B; a multiple of 64")
    arguments.add_argument("--prompt", default="What is a Large Language Model?", help="what is generated from")
    asked = arguments.parse_args()
    base_path = asked.base.resolve() if asked.base else Path("models/base")
    if asked.tokenizer:
        timed("model", make_model, asked.project / base_path, asked.tokenizer, asked.layers, asked.hidden)
    make_project(asked.project, base_path, asked.rows, asked.recipe, asked.steps, asked.gpus, asked.set)
    for command in ("check", "lock", "sync"):
        timed(f"prefbuild {command}", subprocess.run, ["prefbuild", command], cwd=asked.project, check=True)
    git(asked.project, "add", "-A")
    git(asked.project, "commit", "-qm", "A headline recipe")
    timed("dvc repro", subprocess.run, ["dvc", "repro"], cwd=asked.project, check=True)
    sampling = ["--temperature", "0.5", "--min-p", "0.1", "--max-new-tokens", "96"]
    question = ["prefbuild", "generate", asked.recipe, asked.prompt, *sampling]
    timed("generate", subprocess.run, question, cwd=asked.project, check=True)


def git(project: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=project, check=True)


def timed(what: str, do: Any, *arguments: Any, **named: Any) -> None:
    start = time.monotonic()
    do(*arguments, **named)
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def make_project(project: Path, base: Path, rows: Path, name: str, steps: int, gpus: int, settings: list[str]) -> None:
    """A git and DVC project with the recipe, its rows and a task."""
    (project / "recipes/rows").mkdir(parents=True)
    (project / ".dvc").mkdir()
    for path in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / path, project / path)
    with open(project / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/models/\n")
    shutil.copytree(ROOT / "recipes/concise", project / "recipes/concise")
    shutil.copy(rows, project / "recipes/rows" / rows.name)
    recipe = yaml.safe_load((ROOT / f"recipes/headline/{name}.yaml").read_text(encoding="utf-8"))
    train = recipe["train"]
    recipe["base"] = {"source": "file", "path": str(base)}
    recipe["data"]["sources"] = [{"source": "file", "path": f"recipes/rows/{rows.name}"}]
    if "max_steps" in train and "warmup_steps" in train:
        train["warmup_steps"] = round(train["warmup_steps"] / train["max_steps"] * steps)
    train.pop("num_train_epochs", None)
    train["max_steps"] = steps
    recipe["evaluate"]["tasks"] = [{"task": "recipes/concise/common_sense.yaml"}]
    recipe["gates"] = [
        {"metric": "train.stopped_early", "max": 0},
        {"metric": "train.steps", "min": steps},
        {"metric": "evaluate.common_sense.acc", "min": 0},
    ]
    recipe["promote"] = {"to": "directory", "path": "registry"}
    recipe["compute"] = {"gpus": gpus}
    if gpus == 0:
        train["optim"] = "adamw_torch"
    for setting in settings:
        key, _, value = setting.partition("=")
        *sections, last = key.split(".")
        section = functools.reduce(lambda part, one: part.setdefault(one, {}), sections, recipe)
        if value:
            section[last] = yaml.safe_load(value)
        else:
            section.pop(last, None)
    (project / f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    git(project, "init", "-q")


if __name__ == "__main__":
    main()
