"""Every tracker has what DVCLive has, through a kill too, and a tracker changes nothing of what is trained."""

import importlib
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained import digest, train, write_prepared

from prefbuild.errors import StageError, UsageError
from prefbuild.methods import Tracker
from prefbuild.stages import train as stage
from prefbuild.track import send, track
from prefbuild.training.common import ProgressBar
from prefbuild.training.trackers import Tracking

Curves = dict[str, list[tuple[int, float]]]
ALL: tuple[str, ...] = Tracker.__args__  # type: ignore[attr-defined]
SETTINGS: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "lora": {"r": 4, "lora_dropout": 0.1}}
NAME = "my-recipe"
KEY = "f" * 40


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("trackers") / "prepared", tiny_model, "answers", train=6, held_out=0)


@pytest.fixture(scope="module")
def tracked(tiny_model: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A training with every tracker, killed at step 4 and gone on from the checkpoint at 3; the trackers' folder."""
    folder = tmp_path_factory.mktemp("tracked")
    where = folder / "build/.tracking" / NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFBUILD_REPORT_TO", ",".join(ALL))
        patch.setenv("PREFBUILD_TRACKING", str(where))
        patch.setenv("PREFBUILD_WORK", str(folder / "work"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        # What a user may have set for other work: none of it may be used.
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_ENTITY", "somebody")
        patch.setenv("WANDB_MODE", "online")
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
        for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
            del sys.modules[module]  # another test imported it, for another folder
        for module in ("torch.utils.tensorboard", "wandb", "mlflow.tracking"):
            importlib.import_module(module)  # once, and not in both processes
        pid = os.fork()
        if pid == 0:

            def die_at_4(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)

            ProgressBar.on_step_end = die_at_4  # type: ignore[method-assign]
            train(folder, "sft", tiny_model, prepared, **SETTINGS)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert (folder / "work/checkpoint-3").exists()
        train(folder, "sft", tiny_model, prepared, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield where


def test_a_tracker_changes_no_byte_of_the_adapter(
    tracked: Path, tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    train(tmp_path, "sft", tiny_model, prepared, **SETTINGS)
    assert digest(tmp_path) == digest(tracked.parents[2])


@pytest.mark.parametrize("tracker", ALL)
def test_each_tracker_has_one_run_with_the_curves_of_dvclive(tracker: str, tracked: Path) -> None:
    want = dvclive(tracked.parents[2] / "live/plots/metrics/train")
    assert len(want) > 8 and [step for step, _ in want["train/loss"]] == [1, 2, 3, 4, 5]
    have, name, config = READERS[tracker](tracked)
    timed = {key for key in want if key.startswith("train/train_")}  # seconds, which no two runs share
    assert timed <= set(have)
    assert {key: have[key] for key in set(want) - timed} == {
        key: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for key, points in want.items()
        if key not in timed
    }
    assert name.startswith(NAME)
    assert config.pop("learning_rate") in (1e-3, "0.001")
    assert "output_dir" not in config


def test_nothing_of_the_user_or_the_machine_is_written_down(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 4
    sent = [path for path in files if path.suffix == ".wandb"]
    for path in files:
        content = path.read_bytes()
        for secret in (KEY, "somebody", *([socket.gethostname()] if len(socket.gethostname()) > 3 else [])):
            assert secret.encode() not in content, path
            assert secret not in path.name
    assert len(sent) == 1
    for own in (str(tracked.parents[2]), "requirements.txt", "def ", "diff --git"):
        assert own.encode() not in sent[0].read_bytes()


def test_track_says_how_to_see_each_and_sends_to_wandb_alone(tracked: Path) -> None:
    shown = track(NAME)
    run = next(tracked.glob("wandb/offline-run-*")).relative_to(tracked.parents[2])
    assert shown.splitlines() == [
        "tensorboard: 1 run",
        f"  tensorboard --logdir build/.tracking/{NAME}/tensorboard",
        "then http://localhost:6006",
        "",
        "wandb: 1 run, 1 of them not sent",
        f"  prefbuild track {NAME} --to wandb",
        "which runs, with your own login (`wandb login`):",
        f"  wandb sync {run}",
        "",
        f"mlflow: build/.tracking/{NAME}/mlflow/mlflow.db",
        f"  mlflow ui --backend-store-uri sqlite:///build/.tracking/{NAME}/mlflow/mlflow.db",
        "then http://localhost:5000; the page is in the whole package: pip install mlflow",
        "",
        f"trackio: build/.tracking/{NAME}/trackio",
        f"  TRACKIO_DIR=build/.tracking/{NAME}/trackio trackio show --project prefbuild",
        "which opens the page",
    ]
    commands: list[list[str]] = []
    assert send(NAME, run=lambda command: commands.append(command) or 0) == 0
    assert [command[1:] for command in commands] == [["-m", "wandb", "sync", str(run)]]
    mark = run / f"run-{run.name[-8:]}.wandb.synced"
    mark.touch()  # as wandb marks what it has sent
    assert send(NAME, run=lambda command: pytest.fail("was sent twice")) == 0
    mark.unlink()


def test_nothing_tracked_and_nothing_installed_are_said(
    tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefbuild.track.MODULES", {"wandb": ("no_such_module",), "mlflow": ("json", "no_such_one")})
    with pytest.raises(UsageError, match=r"wandb is not installed, .* -m pip install 'prefbuild\[wandb\]'"):
        send(NAME)
    monkeypatch.setenv("PREFBUILD_REPORT_TO", "wandb,mlflow")
    says = r"train.report_to: wandb, mlflow not installed; .* -m pip install 'prefbuild\[wandb,mlflow\]', or leave"
    with pytest.raises(StageError, match=says):
        stage.run({}, {}, {}, tmp_path, NAME)
    monkeypatch.setenv("PREFBUILD_IMAGE", "sha256:0")
    with pytest.raises(StageError, match="build it with `prefbuild image build ROLE --tracking`, or leave it out"):
        stage.run({}, {}, {}, tmp_path, NAME)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing was tracked; write train: {report_to:"):
        track(NAME)
    with pytest.raises(UsageError, match="nothing to send; train with report_to"):
        send(NAME)


def test_a_store_that_breaks_ends_its_tracker_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "work"), use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    tracking = Tracking(["mlflow", "tensorboard"], tmp_path / NAME, {"method": "sft"})
    tracking.on_train_begin(arguments, state, control)
    store = tmp_path / NAME / "mlflow/mlflow.db"
    store.write_text("no database any more" * 1000)
    state.global_step = 1
    tracking.on_log(arguments, state, control, logs={"loss": 0.5})
    assert "tracking with mlflow ended at step 1: MlflowException" in capsys.readouterr().err
    tracking.on_train_end(arguments, state, control)
    (events,) = (tmp_path / NAME / "tensorboard").rglob("events*")
    assert b"train/loss" in events.read_bytes()
    says = rf"train.report_to: mlflow can't go on in {tmp_path}/{NAME}/mlflow \(.*\); move that folder away, or leave"
    with pytest.raises(StageError, match=says):
        tracking.on_train_begin(arguments, state, control)


# ---- readers: curves, the run's name, its config


def dvclive(folder: Path) -> Curves:
    curves = {}
    for path in folder.rglob("*.tsv"):
        _, *lines = path.read_text().splitlines()
        key = f"train/{path.relative_to(folder).with_suffix('').as_posix()}"
        curves[key] = [(int(step), float(value)) for step, value in (line.split("\t") for line in lines)]
    return curves


def read_tensorboard(folder: Path) -> tuple[Curves, str, dict[str, Any]]:
    import json

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "tensorboard").iterdir()
    assert len(list(run.iterdir())) == 2  # what was killed wrote one, and what went on
    events = EventAccumulator(str(run)).Reload()
    curves = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}
    (text,) = events.Tensors("train/text_summary")
    return curves, run.name, json.loads(text.tensor_proto.string_val[0].decode().strip("`").removeprefix("json\n"))


def read_wandb(folder: Path) -> tuple[Curves, str, dict[str, Any]]:
    """wandb 0.31 has no reader in Python: records of its own messages, in LevelDB's log format."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    (run,) = {r.run.run_id: r.run for r in records if r.HasField("run")}.values()
    assert path.parent.name.endswith(run.run_id) and run.project == "prefbuild" and not run.entity
    curves: Curves = {}
    for record in records:
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((row["_step"], value))
    assert not any(record.HasField(part) for record in records for part in ("output", "output_raw", "artifact"))
    return curves, run.display_name, {item.key: json.loads(item.value_json) for item in run.config.update}


def read_mlflow(folder: Path) -> tuple[Curves, str, dict[str, Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("prefbuild")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and set(run.data.tags) == {"mlflow.runName"}
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    curves = {key: sorted((point.step, point.value) for point in points) for key, points in history.items()}
    assert run.data.params["lora.lora_dropout"] == "0.1"
    return curves, run.info.run_name, dict(run.data.params)


def read_trackio(folder: Path) -> tuple[Curves, str, dict[str, Any]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("prefbuild")
    curves: Curves = {}
    for row in SQLiteStorage.get_logs("prefbuild", run_id=run.id):
        for key, value in row.items():
            if key.startswith("train/"):
                curves.setdefault(key, []).append((row["step"], value))
    assert run.config is not None and run.config.pop("_Username") is None
    return curves, run.name, dict(run.config)


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}
