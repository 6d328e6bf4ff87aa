"""Small projects that build in seconds, and commands run in them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder; returns its output."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def run(folder: Path, *command: str, code: int | None = 0, timeout: float = 240, **env: str) -> str:
    """Run a command in a folder and return stdout and stderr together; `code` is the exit code wanted."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert code is None or done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def write_rows(path: Path, count: int) -> None:
    """A small preference for bare sums, one row a line."""
    rows = [
        {
            "question": f"What is {a} plus {b}?",
            "chosen": str(a + b),
            "rejected": f"{a} plus {b} is {a + b}.",
            "kind": "sum",
        }
        for a in range(1, 100)
        for b in (2, 3)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))


RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
description: A tiny model for tests.
base:
  source: file
  path: models/tiny
data:
  sources:
    - source: file
      path: recipes/rows/train.jsonl
  columns: {prompt: question, chosen: chosen, rejected: rejected}
  ignore: [kind]
  max_prompt_length: 64
  max_length: 96
  held_out: 0.1
train:
  method: dpo
  learning_rate: 1.0e-3
  max_steps: 4
  save_steps: 2
  per_device_train_batch_size: 4
  lora: {r: 4}
merge:
  max_kl: 0.5
evaluate:
  tasks:
    - task: recipes/rows/sums.yaml
      limit: 4
gates:
  - metric: evaluate.sums.exact_match
    min: 0.0
  - metric: prepare.dropped.prompt_too_long
    max: 0
promote:
  to: directory
  path: registry
"""

TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: held_out.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def make_project(folder: Path, tiny: Path, recipes: tuple[str, ...] = ("first",)) -> Path:
    """A git and DVC project with recipes of the tiny model, locked, synced and committed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny, folder / "models" / "tiny")
    for name in (".gitignore", ".dvcignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    with open(folder / ".gitignore", "a") as file:
        file.write("/models/\n")
    write_rows(folder / "recipes/rows/train.jsonl", 40)
    (folder / "recipes/rows/sums.yaml").write_text(TASK)
    (folder / "recipes/rows/held_out.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {a} plus 5?", "answer": str(a + 5)}) + "\n" for a in range(12))
    )
    for name in recipes:
        (folder / f"recipes/{name}.yaml").write_text(RECIPE)
    git(folder, "init", "-q")
    run(folder, "prefbuild", "lock")
    run(folder, "prefbuild", "sync")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "project")
    return folder
