"""Run lm-evaluation-harness on one model folder, keeping each finished measurement.

Covered: tasks of the project and lm-eval's own ones with local data; the model is loaded once, and only when a
measurement is not kept from before; every mean is computed again from the samples. Not covered: groups, tasks that are
Python classes, tasks that run the model's code (`unsafe_code`), prompts longer than the model's context, which lm-eval
cuts on the left with a warning. A kept measurement is trusted when its manifest is right: nothing signs it.
"""

import importlib.metadata
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefbuild.artifact import (
    digest_of,
    read_json,
    verify_artifact,
    writable,
    write_atomic,
    write_json,
    write_manifest,
)
from prefbuild.errors import StageError
from prefbuild.localtask import Measurement, check_files, load_task, task_digest
from prefbuild.machine import cpu_bf16
from prefbuild.template import FIXED_DATE, load_tokenizer

CACHE = Path("build/.work/evaluations")
# Draws for the standard error of metrics that have no formula for it. Means, as almost all metrics are, take none.
BOOTSTRAP_ITERS = 1000
# How log-likelihoods are computed: part of what was measured. Raise it when prefbuild/evaluation.py gives other numbers.
SCORER = "shared contexts 1"

Metrics = dict[str, float]


def measure(
    model: Path, settings: dict[str, Any], samples: Path, work: Path, cache: Path = CACHE
) -> dict[str, Metrics]:
    """Run every measurement in `settings` on a model; returns `{task: metrics}`.

    Writes <key>.json and <key>.jsonl a measurement into `samples`. A task that is measured in two ways is named
    `<task>-<key>`. StageError when the model or a task's file is not what it should be, or a metric is missing or NaN.
    """
    model_digest = verify_artifact(model)["digest"]
    measurements: list[Measurement] = settings["measurements"]
    for measurement in measurements:
        check_files(measurement)
    dtype, device = machine()
    facts = {
        "model_digest": model_digest,
        "dtype": dtype,
        "device": device,
        "image": os.environ.get("PREFBUILD_IMAGE"),
        "scorer": SCORER,
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")},
    }
    cache = writable(cache, work / "evaluations")
    samples.mkdir(parents=True)
    names = [measurement["name"] for measurement in measurements]
    metrics = {}
    lm = None
    for number, measurement in enumerate(measurements, 1):
        key, name = measurement["key"], measurement["name"]
        title = name if names.count(name) == 1 else f"{name}-{key}"
        kept = cache / digest_of([key, settings["seed"], facts]).removeprefix("sha256:")[:32]
        if is_kept(kept, measurement, facts):
            print(f"evaluate: {title} ({number} of {len(names)}): kept from before", file=sys.stderr)
        else:
            print(f"evaluate: {title} ({number} of {len(names)}) in {dtype} on {device}", file=sys.stderr)
            started = time.monotonic()
            lm = lm or load_model(model, settings["batch_size"], dtype, device)
            result, lines = run_task(lm, measurement, settings["seed"], work)
            keep(kept, {**result, **facts}, lines)
            print(f"evaluate: {title}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        for file in (f"{key}.json", f"{key}.jsonl"):
            shutil.copyfile(kept / file, samples / file)
        metrics[title] = read_json(samples / f"{key}.json")["metrics"]
    return metrics


def machine() -> tuple[str, str]:
    """(number format, device) to compute in: bfloat16 where the machine has it, else float32; a GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32", "cuda"
    return "bfloat16" if cpu_bf16() else "float32", "cpu"


def load_model(model: Path, batch_size: int, dtype: str, device: str) -> Any:
    """lm-eval's model class on a checkpoint folder, from its safetensors and tokenizer files alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefbuild.evaluation import SharedContextLM

    weights: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    # It warns that a model is loaded already, and that it is none of several processes'.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    return SharedContextLM(
        pretrained=weights.to(device),
        tokenizer=load_tokenizer(model),
        backend="causal",
        batch_size=batch_size,
        # Some templates print the date, and results may not depend on the day.
        chat_template_args={"strftime_now": FIXED_DATE.strftime},
    )


# ---- kept measurements


def is_kept(kept: Path, measurement: Measurement, facts: dict[str, Any]) -> bool:
    """Whether this very measurement of this very model is there and whole. One that is not is removed."""
    if not kept.exists():
        return False
    try:
        verify_artifact(kept)
        result = read_json(kept / f"{measurement['key']}.json")
        if result["measurement"] == measurement and all(result[fact] == value for fact, value in facts.items()):
            return True
        problem = "is of another measurement"
    except (StageError, KeyError) as error:
        problem = str(error)
    print(f"evaluate: {kept} is not used: {problem}", file=sys.stderr)
    shutil.rmtree(kept)
    return False


def keep(kept: Path, result: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Keep a measurement: all of its files or none, also when two builds finish the same one."""
    folder = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".part-"))
    key = result["key"]
    try:
        write_json(folder / f"{key}.json", result)
        # In ASCII, because an answer may hold characters that some readers take for the end of a line.
        rows = [json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines]
        write_atomic(folder / f"{key}.jsonl", "".join(rows))
        write_manifest(folder, stage="evaluate", name=key, inputs={"model": result["model_digest"]})
        folder.chmod(0o755)
        folder.replace(kept)
    except BaseException as error:
        shutil.rmtree(folder)
        if not (isinstance(error, OSError) and kept.exists()):  # else another build was first
            raise


# ---- run


def run_task(lm: Any, measurement: Measurement, seed: int, work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what goes into <key>.json, the lines of <key>.jsonl). StageError names the metric or sample that is wrong."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    name = measurement["name"]
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process with the model in it for every core
    _check_template(lm, measurement)
    try:
        task = load_task(measurement, work)
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=measurement["limit"],
            apply_chat_template=measurement["apply_chat_template"],
            fewshot_as_multiturn=measurement["fewshot_as_multiturn"],
            log_samples=True,
            bootstrap_iters=BOOTSTRAP_ITERS,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except StageError:
        raise
    except Exception as error:  # a task's templates and code can fail in any way
        raise StageError(f"{measurement['task']}: lm-eval failed: {type(error).__name__}: {error}") from error

    metrics = flatten(found["results"][name])
    lines = sample_lines(name, found["samples"][name], task.OUTPUT_TYPE)
    check_metrics(name, metrics, lines, task.aggregation())
    metrics["n"] = len(lines)
    declared = {metric: task.higher_is_better().get(metric.partition("@")[0]) for metric in _values(metrics)}
    result = {
        "key": measurement["key"],
        "task": name,
        "task_digest": task_digest(measurement),
        "measurement": measurement,
        "metrics": metrics,
        "higher_is_better": {metric: higher for metric, higher in declared.items() if higher is not None},
        "n": len(lines),
    }
    return result, lines


def flatten(results: dict[str, Any]) -> Metrics:
    """lm-eval's results of one task as plain names: `acc,none` -> acc, `acc_stderr,none` -> acc_stderr,
    `exact_match,strict-match` -> exact_match@strict-match, its error exact_match@strict-match_stderr.

    A standard error that lm-eval does not know ("N/A") is left out. StageError on any other value that is no number.
    """
    metrics = {}
    for key, value in results.items():
        if "," not in key:  # name, alias, sample_len
            continue
        metric, _, which = key.partition(",")
        is_error = metric.endswith("_stderr") and f"{metric.removesuffix('_stderr')},{which}" in results
        if is_error and value == "N/A":
            continue
        name = metric.removesuffix("_stderr") if is_error else metric
        name += "" if which == "none" else f"@{which}"
        metrics[name + "_stderr" * is_error] = _number(value, f"{results.get('name', 'task')}: {key}")
    return metrics


def sample_lines(name: str, samples: list[dict[str, Any]], output_type: str) -> list[dict[str, Any]]:
    """One line a document, by doc_id, from lm-eval's samples (one a document and filter). StageError on NaN."""
    lines: dict[int, dict[str, Any]] = {}
    for sample in samples:
        doc_id = sample["doc_id"]
        line = lines.setdefault(
            doc_id, {"doc_id": doc_id, "doc_hash": sample["doc_hash"], "metrics": {}, **_texts(sample, output_type)}
        )
        for metric in sample["metrics"]:
            value = sample[metric]
            # Others (pairs for BLEU, counts for perplexity) have no value for one document.
            if isinstance(value, (bool, int, float)) or hasattr(value, "dtype"):
                full = metric if sample["filter"] == "none" else f"{metric}@{sample['filter']}"
                line["metrics"][full] = _number(value, f"{name}: {metric} of document {doc_id}")
    return [lines[doc_id] for doc_id in sorted(lines)]


def check_metrics(name: str, metrics: Metrics, lines: list[dict[str, Any]], aggregation: dict[str, Any]) -> None:
    """StageError when a metric the task declares is missing, or a mean is not that of the samples (to 1e-9)."""
    from lm_eval.api.metrics import mean

    values = _values(metrics)
    missing = sorted(set(aggregation) - {metric.partition("@")[0] for metric in values})
    if missing or not values or not lines:
        raise StageError(
            f"{name}: gave no {', '.join(missing) or 'metric'} over {len(lines)} documents; "
            "look at the task's metric_list"
        )
    for metric in values:
        ours = [line["metrics"][metric] for line in lines if metric in line["metrics"]]
        if aggregation.get(metric.partition("@")[0], mean) is not mean:
            continue
        if len(ours) != len(lines):
            raise StageError(
                f"{name}: only {len(ours)} of {len(lines)} documents have a number for {metric}, "
                "so its mean is over fewer than n says"
            )
        again = math.fsum(ours) / len(ours)
        if abs(again - metrics[metric]) > 1e-9 * max(1.0, abs(again)):
            raise StageError(
                f"{name}: lm-eval says {metric} is {metrics[metric]!r}, "
                f"but the mean of its {len(ours)} samples is {again!r}"
            )


def _values(metrics: Metrics) -> list[str]:
    """Names of metrics that are no standard errors."""
    return [
        metric
        for metric in metrics
        if not (metric.endswith("_stderr") and metric.removesuffix("_stderr") in metrics) and metric != "n"
    ]


def _number(value: Any, what: str) -> float:
    """A float from what a metric returned. StageError unless it is finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise StageError(f"{what} is {value!r}, which is no number; a gate can't judge it") from None
    if not math.isfinite(number):
        raise StageError(f"{what} is {number}; look at the task's metric and at the model's answers")
    return number


def _texts(sample: dict[str, Any], output_type: str) -> dict[str, Any]:
    """Prompt, target and response of a sample; of a multiple choice, the right choice and the likeliest one."""
    arguments, responses, target = sample["arguments"], sample["resps"], sample["target"]
    texts = {"prompt": arguments[0][0], "target": target, "response": responses[0][0]}
    if output_type == "multiple_choice":
        # acc_mutual_info appends every choice once more, without its context.
        num_choices = len(arguments) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
        # Choices are continuations of one context; but winogrande has one continuation, and contexts to choose from.
        same_context = len({context for context, _ in arguments[:num_choices]}) == 1
        choices = [argument[same_context].strip() for argument in arguments[:num_choices]]
        likelihoods = [response[0][0] for response in responses[:num_choices]]
        texts["response"] = choices[likelihoods.index(max(likelihoods))]
        if isinstance(target, int) and 0 <= target < num_choices:
            texts["target"] = choices[target]
    return texts


def _check_template(lm: Any, measurement: Measurement) -> None:
    """StageError when the chat template asked for is not there, or prompts would begin with two BOS tokens."""
    tokenizer, text = lm.tokenizer, "x"
    if measurement["apply_chat_template"]:
        if not tokenizer.chat_template:
            raise StageError(
                f"{measurement['task']}: apply_chat_template is true, but the model's tokenizer has no chat template"
            )
        text = lm.apply_chat_template([{"role": "user", "content": text}])
    # lm-eval tokenises one by one for likelihoods, and in batches to generate.
    for ids in (lm.tok_encode(text), lm.tok_batch_encode([text])[0][0].tolist()):
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise StageError(
                f"{measurement['task']}: prompts begin with {tokenizer.bos_token!r} twice; "
                "mend the base's chat template"
            )
