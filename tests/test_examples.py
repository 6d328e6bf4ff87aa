"""Every recipe below recipes/ that is shipped as an example loads, reads its rows, and there is one for each method."""

import shutil
from pathlib import Path

import pytest
from project import ROOT

from prefbuild.methods import METHODS, reward_columns
from prefbuild.recipe import Recipe, data_settings, load_recipes
from prefbuild.rows import read_rows

FOLDERS = ("examples", "examples/chain", "headline")  # not recipes of this repository's own build
EXAMPLES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / "recipes" / folder).glob("*.yaml"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Recipe]:
    """The examples as a user has them who copies them into recipes/, where what they say of each other is checked."""
    loaded = {}
    for folder in FOLDERS:
        project = tmp_path_factory.mktemp("project")
        shutil.copytree(ROOT / "recipes", project / "recipes")
        shutil.copy(ROOT / "params.yaml", project)
        for path in (ROOT / "recipes" / folder).glob("*.yaml"):
            shutil.copy(path, project / "recipes")
        recipes = load_recipes(project)
        loaded |= {path: recipes[path.stem] for path in EXAMPLES if path.parent == Path("recipes", folder)}
    return loaded


def test_every_example_loads(examples: dict[Path, Recipe]) -> None:
    assert sorted(examples) == EXAMPLES


def test_every_method_has_an_example(examples: dict[Path, Recipe]) -> None:
    for method in METHODS:
        assert examples[Path(f"recipes/examples/{method}.yaml")].train.method == method


def test_the_rows_that_examples_ship_are_read(examples: dict[Path, Recipe], tmp_path: Path) -> None:
    shapes = set()
    for path, recipe in examples.items():
        told = data_settings(recipe.data, recipe.shape, reward_columns(recipe.train))
        # What the Hub holds is the lock's to say.
        for number, source in enumerate(source for source in recipe.data.sources if source.source == "file"):
            folder = tmp_path / path.stem / str(number)
            folder.mkdir(parents=True)
            shutil.copy(ROOT / source.path, folder)
            rows, dropped = read_rows(told, [folder])
            assert len(rows) >= 10 and dropped == [], f"{path}: {source.path}"
            shapes.add(recipe.shape)
    assert shapes >= {"pairs", "answers", "labelled"}


def test_an_examples_files_are_in_the_repository(examples: dict[Path, Recipe]) -> None:
    for path, recipe in examples.items():
        for task in recipe.tasks:
            if task.task.endswith(".yaml"):
                assert (ROOT / task.task).is_file(), f"{path} names {task.task}, which is not there"
