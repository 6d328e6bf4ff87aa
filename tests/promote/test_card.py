"""The model card: true numbers, no empty section, nothing said that is not known, and metadata that the Hub takes."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub

from prefbuild.compare import compare_samples
from prefbuild.errors import PromotionRefused
from prefbuild.promote.card import cell, number, render_card, stated_license
from prefbuild.promote.provenance import SourceState, gather
from tests import built
from tests.built import BASE, KEYS

COMMIT = "c" * 40
KEY = "0123456789abcdef" * 4
PLOTS = {"training.svg": "Loss [nats] | falls", "measured.svg": "Better", "lengths.svg": "Short"}
HUB = {"to": "hub", "repo": "me/tiny-x"}


def inputs(root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The resolved recipe, its verdict and its metrics."""
    metrics = {
        stage: json.loads((root / f"build/x/{stage}.json").read_text())
        for stage in ("prepare", "train", "merge", "evaluate")
    }
    metrics["baseline"] = json.loads((root / built.BASELINE / "metrics.json").read_text())
    return built.resolved(root), json.loads((root / "build/x/gate.json").read_text()), metrics


def card(
    root: Path,
    *,
    commit: str | None = COMMIT,
    dirty: tuple[str, ...] = (),
    key: str | None = None,
    plots: dict[str, str] = PLOTS,
    baseline: bool = True,
    facts: Callable[[dict[str, Any]], Any] = lambda facts: None,
) -> str:
    """The card of version v3; `facts` changes what provenance gathered."""
    resolved, gate, metrics = inputs(root)
    if not baseline:
        metrics["baseline"] = {}
    source = SourceState(commit=commit, dirty=list(dirty))
    build = "sha256:" + "b" * 64
    gate["judged"].setdefault(resolved["train"]["inputs"]["model"], "sha256:" + "7" * 64)  # of another base
    gathered = gather(root, "x", version="v3", build=build, resolved=resolved, gate=gate, source=source, key=key)
    gathered["time"] = "2026-01-02T03:04:05+00:00"
    facts(gathered)
    return render_card(root, resolved=resolved, gate=gate, metrics=metrics, facts=gathered, plots=plots)


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


def from_hub(path: str, **source: object) -> Callable[[dict[str, Any]], Any]:
    """Facts in which a model or data set was read from the Hub."""
    entry = {"source": {"source": "hub", "revision": "main", "files": None, "name": None, **source}, "commit": "abcdef12" * 5,
             "files": [{"path": "a.jsonl", "size": 1, "sha256": "0" * 64}]}  # fmt: skip
    return lambda facts: facts["lock"]["entries"].update({path: entry})


def test_the_card_has_these_sections_in_this_order(root):
    order = ["x v3", "Use", "Measured", "Gates", "Training", "Data", "Provenance", "Verify", "Rebuild"]
    assert titles(card(root)) == order


def test_the_same_facts_give_the_same_bytes(root):
    assert card(root) == card(root)


# ---- front matter


def test_the_front_matter_is_yaml_and_says_what_is_known(root):
    found = front(card(root))
    del found["model-index"]
    assert found == {
        "base_model": "org/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["prefbuild", "preference-tuning", "dpo", "trl"],
    }


def test_the_client_reads_back_every_number_that_was_measured(root):
    from huggingface_hub import ModelCard

    data = ModelCard(card(root)).data
    assert data.model_name == "x"
    _, _, metrics = inputs(root)
    wanted = {
        (task, metric): value
        for task, scores in metrics["evaluate"].items()
        for metric, value in scores.items()
        if metric != "n" and not metric.endswith("_stderr")
    }
    assert len(wanted) == 6
    assert {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results} == wanted
    assert {result.task_type for result in data.eval_results} == {"text-generation"}


def test_the_model_index_has_what_the_hub_requires(root):
    (entry,) = front(card(root))["model-index"]
    assert entry["name"] == "x"
    assert [result["dataset"]["type"] for result in entry["results"]] == ["concise", "sense"]
    for result in entry["results"]:
        assert result["task"] == {"type": "text-generation"}
        assert result["dataset"].keys() == {"name", "type"}
        for metric in result["metrics"]:
            assert metric.keys() == {"type", "value", "name"}
            assert isinstance(metric["value"], float)


def test_how_a_task_was_asked_is_in_the_model_index(root):
    tasks = [{"task": "recipes/tasks/concise.yaml", "num_fewshot": 3, "limit": 40}]
    built.write_recipe(root, "x", gates=built.GATES[:1], evaluate={"tasks": tasks})
    built.resolve_all(root)
    key = built.resolved(root)["gate"]["settings"]["measurements"][0]["key"]
    shutil.copy(root / f"build/x/evaluate/{KEYS['concise']}.json", root / f"build/x/evaluate/{key}.json")
    (entry,) = front(card(root))["model-index"]
    assert [result["dataset"]["args"] for result in entry["results"]] == [{"num_few_shot": 3, "limit": 40}]


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5", None])
def test_what_is_no_finite_number_is_not_in_the_model_index(root, value):
    built.edit(root / "build/x/evaluate.json", lambda metrics: metrics["sense"].update(acc=value))
    text = card(root)
    (entry,) = front(text)["model-index"]
    assert [metric["type"] for metric in entry["results"][1]["metrics"]] == ["acc@strict", "corpus"]
    assert "| sense | acc | 40 | 0.75 ± 0.05 |  |" in section(text, "Measured")


def test_without_metrics_there_is_no_model_index(root):
    built.write_json(root / "build/x/evaluate.json", {})
    text = card(root)
    assert "model-index" not in front(text)
    assert "Measured" not in titles(text)


def test_the_clients_validator_passes_it(root, hub: Hub):
    (root / "README.md").write_text(card(root))
    code = "from huggingface_hub import ModelCard; ModelCard.load('README.md').validate()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, **hub.env()})
    assert [request.path for request in hub.log] == ["/api/validate-yaml"]


@pytest.mark.parametrize(
    "readme", [None, "# no front matter\n", "---\nlanguage: en\n---\n", "---\nlicense: [a\n---\n", "---\n"]
)
def test_a_licence_is_stated_only_where_the_base_states_one(root, readme):
    path = root / BASE / "README.md"
    path.unlink()
    if readme is not None:
        path.write_text(readme)
    assert "license" not in front(card(root))
    assert stated_license(root / BASE) is None


OTHER = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: {}\n---\n"


@pytest.mark.parametrize(
    ("link", "beside", "hub", "shown"),
    [
        ("https://example.org/l", False, False, "https://example.org/l"),
        ("LICENSE", True, False, "LICENSE"),
        ("LICENSE", False, False, None),
        ("LICENSE", False, True, "https://huggingface.co/org/base/blob/" + "abcdef12" * 5 + "/LICENSE"),
    ],
)
def test_a_licence_of_its_own_has_a_name_and_a_link_that_leads_somewhere(root, link, beside, hub, shown):
    (root / BASE / "README.md").write_text(OTHER.format(link))
    if beside:
        (root / "build/x/merged/LICENSE").write_text("All rights.")
    found = front(card(root, facts=from_hub(BASE, repo="org/base") if hub else lambda facts: None))
    assert (found["license"], found["license_name"], found.get("license_link")) == ("other", "tiny-license", shown)


def test_only_an_id_of_the_hub_is_a_base_model(root):
    # Without a name the base is called by its path, which has the shape of an id.
    change_recipe(root, base={"source": "file", "path": "models/tiny"})
    text = card(root)
    assert not {"base_model", "base_model_relation"} & front(text).keys()
    assert "| base model | models/tiny at sha256 " in section(text, "Provenance")
    assert f'base = "{BASE}"  # where' in text


@pytest.mark.parametrize("name", ["tiny", "/mnt/models/tiny", "a/b/c", "org/tiny model"])
def test_a_name_that_is_no_id_of_the_hub_is_no_base_model(root, name):
    change_recipe(root, base={"source": "file", "path": "models/tiny", "name": name})
    text = card(root)
    assert "base_model" not in front(text)
    assert "/mnt" not in text


def test_a_base_from_the_hub_is_named_and_loaded_at_its_commit(root):
    change_recipe(root, promote={"to": "directory", "merged": False})
    text = card(root, facts=from_hub(BASE, repo="org/base", name="/mnt/mirror/base"))
    assert front(text)["base_model"] == "org/base"
    assert front(text)["base_model_relation"] == "adapter"
    assert "| base model | org/base at commit abcdef12abcd |" in section(text, "Provenance")
    assert f'model = AutoModelForCausalLM.from_pretrained(base, revision="{"abcdef12" * 5}")' in text
    assert 'base = "org/base"\n' in text
    assert "/mnt" not in text


def test_data_from_the_hub_is_named_once_in_the_front_matter(root):
    shutil.copy(root / "recipes/rows/train.jsonl", root / "recipes/rows/more.jsonl")
    sources = [{"source": "file", "path": f"recipes/rows/{name}.jsonl"} for name in ("train", "more")]
    change_recipe(root, data={**built.RECIPE["data"], "sources": sources})
    paths = built.resolved(root)["prepare"]["inputs"]["data"]
    text = card(root, facts=lambda facts: [from_hub(path, repo="org/pairs")(facts) for path in paths])
    assert front(text)["datasets"] == ["org/pairs"]
    assert section(text, "Data").count("| org/pairs | commit abcdef12abcd |") == 2


def test_another_recipes_model_as_base(root):
    change_recipe(root, base={"source": "recipe", "recipe": "y"})
    text = card(root)
    assert "base_model" not in front(text)
    assert "recipe y, tuned on preferences with DPO." in section(text, "x v3")
    assert "| base model | recipe y at its merged model |" in section(text, "Provenance")
    assert 'base = "build/y/merged"  # where' in section(text, "Use")


def test_no_path_of_this_machine_is_on_the_card(root):
    elsewhere = shutil.copytree(root / "models/tiny", root / "elsewhere/tiny")
    rows = shutil.copy(root / "recipes/rows/train.jsonl", root / "elsewhere/rows.jsonl")
    data = {**built.RECIPE["data"], "sources": [{"source": "file", "path": str(rows)}]}
    change_recipe(root, base={"source": "file", "path": str(elsewhere)}, data=data)
    text = card(root)
    assert str(root) not in text
    assert re.search(r"\| base model \| tiny at sha256 \w{12} and 4 more files \|", text)
    assert re.search(r"\| rows.jsonl \| sha256 \w{12} \|", text)


# ---- the text


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
    rules = "\n".join(f"- passed: {rule['says']}" for rule in gate["rules"])
    assert section(card(root), "Gates") == f"Passed: 5 of 5 rules hold.\n\n{rules}"
    assert len(gate["rules"]) == 5


def test_a_failed_rule_would_be_said(root):
    """No card is made of a failed build; if one were, it would not call it a pass."""
    failed = {"passed": False, "says": "it is bad"}
    built.edit(root / "build/x/gate.json", lambda gate: gate.update(passed=False, rules=[failed]))
    assert section(card(root), "Gates") == "FAILED: 0 of 1 rules hold.\n\n- FAILED: it is bad"


def test_rows_are_accounted_for(root):
    text = section(card(root), "Data")
    assert text.startswith("| source | revision |\n|---|---|\n| recipes/rows/train.jsonl | sha256 ")
    assert "\n\nColumns: prompt from prompt, chosen from chosen, rejected from rejected.\n\n" in text
    assert text[text.index("| rows") : text.index("\n\n![")].splitlines() == [
        "| rows | |",
        "|---|---|",
        "| read | 12 |",
        "| dropped: empty | 1 |",
        "| dropped: prompt too long | 1 |",
        "| trained on | 8 |",
        "| held out | 2 |",
        "| chosen answers cut | 3 |",
    ]


@pytest.mark.parametrize(
    ("method", "columns", "tuned_on", "says"),
    [
        ("sft", {"messages": "m"}, "answers", "messages from m."),
        ("kto", {}, "answers marked good or bad", "prompt from prompt, completion from completion, label from label."),
        ("grpo", {"system": "s"}, "prompts, whose completions rewards scored,", "system from s, prompt from prompt."),
    ],
)
def test_the_card_of_another_method_has_its_own_parts(root, method, columns, tuned_on, says):
    rewards = {"rewards": [{"reward": "length", "target": 50}]} if method == "grpo" else {}
    lengths = {} if method == "grpo" else {"max_length": 64}
    source = {"sources": built.RECIPE["data"]["sources"]}
    change_recipe(
        root,
        train={"method": method, **rewards},
        data={**source, "columns": columns, "max_prompt_length": 32, **lengths},
        gates=[gate for gate in built.GATES if not gate["metric"].startswith(("train.rewards", "prepare."))],
    )
    answers = {} if method == "grpo" else {"completion": 3}

    def prepared(metrics):
        metrics.update(truncated=answers, end_of_turn_lost=dict.fromkeys(answers, 1))
        metrics.update({"labels": {"true": 6, "false": 2}} if method == "kto" else {})

    built.edit(root / "build/x/prepare.json", prepared)
    text = card(root)
    assert f"tuned on {tuned_on} with {method.upper()}. Published" in text
    data = section(text, "Data")
    assert f"\n\nColumns: {says}\n\n" in data
    assert ("| completion answers cut | 3 |" in data) == (method != "grpo")
    assert ("| trained on: good answers | 6 |" in data) == (method == "kto")
    assert "chosen" not in text.partition("## Training")[0] and "rejected" not in data


def test_settings_are_those_that_were_resolved(root):
    lines = section(card(root), "Training").splitlines()
    for line in ("| method | dpo |", "| beta | 0.25 |", "| max_steps | 8 |", "| lora.r | 4 |", "| seed | 42 |"):
        assert line in lines
    assert "| data.max_length | 64 |" in lines
    assert not [line for line in lines if "loss_weights" in line]  # null: not set


def test_results_of_training_are_there_and_the_machine_only_under_provenance(root):
    text = card(root)
    for line in ("| loss | 0.5 |", "| steps | 8 |", "| rewards.margins | 1.25 |"):
        assert line in section(text, "Training").splitlines()
    assert "cpu" not in section(text, "Training")
    assert "| trained on: cpu | test |" in section(text, "Provenance")


def test_plots_stand_in_their_sections_with_what_they_show(root):
    text = card(root)
    assert section(text, "Training").startswith("![Loss \\[nats\\] \\| falls](prefbuild/training.svg)\n\n| result")
    assert section(text, "Measured").endswith("![Better](prefbuild/measured.svg)")
    assert section(text, "Data").endswith("![Short](prefbuild/lengths.svg)")
    assert "![" not in card(root, plots={})


def test_the_owners_text_stands_below_the_description_as_it_is(root):
    built.write(root / "recipes/x.md", "\ufeff---\nlicense: mit\n---\r\n\n## Limits\n\n{{ none }} | `a` <b>\n\n")
    change_recipe(root, promote={"to": "directory", "card": "recipes/x.md"})
    text = card(root)
    assert (
        "after it passed the gates below.\n\n---\nlicense: mit\n---\n\n## Limits\n\n{{ none }} | `a` <b>\n\n## Use"
        in text
    )
    assert front(text)["license"] == "apache-2.0"
    assert titles(text)[:3] == ["x v3", "Limits", "Use"]


@pytest.mark.parametrize(("content", "why"), [(None, "is missing"), (b"\xff\xfe", "can't be read as text")])
def test_an_owners_text_that_is_not_there_is_refused(root, content, why):
    change_recipe(root, promote={"to": "directory", "card": "recipes/x.md"})
    if content is not None:
        (root / "recipes/x.md").write_bytes(content)
    with pytest.raises(PromotionRefused, match=rf"^recipes/x\.md: {why}.*; promote\.card names it$"):
        card(root)


# ---- use


def code(text: str) -> list[str]:
    """The blocks of code that show the use; each can be parsed."""
    blocks = re.findall(r"```python\n(.*?)```", section(text, "Use"), flags=re.DOTALL)
    for block in blocks:
        ast.parse(block)
        assert "\n\n\n" not in block
    return blocks


def calls(block: str, function: str) -> list[str]:
    return re.findall(rf"{function}\.from_pretrained\((.*)\)$", block, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("promote", "loads", "adapter"),
    [
        ({"to": "directory"}, ['"registry/x/v3"', "base"], 'model, "registry/x/v3/adapter"'),
        ({"to": "directory", "path": "out/reg/"}, ['"out/reg/x/v3"', "base"], 'model, "out/reg/x/v3/adapter"'),
        ({"to": "directory", "adapter": False}, ['"registry/x/v3"'], None),
        ({"to": "directory", "merged": False}, ["base"], 'model, "registry/x/v3"'),
        (HUB, ['"me/tiny-x", revision="v3"', "base"], 'model, "me/tiny-x", revision="v3", subfolder="adapter"'),
        ({**HUB, "adapter": False}, ['"me/tiny-x", revision="v3"'], None),
        ({**HUB, "merged": False}, ["base"], 'model, "me/tiny-x", revision="v3"'),
    ],
)
def test_how_to_use_what_is_published(root, promote, loads, adapter):
    change_recipe(root, promote=promote)
    text = card(root)
    blocks = code(text)
    assert [load for block in blocks for load in calls(block, "AutoModelForCausalLM")] == loads
    assert calls(blocks[-1], "PeftModel") == ([adapter] if adapter else [])
    # The tokenizer lies beside merged weights; an adapter has none.
    assert [calls(block, "AutoTokenizer") for block in blocks] == [[loads[0]]] * len(blocks)
    merged = promote.get("merged", True)
    assert front(text)["library_name"] == ("transformers" if merged else "peft")
    assert ("merged model" in section(text, "Provenance")) == merged
    assert ("| adapter | " in section(text, "Provenance")) == bool(adapter)
    if adapter:
        assert 'base = "org/tiny"  # trained on the bytes named under Provenance\n' in blocks[-1]


def test_a_model_without_a_chat_template_is_not_asked_through_one(root):
    assert all("apply_chat_template" in block for block in code(card(root)))
    (root / "build/x/merged/chat_template.jinja").unlink()
    assert not any("apply_chat_template" in block for block in code(card(root)))
    built.edit(root / "build/x/merged/tokenizer_config.json", lambda config: config.update(chat_template="{{ x }}"))
    assert all("apply_chat_template" in block for block in code(card(root)))


@pytest.mark.timeout(120)
def test_what_the_card_tells_to_run_runs(root, tiny_model, monkeypatch, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    change_recipe(root, base={"source": "file", "path": "models/tiny"})
    blocks = code(card(root))
    assert len(blocks) == 2
    shutil.rmtree(root / BASE)
    for folder in (root / BASE, root / "registry/x/v3"):
        shutil.copytree(tiny_model, folder)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(root / "registry/x/v3/adapter")
    monkeypatch.chdir(root)
    for block in blocks:
        capsys.readouterr()
        variables: dict[str, Any] = {}
        exec(compile(block, "card", "exec"), variables)
        assert variables["output"].shape[1] > variables["inputs"]["input_ids"].shape[1]
        assert capsys.readouterr().out
    assert type(variables["model"]).__name__.startswith("Peft")


# ---- where it comes from


def test_a_signed_version_says_by_which_key_and_how_to_check_it(root):
    change_recipe(root, promote=HUB)
    text = section(card(root, key=KEY), "Verify")
    assert text.startswith("Signed by key 0123456789abcdef. ")
    assert "```sh\nprefbuild verify me/tiny-x@v3 --key FOLDER\n```" in text
    assert "NOT" not in text


def test_an_unsigned_version_says_so(root):
    change_recipe(root, promote={"to": "directory", "path": "my registry"})
    text = section(card(root), "Verify")
    assert text.startswith("This version is NOT signed: ")
    assert "```sh\nprefbuild verify 'my registry/x/v3'\n```" in text
    assert "--key" not in text


def test_images_are_named_by_digest_and_their_absence_is_said(root):
    assert "| image | none: built without a container |" in section(card(root), "Provenance")
    image = {"role": "cpu", "id": "sha256:" + "d" * 64, "repo_digest": "ghcr.io/me/cpu@sha256:" + "e" * 64}
    text = section(card(root, facts=lambda facts: facts.update(images=[image])), "Provenance")
    assert f"| image cpu | {image['id']}, {image['repo_digest']} |" in text
    assert "none" not in text


def test_how_to_rebuild(root):
    text = section(card(root), "Rebuild")
    assert text.startswith(f"```sh\ngit checkout {COMMIT}\nprefbuild build x\n```\n")
    assert f"same bytes: `build/x/merged/manifest.json` has the digest\n{built.digest(root, 'build/x/merged')}." in text
    assert "Not in that commit" not in text
    assert f"| git commit | {COMMIT} |" in section(card(root), "Provenance")


def test_where_the_sources_are_is_said_when_it_is_known(root):
    text = card(root, facts=lambda facts: facts.update(git_remote="https://example.org/me/models.git"))
    assert f"git clone https://example.org/me/models.git project && cd project\ngit checkout {COMMIT}\n" in text
    assert f"| git commit | {COMMIT} of https://example.org/me/models.git |" in text


def test_no_equal_bytes_are_promised_of_training_that_is_not_deterministic(root):
    change_recipe(root, train={**built.RECIPE["train"], "deterministic": False})
    assert "same bytes" not in card(root)
    assert "(`deterministic: false`), so a rebuild gives other bytes." in section(card(root), "Rebuild")


def test_what_was_not_committed_is_said(root):
    text = section(card(root, dirty=("recipes/x.yaml", "a|b")), "Rebuild")
    assert text.endswith("Not in that commit, so that a rebuild may differ:\n- recipes/x.yaml\n- a\\|b")


def test_without_git_no_commit_is_promised(root):
    text = card(root, commit=None, dirty=("(no git)",))
    assert "git checkout" not in text
    assert "can't be rebuilt from a commit" in section(text, "Rebuild")
    assert "| git commit | none: the sources were not in git |" in text


# ---- whole


CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "on the hub": {},
    "signed": {"key": KEY},
    "no description": {},
    "own text": {},
    "no baseline": {"baseline": False},
    "no plots": {"plots": {}},
    "adapter only": {},
    "merged only": {},
    "no git": {"commit": None, "dirty": ("(no git)",)},
    "dirty": {"dirty": ("a",)},
    "no licence": {},
    "nothing dropped": {},
    "nothing measured": {},
}


@pytest.mark.parametrize("case", CASES)
def test_no_section_is_empty(root, case):
    recipes: dict[str, dict[str, Any]] = {
        "on the hub": {"promote": HUB},
        "no description": {"description": ""},
        "own text": {"promote": {"to": "directory", "card": "recipes/x.md"}},
        "adapter only": {"promote": {"to": "directory", "merged": False}},
        "merged only": {"promote": {"to": "directory", "adapter": False}},
    }
    if case in recipes:
        built.write(root / "recipes/x.md", "It is small.\n")
        change_recipe(root, **recipes[case])
    elif case == "no licence":
        (root / BASE / "README.md").unlink()
    elif case == "nothing dropped":
        counts = {"rows": {"in": 8, "out": 8, "train": 8, "held_out": 0}, "dropped": {"empty": 0}}
        built.edit(root / "build/x/prepare.json", lambda metrics: metrics.update(counts))
    elif case == "nothing measured":
        built.write_json(root / "build/x/evaluate.json", {})
    text = card(root, **CASES[case])
    for title in titles(text):
        assert len(section(text, title)) > 20, title
    assert not re.search(r"\n\n\n|\n\n```\n\n|[^|][ \t]\n", text)
    assert not re.search(r"None|Undefined|null|\{\{|\}\}|\{%|%\}", text)
    assert re.search(r"[^\n]\n\Z", text)
    body = text[text.index("\n---\n", 4) + 5 :]
    # A table, a picture and a heading need an empty line above them.
    assert not re.search(r"\n[^|\n][^\n]*\n(\||!\[|#{1,2} )", re.sub(r"```.*?```", "", body, flags=re.DOTALL))
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


@pytest.mark.parametrize(
    ("value", "text"), [(0.63742, "0.6374"), (26312.0, "26312"), (1e-05, "1e-05"), (-47.26149, "-47.26"), (3, "3")]
)
def test_a_number_is_short(value, text):
    assert number(value) == text
