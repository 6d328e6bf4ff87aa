"""How long optimizer steps take, and what a GPU does in them.

Every step ends with an event on the GPU, which nothing waits for; a step's time is the difference of two, so that it
holds all that happens from the end of one step to the end of the next.
"""

import time
from typing import Any


class Steps:
    """When the optimizer's steps ended, whichever library takes them.

    `profiled` says which steps' kernels are looked at, which takes a GPU: range(5, 7) is what lies between the ends of
    step 5 and step 7.
    """

    def __init__(self, profiled: range | None = None) -> None:
        self.marks: list[Any] = []
        self.first = 0.0  # time.time() of the end of step 1
        self.profiled = profiled
        self.profile: Any = None

    def __enter__(self) -> "Steps":
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.cuda = torch.cuda.is_available()
        self.hook = register_optimizer_step_post_hook(lambda *_: self.ended())
        return self

    def __exit__(self, *_error: Any) -> None:
        self.hook.remove()

    def ended(self) -> None:
        import torch

        if not self.cuda:
            self.marks.append(time.perf_counter())
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        if len(self.marks) == 1:
            self.synchronize()
            self.first = time.time()
        if self.profiled is not None and len(self.marks) in (self.profiled.start, self.profiled.stop):
            self.toggle_profile()

    def toggle_profile(self) -> None:
        import torch

        self.synchronize()
        if self.profile is None:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
            self.wall = -time.perf_counter()
        else:
            self.wall += time.perf_counter()
            self.profile.stop()

    def synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self) -> list[float]:
        """Of each step from the second on."""
        self.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [round(a.elapsed_time(b) / 1000 if self.cuda else b - a, 5) for a, b in pairs]

    def parts(self) -> dict[str, float]:
        """Where the GPU's time of a profiled step went, in seconds: by kind of kernel, and idle."""
        import torch

        parts = dict.fromkeys(("matrix products", "attention", "other kernels", "copies"), 0.0)
        number = len(self.profiled or ())
        busy = []
        for event in self.profile.events():
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            parts[kind(event.name)] += event.time_range.elapsed_us() / 1e6 / number
            busy.append((event.time_range.start, event.time_range.end))
        return {**parts, "idle": max(0.0, self.wall - covered(busy) / 1e6) / number}


def kind(kernel: str) -> str:
    """What a kernel of this name does. FlashAttention's are built on cutlass too, so attention is asked for first."""
    name = kernel.lower()
    if "memcpy" in name or "memset" in name:
        return "copies"
    if any(word in name for word in ("flash", "fmha", "attention", "attn", "attend")):
        return "attention"
    if any(word in name for word in ("gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk", "linear")):
        return "matrix products"
    return "other kernels"


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total
