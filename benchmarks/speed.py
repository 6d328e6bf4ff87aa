"""DPO of a 7B and GRPO of a 135M on one GPU: as published, as fast as TRL can, and by prefbuild's own engines.

    python benchmarks/speed.py FOLDER --tokenizer SmolLM2-135M-Instruct --rows orca_dpo_pairs_284.jsonl \\
        --prompts tldr_100.jsonl

takes under 8 minutes on an H200, prints a table and writes benchmarks/results/speed-h200.json. Every arm is a process of
its own, one after the other, on the same rows in the same order.

FOLDER is a new folder with 20 GB to spare, best in memory (/dev/shm). The 7B is random weights of Mistral's shape, made
once at --model. --tokenizer is a checkpoint folder whose chat template is ChatML; GRPO trains its weights, or random ones
of its shape where it has none. --rows are pairs of Intel/orca_dpo_pairs: their text makes up 3,200 pairs, whose lengths
are drawn as the whole dataset has them (`lengths`); --prompts are posts of mlabonne/smoltldr. --profile trains a few steps
more of ours, and says where a step's time goes. `--arms ours deterministic` trains twice with deterministic: true too, and compares the adapters.
--quick tries everything in half a minute on a CPU, with tiny models and texts, and measures nothing worth reading.

In GRPO the end-of-turn token is one that the model can't write, so that all arms write every completion to its full length.
"""

import argparse
import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import speed_arms
import speed_table
from material import read_pairs, read_prompts, shortened, write_result, write_rows

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("prompt", "chosen", "rejected")
A_STEP = 16  # pairs, as 4 x 4 in the article
WARM_UP = 2  # steps that are in no time
# What TRL is tried with, besides bf16, no checkpointing and one model: pairs of a micro-batch x micro-batches of a step,
# and Liger's kernels, if they are there. 8x2 takes more memory than an H200 has, with them too.
TUNED = ("4x4", "4x4+liger") if importlib.util.find_spec("liger_kernel") else ("4x4",)
ARMS = ("article", "tuned", "ours", "grpo-hf", "grpo-graph")
TWICE = 20  # steps of the arm `deterministic`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint folder, as SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=Path, required=True, help="preference pairs as JSON lines")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts as JSON lines")
    parser.add_argument("--model", type=Path, help="where the 7B is, or is made; default: FOLDER/7b")
    parser.add_argument("--layers", type=int, default=32, help="of the 7B; default: 32, fewer for a trial")
    parser.add_argument(
        "--arms", nargs="+", choices=(*ARMS, "deterministic"), default=ARMS, help=f"default: {' '.join(ARMS)}"
    )
    parser.add_argument("--tuned", nargs="+", default=TUNED, help=f"TRL's micro-batches; default: {' '.join(TUNED)}")
    parser.add_argument("--steps", type=int, default=5, help="of TRL's in DPO; default: 5, of which 2 warm up")
    parser.add_argument("--hf-steps", type=int, default=8, help="of TRL's in GRPO, which vary; default: 8")
    parser.add_argument("--max-steps", type=int, default=200, help="of ours in DPO; default: 200")
    parser.add_argument("--grpo-steps", type=int, default=62, help="of ours in GRPO; default: 62, of which 2 warm up")
    parser.add_argument("--profile", action="store_true", help="say where a step's time goes; half a minute more")
    parser.add_argument("--quick", action="store_true", help="try it on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/speed-h200.json")
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.hf_steps, asked.max_steps, asked.grpo_steps, asked.tuned = 3, 3, 4, 3, ["4x4"]
    asked.folder, asked.tokenizer = asked.folder.resolve(), asked.tokenizer.resolve()
    asked.model = asked.model.resolve() if asked.model else asked.folder / "7b"
    found = compare(asked)
    print(speed_table.table(found))
    return int(any("failed" in arm for part in ("dpo", "grpo") for arm in found[part]["arms"].values()))


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the arms; what they found is written after each."""
    shared = {
        "model": str(asked.model),
        "tokenizer": str(asked.tokenizer),
        "layers": 2 if asked.quick else asked.layers,
        "hidden": 64 if asked.quick else 4096,
        "max_steps": asked.max_steps,
        "optim": "adamw_torch" if asked.quick else "adamw_torch_fused",
        "precision": "float32" if asked.quick else "bf16",
        "deterministic": False,
        "tokens": 8 if asked.quick else 96,
    }
    asked.folder.mkdir(parents=True, exist_ok=True)
    asked.started = time.monotonic()
    # Of paths the names alone: where things were on some machine is of no use on another.
    said = [word if word.startswith("-") else word.rstrip("/").rpartition("/")[2] for word in sys.argv[1:]]
    found: dict[str, Any] = {"command": " ".join(["python", "benchmarks/speed.py", *said])}
    found |= {"dpo": {"rows": prepare_pairs(asked), "arms": {}}, "grpo": {"rows": prepare_prompts(asked), "arms": {}}}
    measured = run(asked, "materials", "materials", shared)
    if "failed" in measured:
        raise SystemExit(measured["failed"])
    found |= {key: measured[key] for key in ("machine", "ceiling")}
    found["dpo"]["shape"] = json.loads((asked.model / "config.json").read_text())
    found["grpo"]["shape"] = json.loads((asked.folder / "smollm/config.json").read_text())

    trl = shared | {"steps": asked.steps, "quantised": False, "second": False, "checkpointing": False, "liger": False}
    dpo, grpo = found["dpo"]["arms"], found["grpo"]["arms"]
    if "article" in asked.arms:
        # bitsandbytes has no optimizer for a CPU.
        own = {} if asked.quick else {"quantised": True, "optim": "paged_adamw_32bit"}
        own |= {"batch": 4, "accumulation": 4, "second": True, "checkpointing": True}
        dpo["article"] = run(asked, "article", "trl_dpo", trl | own)
        keep(asked, found)
    if "tuned" in asked.arms:
        dpo["tuned"] = tuned(asked, trl)
        keep(asked, found)
    if "ours" in asked.arms:
        dpo["ours"] = run(asked, "ours", "ours_dpo", shared)
        if asked.profile and "failed" not in dpo["ours"]:
            few = shared | {"max_steps": 8, "profiled": (5, 7)}
            dpo["ours"]["parts"] = run(asked, "ours-profile", "ours_dpo", few).get("parts")
        keep(asked, found)
    if "deterministic" in asked.arms:
        few = shared | {"max_steps": TWICE, "deterministic": True}
        one, other = (run(asked, f"deterministic-{number}", "ours_dpo", few) for number in (1, 2))
        dpo["deterministic"] = one | {"again_sha256": other.get("adapter_sha256")}
        keep(asked, found)
    for engine, steps in (("hf", asked.hf_steps), ("graph", asked.grpo_steps)):
        if f"grpo-{engine}" not in asked.arms:
            continue
        own = shared | {"engine": engine, "steps": steps}
        grpo[engine] = run(asked, f"grpo-{engine}", "grpo", own)
        if asked.profile and engine == "graph" and "failed" not in grpo[engine]:
            few = own | {"steps": 8, "profiled": (5, 7)}
            grpo[engine]["parts"] = run(asked, "grpo-profile", "grpo", few).get("parts")
        keep(asked, found)
    return found


def tuned(asked: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's fastest of several micro-batches, and what became of the others."""
    tried = {}
    for name in asked.tuned:
        batch, _, accumulation = name.removesuffix("+liger").partition("x")
        own = {"batch": int(batch), "accumulation": int(accumulation), "liger": name.endswith("+liger")}
        tried[name] = run(asked, f"tuned-{name}", "trl_dpo", options | own)
    ran = {name: arm for name, arm in tried.items() if "failed" not in arm}
    if not ran:
        return {"failed": "; ".join(f"{name}: {arm['failed']}" for name, arm in tried.items())}
    best = min(ran, key=lambda name: sum(ran[name]["seconds"][WARM_UP - 1 :]))
    others = {
        name: arm.get("failed") or round(statistics.fmean(arm["seconds"][WARM_UP - 1 :]), 4)
        for name, arm in tried.items()
        if name != best
    }
    return ran[best] | {"micro_batches": best, "others": others}


# ---- what is trained on


def prepare_pairs(asked: argparse.Namespace) -> dict[str, Any]:
    """Write as many distinct pairs as all steps take; returns their number and mean lengths in tokens."""
    texts: dict[str, list[int]] = {part: [] for part in PARTS}
    for pair in read_pairs(asked.tokenizer, asked.rows, 1536, 1024):
        for part, ids in texts.items():
            ids.extend(pair[f"{part}_ids"])
    random = Random(0)
    rows = []
    for _ in range(A_STEP * asked.max_steps):
        row = {}
        for part, number in zip(PARTS, lengths(random, most=8 if asked.quick else None), strict=True):
            start = random.randrange(len(texts[part]) - number)
            row[f"{part}_ids"] = texts[part][start : start + number]
        # As every chat begins. An end of turn there would be padding's embedding, which is zeros in a random model: its
        # norm's gradient grows 300-fold a layer.
        row["prompt_ids"][0] = texts["prompt"][0]
        rows.append(row)
    write_rows(asked.folder / "prepared", rows, [])
    means = {part: round(statistics.fmean(len(row[f"{part}_ids"]) for row in rows), 1) for part in PARTS}
    return {"used": len(rows), "mean_tokens": means}


def lengths(random: Random, most: int | None = None) -> tuple[int, int, int]:
    """Tokens of a prompt, its chosen and its rejected answer, drawn as in Intel/orca_dpo_pairs as a whole.

    Log-normal, and cut as the article cuts: means of 264, 135 and 235. The 284 rows at hand have 229, 184 and 316, so less to
    share and less padding. `most` is for trials.
    """
    drawn = []
    for median, spread, least, longest in ((180, 0.9, 16, 1024), (90, 1.0, 4, 511), (200, 0.7, 8, 511)):
        tokens = min(longest, max(least, int(random.lognormvariate(math.log(median), spread))))
        drawn.append(tokens if most is None else 2 + tokens % most)
    return drawn[0], drawn[1], drawn[2]


def prepare_prompts(asked: argparse.Namespace) -> dict[str, Any]:
    """Write the prompts and the model of the GRPO arms; returns the prompts' number and mean length in tokens."""
    make_smollm(asked)
    prompts = read_prompts(asked.tokenizer, asked.prompts, 512)
    if asked.quick:
        prompts = shortened(prompts)
    write_rows(asked.folder / "prompts", prompts, [])
    mean = statistics.fmean(len(row["prompt_ids"]) for row in prompts)
    return {"prompts": len(prompts), "mean_tokens": round(mean, 1), "completion_tokens": 8 if asked.quick else 96}


def make_smollm(asked: argparse.Namespace) -> None:
    """The model of the GRPO arms, whose turns end with a token that it has no output for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = asked.folder / "smollm"
    folder.mkdir(exist_ok=True)
    weights = list(asked.tokenizer.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(asked.tokenizer)
    if asked.quick:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
        config.layer_types = None
    if weights and not asked.quick:
        for path in asked.tokenizer.glob("model*safetensors*"):
            shutil.copy(path, folder / path.name)
    else:
        AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    tokenizer.save_pretrained(folder)
    config.eos_token_id = None  # transformers warns of one that is no output
    config.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends))


def run(asked: argparse.Namespace, name: str, arm: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run an arm; in this process with --quick, where imports take longer than all else."""
    return speed_arms.run(asked.folder, name, arm, options, alone=not asked.quick)


def keep(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what is known by now."""
    found["seconds"] = round(time.monotonic() - asked.started, 1)
    speed_table.summarise(found, WARM_UP)
    write_result(asked.out, found)


if __name__ == "__main__":
    sys.exit(main())
