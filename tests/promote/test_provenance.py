"""Facts of a promotion, and the statement made from them: true, whole, in the standards' form, and nothing private."""

import copy
import getpass
import json
import shutil
import socket
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from prefbuild.artifact import digest_of, list_files, sha256_file
from prefbuild.promote.provenance import facts_of, gather, public_path, public_url, source_state, statement
from prefbuild.promote.publishable import find_secret
from tests import built
from tests.built import BASE, git

BUILD = "sha256:" + "b" * 64
KEY = "c" * 64
IMAGE = "sha256:" + "d" * 64
COMMIT = "e" * 40


def read(path: Path) -> dict:
    return dict(json.loads(path.read_text()))


def make_facts(root: Path, key: str | None = KEY) -> dict:
    gate = read(root / "build/x/gate.json")
    source = source_state(root, "x")
    return gather(
        root, "x", version="v3", build=BUILD, resolved=built.resolved(root), gate=gate, source=source, key=key
    )


def make_files(root: Path) -> dict:
    """The merged model's files, with the digests that git gives them."""
    files = list_files(root / "build/x/merged")
    for path, entry in files.items():
        entry["gitBlob"] = git(root, "hash-object", f"build/x/merged/{path}").strip()
    return files


def make_metrics(root: Path) -> dict:
    return {"evaluate": read(root / "build/x/evaluate.json"), "baseline": read(root / built.BASELINE / "metrics.json")}


def make(root: Path, facts: dict | None = None) -> dict:
    return statement(facts or make_facts(root), make_files(root), make_metrics(root))


def definition(made: dict) -> dict:
    return dict(made["predicate"]["buildDefinition"])


def dependencies(made: dict) -> dict[str, dict]:
    """By name; none has the name of another."""
    found = definition(made)["resolvedDependencies"]
    by_name = {entry["name"]: entry for entry in found}
    assert len(by_name) == len(found)
    return by_name


def edit_resolved(root: Path, path: str, change) -> None:
    built.edit(root / path, change)


# ---- the form


def test_the_statement_is_valid_in_toto_and_slsa(root):
    made = make(root)
    parsed = json_format.ParseDict(made, StatementMessage())  # refuses unknown fields
    Statement.copy_from_pb(parsed).validate()
    slsa = json_format.ParseDict(made["predicate"], Provenance())
    assert slsa.build_definition.build_type == "urn:prefbuild:build:v1"
    assert slsa.run_details.builder.id == "urn:prefbuild:promote:v1"
    assert slsa.build_definition.external_parameters["name"] == "x"
    assert slsa.run_details.metadata.invocation_id == BUILD
    assert made["predicate"]["runDetails"]["metadata"]["finishedOn"].endswith("Z")
    for entry in slsa.build_definition.resolved_dependencies:
        assert entry.digest


def test_a_statement_without_subjects_is_not_valid(root):
    made = {**make(root), "subject": []}
    with pytest.raises(ValueError, match="At least one subject required"):
        Statement.copy_from_pb(json_format.ParseDict(made, StatementMessage())).validate()


def test_its_subjects_are_the_files_with_both_digests(root):
    made = make(root)
    folder = root / "build/x/merged"
    assert [subject["name"] for subject in made["subject"]] == sorted(list_files(folder))
    for subject in made["subject"]:
        assert subject["digest"] == {
            "sha256": sha256_file(folder / subject["name"]),
            "gitBlob": git(root, "hash-object", f"build/x/merged/{subject['name']}").strip(),
        }


def test_a_digest_that_is_not_known_is_left_out(root):
    made = statement(make_facts(root), {"a": {"size": 1, "sha256": "0" * 64}}, make_metrics(root))
    assert made["subject"] == [{"name": "a", "digest": {"sha256": "0" * 64}}]


def test_facts_come_back_from_the_statement(root):
    facts = make_facts(root)
    keys = ("name", "version", "build", "artifact", "adapter", "git_commit", "dirty", "time", "key")
    assert facts_of(make(root, facts)) == {key: facts[key] for key in keys}


def test_facts_come_back_of_an_unsigned_build_without_git(root):
    shutil.rmtree(root / ".git")
    facts = make_facts(root, key=None)
    files = {"a": {"size": 1, "sha256": "0" * 64}}
    back = facts_of(statement(facts, files, make_metrics(root)))
    assert (back["git_commit"], back["key"], back["dirty"]) == (None, None, facts["dirty"])
    assert facts["dirty"]


def test_the_same_facts_give_the_same_statement(root):
    facts = make_facts(root)
    assert json.dumps(make(root, facts)) == json.dumps(make(root, copy.deepcopy(facts)))


# ---- what it says


def test_what_it_was_made_from_has_digests(root):
    made = make(root)
    found = dependencies(made)
    assert found["git"]["digest"] == {"gitCommit": git(root, "rev-parse", "HEAD").strip()}
    for path in ("recipes/x.yaml", "params.yaml", "prefbuild.lock.yaml", "recipes/tasks/concise.jsonl"):
        assert found[path]["digest"] == {"sha256": sha256_file(root / path)}
    for path in (root / "models/tiny").iterdir():
        entry = found[f"{BASE}/{path.name}"]
        assert entry["digest"] == {"sha256": sha256_file(path)}
        assert entry["annotations"] == {"title": "models/tiny"}
    (data,) = (path for path in make_facts(root)["lock"]["entries"] if path != BASE)
    assert found[f"{data}/train.jsonl"]["digest"] == {"sha256": sha256_file(root / "recipes/rows/train.jsonl")}
    assert found["base model"]["digest"] == {"sha256": built.digest(root, BASE).removeprefix("sha256:")}
    assert found["recipes/tasks/concise.yaml"]["annotations"] == {"task": "concise"}


def test_a_reward_model_that_scored_completions_is_named_with_its_digest(root):
    facts = make_facts(root)
    facts["made_from"]["adapter"]["reward_models"] = {"build/judge/merged": "sha256:" + "7" * 64}
    found = {one["name"]: one for one in definition(make(root, facts))["resolvedDependencies"]}
    assert found["build/judge/merged"]["digest"] == {"sha256": "7" * 64}


def test_rewards_of_the_users_have_digests(root):
    resolved = built.resolved(root)
    resolved["train"]["settings"]["rewards"] = [{"path": "recipes/x/reward.py", "sha256": "4" * 64, "size": 9}]
    gate, source = read(root / "build/x/gate.json"), source_state(root, "x")
    facts = gather(root, "x", version="v3", build=BUILD, resolved=resolved, gate=gate, source=source)
    entry = dependencies(make(root, facts))["recipes/x/reward.py"]
    assert (entry["digest"], entry["annotations"]) == ({"sha256": "4" * 64}, {"reward": True})


def test_parameters_name_recipe_settings_and_tools(root):
    facts = make_facts(root)
    parameters = definition(make(root, facts))
    assert parameters["externalParameters"]["recipe"] == {
        "path": "recipes/x.yaml",
        "sha256": sha256_file(root / "recipes/x.yaml"),
    }
    known = parameters["internalParameters"]
    resolved = built.resolved(root)
    assert (known["version"], known["method"], known["seed"]) == ("v3", "dpo", 42)
    assert known["settings"]["train"] == digest_of(resolved["train"]["settings"])
    assert set(known["settings"]) == {"prepare", "reference", "train", "merge", "evaluate", "gate", "promote"}
    assert known["trained_on"] == {"cpu": "test"}
    assert known["evaluated_with"]["lm_eval"] == "0.4.13"
    assert known["made_from"]["adapter"]["reference_log_probs"] == built.digest(root, "build/x/reference")
    assert known["made_from"]["reference_log_probs"]["prepared"] == built.digest(root, "build/x/prepared")
    assert known["made_from"]["merged"]["adapter"] == known["adapter"] == built.digest(root, "build/x/adapter")


def test_byproducts_are_verdict_metrics_and_dvc_lock(root):
    verdict, metrics, lock = make(root)["predicate"]["runDetails"]["byproducts"]
    gate = read(root / "build/x/gate.json")
    assert verdict["digest"] == {"sha256": sha256_file(root / "build/x/gate.json")}
    assert verdict["annotations"]["passed"] is True
    assert [rule["says"] for rule in verdict["annotations"]["rules"]] == [rule["says"] for rule in gate["rules"]]
    assert verdict["annotations"]["judged"] == gate["judged"]
    assert metrics["annotations"]["evaluate"]["concise"]["exact_match"] == 0.75
    assert metrics["annotations"]["baseline"]["concise"]["exact_match"] == 0.45
    assert lock == {
        "name": "pipelines/x/dvc.lock",
        "digest": {"sha256": sha256_file(root / "pipelines/x/dvc.lock")},
    }


def test_files_of_the_hub_and_of_wheels_have_addresses(root):
    facts = make_facts(root)
    file = {"path": "data/a b.jsonl", "sha256": "1" * 64, "size": 1}
    hub = {"source": "hub", "repo": "org/name", "revision": "main", "files": None}
    wheel = {"source": "wheel", "package": "rows", "version": "1.0+cpu", "path": "rows/a.jsonl"}
    facts["lock"]["entries"] = {
        "build/models/m": {"source": {**hub, "dtype": "bfloat16"}, "files": [file], "commit": COMMIT},
        "build/data/d": {"source": hub, "files": [file], "commit": COMMIT},
        "build/data/w": {
            "source": wheel,
            "files": [{"path": "a.jsonl", "sha256": "2" * 64, "size": 1}],
            "wheel": {"filename": "rows-1.0-py3-none-any.whl", "sha256": "3" * 64},
        },
    }
    found = dependencies(make(root, facts))
    model = found["build/models/m/data/a b.jsonl"]
    assert model["uri"] == f"hf://org/name@{COMMIT}/data/a%20b.jsonl"
    assert model["annotations"] == {"title": "org/name@main", "commit": COMMIT}
    assert found["build/data/d/data/a b.jsonl"]["uri"] == f"hf://datasets/org/name@{COMMIT}/data/a%20b.jsonl"
    assert found["build/data/w/a.jsonl"]["uri"] == "pkg:pypi/rows@1.0%2Bcpu#rows/a.jsonl"
    assert found["rows-1.0-py3-none-any.whl"]["digest"] == {"sha256": "3" * 64}


def test_images_are_named_with_role_and_use(root):
    def pin(sections):
        sections["compute"]["repo_digest"] = f"registry.example.org/p@{IMAGE}"
        for stage in ("train", "evaluate"):
            sections[stage]["image"] = IMAGE

    edit_resolved(root, "build/.resolved/x.json", pin)
    edit_resolved(root, f"build/.resolved/models/{Path(BASE).name}.json", lambda s: s["model"].update(image="sha256:1"))
    built.edit(root / "build/x/train.json", lambda metrics: metrics["machine"].update(image=IMAGE))
    facts = make_facts(root)
    role = built.resolved(root)["compute"]["role"]
    assert {"role": role, "id": IMAGE, "repo_digest": f"registry.example.org/p@{IMAGE}"} in facts["images"]
    assert {"role": role, "id": "sha256:1", "repo_digest": None} in facts["images"]
    facts["images"] = [image for image in facts["images"] if image["id"] == IMAGE]
    entry = dependencies(make(root, facts))[f"image {role}"]
    assert entry["digest"] == {"sha256": "d" * 64}
    assert entry["annotations"] == {
        "role": role,
        "used": ["trained_on"],
        "repo_digest": f"registry.example.org/p@{IMAGE}",
    }


def test_without_an_image_there_is_none(root):
    assert make_facts(root)["images"] == []


# ---- what it does not say


def test_nothing_of_this_machine_is_in_it(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    git(root, "remote", "add", "origin", "https://someone:hunter2secret@git.example.org/team/models.git?token=abc")
    outside = tmp_path / "private-folder" / "rows.jsonl"
    facts = make_facts(root)
    (data,) = (pins for path, pins in facts["lock"]["entries"].items() if path != BASE)
    data["source"]["path"] = str(outside)
    text = json.dumps(make(root, facts))
    assert "git+https://git.example.org/team/models.git@" in text
    assert "rows.jsonl" in text
    private = [str(tmp_path), "private-folder", "someone", "hunter2secret", "token=abc", socket.gethostname()]
    for word in [*private, str(Path.home()) + "/", f"/{getpass.getuser()}/"]:
        assert word not in text
    assert find_secret(text.encode()) is None


def test_gits_own_words_lose_their_paths(root):
    shutil.rmtree(root / ".git")
    (root / ".git").write_text("gitdir: /home/me/repository\n")
    assert source_state(root, "x").dirty == ["(fatal: not a git repository: /home/me/repository)"]
    assert make_facts(root)["dirty"] == ["(fatal: not a git repository: ...)"]


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://github.com/owner/name.git", "https://github.com/owner/name.git"),
        ("https://user:secret@github.com:8443/owner/name", "https://github.com:8443/owner/name"),
        ("https://x-access-token:ghp_abc@github.com/o/n?a=b#c", "https://github.com/o/n"),
        ("ssh://git@example.org:22/o/n.git", "ssh://example.org:22/o/n.git"),
        ("git@github.com:owner/name.git", "ssh://github.com/owner/name.git"),
        ("example.org:owner/name", "ssh://example.org/owner/name"),
        ("https://user:pass/word@github.com/o/n", None),
        ("https://user:pass?word@github.com/o/n", None),
        ("https://user:1234?5@github.com/o/n", None),
        ("https://user:1234/5@github.com/o/n", None),
        ("https://user:1234#5@github.com/o/n", None),
        ("https://user:pass#word@github.com/o/n", None),
        ("/home/me/models", None),
        ("../models", None),
        ("file:///home/me/models", None),
        ("me@host:/home/me/models", None),
        ("me@host:~/models", None),
        ("ext::sh -c x", None),
        ("https://[broken/o", None),
        ("", None),
    ],
)
def test_a_remote_is_published_without_users_and_passwords(url, public):
    assert public_url(url) == public


@pytest.mark.parametrize(
    ("path", "public"),
    [("recipes/a.jsonl", "recipes/a.jsonl"), ("/home/me/a.jsonl", "a.jsonl"), ("../b/a.jsonl", "a.jsonl"),
     ("~/a.jsonl", "a.jsonl"), ("/home/me/model/", "model")],
)  # fmt: skip
def test_a_path_outside_of_the_project_loses_its_folders(path, public):
    assert public_path(path) == public


def test_what_this_user_makes_of_urls_is_not_published(root):
    git(root, "remote", "add", "origin", "https://github.com/o/n")
    git(root, "config", "url.https://x-access-token:secret@mirror.internal/.insteadOf", "https://github.com/")
    assert "mirror.internal" in git(root, "remote", "get-url", "origin")
    assert make_facts(root)["git_remote"] == "https://github.com/o/n"


def test_without_a_remote_there_is_no_address(root):
    assert make_facts(root)["git_remote"] is None
    assert "uri" not in dependencies(make(root))["git"]


# ---- what is refused on the way back


def broken(made: dict, change) -> str:
    made = copy.deepcopy(made)
    change(made)
    with pytest.raises(ValueError) as error:
        facts_of(made)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(_type="x"), "is no in-toto statement v1 with https://slsa.dev/provenance/v1"),
        (lambda s: s.update(predicateType="x"), "is no in-toto statement v1 with https://slsa.dev/provenance/v1"),
        (lambda s: s.pop("predicate"), "lacks predicate"),
        (lambda s: s.update(predicate=[]), "is not built like a statement"),
        (lambda s: definition(s)["internalParameters"].pop("adapter"), "lacks adapter"),
        (lambda s: definition(s)["internalParameters"].update(version="v0"), "its version has another form: 'v0'"),
        (lambda s: definition(s)["internalParameters"].update(version=3), "its version has another form: '3'"),
        (lambda s: definition(s)["internalParameters"].update(artifact=None), "its artifact has another form: 'None'"),
        (lambda s: definition(s)["internalParameters"].update(dirty="a"), "its dirty is no list of paths"),
        (lambda s: definition(s)["externalParameters"].update(name="../y"), "its name has another form: '../y'"),
        (lambda s: s["predicate"]["runDetails"]["metadata"].update(finishedOn=1), "is not built like a statement"),
        (lambda s: s.update(subject=[]), "is about no file"),
        (lambda s: s["subject"].append(s["subject"][0]), "names the file 'chat_template.jinja' twice"),
        (lambda s: s["subject"][0].update(name="../../etc/passwd"), "which is no path below the published folder"),
        (lambda s: s["subject"][0].update(name="/etc/passwd"), "which is no path below the published folder"),
        (lambda s: s["subject"][0].update(name="a//b"), "which is no path below the published folder"),
        (lambda s: s["subject"][0].update(name="a\nb"), "or it is no file's name"),
        (lambda s: s["subject"][0].update(digest={}), "has no digest of chat_template.jinja"),
        (lambda s: s["subject"][0].update(digest={"sha256": "zz"}), "has no digest of chat_template.jinja"),
        (lambda s: s["subject"][0].update(digest={"md5": "0" * 32}), "has no digest of chat_template.jinja"),
    ],
)
def test_a_statement_of_another_form_is_refused(root, change, says):
    made = make(root)
    facts_of(made)
    assert says in broken(made, change)


def test_another_build_type_is_refused(root):
    assert "its buildType is not urn:prefbuild:build:v1" in broken(make(root), lambda s: s["predicate"].update(
        buildDefinition={**definition(s), "buildType": "urn:prefbuild:build:v2"}))  # fmt: skip
