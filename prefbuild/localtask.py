"""Turn a measurement into an lm-evaluation-harness task that reads pinned local files and nothing else.

Covered: task YAMLs of the project, with what they include and their code, and lm-eval's own tasks with local files in
place of their data. Not covered: groups, tasks that are Python classes, tasks that run code the model writes.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from prefbuild.artifact import digest_of, sha256_file
from prefbuild.errors import StageError
from prefbuild.taskfile import is_task_file, read_task

SPLITS = {
    "train": "training_split",
    "validation": "validation_split",
    "test": "test_split",
    "fewshot": "fewshot_split",
}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}

Measurement = dict[str, Any]


def check_files(measurement: Measurement) -> None:
    """StageError unless every file the task reads is pinned and is what the lock says."""
    pinned = {file["path"] for file in measurement["files"]}
    for file in measurement["files"]:
        path = Path(file["path"])
        if not path.is_file():
            raise StageError(f"{path}: is missing; task {measurement['name']} reads it")
        found = sha256_file(path)
        if found != file["sha256"]:
            raise StageError(
                f"{path}: sha256 is {found}, the lock says {file['sha256']}; "
                "restore the file, or run `prefbuild lock` if the change is meant"
            )
    read = list((measurement["data"] or {}).values())
    if is_task_file(measurement["task"]):
        read += read_task(Path.cwd(), measurement["task"], measurement["name"]).files
    loose = sorted({str(path) for path in read} - pinned)
    if loose:
        raise StageError(f"{', '.join(loose)}: read by task {measurement['name']} but not pinned; run `prefbuild lock`")


def load_task(measurement: Measurement, work: Path) -> Any:
    """lm-eval's Task, reading local files only. StageError when it can't be run offline, or would ignore a setting."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    task = measurement["task"]
    path = Path(task) if is_task_file(task) else stock_yaml(task)
    config = load_yaml(path, resolve_func=False)  # looked at before any of its code is imported
    if config.get("task") != measurement["name"] or "group" in config or "class" in config:
        raise StageError(
            f"{task}: is no single task named {measurement['name']}; name one task, and run `prefbuild lock`"
        )
    if config.get("unsafe_code"):
        raise StageError(f"{task}: runs code that the model writes (unsafe_code), which no stage does; leave it out")
    config = load_yaml(path)  # follows `include`, and takes `!function` from beside the YAML that says it
    missing = _use_local_data(config, path.resolve().parent, measurement)
    _set_num_fewshot(config, measurement, missing)
    config["dataset_kwargs"]["cache_dir"] = str(work.resolve() / "datasets")
    return TaskManager(include_defaults=False).load([config])["tasks"][measurement["name"]]


def stock_yaml(name: str) -> Path:
    """The YAML of one of lm-eval's own tasks. StageError when there is none of that name.

    Looks for the line that names it, as building lm-eval's index of 14,000 tasks takes 7 seconds.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    line = re.compile(rf"""^["']?task["']?[ ]*:[ ]*["']?{re.escape(name)}["']?[ ]*,?[ ]*(#.*)?$""", re.MULTILINE)
    for path in sorted(root.rglob("*.yaml"), key=lambda path: path.as_posix()):
        if line.search(path.read_text(encoding="utf-8")):
            return path
    raise StageError(
        f"{name}: lm-eval {importlib.metadata.version('lm_eval')} has no task of that name (a group is no task); "
        "`lm_eval ls tasks` lists them"
    )


def task_digest(measurement: Measurement) -> str:
    """Digest of what was asked: every file of the task, or lm-eval's own YAML and the data that stands in."""
    task = measurement["task"]
    asked = sorted(file["sha256"] for file in measurement["files"])
    if not is_task_file(task):
        asked.append(sha256_file(stock_yaml(task)))
    return digest_of(asked)


def _use_local_data(config: dict[str, Any], folder: Path, measurement: Measurement) -> str | None:
    """Point a task's splits at files. Returns the split of its few-shot examples when no file is given for it."""
    data = measurement["data"]
    if data is None:
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if config.get("dataset_path") not in BUILDERS.values() or not files:
            raise StageError(
                f"{measurement['task']}: reads {config.get('dataset_path')} from the Hub, which no stage can reach; "
                "give the task its data: {split: file}"
            )
        # lm-eval takes them as relative to the working directory, a task's author to the YAML.
        splits = files if isinstance(files, dict) else {"train": files}
        absolute = {
            split: [str(folder / name) for name in (names if isinstance(names, list) else [names])]
            for split, names in splits.items()
        }
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": absolute}
        return None

    stands_in = {}
    for split, file in data.items():
        own = config.get(SPLITS[split])
        if not own:
            used = [ours for ours, key in SPLITS.items() if config.get(key)]
            raise StageError(
                f"{measurement['task']}: has no {split} split, so data.{split} would be ignored; "
                f"it has {', '.join(used)}"
            )
        stands_in[own] = str(Path(file).resolve())
    suffixes = {Path(file).suffix.lower() for file in data.values()}
    if len({BUILDERS.get(suffix) for suffix in suffixes} - {None}) != 1 or not suffixes <= set(BUILDERS):
        raise StageError(
            f"{measurement['task']}: data must be files of one kind, of {', '.join(BUILDERS)}; "
            f"got {', '.join(sorted(suffixes))}"
        )
    fewshot = dict(config.get("fewshot_config") or {})
    examples = fewshot.get("split") or config.get("fewshot_split") or config.get("training_split")
    if fewshot.get("split") not in stands_in:
        fewshot.pop("split", None)
    config["fewshot_config"] = fewshot or None
    for key in SPLITS.values():
        if config.get(key) not in stands_in:
            config[key] = None
    if not (config["test_split"] or config["validation_split"]):
        raise StageError(f"{measurement['task']}: has nothing to measure on; give data.test or data.validation")
    config["dataset_path"] = BUILDERS[suffixes.pop()]
    config["dataset_name"] = None
    config["dataset_kwargs"] = {"data_files": stands_in}
    config.pop("custom_dataset", None)
    return None if examples in stands_in or fewshot.get("samples") else examples


def _set_num_fewshot(config: dict[str, Any], measurement: Measurement, missing: str | None) -> None:
    asked, own = measurement["num_fewshot"], config.get("num_fewshot")
    if asked is not None:
        # Such a task has its examples in its text; lm-eval would drop the setting without a word.
        if own == 0 and asked != 0:
            raise StageError(
                f"{measurement['task']}: sets num_fewshot: 0 itself and takes no other; leave num_fewshot out"
            )
        config["num_fewshot"] = asked
    if config.get("num_fewshot") and missing:
        raise StageError(
            f"{measurement['task']}: takes its {config['num_fewshot']} examples from split {missing}, for which there "
            "is no local file; add it to data, or set num_fewshot: 0"
        )
