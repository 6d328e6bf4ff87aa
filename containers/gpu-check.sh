#!/usr/bin/env bash
# Prove that the train stage runs on this host's GPU in a container, as an ordinary user and without a network, and ends
# with an adapter: the same one twice. Prints what the running container is and sees; fails when any of it is not so.
#
#   containers/gpu-check.sh --model SmolLM2-135M-Instruct.Q4_1.gguf --image prefbuild-cuda:0123456789ab
#   sudo containers/gpu-check.sh --model ./checkpoint --from-root host-root --python /opt/ml/bin/python --include /opt/ml
#
#   --model PATH        the base model: a GGUF file or a checkpoint folder (required to train)
#   --image REFERENCE   an image that the engine at DOCKER_HOST has, made by `prefbuild image build cuda`
#   --from-root NAME    without --image: make one of this host's own files, for hosts that reach no registry. NAME:latest
#                       becomes the base: /usr without /usr/local, the linker's files, and what --include names
#   --include FOLDER    goes into that base too, such as a Python; can be given again
#   --exclude PATTERN   stays out of it (tar's --exclude); can be given again
#   --wheels FOLDER     packages that Python lacks, or has in another version: installed with neither index nor dependencies
#   --python PYTHON     Python 3.11 or newer with prefbuild's dependencies, but for the wheels (default: python3). It runs
#                       prefbuild here and, with --from-root, in the image too
#   --image-only        make the image, print its ID and stop
#   --gpus N            0 rehearses all of it on the CPU (default: 1)
#   --gpu-memory SIZE   that the GPU must have (default: 20GiB)
#   --max-steps N       of the training (default: the recipe's, recipes/smollm2-concise.yaml)
#   --uid N             the ordinary user, when run as root (default: 1000)
#   --work FOLDER       keep the project and its outputs there (default: a temporary folder)
#
# Needs an engine at DOCKER_HOST; --from-root needs root, as does setpriv, which root becomes the ordinary user with.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
fail() { echo "$0: $*" >&2; exit 1; }
step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

model="" image="" from_root="" wheels="" python=python3 image_only="" gpus=1 gpu_memory=20GiB max_steps="" uid=1000 work=""
includes=() excludes=()
while [ $# -gt 0 ]; do
  if [ "$1" = --image-only ]; then image_only=1; shift; continue; fi
  if [ $# -lt 2 ]; then usage; fi
  case "$1" in
    --model) model="$(realpath -e "$2")" ;;
    --image) image="$2" ;;
    --from-root) from_root="$2" ;;
    --include) includes+=("$(realpath -es "$2")") ;;
    --exclude) excludes+=("--exclude=$2") ;;
    --wheels) wheels="$(realpath -e "$2")" ;;
    --python) python="$2" ;;
    --gpus) gpus="$2" ;;
    --gpu-memory) gpu_memory="$2" ;;
    --max-steps) max_steps="$2" ;;
    --uid) uid="$2" ;;
    --work) work="$2" ;;
    *) echo "$1: no such option" >&2; exit 2 ;;
  esac
  shift 2
done
if [ -z "$image$from_root" ] || [ -z "$model$image_only" ]; then usage; fi
if [ -n "$image" ] && [ -n "$from_root" ]; then usage; fi
repository="$(realpath "$(dirname "$0")/..")"
# An absolute path that keeps a virtual environment's own name: its link leads to the Python it was made from.
python="$(realpath -s "$(command -v "$python")")" || fail "$python: no such Python"

host="${DOCKER_HOST:-unix:///var/run/docker.sock}" user=() groups=(--clear-groups)
case "$host" in
  unix://*)
    [ -S "${host#unix://}" ] || fail "no container engine at $host; start one, or set DOCKER_HOST"
    groups=(--groups "$(stat -c %g "${host#unix://}")") ;;
esac
if [ "$(id -u)" = 0 ]; then
  [ "$uid" != 0 ] || fail "--uid 0 is no ordinary user"
  command -v setpriv >/dev/null || fail "needs setpriv, of the package util-linux"
  user=(setpriv --reuid "$uid" --regid "$uid" "${groups[@]}")
elif [ -n "$from_root" ]; then
  fail "--from-root reads files that only root can; run it with sudo"
fi

if [ -n "$work" ]; then
  mkdir -p "$work" && work="$(realpath "$work")"
  [ -z "$(ls -A "$work")" ] || fail "$work: is not empty"
else
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
fi
mkdir "$work/home" "$work/project"
project="$work/project"

# ---- prefbuild for this host: its code over the given Python's packages, where any user can read them

# A virtual environment of a virtual environment sees the packages of neither's parent, so they are named.
packages="$("$python" -I -c 'import os, site; print(*filter(os.path.isdir, site.getsitepackages()), sep="\n")')"
"$python" -m venv --without-pip "$work/host"
if [ -n "$wheels" ]; then
  "$python" -m pip --python "$work/host/bin/python" install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check "$wheels"/*.whl
fi
mkdir "$work/host/code" && cp -RL "$repository/prefbuild" "$work/host/code/"
printf '%s\n' "$work/host/code" "$packages" >"$("$work/host/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/prefbuild.pth"
chmod -R go+rX,go-w "$work"
if [ -n "$model" ] && [ -n "$("${user[@]}" find "$model" ! -readable 2>&1)" ]; then fail "$model: is not readable by user $uid; chmod -R a+rX it, and the folders above"; fi
run() { (cd "$project" && "${user[@]}" env HOME="$work/home" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 "$@"); }
prefbuild() { echo "\$ prefbuild $*"; run "$work/host/bin/python" -m prefbuild "$@"; }

# ---- a project with the demonstration's recipe, on the given model

cp -R "$repository/recipes" "$repository/params.yaml" "$project/"
PYTHONPATH="$work/host/code" "$work/host/bin/python" - "$project" "${model:-/model}" "$gpus" "$gpu_memory" "$max_steps" <<'EOF'
import sys
from pathlib import Path

import yaml

project, model, gpus, gpu_memory, max_steps = sys.argv[1:]
for path in Path(project, "recipes").glob("*.yaml"):
    if path.stem == "smollm2-concise":
        recipe = yaml.safe_load(path.read_text())
    path.unlink()
recipe["base"] = {"source": "file", "path": model}
recipe["compute"] = {"image": "cuda", "gpus": int(gpus)} | ({"gpu_memory": gpu_memory} if int(gpus) else {})
if max_steps:
    recipe["train"]["max_steps"] = int(max_steps)
Path(project, "recipes/gpu-check.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
EOF
if [ "$(id -u)" = 0 ]; then chown -R "$uid:$uid" "$project" "$work/home"; fi

# ---- the image

if [ -n "$from_root" ]; then
  step "the base $from_root, of this host's files"
  "$work/host/bin/python" - "$from_root" "${excludes[@]}" -- "${includes[@]}" <<'EOF'
import os
import subprocess
import sys
from pathlib import Path

import docker

name, *rest = sys.argv[1:]
split = rest.index("--")
excludes, includes = rest[:split], [Path(folder).relative_to("/") for folder in rest[split + 1 :]]
folders = ["tmp", "etc", "usr", *(str(parent) for folder in includes for parent in reversed(folder.parents[:-1]))]
files = ["bin", "sbin", *(path.name for path in Path("/").glob("lib*") if path.name != "lost+found")]
files += [f"usr/{path.name}" for path in Path("/usr").iterdir() if path.name != "local"]
files += [f"etc/{file}" for file in ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf")]
tar = [
    "tar", "--create", "--file=-", "--directory=/", "--owner=0", "--group=0", "--numeric-owner",
    # Any user can read all of it, and nothing of it gives more rights. /tmp stays as it is: a container's has its mode.
    "--mode=u+rw,go+rX,a-s", "--exclude=usr/share/doc", "--exclude=usr/share/man", *excludes,
    # The engine makes folders that are missing so that only root can enter them.
    "--no-recursion", *dict.fromkeys(folders), "--recursion", *(file for file in files if os.path.lexists(f"/{file}")),
    *map(str, includes),
]  # fmt: skip
with subprocess.Popen(tar, stdout=subprocess.PIPE) as process:
    chunks = iter(lambda: process.stdout.read(2**20), b"")
    client = docker.from_env(timeout=1800)
    answer = client.api.import_image(chunks, repository=name, tag="latest", stream_src=True)
if process.returncode not in (0, 1):  # 1: a file changed meanwhile
    sys.exit(f"tar failed: {process.returncode}")
if "error" in answer:
    sys.exit(answer)
image = client.images.get(f"{name}:latest")
print(f"{name}:latest is {image.id}, {image.attrs['Size'] / 1e9:.2f} GB")
EOF

  # As cuda.Dockerfile makes it, but for where the packages come from; from its settings on, it is that file.
  mkdir -p "$project/containers/wheels"
  if [ -n "$wheels" ]; then cp "$wheels"/*.whl "$project/containers/wheels/"; fi
  printf '%s\n' /opt/prefbuild/code "$packages" >"$project/containers/wheels/prefbuild.pth"
  {
    printf 'ARG BASE\nFROM ${BASE}\n'
    printf 'RUN ["%s", "-m", "venv", "--without-pip", "/opt/prefbuild"]\n' "$python"
    printf 'COPY wheels /opt/prefbuild/wheels/\n'
    if [ -n "$wheels" ]; then
      printf 'RUN "%s" -m pip --python /opt/prefbuild/bin/python install --quiet --no-index --no-deps --no-cache-dir --disable-pip-version-check /opt/prefbuild/wheels/*.whl\n' "$python"
    fi
    printf 'RUN mv /opt/prefbuild/wheels/prefbuild.pth "$(/opt/prefbuild/bin/python -c '\''import sysconfig; print(sysconfig.get_path("purelib"))'\'')/"\n'
    sed -n '/^# The root is read-only/,$p' "$repository/containers/cuda.Dockerfile"
  } >"$project/containers/cuda.Dockerfile"
  chmod -R go+rX "$project/containers"
  step "the image, without a network"
  prefbuild image build cuda --base "$from_root:latest" --network none
else
  step "the image"
  prefbuild image lock cuda "$image"
fi
prefbuild image list
if [ -n "$image_only" ]; then exit 0; fi

# ---- the stages

step "pin and resolve"
prefbuild lock
prefbuild sync
prefbuild resolve
for resolved in models data; do
  name="$(basename "$project"/build/.resolved/$resolved/*.json .json)"
  step "${resolved%s} $name"
  prefbuild stage "${resolved%s}" "$name" --runner docker
done
step "prepare"
prefbuild stage prepare gpu-check --runner docker

cat >"$work/watch.py" <<'EOF'
"""Run the train stage and look at its container, from outside and from inside, while it trains."""

import json
import os
import subprocess
import sys
import time

import docker

INSIDE = r"""
import glob, json, os, socket
pid = next(p for p in glob.glob("/proc/[0-9]*") if b"prefbuild.worker" in open(p + "/cmdline", "rb").read()
           and b"python" in os.readlink(p + "/exe").encode())
status = dict(line.rstrip("\n").split(":\t", 1) for line in open(pid + "/status") if ":\t" in line)
def error(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.strerror
    return ""
print(json.dumps({
    "command": open(pid + "/cmdline").read().replace("\0", " ").strip(),
    **{key: status[key].split() for key in ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")},
    "interfaces": [line.split(":")[0].strip() for line in open(pid + "/net/dev") if ":" in line],
    "connect": error(socket.create_connection, ("192.0.2.1", 443), 5),
    "write to /": error(open, "/x", "w"),
    "write to the input": error(open, "/project/build/gpu-check/prepared/train.jsonl", "a"),
    "GPU nodes": sorted(glob.glob("/dev/nvidia*")),
    "driver": "".join(open(path).readline().strip() for path in glob.glob("/proc/driver/nvidia/version")),
}))
"""
HOST = ("NetworkMode", "ReadonlyRootfs", "Privileged", "CapAdd", "CapDrop", "SecurityOpt", "PidMode", "IpcMode", "PidsLimit", "Tmpfs")
gpus = int(sys.argv[1])
client = docker.from_env(timeout=120)
stage = subprocess.Popen([sys.executable, "-m", "prefbuild", "stage", "train", "gpu-check", "--runner", "docker"])
outside, inside = {}, {}
while stage.poll() is None and not inside:
    time.sleep(0.2)
    for container in client.containers.list(filters={"label": [f"prefbuild.pid={stage.pid}"]}, ignore_removed=True):
        about = client.api.inspect_container(container.id)
        result = container.exec_run(["/opt/prefbuild/bin/python", "-c", INSIDE], demux=True)
        if result.exit_code == 0:  # else the worker has not begun
            outside, inside = about, json.loads(result.output[0])
code = stage.wait()
if code or not inside:
    sys.exit(f"the train stage ended with exit code {code}" if code else "its container was not seen")

config, host = outside["Config"], outside["HostConfig"]
print(f"the container, as the engine has it: image {outside['Image']}")
print(f"  user {config['User']}, entrypoint {config['Entrypoint']}, command {config['Cmd']}")
print("".join(f"  {key}: {json.dumps(host[key])}\n" for key in HOST), end="")
print(f"  Devices: {[device['PathOnHost'] for device in host['Devices'] or []]}")
print(f"  DeviceRequests: {json.dumps(host['DeviceRequests'])}")
for mount in sorted(outside["Mounts"], key=lambda mount: mount["Destination"]):
    print(f"  {'rw' if mount['RW'] else 'ro'} {mount['Destination']}")
print("the worker in it, while it trained:")
print("".join(f"  {key}: {value if isinstance(value, str) else ' '.join(value)}\n" for key, value in inside.items()), end="")

user = [str(os.getuid())] * 4
wrong = [
    what
    for what, right in {
        "it runs as another user": inside["Uid"] == user and "0" not in inside["Uid"],
        "it has capabilities": int(inside["CapEff"][0], 16) == 0 and int(inside["CapBnd"][0], 16) == 0,
        "it can gain rights": inside["NoNewPrivs"] == ["1"],
        "system calls are not filtered": inside["Seccomp"] == ["2"],
        "it has a network": host["NetworkMode"] == "none" and inside["interfaces"] == ["lo"] and inside["connect"],
        "its root can be written": host["ReadonlyRootfs"] and inside["write to /"],
        "its inputs can be written": inside["write to the input"],
        "no GPU was handed over": not gpus or host["Devices"] or host["DeviceRequests"],
    }.items()
    if not right
]
if wrong:
    sys.exit("; ".join(wrong))
EOF
chmod go+r "$work/watch.py"

adapter() { # the digest of the adapter, after checking every file of it
  run "$work/host/bin/python" -c 'from pathlib import Path; from prefbuild.artifact import verify_artifact
print(verify_artifact(Path("build/gpu-check/adapter"))["digest"])'
}

for turn in first second; do
  step "train, the $turn time"
  run "$work/host/bin/python" "$work/watch.py" "$gpus"
  if [ $turn = first ]; then
    first="$(adapter)"
    run mv build/gpu-check/train.json train-first.json
    run rm -r build/gpu-check/adapter
  fi
done
second="$(adapter)"
step "what came of it"
(cd "$project" && ls -ln build/gpu-check/adapter && cat build/gpu-check/train.json)
run "$work/host/bin/python" - "$gpus" <<'EOF'
import json
import sys

device = json.load(open("build/gpu-check/train.json"))["machine"]["device"]
if int(sys.argv[1]) and "NVIDIA" not in device:
    sys.exit(f"it trained on {device}, which is no GPU of NVIDIA")
EOF
echo "adapter, first time:  $first"
echo "adapter, second time: $second"
[ "$first" = "$second" ] || fail "the two adapters differ"
step "all of it is so"
