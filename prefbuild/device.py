"""What a plan is for: a GPU that is here, measured in about a second, or a known one; else the CPU.

`python -m prefbuild.device HIDDEN INTERMEDIATE BYTES` prints {"matmul", "bandwidth", "launch"} of the first GPU, or of the
CPU where torch sees none, in FLOP/s, bytes/s and seconds; in a process of its own, because torch takes seconds and
memory. Devices that are not here have the numbers of KNOWN.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from prefbuild.doctor import find_gpus, machine_memory
from prefbuild.errors import StageError, UsageError
from prefbuild.plan import Speed
from prefbuild.recipe import Recipe
from prefbuild.shape import ModelShape

# Dense bf16 TFLOP/s and GB/s of data sheets. Large matmuls reach about 0.75 of the one, kernels that only move numbers
# about 0.85 of the other.
KNOWN = {
    "B200": (2250, 8000, 180),
    "H200": (989, 4800, 141),
    "H100": (989, 3350, 80),
    "A100": (312, 2039, 80),
    "L40S": (362, 864, 48),
    "A10": (125, 600, 24),
    "L4": (121, 300, 24),
    "RTX 5090": (210, 1792, 32),
    "RTX 4090": (165, 1008, 24),
    "RTX 3090": (71, 936, 24),
}
GB = 10**9
UNITS = {"GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40, "MB": 10**6, "MiB": 2**20}
LAUNCH = 6e-6  # seconds a kernel's launch from Python takes with its share of autograd


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the plan is for. `speed` is None for a CPU; `source` says where it is from."""

    name: str
    memory: int
    speed: Speed | None
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.speed is not None


def known_speed(name: str) -> Speed | None:
    """The speed of a GPU by a part of its name, as in `NVIDIA H200`; None for one that KNOWN lacks."""
    known = known_kind(name)
    if known is None:
        return None
    teraflops, gigabytes, _ = KNOWN[known]
    return Speed(matmul=0.75 * teraflops * 1e12, bandwidth=0.85 * gigabytes * GB, launch=LAUNCH)


def known_kind(name: str) -> str | None:
    """Which of KNOWN a GPU's name says: NVIDIA A10G is an A10, and an L40 no L4."""
    return next((kind for kind in KNOWN if re.search(rf"(?i)\b{kind}(?![0-9])", name)), None)


def measured(hidden: int, intermediate: int, bytes_per_number: int) -> Speed:
    """The speed of this machine's first GPU. StageError where torch can't use it."""
    argv = [sys.executable, "-m", "prefbuild.device", *map(str, (hidden, intermediate, bytes_per_number))]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise StageError(
            f"the GPU can't be measured: {done.stderr.strip().splitlines()[-1]}; name one, as in --gpu H100"
        )
    return Speed(**json.loads(done.stdout))


def measure(hidden: int, intermediate: int, bytes_per_number: int) -> dict[str, float]:
    """Measure this process' device; see above."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = torch.bfloat16 if bytes_per_number == 2 else torch.float32
    x = torch.randn(8192 if cuda else 512, hidden, device=device, dtype=dtype)
    weight = torch.randn(hidden, intermediate, device=device, dtype=dtype)
    flops = 2 * x.shape[0] * hidden * intermediate
    large = torch.randn((256 if cuda else 32) * 2**20 // 4, device=device)
    copy, small = torch.empty_like(large), torch.ones(8, device=device)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def seconds(run: Any, at_least: float = 0.15) -> float:
        run()
        number = 1
        while True:
            wait()
            start = time.perf_counter()
            for _ in range(number):
                run()
            wait()
            took = time.perf_counter() - start
            if took >= at_least:
                return took / number
            number = max(2 * number, int(number * at_least / max(took, 1e-6)))

    matmul = seconds(lambda: x @ weight)
    moved = seconds(lambda: copy.copy_(large))
    launch = seconds(lambda: small.add_(1), 0.05)
    return {"matmul": flops / matmul, "bandwidth": 2 * large.numel() * 4 / moved, "launch": launch}


def find_device(recipe: Recipe, shape: ModelShape, gpu: str | None, gpu_memory: str | None) -> Device:
    """The GPU that is named, else this machine's, measured; the CPU for a recipe without GPUs."""
    memory = parse_size(gpu_memory) if gpu_memory else None
    here = find_gpus() if recipe.compute.gpus or gpu_memory else []
    if gpu is None and memory is not None and not here:
        # The known GPU whose memory is nearest.
        gpu = min(KNOWN, key=lambda kind: abs(KNOWN[kind][2] * GB - memory))
    if gpu is not None:
        speed = known_speed(gpu)
        if speed is None:
            raise UsageError(f"{gpu}: its speed is not known; one of {', '.join(KNOWN)}")
        size = KNOWN[str(known_kind(gpu))][2] * GB
        source = "by its data sheet"
        return Device(name=gpu, memory=memory or size, speed=speed, source=source)
    if recipe.compute.gpus and not here:
        raise UsageError(
            f"compute.gpus is {recipe.compute.gpus}, and there is no GPU here to plan for; name one, as in --gpu H100 "
            f"({', '.join(KNOWN)})"
        )
    if not here:
        return Device(name="this CPU", memory=machine_memory()[0], speed=None, source="")
    return Device(
        name=here[0].name,
        memory=memory or min(gpu.total for gpu in here),
        speed=measured(shape.hidden, shape.intermediate, 2),
        source="measured",
    )


def parse_size(text: str) -> int:
    """Bytes of 80GB, 80GiB. UsageError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|MiB|GB|GiB|TB|TiB)", text)
    if found is None:
        raise UsageError(f"--gpu-memory {text}: no size; write it as in 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
