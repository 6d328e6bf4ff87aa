"""What the planner says of packed training, and what a GPU then measures: bytes a token and layer, peak memory, seconds.

    python benchmarks/plan.py results.json

Random models of SmolLM2-135M's and, at 8 and 32 layers, Mistral 7B's shape; steps of one micro-batch, with and without
layers computed again. Takes about a minute on an H200 and up to 70 GB of its memory. Needs a GPU and no network.
"""

import argparse
import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

PAIR = (258, 135, 238)  # mean tokens of the article's rows
GROUP = (450, *(96,) * 8)
NUM_STEPS = 5  # after two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="where a JSON file goes")
    parser.add_argument("--only", help="cases whose name has this")
    asked = parser.parse_args()
    import torch
    from transformers import LlamaConfig, MistralConfig

    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    small = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49_152,
        tie_word_embeddings=True,
    )
    large, whole = (
        MistralConfig(num_hidden_layers=layers, vocab_size=32_002, sliding_window=None) for layers in (8, 32)
    )
    cases: list[tuple[str, Any, list[tuple[int, ...]], bool]] = [
        ("135M, 2 prompts x 8", small, [GROUP] * 2, False),
        ("135M, 128 pairs", small, [PAIR] * 128, False),
        ("8 layers of 7B, 4 pairs", large, [PAIR] * 4, False),
        ("8 layers of 7B, 16 pairs", large, [PAIR] * 16, False),
        ("8 layers of 7B, 16 pairs, layers again", large, [PAIR] * 16, True),
        ("7B, 16 pairs", whole, [PAIR] * 16, False),
        ("7B, 16 pairs, layers again", whole, [PAIR] * 16, True),
    ]
    found = []
    for name, config, rows, again in cases:
        if asked.only is None or asked.only in name:
            found.append({"name": name, **compare(config, rows, again)})
            print(line(found[-1]), flush=True)
            gc.collect()  # the model has cycles
            torch.cuda.empty_cache()
    asked.results.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cases": found}, indent=2) + "\n")


def line(case: dict[str, Any]) -> str:
    """Measured, and how far the prediction is from it."""
    parts = [
        f"{key} {case['measured'][key]:.4g} ({case['predicted'][key] / case['measured'][key] - 1:+.0%})"
        for key in case["measured"]
        if case["measured"][key]
    ]
    return f"{case['name']}: {', '.join(parts)}"


def compare(config: Any, rows: list[tuple[int, ...]], again: bool) -> dict[str, Any]:
    """Both, of one micro-batch a step: peak_memory and layer_bytes in bytes, step and scoring in seconds."""
    import torch

    from prefbuild import plan
    from prefbuild.device import measure
    from prefbuild.shape import shape_of_config
    from prefbuild.training.packing import pack
    from prefbuild.training.scoring import score

    model, done = make_model(config, again)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    base = {weight.data_ptr(): weight.numel() for weight in model.parameters() if not weight.requires_grad}
    shape = shape_of_config(config.to_dict(), sum(base.values()))
    draw = torch.Generator().manual_seed(0)

    def ids(num: int) -> list[int]:
        return torch.randint(1, config.vocab_size, (num,), generator=draw).tolist()

    packed = pack([(ids(prompt), [ids(num) for num in answers]) for prompt, *answers in rows], "cuda", 128)
    kept = 0.0 if again else kept_bytes(model, packed) / packed.num_tokens / shape.layers
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        scores = score(model, packed, statistics=True)
        (-scores.log_probs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def scoring() -> None:
        with torch.no_grad():
            score(model, packed)

    torch.cuda.reset_peak_memory_stats()
    seconds = timed(step)
    measured = {"peak_memory": torch.cuda.max_memory_allocated(), "layer_bytes": kept, "step": seconds}
    reserved = torch.cuda.max_memory_reserved()
    measured["scoring"] = timed(scoring)
    speed = plan.Speed(**measure(shape.hidden, shape.intermediate, 2))
    fused = any("Liger" in one for one in done)
    how = plan.Arithmetic(shape=shape, lora_r=16, fused=fused, statistics=True, checkpointing=again)
    load = plan.load_of(rows)
    predicted = {
        "peak_memory": plan.peak_bytes(how, load),
        "layer_bytes": plan.layer_bytes(how, load.keys / load.tokens),
        "step": plan.step_seconds(how, rows, 1 << 30, speed)[0],
        "scoring": plan.reference_seconds(replace(how, checkpointing=False), rows, speed),
    }
    about = {"tokens": packed.num_tokens, "fused": done, "speed": vars(speed), "reserved": reserved}
    return {**about, "measured": measured, "predicted": predicted}


def make_model(config: Any, again: bool) -> tuple[Any, list[str]]:
    """A random model on the GPU with an adapter, as the packed engine has it, and what of it is fused."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from prefbuild.training.attention import use_packed_attention
    from prefbuild.training.fused import fuse

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_packed_attention(model)
    model.config.use_cache = False
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    done = fuse(model)
    return model.train(), done


def kept_bytes(model: Any, packed: Any) -> int:
    """Bytes that autograd keeps of a packed row besides weights, each storage once."""
    import torch

    from prefbuild.training.scoring import score

    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    alive: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        alive.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score(model, packed)
    return sum(one.untyped_storage().nbytes() for place, one in alive.items() if place not in weights)


def timed(run: Any) -> float:
    """The median of some runs' seconds."""
    import torch

    seconds = []
    for _ in range(2 + NUM_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


if __name__ == "__main__":
    main()
