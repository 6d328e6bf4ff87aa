"""Paired statistics: known values, edges, and an honest bound."""

import json
import math
import random
from pathlib import Path

import pytest

from prefbuild.compare import compare_samples, paired, read_samples
from prefbuild.errors import StageError


def test_bounds_are_students_t_on_the_differences():
    # Differences 1..5: mean 3, variance 2.5, stderr sqrt(0.5); t(0.95, 4) = 2.1318 by the tables.
    result = paired([2, 4, 6, 8, 10], [1, 2, 3, 4, 5], 0.95)
    assert result.n == 5
    assert result.mean_difference == 3
    assert result.stderr == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert result.lower_bound == pytest.approx(3 - 2.131847 * math.sqrt(0.5), abs=1e-6)
    assert result.upper_bound == pytest.approx(3 + 2.131847 * math.sqrt(0.5), abs=1e-6)
    # t = 4.2426 on 4 degrees of freedom, two-sided: CDF in closed form for df 4.
    t = 3 / math.sqrt(0.5)
    u = t / math.sqrt(4 + t * t)
    assert result.p_value == pytest.approx(1 - (1.5 * u - 0.5 * u**3), rel=1e-9)
    assert result.method == "Student's t"


def test_direction_is_a_minus_b():
    assert paired([1, 1, 1, 0], [0, 0, 1, 0], 0.95).mean_difference == 0.5
    assert paired([0, 0, 1, 0], [1, 1, 1, 0], 0.95).mean_difference == -0.5


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (8, 2, 2 * 56 / 1024),  # 1 + 10 + 45 of 2**10
        (5, 0, 2 / 32),
        (3, 3, 1.0),
        (9, 1, 2 * 11 / 1024),
    ],
)
def test_p_value_of_right_and_wrong_is_mcnemars(only_a, only_b, p_value):
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * 7 + [0.0] * 4
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * 7 + [0.0] * 4
    result = paired(a, b, 0.95)
    assert result.p_value == pytest.approx(p_value, rel=1e-12)
    assert result.method == "Student's t, exact McNemar test"


def test_confidence_widens_the_bound():
    a, b = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 2.0, 1.0, 1.5, 2.0]
    bounds = [paired(a, b, confidence).lower_bound for confidence in (0.6, 0.9, 0.99)]
    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 3


def test_no_variance_gives_the_mean_and_the_sign_test():
    result = paired([0.7] * 6, [0.2] * 6, 0.95)
    assert result.lower_bound == result.upper_bound == result.mean_difference == 0.7 - 0.2
    assert result.stderr == 0
    assert result.p_value == pytest.approx(2 / 64)
    assert result.method == "no variance, exact sign test"


def test_equal_answers_show_no_difference():
    result = paired([1, 0, 1], [1, 0, 1], 0.95)
    assert (result.mean_difference, result.lower_bound, result.p_value) == (0, 0, 1)


@pytest.mark.parametrize(
    ("a", "b", "confidence", "message"),
    [
        ([1.0], [0.0], 0.95, "a paired comparison needs at least 2 documents, there are 1"),
        ([], [], 0.95, "a paired comparison needs at least 2 documents, there are 0"),
        ([1.0, 2.0], [1.0], 0.95, "2 numbers can't be paired with 1"),
        ([1.0, math.nan], [1.0, 1.0], 0.95, "a paired comparison needs finite numbers"),
        ([1.0, 1.0], [math.inf, 1.0], 0.95, "a paired comparison needs finite numbers"),
        ([1.0, 2.0], [1.0, 1.0], 1.0, "confidence 1 is not between 0.5 and 1"),
        ([1.0, 2.0], [1.0, 1.0], 0.5, "confidence 0.5 is not between 0.5 and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, confidence, message):
    with pytest.raises(StageError) as error:
        paired(a, b, confidence)
    assert str(error.value) == message


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_lower_bound_is_honest_for_normal_differences(confidence):
    # Over 2000 draws a right bound misses the truth 1 - confidence of the time; four standard errors of slack.
    rng, truth, draws = random.Random(1), 0.3, 2000
    held = 0
    for _ in range(draws):
        b = [rng.gauss(0, 3) for _ in range(12)]
        a = [x + rng.gauss(truth, 1) for x in b]
        held += paired(a, b, confidence).lower_bound <= truth
    slack = 4 * math.sqrt(confidence * (1 - confidence) / draws)
    assert abs(held / draws - confidence) < slack


def test_the_lower_bound_is_honest_for_right_and_wrong():
    # t is approximate here: at 150 documents within a point and a half of what it promises, beside chance.
    rng, draws = random.Random(2), 1500
    held = 0
    for _ in range(draws):
        b = [float(rng.random() < 0.5) for _ in range(150)]
        a = [float(rng.random() < (0.75 if right else 0.35)) for right in b]  # true mean 0.55
        held += paired(a, b, 0.95).lower_bound <= 0.05
    assert 0.95 - 0.015 - 4 * math.sqrt(0.95 * 0.05 / draws) < held / draws < 0.99


def test_pairing_is_tighter_than_two_means():
    rng = random.Random(3)
    b = [rng.gauss(0, 10) for _ in range(50)]
    a = [x + rng.gauss(1, 0.5) for x in b]
    unpaired = math.sqrt(sum((x - sum(b) / 50) ** 2 for x in b) / 49 / 50 * 2)
    assert paired(a, b, 0.95).stderr < unpaired / 10


# ---- samples


def sample(doc_id: int, **metrics: object) -> dict:
    return {"doc_id": doc_id, "doc_hash": f"h{doc_id}", "metrics": metrics}


def write(folder: Path, rows: list, key: str = "k") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_samples_are_read_by_document(tmp_path):
    folder = write(tmp_path, [sample(0, acc=1, other=3), sample(1, acc=0.0)])
    assert read_samples(folder, "k", "acc") == {"0 h0": 1.0, "1 h1": 0.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([sample(0, acc=1.0), sample(0, acc=1.0)], ":2: document 0 is there twice"),
        ([sample(0, acc=1.0), sample(1)], ":2: document 1 has no acc"),
        ([sample(0, acc=math.nan)], ":1: acc of document 0 is NaN, not a number"),
        ([sample(0, acc=math.inf)], ":1: acc of document 0 is Infinity, not a number"),
        ([sample(0, acc=None)], ":1: acc of document 0 is null, not a number"),
        ([sample(0, acc=True)], ":1: acc of document 0 is true, not a number"),
        ([sample(0, acc="1")], ':1: acc of document 0 is "1", not a number'),
        ([{"doc_id": 0, "metrics": {"acc": 1}}], ":1: has no doc_id and doc_hash"),
        ([{"doc_hash": "h", "metrics": {"acc": 1}}], ":1: has no doc_id and doc_hash"),
        ([{"doc_id": 0, "doc_hash": "h"}], ":1: is no sample: it has no metrics"),
        ([7], ":1: is no sample: it has no metrics"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, rows, message):
    write(tmp_path, rows)
    with pytest.raises(StageError) as error:
        read_samples(tmp_path, "k", "acc")
    assert str(error.value) == f"{tmp_path}/k.jsonl{message}"


def test_missing_and_broken_sample_files_are_named(tmp_path):
    with pytest.raises(StageError, match=r"k\.jsonl: is missing$"):
        read_samples(tmp_path, "k", "acc")
    (tmp_path / "k.jsonl").write_text('{"doc_id": 0\n')
    with pytest.raises(StageError, match=r"k\.jsonl:1: is not JSON$"):
        read_samples(tmp_path, "k", "acc")
    (tmp_path / "k.jsonl").write_text("")
    with pytest.raises(StageError, match=r"k\.jsonl:1: is not JSON$"):
        read_samples(tmp_path, "k", "acc")


def test_documents_are_paired_whatever_their_order(tmp_path):
    a = write(tmp_path / "a", [sample(0, acc=1.0), sample(1, acc=0.0), sample(2, acc=1.0)])
    b = write(tmp_path / "b", [sample(2, acc=0.5), sample(0, acc=0.75), sample(1, acc=0.0)])
    assert compare_samples(a, b, "k", "acc", 0.95) == paired([1, 0, 1], [0.75, 0, 0.5], 0.95)


def test_other_documents_are_refused(tmp_path):
    a = write(tmp_path / "a", [sample(0, acc=1.0), sample(1, acc=0.0), sample(2, acc=1.0)])
    b = write(tmp_path / "b", [sample(0, acc=1.0), {**sample(1, acc=0.0), "doc_hash": "edited"}])
    with pytest.raises(StageError) as error:
        compare_samples(a, b, "k", "acc", 0.95)
    assert str(error.value) == (
        f"{a}/k.jsonl and {b}/k.jsonl are not of the same documents: 2 only in the first, 1 only in the second, as 1 h1"
    )


def test_the_statistics_are_scipys() -> None:
    """The functions used are those that scipy.stats calls, without the second that importing it takes."""
    from scipy.stats import binomtest, ttest_rel

    for a, b in (([0.1, 0.4, 0.35, 0.8], [0.2, 0.1, 0.3, 0.1]), ([3.0, 1.0, 2.5], [1.0, 1.5, 2.0])):
        ours, theirs = paired(a, b, 0.95), ttest_rel(a, b)
        assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-12)
        assert ours.lower_bound == pytest.approx(ttest_rel(a, b).confidence_interval(0.9).low, rel=1e-12)
    for up, down in ((0, 1), (1, 1), (5, 5), (3, 9), (40, 12), (0, 300), (150, 151)):
        a, b = [1.0] * up + [0.0] * down, [0.0] * up + [1.0] * down
        if up + down > 1:
            assert paired([*a, 1.0], [*b, 1.0], 0.95).p_value == pytest.approx(
                binomtest(up, up + down).pvalue, rel=1e-9
            )
