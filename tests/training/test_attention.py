"""Keys of packed rows: a prompt's are there for each completion, and have the gradients of all."""

from typing import Any

import pytest

from prefbuild.training.packing import pack

GROUPS = [([1] * 5, [[2] * 3, [3] * 4]), ([4] * 2, [[5], [6] * 6]), ([7] * 130, [[8] * 70, [9] * 20])]


def of_keys(device: str, dtype: str) -> tuple[Any, Any, Any]:
    """(keys of a packed row, their gradient by Gather, and by index_select in float64), for a random one of what is gathered."""
    import torch

    from prefbuild.training.attention import Gather

    torch.manual_seed(0)
    segments = pack(GROUPS, torch.device(device), multiple_of=8).segments
    keys = torch.randn(segments.query_ends[-1], 3, 20, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    gathered = Gather.apply(keys, segments)
    incoming = torch.randn_like(gathered)
    (found,) = torch.autograd.grad(gathered, keys, incoming)
    exact = keys.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact.index_select(0, segments.keys), exact, incoming.double())
    assert torch.equal(gathered, keys.index_select(0, segments.keys))
    return keys, found, wanted


def test_gradients_of_keys_are_those_of_all_their_uses() -> None:
    import torch

    _, found, wanted = of_keys("cpu", "float32")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_kernel_gives_pytorchs_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from prefbuild.training import attention

    assert attention._triton() is not None
    _, ours, wanted = of_keys("cuda", dtype)
    monkeypatch.setattr(attention, "_triton", lambda: None)
    _, theirs, _ = of_keys("cuda", dtype)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-2, atol=1e-2)
