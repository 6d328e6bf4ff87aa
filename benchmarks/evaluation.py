"""Log-likelihoods by lm-eval's own model class and by ours, on the same weights and requests, in turn.

    python benchmarks/evaluation.py MODEL

MODEL is a checkpoint folder. The requests are the demonstration's common_sense, asked as multiple choice is: the endings
of a sentence, or a letter for each, after no solved examples or 10, drawn for each sentence or the same for all. Tokenising
is timed too. What is printed last is JSON.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "recipes/concise/common_sense.jsonl"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("-n", type=int, default=3, help="runs of each after one to warm up (default: 3)")
    arguments.add_argument("--documents", type=int, default=40, help="default: 40")
    arguments.add_argument("--batch-size", type=int, default=8, help="default: 8, as in a recipe")
    arguments.add_argument("--dtype", help="default: as an evaluation on this machine")
    asked = arguments.parse_args()

    import torch
    from lm_eval.models.huggingface import HFLM

    from prefbuild.measure import load_model, machine

    dtype, device = machine()
    ours = load_model(asked.model, asked.batch_size, asked.dtype or dtype, device)
    stock = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, backend="causal", batch_size=asked.batch_size)
    results = []
    print("requests              tokens  lm-eval (s)  shared (s)  ratio  largest difference (nats)  other choices")
    for shots, same in ((0, False), (10, False), (10, True)):
        for kind in ("endings", "letters"):
            documents = requests_of(shots, same, kind, asked.documents)
            requests = [request for document in documents for request in document]
            result = compare(stock, ours, requests, asked.n)
            answers = result.pop("answers")
            result |= {
                "requests": f"{kind}, {shots} {'same ' * same}shots",
                "other_choices": others(answers, documents),
            }
            results.append(result)
            print(
                f"{result['requests']:18} {result['tokens']:9,} {result['lm_eval_s']:12.2f} {result['shared_s']:11.2f} "
                f"{result['ratio']:6.2f} {result['largest_difference']:26.2g} {result['other_choices']:14}"
            )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(json.dumps({"device": where, "dtype": asked.dtype or dtype, "results": results}))


def requests_of(shots: int, same: bool, kind: str, num_documents: int) -> list[list[Any]]:
    """For each document, a request for each of its choices, as lm-eval makes them; all after the same examples or not."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    drawing = random.Random(0)
    solved = drawing.sample(rows[num_documents:], shots)
    documents = []
    for row in rows[:num_documents]:
        if not same:
            solved = drawing.sample(rows[num_documents:], shots)
        context = "\n\n".join([*(f"{one['text']} {one['choices'][one['answer']]}" for one in solved), row["text"]])
        choices = row["choices"]
        if kind == "letters":
            letters = "ABCD"[: len(choices)]
            lines = [f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
            context, choices = context + "".join(lines) + "\nAnswer:", list(letters)
        documents.append([SimpleNamespace(args=(context, f" {choice}"), task_name="") for choice in choices])
    return documents


def compare(stock: Any, ours: Any, requests: list[Any], num_runs: int) -> dict[str, Any]:
    """Both answer all requests, in turn. Times are medians in seconds; tokens are what lm-eval was asked for."""
    seconds: dict[str, list[float]] = {"lm_eval": [], "shared": []}
    answers: dict[str, list[Any]] = {}
    for run in range(num_runs + 1):
        for name, lm in (("lm_eval", stock), ("shared", ours)):
            started = time.monotonic()
            answers[name] = lm.loglikelihood(requests, disable_tqdm=True)
            if run:
                seconds[name].append(time.monotonic() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = zip(answers["lm_eval"], answers["shared"], strict=True)
    return {
        "tokens": sum(len(stock.tok_encode("".join(request.args))) for request in requests),
        "lm_eval_s": round(medians["lm_eval"], 3),
        "shared_s": round(medians["shared"], 3),
        "ratio": round(medians["lm_eval"] / medians["shared"], 2),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "answers": answers,
    }


def others(answers: dict[str, list[Any]], documents: list[list[Any]]) -> int:
    """How many documents have another likeliest choice."""
    num_others, start = 0, 0
    for document in documents:
        some = slice(start, start + len(document))
        likeliest = {max(range(len(document)), key=lambda i: of[i][0]) for of in (a[some] for a in answers.values())}
        num_others += len(likeliest) > 1
        start += len(document)
    return num_others


if __name__ == "__main__":
    main()
