"""`prefbuild new`: a recipe, and a project where there is none."""

from pathlib import Path

import pytest
from project import ROOT, git, run

from prefbuild import new as module
from prefbuild.errors import UsageError
from prefbuild.new import new
from prefbuild.pipeline import sync
from prefbuild.recipe import load_recipes, schema_text
from prefbuild.resolve import load_project


def test_an_empty_folder_becomes_a_project_that_dvc_accepts(tmp_path: Path) -> None:
    output = run(tmp_path, "prefbuild", "new", "my-model")
    assert "wrote recipes/my-model.yaml" in output
    assert (tmp_path / "recipes/recipe.schema.json").read_text() == schema_text()
    (tmp_path / "recipes/tasks").mkdir()
    (tmp_path / "recipes/tasks/my-model.yaml").write_text("task: mine\n")
    assert list(load_recipes(tmp_path)) == ["my-model"]
    run(tmp_path, "prefbuild", "sync")
    assert "model-" in run(tmp_path, "dvc", "stage", "list")


def test_a_second_recipe_copies_the_first_with_its_comments(tmp_path: Path) -> None:
    new(tmp_path, "first")
    new(tmp_path, "second", like="first")
    assert (tmp_path / "recipes/second.yaml").read_text() == (tmp_path / "recipes/first.yaml").read_text()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mine\n")
    new(tmp_path, "first")
    with pytest.raises(UsageError, match=r"^recipes/first.yaml: is there already; edit it, or choose another name$"):
        new(tmp_path, "first")
    assert (tmp_path / ".gitignore").read_text().startswith("mine\n")


@pytest.mark.parametrize("name", ["Upper", "a.b", "-x", "x-", "a/b", "../x", "", "a" * 80, "x@y"])
def test_a_name_that_paths_or_dvc_cannot_carry_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no recipe name"):
        new(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_the_build_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^report: is a name the build uses itself; choose another$"):
        new(tmp_path, "report")


def test_a_pattern_that_is_not_there_is_said(tmp_path: Path) -> None:
    new(tmp_path, "first")
    with pytest.raises(UsageError, match=r"^nine: no such recipe to copy; there are: first$"):
        new(tmp_path, "second", like="nine")
    with pytest.raises(UsageError, match=r"^\.\./params: no such recipe to copy; there are: first$"):
        new(tmp_path, "second", like="../params")


def test_a_folder_of_a_larger_repository_becomes_a_project(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "models").mkdir()
    new(tmp_path / "models", "first")
    assert not (tmp_path / "models/.git").exists()
    sync(load_project(tmp_path / "models"))
    assert "resolve:" in run(tmp_path / "models", "dvc", "status")


@pytest.mark.parametrize(
    ("path", "text"), [("params.yaml", "PARAMS"), (".dvcignore", "DVCIGNORE"), (".dvc/config", "DVC_CONFIG")]
)
def test_this_repository_is_such_a_project(path: str, text: str) -> None:
    assert (ROOT / path).read_text() == getattr(module, text)


def test_this_repository_hides_what_a_project_hides() -> None:
    assert module.GITIGNORE in (ROOT / ".gitignore").read_text()
