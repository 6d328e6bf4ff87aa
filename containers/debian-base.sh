#!/usr/bin/env bash
# Make a base for cpu.Dockerfile and cuda.Dockerfile from Debian's packages alone, for places that reach no image registry.
#
#   sudo containers/debian-base.sh --tag debian-base
#   prefbuild image build cpu --base debian-base
#
#   --tag NAME          the image's name in the engine at DOCKER_HOST (required)
#   --suite SUITE       Debian's release (default: bookworm, whose Python is 3.11)
#   --mirror URL        of Debian's packages (default: http://deb.debian.org/debian)
#   --certificate FILE  an authority to trust besides the usual ones; can be given again
#   --pip-conf FILE     becomes /etc/pip.conf: your index. No passwords: whoever has the image can read it
#   --wheels FOLDER     its wheels go to /opt/wheels; have `find-links = /opt/wheels` in the pip.conf
#
# Needs root, mmdebstrap, and a Python with the package docker (PYTHON, default python3).
set -euo pipefail

tag="" suite=bookworm mirror=http://deb.debian.org/debian pip_conf="" wheels="" certificates=()
while [ $# -gt 0 ]; do
  if [ $# -lt 2 ]; then sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
  case "$1" in
    --tag) tag="$2" ;;
    --suite) suite="$2" ;;
    --mirror) mirror="$2" ;;
    --certificate) certificates+=("$2") ;;
    --pip-conf) pip_conf="$2" ;;
    --wheels) wheels="$2" ;;
    *) echo "$1: no such option" >&2; exit 2 ;;
  esac
  shift 2
done
if [ -z "$tag" ]; then sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
if [ "$(id -u)" != 0 ]; then echo "$0: needs root; run it with sudo" >&2; exit 1; fi
if ! command -v mmdebstrap >/dev/null; then echo "$0: needs mmdebstrap: apt-get install mmdebstrap" >&2; exit 1; fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Laid over the new root: mmdebstrap runs the hooks in order, in its own root "$1".
mkdir -p "$work/overlay/usr/local/share/ca-certificates" "$work/overlay/etc" "$work/overlay/opt"
for number in "${!certificates[@]}"; do
  # update-ca-certificates takes files that end in .crt only.
  install -m 644 "${certificates[$number]}" "$work/overlay/usr/local/share/ca-certificates/extra-$number.crt"
done
if [ -n "$pip_conf" ]; then install -m 644 "$pip_conf" "$work/overlay/etc/pip.conf"; fi
if [ -n "$wheels" ]; then install -Dm 644 -t "$work/overlay/opt/wheels" "$wheels"/*.whl; fi
chmod 755 "$work/overlay"

# --variant=apt: what is essential, and apt. Manuals and translations are left out.
mmdebstrap --quiet --variant=apt --components=main \
  --include=ca-certificates,python3,python3-venv \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook="cp -a '$work/overlay/.' \"\$1/\"" \
  --customize-hook='chroot "$1" update-ca-certificates >/dev/null 2>&1' \
  "$suite" "$work/root.tar" "$mirror"

"${PYTHON:-python3}" - "$work/root.tar" "$tag" <<'EOF'
import json
import sys

import docker

path, tag = sys.argv[1:]
name, _, version = tag.partition(":")
client = docker.from_env(timeout=600)
answer = client.api.import_image_from_file(path, repository=name, tag=version or "latest")
line = json.loads(answer.strip().splitlines()[-1])
if "error" in line:
    sys.exit(line["error"])
print(f"{tag} is {client.images.get(tag).id}")
EOF
