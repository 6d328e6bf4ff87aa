"""The arms of speed.py: one training or measurement each, in a process of its own.

    python benchmarks/speed_arms.py ARM FOLDER OPTIONS_AS_JSON RESULT

speed.py and curves.py start them, with `run`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from steps import Steps  # noqa: E402

SEED = 42
LOGGED = {"losses": "loss", "chosen_log_probs": "logps/chosen"}  # the second tells which rows a step had


# ---- the machine


def peak_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def ceiling(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What this machine can do: bf16 matrix products on random numbers, and copies (bytes read and written)."""
    import torch

    cuda = torch.cuda.is_available()
    device, size, dtype = ("cuda", 8192, torch.bfloat16) if cuda else ("cpu", 256, torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = 2 * size**3 / _seconds(lambda: one @ other)
    source = torch.empty(8 << 30 if cuda else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _seconds(lambda: target.copy_(source))
    return {"matmul_tflops": round(products / 1e12, 3), "copy_gb_per_s": round(copied / 1e9, 1)}


def _seconds(do: Any, number: int = 20) -> float:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(5):
        do()
    wait()
    start = time.perf_counter()
    for _ in range(number):
        do()
    wait()
    return (time.perf_counter() - start) / number


def materials(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The random 7B, unless it is there, and the ceilings."""
    from material import make_model

    from prefbuild.artifact import digest_of, write_json

    model = Path(options["model"])
    if not (model / "manifest.json").exists():
        make_model(model, Path(options["tokenizer"]), options["layers"], options["hidden"])
        write_json(model / "manifest.json", {"digest": digest_of({}), "files": {}})  # says that it is whole
    return {"ceiling": ceiling(folder, options), "machine": describe()}


def describe() -> dict[str, Any]:
    """The machine and the packages."""
    import torch

    cuda = torch.cuda.is_available()
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    names = ["torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel"]
    return {
        "gpu": subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() if cuda else None,
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "packages": {
            name: metadata.version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))
        },
    }


# ---- DPO


def trl_dpo(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's own DPOTrainer, and nothing of prefbuild, for the first steps of the run.

    Options: steps, batch, accumulation, quantised, second (a second model as reference), checkpointing, liger, optim.
    Rows are tokenised already, so that all arms have the same tokens.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        PrinterCallback,
        TrainerCallback,
        set_seed,
    )
    from trl import DPOConfig, DPOTrainer

    padded: list[int] = []

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            padded.append(inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *arguments, **named)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_named: Any) -> None:
            control.should_training_stop = state.global_step >= options["steps"]

    train = recipe("neuralhermes").train
    cuda = torch.cuda.is_available()
    set_seed(SEED)

    def load() -> Any:
        more: dict[str, Any] = {"device_map": {"": 0}} if cuda else {}
        if options["quantised"]:
            more["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        return AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=torch.bfloat16 if cuda else torch.float32, **more
        )

    started = time.time()
    trainer = Tokenized(
        model=load(),
        ref_model=load() if options["second"] else None,
        args=DPOConfig(
            output_dir=str(folder / "work"),
            per_device_train_batch_size=options["batch"],
            gradient_accumulation_steps=options["accumulation"],
            gradient_checkpointing=options["checkpointing"],
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_steps=warmup(options),
            max_steps=options["max_steps"],
            optim=options["optim"],
            beta=train.beta,
            max_length=1536,
            bf16=cuda,
            use_cpu=not cuda,
            use_liger_kernel=options["liger"],
            seed=SEED,
            data_seed=SEED,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(read_ids(folder)),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
        peft_config=LoraConfig(**train.lora.model_dump(), bias="none", task_type="CAUSAL_LM"),
        callbacks=[Stop()],
    )
    trainer.remove_callback(PrinterCallback)
    with Steps() as steps:
        trainer.train()
    a_step = options["accumulation"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "load_s": round(steps.first - started, 1),
        "seconds": steps.seconds(),
        **{name: [round(entry[key], 5) for entry in logged] for name, key in LOGGED.items()},
        "padded_tokens": [sum(padded[start : start + a_step]) for start in range(0, len(padded), a_step)],
        "peak_memory": peak_memory(),
    }


def dpo_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The article's settings but in bf16, as prefbuild's packed engine takes them."""
    train = recipe("neuralhermes").train.model_dump(mode="json", by_alias=True)
    return train | {
        "engine": "packed",
        "quantization": None,
        "gradient_checkpointing": False,
        "precision": options["precision"],
        "optim": options["optim"],
        "deterministic": options["deterministic"],
        "max_steps": options["max_steps"],
        "warmup_steps": warmup(options),
        "save_steps": 50,
    }


def warmup(options: dict[str, Any]) -> int:
    """Half of the run, as in the article."""
    return options["max_steps"] // 2


def ours_dpo(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """All steps of the run, by prefbuild's packed engine, which first computes the reference's log-probabilities.

    `reference_s` is that part alone: in a build it is stage reference, which another run on the same rows finds done.
    """
    from prefbuild.artifact import sha256_file
    from prefbuild.methods import DPO
    from prefbuild.worker import before_imports

    settings = dpo_settings(options)
    # As the stage's process starts.
    before_imports("train", settings)
    from prefbuild.training.ahead import read_ahead

    read_ahead(DPO.model_validate(settings), Path(options["model"]))
    from prefbuild.training import packed

    times = []
    with_progress = packed.with_progress

    def timed(*arguments: Any) -> Any:
        started = time.time()
        found = with_progress(*arguments)
        times.append(time.time() - started)
        return found

    packed.with_progress = timed
    try:
        found = train("dpo", settings, folder, options)
    finally:
        packed.with_progress = with_progress
    adapter = folder / options["name"] / "adapter/adapter_model.safetensors"
    found |= {"reference_s": round(times[0], 2), "adapter_sha256": sha256_file(adapter)}
    return found | {"planned": planned(folder, options)}


def planned(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the planner said of the run: micro-batches, peak memory, seconds a step."""
    from prefbuild.methods import DPO
    from prefbuild.training.planned import plan_run
    from prefbuild.training.prepared import steps_of_a_run

    settings = DPO.model_validate(dpo_settings(options))
    sizes = [tuple(map(len, row.values())) for row in read_ids(folder)]
    steps = [[sizes[row] for row in step] for step in steps_of_a_run(settings, SEED, len(sizes))]
    plan = plan_run(settings, Path(options["model"]), steps, bf16=options["precision"] == "bf16")
    return dataclasses.asdict(plan)


def any_dpo(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """DPO by prefbuild with the settings of `options`; what curves.py compares."""
    return train("dpo", options["train"], folder, options)


def train(method: str, settings: dict[str, Any], folder: Path, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Train as the train stage does; returns times, losses and memory."""
    from prefbuild.methods import METHODS
    from prefbuild.stages.report import read_curve
    from prefbuild.training import Run, trainer

    out = folder / options["name"]
    curves = out / "live/plots/metrics/train"
    run = Run(
        name=options["name"],
        seed=SEED,
        base={"name": "random", "revision": "0"},
        model=Path(options["model"]),
        prepared=folder / ("prepared" if method == "dpo" else "prompts"),
        trained=out / "adapter",
        live=out / "live",
        work=out / "work",
        **more,
    )
    started = time.time()
    with Steps(options.get("profiled") and range(*options["profiled"])) as steps:
        metrics = trainer(method, settings.get("engine"))(METHODS[method].model_validate(settings), run)
    ended = time.time()
    return {
        "load_s": round(steps.first - started, 1),
        "seconds": steps.seconds(),
        "train_s": round(ended - started, 1),
        **{
            name: [round(value, 5) for _, value in read_curve(curves / f"{key}.tsv")]
            for name, key in LOGGED.items()
            if (curves / f"{key}.tsv").exists()
        },
        "peak_memory": peak_memory(),
        "metrics": metrics,
        **({"parts": steps.parts()} if steps.profile else {}),
    }


# ---- GRPO


def grpo(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """GRPO of the course's settings. Options: engine (hf: TRL's own generation), steps, tokens (of a completion)."""
    settings = recipe("smolgrpo").train.model_dump(mode="json", by_alias=True) | {
        "rollout": {"engine": options["engine"]},
        "num_train_epochs": None,
        "max_steps": options["steps"],
        "save_steps": options["steps"],
        "max_completion_length": options["tokens"],
        "optim": options["optim"],
        "precision": options["precision"],
        "deterministic": False,
    }
    return train("grpo", settings, folder, options | {"model": str(folder / "smollm")})


# ---- shared


def recipe(name: str) -> Any:
    """A headline recipe, of the project's own."""
    from prefbuild.recipe import load_defaults, load_recipe

    return load_recipe(ROOT / f"recipes/headline/{name}.yaml", load_defaults(ROOT / "params.yaml"))


def read_ids(folder: Path) -> list[dict[str, list[int]]]:
    """Of the rows of DPO: prompt, chosen and rejected."""
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    with open(folder / "prepared/train.jsonl", encoding="utf-8") as file:
        return [{key: row[key] for key in keys} for row in map(json.loads, file)]


ARMS = {
    "materials": materials,
    "trl_dpo": trl_dpo,
    "ours_dpo": ours_dpo,
    "any_dpo": any_dpo,
    "grpo": grpo,
}


def run(folder: Path, name: str, arm: str, options: dict[str, Any], alone: bool = True) -> dict[str, Any]:
    """Run an arm in a process of its own (unless `alone` is false) in `folder`; returns what it found.

    `wall_s` is all of that process, from its start to its end. An arm that fails has `failed`, and its output is shown.
    """
    print(f"{name} ...", file=sys.stderr, flush=True)
    out, options = folder / f"{name}.json", options | {"name": name}
    out.unlink(missing_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    started = time.monotonic()
    if alone:
        argv = [sys.executable, str(Path(__file__).resolve()), arm, str(folder), json.dumps(options), str(out)]
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        with open(folder / f"{name}.log", "w") as log:
            done = subprocess.run(argv, env={**os.environ, **quiet}, cwd=folder, stdout=log, stderr=log)
        if done.returncode:
            said = (folder / f"{name}.log").read_text(errors="replace")[-3000:]
            print(said, file=sys.stderr, flush=True)
            return {"failed": f"exit code {done.returncode}: {said.strip().splitlines()[-1]}"}
    else:
        with contextlib.chdir(folder):
            run_here(arm, folder, options, out)
    found: dict[str, Any] = json.loads(out.read_text())
    found["wall_s"] = round(time.monotonic() - started, 1)
    print(f"{name}: {found['wall_s']} s {found.get('failed', '')}", file=sys.stderr, flush=True)
    return found


def run_here(arm: str, folder: Path, options: dict[str, Any], out: Path) -> None:
    """Run an arm and write what it found; one that has too little memory says so."""
    import torch

    try:
        found = ARMS[arm](folder, options)
    except torch.OutOfMemoryError as error:
        found = {"failed": ". ".join(str(error).split(". ")[:2])}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    run_here(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
