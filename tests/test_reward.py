"""`prefbuild reward`, and a build with GRPO whose reward is a file of the project."""

import json
import re
from pathlib import Path

import pytest
from project import RECIPE as OF_PAIRS
from project import make_project, run

from prefbuild.promote import promote
from prefbuild.reward import try_rewards

RECIPE = """\
base: {source: file, path: models/tiny}
data:
  sources:
    - source: file
      path: recipes/rows/train.jsonl
  columns: {prompt: question}
  ignore: [chosen, kind]
  max_prompt_length: 64
  held_out: 0.1
train:
  method: grpo
  rewards:
    - reward: numeric
      column: rejected
    - reward: file
      path: recipes/own.py
      function: short
      weight: 0.5
  num_generations: 2
  max_completion_length: 4
  per_device_train_batch_size: 4
  max_steps: 2
  lora: {r: 4}
evaluate:
  tasks:
    - task: recipes/rows/sums.yaml
gates:
  - metric: train.held_out.rewards.short
    min: -1000.0
"""
# A reward model that scores completions of the recipe above.
JUDGE = (
    OF_PAIRS[: OF_PAIRS.index("merge:")]
    .replace("method: dpo", "method: reward")
    .replace("max_steps: 4", "max_steps: 2")
    + "gates: [{metric: train.held_out.accuracy, min: 0.0}]\n"
    + OF_PAIRS[OF_PAIRS.index("promote:") :]
)
OWN = "def short(prompts, completions):\n    return [-len(text) for text in completions]\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe with rewards, which nothing locked."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    (tmp_path / "recipes/sums.yaml").write_text(RECIPE)
    (tmp_path / "recipes/own.py").write_text(OWN)
    return tmp_path


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_a_table_of_every_reward_and_the_total(project: Path) -> None:
    given = write(
        project / "given.jsonl",
        {"prompt": "1 plus 2?", "completion": "It is 3.", "rejected": "1 plus 2 is 3."},
        {"prompt": "1 plus 2?", "completion": "4" * 60, "rejected": "3"},
        {"prompt": "never", "completion": "shown", "rejected": "1"},
    )
    output = run(project, "prefbuild", "reward", "sums", "--try", given, "-n", "2")
    path = project / given
    wide = len(f"{path}:1")
    assert output == (
        f"{'':{wide}}  numeric  short  total  completion\n"
        f"{'weight':{wide}}        1    0.5\n"
        f'{path}:1        1     -8     -3  "It is 3."\n'
        f'{path}:2        0    -60    -30  "{"4" * 45}.."\n'
    )


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [
        ("{", "given.jsonl:1: is not JSON: ", 2),
        ("[]", "given.jsonl:1: is no object; give {prompt, completion, ...columns}", 2),
        ('{"prompt": "x"}', "given.jsonl:1: completion is NoneType, not text; there are prompt", 2),
        ("", "given.jsonl: holds no completion; give JSON Lines of {prompt, completion, ...columns}", 2),
        ('{"completion": "3"}', "reward numeric: row 1 has no rejected; it is null, or not in the data", 7),
    ],
)
def test_rows_that_can_not_be_scored_are_told(project: Path, line: str, message: str, code: int) -> None:
    (project / "given.jsonl").write_text(line)
    assert message in run(project, "prefbuild", "reward", "sums", "--try", "given.jsonl", code=code)


def test_a_file_or_recipe_that_is_not_there_is_told(project: Path) -> None:
    output = run(project, "prefbuild", "reward", "sums", "--try", "no.jsonl", code=2)
    assert "no.jsonl: No such file or directory; give a file of JSON Lines, or - for stdin" in output
    assert "did you mean sums?" in run(project, "prefbuild", "reward", "sum", "--try", code=2)
    recipe = RECIPE[: RECIPE.index("train:")] + "train: {method: dpo}\n" + RECIPE[RECIPE.index("evaluate:") :]
    recipe = recipe.replace("question}", "question, chosen: chosen, rejected: rejected}").replace(
        "held_out.rewards.short", "loss"
    )
    (project / "recipes/sums.yaml").write_text(recipe.replace("[chosen, kind]", "[kind]"))
    output = run(project, "prefbuild", "reward", "sums", "--try", code=2)
    assert "sums: method dpo has no rewards; grpo and rloo have" in output


def test_a_build_with_a_reward_of_ones_own_and_a_reward_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_project(tmp_path / "project", tiny_model, recipes=())
    judge = "      weight: 0.5\n    - {reward: model, recipe: judge, weight: 0.1}\n"
    (root / "recipes/sums.yaml").write_text(RECIPE.replace("      weight: 0.5\n", judge))
    (root / "recipes/judge.yaml").write_text(JUDGE)
    (root / "recipes/own.py").write_text(OWN)
    assert "pinned reward recipes/own.py" in run(root, "prefbuild", "lock")
    run(root, "prefbuild", "sync")
    run(root, "dvc", "repro", "-q", "pipelines/sums/dvc.yaml:train")
    metrics = json.loads((root / "build/sums/train.json").read_text())
    assert metrics["rewards"]["short"] < 0 and metrics["held_out"]["rewards"]["numeric"] == 0
    assert metrics["rewards"]["judge"] != 0
    section = json.loads((root / "build/.resolved/sums.json").read_text())["train"]
    assert section["inputs"]["rewards"] == ["recipes/own.py"]
    assert section["inputs"]["reward_models"] == ["build/judge/merged"]
    assert [pin["path"] for pin in section["settings"]["rewards"]] == ["recipes/own.py"]

    output = run(root, "prefbuild", "build", "judge")
    assert (
        "judge: PASS, 1 of 1 rules hold" in output and "Stage 'pipelines/judge/dvc.yaml:merge' didn't change" in output
    )
    assert re.search(r"^accuracy +[01]\.\d+ +[01]\.\d+ +[01]\.\d+$", output, re.MULTILINE)
    monkeypatch.chdir(root)
    promote(root, "judge", allow_dirty=True)
    card = (root / "registry/judge/v1/README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "made a reward model of preferences. Published" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("registry/judge/v1")' in card
    assert "AutoModelForCausalLM" not in card and "generate(" not in card
    line = json.dumps({"prompt": "What is 1 plus 2?", "completion": "3"})
    (root / "answers.jsonl").write_text(line)
    output = try_rewards(root, "judge", "answers.jsonl", num_rows=1, column=None)
    assert output.split()[:5] == ["judge", "total", "completion", "weight", "1"]

    output = run(root, "prefbuild", "reward", "sums", "--try", "--column", "chosen", "-n", "1")
    where, numeric, short, score, total, text = output.splitlines()[-1].split()
    assert (where, numeric, short, text) == ("train.jsonl:1", "1", "-1", '"3"')
    assert float(total) == pytest.approx(0.5 + 0.1 * float(score), abs=1e-4)

    tokens = RECIPE.replace(
        "reward: numeric\n      column: rejected", "reward: length\n      target: 5\n      unit: tokens"
    )
    (root / "recipes/tokens.yaml").write_text(tokens.replace("[chosen, kind]", "[chosen, kind, rejected]"))
    line = json.dumps({"prompt": "Name it.", "completion": "Paris France"})
    output = run(root, "bash", "-c", f"echo '{line}' | prefbuild reward tokens --try")
    assert output.splitlines()[-1].split()[:3] == ["stdin:1", "-3", "-12"]
    (root / "recipes/tokens.yaml").unlink()

    (root / "recipes/own.py").write_text(OWN.replace("-len", "len"))
    changed = "recipes/own.py changed since it was locked; run `prefbuild lock`"
    assert changed in run(root, "dvc", "repro", "pipelines/sums/dvc.yaml:train", code=None)
    assert "changed recipes/own.py: sha256" in run(root, "prefbuild", "lock")
    assert "Running stage 'pipelines/sums/dvc.yaml:train'" in run(root, "dvc", "repro", "pipelines/sums/dvc.yaml:train")
    assert json.loads((root / "build/sums/train.json").read_text())["rewards"]["short"] > 0
