"""What this processor can do, asked where torch must not be imported, and what this process can do without."""

import sys
from pathlib import Path


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []))


def cpu_bf16() -> set[str]:
    """The instruction sets by which this CPU computes in bfloat16; empty: it would emulate it."""
    return {"avx512_bf16", "amx_bf16"} & cpu_flags()


def leave_out(*packages: str) -> None:
    """Tell this process that packages are not installed: TRL and PEFT import some wherever they are, which takes seconds.

    Call it before those are imported, for what nothing here uses.
    """
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # how Python is told not to look
