"""The model card: true numbers, no empty section, nothing said that is not known."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from prefbuild.compare import compare_samples
from prefbuild.promote.card import cell, render_card
from tests import built
from tests.built import BASE, KEYS


def card(root: Path, *, commit: str | None = "c" * 40, dirty: tuple[str, ...] = (), baseline: bool = True) -> str:
    metrics = {
        stage: json.loads((root / f"build/x/{stage}.json").read_text())
        for stage in ("prepare", "train", "merge", "evaluate")
    }
    metrics["baseline"] = json.loads((root / built.BASELINE / "metrics.json").read_text()) if baseline else {}
    provenance = {
        "version": "v3",
        "git_commit": commit,
        "dirty": list(dirty),
        "build": "sha256:" + "b" * 64,
        "artifact": built.digest(root, "build/x/merged"),
    }
    gate = json.loads((root / "build/x/gate.json").read_text())
    return render_card(root, resolved=built.resolved(root), gate=gate, metrics=metrics, provenance=provenance)


def front(text: str) -> dict:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def section(text: str, title: str) -> str:
    """The body under a heading; headings inside code are none."""
    return re.split(r"^#{1,2} ", text, flags=re.MULTILINE)[titles(text).index(title) + 1].partition("\n")[2].strip()


def titles(text: str) -> list[str]:
    return re.findall(r"^#{1,2} (.*)$", text, flags=re.MULTILINE)


def change_recipe(root: Path, **changes: object) -> None:
    built.write_recipe(root, "x", **{"gates": built.GATES, **changes})
    built.resolve_all(root)


def test_the_card_has_these_sections_in_this_order(root):
    assert titles(card(root)) == ["x v3", "Measured", "Gates", "Use", "Data", "Settings", "Rebuild"]


def test_the_front_matter_is_yaml_and_says_what_is_known(root):
    assert front(card(root)) == {
        "base_model": "org/tiny",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["prefbuild", "preference-tuning", "dpo", "trl"],
    }


@pytest.mark.parametrize(
    "readme", [None, "# no front matter\n", "---\nlanguage: en\n---\n", "---\nlicense: [a\n---\n", "---\n"]
)
def test_a_licence_is_stated_only_where_the_base_states_one(root, readme):
    path = root / BASE / "README.md"
    path.unlink()
    if readme is not None:
        path.write_text(readme)
    assert "license" not in front(card(root))


def test_metrics_stand_beside_the_bases_with_errors_and_paired_bounds(root):
    test = compare_samples(root / "build/x/evaluate", root / built.BASELINE, KEYS["concise"], "exact_match", 0.95)
    assert test.mean_difference == pytest.approx(0.3)
    bounds = f"+0.3 [{test.lower_bound:+.4g}, {test.upper_bound:+.4g}]"
    assert f"| concise | exact_match | 40 | 0.45 ± 0.05 | 0.75 ± 0.05 | {bounds} |" in section(card(root), "Measured")


def test_a_metric_without_samples_has_no_difference(root):
    assert "| concise | corpus | 40 | 0.5 | 0.5 |  |" in section(card(root), "Measured")


def test_every_metric_is_there_and_no_error_or_count_as_a_metric(root):
    rows = re.findall(r"^\| (concise|sense) \| (\S+) ", section(card(root), "Measured"), flags=re.MULTILINE)
    assert rows == [
        ("concise", "corpus"),
        ("concise", "exact_match"),
        ("concise", "length"),
        ("sense", "acc"),
        ("sense", "acc@strict"),
        ("sense", "corpus"),
    ]


def test_every_rule_is_there_with_what_it_says(root):
    gate = json.loads((root / "build/x/gate.json").read_text())
    assert section(card(root), "Gates") == "\n".join(f"- passed: {rule['says']}" for rule in gate["rules"])
    assert len(gate["rules"]) == 5


def test_rows_are_accounted_for(root):
    assert section(card(root), "Data").splitlines() == [
        "| rows | |",
        "|---|---|",
        "| read | 12 |",
        "| dropped: empty | 1 |",
        "| dropped: prompt too long | 1 |",
        "| trained on | 8 |",
        "| held out | 2 |",
        "| chosen answers cut | 3 |",
    ]


def test_settings_are_those_that_were_resolved(root):
    settings = section(card(root), "Settings")
    for line in ("| method | dpo |", "| beta | 0.25 |", "| max_steps | 8 |", "| lora.r | 4 |", "| seed | 42 |"):
        assert line in settings.splitlines()
    assert "loss_weights" not in settings  # null: not set


def code(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", section(text, "Use"), flags=re.DOTALL)
    ast.parse(block)
    return str(block)


def test_how_to_use_the_merged_model(root):
    text = code(card(root))
    assert 'folder = "registry/x/v3/merged"' in text
    assert "apply_chat_template" in text


def test_a_model_without_a_chat_template_is_not_asked_through_one(root):
    (root / "build/x/merged/chat_template.jinja").unlink()
    assert "apply_chat_template" not in code(card(root))
    built.edit(root / "build/x/merged/tokenizer_config.json", lambda config: config.update(chat_template="{{ x }}"))
    assert "apply_chat_template" in code(card(root))


def test_how_to_use_the_adapter_alone(root):
    change_recipe(root, promote={"to": "directory", "path": "registry", "merged": False})
    text = card(root)
    assert front(text)["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "registry/x/v3/adapter")' in code(
        text
    )
    assert 'base = "org/tiny"' in code(text)


def test_how_to_rebuild(root):
    text = section(card(root), "Rebuild")
    assert f"git checkout {'c' * 40}\nprefbuild build x\nprefbuild promote x\n" in text
    assert "sha256:" + "b" * 64 in text
    assert built.digest(root, "build/x/merged") in text
    assert "Not in that commit" not in text


def test_what_was_not_committed_is_said(root):
    text = section(card(root, dirty=("recipes/x.yaml", "a|b")), "Rebuild")
    assert "Not in that commit, so that a rebuild may differ:\n- recipes/x.yaml\n- a\\|b\n" in text


def test_without_git_no_commit_is_promised(root):
    text = section(card(root, commit=None, dirty=("(no git)",)), "Rebuild")
    assert "git checkout" not in text
    assert "can't be rebuilt from a commit" in text


@pytest.mark.parametrize(
    "case",
    ["as it is", "no description", "no baseline", "adapter only", "no git", "dirty", "no licence", "nothing dropped"],
)
def test_no_section_is_empty(root, case):
    options = {
        "no git": {"commit": None, "dirty": ("(no git)",)},
        "dirty": {"dirty": ("a",)},
        "no baseline": {"baseline": False},
    }
    if case == "no description":
        change_recipe(root, description="")
    elif case == "adapter only":
        change_recipe(root, promote={"to": "directory", "merged": False})
    elif case == "no licence":
        (root / BASE / "README.md").unlink()
    elif case == "nothing dropped":
        counts = {"rows": {"in": 8, "out": 8, "train": 8, "held_out": 0}, "dropped": {"empty": 0}}
        built.edit(root / "build/x/prepare.json", lambda metrics: metrics.update(counts))
    text = card(root, **options.get(case, {}))
    for title in titles(text):
        assert len(section(text, title)) > 20, title
    assert not re.search(r"\n\n\n", text)
    assert not re.search(r"None|Undefined|\{\{|\}\}|\{%|%\}", text)
    assert text.endswith(".\n")
    if case == "no baseline":
        assert "|  | 0.75 ± 0.05 |" in text


def test_the_description_is_one_paragraph(root):
    change_recipe(root, description="Answers\nin one\n\n# word.")
    text = card(root)
    assert "\n\nAnswers in one # word.\n\n" in text
    assert "word." not in titles(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a|b", "a\\|b"),
        ("a\nb", "a b"),
        ("`a`", "\\`a\\`"),
        ("<script>", "&lt;script>"),
        ("\033[2J", " [2J"),
        (["sigmoid"], '["sigmoid"]'),
        (0.1, "0.1"),
        (True, "true"),
    ],
)
def test_a_cell_stays_a_cell(value, text):
    assert cell(value) == text
