"""One rank of trainings that a test launches: `python one_rank.py '[<arguments of trained.train>, ...]'`, in JSON.

They run one after another, because a process takes seconds to import what it needs.

With the strategy fsdp the two processes of a test shard their model on the CPU, which accelerate otherwise does on
accelerators alone: it is told that these are some.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from prefbuild.launch import record_failure
from prefbuild.machine import leave_out
from prefbuild.training import ranks
from prefbuild.worker import die_with_parent


def shard_on_the_cpu() -> None:
    import accelerate.state
    from accelerate.utils import DistributedType

    prepare = accelerate.state.PartialState._prepare_backend

    def as_if_gpus(self: accelerate.state.PartialState, *arguments: object, **named: object) -> tuple[str, object]:
        backend, _ = prepare(self, *arguments, **named)  # type: ignore[arg-type]
        return backend, DistributedType.MULTI_NEURON

    accelerate.state.PartialState._prepare_backend = as_if_gpus  # type: ignore[assignment, method-assign]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main() -> None:
    import torch.distributed
    from trained import train

    torch.distributed.init_process_group("gloo")
    if ranks.strategy() == "fsdp":
        shard_on_the_cpu()
    for asked in json.loads(sys.argv[1]):
        folder, model, prepared = (Path(asked.pop(key)) for key in ("folder", "model", "prepared"))
        if asked.pop("resumed", False) and ranks.is_main():  # as if it had been killed after its second step
            (folder / "adapter").rename(folder / "adapter-whole")
            shutil.rmtree(folder / "work/checkpoint-4")
        ranks.wait()
        metrics = train(folder, asked.pop("method"), model, prepared, **asked)
        (folder / f"metrics-{os.environ['RANK']}.json").write_text(json.dumps(metrics))
    ranks.leave()


if __name__ == "__main__":
    die_with_parent()
    leave_out("bitsandbytes")
    try:
        main()
    except Exception as error:
        record_failure(error, None, 7)
