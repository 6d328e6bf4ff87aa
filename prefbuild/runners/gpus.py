"""Two ways to hand GPUs to a container: the engine's own, and device nodes with the driver's libraries.

The worker proves inside that it sees them; nothing here does.
"""

import glob
import os
import subprocess
from pathlib import Path
from typing import Any

# The NVIDIA driver's user-space libraries that CUDA programs load. They must be those of the kernel's driver.
DRIVER = ("libcuda.so", "libnvidia-ml.so", "libnvidia-ptxjitcompiler.so", "libnvidia-nvvm.so", "libnvidia-gpucomp.so")
FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")
INSIDE = "/usr/local/nvidia/lib64"
CONTROL = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


def gpu_requests(count: int, *, podman: bool = False) -> list[dict[str, Any]]:
    """Options for creating a container with so many GPUs, in the order to try them. One empty set when count is 0.

    CUDA_VISIBLE_DEVICES of the caller says which GPUs, by index or UUID. Podman ignores the first way, so it gets the
    second where this machine has the nodes.
    """
    if not count:
        return [{}]
    from docker.types import DeviceRequest

    chosen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu][:count]
    which = {"device_ids": chosen} if chosen else {"count": count}
    ways: list[dict[str, Any]] = [{"device_requests": [DeviceRequest(capabilities=[["gpu"]], **which)]}]
    nodes = device_nodes(count, chosen)
    if nodes and podman:
        return [nodes]
    return [*ways, nodes] if nodes else ways


def device_nodes(count: int, chosen: list[str]) -> dict[str, Any]:
    """Device nodes and the driver's libraries, mounted read-only; empty when this machine has too few.

    For engines without NVIDIA's toolkit, on this machine.
    """
    indices = [int(gpu) for gpu in chosen] if all(gpu.isdigit() for gpu in chosen) else []
    nodes = [f"/dev/nvidia{i}" for i in indices] or sorted(glob.glob("/dev/nvidia[0-9]*"))[:count]
    libraries = driver_libraries()
    if len(nodes) < count or not all(map(os.path.exists, nodes)) or not libraries:
        return {}
    return {
        "devices": [f"{node}:{node}:rw" for node in (*nodes, *filter(os.path.exists, CONTROL))],
        # `volumes`, beside the runner's `mounts`; every source exists, so none is made on the host.
        "volumes": [f"{source}:{INSIDE}/{name}:ro" for name, source in libraries.items()],
    }


def driver_libraries() -> dict[str, str]:
    """Real path of each of the driver's libraries by the name programs ask for (libcuda.so.1)."""
    found: dict[str, str] = {}
    files = [path for folder in FOLDERS for path in sorted(glob.glob(f"{folder}/lib*.so*"))]
    for name, path in _loader_cache() + [(Path(path).name, path) for path in files]:
        if name.startswith(DRIVER) and name not in found and os.path.exists(path):
            found[name] = os.path.realpath(path)
    return found if any(name.startswith("libcuda.so") for name in found) else {}


def _loader_cache() -> list[tuple[str, str]]:
    try:
        text = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    lines = [line.split() for line in text.splitlines() if "=>" in line and "i386" not in line]
    return [(line[0], line[-1]) for line in lines]
