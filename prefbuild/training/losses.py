"""DPO's losses as plain functions of log-probabilities: TRL 1.16's, but for use_weighting.

TRL has them inside DPOTrainer._compute_loss, tied to a padded batch; the tests hold these to that code. `n` pairs make a
micro-batch. Log-probabilities are in nats and float32.
"""

import math
from typing import TYPE_CHECKING

from prefbuild.methods import DPO

if TYPE_CHECKING:
    from torch import Tensor

# Losses of a pair that depend on the other pairs of its micro-batch: these take one whole micro-batch at a time.
NEEDS_WHOLE_BATCH = {"aot", "aot_unpaired", "sft"}
DISCOPOP_TAU = 0.05  # TRL's default, and the paper's
LARGEST_EXPONENT = 80.0  # of which exp is a float32


def answer_sums(
    log_probs: "Tensor", lengths: "Tensor", ld_alpha: float | None = None
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """(chosen [n], rejected [n], chosen unweighted [n]): log-probabilities of whole answers from those of tokens.

    `log_probs` [S] has all answers' tokens one after the other, chosen and rejected by turns, and `lengths` [2n] how many
    each has. With `ld_alpha` tokens beyond the shorter answer's length count so much (LD-DPO, arXiv 2409.06411).
    """
    plain = _sums(log_probs, lengths)
    if ld_alpha is None:
        return plain[0::2], plain[1::2], plain[0::2]
    weighted = _sums(log_probs * tail_weights(lengths, log_probs.numel(), ld_alpha), lengths)
    return weighted[0::2], weighted[1::2], plain[0::2]


def tail_weights(lengths: "Tensor", num_tokens: int, ld_alpha: float) -> "Tensor":
    """[num_tokens] float32: 1 for tokens within the length of the pair's shorter answer, ld_alpha beyond it."""
    import torch

    starts = lengths.cumsum(0) - lengths
    shorter = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2, output_size=lengths.numel())
    # repeat_interleave is told how many it makes, or it would wait for the GPU to ask.
    first_of_tail = (starts + shorter).repeat_interleave(lengths, output_size=num_tokens)
    tail = torch.arange(num_tokens, device=lengths.device) >= first_of_tail
    return torch.where(tail, ld_alpha, 1.0)


def _sums(values: "Tensor", lengths: "Tensor") -> "Tensor":
    import torch

    # Unlike index_add_ always in the same order; `unsafe` leaves out checks that wait for the GPU.
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def dpo_loss(
    settings: DPO,
    chosen: "Tensor",
    rejected: "Tensor",
    ref_chosen: "Tensor",
    ref_rejected: "Tensor",
    chosen_lengths: "Tensor",
    rejected_lengths: "Tensor",
    chosen_unweighted_sum: "Tensor",
) -> "Tensor":
    """[n]: each pair's loss, the weighted sum of `loss_type`; their mean is TRL's loss of the micro-batch.

    The first four are log-probabilities of whole answers, as answer_sums gives them, lengths are in tokens. All are [n].
    """
    chosen_logratios, rejected_logratios = chosen - ref_chosen, rejected - ref_rejected
    chosen_scores, rejected_scores = _scores(settings, chosen_logratios), _scores(settings, rejected_logratios)
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    total = chosen.new_zeros(chosen.shape)
    for loss_type, weight in zip(settings.loss_type, weights, strict=True):
        if loss_type in ("ipo", "sigmoid_norm"):
            delta = chosen_scores / chosen_lengths.clamp(min=1) - rejected_scores / rejected_lengths.clamp(min=1)
            loss = _of_delta(loss_type, settings, delta)
        elif loss_type == "aot":
            delta = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
            loss = _of_delta(loss_type, settings, delta)
        elif loss_type == "aot_unpaired":
            delta = chosen_logratios.sort().values - rejected_logratios.sort().values
            loss = _of_delta(loss_type, settings, delta)
        elif loss_type == "sft":
            loss = (-chosen_unweighted_sum.sum() / chosen_lengths.sum()).expand_as(chosen)
        elif loss_type in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
            loss = _of_logratios(loss_type, settings.beta, chosen_logratios, rejected_logratios)
        else:
            loss = _of_delta(loss_type, settings, chosen_scores - rejected_scores)
        total = total + weight * loss
    return total


def _scores(settings: DPO, logratios: "Tensor") -> "Tensor":
    """f'(policy / reference) of an f-divergence (f-DPO, arXiv 2309.16240); reverse KL, DPO's own, is the log-ratio."""
    import torch
    from torch.nn.functional import logsigmoid

    match settings.f_divergence_type:
        case "forward_kl":
            return 1 - torch.exp(-logratios)
        case "js_divergence":
            return math.log(2) + logsigmoid(logratios)
        case "alpha_divergence":
            power = settings.f_alpha_divergence_coef - 1
            if abs(power) < 1e-6:  # its limit
                return logratios
            return (torch.exp((power * logratios).clamp(max=LARGEST_EXPONENT)) - 1) / power
    return logratios


def _of_delta(loss_type: str, settings: DPO, delta: "Tensor") -> "Tensor":
    """The losses of how much further the chosen answer went from the reference than the rejected one."""
    import torch
    from torch.nn.functional import logsigmoid

    beta, flipped = settings.beta, settings.label_smoothing
    match loss_type:
        case "sigmoid" | "sigmoid_norm":  # DPO, arXiv 2305.18290
            return -logsigmoid(beta * delta)
        case "hinge":  # SLiC, arXiv 2305.10425
            return torch.relu(1 - beta * delta)
        case "ipo":  # arXiv 2310.12036, equation 17, on means over tokens
            return (delta - 1 / (2 * beta)) ** 2
        case "exo_pair":  # arXiv 2402.00856, equation 16
            log_won, log_lost = logsigmoid(beta * delta), logsigmoid(-beta * delta)
            won, lost = torch.sigmoid(beta * delta), torch.sigmoid(-beta * delta)
            return won * (log_won - math.log1p(-flipped)) + lost * (log_lost - math.log(flipped))
        case "robust":  # arXiv 2403.00409
            clean, wrong = -(1 - flipped) * logsigmoid(beta * delta), -flipped * logsigmoid(-beta * delta)
            return (clean - wrong) / (1 - 2 * flipped)
        case "aot" | "aot_unpaired":  # arXiv 2406.05882
            return -(1 - flipped) * logsigmoid(beta * delta) - flipped * logsigmoid(-beta * delta)
        case "discopop":  # arXiv 2406.08414, equation 5
            logits = beta * delta
            modulation = torch.sigmoid(logits / DISCOPOP_TAU)
            return -logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation
    raise AssertionError(loss_type)


def _of_logratios(loss_type: str, beta: float, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
    """The losses that judge each answer's log-ratio by itself."""
    import torch
    from torch.nn.functional import logsigmoid

    match loss_type:
        case "nca_pair":  # arXiv 2402.05369
            return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)
        case "bco_pair":  # arXiv 2404.04656
            return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
        case "sppo_hard":  # arXiv 2405.00675, equation 4.7 with P = 1 for the chosen answer
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "apo_zero":  # arXiv 2408.06266, equation 7
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":  # arXiv 2408.06266, equation 8
            return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))
    raise AssertionError(loss_type)
