"""NeuralHermes at its real size without its real weights: a random model of Mistral 7B's shape, through a whole build.

    python benchmarks/headline.py PROJECT --tokenizer SmolLM2-135M-Instruct --rows orca_dpo_pairs.jsonl --steps 20

PROJECT is a new folder. --tokenizer is a checkpoint folder whose chat template is ChatML. The recipe is
recipes/headline/neuralhermes.yaml, or neuralhermes-h200 with --recipe, and every setting in it that does not depend on
what can be reached: base and rows are local files, the leaderboard's tasks are recipes/concise/common_sense.yaml,
steps are fewer with half of them warm-up, gates ask for the run's health, and it promotes to a folder. Answers and
scores mean nothing; times, memory and curves do. Needs 60 GB of disk, and on an H200 some minutes.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("project", type=Path)
    arguments.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder to take the tokenizer from")
    arguments.add_argument("--rows", type=Path, required=True, help="rows of Intel/orca_dpo_pairs as JSON lines")
    arguments.add_argument("--recipe", default="neuralhermes", help="default: neuralhermes")
    arguments.add_argument("--steps", type=int, default=20, help="default: 20")
    arguments.add_argument("--gpus", type=int, default=1, help="default: 1; 0 trains on the CPU with adamw_torch")
    arguments.add_argument("--layers", type=int, default=32, help="default: 32, as Mistral 7B; fewer for a trial")
    arguments.add_argument("--hidden", type=int, default=4096, help="default: 4096, as Mistral 7B; a multiple of 64")
    asked = arguments.parse_args()
    timed("model", make_model, asked.project / "models/base", asked.tokenizer, asked.layers, asked.hidden)
    make_project(asked.project, asked.rows, asked.recipe, asked.steps, asked.gpus)
    for command in ("lock", "sync", f"build {asked.recipe}"):
        timed(f"prefbuild {command}", subprocess.run, ["prefbuild", *command.split()], cwd=asked.project, check=True)
    question = ["generate", asked.recipe, "What is a Large Language Model?", "--max-new-tokens", "32"]
    timed("generate", subprocess.run, ["prefbuild", *question], cwd=asked.project, check=True)


def timed(what: str, do: Any, *arguments: Any, **named: Any) -> None:
    start = time.monotonic()
    do(*arguments, **named)
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def make_model(folder: Path, tokenizer: Path, layers: int, hidden: int) -> None:
    """Random weights in bf16 shards, with the tokenizer's files beside them."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    vocabulary = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    config = MistralConfig(
        vocab_size=max(32_002, len(vocabulary)),
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if hidden < 1024 else 32,
        num_key_value_heads=hidden // 64 if hidden < 1024 else 8,
        max_position_embeddings=32_768,
        sliding_window=None,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        # Small, as the weights of a trained 7B are: bf16 has so few digits that adding a young adapter to larger ones
        # would change nothing.
        initializer_range=0.003,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    vocabulary.save_pretrained(folder)


def make_project(project: Path, rows: Path, name: str, steps: int, gpus: int) -> None:
    """A git and DVC project with the recipe, its rows and a task."""
    (project / "recipes/rows").mkdir(parents=True)
    (project / ".dvc").mkdir()
    for path in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / path, project / path)
    with open(project / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/models/\n")
    shutil.copytree(ROOT / "recipes/concise", project / "recipes/concise")
    shutil.copy(rows, project / "recipes/rows/orca_dpo_pairs.jsonl")
    recipe = yaml.safe_load((ROOT / f"recipes/headline/{name}.yaml").read_text(encoding="utf-8"))
    recipe["base"] = {"source": "file", "path": "models/base"}
    recipe["data"]["sources"] = [{"source": "file", "path": "recipes/rows/orca_dpo_pairs.jsonl"}]
    recipe["train"] |= {"max_steps": steps, "warmup_steps": steps // 2, "save_steps": steps}
    recipe["train"].pop("num_train_epochs", None)
    recipe["evaluate"]["tasks"] = [{"task": "recipes/concise/common_sense.yaml"}]
    recipe["gates"] = [
        {"metric": "train.stopped_early", "max": 0},
        {"metric": "train.steps", "min": steps},
        {"metric": "evaluate.common_sense.acc", "min": 0},
    ]
    recipe["promote"] = {"to": "directory", "path": "registry"}
    recipe["compute"] = {"gpus": gpus}
    if gpus == 0:
        recipe["train"]["optim"] = "adamw_torch"
    (project / f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)


if __name__ == "__main__":
    main()
