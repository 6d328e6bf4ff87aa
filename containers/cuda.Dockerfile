# The image in which stages run on NVIDIA GPUs: `prefbuild image build cuda`.
# Any base with Python 3.11 or newer, or a Debian or Ubuntu whose own Python that is, will do: --base IMAGE.
# CUDA 13.0, as torch has it. The machine's driver must be 580 or newer; the driver's own libraries come with the container.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
FROM ${BASE}

# Triton compiles a launcher for each of its kernels while a stage runs: gcc, the C library's and Python's headers.
# Python is installed only where the base has none.
RUN packages="gcc libc6-dev libgomp1 libstdc++6" \
 && if ! python3 -c "import ensurepip, venv" 2>/dev/null; then packages="$packages python3 python3-venv"; fi \
 && if ! ls "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h" 2>/dev/null; then \
      packages="$packages python3-dev"; fi \
 && apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $packages \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give another --base")'

# Some packages come as source; what builds them is pinned as well, so nothing comes in without its hash.
COPY requirements-build.txt /opt/prefbuild/requirements/
RUN python3 -m venv /opt/prefbuild \
 && /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      -r /opt/prefbuild/requirements/requirements-build.txt

# torch with CUDA and Triton: gigabytes that seldom change, so a layer of their own. PyPI has all of it.
COPY requirements-cuda-torch.txt /opt/prefbuild/requirements/
RUN /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      --no-build-isolation --use-pep517 -r /opt/prefbuild/requirements/requirements-cuda-torch.txt

# --no-deps: the list is whole, so pip resolves nothing; `pip check` proves it.
COPY requirements-cuda.txt /opt/prefbuild/requirements/
RUN /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
      --no-build-isolation --use-pep517 -r /opt/prefbuild/requirements/requirements-cuda.txt \
 && /opt/prefbuild/bin/pip check \
 && echo /opt/prefbuild/code > "$(/opt/prefbuild/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/prefbuild.pth"

# Packages of train.report_to, for `prefbuild image build cuda --tracking`.
ARG TRACKING=
COPY requirements-tracking.txt /opt/prefbuild/requirements/
RUN if [ -n "$TRACKING" ]; then \
      /opt/prefbuild/bin/pip install --no-cache-dir --progress-bar off --require-hashes --no-deps \
        -r /opt/prefbuild/requirements/requirements-tracking.txt \
      && /opt/prefbuild/bin/pip check; \
    fi

# The root is read-only when a stage runs, so only /tmp can be a home. PYTHONSAFEPATH: the working directory is the
# project, and a folder of its that is named as one of our modules must not be taken for it.
# NVIDIA_DRIVER_CAPABILITIES: which of the driver's libraries NVIDIA's container toolkit brings in.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HF_HUB_OFFLINE=1 \
    HF_DATASETS_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /project
ENTRYPOINT ["/opt/prefbuild/bin/python"]

# Last, so that changed code rebuilds in seconds. Compiled here, because a stage can't write what Python compiles.
COPY prefbuild /opt/prefbuild/code/prefbuild
RUN ["/opt/prefbuild/bin/python", "-m", "compileall", "-q", "/opt/prefbuild/code"]
# Nobody: who starts the image by hand is not root either. The runner names its own user.
USER 65534:65534
