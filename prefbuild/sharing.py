"""What requests for log-likelihoods have in common, and how they are packed so that it is computed once.

Covered: the continuations of a context, and contexts that begin alike, as with the same solved examples, where that is
less to compute. Not covered: beginnings of beginnings; a pack has one level of prefixes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prefbuild.training.packing import Packed, pack

# Attention copies a prefix' keys for each head: as many keys as this take as much memory as a token does elsewhere.
KEYS_A_TOKEN = 16

Ids = tuple[int, ...]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the ids of context and continuation


@dataclass(frozen=True)
class Part:
    """A beginning that requests have in common, and the requests, by index, that go on from it in each way."""

    prefix: Ids
    # What comes after the prefix, and how many tokens at its end are the continuation.
    asked: dict[tuple[Ids, int], list[int]]

    @property
    def heads(self) -> list[Ids]:
        """What the model reads after the prefix: all but the last tokens, which predict nothing; each once."""
        return list(dict.fromkeys(rest[:-1] for rest, _ in self.asked if len(rest) > 1))

    @property
    def size(self) -> int:
        """Tokens of it in a pack."""
        return len(self.prefix) + sum(map(len, self.heads))

    @property
    def weight(self) -> int:
        """What it takes of a pack's budget, in tokens."""
        return weigh(self.size, len(self.heads), len(self.prefix))

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return len(self.prefix) + max(len(rest) for rest, _ in self.asked)


def weigh(size: int, num_heads: int, num_common: int) -> int:
    """Tokens of a budget for `size` tokens, of which `num_common` are keys of each head once more."""
    return max(size, (size + num_heads * num_common) // KEYS_A_TOKEN)


def share(requests: list[Request], max_length: int, budget: int) -> list[Part]:
    """Requests by what they have in common, each continuation of a context once; alike for alike requests.

    As in HFLM, what the model reads is cut on the left to `max_length` tokens. No part weighs more than `budget` tokens,
    unless it is one request. ValueError where lm-eval would fail too.
    """
    by_context: dict[Ids, dict[Ids, list[int]]] = {}
    for i, (_, before, after) in enumerate(requests):
        if not 0 < len(after) <= max_length:
            raise ValueError(
                f"request {i} has a continuation of {len(after)} tokens; it takes 1 to {max_length}, "
                "as many as the model's context"
            )
        # The last token of a continuation is not read.
        cut = max(0, len(before) + len(after) - max_length - 1)
        by_context.setdefault(tuple(before[cut:]), {}).setdefault(tuple(after), []).append(i)

    parts = []
    together: list[Context] = []
    prefix: Ids = ()
    # Those that begin alike are neighbours when sorted.
    for context in _in_budget(sorted(by_context.items()), budget):
        num_common = _num_common(prefix, context.ids)
        all_of_them = [*together, context]
        joint = _size(all_of_them, num_common)
        apart = _size(together, len(prefix)) + _size([context], len(context.ids))
        weight = weigh(joint, sum(c.num_heads for c in all_of_them), num_common)
        if together and num_common and joint < apart and weight <= budget:
            prefix = prefix[:num_common]
        else:
            parts += [_part(prefix, together)] if together else []
            together, prefix = [], context.ids
        together.append(context)
    return [*parts, _part(prefix, together)]


class Context(NamedTuple):
    """A context, and the requests that ask for each of its continuations."""

    ids: Ids
    asked: dict[Ids, list[int]]
    num_heads: int  # continuations without their last tokens, no two alike
    num_read: int  # tokens of these


def _in_budget(contexts: list[tuple[Ids, dict[Ids, list[int]]]], budget: int) -> Iterator[Context]:
    """Contexts with no more of their continuations than the budget takes, several times if need be."""
    for ids, asked in contexts:
        chunks: list[dict[Ids, list[int]]] = [{}]
        size = len(ids)
        for continuation, indices in asked.items():
            size += len(continuation) - 1
            if chunks[-1] and weigh(size, len(chunks[-1]) + 1, len(ids)) > budget:
                chunks.append({})
                size = len(ids) + len(continuation) - 1
            chunks[-1][continuation] = indices
        for chunk in chunks:
            heads = {continuation[:-1] for continuation in chunk}
            yield Context(ids, chunk, len(heads), sum(map(len, heads)))


def _size(contexts: list[Context], num_common: int) -> int:
    """Tokens of contexts that share their first `num_common`: each head has the rest of its context to itself."""
    return num_common + sum(c.num_heads * (len(c.ids) - num_common) + c.num_read for c in contexts)


def _num_common(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _part(prefix: Ids, contexts: list[Context]) -> Part:
    return Part(
        prefix,
        {
            (context.ids[len(prefix) :] + continuation, len(continuation)): indices
            for context in contexts
            for continuation, indices in context.asked.items()
        },
    )


def unlike(parts: list[Part], num_ids: int) -> list[Part]:
    """The parts with other tokens wherever the last request of the last part must not see them."""
    (*_, (last, _)) = parts[-1].asked
    others = [rest for rest, _ in parts[-1].asked if rest[:-1] != last[:-1]]

    def other(ids: Ids, by: int) -> Ids:
        return tuple((i + by) % num_ids for i in ids)

    # A head that became the last one's would be computed with it.
    by = next(n for n in range(1, num_ids) if all(other(rest[:-1], n) != last[:-1] for rest in others))
    return [
        *(Part(other(p.prefix, by), {(other(rest, by), n): i for (rest, n), i in p.asked.items()}) for p in parts[:-1]),
        Part(
            parts[-1].prefix,
            {(other(rest, by) if rest in others else rest, n): i for (rest, n), i in parts[-1].asked.items()},
        ),
    ]


def pack_parts(parts: list[Part], device: Any) -> Packed:
    """The parts' prefixes and heads in one row, of which every token of every continuation is scored."""
    import torch

    packed = pack([(part.prefix, part.heads) for part in parts], device)
    sources: list[int] = []
    targets: list[int] = []
    start = 0
    for part in parts:
        end = start + len(part.prefix)
        begins: dict[Ids, int] = {}
        start = end
        for head in part.heads:
            begins[head] = start
            start += len(head)
        for rest, num_scored in part.asked:
            # The prefix' last token predicts the first of the rest, and each token of its head the next one.
            places = [end - 1, *(range(begins[rest[:-1]], begins[rest[:-1]] + len(rest) - 1) if len(rest) > 1 else ())]
            sources += places[-num_scored:]
            targets += rest[-num_scored:]
    return replace(
        packed,
        sources=torch.tensor(sources, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=[num_scored for part in parts for _, num_scored in part.asked],
    )
