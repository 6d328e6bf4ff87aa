"""Our losses against TRL's own code: equal, and with equal gradients, for every type and option."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from prefbuild.methods import DPO, F_DIVERGENCE, LOSS_TYPES, LossType
from prefbuild.training.losses import NEEDS_WHOLE_BATCH, answer_sums, dpo_loss

# Three pairs, by turns chosen and rejected: the shorter answer is either, or both are as long.
LENGTHS = [5, 3, 2, 7, 4, 4]
PROMPTS = [2, 2, 1, 1, 4, 4]
DIVERGENCES: list[dict[str, Any]] = [
    {},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
]


def random_log_probs(seed: int) -> Tensor:
    """[S] log-probabilities of all answers' tokens, as a policy near its reference has them."""
    return -torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(seed)) * 3


def ours(settings: DPO, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    lengths = torch.tensor(LENGTHS)
    chosen, rejected, unweighted = answer_sums(log_probs, lengths, settings.ld_alpha)
    ref_chosen, ref_rejected, _ = answer_sums(ref_log_probs, lengths, settings.ld_alpha)
    return dpo_loss(settings, chosen, rejected, ref_chosen, ref_rejected, lengths[0::2], lengths[1::2], unweighted)


def trls(settings: DPO, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """TRL's loss of the same micro-batch: DPOTrainer's code on a model that answers with given log-probabilities."""
    from collections import defaultdict

    from trl import DPOConfig, DPOTrainer

    # TRL's rows: all chosen answers, then all rejected ones, each after its prompt, padded on the right.
    order = [*range(0, len(LENGTHS), 2), *range(1, len(LENGTHS), 2)]
    width = max(prompt + length for prompt, length in zip(PROMPTS, LENGTHS, strict=True))
    mask = torch.zeros(len(order), width, dtype=torch.long)
    for row, answer in enumerate(order):
        mask[row, PROMPTS[answer] : PROMPTS[answer] + LENGTHS[answer]] = 1

    def answering(values: Tensor) -> Any:
        answers = values.split(LENGTHS)
        rows = torch.zeros(len(order), width - 1)
        for row, answer in enumerate(order):  # a token's probability stands where the token before it does
            before = PROMPTS[answer] - 1
            rows[row, before : before + LENGTHS[answer]] = answers[answer]
        statistics = {key: torch.zeros_like(rows) for key in ("entropy", "mean_logits")}
        outputs = SimpleNamespace(log_probs=rows, is_top1=torch.zeros_like(rows, dtype=torch.bool), **statistics)
        model: Any = torch.nn.Module()
        model.forward = lambda **_inputs: outputs
        model.is_gradient_checkpointing = False
        return model

    model = answering(log_probs)
    fake = SimpleNamespace(
        model=model,
        ref_model=answering(ref_log_probs),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=DPOConfig.__dataclass_fields__["discopop_tau"].default
        ),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=nullcontext
        ),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        use_weighting=False,
        loss_types=settings.loss_type,
        loss_weights=settings.loss_weights or [1.0] * len(settings.loss_type),
        **{
            key: getattr(settings, key)
            for key in ("beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef")
        },
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return DPOTrainer._compute_loss(fake, model, inputs, return_outputs=False)  # type: ignore[arg-type]


def options(loss_type: str) -> list[dict[str, Any]]:
    """Every way to ask for a loss that the schema allows, but for numbers."""
    smoothing = {
        "robust": [{}, {"label_smoothing": 0.2}],
        "exo_pair": [{"label_smoothing": 1e-3}, {"label_smoothing": 0.2}],
        "aot": [{}, {"label_smoothing": 0.2}],
        "aot_unpaired": [{}, {"label_smoothing": 0.2}],
    }.get(loss_type, [{}])
    divergences = DIVERGENCES if loss_type in F_DIVERGENCE else [{}]
    return [
        {"loss_type": [loss_type], **smooth, **divergence, **length}
        for smooth in smoothing
        for divergence in divergences
        for length in ({}, {"ld_alpha": 0.0}, {"ld_alpha": 0.4})
    ]


SEVERAL: list[dict[str, Any]] = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["aot", "ipo", "apo_zero"], "label_smoothing": 0.1},
    {"loss_type": ["robust", "sigmoid_norm"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
]


@pytest.mark.parametrize(
    "settings",
    [*(each for loss_type in LOSS_TYPES for each in options(loss_type)), *SEVERAL],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_loss_and_gradient_are_those_of_trl(settings: dict[str, Any]) -> None:
    asked = DPO.model_validate({"method": "dpo", "beta": 0.3, **settings})
    log_probs, ref_log_probs = random_log_probs(0).requires_grad_(), random_log_probs(1)
    losses = ours(asked, log_probs, ref_log_probs)
    assert losses.shape == (3,)
    (gradient,) = torch.autograd.grad(losses.mean(), log_probs)
    theirs = trls(asked, log_probs, ref_log_probs)
    (their_gradient,) = torch.autograd.grad(theirs, log_probs)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_a_divergence_whose_exponent_overflows_is_trls_too() -> None:
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -2.0, "loss_type": ["hinge"]}
    asked = DPO.model_validate({"method": "dpo", **settings})
    log_probs = random_log_probs(0)
    log_probs[[0, sum(LENGTHS[:2]), sum(LENGTHS[:4])]] -= 60  # of every chosen answer
    loss = ours(asked, log_probs, random_log_probs(1)).mean()
    assert loss.isfinite() and loss > 1e20
    torch.testing.assert_close(loss, trls(asked, log_probs, random_log_probs(1)))


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_a_pair_feels_the_others_where_the_loss_is_said_to_need_them(loss_type: str) -> None:
    settings = {"loss_type": [loss_type], "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0}
    asked = DPO.model_validate({"method": "dpo", **settings})
    log_probs = random_log_probs(0)
    other = log_probs.clone()
    other[sum(LENGTHS[:2])] -= 60  # of the second pair's chosen answer
    before, after = (ours(asked, values, random_log_probs(1)) for values in (log_probs, other))
    assert (before[0] != after[0]).item() is (loss_type in NEEDS_WHOLE_BATCH)
