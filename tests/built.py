"""A small build with the shape of a real one, in a git repository: real recipes, random weights, honest metrics.

`make(root)` writes recipe `x`, compared with its base and with recipe `y`. Recipes, lock, resolved files and DVC files
are made by prefbuild; only the stages are not run. `judge`, `seal` and `lock` redo what the gate stage, the worker and
DVC do after a stage, for tests that change something on the way.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from prefbuild import gates, yamlfile
from prefbuild import lock as locks
from prefbuild.artifact import canonical_json, read_manifest, write_json, write_manifest
from prefbuild.pipeline import RECIPE_STAGES, sync
from prefbuild.resolve import load_project, resolve, write_resolved

N = 40
RIGHT = {"base": 18, "x": 30, "y": 24}  # documents of task concise each model has right
GATES = [
    {"metric": "evaluate.concise.exact_match", "min": 0.6, "min_delta": 0.1, "confidence": 0.95},
    {"metric": "evaluate.sense.acc", "max_drop": 0.05},
    {"metric": "evaluate.concise.exact_match", "min_delta": 0.05, "against": "y"},
    {"metric": "prepare.dropped.empty", "max": 2},
]
CURVES: dict[str, Callable[[int], float]] = {
    "loss": lambda step: 0.75 - step / 32,
    "rewards/margins": lambda step: step / 4,
    "rewards/accuracies": lambda step: 1 - 1 / step,
    "rewards/chosen": lambda step: step / 8,
    "rewards/rejected": lambda step: -step / 8,
}
# What stages leave beside their metrics.
MORE_OUTS = {"prepare": ("build/x/lengths.csv",), "train": ("build/x/live/plots/metrics",)}
RECIPE: dict[str, Any] = {
    "description": "Answers in one word.",
    "base": {"source": "file", "path": "models/tiny", "name": "org/tiny"},
    "data": {
        "sources": [{"source": "file", "path": "recipes/rows/train.jsonl"}],
        "max_prompt_length": 32,
        "max_length": 64,
    },
    "train": {"method": "dpo", "beta": 0.25, "max_steps": 8, "lora": {"r": 4}},
    "evaluate": {"tasks": [{"task": f"recipes/tasks/{name}.yaml"} for name in ("concise", "sense")]},
    "promote": {"to": "directory", "path": "registry"},
}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""


def make_sources(root: Path) -> None:
    """What a user commits: recipes, params.yaml, the lock, and the DVC files that `prefbuild sync` writes."""
    checkpoint(root / "models/tiny", seed=1)
    write(root / "models/tiny/README.md", "---\nlicense: apache-2.0\n---\n# tiny\n")
    write(root / "recipes/rows/train.jsonl", jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    for name in ("concise", "sense"):
        write(root / f"recipes/tasks/{name}.yaml", TASK.format(name=name))
        write(root / f"recipes/tasks/{name}.jsonl", jsonl([{"question": "q", "answer": "a"}]))
    write(root / "params.yaml", "seed: 42\n")
    write(root / ".gitignore", "/build/*\n!/build/.resolved\n/registry\n")
    write_recipe(root, "x", gates=GATES)
    write_recipe(root, "y", gates=GATES[:1])
    resolve_all(root)


def write_recipe(root: Path, name: str, **changes: Any) -> None:
    write(root / f"recipes/{name}.yaml", yamlfile.dump({**RECIPE, **changes}))


def resolve_all(root: Path) -> None:
    """Lock, sync and resolve."""
    locks.lock(root, load_project(root).recipes)
    project = load_project(root)
    sync(project)
    write_resolved(root, resolve(project))


def _gate_section() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make_sources(Path(folder))
        return resolved(Path(folder))["gate"]


def resolved(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "build/.resolved/x.json").read_text()))


def gate(metric: str, **rules: Any) -> dict[str, Any]:
    """A Gate as the resolved recipe holds it."""
    empty = dict.fromkeys(("min", "max", "min_delta", "max_drop", "confidence"))
    return {"metric": metric, **empty, "against": "base", **rules}


def gate_settings(gates_: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Settings of the gate stage, with other gates than the recipe's."""
    settings: dict[str, Any] = json.loads(json.dumps(SECTION["settings"]))
    return settings if gates_ is None else {**settings, "gates": gates_}


def make(root: Path) -> None:
    """Write the sources, commit them, and write what `dvc repro` would leave."""
    make_sources(root)
    checkpoint(root / BASE, seed=1)
    write(root / BASE / "README.md", "---\nlicense: apache-2.0\n---\n# tiny\n")
    write_manifest(root / BASE, stage="model", name=Path(BASE).name, inputs={})
    base = digest(root, BASE)
    evaluate(root, BASELINE, model=base, who="base", stage="baseline", name=Path(BASELINE).name)
    evaluate(root, "build/y/evaluate", model="sha256:" + "1" * 64, who="y", stage="evaluate", name="y")

    rows = [{"id": f"0:{i}", "prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    write(root / "build/x/prepared/train.jsonl", jsonl(rows[:8]))
    write(root / "build/x/prepared/held_out.jsonl", jsonl(rows[8:]))
    write_manifest(
        root / "build/x/prepared", stage="prepare", name="x", inputs={"model": base, "data": {"d": "sha256:0"}}
    )
    dropped = dict.fromkeys(("broken", "filtered", "identical_pair", "duplicate", "special_token"), 0)
    write_json(root / "build/x/prepare.json", {
        "rows": {"in": 12, "out": 10, "train": 8, "held_out": 2},
        "dropped": {**dropped, "empty": 1, "prompt_too_long": 1, "too_long": 0},
        "truncated": {"chosen": 3, "rejected": 0}, "end_of_turn_lost": {"chosen": 0, "rejected": 0},
    })  # fmt: skip

    write(root / "build/x/reference/rows.jsonl", jsonl([{"file": "train.jsonl", "row": i} for i in range(8)]))
    prepared = digest(root, "build/x/prepared")
    write_manifest(
        root / "build/x/reference", stage="reference", name="x", inputs={"model": base, "prepared": prepared}
    )

    adapter = root / "build/x/adapter"
    weights(adapter / "adapter_model.safetensors", seed=2)
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "tiny"})
    made_from = {"model": base, "prepared": prepared, "reference_log_probs": digest(root, "build/x/reference")}
    write_manifest(adapter, stage="train", name="x", inputs=made_from)
    write_json(root / "build/x/train.json", {
        "loss": 0.5, "steps": 8, "rewards": {"margins": 1.25, "accuracies": 0.9}, "machine": {"cpu": "test"},
    })  # fmt: skip

    checkpoint(root / "build/x/merged", seed=3)
    write(root / "build/x/merged/chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
    made_from = {"model": base, "adapter": digest(root, "build/x/adapter")}
    write_manifest(root / "build/x/merged", stage="merge", name="x", inputs=made_from)
    write_json(root / "build/x/merge.json", {"kl": 0.0001, "greedy_agreement": 1.0, "tolerance": {"max_kl": 0.01}})

    merged = digest(root, "build/x/merged")
    scores = evaluate(root, "build/x/evaluate", model=merged, who="x", stage="evaluate", name="x")
    write_json(root / "build/x/evaluate.json", scores)
    write(root / "build/x/lengths.csv", "part,tokens,rows\nprompt,0,6\nprompt,8,4\nchosen,0,10\nrejected,0,10\n")
    for curve, value in CURVES.items():
        rows = "".join(f"{step}\t{value(step)}\n" for step in range(1, 9))
        write(root / f"build/x/live/plots/metrics/train/{curve}.tsv", f"step\t{curve.rpartition('/')[2]}\n{rows}")

    judge(root)
    lock(root)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a recipe")


def judge(root: Path) -> dict[str, Any]:
    """What the gate stage does."""
    section = resolved(root)["gate"]
    verdict = gates.judge(section["settings"], section["inputs"], "x", root)
    write_json(root / "build/x/gate.json", verdict)
    return verdict


def seal(root: Path, folder: str) -> None:
    """Write a folder's manifest anew, as a worker, or a forger, would."""
    manifest = json.loads((root / folder / "manifest.json").read_text())
    write_manifest(root / folder, stage=manifest["stage"], name=manifest["name"], inputs=manifest["inputs"])


def lock(root: Path) -> None:
    """Write pipelines/x/dvc.lock of the files as they are, in DVC's form. JSON is YAML."""
    sections = resolved(root)
    stages = {}
    for stage in RECIPE_STAGES:
        params = {"build/.resolved/x.json": {stage: sections[stage]}}
        paths = ["build/x/reference"] if stage == "reference" else [f"build/x/{stage}.json", *MORE_OUTS.get(stage, ())]
        stages[stage] = {"cmd": "c", "params": params, "outs": [out(root, path) for path in paths]}
    write_json(root / "pipelines/x/dvc.lock", {"schema": "2.0", "stages": stages})


def out(root: Path, path: str) -> dict[str, Any]:
    if (root / path).is_dir():
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.db import HashFileDB
        from dvc_objects.fs import localfs

        odb = HashFileDB(localfs, str(root / ".dvc/cache"))
        return {"path": path, "hash": "md5", "md5": build(odb, str(root / path), localfs, "md5", dry_run=True)[2].hash_info.value}  # fmt: skip
    data = (root / path).read_bytes()
    return {"path": path, "hash": "md5", "md5": hashlib.md5(data).hexdigest(), "size": len(data)}


def evaluate(root: Path, folder: str, *, model: str, who: str, stage: str, name: str) -> dict[str, Any]:
    """An evaluate folder, whose metrics are the means of its samples. Returns evaluate.json."""
    rng = random.Random(who)
    right = [1.0] * RIGHT[who] + [0.0] * (N - RIGHT[who])
    rng.shuffle(right)
    per_sample = {
        "concise": [{"exact_match": r, "length": rng.uniform(1, 9)} for r in right],
        "sense": [{"acc": float(i % 4 > 0), "acc@strict": float(i % 2)} for i in range(N)],
    }
    scores = {}
    for task, key in KEYS.items():
        samples = [
            {
                "doc_id": i,
                "doc_hash": f"{task}{i:04d}",
                "prompt": "p",
                "target": "t",
                "response": "r",
                "metrics": metrics,
            }
            for i, metrics in enumerate(per_sample[task])
        ]
        means = {metric: sum(s["metrics"][metric] for s in samples) / N for metric in samples[0]["metrics"]}
        scores[task] = {**means, **{f"{m}_stderr": 0.05 for m in means}, "corpus": 0.5, "n": N}
        write(root / folder / f"{key}.jsonl", jsonl(samples))
        write_json(root / folder / f"{key}.json", {
            "key": key, "task": task, "model_digest": model, "task_digest": f"sha256:{task}", "measurement": {},
            "metrics": scores[task], "higher_is_better": dict.fromkeys(means, True), "n": N,
            "versions": {"lm_eval": "0.4.13", "transformers": "5", "torch": "2"},
        })  # fmt: skip
    if stage == "baseline":
        write_json(root / folder / "metrics.json", scores)
    write_manifest(root / folder, stage=stage, name=name, inputs={"model": model, "tasks": {}})
    return scores


def checkpoint(folder: Path, seed: int) -> None:
    weights(folder / "model.safetensors", seed)
    write_json(folder / "config.json", {"model_type": "llama", "hidden_size": 8})
    write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def weights(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": numpy.random.default_rng(seed).random((16, 16), numpy.float32)}, path, metadata={"format": "pt"})


def digest(root: Path, folder: str) -> str:
    return str(read_manifest(root / folder)["digest"])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place; NaN and infinities are written as Python does."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(
        json.dumps(value) if "NaN" in json.dumps(value) or "Infinity" in json.dumps(value) else canonical_json(value)
    )


def edit_lines(path: Path, change: Callable[[list[Any]], Any]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text(jsonl(rows))


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def git(root: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{key}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **who}).stdout


# Names of nodes and measurements are digests of what is asked for, so they are asked for here once.
SECTION = _gate_section()
INPUTS: dict[str, Any] = SECTION["inputs"]
KEYS = {m["name"]: m["key"] for m in SECTION["settings"]["measurements"]}
BASE, BASELINE = INPUTS["base_model"], INPUTS["baseline"]
EVALUATED = [f"{key}.{kind}" for key in KEYS.values() for kind in ("json", "jsonl")] + ["manifest.json"]
CHECKPOINT = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
# Every file that a promotion of x rests on, but dvc.lock.
FILES = [
    *(f"build/x/{stage}.json" for stage in ("prepare", "train", "merge", "evaluate", "gate")),
    *(f"build/x/prepared/{file}" for file in ("train.jsonl", "held_out.jsonl", "manifest.json")),
    *(f"build/x/reference/{file}" for file in ("rows.jsonl", "manifest.json")),
    *(f"build/x/adapter/{file}" for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")),
    *(f"build/x/merged/{file}" for file in [*CHECKPOINT, "chat_template.jinja"]),
    *(f"build/x/evaluate/{file}" for file in EVALUATED),
    *(f"{BASE}/{file}" for file in [*CHECKPOINT, "README.md"]),
    *(f"{BASELINE}/{file}" for file in [*EVALUATED, "metrics.json"]),
    *(f"build/y/evaluate/{file}" for file in EVALUATED),
    "build/.resolved/x.json",
    f"build/.resolved/models/{Path(BASE).name}.json",
]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole build, to be copied."""
    root = tmp_path_factory.mktemp("template")
    make(root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A whole build of the test's own."""
    return Path(shutil.copytree(template, tmp_path / "project"))
