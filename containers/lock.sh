#!/usr/bin/env bash
# Write the requirements files of the images from ../pyproject.toml and ../constraints.txt. Needs uv (0.13 made these) and PyPI.
# The machine's own pip settings play no part. For PyTorch's CPU wheels in a folder: TORCH_CPU=/path/to/wheels containers/lock.sh
set -euo pipefail
cd "$(dirname "$0")/.."
TORCH_CPU="${TORCH_CPU:-https://download.pytorch.org/whl/cpu/torch/}"
torch="$(grep '^torch==' constraints.txt)"

compile() { # compile OUTPUT INPUT OPTION...
  local output="containers/$1" input="$2"
  shift 2
  # Afresh: uv would keep the versions it finds in the output.
  rm -f "$output"
  uv pip compile --quiet --no-config --no-annotate --generate-hashes --custom-compile-command containers/lock.sh \
    --default-index https://pypi.org/simple --python-version 3.11 --constraints constraints.txt \
    "$@" --output-file "$output" "$input"
}

# Some packages come as source only. What builds them is pinned too, and is a requirement of torch anyway.
echo 'setuptools>=77' | compile requirements-build.txt - --universal

# CPU wheels of torch are told apart by +cpu, and are not on PyPI. The CPU image has Python 3.11 on x86-64, and nothing else.
cpu=(--python-platform x86_64-manylinux_2_28 --find-links "$TORCH_CPU")
compile requirements-cpu.txt pyproject.toml "${cpu[@]}" --overrides <(echo "$torch+cpu") --no-emit-package docker
# Torch alone: it is asked for where nothing else is.
awk '/^[^ ]/ { keep = /^#|^torch==/ } keep' containers/requirements-cpu.txt >containers/requirements-cpu-torch.txt

# What train.report_to needs, on any Python from 3.11 on: `prefbuild image build ROLE --tracking`.
python3 - <<'END' | compile requirements-tracking.txt - --universal
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(line for name in ("tensorboard", "wandb", "mlflow", "trackio") for line in extras[name]), sep="\n")
END

# PyPI's torch brings CUDA and Triton. Any Python from 3.11 on; docker is what starts containers, not what runs in them.
echo "$torch" | compile requirements-cuda-torch.txt - --universal
compile requirements-cuda.txt pyproject.toml --universal --extra gpu --no-emit-package docker
