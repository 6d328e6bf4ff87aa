"""The ML-BOM of a published version: CycloneDX 1.6, what the model is made of and how well it does.

    bom(facts, files, metrics, base=.., license=.., description=..) -> the document, the same for the same facts

Covered: the published files, the base, the data it was trained and measured on, rewards, packages, device and images. Not
covered: packages below those that prefbuild records; an image's own contents.
"""

import uuid
from statistics import NormalDist
from typing import Any
from urllib.parse import quote

from prefbuild.gates import trained_role
from prefbuild.methods import SHAPES
from prefbuild.promote.provenance import public_path, public_title, uri_of

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
# CycloneDX knows five approaches: what learns from rewards for its own answers is one, what learns from rows another.
APPROACH = {
    method: "reinforcement-learning" if shape == "prompts" else "supervised" for method, shape in SHAPES.items()
}
# What facts record of a stage that is no package on the index.
PLATFORM, DEVICE, SETTINGS = "python", ("cpu", "device"), ("threads", "precision", "dtype", "image")
CONFIDENCE = 0.95
MODEL, BASE = "model", "base"  # bom-refs

Files = dict[str, dict[str, Any]]


def bom(
    facts: dict[str, Any],
    files: Files,
    metrics: dict[str, Any],
    *,
    base: str,
    license: str | None,
    description: str,
) -> dict[str, Any]:
    """The ML-BOM as JSON. `metrics` as metrics.json keeps them; `files` as in provenance.statement."""
    data = [_data(node, pins) for node, pins in facts["lock"]["entries"].items() if not _is_model(pins)]
    tasks = [_task(task) for task in facts["tasks"]]
    rewards = [_reward(file) for file in facts["rewards"]]
    parts = [_base(facts, base, metrics["baseline"]), *data, *tasks, *rewards, *_tools(facts), *_images(facts)]
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": facts["name"],
        "version": facts["version"],
        "description": " ".join(description.split()),
        **({"licenses": [_license(license)]} if license else {}),
        "externalReferences": _references(facts),
        "properties": _properties(
            build=facts["build"],
            artifact=facts["artifact"],
            **{trained_role(facts): facts[trained_role(facts)]},
            git_commit=facts["git_commit"],
            method=facts["method"],
            seed=facts["seed"],
        ),
        "components": [_file(MODEL, path, entry["sha256"]) for path, entry in sorted(files.items())],
        "modelCard": _card(facts, metrics["evaluate"], [part["bom-ref"] for part in (*data, *tasks)]),
    }
    needs = sorted(part["bom-ref"] for part in parts)
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'urn:prefbuild:' + facts['build'])}",
        "version": 1,
        "metadata": {
            "timestamp": facts["time"],
            "lifecycles": [{"phase": "build"}],
            "tools": {
                "components": [
                    {"type": "application", "name": "prefbuild", "version": facts["promoted_with"]["prefbuild"]}
                ]
            },
            "component": model,
        },
        "components": parts,
        "dependencies": [{"ref": MODEL, "dependsOn": needs}, *({"ref": ref, "dependsOn": []} for ref in needs)],
    }


def _card(facts: dict[str, Any], scores: dict[str, Any], datasets: list[str]) -> dict[str, Any]:
    return {
        "modelParameters": {
            "approach": {"type": APPROACH[facts["method"]]},
            "task": "text-generation",
            "datasets": [{"ref": ref} for ref in datasets],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        **_analysis(scores),
    }


def _analysis(scores: dict[str, Any]) -> dict[str, Any]:
    """Every metric of every task, with an interval where its standard error is known."""
    found = []
    width = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    for task, metrics in scores.items():
        for metric, value in sorted(metrics.items()):
            if metric == "n" or metric.endswith("_stderr") or not _is_number(value):
                continue
            entry: dict[str, Any] = {"type": metric, "value": repr(value), "slice": task}
            stderr = metrics.get(f"{metric}_stderr")
            if _is_number(stderr):
                low, high = value - width * stderr, value + width * stderr
                entry["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
            found.append(entry)
    if not found:
        return {}
    return {
        "quantitativeAnalysis": {"performanceMetrics": found},
        "properties": _properties(confidence=CONFIDENCE),
    }


def _base(facts: dict[str, Any], name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """The base, whose files are pinned, or whose digest is known where it is another recipe's model."""
    pins = next((pins for pins in facts["lock"]["entries"].values() if _is_model(pins)), None)
    card = _analysis(scores)
    return {
        "type": "machine-learning-model",
        "bom-ref": BASE,
        "name": public_path(name),
        **(_pinned(BASE, pins) if pins else {}),
        "properties": _properties(artifact=facts["made_from"]["prepared"]["model"]),
        **({"modelCard": card} if card else {}),
    }


def _data(node: str, pins: dict[str, Any]) -> dict[str, Any]:
    title = public_title(pins["source"])
    uri = uri_of(pins)
    contents = {"contents": {"url": uri}} if uri else {}
    return {
        "type": "data",
        "bom-ref": node,
        "name": title,
        **_pinned(node, pins),
        "data": [{"type": "dataset", "name": title, **contents}],
    }


def _task(task: dict[str, Any]) -> dict[str, Any]:
    ref = f"task {task['key']}"
    return {
        "type": "data",
        "bom-ref": ref,
        "name": task["name"],
        "description": "What the model was measured on.",
        "components": [_file(ref, file["path"], file["sha256"]) for file in task["files"]],
        "data": [{"type": "dataset", "name": task["name"]}],
    }


def _reward(file: dict[str, Any]) -> dict[str, Any]:
    path = file["path"]
    about = "A function that scored completions while the model was trained."
    return {**_file(f"reward {path}", path, file["sha256"]), "bom-ref": f"reward {path}", "description": about}


def _pinned(ref: str, pins: dict[str, Any]) -> dict[str, Any]:
    """Version, address and files of what the lock pinned."""
    source = pins["source"]
    found: dict[str, Any] = {"components": [_file(ref, file["path"], file["sha256"]) for file in pins["files"]]}
    if source["source"] == "hub":
        found["version"] = pins["commit"]
        if _is_model(pins):  # the purl type huggingface is for models
            found["purl"] = f"pkg:huggingface/{source['repo']}@{pins['commit']}"
    elif source["source"] == "wheel":
        found |= {"version": source["version"], "purl": uri_of(pins)}
        found["hashes"] = _hashes(pins["wheel"]["sha256"])
    return found


def _tools(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Packages, interpreter and device, each version once."""
    found: dict[str, dict[str, Any]] = {}
    for stage in ("trained_on", "evaluated_with", "promoted_with"):
        for name, version in facts[stage].items():
            if name in SETTINGS or name == "prefbuild":  # it is among the metadata's tools
                continue
            if name in DEVICE:
                part = {"type": "device", "bom-ref": f"device {version}", "name": version}
            elif name == PLATFORM:
                part = {"type": "platform", "bom-ref": f"{name} {version}", "name": name, "version": version}
            else:
                purl = f"pkg:pypi/{name.replace('_', '-').lower()}@{quote(version)}"
                part = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
            found.setdefault(part["bom-ref"], part)
    return [found[ref] for ref in sorted(found)]


def _images(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "type": "container",
            "bom-ref": f"image {image['role']} {image['id']}",
            "name": (image["repo_digest"] or image["role"]).partition("@")[0],
            "version": image["id"],
            "hashes": _hashes(image["id"]),
            "properties": _properties(role=image["role"], repo_digest=image["repo_digest"]),
        }
        for image in facts["images"]
    ]


def _references(facts: dict[str, Any]) -> list[dict[str, Any]]:
    here = [{"type": "model-card", "url": "README.md"}]
    here.append({"type": "attestation", "url": "prefbuild/provenance.intoto.jsonl"})
    return here + ([{"type": "vcs", "url": facts["git_remote"]}] if facts["git_remote"] else [])


def _license(text: str) -> dict[str, Any]:
    """An SPDX expression where it is one, else the name as it was given."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return {"expression": str(canonicalize_license_expression(text))}
    except InvalidLicenseExpression:
        return {"license": {"name": text}}


def _file(ref: str, path: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"{ref}#{path}", "name": path, "hashes": _hashes(sha256)}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256.removeprefix("sha256:")}]


def _properties(**values: Any) -> list[dict[str, str]]:
    return [{"name": f"prefbuild:{key}", "value": str(value)} for key, value in values.items() if value is not None]


def _is_model(pins: dict[str, Any]) -> bool:
    return "dtype" in pins["source"]  # as only a base model has one


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
