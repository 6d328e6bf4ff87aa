"""What this machine lacks for a recipe, found before hours are spent on it.

Covered: tools, package versions, the lock, disk, links between project and cache, processor or GPU, memory, containers,
and what the Hub says of sources that are not fetched and of a promotion to it.
Not covered: how long a build takes, other programs that take memory meanwhile, remotes. Sizes are estimates and say so.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.errors import LockError, StageError
from prefbuild.launch import INSTALL_DEEPSPEED
from prefbuild.lock import locked_image
from prefbuild.machine import cpu_bf16
from prefbuild.methods import BNB_OPTIMIZERS, SHAPES, PromptOptions, Train, TrainOptions, reference_recipe, split_batch
from prefbuild.recipe import Recipe, known_recipes
from prefbuild.resolve import Project, load_project
from prefbuild.runners import choose_runner
from prefbuild.shape import BYTES, ModelShape, locked_files, root_base, shape_of
from prefbuild.sources import node_id, title
from prefbuild.status import lock_problems
from prefbuild.track import how_to_install, not_installed

OLDEST_PYTHON = (3, 11)
# Bytes a trained weight that an optimizer keeps: Adam's two moments in 32 or 8 bits; SGD without momentum has none.
STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "paged_adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "sgd": 0,
}
GPU_TOOLS = ("nvidia-smi", "rocm-smi")
LIST_GPUS = """
import json, torch
devices = range(torch.cuda.device_count())
print(json.dumps([[torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)] for i in devices]))
"""
LIBRARIES = 1_000_000_000  # bytes that Python, torch and what it loads take before any model
COLORS = {"ok": "32", "warning": "33", "missing": "31"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `state` is ok, warning (a build may work) or missing (it will not); `fix` is empty when ok."""

    what: str
    state: str
    found: str
    needed: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU; memory in bytes."""

    name: str
    total: int
    free: int


def doctor(root: Path, name: str, *, network: bool = False) -> list[Finding]:
    """Look at everything the recipe's build needs. With `network`, also ask the package index for what is not fetched yet.

    Raises UsageError for an unknown recipe, RecipeError for broken files.
    """
    project = load_project(root)
    known_recipes([name], project.recipes)
    recipe = project.recipes[name]
    runner = choose_runner()
    there = find_gpus()
    gpus = there[: recipe.compute.gpus]
    shape = shape_of(project, recipe)
    return [
        python(),
        git(root),
        *dvc(root),
        *packages(),
        lock(project, name),
        *fetched(project, recipe, runner, network=network),
        *disk(project, name, shape),
        temporary(),
        *processor(recipe, gpus, shape, idle=len(there) - len(gpus)),
        memory(recipe, gpus, shape),
        *containers(project, recipe, runner),
        *tracking(project, recipe, runner),
        *promotion(recipe),
    ]


def doctor_text(findings: list[Finding], *, color: bool | None = None) -> str:
    """A line a finding, the fix below what is not ok, and a summary. `color`: None takes the terminal's word for it."""
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        state = f"{finding.state:7}"
        state = f"\x1b[{COLORS[finding.state]}m{state}\x1b[0m" if color else state
        needed = f" (needs {finding.needed})" if finding.needed else ""
        lines.append(f"{state}  {finding.what:{width}}  {finding.found}{needed}")
        lines += [f"{'':9}{'':{width}}  -> {line}" for line in finding.fix.splitlines()]
    missing = sum(finding.state == "missing" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    verdict = "nothing is missing" if not missing else f"{missing} missing"
    return "\n".join([*lines, "", verdict + (f", {warnings} warning{'s' if warnings > 1 else ''}" if warnings else "")])


# ---- tools


def python() -> Finding:
    """The interpreter's version."""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding(
        what="Python",
        state="ok" if sys.version_info >= OLDEST_PYTHON else "missing",
        found=platform.python_version(),
        needed=f"{wanted} or newer",
        fix="" if sys.version_info >= OLDEST_PYTHON else f"make an environment with Python {wanted} or newer",
    )


def git(root: Path) -> Finding:
    """git itself, and the project in a repository of it."""
    if shutil.which("git") is None:
        return Finding(what="git", state="missing", found="not on PATH", needed="git", fix="install git")
    version = _output(["git", "--version"]).removeprefix("git version ")
    if _output(["git", "-C", str(root), "rev-parse", "--is-inside-work-tree"]) != "true":
        return Finding(
            what="git", state="missing", found=f"{version}; the project is in no repository", fix="run `git init`"
        )
    return Finding(what="git", state="ok", found=version)


def dvc(root: Path) -> list[Finding]:
    """DVC, its repository, and both commands where DVC's shell finds them."""
    try:
        version = importlib.metadata.version("dvc")
    except importlib.metadata.PackageNotFoundError:
        return [Finding(what="DVC", state="missing", found="not installed", fix=f"{sys.executable} -m pip install dvc")]
    findings = [Finding(what="DVC", state="ok", found=version)]
    if not any((folder / ".dvc").is_dir() for folder in (root.resolve(), *root.resolve().parents)):
        findings = [Finding(what="DVC", state="missing", found=f"{version}; no repository", fix="run `dvc init`")]
    for command in ("dvc", "prefbuild"):
        if shutil.which(command) is None:
            fix = "activate the environment it is installed in (`prefbuild build` finds it by itself, `dvc repro` does not)"
            findings.append(
                Finding(what=f"`{command}`", state="warning", found="not on PATH; plain `dvc repro` calls it", fix=fix)
            )
    return findings


def packages(requirements: list[str] | None = None) -> list[Finding]:
    """Installed versions against what prefbuild requires (or against the given requirements)."""
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires("prefbuild") or []
        except importlib.metadata.PackageNotFoundError:
            return [
                Finding(what="packages", state="ok", found="not compared: prefbuild runs from a folder, not installed")
            ]
    wanted = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    findings = []
    for requirement in wanted:
        fix = f'{sys.executable} -m pip install "{requirement.name}{requirement.specifier}"'
        needed = str(requirement.specifier) or "any version"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(
                Finding(what=requirement.name, state="missing", found="not installed", needed=needed, fix=fix)
            )
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding(what=requirement.name, state="missing", found=version, needed=needed, fix=fix))
    good = len(wanted) - len(findings)
    return [Finding(what="packages", state="ok", found=f"{good} of {len(wanted)} as required"), *findings]


# ---- what the recipe names


def lock(project: Project, name: str) -> Finding:
    """Everything the recipe refers to pinned, and local files as they were pinned."""
    problems = lock_problems(project, name)
    if problems:
        found = f"{len(problems)} thing{'s' if len(problems) > 1 else ''} not as pinned"
        return Finding(what="lock", state="missing", found=found, fix="\n".join(problems))
    return Finding(what="lock", state="ok", found="everything is pinned")


def fetched(project: Project, recipe: Recipe, runner: str, *, network: bool) -> list[Finding]:
    """What is still to be downloaded, whether the Hub gives it, and, if asked, whether the index has it."""
    findings = []
    for folder, sources in (("models", [root_base(project, recipe)]), ("data", list(recipe.data.sources))):
        for source in [each.model_dump(mode="json") for each in sources]:
            node = node_id(source)
            if source["source"] == "file" or (project.root / "build" / folder / node / "manifest.json").exists():
                continue
            size = sum(file["size"] for file in locked_files(project, node))
            found = f"{title(source)}: not fetched yet" + (f", {_gigabytes(size)} and more to download" if size else "")
            if source["source"] == "hub":
                findings.append(_from_hub(project, source, runner, found))
                continue
            is_wheel = source["source"] == "wheel"
            problem = _index_problem(source["package"], source["version"]) if network and is_wheel else ""
            findings.append(
                Finding(
                    what="download",
                    state="missing" if problem else "ok",
                    found=f"{found}; {problem}" if problem else found,
                    needed="the package index",
                    fix="check the network, or pip's index setting (`pip config list`)" if problem else "",
                )
            )
    return findings


def _from_hub(project: Project, source: dict[str, Any], runner: str, found: str) -> Finding:
    """Whether the Hub gives a pinned source to whom fetches it: the user, or a container, which gets no token."""
    from prefbuild.sources import hub

    entry = project.lock["sources"].get(node_id(source))
    problem = fix = ""
    try:
        needs_token = entry is not None and hub.ask(source, entry, cache=runner == "local")
    except LockError as error:
        problem, _, fix = str(error).removeprefix(f"{title(source)}: ").partition("; ")
    else:
        if needs_token and runner != "local":
            problem = "only a token opens it, and a container gets none"
            fix = "fetch it where you are logged in, with `--runner local`"
    return Finding(
        what="download",
        state="missing" if problem else "ok",
        found=f"{found}; {problem}" if problem else found,
        needed="the Hub",
        fix=fix,
    )


def _index_problem(package: str, version: str) -> str:
    """What hinders pip from finding a version, or nothing."""
    argv = [sys.executable, "-m", "pip", "index", "versions", package, "--timeout", "10", "--retries", "0"]
    done = subprocess.run([*argv, "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
    versions = re.findall(r"[^\s,]+", done.stdout.partition("Available versions:")[2])
    return "" if version in versions else f"the index has no version {version}"


# ---- tracking


def tracking(project: Project, recipe: Recipe, runner: str) -> list[Finding]:
    """The packages of train.report_to, where it will train: in this Python, or in the pinned image."""
    report_to: list[str] = list(recipe.train.report_to)
    if not report_to:
        return []
    needed = ", ".join(report_to)
    if runner == "docker":
        from prefbuild import image
        from prefbuild.engine import connect, find_image

        role = recipe.compute.role
        try:
            labels = find_image(connect(), locked_image(project.lock, role), role).labels
        except (LockError, StageError):
            return []  # `containers` says what is wrong with it
        if image.has_trackers(labels):
            return [Finding(what="tracking", state="ok", found=f"image {role} has {needed}")]
        fix = f"prefbuild image build {role} --tracking (what ran in the old image runs again)"
        return [Finding(what="tracking", state="missing", found=f"image {role} has none", needed=needed, fix=fix)]
    if missing := not_installed(report_to):
        found = f"{', '.join(missing)} not installed"
        return [
            Finding(
                what="tracking", state="missing", found=found, needed="train.report_to", fix=how_to_install(missing)
            )
        ]
    return [Finding(what="tracking", state="ok", found=f"{needed} installed")]


# ---- promotion


def promotion(recipe: Recipe) -> list[Finding]:
    """Whether the user could write where the recipe promotes to, if that is on the Hub."""
    from prefbuild.promote.access import CouldNotAsk, write_access

    target = recipe.promote
    if target is None or target.to != "hub":
        return []
    needed = f"write access to {target.repo}"
    try:
        problem = write_access(target.repo, target.private)
    except CouldNotAsk as error:
        fix = "promote where the Hub can be reached"
        return [Finding(what="promotion", state="warning", found=f"not known: {error}", needed=needed, fix=fix)]
    if problem:
        found, _, fix = problem.partition("; ")
        return [Finding(what="promotion", state="missing", found=found, needed=needed, fix=fix)]
    return [Finding(what="promotion", state="ok", found=f"you can write to {target.repo}")]


# ---- disk


def disk(project: Project, name: str, shape: ModelShape) -> list[Finding]:
    """Free space against what the build leaves, and whether DVC can link instead of copy."""
    root = project.root.resolve()
    recipe = project.recipes[name]
    base = root_base(project, recipe)
    node = node_id(base.model_dump(mode="json"))
    findings = []
    cache, types = _cache(root)
    link = None
    if types:
        link = next((kind for kind in types if kind != "copy" and _link_works(kind, _workspace(root), cache)), None)
        findings.append(_links_finding(types, link))
    apart = root.stat().st_dev != cache.stat().st_dev
    lasting, passing = disk_need(
        weights=shape.num_parameters * BYTES[base.dtype],
        trained=4 * num_trained_parameters(recipe.train, shape),
        download=sum(file["size"] for file in locked_files(project, node)) * (1 if base.source == "file" else 2),
        fetched=recipe.base.source == "recipe" or (root / "build/models" / node / "manifest.json").exists(),
    )
    # Without links every result is in the project and in the cache.
    need = lasting + passing + (lasting if link is None and not apart else 0)
    findings.append(_space_finding("disk", root, need, f"about {_gigabytes(need)}; {shape.source}"))
    if apart:
        findings.append(_space_finding("cache disk", cache, lasting, f"about {_gigabytes(lasting)}"))
    return findings


def disk_need(*, weights: int, trained: int, download: int, fetched: bool) -> tuple[int, int]:
    """Bytes a build adds for good (base, merged model, what was trained), and for a while (download, two checkpoints).

    `weights` and `trained` are the sizes of the full model and of what is trained (the adapter, or all weights in
    float32); a checkpoint is three times the latter, for Adam's two moments. A second build takes as much as the first:
    DVC's cache keeps the old model.
    """
    lasting = (0 if fetched else weights) + weights + trained
    return lasting, max(0 if fetched else download, 2 * 3 * trained)


def temporary(need: int = 1_000_000_000) -> Finding:
    """Free space where pip unpacks and libraries keep what they need for a moment."""
    return _space_finding("temporary files", Path(tempfile.gettempdir()), need, _gigabytes(need))


def _space_finding(what: str, folder: Path, need: int, needed: str) -> Finding:
    free = shutil.disk_usage(folder).free
    state = "missing" if free < need else "warning" if free < 1.2 * need else "ok"
    fix = (
        "" if state == "ok" else f"free {_gigabytes(need * 1.2 - free)} in {folder} (`dvc gc -w -T` drops old results)"
    )
    if what == "temporary files" and fix:
        fix = f"free space in {folder}, or set TMPDIR to a folder with more"
    return Finding(what=what, state=state, found=f"{_gigabytes(free)} free", needed=needed, fix=fix)


def _cache(root: Path) -> tuple[Path, list[str]]:
    """DVC's cache folder (made if need be) and the link types it is told to try; none of these without a repository."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            folder = Path(repo.cache.local.path)
            types = repo.config["cache"].get("type") or ["reflink", "copy"]
    except NotDvcRepoError:
        return root, []
    folder.mkdir(parents=True, exist_ok=True)
    return folder, list(types)


def _workspace(root: Path) -> Path:
    return root / "build" if (root / "build").is_dir() else root


def _link_works(kind: str, folder: Path, cache: Path) -> bool:
    """Whether a file of the cache can be linked into a folder, by doing it."""
    from dvc_objects.fs import system

    make: Any = {"reflink": system.reflink, "hardlink": system.hardlink, "symlink": system.symlink}[kind]
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix=".doctor-") as there,
        tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as here,
    ):
        original, link = Path(there, "original"), Path(here, "link")
        original.write_bytes(b"x" * 4096)
        try:
            make(str(original), str(link))
        except (OSError, NotImplementedError):
            return False
        return link.read_bytes() == original.read_bytes()


def _links_finding(types: list[str], link: str | None) -> Finding:
    if link is not None:
        return Finding(what="cache links", state="ok", found=f"{link} works")
    fix = "keep project and cache on one filesystem (`dvc cache dir`)"
    if "hardlink" not in types:
        fix = "dvc config cache.type hardlink,reflink,copy"
    return Finding(
        what="cache links",
        state="warning",
        found=f"of {', '.join(types)} only copies work, so every result is on disk twice",
        fix=fix,
    )


# ---- processor and memory


def find_gpus() -> list[Gpu]:
    """The GPUs torch can use. It is asked in a process of its own, and only where a driver's tool is on PATH."""
    if not any(map(shutil.which, GPU_TOOLS)):
        return []
    text = _output([sys.executable, "-c", LIST_GPUS])
    return [Gpu(name=name, free=free, total=total) for name, free, total in json.loads(text or "[]")]


def computes_in_bf16(recipe: Recipe, gpus: list[Gpu]) -> bool:
    """Whether training takes bf16 here, as prefbuild.training.common.use_bf16 decides it."""
    if recipe.train.precision != "auto":
        return recipe.train.precision == "bf16"
    return bool(gpus) or bool(cpu_bf16())


def processor(recipe: Recipe, gpus: list[Gpu], shape: ModelShape, *, idle: int = 0) -> list[Finding]:
    """GPU or CPU, its bf16, and an optimizer that runs there. `gpus` are those the recipe uses, `idle` the others."""
    findings = []
    tools = [tool for tool in GPU_TOOLS if shutil.which(tool)]
    if gpus:
        found, wanted = f"{len(gpus)} x {gpus[0].name}", recipe.compute.gpus
        few = len(gpus) < wanted
        fix = f"run it on a machine with {wanted} GPUs, or set compute.gpus: {len(gpus)}" if few else ""
        needed = f"{wanted} GPUs" if few else ""
        state = "missing" if few else "ok"
        findings.append(Finding(what="processor", state=state, found=found, needed=needed, fix=fix))
    elif recipe.compute.gpus and not tools:
        fix = "run it on a machine with a GPU and its driver, or set compute.gpus: 0"
        needed = f"{recipe.compute.gpus} GPU{'s' * (recipe.compute.gpus > 1)}"
        findings.append(Finding(what="processor", state="missing", found="no GPU", needed=needed, fix=fix))
    elif recipe.compute.gpus:
        found = f"{tools[0]} is here, but torch sees no GPU"
        fix = "install a torch that suits the driver (pytorch.org, Get started); see also CUDA_VISIBLE_DEVICES"
        findings.append(Finding(what="processor", state="warning", found=found, fix=fix))
    else:
        findings.append(_cpu_finding(recipe, shape))
        if idle:
            found = f"{idle} GPU here, and the recipe uses none: compute.gpus is 0"
            findings.append(Finding(what="GPU", state="ok", found=found))
    if recipe.train.optim in BNB_OPTIMIZERS and not gpus:
        small = "; a LoRA adapter's optimizer state is small anyway" if recipe.train.use_peft else ""
        fix = f"set compute.gpus: 1, or train.optim: adamw_torch{small}"
        findings.append(
            Finding(
                what="optimizer", state="missing", found=f"{recipe.train.optim} without a GPU", needed="a GPU", fix=fix
            )
        )
    if recipe.compute.strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        findings.append(Finding(what="DeepSpeed", state="missing", found="not installed", fix=INSTALL_DEEPSPEED))
    if recipe.train.quantization and not gpus:
        found = f"{recipe.train.quantization} without a GPU"
        needed = "a GPU; a CPU unpacks every layer again for every batch, which is slow"
        fix = "leave train.quantization out, if the machine's memory is large enough for the base as it is"
        findings.append(Finding(what="quantization", state="warning", found=found, needed=needed, fix=fix))
    return findings


def _cpu_finding(recipe: Recipe, shape: ModelShape) -> Finding:
    bf16 = cpu_bf16()
    kind = f"CPU, {os.cpu_count()} cores, {'bf16 by ' + min(bf16) if bf16 else 'no bf16 instructions'}; no GPU"
    if recipe.train.precision == "bf16" and not bf16:
        fix = "set train.precision: auto, which takes float32 here"
        return Finding(
            what="processor", state="warning", found=kind, needed="bf16, which is emulated and slow", fix=fix
        )
    if shape.num_parameters > 1_500_000_000:
        fix = "use a machine with a GPU; on a CPU a model of this size takes minutes a step"
        return Finding(
            what="processor",
            state="warning",
            found=kind,
            needed=f"a GPU for {shape.num_parameters / 1e9:.1f} billion weights",
            fix=fix,
        )
    return Finding(what="processor", state="ok", found=kind)


def memory(recipe: Recipe, gpus: list[Gpu], shape: ModelShape) -> Finding:
    """Free memory (the largest GPU's, of several the smallest's, else the machine's) against the estimate for training."""
    bf16 = computes_in_bf16(recipe, gpus)
    longest = longest_row(recipe)
    num = max(1, recipe.compute.gpus)
    batch, _ = split_batch(recipe.train, num)
    train = recipe.train.model_copy(update={"per_device_train_batch_size": batch})
    need = memory_need(train, shape, max_length=longest, bytes_per_number=2 if bf16 else 4)
    # Of several each must do: the smallest counts. Where one will do, it is the largest.
    choose = min if num > 1 else max
    total, free = (choose(g.total for g in gpus), choose(g.free for g in gpus)) if gpus else machine_memory()
    where = "GPU memory" if gpus else "memory"
    weights = weight_bytes(recipe.train, shape, 2 if bf16 else 4)
    if recipe.compute.strategy in ("fsdp", "zero3"):  # each GPU has its part of them
        need, weights = need - weights + weights // num, weights // num
    state = "missing" if weights > total else "warning" if need > free else "ok"
    fix = "" if state == "ok" else (
        "lower train.per_device_train_batch_size and raise gradient_accumulation_steps as much,\n"
        f"lower {'train.max_completion_length' if recipe.shape == 'prompts' else 'data.max_length'}, "
        "or set train.gradient_checkpointing: true"
    )  # fmt: skip
    if state == "missing":
        fix = "take a smaller base, or a machine with more memory: the weights alone do not fit"
        fix += "" if recipe.train.use_peft else ";\nor leave train.use_peft out: an adapter takes a fraction of it"
    needed = f"up to {_gigabytes(need)} when every row is {longest} tokens, roughly; {shape.source}"
    return Finding(
        what=where, state=state, found=f"{_gigabytes(free)} free of {_gigabytes(total)}", needed=needed, fix=fix
    )


def longest_row(recipe: Recipe) -> int:
    """Tokens of the longest prompt and answer together."""
    if isinstance(recipe.train, PromptOptions):
        return recipe.data.max_prompt_length + recipe.train.max_completion_length
    return recipe.data.max_length


def memory_need(train: Train, shape: ModelShape, *, max_length: int, bytes_per_number: int) -> int:
    """Bytes that training takes at most, roughly: the sum of

    weights       of the base under an adapter: parameters x bytes, less when quantised
    reference     as many again, but where it is the base without its adapter (float32 where all weights are trained)
    trained       an adapter's parameters x 16: float32 weights, gradients and Adam's two moments. All weights: x 8 for
                  weights and gradients, the optimizer's states (STATE_BYTES), and x 2 for autocast's copies in bf16
    activations   tokens x layers x (16 hidden + 7 intermediate) x bytes, tokens = batch x max_length, and of pairs
                  twice that; with checkpointing tokens x layers x hidden x bytes, and one layer in full. Eager
                  attention is not counted, nor what generation keeps while it samples (GRPO, RLOO).
                  The numbers are SmolLM2-135M's, measured with DPO; PEFT keeps inputs in float32 beside bf16.
    logits        tokens x vocabulary x (bytes + 8): the logits, and log-probabilities and gradient in float32. A reward
                  model has none, and those that score completions are not counted.
    libraries     1 GB
    """
    sequences = 2 if SHAPES[train.method] == "pairs" else 1
    tokens = sequences * train.per_device_train_batch_size * max_length
    layer = tokens * (16 * shape.hidden + 7 * shape.intermediate) * bytes_per_number
    if train.gradient_checkpointing:
        activations = tokens * shape.layers * shape.hidden * bytes_per_number + layer
    else:
        activations = shape.layers * layer
    if train.use_peft:
        trained = 16 * num_trained_parameters(train, shape) + weight_bytes(train, shape, bytes_per_number)
    else:
        trained = shape.num_parameters * (8 + STATE_BYTES[train.optim] + (2 if bytes_per_number == 2 else 0))
    return (
        trained
        + (weight_bytes(train, shape, bytes_per_number) if has_second_model(train) else 0)
        + activations
        + (0 if train.method == "reward" else tokens * shape.vocabulary * (bytes_per_number + 8))
        + LIBRARIES
    )


def weight_bytes(train: TrainOptions, shape: ModelShape, bytes_per_number: int) -> int:
    """Bytes of the base as it is loaded: float32 where all weights are trained.

    NF4 is 4 bits a weight and a float32 scale for each 64, of all but embeddings and lm_head.
    """
    if not train.use_peft:
        return shape.num_parameters * 4
    if train.quantization is None:
        return shape.num_parameters * bytes_per_number
    embeddings = min(2 * shape.vocabulary * shape.hidden, shape.num_parameters)
    return embeddings * bytes_per_number + int((shape.num_parameters - embeddings) * (4 + 32 / 64) / 8)


def has_second_model(train: Train) -> bool:
    """Whether training holds a reference beside the model: another recipe's, or the base where there is no adapter."""
    if reference_recipe(train) is not None:
        return True
    asks = train.method in ("dpo", "kto") or (train.method in ("grpo", "rloo") and train.beta > 0)
    return asks and not train.use_peft


def num_trained_parameters(train: TrainOptions, shape: ModelShape) -> int:
    """All weights, or those of a LoRA adapter on all linear layers (at most; named target_modules are fewer)."""
    if not train.use_peft:
        return shape.num_parameters
    return train.lora.r * shape.layers * (8 * shape.hidden + 3 * (shape.hidden + shape.intermediate))


def machine_memory() -> tuple[int, int]:
    """Bytes of memory, and of those free to take; no more than this process' container has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else total
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return total, free
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit) - used)
    return total, free


# ---- containers


def containers(project: Project, recipe: Recipe, runner: str) -> list[Finding]:
    """The engine, the pinned image and the engine's GPUs, where the runner is docker; a note where it is not."""
    if runner != "docker":
        found = "not used: stages run on this machine; `--runner docker` runs them in an image"
        return [Finding(what="containers", state="ok", found=found)]
    from prefbuild import image
    from prefbuild.engine import address, connect, find_image

    role, gpus = recipe.compute.role, recipe.compute.gpus
    try:
        client = connect()
    except StageError as error:
        why, _, fix = str(error).partition("; ")
        return [Finding(what="engine", state="missing", found=why, fix=fix)]
    version = client.version()
    findings = [Finding(what="engine", state="ok", found=f"{version['Version']} at {address()}")]
    make = f"prefbuild image build {role}"
    try:
        entry = locked_image(project.lock, role)
        pinned = find_image(client, entry, role)
        current = image.is_current(pinned)
        findings.append(
            Finding(
                what="image",
                state="ok" if current else "warning",
                found=f"{role}, {entry['id'][:19]}" + ("" if current else ", with other code than this machine"),
                fix="" if current else f"{make} (what ran in the old image runs again)",
            )
        )
    except (LockError, StageError) as error:
        findings.append(Finding(what="image", state="missing", found=str(error), fix=make))
    if gpus:
        from prefbuild.runners.gpus import device_nodes

        toolkit = "nvidia" in (client.info().get("Runtimes") or {})
        nodes = bool(device_nodes(gpus, []))
        how = (
            "the engine's NVIDIA runtime"
            if toolkit
            else "device nodes and this machine's driver"
            if nodes
            else "none seen"
        )
        fix = (
            ""
            if toolkit or nodes
            else "install the NVIDIA Container Toolkit and restart the engine, or set compute.gpus: 0"
        )
        findings.append(Finding(what="engine's GPUs", state="warning" if fix else "ok", found=how, fix=fix))
    return findings


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _output(argv: list[str]) -> str:
    """What a command prints; empty when it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
