"""Prompts and completions in one row without padding, each prompt once.

A group is a prompt with its completions: the two answers of a pair, or what a model wrote to a prompt. In a row it is
laid out as prompt, first completion, second completion, ...; a completion attends to its prompt and to itself, never
to another completion or group, and its positions go on from the prompt's. That is exact: Wang & Hegde 2024
(arXiv 2410.20305) for pairs; Liu et al. 2025 (arXiv 2506.05433) for groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Who attends to whom: segment i has queries query_ends[i-1]:query_ends[i] of the row, and the keys
    key_ends[i-1]:key_ends[i] of `keys`, causal and aligned to the end."""

    keys: Any  # [K] int64: the position in the row of every key, segment by segment
    query_ends: Any  # [N + 1] int32, starting with 0
    key_ends: Any  # [N + 1] int32, starting with 0
    ends: tuple[list[int], list[int]]  # both once more, on the host
    longest_query: int
    longest_key: int
    own: Any  # [T] int64: where in `keys` each position is in its own segment
    prompts: Any  # [P] int64: positions of prompt tokens
    uses: Any  # [P, C] int64: where in `keys` each of these is in its completions; None where groups differ in number
    read: Any = None  # [R] int64: positions whose last hidden state is read, each once; None: any may be


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Groups in one row of T tokens, S of which are scored: all tokens of completions, group by group."""

    input_ids: Any  # [1, T] int64
    position_ids: Any  # [1, T] int64
    segments: Segments
    sources: Any  # [S] int64: the position whose hidden state predicts a scored token
    targets: Any  # [S] int64: the scored tokens
    lengths: list[int]  # tokens of every completion, in the order of the groups; sums to S
    num_tokens: int  # T without what fills it up to a multiple


def packed_size(group: Group) -> int:
    """Tokens that a group takes in a row."""
    prompt, completions = group
    return len(prompt) + sum(map(len, completions))


def pack(groups: Sequence[Group], device: Any, multiple_of: int = 1) -> Packed:
    """Lay groups out in one row. Prompts and completions have a token each at least.

    With `multiple_of` the row is filled up with token 0 in a segment of its own, which nothing reads, and `read` with
    positions that nothing reads: matmuls are set up anew for each number of rows that they meet.
    """
    import numpy as np
    import torch

    ids: list[Any] = []
    positions: list[Any] = []
    keys: list[Any] = []
    sources: list[Any] = []
    targets: list[Any] = []
    own: list[Any] = []
    prompts: list[Any] = []
    uses: list[list[Any]] = []
    read: list[Any] = []
    lengths: list[int] = []
    query_ends, key_ends = [0], [0]

    def segment(start: int, tokens: Any, before: Any, first_position: int) -> None:
        place = np.arange(start, start + len(tokens))
        own.append(key_ends[-1] + len(before) + np.arange(len(tokens)))
        keys.extend((before, place))
        ids.append(tokens)
        positions.append(np.arange(first_position, first_position + len(tokens)))
        query_ends.append(start + len(tokens))
        key_ends.append(key_ends[-1] + len(before) + len(tokens))

    nothing = np.empty(0, np.int64)
    for prompt, completions in groups:
        if not len(prompt) or not all(map(len, completions)):
            raise ValueError("a group has an empty prompt or completion")
        start = query_ends[-1]
        place = np.arange(start, start + len(prompt))
        segment(start, np.asarray(prompt, np.int64), nothing, 0)
        prompts.append(place)
        uses.append([])
        read.append(place[-1:])
        for completion in completions:
            begin = query_ends[-1]
            uses[-1].append(key_ends[-1] + np.arange(len(prompt)))
            segment(begin, np.asarray(completion, np.int64), place, len(prompt))
            # The first token is predicted by the prompt's last, the others by the one before.
            read.append(np.arange(begin, begin + len(completion) - 1))
            sources.append(np.r_[place[-1], read[-1]])
            targets.append(np.asarray(completion, np.int64))
            lengths.append(len(completion))
    num_tokens = query_ends[-1]
    if filling := -num_tokens % multiple_of:
        segment(num_tokens, np.zeros(filling, np.int64), nothing, 0)

    unread = np.setdiff1d(np.arange(query_ends[-1]), np.concatenate(read or [nothing]))
    read.append(unread[: -(query_ends[-1] - len(unread)) % multiple_of])

    def tensor(parts: list[Any], dtype: Any = torch.int64) -> Any:
        # Not blocking: the host goes on while the GPU still computes the step before.
        whole = torch.from_numpy(np.concatenate(parts) if parts else nothing).to(dtype)
        return (whole.pin_memory() if str(device).startswith("cuda") else whole).to(device, non_blocking=True)

    per_group = {len(of_group) for of_group in uses}
    same = len(per_group) == 1 and per_group != {0}
    return Packed(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        segments=Segments(
            keys=tensor(keys),
            query_ends=tensor([np.array(query_ends)], torch.int32),
            key_ends=tensor([np.array(key_ends)], torch.int32),
            ends=(query_ends, key_ends),
            longest_query=int(np.diff(query_ends).max()),
            longest_key=int(np.diff(key_ends).max()),
            own=tensor(own),
            prompts=tensor(prompts),
            uses=tensor([np.stack(of_group, axis=1).ravel() for of_group in uses]).view(-1, per_group.pop())
            if same
            else None,
            read=tensor(read),
        ),
        sources=tensor(sources),
        targets=tensor(targets),
        lengths=lengths,
        num_tokens=num_tokens,
    )


def into_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in bins of at most `budget` together, as few as first fit decreasing finds; alike for alike sizes.

    What is larger than the budget has a bin of its own. Bins, and the indices in each, are in ascending order.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        for number, (filled, members) in enumerate(bins):
            if filled + sizes[index] <= budget:
                bins[number] = (filled + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return sorted(sorted(members) for _, members in bins)
