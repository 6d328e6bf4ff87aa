"""prefbuild/sharing.py: every request is in one part, as it was asked, and parts keep to their budget."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from prefbuild.sharing import KEYS_A_TOKEN, pack_parts, share, unlike


def test_parts_are_no_larger_than_their_budget() -> None:
    ids = [(None, [1] * length, [2] * (1 + number)) for length in (5, 30, 90) for number in range(40)]
    twice = [(None, [1] * 5, [3]), (None, [1] * 5, [3])]
    parts = share([*ids, *twice], 200, 100)
    assert all(part.weight <= 100 or len(part.asked) == 1 for part in parts)
    assert sorted(i for part in parts for indices in part.asked.values() for i in indices) == list(range(122))
    assert [indices for part in parts for indices in part.asked.values() if 120 in indices] == [[120, 121]]
    assert len(parts) > 3
    assert [len(part.prefix) for part in share(ids, 200, 10_000)] == [5, 30, 90]


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
        min_size=1, max_size=30,
    ),
    max_length=st.integers(4, 14),
    budget=st.integers(1, 60),
)  # fmt: skip
def test_parts_hold_every_request_cut_as_lm_eval_cuts_it(requests: list[Any], max_length: int, budget: int) -> None:
    parts = share([(None, *request) for request in requests], max_length, budget)
    found = {}
    for part in parts:
        assert part.prefix
        assert part.weight <= budget or len(part.asked) == 1
        for (rest, num_scored), indices in part.asked.items():
            for i in indices:
                found[i] = ([*part.prefix, *rest], [*rest[-num_scored:]])
    expected = {i: ((a + b)[-(max_length + 1) :], b) for i, (a, b) in enumerate(requests)}
    assert found == expected


def test_prefix_of_many_heads_weighs_what_its_keys_weigh() -> None:
    """A context of 1,000 tokens in each of 300 heads would be 300,000 keys."""
    requests = [(None, [7] * 1000, [i, i]) for i in range(300)]
    parts = share(requests, 4096, 4096)
    assert 4 < len(parts) < 8
    for part in parts:
        assert part.size + len(part.heads) * 1000 < 4097 * KEYS_A_TOKEN


def test_what_must_not_be_seen_is_changed_and_the_rest_is_not() -> None:
    # What comes before a last continuation is (5,), and (4,) would become it.
    requests = [(None, [1, 2], [3, 9]), (None, [8, 8], [4, 9]), (None, [8, 8], [5, 9])]
    before = share(requests, 100, 100)
    after = unlike(before, 50)
    packs = [pack_parts(parts, "cpu") for parts in (before, after)]
    ids, others = (pack.input_ids[0].tolist() for pack in packs)
    assert ids == [1, 2, 3, 8, 8, 4, 5]
    assert [a == b for a, b in zip(ids, others, strict=True)] == [False, False, False, True, True, False, True]
    assert packs[0].sources.tolist() == packs[1].sources.tolist() == [1, 2, 4, 5, 4, 6]
    assert packs[0].targets.tolist() == [3, 9, 4, 9, 5, 9]
    assert packs[1].targets.tolist()[-2:] == [5, 9]
