"""Merging as PEFT does it in one model, and tensor by tensor, side by side: seconds and memory to the same bytes.

    python benchmarks/merge.py FOLDER --layers 32 --hidden 4096

FOLDER is a new one; it gets a random base of Mistral's shape (14.5 GB as above), an adapter on all of its linear layers,
and a DVC project with hard links, as a project of prefbuild has. Each way runs in a process of its own, from a base that
must be verified to a merged folder that has its manifest and is in DVC's cache, so all that is hashed is counted. Memory is
what Linux calls the peak resident set; mapped files are in it. Comparing base and adapter with what was merged takes the
same both ways and is left out. Fails unless both give the same files. Needs no GPU and no network.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("whole", "streamed")
DVC = [sys.executable, "-m", "dvc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="default: 4; Mistral 7B has 32")
    parser.add_argument("--hidden", type=int, default=2048, help="default: 2048; Mistral 7B has 4096")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="default: 32000, as Mistral 7B")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measure(asked.way)))
        return
    asked.folder.mkdir(parents=True)
    make_base(asked.folder / "base", asked.layers, asked.hidden, asked.vocabulary)
    make_adapter(asked.folder / "adapter", asked.folder / "base")
    make_project(asked.folder)

    found = {}
    for way in WAYS:
        command = [sys.executable, Path(__file__).resolve(), ".", "--way", way]
        done = subprocess.run(command, cwd=asked.folder, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in (asked.folder / "base").glob("*.safetensors"))
    print(f"\nbase: {size / 1e9:.2f} GB, {os.cpu_count()} CPUs")
    print(f"{'':>10} {'merge':>8} {'manifest':>9} {'DVC':>7} {'all':>7} {'peak memory':>12}")
    for way, numbers in found.items():
        merge, manifest, dvc = numbers["merge"], numbers["manifest"], numbers["dvc"]
        print(
            f"{way:>10} {merge:>6.1f} s {manifest:>7.1f} s {dvc:>5.1f} s {merge + manifest + dvc:>5.1f} s "
            f"{numbers['peak'] / 1e9:>9.2f} GB"
        )
    if found["whole"]["dvc_md5"] != found["streamed"]["dvc_md5"]:
        sys.exit("the two ways gave other files")
    print("both gave the same files")


def measure(way: str) -> dict[str, Any]:
    """One way, in the project that is the working directory: seconds, bytes and the folder's md5."""
    # Imported before the clock starts, as the proof that follows merging needs all of it.
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from prefbuild.artifact import verify_artifact, write_manifest
    from prefbuild.digests import Digests
    from prefbuild.dvc_state import tell_dvc
    from prefbuild.stages import merge

    base, adapter, merged, work = Path("base"), Path("adapter"), Path(way, "merged"), Path(way, "work")
    started = time.monotonic()
    hashed = Digests(work)
    if way == "whole":
        verify_artifact(base)
        merge.merge_whole(base, adapter, merged)
    else:
        with merge.verified(base):
            for path, digest in merge.merge(base, adapter, merged).items():
                hashed.add(path, digest)
    done_merging = time.monotonic()
    if way == "whole":
        write_manifest(merged, stage="merge", name="benchmark", inputs={})
    else:
        write_manifest(merged, stage="merge", name="benchmark", inputs={}, sha256=hashed.sha256)
        hashed.save()
    done_hashing = time.monotonic()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    told = way == "streamed" and tell_dvc([merged], work)
    subprocess.run([*DVC, "add", "--quiet", merged], check=True)
    return {
        "merge": done_merging - started,
        "manifest": done_hashing - done_merging,
        "dvc": time.monotonic() - done_hashing,
        "told": told,
        "peak": 1024 * int(peak.split()[1]),
        "dvc_md5": next(
            line.split()[-1] for line in Path(way, "merged.dvc").read_text().splitlines() if "md5: " in line
        ),
    }


def make_base(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A checkpoint of random weights in bf16, tensor by tensor, in memory of one."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from prefbuild.artifact import write_manifest
    from prefbuild.tensors import write_tensors

    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        dtype="bfloat16",
        architectures=["MistralForCausalLM"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def values(name: str) -> Any:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    folder.mkdir()
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", shapes, "BF16", values, lambda size: None)
    write_manifest(folder, stage="model", name="benchmark", inputs={})


def make_adapter(folder: Path, base: Path, r: int = 16) -> None:
    """A LoRA adapter of random numbers on all linear layers but the output's, as PEFT saves one."""
    import peft
    import torch
    from safetensors.torch import save_file

    from prefbuild.tensors import find_tensors

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, place in find_tensors(base).items():
        if "_proj.weight" in name:
            rows, columns = place.shape
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, columns, generator=generator) / columns
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, r, generator=generator) / r
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def make_project(folder: Path) -> None:
    """Git and DVC, with the link types of a project of prefbuild."""
    for command in (
        ["git", "init", "--quiet"],
        [*DVC, "init", "--quiet"],
        [*DVC, "config", "cache.type", "hardlink,reflink,copy"],
    ):
        subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
