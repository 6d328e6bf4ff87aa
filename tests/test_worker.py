"""What a stage says when something runs out."""

import errno
from pathlib import Path
from typing import Any

import pytest

from prefbuild.methods import METHODS, needs_bitsandbytes, reference_settings, train_settings
from prefbuild.worker import explain, killed_for_memory


def test_gpu_memory_says_what_to_change() -> None:
    import torch

    text = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 3. Of these"))
    assert text is not None
    assert text.startswith("out of GPU memory; lower train.per_device_train_batch_size")
    assert "gradient_checkpointing: true" in text and text.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB)")


def test_memory_of_the_machine() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    text = explain(caught.value)
    assert text is not None and text.startswith("out of memory; lower the batch size, or raise compute.memory")


def test_a_full_disk_is_seen_through_every_library(tmp_path: Path) -> None:
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    for error in (
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 474"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        wrapped,
    ):
        text = explain(error)
        assert text is not None and text.startswith("no space left: "), error


def test_other_errors_are_left_alone() -> None:
    assert explain(ValueError("a bug")) is None


def test_nothing_is_counted_outside_of_containers() -> None:
    assert killed_for_memory() == 0


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, False),
        ({"quantization": "nf4"}, True),
        ({"optim": "paged_adamw_32bit"}, True),
        ({"optim": "sgd"}, False),
        ({"use_peft": False}, False),
        ({"use_peft": False, "optim": "adamw_bnb_8bit"}, True),
    ],
)
def test_bitsandbytes_is_there_where_it_is_used(settings: dict[str, Any], needs: bool) -> None:
    asked = METHODS["dpo"](method="dpo", **settings)
    assert needs_bitsandbytes(train_settings(asked)) is needs
    assert needs_bitsandbytes(reference_settings(asked, 42)["train"]) is (asked.quantization == "nf4")
