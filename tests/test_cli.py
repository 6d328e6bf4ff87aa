"""The command line: fast, and errors without tracebacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, run

HEAVY = ("torch", "pydantic", "dvc", "transformers", "yaml", "numpy", "lm_eval", "huggingface_hub")
COMMANDS = (
    "new", "check", "lock", "sync", "status", "preview", "build", "gates", "diff", "generate", "promote", "doctor",
    "schema", "resolve", "stage", "clean", "image", "reward", "track", "plan",
)  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from prefbuild.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prefbuild build my-model" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    output = run(ROOT, "prefbuild", command, "--help")
    assert f"example:\n  prefbuild {command}" in output


def test_outside_a_project_the_way_in_is_said(tmp_path: Path) -> None:
    output = run(tmp_path, "prefbuild", "check", code=2)
    assert "no params.yaml and recipes/ here or above; start a project with `prefbuild new NAME`" in output


def test_an_unknown_recipe_is_said_with_a_likely_one() -> None:
    assert run(ROOT, "prefbuild", "lock", "smollm2-concize", code=2) == (
        "prefbuild: there is no recipe 'smollm2-concize'; did you mean smollm2-concise?\n"
    )


def test_an_unknown_stage_is_said() -> None:
    output = run(ROOT, "prefbuild", "stage", "tarin", "smollm2-concise", code=2)
    assert output.startswith("prefbuild: tarin: no such stage; one of model, data, prepare, reference, train")


def test_the_shipped_schema_is_that_of_the_code() -> None:
    assert run(ROOT, "prefbuild", "schema") == (ROOT / "recipes/recipe.schema.json").read_text()


def test_the_shipped_dvc_files_and_lock_are_up_to_date() -> None:
    assert run(ROOT, "prefbuild", "sync", "--check") == "the DVC files are up to date\n"


def test_the_shipped_recipes_are_sound() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    assert run(ROOT, "prefbuild", "check") == "".join(f"recipes/{path.name}: ok\n" for path in recipes)


def test_the_demonstrations_rows_are_those_its_script_writes(tmp_path: Path) -> None:
    script = ROOT / "recipes/concise/make_rows.py"
    copy = tmp_path / "make_rows.py"
    copy.write_bytes(script.read_bytes())
    run(tmp_path, sys.executable, str(copy))
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (script.parent / name).read_bytes()
