"""What every training method shares: precision, curves, progress, checkpoints that can be trusted, saving.

A checkpoint counts only when its manifest, written last, agrees with its files: Trainer itself would go on from
one without optimizer or random state, and end elsewhere without a word.
"""

import functools
import json
import math
import os
import platform
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when datasets is imported, as transformers' Trainer does: one bar is enough.
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefbuild.artifact import canonical_json, verify_artifact, write_atomic, write_manifest
from prefbuild.errors import StageError
from prefbuild.machine import cpu_bf16
from prefbuild.methods import StopRule, TrainOptions, train_settings
from prefbuild.training import Run, ranks
from prefbuild.training.trackers import curve_points, trackers

# Where a checkpoint has its optimizer, and its weights where that is not WEIGHTS, by how processes share them (launch.py).
STATE = {
    None: {"optimizer.pt"},
    "ddp": {"optimizer.pt"},
    "fsdp": {"pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"},
    "zero3": {"latest"},
}
# And one of these where each process has all weights, by use_peft: a model of more than 50 GB is saved in several
# files, with an index.
WEIGHTS = {
    True: ("adapter_model.safetensors",),
    False: ("model.safetensors", "model.safetensors.index.json"),
}

NUM_POINTS_TO_APPEAR = 5  # logged points by which a metric that stop_if names must have come


def use_bf16(precision: str) -> bool:
    """Whether to compute in bf16. `auto`: where the GPU, or the CPU's instruction set, does."""
    import torch

    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(cpu_bf16())


def trainer_arguments(config: Any, settings: TrainOptions, *, run: Run, bf16: bool, **own: Any) -> Any:
    """The arguments that all of TRL's trainers have, and a method's own. `config` is the trainer's class of them."""
    import torch

    return config(
        output_dir=str(run.work),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.num_train_epochs or 1.0,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        **ranks.rank_arguments(settings, bf16),
        gradient_checkpointing=settings.gradient_checkpointing,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
        data_seed=run.seed,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # Trainer would log an average in place of a loss that is no number
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        **own,
    )


def set_up(settings: TrainOptions, seed: int) -> bool:
    """Seeds, determinism, and whether to compute in bf16, which is returned."""
    import torch
    from transformers import set_seed

    torch.use_deterministic_algorithms(settings.deterministic)
    # Costs time only: no kernel used here reads memory that it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    set_seed(seed)
    return use_bf16(settings.precision)


def load_policy(settings: TrainOptions, model: Path, bf16: bool) -> Any:
    """The model to train, or to train an adapter on; with `quantization: nf4` linear layers, but lm_head, in 4 bits.

    What peft.prepare_model_for_kbit_training is for is done by others: TRL freezes the base, lets gradients through to
    checkpointed layers and makes the adapter bf16, as the QLoRA paper has it. Norms compute in float32 by themselves.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, local_files_only=True, use_safetensors=True, **model_options(settings, bf16)
    )


def model_options(settings: TrainOptions, bf16: bool, whole: list[str] | None = None) -> dict[str, Any]:
    """Number format and quantisation, as from_pretrained takes them. `whole` are linear layers left as they are."""
    import torch
    from transformers import BitsAndBytesConfig

    # All weights are trained in float32, also where bf16 computes (by autocast): bf16 has 8 significant bits, so that a
    # step below a 500th of a weight's size would be rounded away, and most steps are.
    options: dict[str, Any] = {"dtype": "auto" if bf16 and settings.use_peft else torch.float32}
    if settings.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
            bnb_4bit_use_double_quant=False,
            llm_int8_skip_modules=whole,
        )
    return options


def lora_config(settings: TrainOptions, **options: Any) -> Any:
    """PEFT's config of the adapter, of a model that writes unless `options` say otherwise; None for all weights."""
    from peft import LoraConfig

    if not settings.use_peft:
        return None
    return LoraConfig(**{**settings.lora.model_dump(), "bias": "none", "task_type": "CAUSAL_LM", **options})


def run_trainer(trainer: Any, settings: TrainOptions, checkpoint: Path | None) -> tuple[Any, list[dict[str, Any]]]:
    """Train, from a checkpoint if there is one; returns Trainer's result and the logged points that have a loss.

    A run that broke a rule of `stop_if` ends early; shared_metrics tells. Raises StageError when the loss became no
    number, or a rule's metric is not logged.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Health(settings))
    if ranks.num_ranks() > 1:
        share_work(trainer)
    for tracking in trackers(train_settings(settings)) if ranks.is_main() else []:
        trainer.add_callback(tracking)
    if checkpoint and settings.use_peft:
        # PEFT 0.21 would load an adapter that QLoRA trains in bf16 as float32, and the run would end elsewhere.
        trainer.model.load_adapter = functools.partial(trainer.model.load_adapter, autocast_adapter_dtype=False)
    if checkpoint:
        # TRL 1.16 counts the tokens of a resumed run from 0
        logged = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        trainer._total_train_tokens = int(max(entry.get("num_tokens", 0) for entry in logged))
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    refuse_no_number(result.training_loss, settings)
    return result, [entry for entry in trainer.state.log_history if "loss" in entry]


def share_work(trainer: Any) -> None:
    """What Trainer must do otherwise when several processes train."""
    import torch
    from accelerate.data_loader import prepare_data_loader

    accelerator, evaluate = trainer.accelerator, trainer.evaluate

    def evaluate_whole(*arguments: Any, **named: Any) -> Any:
        # Shared out, rows would be counted twice where the ranks can't have as many each. So each rank takes them all, as
        # one process does, and there is nothing to gather.
        accelerator.prepare = functools.partial(
            prepare_data_loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        accelerator.gather = lambda tensor: tensor
        try:
            return evaluate(*arguments, **named)
        finally:
            del accelerator.prepare, accelerator.gather

    trainer.evaluate = evaluate_whole
    if ranks.strategy() != "fsdp":
        return
    # By this name generation knows that a rank which is done must go on until all are: each token gathers every layer.
    inner = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    inner._is_fsdp_managed_module = True
    if trainer.args.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate would add up gradients in bf16; DDP and a single GPU do in float32.
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def refuse_no_number(loss: float, settings: TrainOptions) -> None:
    """StageError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise StageError(f"the loss became {loss}; lower train.learning_rate (now {settings.learning_rate})")


def shared_metrics(trainer: Any, result: Any, history: list[dict[str, Any]], bf16: bool) -> dict[str, Any]:
    """The part of train.json that every method has."""
    last = history[-1]
    stopped = next(one.stopped for one in trainer.callback_handler.callbacks if isinstance(one, Health))
    return {
        "steps": trainer.state.global_step,
        "stopped": stopped,
        "stopped_early": int(stopped is not None),
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "loss": last["loss"],
        # Not result.training_loss, which after a resume is the sum of the steps since, divided by all.
        "mean_loss": math.fsum(entry["loss"] for entry in history) / len(history),
        "grad_norm": {"last": last["grad_norm"], "max": max(entry["grad_norm"] for entry in history)},
        "tokens": last["num_tokens"],
        "seconds": round(result.metrics["train_runtime"], 1),
        "machine": machine() | {"precision": "bf16" if bf16 else "float32"},
    }


def dpo_metrics(
    trainer: Any, result: Any, history: list[dict[str, Any]], held_out: dict[str, float], bf16: bool
) -> dict[str, Any]:
    """train.json of DPO, whichever engine trained. `held_out` are metrics by TRL's names; {} without held-out rows."""
    first, last = history[0], history[-1]
    return {
        **shared_metrics(trainer, result, history, bf16),
        "rewards": pick(last, "rewards/"),
        "logps": pick(last, "logps/"),
        "step_0": {"loss": first["loss"], "margins": first["rewards/margins"]},
        "chosen_logps_change": last["logps/chosen"] - first["logps/chosen"],
        "held_out": {"loss": held_out["loss"], "rewards": pick(held_out, "rewards/")} if held_out else {},
    }


def pick(entry: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of one family, by their last name: {"rewards/margins": 1} -> {"margins": 1}."""
    return {key.removeprefix(prefix): value for key, value in sorted(entry.items()) if key.startswith(prefix)}


def machine() -> dict[str, str]:
    """What the bytes depend on besides the recipe: the same values here promise the same adapter or weights."""
    import torch

    cuda = torch.cuda.is_available()
    image = {"image": os.environ["PREFBUILD_IMAGE"]} if "PREFBUILD_IMAGE" in os.environ else {}
    together = {"ranks": f"{ranks.num_ranks()} ({ranks.strategy()})"} if ranks.num_ranks() > 1 else {}
    return {
        **image,
        **together,
        "device": torch.cuda.get_device_name()
        if cuda
        else platform.machine() + " " + torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "trl", "peft")},  # asked for without importing them
    }


def callbacks(run: Run, checkpoint: Path | None) -> list[TrainerCallback]:
    """What every training has: curves, one progress bar, and checkpoints that are whole or none."""
    return [Curves(run.live, resume_from=checkpoint), ProgressBar(run.name), Checkpoints(run.live)]


class Curves(TrainerCallback):
    """Log every point with DVCLive; curves of a resumed run go on where the checkpoint left them.

    A point is a dozen small files: they are written by a thread, while the next step is computed. DVCLive takes a second
    or two to import; that is the thread's first task, while a model is loaded.
    """

    def __init__(self, folder: Path, resume_from: Path | None):
        if not ranks.is_main():
            return
        os.environ.pop("DVC_ROOT", None)  # DVCLive would take it for its own
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.last: Future[None] = self.writer.submit(self.open, folder, resume_from)

    def open(self, folder: Path, resume_from: Path | None) -> None:
        """Begin the curves, or go on with a checkpoint's."""
        from dvclive import Live, live

        # DVCLive only draws the curves here: the stage is DVC's already, and a repository without a commit, or a
        # container without git, would make it raise.
        live.get_dvc_repo = lambda: None
        if resume_from is not None:
            shutil.copytree(resume_from / "live", folder, dirs_exist_ok=True)
        self.live = Live(str(folder), resume=resume_from is not None, save_dvc_exp=False, dvcyaml=None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not ranks.is_main():
            return
        self.wait()
        self.last = self.writer.submit(self.write, state.global_step, curve_points(logs or {}))
        if "loss" not in (logs or {}):
            self.wait()  # no step follows, in which it could be written

    def write(self, step: int, points: dict[str, float]) -> None:
        """Write one point of every curve."""
        self.live.step = step
        for key, value in points.items():
            self.live.log_metric(key, value)
        # Not sync(), which reads all curves again from their files, for DVC Studio: a tenth of a second a step after a
        # thousand.
        self.live.make_summary()

    def wait(self) -> None:
        """Until all is written. Raises what went wrong there."""
        self.last.result()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if ranks.is_main():
            self.wait()  # a checkpoint has the curves so far

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if ranks.is_main():
            self.wait()
            self.live.end()


class ProgressBar(TrainerCallback):
    """One bar in words: step, time left, loss, and margin and accuracy or reward and length."""

    def __init__(self, name: str):
        self.name = name
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.name}",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 15,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if self.bar is not None and "loss" in logs:
            words = {
                "loss": "loss",
                "rewards/margins": "margin",
                "rewards/accuracies": "accuracy",
                "reward": "reward",
                "completions/mean_length": "length",
                "margin": "margin",
                "accuracy": "accuracy",
            }
            self.bar.set_postfix(
                {word: f"{logs[key]:.3g}" for key, word in words.items() if key in logs}, refresh=False
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


class Health(TrainerCallback):
    """End a run that diverges: by the rules of `stop_if`, or with StageError when its loss is no number.

    It looks at the points that checkpoints keep, and lets none be saved at the step it stops at, so that a run that
    is killed and goes on stops where it would have stopped.
    """

    def __init__(self, settings: TrainOptions):
        self.settings = settings
        self.stopped: dict[str, Any] | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" not in (logs or {}):
            return  # an evaluation, or the summary at the end
        points = [entry for entry in state.log_history if "loss" in entry]
        refuse_no_number(points[-1]["loss"], self.settings)
        for rule in self.settings.stop_if:
            if self.stopped is None and self._broken(rule, points):
                self.stopped = {"step": state.global_step, "rule": str(rule)}
                control.should_training_stop, control.should_save = True, False
                print(f"stopped at step {state.global_step}: {rule} (train.stop_if)", file=sys.stderr)

    def _broken(self, rule: StopRule, points: list[dict[str, Any]]) -> bool:
        logged = [{key.replace("/", "."): value for key, value in point.items()} for point in points]
        # KTO logs the rewards of good answers only where a batch has any.
        values = [point[rule.metric] for point in logged if rule.metric in point]
        if not values and len(points) >= NUM_POINTS_TO_APPEAR:
            there = ", ".join(sorted({key for point in logged for key in point} - {"step", "epoch"}))
            raise StageError(f"train.stop_if: {rule.metric} is not logged; there are {there}")
        newest = values[-rule.for_ :]
        return rule.metric in logged[-1] and len(newest) == rule.for_ and all(map(rule.broken_by, newest))


class Checkpoints(TrainerCallback):
    """Complete every checkpoint with the curves so far and, last, a manifest."""

    def __init__(self, live: Path):
        self.live = live

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks.wait()  # each rank has written its part
        if ranks.is_main():
            folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            shutil.copytree(self.live, folder / "live", dirs_exist_ok=True)
            write_manifest(folder, stage="train", name="checkpoint", inputs={})


def newest_checkpoint(work: Path, use_peft: bool = True) -> Path | None:
    """The newest checkpoint that is whole, of an adapter or (`use_peft` false) a model; half-written ones go."""
    return ranks.from_main(lambda: _newest_checkpoint(work, use_peft))


def _newest_checkpoint(work: Path, use_peft: bool) -> Path | None:
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            files = set(verify_artifact(folder)["files"])
            missing = needed_files() - files
            if ranks.strategy() in (None, "ddp") and not files & set(WEIGHTS[use_peft]):
                missing.add(WEIGHTS[use_peft][0])
            if missing:
                raise StageError(f"{folder}: lacks {', '.join(sorted(missing))}")
        except StageError as error:
            print(f"checkpoint left out: {error}", file=sys.stderr)
            shutil.rmtree(folder)
        else:
            print(f"going on from {folder.name}", file=sys.stderr)
            return folder
    return None


def needed_files() -> set[str]:
    """The files that a checkpoint must have to go on from it, beside WEIGHTS."""
    num = ranks.num_ranks()
    random_states = {"rng_state.pth"} if num == 1 else {f"rng_state_{rank}.pth" for rank in range(num)}
    return STATE[ranks.strategy()] | random_states | {"scheduler.pt", "trainer_state.json"}


def save_trained(settings: TrainOptions, model: Any, run: Run) -> None:
    """Save what was trained: the adapter, or all weights."""
    if settings.use_peft:
        _save_adapter(model, run.trained, run.base)
    else:
        _save_weights(model, run.trained, run.model)


def _save_weights(model: Any, folder: Path, base_model: Path) -> None:
    """Save a model as safetensors in the arithmetic it was trained in, with its base's config.

    Trainer puts the tokenizer's special tokens and its own settings into the model's config; those are not trained.
    """
    from transformers import AutoConfig, GenerationConfig

    if not ranks.is_main():
        return
    model.config = AutoConfig.from_pretrained(base_model, local_files_only=True)
    model.generation_config = GenerationConfig()  # saving the base's own would fail on many that people publish
    model.save_pretrained(folder)
    generation_config = folder / "generation_config.json"
    generation_config.unlink(missing_ok=True)
    if (base_model / generation_config.name).exists():
        shutil.copyfile(base_model / generation_config.name, generation_config)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner may read


def _save_adapter(model: Any, folder: Path, base: dict[str, str]) -> None:
    """Save a PEFT model's adapter as safetensors, its config naming base and revision, byte for byte the same each time."""
    weights = ranks.whole_weights(model)
    if not ranks.is_main():
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path = base["name"]
    config.revision = base["revision"]
    # "auto" would ask the hub whether the base's vocabulary was resized; DPO never resizes it.
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False, state_dict=weights)
    for extra in ("README.md", "training_args.bin"):
        (folder / extra).unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps target_modules as a set, whose order changes from run to run.
    saved["target_modules"] = sorted(saved["target_modules"])
    if saved["modules_to_save"]:  # PEFT adds the names that heads have, again at each load
        saved["modules_to_save"] = sorted(set(saved["modules_to_save"]))
    write_atomic(path, canonical_json(saved))
    os.chmod(folder / "adapter_model.safetensors", 0o644)
