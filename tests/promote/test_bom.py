"""The ML-BOM: valid CycloneDX 1.6, and true."""

import copy
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from prefbuild.artifact import sha256_file
from prefbuild.methods import METHODS
from prefbuild.promote.bom import bom
from tests import built
from tests.built import BASE
from tests.promote.test_provenance import COMMIT, IMAGE, make_facts, make_files, make_metrics


def make(root: Path, facts: dict | None = None, **changes) -> dict:
    about = {"base": "org/tiny", "license": "apache-2.0", "description": "Answers\n in one word.", **changes}
    return bom(facts or make_facts(root), make_files(root), make_metrics(root), **about)


def problem(made: dict) -> str | None:
    """What CycloneDX's own validator says, None when all is well."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made))
    return None if error is None else repr(error)


def parts(made: dict, kind: str) -> dict[str, dict]:
    return {part["name"]: part for part in made["components"] if part["type"] == kind}


def references(value) -> list[str]:
    """Every bom-ref of a document."""
    if isinstance(value, list):
        return [ref for item in value for ref in references(item)]
    if isinstance(value, dict):
        own = [value["bom-ref"]] if "bom-ref" in value else []
        return own + [ref for item in value.values() for ref in references(item)]
    return []


def properties(part: dict) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in part["properties"]}


def test_it_is_valid(root):
    assert problem(make(root)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made["metadata"]["component"]["modelCard"]["modelParameters"]["approach"].update(type="dpo"),
        lambda made: made["metadata"]["component"].update(unknown=1),
        lambda made: made.update(serialNumber="x"),
        lambda made: made["components"][0].pop("name"),
    ],
)
def test_the_validator_finds_what_is_broken(root, change):
    made = make(root)
    change(made)
    assert problem(made)


def test_it_is_valid_with_everything_the_facts_can_hold(root):
    facts = make_facts(root)
    facts["git_remote"] = "https://example.org/o/n.git"
    facts["trained_on"] = {
        "image": IMAGE, "device": "NVIDIA H200", "threads": "8", "precision": "bf16", "python": "3.11.7",
        "torch": "2.13.0+cu130", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2",
    }  # fmt: skip
    facts["images"] = [
        {"role": "cuda", "id": IMAGE, "repo_digest": f"registry.example.org:5000/p@{IMAGE}"},
        {"role": "cpu", "id": IMAGE.replace("d", "e"), "repo_digest": None},
    ]
    file = {"path": "data/a b.jsonl", "sha256": "1" * 64, "size": 1}
    hub = {"source": "hub", "repo": "org/name", "revision": "main", "files": None}
    wheel = {"source": "wheel", "package": "rows", "version": "1.0+cpu", "path": "rows/a.jsonl"}
    pinned_wheel = {"filename": "rows-1.0-py3-none-any.whl", "sha256": "3" * 64}
    facts["lock"]["entries"] = {
        "build/models/m": {"source": {**hub, "dtype": "bfloat16"}, "files": [file], "commit": COMMIT},
        "build/data/d": {"source": hub, "files": [file], "commit": COMMIT},
        "build/data/w": {"source": wheel, "files": [file], "wheel": pinned_wheel},
    }
    facts["rewards"] = [{"path": "recipes/x/reward.py", "sha256": "4" * 64, "size": 9}]
    made = make(root, facts)
    assert problem(made) is None
    (reward,) = parts(made, "file").values()
    assert (reward["name"], reward["hashes"][0]["content"]) == ("recipes/x/reward.py", "4" * 64)
    (base,) = parts(made, "machine-learning-model").values()
    assert (base["purl"], base["version"]) == (f"pkg:huggingface/org/name@{COMMIT}", COMMIT)
    data = parts(made, "data")
    assert data["org/name@main"]["version"] == COMMIT
    assert data["org/name@main"]["data"][0]["contents"] == {"url": f"hf://datasets/org/name@{COMMIT}"}
    assert data["rows==1.0+cpu/rows/a.jsonl"]["purl"] == "pkg:pypi/rows@1.0%2Bcpu"
    assert set(parts(made, "container")) == {"registry.example.org:5000/p", "cpu"}
    assert set(parts(made, "device")) == {"NVIDIA H200"}
    assert parts(made, "platform")["python"]["version"] == "3.11.7"
    assert set(parts(made, "library")) == {"torch", "transformers", "trl", "peft", "lm_eval"}
    torch = [part["purl"] for part in made["components"] if part["name"] == "torch"]
    assert torch == ["pkg:pypi/torch@2", "pkg:pypi/torch@2.13.0%2Bcu130"]  # trained and measured with different ones
    assert {"type": "vcs", "url": "https://example.org/o/n.git"} in made["metadata"]["component"]["externalReferences"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_an_approach_that_cyclonedx_knows(root, method):
    made = make(root, make_facts(root) | {"method": method})
    assert problem(made) is None
    approach = made["metadata"]["component"]["modelCard"]["modelParameters"]["approach"]["type"]
    assert approach == ("reinforcement-learning" if method in ("grpo", "rloo") else "supervised")


def test_every_reference_is_unique_and_leads_somewhere(root):
    made = make(root)
    found = references(made)
    assert len(found) == len(set(found))
    graph = {entry["ref"]: entry["dependsOn"] for entry in made["dependencies"]}
    assert sorted(graph["model"]) == sorted(part["bom-ref"] for part in made["components"])
    assert set(graph) <= set(found)
    datasets = made["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]
    assert {entry["ref"] for entry in datasets} == {part["bom-ref"] for part in parts(made, "data").values()}


def test_the_model_names_build_and_files(root):
    facts = make_facts(root)
    model = make(root, facts)["metadata"]["component"]
    assert (model["name"], model["version"], model["description"]) == ("x", "v3", "Answers in one word.")
    assert properties(model) == {
        "prefbuild:build": facts["build"],
        "prefbuild:artifact": facts["artifact"],
        "prefbuild:adapter": facts["adapter"],
        "prefbuild:git_commit": facts["git_commit"],
        "prefbuild:method": "dpo",
        "prefbuild:seed": "42",
    }
    hashes = {part["name"]: part["hashes"] for part in model["components"]}
    assert hashes == {
        path: [{"alg": "SHA-256", "content": entry["sha256"]}] for path, entry in make_files(root).items()
    }


def test_base_data_tasks_and_packages_are_there_with_digests(root):
    made = make(root)
    (base,) = parts(made, "machine-learning-model").values()
    assert base["name"] == "org/tiny"
    assert properties(base)["prefbuild:artifact"] == built.digest(root, BASE)
    assert {part["name"]: part["hashes"][0]["content"] for part in base["components"]} == {
        path.name: sha256_file(path) for path in (root / "models/tiny").iterdir()
    }
    data = parts(made, "data")
    assert set(data) == {"recipes/rows/train.jsonl", "concise", "sense"}
    (rows,) = data["recipes/rows/train.jsonl"]["components"]
    assert rows["hashes"][0]["content"] == sha256_file(root / "recipes/rows/train.jsonl")
    assert parts(made, "library")["lm_eval"]["purl"] == "pkg:pypi/lm-eval@0.4.13"


def test_metrics_of_model_and_base_have_intervals(root):
    made = make(root)

    def scores(part: dict) -> dict:
        metrics = part["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
        return {(entry["slice"], entry["type"]): entry for entry in metrics}

    ours = scores(made["metadata"]["component"])
    assert ours["concise", "exact_match"]["value"] == "0.75"
    interval = ours["concise", "exact_match"]["confidenceInterval"]
    assert interval == {"lowerBound": "0.652002", "upperBound": "0.847998"}  # 0.75 ± 1.96 * 0.05
    assert "confidenceInterval" not in ours["concise", "corpus"]
    assert not any(metric == "n" or metric.endswith("_stderr") for _, metric in ours)
    (base,) = parts(made, "machine-learning-model").values()
    assert scores(base)["concise", "exact_match"]["value"] == "0.45"


def test_without_a_baseline_the_base_has_no_card(root):
    facts = make_facts(root)
    metrics = {**make_metrics(root), "baseline": {}}
    made = bom(facts, make_files(root), metrics, base="org/tiny", license=None, description="")
    (base,) = parts(made, "machine-learning-model").values()
    assert "modelCard" not in base and "licenses" not in made["metadata"]["component"]
    assert problem(made) is None


def test_a_base_that_is_another_recipes_model_has_its_digest_alone(root):
    facts = make_facts(root)
    del facts["lock"]["entries"][BASE]
    made = make(root, facts, base="build/y/merged")
    (base,) = parts(made, "machine-learning-model").values()
    assert "components" not in base and properties(base)["prefbuild:artifact"] == built.digest(root, BASE)
    assert problem(made) is None


@pytest.mark.parametrize(
    ("license", "listed"),
    [
        ("apache-2.0", {"expression": "Apache-2.0"}),
        ("mit OR apache-2.0", {"expression": "MIT OR Apache-2.0"}),
        ("llama3", {"license": {"name": "llama3"}}),
    ],
)
def test_a_license_is_an_spdx_expression_or_a_name(root, license, listed):
    made = make(root, license=license)
    assert made["metadata"]["component"]["licenses"] == [listed]
    assert problem(made) is None


def test_the_same_facts_give_the_same_document(root):
    facts = make_facts(root)
    made = make(root, facts)
    assert json.dumps(made) == json.dumps(make(root, copy.deepcopy(facts)))
    other = {**facts, "build": "sha256:" + "a" * 64}
    assert make(root, other)["serialNumber"] != made["serialNumber"]


def test_no_folder_of_this_machine_is_in_it(root, tmp_path):
    facts = make_facts(root)
    for pins in facts["lock"]["entries"].values():
        pins["source"]["path"] = f"{tmp_path}/private-folder/rows"
    text = json.dumps(make(root, facts, base=f"{tmp_path}/private-folder/tiny"))
    assert str(tmp_path) not in text and "private-folder" not in text
