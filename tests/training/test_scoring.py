"""The head's kernel beside PyTorch: the same scores and gradients, and the heads that it does not take."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCALE = 0.7


def head_and_tokens(vocabulary: int, hidden: int, num: int, bias: bool, device: str) -> tuple[Any, Any, Any]:
    """A frozen head in bf16, hidden states and targets; some of these are the likeliest, the first or the last."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        head = torch.nn.Linear(hidden, vocabulary, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
        head.weight.normal_(std=3 / hidden**0.5)
        states = torch.randn(num, hidden).bfloat16()
        targets = torch.randint(0, vocabulary, (num,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    targets[2::3] = head(states).argmax(1)[2::3]
    return head, states, targets


def scored(by: str, head: Any, states: Any, targets: Any, statistics: bool) -> tuple[Any, ...]:
    """The columns, and the gradient of the states if any; weights differ, so that another token's would be noticed."""
    import torch

    from prefbuild.training.scoring import by_kernel, by_torch

    states = states.clone().requires_grad_()
    if by == "kernel":
        columns = by_kernel(head, states, targets, statistics, SCALE)
    else:
        columns = by_torch(head, states, targets, statistics, SCALE, None, 1.0)
    assert [column.requires_grad for column in columns] == [torch.is_grad_enabled()] + [False] * (len(columns) - 1)
    if torch.is_grad_enabled():
        (columns[0] * torch.linspace(0.5, 2.0, len(targets), device=states.device)).sum().backward()
    return *(column.detach() for column in columns), states.grad


def check_kernel(device: str, vocabulary: int, hidden: int, num: int, bias: bool) -> None:
    """The kernel is as close to float32 as PyTorch is in bf16, and without gradient or statistics says the same."""
    import torch

    from prefbuild.training import scoring

    scoring.LOGITS_AT_ONCE = vocabulary * (num // 3)  # more than one chunk, the last of which is smaller
    tokens = head_and_tokens(vocabulary, hidden, num, bias, device)
    ours, today = scored("kernel", *tokens, True), scored("torch", *tokens, True)
    exact = scored("torch", copy.deepcopy(tokens[0]).float(), tokens[1].float(), tokens[2], True)
    for place in (0, 1, 3):  # log-probabilities, entropies, mean logits
        assert ours[place].dtype == torch.float32
        torch.testing.assert_close(ours[place], today[place], rtol=1e-3, atol=2e-2)
        errors = [(one[place] - exact[place]).norm().item() for one in (ours, today)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4, (place, errors)
    # Logits that nearly tie may be rounded otherwise in other chunks.
    assert ours[2].dtype == torch.bool and (ours[2] != today[2]).float().mean() < 0.05 and ours[2].sum() >= num // 4
    gradients = [(one[4].float() - exact[4]).norm().item() / exact[4].norm().item() for one in (ours, today)]
    assert gradients[0] <= 1.5 * gradients[1], gradients
    plain = scored("kernel", *tokens, False)
    assert len(plain) == 2 and torch.equal(plain[0], ours[0]) and torch.equal(plain[1], ours[4])
    with torch.no_grad():
        for one, other in zip(scored("kernel", *tokens, True)[:4], ours, strict=False):
            assert torch.equal(one, other)


def test_triton_on_a_cpu_scores_as_pytorch_does() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    # In a process of its own: Triton asks when it is imported whether to interpret.
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "bias"), [(32_002, False), (49_152, True), (151_669, False)])
def test_the_kernel_scores_as_pytorch_does(vocabulary: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefbuild.training import scoring

    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", scoring.LOGITS_AT_ONCE)  # put back
    check_kernel("cuda", vocabulary, 576, 700, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("statistics", [True, False])
def test_a_model_is_scored_by_the_kernel_and_deterministically(
    statistics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefbuild.training import scoring

    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1, vocab_size=32_002
    )
    whole: Any = LlamaForCausalLM(config).to("cuda", torch.bfloat16).requires_grad_(False)
    _, states, targets = head_and_tokens(32_002, 256, 300, False, "cuda")
    states.requires_grad_()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            found = [scoring.score_hidden(whole, states, targets, statistics, temperature=0.8) for _ in range(2)]
        gradients = [torch.autograd.grad(scores.log_probs.sum(), states)[0] for scores in found]
        with torch.no_grad():
            without = scoring.score_hidden(whole, states, targets, statistics, temperature=0.8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "HeadLogProbs" in type(found[0].log_probs.grad_fn).__name__
    assert torch.equal(*gradients) and gradients[0].isfinite().all()
    for one, other, again in zip(*found, without, strict=True):
        assert (one is None) == (not statistics and one is not found[0].log_probs)
        if one is not None:
            assert torch.equal(one, other) and torch.equal(one, again)
    wanted = (whole.lm_head(states).float() / 0.8).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[0].log_probs, wanted, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "format_found"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float16", "weight": "float16"}, "float16"),
        ({"weight": "float32"}, None),
        ({"dtype": "float32"}, None),
        ({"dtype": "float32", "weight": "float32"}, None),
        ({"dtype": "float32", "autocast": "bfloat16"}, "bfloat16"),  # a final norm in float32
        ({"autocast": "float16"}, None),
        ({"weight": "float32", "autocast": "bfloat16"}, None),
        ({"device": "cpu"}, None),
        ({"head_on": "cpu"}, None),
        ({"cap": 30.0}, None),
        ({"triton": False}, None),
        ({"trained": "weight"}, None),
        ({"trained": "bias"}, None),
        ({"trained": "weight", "gradient": False}, "bfloat16"),
        ({"wrapped": True}, None),
    ],
)
def test_the_kernel_takes_plain_heads_in_half_precision_that_are_not_trained(
    change: dict[str, Any], format_found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from prefbuild.training import scoring

    case: dict[str, Any] = {
        "device": "cuda:0", "head_on": "cuda:0", "dtype": "bfloat16", "weight": "bfloat16", "autocast": None,
        "cap": None, "triton": True, "trained": None, "gradient": True, "wrapped": False, **change,
    }  # fmt: skip
    monkeypatch.setattr(scoring, "has_triton", lambda: case["triton"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda" and bool(case["autocast"]))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: getattr(torch, case["autocast"]))
    head: Any = torch.nn.Linear(4, 8)
    with FakeTensorMode():  # a GPU's tensors without a GPU
        weight = torch.empty(8, 4, device=case["head_on"], dtype=getattr(torch, case["weight"]))
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
    head.requires_grad_(False)
    if case["trained"]:
        getattr(head, case["trained"]).requires_grad_(True)
    if case["wrapped"]:
        head.__class__ = type("Other", (torch.nn.Linear,), {})
    with torch.set_grad_enabled(case["gradient"]):
        found = scoring.kernel_dtype(head, torch.device(case["device"]), getattr(torch, case["dtype"]), case["cap"])
    assert found == (format_found and getattr(torch, format_found))


def test_what_a_model_does_to_its_logits_is_read_from_its_config() -> None:
    import torch
    from transformers import CohereConfig, Gemma2Config, GraniteConfig

    from prefbuild.training.scoring import by_torch, logit_change

    assert logit_change(CohereConfig(logit_scale=0.25)) == (0.25, None)
    assert logit_change(GraniteConfig(logits_scaling=4.0)) == (0.25, None)
    assert logit_change(Gemma2Config(final_logit_softcapping=5.0)) == (1.0, 5.0)
    head, states, targets = head_and_tokens(100, 16, 6, False, "cpu")
    found, *_ = by_torch(head, states, targets, False, 0.25, 5.0, 0.5)
    logits = 5.0 * torch.tanh(head(states).float() * 0.25 / 5.0) / 0.5
    torch.testing.assert_close(found, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])


if __name__ == "__main__":
    check_kernel("cpu", 4999, 64, 200, bias=False)
    check_kernel("cpu", 256, 64, 200, bias=True)


@pytest.mark.parametrize("num", [0, 5, 128, 129, 256, 300, 512, 700])
def test_chunks_cover_all_rows_and_have_few_sizes(num: int) -> None:
    from prefbuild.training.scoring import chunks

    parts = list(chunks(num, 256))
    assert sorted({row for part in parts for row in range(num)[part]}) == list(range(num))
    assert {part.stop - part.start for part in parts} <= ({num} if num < 128 else {128, 256, num})
