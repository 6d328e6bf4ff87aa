"""What a device does, measured in about a second: matmuls of a model's size, copies, kernel launches.

`python -m prefbuild.device HIDDEN INTERMEDIATE BYTES` prints JSON: {"name", "total", "free", "matmul", "bandwidth",
"launch"}, of the first GPU, or of the CPU where torch sees none. In a process of its own, because torch takes seconds
and memory. Devices that are not here have the numbers of KNOWN.
"""

import json
import subprocess
import sys
import time
from typing import Any

from prefbuild.plan import Speed

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
LAUNCH = 6e-6  # seconds a kernel's launch from Python takes with its share of autograd


def known_speed(name: str) -> Speed | None:
    """The speed of a GPU by a part of its name, as in `NVIDIA H200`; None for one that KNOWN lacks."""
    for part, (teraflops, gigabytes, _) in KNOWN.items():
        if part.lower() in name.lower():
            return Speed(matmul=0.75 * teraflops * 1e12, bandwidth=0.85 * gigabytes * GB, launch=LAUNCH)
    return None


def measured(hidden: int, intermediate: int, bytes_per_number: int, env: dict[str, str]) -> dict[str, Any] | None:
    """What this module prints as a program; None where it fails, as without torch."""
    argv = [sys.executable, "-m", "prefbuild.device", *map(str, (hidden, intermediate, bytes_per_number))]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    return json.loads(done.stdout) if done.returncode == 0 else None


def measure(hidden: int, intermediate: int, bytes_per_number: int) -> dict[str, Any]:
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
    about: dict[str, Any] = {"name": "CPU", "total": None, "free": None}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        about = {"name": torch.cuda.get_device_name(), "total": total, "free": free}
    bandwidth = 2 * large.numel() * 4 / moved
    return {**about, "matmul": flops / matmul, "bandwidth": bandwidth, "launch": launch}


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
