# The image in which stages run on a CPU: `prefbuild image build cpu`.
# Any base with Python 3.11, or a Debian or Ubuntu whose own Python that is, will do: --base IMAGE.
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${BASE}

# bitsandbytes needs libgomp1. Python is installed only where the base has none.
RUN packages="libgomp1 libstdc++6" \
 && if ! python3 -c "import ensurepip, venv" 2>/dev/null; then packages="$packages python3 python3-venv"; fi \
 && apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $packages \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the CPU wheels are locked for Python 3.11; give another --base")'

# Some packages come as source; what builds them is pinned as well, so nothing comes in without its hash.
COPY requirements-build.txt /opt/prefbuild/requirements/
RUN python3 -m venv /opt/prefbuild \
 && /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      -r /opt/prefbuild/requirements/requirements-build.txt

# PyTorch's CPU wheel is on PyTorch's own index only. A layer for it alone: the largest, and it seldom changes.
COPY requirements-cpu-torch.txt /opt/prefbuild/requirements/
RUN /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      --find-links https://download.pytorch.org/whl/cpu/torch/ \
      -r /opt/prefbuild/requirements/requirements-cpu-torch.txt

# --no-deps: the list is whole, so pip resolves nothing; `pip check` proves it.
COPY requirements-cpu.txt /opt/prefbuild/requirements/
RUN /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      --no-build-isolation --use-pep517 -r /opt/prefbuild/requirements/requirements-cpu.txt \
 && /opt/prefbuild/bin/pip check \
 && echo /opt/prefbuild/code > "$(/opt/prefbuild/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/prefbuild.pth"

# Packages of train.report_to, for `prefbuild image build cpu --tracking`.
ARG TRACKING=
COPY requirements-tracking.txt /opt/prefbuild/requirements/
RUN if [ -n "$TRACKING" ]; then \
      /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
        -r /opt/prefbuild/requirements/requirements-tracking.txt \
      && /opt/prefbuild/bin/pip check; \
    fi

# The root is read-only when a stage runs, so only /tmp can be a home. PYTHONSAFEPATH: the working directory is the
# project, and a folder of its that is named as one of our modules must not be taken for it.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HF_HUB_OFFLINE=1 \
    HF_DATASETS_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=1
WORKDIR /project
ENTRYPOINT ["/opt/prefbuild/bin/python"]

# Last, so that changed code rebuilds in seconds. Compiled here, because a stage can't write what Python compiles.
COPY prefbuild /opt/prefbuild/code/prefbuild
RUN ["/opt/prefbuild/bin/python", "-m", "compileall", "-q", "/opt/prefbuild/code"]
# Nobody: who starts the image by hand is not root either. The runner names its own user.
USER 65534:65534
