"""Log-probabilities of the tokens of completions, and of no others; never all logits at once."""

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from prefbuild.training.packing import Packed
from prefbuild.training.prepared import LOGITS_AT_ONCE


class Scores(NamedTuple):
    """Of S scored tokens, in the order of Packed.targets. The last three are None unless asked for, without gradient."""

    log_probs: Any  # [S] float32
    entropies: Any  # [S] nats
    top1: Any  # [S] bool: the token is the likeliest
    mean_logits: Any  # [S] mean over the vocabulary


def score(model: Any, packed: Packed, *, statistics: bool = False, temperature: float = 1.0) -> Scores:
    """Score every completion of a packed row by a causal model (or its PEFT adapter) that has packed attention.

    Logits are computed for the positions that count, a chunk at a time, and again for the gradient.
    """
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = whole.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        segments=packed.segments,
    ).last_hidden_state
    return score_hidden(
        whole, hidden.squeeze(0).index_select(0, packed.sources), packed.targets, statistics, temperature
    )


def score_hidden(whole: Any, hidden: Any, targets: Any, statistics: bool = False, temperature: float = 1.0) -> Scores:
    """The same from the hidden states [S, hidden] that predict the tokens [S]. `whole` is the causal model."""
    head, change = whole.get_output_embeddings(), logit_change(whole.config)

    def chunk(hidden: Any, targets: Any) -> tuple[Any, ...]:
        logits = change(head(hidden).float())
        if temperature != 1.0:
            logits = logits / temperature
        total = logits.logsumexp(1)
        log_probs = logits.gather(1, targets[:, None])[:, 0] - total
        if not statistics:
            return (log_probs,)
        # After what the gradient needs: computing it again for the gradient ends before here.
        with torch.no_grad():
            logits = logits.detach()
            entropies = total - (logits * (logits - total[:, None]).exp()).sum(1)
            return log_probs, entropies, logits.argmax(1) == targets, logits.mean(1)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = []
    for start in range(0, len(targets), size):
        some = hidden[start : start + size], targets[start : start + size]
        parts.append(checkpoint(chunk, *some, use_reentrant=False) if torch.is_grad_enabled() else chunk(*some))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Scores(*columns, *[None] * (4 - len(columns)))


def logit_change(config: Any) -> Any:
    """What a model does to its logits after the head: scaling and soft caps, by the names of transformers' configs."""
    text = config.get_text_config()
    factor = getattr(text, "logit_scale", None) or 1.0
    factor /= getattr(text, "logits_scaling", None) or 1.0
    cap = getattr(text, "final_logit_softcapping", None)

    def change(logits: Any) -> Any:
        if factor != 1.0:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return change
