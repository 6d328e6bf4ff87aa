"""What a training process is among its ranks (prefbuild/launch.py): who it is, its part of a batch, and how they share.

A process that nobody launched is rank 0 of 1, for which everything here does nothing.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefbuild.errors import StageError
from prefbuild.launch import INSTALL_DEEPSPEED, STRATEGY, is_rank
from prefbuild.methods import TrainOptions, split_batch

Value = TypeVar("Value")


def num_ranks() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if is_rank() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and is heard."""
    return number() == 0


def strategy() -> str | None:
    """ddp, fsdp or zero3; None where one process trains."""
    return os.environ[STRATEGY] if is_rank() else None


def wait() -> None:
    """Until all ranks are here."""
    if is_rank():
        import torch.distributed

        torch.distributed.barrier()


def from_main(find: Callable[[], Value]) -> Value:
    """What rank 0 finds, for all ranks."""
    if not is_rank():
        return find()
    import torch.distributed

    found = [find() if is_main() else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def total(number: int) -> int:
    """The sum of all ranks' numbers."""
    if not is_rank():
        return number
    import torch.distributed

    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, number)
    return sum(found)


def add_up(tensor: Any) -> None:
    """Replace a tensor by the sum of all ranks' tensors."""
    if is_rank():
        import torch.distributed

        torch.distributed.all_reduce(tensor)


def sum_gradients(model: Any) -> None:
    """Replace the gradients of what is trained by their sums over all ranks, in one exchange."""
    if not is_rank():
        return
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # this rank had no part in the step
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in trained])
    add_up(flat)
    for parameter, part in zip(trained, flat.split([one.numel() for one in trained]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def leave() -> None:
    """Part from the other ranks, when all is done."""
    if is_rank():
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def rank_arguments(settings: TrainOptions, bf16: bool) -> dict[str, Any]:
    """The arguments of Trainer that depend on how many processes train, and how they share the work.

    Every step takes the rows that it takes in one process; see methods.split_batch.
    """
    batch, accumulation = split_batch(settings, num_ranks())
    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    match strategy():
        case "ddp":
            # All of an adapter has a part in every loss; looking for what has none costs a pass over the graph a step.
            return {**batches, "ddp_find_unused_parameters": False}
        case "fsdp":
            # Shards, for checkpoints: a whole state would be gathered, base and all, on rank 0.
            return {**batches, "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
        case "zero3":
            if importlib.util.find_spec("deepspeed") is None:
                raise StageError(f"compute.strategy: zero3 is DeepSpeed's, which is not installed; {INSTALL_DEEPSPEED}")
            return {**batches, "deepspeed": zero3(settings, bf16)}
    return batches


def zero3(settings: TrainOptions, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's config. `auto` is filled in by transformers from Trainer's arguments."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": bf16},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,  # the recipe's own, which Trainer makes
    }


@contextmanager
def for_generation(trainer: Any) -> Iterator[Any]:
    """The model of a trainer as it can generate, before training and after it."""
    model = trainer.model
    if strategy() == "zero3":
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as whole:
            yield whole
    elif strategy() == "fsdp" and model.device != trainer.accelerator.device:
        # Not sharded yet, and so on the CPU, where generation takes minutes.
        model.to(trainer.accelerator.device)
        yield model
        model.to("cpu")
    else:
        yield model


def whole_weights(model: Any) -> dict[str, Any] | None:
    """The trained weights of a model that is spread over the ranks, in full, by name; None where each rank has them.

    All ranks must ask; only rank 0 gets tensors.
    """
    if strategy() in (None, "ddp"):
        return None
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _whole(parameter)
            if is_main():
                found[name] = whole
    return found


def _whole(parameter: Any) -> Any:
    if strategy() == "fsdp":
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return full.detach().cpu()
    from deepspeed.utils import safe_get_full_fp32_param

    # What the optimizer updates; the parameter itself is a copy in bf16 where that is computed in.
    return safe_get_full_fp32_param(parameter).detach().cpu().clone()
