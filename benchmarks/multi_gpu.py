"""DPO on several GPUs against one: the same rows and curves? How much faster? With random weights of a given shape.

    python benchmarks/multi_gpu.py FOLDER --tokenizer SmolLM2-135M-Instruct --rows orca_dpo_pairs.jsonl --gpus 2

FOLDER is a new folder. --tokenizer is a checkpoint folder with a chat template; --rows are JSON lines with question,
chosen and rejected (system too, if there is one). It needs prefbuild's packages and no project, no DVC and no network.
Without GPUs it tries itself: 2 processes on the CPU, where only ddp runs. --share-gpu tries it with all processes on one
GPU, through gloo: slower than one process, and no measure of speed.

It prints, for one GPU and for each strategy on several, seconds a step (the first, which warms up, left out), memory, and how far
losses, gradient norms and adapters are from those of one GPU; and ends with exit code 1 when a loss is further off than --tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from material import make_model, read_pairs, write_rows

from prefbuild.errors import PrefbuildError
from prefbuild.launch import launch, record_failure
from prefbuild.worker import die_with_parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder to take the tokenizer from")
    parser.add_argument("--rows", type=Path, required=True, help="preference pairs as JSON lines")
    parser.add_argument("--gpus", type=int, default=2, help="default: 2")
    parser.add_argument("--engine", choices=("trl", "packed"), default="trl", help="what trains; default: trl")
    parser.add_argument(
        "--strategies", nargs="+", help="ddp, which is all that packed has, fsdp, zero3; default: ddp fsdp"
    )
    parser.add_argument("--share-gpu", action="store_true", help="all processes on one GPU, through gloo")
    parser.add_argument("--layers", type=int, default=32, help="default: 32, as Mistral 7B")
    parser.add_argument("--hidden", type=int, default=4096, help="default: 4096, as Mistral 7B; a multiple of 64")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--batch", type=int, default=4, help="rows a GPU takes at once; default: 4")
    parser.add_argument("--accumulation", type=int, default=8, help="batches a step on one GPU; default: 8")
    parser.add_argument("--max-length", type=int, default=1024, help="longer rows are left out; default: 1024 tokens")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of a step's loss; default: 0.02, for bf16")
    asked = parser.parse_args()
    import torch

    if not torch.cuda.is_available() or asked.engine == "packed":
        asked.strategies = ["ddp"]
    asked.strategies = asked.strategies or ["ddp", "fsdp"]
    make_model(asked.folder / "model", asked.tokenizer, asked.layers, asked.hidden, spread=0.02)
    a_step = asked.batch * asked.accumulation
    prepare(asked.folder / "prepared", asked.folder / "model", asked.rows, asked.max_length, a_step)
    train = {
        "method": "dpo",
        "engine": asked.engine,
        "learning_rate": 2e-4,
        "max_steps": asked.steps,
        "save_steps": asked.steps,
        "per_device_train_batch_size": asked.batch,
        "gradient_accumulation_steps": asked.accumulation,
        "gradient_checkpointing": asked.gradient_checkpointing,
        "precision": "bf16" if torch.cuda.is_available() else "float32",
        "deterministic": False,
    }
    one = run(asked, "one", 1, train)
    print(f"one     {one['step']:.3f} s a step, {memory(one)}", flush=True)
    far = 0
    for strategy in asked.strategies:
        try:
            found = run(asked, strategy, asked.gpus, train)
        except PrefbuildError as error:
            print(f"{strategy:7} failed: {error}", flush=True)
            far += 1
            continue
        losses = [abs(a - b) for a, b in zip(one["loss"], found["loss"], strict=True)]
        norms = [abs(a - b) / a for a, b in zip(one["grad_norm"], found["grad_norm"], strict=True)]
        held_out = [each["metrics"]["held_out"]["loss"] for each in (one, found)]
        print(
            f"{strategy:7} {found['step']:.3f} s a step on {asked.gpus}, {one['step'] / found['step']:.2f} times as fast, "
            f"{memory(found)}; at most {max(losses):.2g} from the losses of one (of {one['loss'][0]:.3f} to "
            f"{one['loss'][-1]:.3f}), {max(norms):.1%} from its gradient norms, {adapters(asked.folder, strategy)}; "
            f"held-out loss {held_out[0]:.4f} and {held_out[1]:.4f}",
            flush=True,
        )
        far += max(losses) > asked.tolerance
    return int(far > 0)


def prepare(folder: Path, model: Path, rows: Path, max_length: int, a_step: int) -> None:
    """Rows as the prepare stage leaves them; every tenth is held out.

    To train on there are as many as make whole steps: the last step of a pass is otherwise filled up on several GPUs.
    """
    pairs = read_pairs(model, rows, max_length)
    held_out = pairs[9::10]
    train = [pair for place, pair in enumerate(pairs) if place % 10 != 9]
    train = train[: len(train) // a_step * a_step]
    if not train or not held_out:
        raise SystemExit(f"{rows}: too few rows of at most {max_length} tokens for a step of {a_step}")
    write_rows(folder, train, held_out)
    print(f"{len(train)} rows to train on, {len(held_out)} held out", file=sys.stderr)


def run(asked: argparse.Namespace, name: str, num: int, train: dict[str, Any]) -> dict[str, Any]:
    """Train in processes of their own; returns what they left."""
    out = asked.folder / name
    out.mkdir()
    backend = "gloo" if asked.share_gpu and num > 1 else ""
    argv = [str(Path(__file__).resolve()), "--rank", str(asked.folder.resolve()), name, backend, json.dumps(train)]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(asked.gpus)))
    visible = devices.split(",")[: 1 if num == 1 or asked.share_gpu else num]
    env = {"CUDA_VISIBLE_DEVICES": ",".join(visible), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if num == 1:
        subprocess.run([sys.executable, *argv], env={**os.environ, **env}, check=True)
    else:
        env |= {"LOCAL_RANK": "0"} if asked.share_gpu else {}
        launch(argv, num, out / "work", strategy=name, env=env)
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(num)]
    ends = ranks[0]["ends"]
    return ranks[0] | {"step": (ends[-1] - ends[0]) / (len(ends) - 1), "memory": [each["memory"] for each in ranks]}


def memory(found: dict[str, Any]) -> str:
    return " and ".join(f"{size / 2**30:.1f}" for size in found["memory"]) + " GiB at most"


def adapters(folder: Path, strategy: str) -> str:
    from safetensors.torch import load_file

    one, other = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("one", strategy))
    if {key: tensor.dtype for key, tensor in one.items()} != {key: tensor.dtype for key, tensor in other.items()}:
        return "an adapter of another form"
    far = max(float((one[key] - other[key]).abs().max()) for key in one)
    return f"{far:.2g} from its adapter (whose largest weight is {max(float(one[key].abs().max()) for key in one):.2g})"


def rank(folder: Path, name: str, backend: str, train: dict[str, Any]) -> None:
    """One process of a training."""
    import torch

    from prefbuild.methods import METHODS
    from prefbuild.training import Run, common, ranks, trainer

    ends: list[float] = []
    step_end = common.ProgressBar.on_step_end

    def timed(*arguments: Any, **named: Any) -> None:
        ends.append(time.monotonic())
        step_end(*arguments, **named)

    common.ProgressBar.on_step_end = timed  # type: ignore[method-assign]
    if backend:
        arguments = ranks.rank_arguments
        ranks.rank_arguments = lambda *known: arguments(*known) | {"ddp_backend": backend}
    out = folder / name
    metrics = trainer(train["method"], train["engine"])(
        METHODS[train["method"]].model_validate(train),
        Run(
            seed=42,
            base={"name": "random", "revision": "0"},
            model=folder / "model",
            prepared=folder / "prepared",
            trained=out / "adapter",
            live=out / "live",
            work=out / "work",
            name=name,
        ),
    )
    steps = train["max_steps"]
    state = json.loads((out / f"work/checkpoint-{steps}/trainer_state.json").read_text())
    points = [point for point in state["log_history"] if "loss" in point]
    about = {key: [point[key] for point in points] for key in ("loss", "grad_norm")}
    about |= {
        "ends": ends,
        "metrics": metrics,
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(about))
    ranks.leave()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--rank"]:
        sys.exit(main())
    die_with_parent()
    try:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
    except Exception as error:
        if "RANK" not in os.environ:
            raise
        record_failure(error, str(error) if isinstance(error, PrefbuildError) else None, 7)
