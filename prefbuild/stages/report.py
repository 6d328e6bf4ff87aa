"""One page that shows every recipe's verdict and what it rests on.

Covered: every file the page shows is there and says what the others say; otherwise StageError, never a page that lacks
something. Not covered: digests, which the gate has checked.
"""

import csv
import json
from pathlib import Path
from typing import Any

from prefbuild.artifact import MANIFEST, read_json, write_atomic
from prefbuild.errors import StageError
from prefbuild.report.page import MAY_LACK, Built, Measured, curve_names, render


def run(settings: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Path], work: Path, name: str) -> None:
    """Write index.html into `report`: one file, without network or scripts, the same bytes from the same build.

    Raises StageError naming every file that is missing, or the first that is not what it should be.
    """
    builds = []
    for recipe in settings["recipes"]:
        gate = next(path for path in inputs[recipe] if path.name == "gate.json")
        method = settings["methods"][recipe]
        baseline = settings["baselines"].get(recipe)  # a reward model has none
        builds.append((recipe, method, gate.parent, Path(baseline) if baseline else None))
    missing = [str(path) for _, *build in builds for path in needed(*build) if not path.exists()]
    if missing:
        raise StageError(f"{', '.join(dict.fromkeys(missing))}: missing, so the report would lack it; run `dvc repro`")
    page = render([read_build(*build) for build in builds])
    write_atomic(outputs["report"] / "index.html", page)


def needed(method: str, folder: Path, baseline: Path | None) -> list[Path]:
    """Every file the page of a recipe is made of, but for curves that a run may lack."""
    files = [folder / f"{stage}.json" for stage in ("gate", "prepare", "train", "merge")] + [folder / "lengths.csv"]
    files += [_curve_path(folder, curve) for curve in curve_names(method) if curve not in MAY_LACK.get(method, ())]
    if baseline is None:
        return files
    files += [folder / "evaluate.json", folder / "evaluate" / MANIFEST, baseline / MANIFEST]
    for path in _measurements(folder):
        files += [path.with_suffix(".jsonl"), baseline / path.name, baseline / f"{path.stem}.jsonl"]
    return files


def read_build(recipe: str, method: str, folder: Path, baseline: Path | None) -> Built:
    """All that is shown of one recipe. StageError when files contradict each other."""
    gate, rows = (read_json(folder / f"{stage}.json") for stage in ("gate", "prepare"))
    if gate["recipe"] != recipe:
        raise StageError(f"{folder / 'gate.json'}: is the verdict on {gate['recipe']}, not {recipe}; run `dvc repro`")
    lost = rows["rows"]["in"] - rows["rows"]["out"] - sum(rows["dropped"].values())
    if lost:
        raise StageError(
            f"{folder / 'prepare.json'}: {lost} rows are neither kept nor counted as dropped; run `dvc repro`"
        )
    measured = [] if baseline is None else [read_measured(path, baseline) for path in _measurements(folder)]
    metrics = {} if baseline is None else read_json(folder / "evaluate.json")
    if sorted(json.dumps(one.model["metrics"], sort_keys=True) for one in measured) != sorted(
        json.dumps(value, sort_keys=True) for value in metrics.values()
    ):
        raise StageError(f"{folder / 'evaluate.json'}: is not what {folder / 'evaluate'} holds; run `dvc repro`")
    return Built(
        name=recipe,
        method=method,
        base=None if baseline is None else baseline.name,
        gate=gate,
        prepare=rows,
        train=read_json(folder / "train.json"),
        merge=read_json(folder / "merge.json"),
        lengths=read_lengths(folder / "lengths.csv"),
        curves={
            curve: read_curve(path) for curve in curve_names(method) if (path := _curve_path(folder, curve)).exists()
        },
        measured=sorted(measured, key=lambda one: (one.model["task"], one.key)),
    )


def read_measured(path: Path, baseline: Path) -> Measured:
    """One measurement of the model and the same of its base. StageError when they are not of the same documents."""
    ours, bases = path.with_suffix(".jsonl"), baseline / f"{path.stem}.jsonl"
    mine, theirs = read_samples(ours), read_samples(bases)
    if [_document(sample) for sample in mine] != [_document(sample) for sample in theirs]:
        raise StageError(f"{ours} and {bases} are not of the same documents; run `dvc repro`")
    return Measured(
        key=path.stem,
        model=read_json(path),
        base=read_json(baseline / path.name),
        samples=list(zip(mine, theirs, strict=True)),
    )


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The documents of a measurement."""
    # Not splitlines(): an answer may hold U+2028, which is no end of a line of JSON.
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                samples.append(json.loads(line))
            except ValueError as error:
                raise StageError(f"{path}:{number}: is not JSON: {error}") from None
    if not samples:
        raise StageError(f"{path}: holds no samples")
    return samples


def read_lengths(path: Path) -> dict[str, list[tuple[int, int]]]:
    """`{part: [(tokens, rows)]}`, tokens being the lower edge of a bin."""
    lengths: dict[str, list[tuple[int, int]]] = {}
    for number, row in enumerate(_table(path, ","), 2):
        try:
            lengths.setdefault(row["part"], []).append((int(row["tokens"]), int(row["rows"])))
        except (KeyError, TypeError, ValueError):
            raise StageError(f"{path}:{number}: is not part,tokens,rows") from None
    return lengths


def read_curve(path: Path) -> list[tuple[float, float]]:
    """The (step, value) points of one of DVCLive's files."""
    points = []
    for number, row in enumerate(_table(path, "\t"), 2):
        try:
            points.append((float(row["step"]), float(row[path.stem])))
        except (KeyError, TypeError, ValueError):
            raise StageError(f"{path}:{number}: has no numbers for step and {path.stem}") from None
    return points


def _table(path: Path, delimiter: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter))
    if not rows:
        raise StageError(f"{path}: holds no rows")
    return rows


def _curve_path(folder: Path, curve: str) -> Path:
    return folder / "live/plots/metrics/train" / f"{curve}.tsv"


def _measurements(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "evaluate").glob("*.json") if path.name != MANIFEST)


def _document(sample: dict[str, Any]) -> tuple[Any, Any]:
    return sample["doc_id"], sample["doc_hash"]
