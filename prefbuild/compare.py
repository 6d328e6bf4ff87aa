"""Paired statistics between two evaluations of the same documents.

Two models that answer the same documents are compared document by document: the difficulty of a document is in
both answers and cancels, so that the error of the mean difference is smaller than that of two means (Miller 2024,
"Adding Error Bars to Evals", arXiv 2411.00640, section 4.2).

Covered: independent documents, one number a document. Not covered: documents in clusters (several questions on one
text), repeated sampling, and correction for many comparisons.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.errors import StageError


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of a - b over n paired documents, and how sure it is."""

    n: int
    mean_difference: float  # in the metric's own unit, as are the next three
    stderr: float
    lower_bound: float  # one-sided: the true mean difference is above it with the confidence asked for
    upper_bound: float  # one-sided: below it, with the same confidence
    p_value: float  # two-sided, of "no difference"
    method: str


def paired(a: list[float], b: list[float], confidence: float) -> Paired:
    """Compare numbers that belong together pairwise, a[i] with b[i].

    The bounds are Student's t on the differences (Miller 2024, arXiv 2411.00640). The p-value is McNemar's exact
    test when every number is 0 or 1 (McNemar 1947, Psychometrika 12, 153-157): a binomial test of the documents that
    only one of the two has right. When all differences are equal there is no variance to go by: both bounds are the
    mean, and the p-value is the exact sign test's. Otherwise it is that of the t test.

    Raises StageError on fewer than two pairs, lists of different lengths, numbers that are not finite, and a
    confidence that is not between 0.5 and 1.
    """
    if len(a) != len(b):
        raise StageError(f"{len(a)} numbers can't be paired with {len(b)}")
    if len(a) < 2:
        raise StageError(f"a paired comparison needs at least 2 documents, there are {len(a)}")
    if not all(math.isfinite(value) for value in (*a, *b)):
        raise StageError("a paired comparison needs finite numbers")
    if not 0.5 < confidence < 1:
        raise StageError(f"confidence {confidence:g} is not between 0.5 and 1")
    from scipy.special import stdtr, stdtrit  # what scipy.stats.t calls, a second sooner

    n = len(a)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = math.fsum(differences) / n
    if min(differences) == max(differences):
        mean = differences[0]
        p_value = _sign_test(differences)
        return Paired(n=n, mean_difference=mean, stderr=0.0, lower_bound=mean, upper_bound=mean, p_value=p_value,
                      method="no variance, exact sign test")  # fmt: skip
    stderr = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    reach = float(stdtrit(n - 1, confidence)) * stderr
    if set(a) | set(b) <= {0.0, 1.0}:
        p_value, method = _sign_test(differences), "Student's t, exact McNemar test"
    else:
        p_value, method = float(2 * stdtr(n - 1, -abs(mean) / stderr)), "Student's t"
    return Paired(n=n, mean_difference=mean, stderr=stderr, lower_bound=mean - reach, upper_bound=mean + reach,
                  p_value=p_value, method=method)  # fmt: skip


def read_samples(folder: Path, key: str, metric: str) -> dict[str, float]:
    """One metric of every document of `<folder>/<key>.jsonl`, by "doc_id doc_hash".

    Raises StageError naming file and line on a document that is there twice, or without a finite number for the metric.
    """
    path = folder / f"{key}.jsonl"
    found: dict[str, float] = {}
    ids = set()
    for number, sample in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if not isinstance(sample, dict) or not isinstance(sample.get("metrics"), dict):
            raise StageError(f"{where}: is no sample: it has no metrics")
        if not isinstance(sample.get("doc_id"), int | str) or not isinstance(sample.get("doc_hash"), str):
            raise StageError(f"{where}: has no doc_id and doc_hash")
        if sample["doc_id"] in ids:
            raise StageError(f"{where}: document {sample['doc_id']} is there twice")
        ids.add(sample["doc_id"])
        if metric not in sample["metrics"]:
            raise StageError(f"{where}: document {sample['doc_id']} has no {metric}")
        value = sample["metrics"][metric]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise StageError(f"{where}: {metric} of document {sample['doc_id']} is {json.dumps(value)}, not a number")
        found[f"{sample['doc_id']} {sample['doc_hash']}"] = float(value)
    return found


def compare_samples(folder_a: Path, folder_b: Path, key: str, metric: str, confidence: float) -> Paired:
    """Compare one metric of two evaluations, a - b. StageError when they are not of the same documents."""
    a = read_samples(folder_a, key, metric)
    b = read_samples(folder_b, key, metric)
    if a.keys() != b.keys():
        only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        example = (only_a or only_b)[0]
        raise StageError(
            f"{folder_a / key}.jsonl and {folder_b / key}.jsonl are not of the same documents: {len(only_a)} only in "
            f"the first, {len(only_b)} only in the second, as {example}"
        )
    return paired(list(a.values()), [b[document] for document in a], confidence)


def _lines(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StageError(f"{path}: is missing") from None
    except UnicodeDecodeError:
        raise StageError(f"{path}: is not UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise StageError(f"{path}:{number}: is not JSON") from None
    return rows


def _sign_test(differences: list[float]) -> float:
    """Two-sided exact sign test: ties say nothing, and of the rest half should be up."""
    from scipy.special import bdtr

    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    # Both tails of a binomial distribution with p = 1/2 are equal.
    return min(1.0, float(2 * bdtr(min(up, down), up + down, 0.5)))
