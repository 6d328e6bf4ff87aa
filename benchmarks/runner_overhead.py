"""What running a stage in a container costs: the same stage by both runners, in turn, whole commands timed.

    python benchmarks/runner_overhead.py smollm2-concise -n 7

In a project whose recipe is built and whose image is pinned. The stage is `gate`, which takes about a second by itself;
what is left of the difference is looking for the image, creating, starting and removing the container, and starting
Python from the image's files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe")
    arguments.add_argument("-n", type=int, default=7, help="pairs of runs after one of each to warm up (default: 7)")
    asked = arguments.parse_args()
    seconds: dict[str, list[float]] = {"local": [], "docker": []}
    for pair in range(asked.n + 1):
        for runner, times in seconds.items():
            taken = run(asked.recipe, runner)
            if pair:
                times.append(taken)
    differences = [there - here for here, there in zip(seconds["local"], seconds["docker"], strict=True)]
    for name, times in {**seconds, "docker - local": differences}.items():
        print(f"{name:15} min {min(times):.2f} s  median {statistics.median(times):.2f} s  max {max(times):.2f} s")
    print(json.dumps({**seconds, "median_overhead_s": round(statistics.median(differences), 3)}))


def run(recipe: str, runner: str) -> float:
    """Seconds of one `prefbuild stage gate`, its old verdict removed first, as DVC does."""
    Path(f"build/{recipe}/gate.json").unlink(missing_ok=True)
    command = [os.path.join(os.path.dirname(sys.executable), "prefbuild"), "stage", "gate", recipe, "--runner", runner]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
