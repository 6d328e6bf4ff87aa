"""Models and data on the Hub: the real client in processes of its own, against the test hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub import OTHER, READ, WRITE, Hub
from project import RECIPE, ROOT, TASK, run, write_rows

from prefbuild import yamlfile
from prefbuild.artifact import sha256_file
from prefbuild.lock import LOCK

ROWS = b'{"question": "1 + 1", "chosen": "2", "rejected": "3", "kind": "sum"}\n' * 30


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose one recipe takes base and data from the Hub; nothing is locked."""
    folder = tmp_path / "project"
    (folder / "recipes/rows").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "recipes/rows/sums.yaml").write_text(TASK)
    write_rows(folder / "recipes/rows/held_out.jsonl", 4)
    recipe(folder)
    return folder


def recipe(folder: Path, base: str = "", data: str = "") -> None:
    text = RECIPE.replace("source: file\n  path: models/tiny\n", f"source: hub\n  repo: me/tiny\n{base}")
    rows = "source: file\n      path: recipes/rows/train.jsonl\n"
    (folder / "recipes/first.yaml").write_text(text.replace(rows, f"source: hub\n      repo: me/rows\n{data}"))


def put_checkpoint(hub: Hub, **files: bytes) -> str:
    """A repository with the names of a checkpoint, and others beside them."""
    weights = {"model.safetensors": b"weights" * 1000, "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x"}
    texts = {"config.json": b"{}", "tokenizer.json": b"{ }", "README.md": b"# me", "chat_template.jinja": b"{{ x }}"}
    return hub.put("me/tiny", {**weights, **texts, **files})


def prefbuild(hub: Hub, project: Path, *arguments: str, token: str | None = WRITE, code: int = 0, **env: str) -> str:
    return run(project, "prefbuild", *arguments, code=code, **{**hub.env(token), **env})


def entries(project: Path) -> dict[str, Any]:
    """The lock's entries of the sources, by title."""
    return {entry["title"]: entry for entry in yamlfile.load(project / LOCK).data["sources"].values()}


def fetch(hub: Hub, project: Path, stage: str, code: int = 0, **env: str) -> str:
    """Resolve, and run the stage that fetches."""
    for command in ("sync", "resolve"):
        prefbuild(hub, project, command, HF_HUB_OFFLINE="1")
    (section,) = (project / f"build/.resolved/{'models' if stage == 'model' else 'data'}").iterdir()
    return prefbuild(hub, project, "stage", stage, section.stem, code=code, **env)


def fetched(project: Path) -> dict[str, bytes]:
    (folder,) = (project / "build/data").iterdir()
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "manifest.json"}


def test_lock_pins_the_commit_and_every_needed_file(hub: Hub, project: Path) -> None:
    base = put_checkpoint(hub)
    data = hub.put("me/rows", {"train.jsonl": ROWS, "README.md": b"#"}, kind="dataset")
    said = prefbuild(hub, project, "lock", token=READ)
    assert f"pinned me/tiny@main at {base[:8]} (5 files, 7016 bytes)\n" in said
    assert f"pinned me/rows@main at {data[:8]} (1 file, {len(ROWS)} bytes)\n" in said
    found = entries(project)
    assert found["me/tiny@main"]["commit"] == base
    digests = {file["path"]: file["sha256"] for file in found["me/tiny@main"]["files"]}
    tree = hub.tree("me/tiny")
    wanted = ("README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json")
    assert digests == {path: tree[path] for path in wanted}
    assert [file["path"] for file in found["me/rows@main"]["files"]] == ["train.jsonl"]
    assert found["me/rows@main"]["reference"] == {"source": "hub", "repo": "me/rows", "revision": "main"}
    assert not hub.requests("GET", "/storage/")  # large files are pinned by the digest that the Hub lists
    assert "nothing changed" in prefbuild(hub, project, "lock", HF_HUB_OFFLINE="1")
    said = run(project, "prefbuild", "doctor", "first", code=None, **hub.env())
    assert "me/tiny@main: not fetched yet" in said and "the Hub" in said and "Traceback" not in said
    kept = [path for path in project.rglob("*") if path.is_file() and READ.encode() in path.read_bytes()]
    assert not kept


def test_a_real_checkpoint_and_rows_become_artifacts(hub: Hub, project: Path, tiny_model: Path) -> None:
    hub.put("me/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.put(
        "me/rows", {"data/train-00000-of-00002.jsonl": ROWS, "data/train-00001-of-00002.jsonl": b""}, kind="dataset"
    )
    prefbuild(hub, project, "lock")
    said = fetch(hub, project, "model", HF_HUB_DISABLE_XET="0")
    (model,) = (project / "build/models").iterdir()
    assert sha256_file(model / "model.safetensors") == hub.tree("me/tiny")["model.safetensors"]
    assert (model / "manifest.json").exists() and WRITE not in said
    fetch(hub, project, "data")
    assert fetched(project) == {"data/train-00000-of-00002.jsonl": ROWS, "data/train-00001-of-00002.jsonl": b""}
    sections = json.loads((project / "build/.resolved/first.json").read_text())
    assert sections["train"]["settings"]["base"]["name"] == "me/tiny"


def test_a_moved_tag_changes_nothing_until_the_lock_is_updated(hub: Hub, project: Path) -> None:
    recipe(project, data="      revision: v1\n")
    put_checkpoint(hub)
    old = hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    hub.tag("me/rows", "v1", old, kind="dataset")
    prefbuild(hub, project, "lock")
    new = hub.put("me/rows", {"train.jsonl": b"{}\n"}, kind="dataset")
    hub.tag("me/rows", "v1", new, kind="dataset")
    before = (project / LOCK).read_bytes()
    assert "nothing changed" in prefbuild(hub, project, "lock")
    assert (project / LOCK).read_bytes() == before
    fetch(hub, project, "data")
    assert fetched(project) == {"train.jsonl": ROWS}
    said = prefbuild(hub, project, "lock", "--update", "first")
    assert said.splitlines()[0] == f"moved me/rows@v1: {old[:8]} -> {new[:8]}"
    assert said.splitlines()[1].startswith("changed me/rows@v1/train.jsonl: sha256 ") and len(said.splitlines()) == 2
    fetch(hub, project, "data")
    assert fetched(project) == {"train.jsonl": b"{}\n"}


def test_a_warm_cache_needs_no_network(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.parquet": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    fetch(hub, project, "data")
    asked = len(hub.log)
    shutil.rmtree(project / "build")
    fetch(hub, project, "data")
    assert len(hub.log) == asked and fetched(project) == {"train.parquet": ROWS}
    shutil.rmtree(project / "build")
    fetch(hub, project, "data", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert fetched(project) == {"train.parquet": ROWS}


def test_a_flipped_bit_is_caught_and_the_file_fetched_again(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.parquet": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    once = hub.fault("flip", "GET", "/storage/")
    said = fetch(hub, project, "data")
    assert once.seen == 2 and fetched(project) == {"train.parquet": ROWS}
    assert "me/rows@main/train.parquet: sha256 is " in said and "; fetching it once more" in said
    shutil.rmtree(project / "build")
    shutil.rmtree(hub.folder / "home")
    hub.fault("flip", "GET", "/storage/", times=2)
    said = fetch(hub, project, "data", code=4)
    assert "gives other bytes than those of commit" in said.splitlines()[-1]
    (left,) = (project / "build/data").iterdir()
    assert not list(left.iterdir())
    fetch(hub, project, "data")  # nothing damaged stayed in the cache
    assert fetched(project) == {"train.parquet": ROWS}


def test_a_flipped_bit_in_a_small_file_is_caught_when_it_is_pinned(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    hub.fault("flip", "GET", "/resolve/.*/config.json")
    hub.fault("flip", "GET", "/resolve/.*/train.jsonl", times=2)
    said = prefbuild(hub, project, "lock", code=4)
    assert said.startswith("prefbuild: me/rows@main/train.jsonl: its digest is ") and said.endswith("; try again\n")
    assert not (project / LOCK).exists()
    prefbuild(hub, project, "lock")
    assert entries(project)["me/rows@main"]["files"][0]["sha256"] == hub.tree("me/rows", kind="dataset")["train.jsonl"]


def test_a_truncated_download_is_taken_up_where_it_ended(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    rows = ROWS * (30 * 2**20 // len(ROWS))
    hub.put("me/rows", {"train.parquet": rows}, kind="dataset")
    prefbuild(hub, project, "lock")
    hub.fault("truncate", "GET", "/storage/")
    fetch(hub, project, "data")
    assert fetched(project) == {"train.parquet": rows}
    assert [request.range for request in hub.requests("GET", "/storage/")] == [None, f"bytes={10 * 2**20}-"]


def test_xet_is_verified_as_well_and_its_failure_told(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {}, kind="dataset")
    rows = os.urandom(300_000)
    (project / "rows.parquet").write_bytes(rows)
    file = "path_or_fileobj='rows.parquet', path_in_repo='rows.parquet', repo_id='me/rows', repo_type='dataset'"
    upload = f"import huggingface_hub; huggingface_hub.HfApi().upload_file({file})"
    run(project, "python", "-c", upload, **{**hub.env(WRITE), "HF_HUB_DISABLE_XET": "0"})
    prefbuild(hub, project, "lock")
    fetch(hub, project, "data", HF_HUB_DISABLE_XET="0")
    assert fetched(project) == {"rows.parquet": rows}
    assert hub.requests("GET", "/xet-read-token/") and not hub.requests("GET", "/storage/")
    shutil.rmtree(project / "build")
    shutil.rmtree(hub.folder / "home")
    (xorb,) = (path for path in (hub.folder / "xet").rglob("xorbs/xorbs/*") if path.stat().st_size > 1000)
    content = xorb.read_bytes()
    xorb.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    assert "gives other bytes than those of commit" in fetch(hub, project, "data", code=4, HF_HUB_DISABLE_XET="0")
    hub.fault("status", "GET", "/xet-read-token/", status=403)
    said = fetch(hub, project, "data", code=4, HF_HUB_DISABLE_XET="0")
    assert "me/rows@main: your token is not allowed to read it; use one with read access" in said


def test_what_hinders_is_told_apart(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.parquet": ROWS}, kind="dataset")

    def said(token: str | None = None, **env: str) -> str:
        text = prefbuild(hub, project, "lock", token=token, code=4, HF_HOME=str(project / "home"), **env)
        assert not token or token not in text
        return text.removeprefix("prefbuild: ").rstrip("\n")

    repo = hub.repos["models/me/tiny"]
    repo["gated"] = True
    page = f"{hub.url}/me/tiny"
    assert said() == f"me/tiny@main: is gated; ask for access at {page}, and log in with `hf auth login`"
    assert said(OTHER) == f"me/tiny@main: is gated, and your account has no access; ask for it at {page}"
    repo["gated"], repo["private"] = False, True
    assert said() == (
        "me/tiny@main: there is no such model, or it is private; correct `repo`, or log in with `hf auth login`"
    )
    assert said(OTHER) == (
        "me/tiny@main: there is no such model, or it is private and your token can't see it; correct `repo`, or use the "
        "token of an account that has access"
    )
    repo["private"] = False
    assert said("hf_" + "x" * 34) == (
        "me/tiny@main: the Hub does not accept your token: it is mistyped, expired or revoked; unset HF_TOKEN if it is "
        "set, and log in again with `hf auth login`"
    )
    hub.fault("status", "GET", "/api/models/me/tiny", status=503, times=99)
    assert said(HF_HUB_DOWNLOAD_TIMEOUT="1") == (
        "me/tiny@main: the Hub answered 503 for /api/models/me/tiny/revision/main; try again later"
    )
    hub.faults.clear()
    assert said(HF_HUB_OFFLINE="1") == (
        f"me/tiny@main: HF_HUB_OFFLINE is set, and the cache ({project}/home/hub) has it not; unset it for once"
    )
    assert said(HF_ENDPOINT="http://127.0.0.1:9").startswith(
        "me/tiny@main: the Hub can't be reached at http://127.0.0.1:9 ("
    )
    recipe(project, base="  revision: v9\n")
    hub.tag("me/tiny", "v1", hub.history("me/tiny")[0])
    assert said() == (
        "me/tiny@v9: has no branch, tag or commit of that name; it has main, v1; correct `revision`"
    )  # fmt: skip
    recipe(project)
    hub.repos["datasets/me/tiny"] = hub.repos.pop("models/me/tiny")
    assert said() == "me/tiny@main: is no model but a data set; correct `repo`"


def test_fetching_says_what_hinders_too(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.parquet": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    hub.repos["datasets/me/rows"]["gated"] = True
    said = fetch(hub, project, "data", code=4, HF_TOKEN=OTHER).splitlines()[-1]
    assert said.endswith(f"me/rows@main: is gated, and your account has no access; ask for it at {hub.url}/datasets/me/rows")  # fmt: skip
    said = fetch(hub, project, "data", code=4, HF_HUB_OFFLINE="1").splitlines()[-1]
    assert "HF_HUB_OFFLINE is set" in said
    repo = hub.repos["datasets/me/rows"]
    repo["gated"], pinned = False, repo["branches"]["main"]
    hub.put("me/rows", {"train.parquet": b"other"}, kind="dataset")
    del repo["commits"][pinned]
    said = fetch(hub, project, "data", code=4).splitlines()[-1]
    assert said.endswith(f"me/rows@main: has the pinned commit {pinned[:8]} no more; `prefbuild lock --update` pins what is there now")  # fmt: skip
    del hub.repos["datasets/me/rows"]
    assert "there is no such data set, or it is private" in fetch(hub, project, "data", code=4)


@pytest.mark.parametrize(
    ("files", "asked", "said"),
    [
        ({"weights.pt": b"x"}, "", "its weights are a pickle (weights.pt), which can run code when loaded; choose a repository or revision with safetensors"),
        ({"pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin"}}'}, "", "pytorch_model.bin.index.json names pytorch_model-1.bin, which is not there; choose another revision"),
        ({"a.Q4_0.gguf": b"x"}, "", "holds GGUF files; name the one to use, as in files: [a.Q4_0.gguf]"),
        ({"adapter.txt": b"x"}, "", "has no model.safetensors; is it a model with an adapter's weights only?"),
        ({"model.safetensors": b"x", "config.json": None}, "", "has no config.json, so it is no checkpoint; choose another repository"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'}, "", "model.safetensors.index.json names model-1.safetensors, which is not there; choose another revision"),
        ({}, "[config.json, weights/*]", "no file is called weights/*; there are config.json"),
        ({"modeling.py": b"x"}, "['*.py']", None),
    ],
)  # fmt: skip
def test_models_that_cant_be_used(hub: Hub, project: Path, files: dict[str, Any], asked: str, said: str | None) -> None:
    recipe(project, base=f"  files: {asked}\n" if asked else "")
    given = {path: content for path, content in ({"config.json": b"{}"} | files).items() if content is not None}
    hub.put("me/tiny", given)
    text = prefbuild(hub, project, "lock", code=4).removeprefix("prefbuild: ").rstrip("\n")
    if said is not None:
        assert text == f"me/tiny@main: {said}"
    else:
        assert text == "me/tiny@main/modeling.py: is code; leave it out of `files`"


def test_a_pickle_is_read_only_if_it_is_allowed_by_its_digest(hub: Hub, project: Path, tiny_model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(tiny_model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied, as pickles have it
    torch.save(tensors, project / "weights.bin")
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix != ".safetensors"}
    hub.put(
        "me/tiny", {**files, "pytorch_model.bin": (project / "weights.bin").read_bytes(), "training_args.bin": b"x"}
    )
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    digest = f"sha256:{sha256_file(project / 'weights.bin')}"

    said = prefbuild(hub, project, "lock", code=4)
    allow = f'allow_pickle: {{pytorch_model.bin: "{digest}"}}'
    assert said == (
        "prefbuild: me/tiny@main/pytorch_model.bin: is a pickle, which can run code when loaded; choose a repository "
        f"or revision with safetensors, or allow that its tensors are read: {allow}\n"
    )
    recipe(project, base=f'  allow_pickle: {{pytorch_model.bin: "sha256:{"0" * 64}"}}\n')
    said = prefbuild(hub, project, "lock", code=4)
    assert said == (
        f"prefbuild: me/tiny@main/pytorch_model.bin: is a pickle with the digest {digest}, and `allow_pickle` says "
        f"sha256:{'0' * 64}; find out why it is another before you correct the recipe\n"
    )
    assert not (project / LOCK).exists()
    recipe(project, base=f"  {allow}\n")  # as the first message has it
    prefbuild(hub, project, "lock")
    assert entries(project)["me/tiny@main"]["reference"]["allow_pickle"] == {"pytorch_model.bin": digest}
    fetch(hub, project, "model")
    (model,) = (project / "build/models").iterdir()
    assert sorted(path.name for path in model.iterdir() if path.suffix in (".bin", ".safetensors")) == [
        "model.safetensors"
    ]
    made = load_file(model / "model.safetensors")
    assert made.keys() == tensors.keys() and all(torch.equal(made[key], tensors[key]) for key in made)
    hub.put("me/tiny", {"model.safetensors": (tiny_model / "model.safetensors").read_bytes()})
    said = prefbuild(hub, project, "lock", "--update", code=4)
    assert said == "prefbuild: me/tiny@main/pytorch_model.bin: is in `allow_pickle` and is not read; take it out\n"


def test_an_allowed_pickle_that_runs_code_is_refused_and_not_run(hub: Hub, project: Path, tiny_model: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix != ".safetensors"}
    make = (
        "import os, torch\n"
        "class Evil:\n    def __reduce__(self): return os.system, ('touch ran',)\n"
        "torch.save({'a': torch.zeros(2), 'b': Evil()}, 'weights.bin')"
    )
    run(project, "python", "-c", make)
    assert run(project, "python", "-c", "import torch; torch.load('weights.bin', weights_only=False)") == ""
    (project / "ran").unlink()  # it does run where it is let
    hub.put("me/tiny", {**files, "pytorch_model.bin": (project / "weights.bin").read_bytes()})
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    digest = f"sha256:{sha256_file(project / 'weights.bin')}"
    recipe(project, base=f'  allow_pickle: {{pytorch_model.bin: "{digest}"}}\n')
    prefbuild(hub, project, "lock")
    said = fetch(hub, project, "model", code=7, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1").splitlines()[-1]
    assert said.endswith(
        ": me/tiny@main/pytorch_model.bin: asks for posix.system, which is no tensor, so nothing of it was run; don't "
        "load it elsewhere, and choose a repository with safetensors"
    )
    assert not list(project.rglob("ran"))
    assert not list((project / "build/models").rglob("*.bin")) and not list(project.rglob("build/**/*.safetensors"))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{pytorch_model.bin: abc}", "base.allow_pickle.'pytorch_model.bin': 'abc' is no digest; write sha256: and 64 hex digits, as `prefbuild lock` shows it"),
        ("{../x.bin: abc}", "base.allow_pickle.'../x.bin': '../x.bin' climbs with '..'; give a path inside the project, or an absolute one"),
        ("true", "base.allow_pickle: is true; a section is wanted"),
    ],
)  # fmt: skip
def test_an_allowance_without_digest_is_refused(project: Path, written: str, said: str) -> None:
    recipe(project, base=f"  allow_pickle: {written}\n")
    assert said in run(project, "prefbuild", "check", code=3)


def test_other_names_of_a_configuration_are_known(project: Path) -> None:
    recipe(project, data="      subset: en\n")
    said = run(project, "prefbuild", "check", code=3)
    assert "data.sources[0].subset: unknown key; did you mean config?" in said


def test_sharded_pickles_become_sharded_safetensors(hub: Hub, project: Path, tiny_model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(tiny_model / "model.safetensors")
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix != ".safetensors"}
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    files["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    for shard, keys in shards.items():
        torch.save({key: tensors[key] for key in keys}, project / shard)
        files[shard] = (project / shard).read_bytes()
    hub.put("me/tiny", files)
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    allow = prefbuild(hub, project, "lock", code=4).partition("allow_pickle: ")[2]
    assert allow.count("sha256:") == 2
    recipe(project, base=f"  allow_pickle: {allow}")
    prefbuild(hub, project, "lock")
    fetch(hub, project, "model")
    (model,) = (project / "build/models").iterdir()
    made = sorted(path.name for path in model.glob("model*"))
    assert made == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["model.safetensors.index.json"]
    assert not list(model.glob("pytorch_model*"))
    loaded = {key: tensor for path in model.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in loaded)


def test_a_sharded_checkpoint_and_a_single_gguf(hub: Hub, project: Path) -> None:
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    shards = {f"model-0000{n}-of-00002.safetensors": b"%d" % n for n in (1, 2)}
    index = {"weight_map": {f"t{n}": name for n, name in enumerate(shards)}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    hub.put("me/tiny", {**files, "consolidated.safetensors": b"again", "a.Q4_0.gguf": b"gguf"})
    prefbuild(hub, project, "lock")
    assert [file["path"] for file in entries(project)["me/tiny@main"]["files"]] == sorted(files)
    recipe(project, base="  files: ['*.gguf']\n")
    prefbuild(hub, project, "lock")
    assert [file["path"] for file in entries(project)["me/tiny@main"]["files"]] == ["a.Q4_0.gguf"]


@pytest.mark.parametrize(
    ("files", "asked", "found"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "README.md"], "", "0 1"),
        (["data/train-0.parquet", "data/test-0.parquet"], "", "has several sets of rows (data/test-0.parquet, data/train-0.parquet); say which, with config and split (there are default (train, test)), or as in files: [data/test-0.parquet]"),
        (["a.jsonl", "b.jsonl"], "", "has several sets of rows (a.jsonl, b.jsonl); say which, as in files: [a.jsonl]"),
        (["data/train-0.parquet", "data/test-0.parquet"], "[data/train-*]", "0"),
        (["en/train.jsonl", "de/train.jsonl", "dataset_infos.json"], "[en/train.jsonl]", "0"),
        (["rows.py", "dataset_infos.json"], "", "its rows are made by a script (rows.py), which is not run; the Hub's own copy in Parquet may be there: revision: refs/convert/parquet"),
        (["README.md"], "", "holds no file of rows; those end in .jsonl, .json, .parquet, .csv"),
        (["rows.txt"], "[rows.txt]", None),
    ],
)  # fmt: skip
def test_which_rows_are_taken(hub: Hub, project: Path, files: list[str], asked: str, found: str | None) -> None:
    recipe(project, data=f"      files: {asked}\n" if asked else "")
    put_checkpoint(hub)
    hub.put("me/rows", dict.fromkeys(files, ROWS), kind="dataset")
    refused = found is None or " " in found.replace("0 1", "01")
    text = prefbuild(hub, project, "lock", code=4 if refused else 0).removeprefix("prefbuild: ").rstrip("\n")
    if not refused:
        paths = [file["path"] for file in entries(project)["me/rows@main"]["files"]]
        assert paths == [files[int(index)] for index in str(found).split()]
    elif found is None:
        assert text == "me/rows@main/rows.txt: is no file of rows; those end in .jsonl, .json, .parquet, .csv"
    else:
        assert text == f"me/rows@main: {found}"


CARD = """---
configs:
  - config_name: en
    default: true
    data_files:
      - {split: train, path: rows/en/*.jsonl}
      - {split: held, path: [rows/en-held.jsonl]}
  - config_name: de
    data_files: rows/de.jsonl
---
# Rows
"""


def test_a_configuration_and_a_split_become_files_when_they_are_pinned(hub: Hub, project: Path) -> None:
    paths = ["rows/en/0.jsonl", "rows/en/1.jsonl", "rows/en-held.jsonl", "rows/de.jsonl", "loading.py"]
    put_checkpoint(hub)
    hub.put("me/rows", {"README.md": CARD.encode(), **dict.fromkeys(paths, ROWS)}, kind="dataset")

    def pinned(asked: str) -> list[str]:
        recipe(project, data=asked)
        prefbuild(hub, project, "lock")
        entry = entries(project)["me/rows@main"]
        assert {key: entry["reference"].get(key) for key in ("config", "split")} == {
            key: next((word for word in asked.split() if f"{key}: {word}" in asked), None)
            for key in ("config", "split")
        }
        return [file["path"] for file in entry["files"]]

    assert pinned("      split: train\n") == ["rows/en/0.jsonl", "rows/en/1.jsonl"]
    assert pinned("      config: en\n      split: held\n") == ["rows/en-held.jsonl"]
    assert pinned("      config: de\n") == ["rows/de.jsonl"]
    fetch(hub, project, "data")
    assert fetched(project) == {"rows/de.jsonl": ROWS}

    recipe(project, data="      config: fr\n")
    assert prefbuild(hub, project, "lock", code=4) == (
        "prefbuild: me/rows@main: has no config fr; there are en (train, held), de (train)\n"
    )
    recipe(project, data="      split: dev\n")
    assert prefbuild(hub, project, "lock", code=4) == (
        "prefbuild: me/rows@main: has no split dev in config en; there are en (train, held), de (train)\n"
    )
    recipe(project, data="      split: train\n      files: [rows/de.jsonl]\n")
    said = prefbuild(hub, project, "lock", code=3)
    assert "data.sources[0].split: says which rows, and files too; give one of them" in said
    hub.put("me/rows", {"README.md": b"---\nconfigs: [\n---\n"}, kind="dataset")
    recipe(project, data="      split: train\n")
    said = prefbuild(hub, project, "lock", code=4)
    assert said.startswith("prefbuild: me/rows@main/README.md: the YAML on its top can't be read (")
    assert said.endswith("); name the files, with files: [...]\n")


def test_an_update_shows_what_moved_for_the_named_recipe_alone(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    old = hub.put("me/rows", {"a.jsonl": ROWS, "b.jsonl": ROWS}, kind="dataset")
    other = hub.put("me/others", {"train.jsonl": ROWS}, kind="dataset")
    recipe(project, data="      files: ['*.jsonl']\n")
    text = (project / "recipes/first.yaml").read_text()
    (project / "recipes/second.yaml").write_text(text.replace("me/rows", "me/others"))
    prefbuild(hub, project, "lock")
    base = hub.put("me/tiny", {"NEWS.md": b"# you"})  # no file that is pinned
    new = hub.put("me/rows", {"b.jsonl": b"{}\n", "c.jsonl": ROWS}, delete=("a.jsonl",), kind="dataset")
    hub.put("me/others", {"train.jsonl": b"{}\n"}, kind="dataset")
    lines = prefbuild(hub, project, "lock", "--update", "first").splitlines()
    was = hub.history("me/tiny")[1]
    assert lines[0] == f"moved me/tiny@main: {was[:8]} -> {base[:8]}, for second too"
    assert lines[1:3] == [
        f"moved me/rows@main: {old[:8]} -> {new[:8]}",
        "dropped me/rows@main/a.jsonl: it is gone",
    ]
    assert lines[3].startswith("changed me/rows@main/b.jsonl: sha256 ")
    assert lines[4:] == ["pinned me/rows@main/c.jsonl (new)"]
    found = entries(project)
    assert (found["me/rows@main"]["commit"], found["me/others@main"]["commit"]) == (new, other)


def test_a_lock_without_the_commit_is_refused(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    commit = hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    text = (project / LOCK).read_text()
    (project / LOCK).write_text(text.replace(commit, commit[:8]))
    assert ".commit: is not a commit, 40 hex digits; " in prefbuild(hub, project, "lock", code=3)
    (project / LOCK).write_text("".join(line for line in text.splitlines(True) if commit not in line))
    assert ": has no commit; " in prefbuild(hub, project, "lock", code=3)


def test_in_a_container_the_cache_is_the_work_folder(hub: Hub, project: Path) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.parquet": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    before = sorted(os.listdir(hub.folder / "home/hub"))
    fetch(hub, project, "data", PREFBUILD_IMAGE="sha256:0")
    assert sorted(os.listdir(hub.folder / "home/hub")) == before and fetched(project) == {"train.parquet": ROWS}


@pytest.mark.timeout(900)
def test_a_container_fetches_from_the_hub_without_the_token(hub: Hub, project: Path, cpu_image: str) -> None:
    put_checkpoint(hub)
    hub.put("me/rows", {"train.jsonl": ROWS}, kind="dataset")
    prefbuild(hub, project, "lock")
    prefbuild(hub, project, "image", "lock", "cpu", cpu_image)
    fetch(hub, project, "data", HF_HUB_OFFLINE="0", PREFBUILD_RUNNER="docker")
    assert fetched(project) == {"train.jsonl": ROWS}
    assert (
        WRITE
        not in (project / "build/.work/logs")
        .joinpath(f"data-{next((project / 'build/data').iterdir()).name}.log")
        .read_text()
    )
