"""How the next token is chosen from logits, on the device: transformers' logits processors, then a draw."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefbuild.methods import PromptOptions


class Sampling(NamedTuple):
    """What changes the probabilities of tokens; `temperature` 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0


GREEDY = Sampling(temperature=0.0)


def sampling_of(settings: PromptOptions) -> Sampling:
    """What a recipe's `train:` says of sampling."""
    return Sampling(**{name: getattr(settings, name) for name in Sampling._fields})


def processed(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits [rows, vocabulary] after all that `sampling` says, in transformers' order; -inf is never drawn.

    `seen`, [rows, vocabulary] bool, is the tokens that prompt and completion have had so far.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if sampling.temperature == 0:
        return scores
    if sampling.temperature != 1.0:
        scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = scores.sort()
        left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        left_out[:, -1] = False
        scores = scores.masked_fill(left_out.scatter(1, order, left_out), -torch.inf)
    if sampling.min_p is not None:
        # The likeliest token's probability cancels: p < min_p * p_max is a distance of logits.
        shares = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        scores = scores.masked_fill(shares < sampling.min_p, -torch.inf)
    return scores


def draw(scores: Tensor, sampling: Sampling, generator: Any) -> Tensor:
    """One token a row, [rows] int64, with the probabilities that softmax gives to `scores`.

    By a race: the first of independent exponential clocks to ring, whose rates are the probabilities, is token i with
    probability i. It is torch.multinomial without its checks, which wait for the device.
    """
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    clocks = torch.empty_like(scores).exponential_(generator=generator)
    return (scores - clocks.log_()).argmax(dim=-1)
