"""Which runner is chosen, and what a stage gets of the machine on it."""

import json
from pathlib import Path

import pytest
from project import make_project, run


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("runners") / "project", tiny_model)
    run(folder, "prefbuild", "resolve")
    return folder


def node(project: Path, kind: str) -> str:
    return next((project / "build/.resolved" / kind).iterdir()).stem


@pytest.fixture(scope="module")
def refused() -> tuple[int, str]:
    """How the docker runner refuses here: (exit code, words), without an image or, on a machine without one, without an engine."""
    import docker

    try:
        docker.from_env().ping()
    except docker.errors.DockerException:
        return 7, "no container engine answers"
    return 4, "image cpu is not pinned, so there is nothing to run"


def data(project: Path, *options: str, code: int = 0, **env: str) -> str:
    return run(project, "prefbuild", "stage", "data", node(project, "data"), *options, code=code, **env)


def test_the_machine_itself_is_the_default(project: Path, tmp_path: Path) -> None:
    assert "done in" in data(project, XDG_CONFIG_HOME=str(tmp_path))


def test_an_unknown_runner_says_where_it_was_named(project: Path, tmp_path: Path) -> None:
    text = data(project, "--runner", "kubernetes", code=2)
    assert "--runner: there is no runner 'kubernetes'; known: local, docker" in text
    assert "PREFBUILD_RUNNER: there is no runner 'slurm'" in data(project, code=2, PREFBUILD_RUNNER="slurm")
    settings = tmp_path / "prefbuild/settings.yaml"
    settings.parent.mkdir()
    settings.write_text("# mine\nrunner: podman\n")
    text = data(project, code=2, XDG_CONFIG_HOME=str(tmp_path))
    assert "settings.yaml:2: runner: there is no runner 'podman'" in text


def test_flag_before_environment_before_settings(project: Path, tmp_path: Path, refused: tuple[int, str]) -> None:
    code, words = refused
    settings = tmp_path / "prefbuild/settings.yaml"
    settings.parent.mkdir()
    settings.write_text("runner: docker\n")
    home = str(tmp_path)
    assert words in data(project, code=code, XDG_CONFIG_HOME=home)
    assert "done in" in data(project, XDG_CONFIG_HOME=home, PREFBUILD_RUNNER="local")
    assert words in data(project, "--runner", "docker", code=code, XDG_CONFIG_HOME=home, PREFBUILD_RUNNER="local")


def test_settings_that_say_something_else_are_refused(project: Path, tmp_path: Path) -> None:
    settings = tmp_path / "prefbuild/settings.yaml"
    settings.parent.mkdir()
    settings.write_text("runer: docker\n")
    assert "settings.yaml:1: runer: unknown key; known here: runner" in data(
        project, code=3, XDG_CONFIG_HOME=str(tmp_path)
    )


def test_a_build_hands_its_runner_to_the_stages(project: Path, refused: tuple[int, str]) -> None:
    code, words = refused
    text = run(project, "prefbuild", "build", "first", "--runner", "docker", code=code)
    assert words in text
    assert "Running stage" not in text


def test_a_recipe_for_a_gpu_does_not_train_on_a_cpu(project: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = project / "recipes/first.yaml"
    text = recipe.read_text()
    recipe.write_text(text + "compute: {gpus: 1}\n")
    try:
        run(project, "prefbuild", "resolve")
        text_of = run(project, "prefbuild", "build", "first", code=7)
    finally:
        recipe.write_text(text)
        run(project, "prefbuild", "resolve")
    assert "compute.gpus is 1, and" in text_of
    assert "compute.gpus: 0" in text_of or "compute.image: cuda" in text_of


def test_a_time_limit_holds_on_the_machine_itself(project: Path) -> None:
    recipe = project / "recipes/first.yaml"
    text = recipe.read_text()
    recipe.write_text(text + "compute: {time_limit: 0.1s}\n")
    try:
        run(project, "prefbuild", "resolve")
        said = data(project, code=7)
    finally:
        recipe.write_text(text)
        run(project, "prefbuild", "resolve")
    assert "ran past compute.time_limit (0 s) and was stopped" in said


def test_only_plain_files_are_taken_from_the_machine_itself(project: Path) -> None:
    """A stage that finds its output folder linked elsewhere: DVC would follow the link."""
    found = json.loads((project / f"build/.resolved/data/{node(project, 'data')}.json").read_text())
    output = project / found["data"]["outputs"]["data"]
    assert output.is_dir()
    from prefbuild.artifact import list_special

    (output / "link").symlink_to("/etc/hostname")
    try:
        assert list_special(output) == [f"{output}/link is a symbolic link"]
        assert list_special(output / "link") == [f"{output}/link is a symbolic link"]
    finally:
        (output / "link").unlink()
    assert list_special(output) == []
