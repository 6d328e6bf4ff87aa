"""The gate stage: a verdict of the same bytes each time, and never an error for a bad model."""

import json
import shutil
from pathlib import Path

import pytest

from prefbuild.artifact import canonical_json
from prefbuild.stages import gate
from tests import built


@pytest.fixture
def root(template, tmp_path, monkeypatch):
    root = Path(shutil.copytree(template, tmp_path / "project"))
    (root / "build/x/gate.json").unlink()
    monkeypatch.chdir(root)
    return root


def run(settings: dict | None = None) -> dict:
    """Run the stage as the worker does; returns the verdict it wrote."""
    inputs = {
        role: [Path(path) for path in value] if isinstance(value, list) else Path(value)
        for role, value in built.INPUTS.items()
    }
    out = Path("build/x/gate.json")
    gate.run(settings or built.gate_settings(), inputs, {"gate": out}, Path("build/.work/gate-x"), "x")
    return dict(json.loads(out.read_text()))


def test_a_verdict_has_every_key_of_its_format(root):
    verdict = run()
    assert list(verdict) == sorted(["recipe", "passed", "artifact", "adapter", "judged", "rules"])
    assert verdict["recipe"] == "x"
    assert verdict["passed"] is True
    keys = {"metric", "rule", "bound", "value", "against", "reference", "confidence", "lower_bound", "passed", "says"}
    assert all(set(rule) == keys for rule in verdict["rules"])
    min_, delta = verdict["rules"][:2]
    assert (min_["rule"], min_["value"], min_["against"], min_["lower_bound"]) == ("min", 0.75, None, None)
    assert (delta["rule"], delta["reference"], delta["against"], delta["confidence"]) == (
        "min_delta",
        0.45,
        "base",
        0.95,
    )
    assert delta["bound"] < delta["lower_bound"] < delta["value"] - delta["reference"]


def test_the_same_files_give_the_same_bytes(root):
    first = canonical_json(run())
    assert Path("build/x/gate.json").read_text() == first
    run()
    assert Path("build/x/gate.json").read_text() == first


def test_a_failed_verdict_is_written_and_ends_well(root, capsys):
    verdict = run(built.gate_settings([built.gate("evaluate.concise.exact_match", min=0.9)]))
    assert verdict["passed"] is False
    assert capsys.readouterr().out == (
        "x: FAIL, 0 of 1 rules hold\n"
        "  FAIL  evaluate.concise.exact_match min 0.9  "
        "evaluate.concise.exact_match is 0.75, below the min of 0.9\n"
    )


def test_the_table_is_printed_without_colour_into_a_file(root, capsys):
    run()
    printed = capsys.readouterr().out
    assert printed.startswith("x: PASS, 5 of 5 rules hold\n")
    assert printed.count("  PASS  ") == 5
    assert "\033" not in printed


def test_a_build_with_nothing_in_it_gets_a_failed_verdict(root):
    shutil.rmtree(root / "build")
    verdict = run()
    assert verdict["passed"] is False
    assert verdict["rules"][0]["says"] == "build/x/prepare.json: is missing; run `dvc repro` to build it"
