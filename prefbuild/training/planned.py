"""What prefbuild/plan.py says of a run on this machine, asked before its model is loaded."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from prefbuild.methods import TrainOptions
from prefbuild.plan import H200, PackedPlan, Row, plan_packed
from prefbuild.shape import shape_of_checkpoint


def plan_run(settings: TrainOptions, model: Path, steps: Sequence[Sequence[Row]], bf16: bool) -> PackedPlan:
    """How packed training does these steps: (prompt, chosen, rejected) tokens of the rows of each.

    By all of a GPU's memory, not by what is free of it, and by one GPU's speed: the same machine gives the same
    micro-batches, and so the same bytes.
    """
    gpu = torch.cuda.is_available()
    return plan_packed(
        shape_of_checkpoint(model),
        steps,
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if gpu else 0,
        lora_r=settings.lora.r if settings.use_peft else None,
        quantized=settings.quantization is not None,
        statistics=True,
        bytes_per_number=2 if bf16 else 4,
        fused=gpu and importlib.util.find_spec("liger_kernel") is not None,
        speed=H200 if gpu else None,
    )
