"""What this processor can do, asked where torch must not be imported, and what this process can do without."""

import os
import shutil
import sys
import sysconfig
from functools import cache
from importlib.util import find_spec
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


@cache
def has_triton() -> bool:
    """Whether Triton is here with what it needs to start a kernel: a C compiler, and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # Debian's default scheme is of what pip puts below /usr/local; Python's own files are in the other.
    headers = (sysconfig.get_path("include", scheme) for scheme in (sysconfig.get_default_scheme(), "posix_prefix"))
    found = any(Path(folder, "Python.h").exists() for folder in headers)
    return find_spec("triton") is not None and bool(compiler) and found


def leave_out(*packages: str) -> None:
    """Tell this process that packages are not installed: TRL and PEFT import some wherever they are, which takes seconds.

    Call it before those are imported, for what nothing here uses.
    """
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # how Python is told not to look
