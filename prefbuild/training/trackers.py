"""Training's curves for TensorBoard, Weights & Biases, MLflow and trackio, beside DVCLive's and by the same names.

Told by the job's environment, PREFBUILD_REPORT_TO and PREFBUILD_TRACKING, because it changes no result. Nothing leaves the
machine. transformers' own callbacks are not used: they log all arguments, with paths of this machine, and name curves
otherwise. A run that was killed goes on as the same run: what its store lacks of the checkpoint's history is logged again,
and what it has is not.
"""

import contextlib
import io
import json
import logging
import os
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefbuild.artifact import write_json
from prefbuild.errors import StageError
from prefbuild.track import PROJECT, asked_for, trackio_folder

Points = dict[str, float]


def curve_points(logs: dict[str, Any]) -> Points:
    """What Trainer logs, as curves: numbers of the training itself."""
    return {
        f"train/{key}": value
        for key, value in logs.items()
        if isinstance(value, int | float) and not key.startswith("eval_") and key not in ("epoch", "step", "total_flos")
    }


def trackers(config: dict[str, Any]) -> list[TrainerCallback]:
    """The callback that tracks a training where the job asks for it. `config` is what the recipe says under `train:`."""
    report_to = asked_for()
    return [Tracking(report_to, Path(os.environ["PREFBUILD_TRACKING"]), config)] if report_to else []


class Tracking(TrainerCallback):
    """Logs every point with each tracker. A tracker that fails amid a training is left out from there on, aloud."""

    def __init__(self, report_to: list[str], folder: Path, config: dict[str, Any]):
        """`folder` is named as the recipe, and holds a folder a tracker."""
        self.report_to = report_to
        self.folder = folder
        self.config = config
        self.running: dict[str, Any] = {}
        # Nothing of the user's: projects, servers and keys that are set for other work.
        for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            del os.environ[key]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        # In the work folder, which lives as long as a training that can go on.
        note = Path(str(args.output_dir), "tracking.json")
        ids: dict[str, str] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        for name in self.report_to:
            try:
                tracker = TRACKERS[name](self.folder, ids.get(name), self.config, state.global_step)
            except Exception as error:
                raise StageError(
                    f"train.report_to: {name} can't go on in {self.folder / name} ({type(error).__name__}: "
                    f"{_first_line(error)}); move that folder away, or leave {name} out of report_to"
                ) from error
            self.running[name] = tracker
            ids[name] = tracker.id
            write_json(note, ids)
            for entry in state.log_history:
                tracker_log(tracker, int(entry["step"]), curve_points(entry))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, tracker in list(self.running.items()):
            try:
                tracker_log(tracker, state.global_step, curve_points(logs or {}))
            except Exception as error:  # a database that is locked must not end a training of hours
                del self.running[name]
                print(
                    f"tracking with {name} ended at step {state.global_step}: {type(error).__name__}: {_first_line(error)}; "
                    "DVCLive goes on",
                    file=sys.stderr,
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tracker in self.running.values():
            tracker.end()


def tracker_log(tracker: Any, step: int, points: Points) -> None:
    """Log the points of a step that the tracker's store has not."""
    if points and step > tracker.last:
        tracker.log(step, points)


# ---- one class a tracker: `id` of the run, `last` step that its store has, log, end


class TensorBoard:
    """Event files; a folder a run. Steps after the checkpoint that a run goes on from are purged as its reader does."""

    def __init__(self, folder: Path, id: str | None, config: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.id = id or secrets.token_hex(4)
        self.last = step if id else 0
        where = folder / "tensorboard" / f"{folder.name}-{self.id}"
        # Event files are named after the host; this one is of nobody's.
        with _host_name("localhost"):
            self.writer = SummaryWriter(str(where), purge_step=step + 1 if id else None)
        if id is None:
            self.writer.add_text("train", f"```json\n{json.dumps(config, indent=1)}\n```")

    def log(self, step: int, points: Points) -> None:
        for key, value in points.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class WandB:
    """An offline run. What a killed run had not written is lost in wandb's buffer, so it is all written anew."""

    last = 0

    def __init__(self, folder: Path, id: str | None, config: dict[str, Any], step: int):
        scratch = Path(os.environ.get("PREFBUILD_WORK") or folder, ".wandb").resolve()
        for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            os.environ[f"WANDB_{kind}_DIR"] = str(scratch)
        # Silent: TRL asks for the address of the run at each checkpoint, and wandb warns that it has none.
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        import wandb

        self.id = id or secrets.token_hex(4)
        for earlier in folder.glob(f"wandb/offline-run-*-{self.id}"):
            if not list(earlier.glob("*.synced")):
                shutil.rmtree(earlier)
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            mode="offline",
            root_dir=str(folder),
            host="localhost",
            username="",
            program="",
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self.run = wandb.init(project=PROJECT, name=folder.name, id=self.id, config=config, settings=settings)

    def log(self, step: int, points: Points) -> None:
        self.run.log(points, step=step)

    def end(self) -> None:
        self.run.finish()


class MLflow:
    """A SQLite store, written by MLflow's client: its fluent functions would add user, script and commit."""

    def __init__(self, folder: Path, id: str | None, config: dict[str, Any], step: int):
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        for logger in ("mlflow", "alembic"):  # importing mlflow sets its own
            logging.getLogger(logger).setLevel(logging.WARNING)
        where = (folder / "mlflow").resolve()
        where.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=f"sqlite:///{where}/mlflow.db")
        if id is None:
            experiment = self.client.get_experiment_by_name(PROJECT)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
            self.id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
            self.client.log_batch(self.id, params=[Param(key, value) for key, value in _flat(config).items()])
        else:
            self.id = id
            self.client.update_run(id, status="RUNNING")
        self.last = max((point.step for point in self.client.get_metric_history(self.id, "train/loss")), default=0)

    def log(self, step: int, points: Points) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in points.items()])

    def end(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """A SQLite store; of several trainings of a recipe, the latest is the one that goes on."""

    def __init__(self, folder: Path, id: str | None, config: dict[str, Any], step: int):
        where = trackio_folder(folder)
        os.environ["TRACKIO_DIR"] = str(where)
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import TRACKIO_DIR

        assert where == TRACKIO_DIR, "it is read when trackio is imported, and something imported it before"

        self.trackio = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to see it, as `prefbuild track` does
            self.run = trackio.init(
                project=PROJECT,
                name=folder.name,
                config=config,
                resume="allow" if id else "never",  # a run killed at once may not be in the store yet
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.id = self.run.id
        self.last = SQLiteStorage.get_max_step_for_run(PROJECT, run_id=self.id) or 0 if id else 0

    def log(self, step: int, points: Points) -> None:
        self.run.log(points, step=step)

    def end(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


@contextlib.contextmanager
def _host_name(name: str) -> Any:
    """Another name of this machine, for libraries that write it down."""
    import socket

    own = socket.gethostname
    socket.gethostname = lambda: name
    try:
        yield
    finally:
        socket.gethostname = own


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Settings by their dotted keys, as text."""
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in _flat(one, f"{key}.{name}" if key else name).items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}
