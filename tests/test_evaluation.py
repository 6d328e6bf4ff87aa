"""prefbuild/evaluation.py: what lm-eval's own HFLM says, with each context computed once."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from prefbuild import evaluation
from prefbuild.artifact import sha256_file
from prefbuild.evaluation import TOKENS_A_DOCUMENT, SharedContextLM
from prefbuild.measure import run_task
from prefbuild.taskfile import read_task
from prefbuild.template import load_tokenizer

ROOT = Path(__file__).parents[1]
LETTERS = [" A", " B", " C", " D"]  # a token each
ENDINGS = [" a sleeping cat", " the", " nothing at all, not even the smallest thing", " the moon"]
# Contexts of several lengths, and of several kinds: some share nothing, some are the beginning of others.
CONTEXTS = ["On the mat there is", "On the mat there is a box, and in the box there is", "Answer:", "Ω ≠ ∅ so"]
NOT_SHARED = "contexts are not shared"


def asked(*pairs: tuple[str, str]) -> list[Any]:
    return [SimpleNamespace(args=pair, task_name="t") for pair in pairs]


def each(contexts: list[str], continuations: list[str]) -> list[Any]:
    return asked(*((context, continuation) for context in contexts for continuation in continuations))


def both(weights: Any, tokenizer: Any, **options: Any) -> tuple[HFLM, SharedContextLM]:
    """lm-eval's model class and ours, on the same weights."""
    arguments = {"tokenizer": tokenizer, "backend": "causal", "batch_size": 4, **options}
    return HFLM(pretrained=copy.deepcopy(weights), **arguments), SharedContextLM(pretrained=weights, **arguments)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def thin(tokenizer: Any) -> Any:
    """A llama of random weights, large enough that what a token sees shows in what it says."""
    return random_model("llama", tokenizer)


def random_model(kind: str, tokenizer: Any, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], rel=1e-4, abs=1e-4)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]


# ---- the same answers


@pytest.mark.parametrize(
    "requests",
    [
        each(CONTEXTS, LETTERS),
        each(CONTEXTS, ENDINGS),
        each(CONTEXTS, [*LETTERS, *ENDINGS, LETTERS[0]]),
        each(["", "x"], ENDINGS),
        each(["Spaces  ", "Spaces \n"], ["a", "a b", " c"]),
        asked(("The cat", " sat down"), ("The dog", " sat down"), ("The cat", " sat down")),
        each(["<|im_start|>user\nWhat?<|im_end|>\n"], ENDINGS),
    ],
    ids=["one-token", "several-tokens", "both-and-twice", "no-context", "spaces", "other-contexts", "bos"],
)
def test_answers_are_those_of_lm_eval(thin: Any, tokenizer: Any, requests: list[Any], capsys: Any) -> None:
    stock, ours = both(thin, tokenizer)
    assert_same(ours.loglikelihood(requests), stock.loglikelihood(requests))
    assert NOT_SHARED not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma", "gpt2", "phi3", "olmo2"])
def test_answers_of_other_architectures_are_those_of_lm_eval(kind: str, tokenizer: Any, capsys: Any) -> None:
    changes = {"pad_token_id": 0} if kind == "phi3" else {}
    stock, ours = both(random_model(kind, tokenizer, **changes), tokenizer)
    requests = each(CONTEXTS, [*LETTERS, *ENDINGS])
    assert_same(ours.loglikelihood(requests), stock.loglikelihood(requests))
    assert NOT_SHARED not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_contexts_that_are_too_long_are_cut_as_lm_eval_cuts_them(kind: str, tokenizer: Any, capsys: Any) -> None:
    stock, ours = both(random_model(kind, tokenizer), tokenizer)
    limit = stock.max_length
    words = tokenizer.decode(list(range(1000, 1000 + 2 * limit)))
    contexts = [words[: len(words) * part // 8] for part in (1, 3, 4, 5, 8)]
    requests = each([*contexts, *CONTEXTS], [*LETTERS, *ENDINGS])
    lengths = {sum(map(len, stock._encode_pair(*request.args))) for request in requests}
    assert min(lengths) < limit < max(lengths)
    assert_same(ours.loglikelihood(requests), stock.loglikelihood(requests))
    err = capsys.readouterr().err
    assert f"of {len(requests)} requests are longer than the model's {limit} tokens, and cut on the left" in err
    assert NOT_SHARED not in err


def test_request_that_fills_the_context_to_the_last_token_is_answered(tokenizer: Any, capsys: Any) -> None:
    """gpt2 fails on a position past its last one."""
    stock, ours = both(random_model("gpt2", tokenizer), tokenizer)
    ids = list(range(1000, 1066))
    for cut in (0, 1, 2):  # 66 tokens are too many, 65 and 64 fit
        requests = [(None, ids[cut:-4], ids[-4:]), (None, [7, *ids[cut + 1 : -1]], [8])]
        assert_same(ours._loglikelihood_tokens(requests), stock._loglikelihood_tokens(requests))
    assert NOT_SHARED not in capsys.readouterr().err


def test_one_text_cut_into_context_and_continuation_in_two_places(thin: Any, tokenizer: Any) -> None:
    """lm-eval 0.4.13 takes these for one request, and the shorter continuation's logits from the wrong place."""
    ids = tokenizer.encode(CONTEXTS[1])
    requests = [(None, ids[:-4], ids[-4:]), (None, ids[:-1], ids[-1:])]
    stock, ours = both(thin, tokenizer)
    found = ours._loglikelihood_tokens(requests)
    assert abs(stock._loglikelihood_tokens(requests)[1][0] - found[1][0]) > 0.1
    for request, answer in zip(requests, found, strict=True):
        assert_same([answer], stock._loglikelihood_tokens([request]))


def test_continuation_of_no_tokens_is_refused(thin: Any, tokenizer: Any) -> None:
    _, ours = both(thin, tokenizer)
    with pytest.raises(ValueError, match=r"^request 1 has a continuation of 0 tokens; it takes 1 to 128"):
        ours.loglikelihood(asked(("a", " b"), ("a", "")))


def test_greedy_answers_are_found(thin: Any, tokenizer: Any) -> None:
    """Random endings are never what the model would write, so one that is."""
    stock, ours = both(thin, tokenizer)
    context = tokenizer.encode(CONTEXTS[1])
    written = ours.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    greedy = written[0, len(context) :].tolist()
    requests = [(None, context, greedy), (None, context, greedy[:1]), (None, context, [*greedy[:3], 7])]
    found = ours._loglikelihood_tokens(requests)
    assert [right for _, right in found] == [True, True, False]
    assert_same(found, stock._loglikelihood_tokens(requests))


def test_generation_and_rolling_are_lm_evals_own(thin: Any, tokenizer: Any) -> None:
    stock, ours = both(thin, tokenizer)
    ours.loglikelihood(each(CONTEXTS, ENDINGS))
    prompts = asked(*((text, {"until": ["."], "max_gen_toks": 8}) for text in CONTEXTS))
    assert ours.generate_until(prompts) == stock.generate_until(prompts)
    texts = asked(*((text * 40,) for text in CONTEXTS))  # longer than the context
    assert ours.loglikelihood_rolling(texts) == stock.loglikelihood_rolling(texts)
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation


# ---- what is computed


def num_tokens_read(model: Any, run: Any) -> int:
    """Tokens, padding too, that a model computes while `run` runs."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    try:
        run()
    finally:
        hook.remove()
    return sum(seen)


def test_context_is_computed_once_and_nothing_is_padded(
    thin: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = both(thin, tokenizer)
    monkeypatch.setattr(ours, "_check", lambda *arguments: True)  # it computes in both ways
    contexts = [f"{start} mat there is" for start in ("On the", "Under the", "Beside a", "By that")]
    context = sum(len(tokenizer.encode(text)) for text in contexts)
    for continuations, heads in ((LETTERS, 0), (ENDINGS, sum(len(tokenizer.encode(text)) - 1 for text in ENDINGS))):
        requests = each(contexts, continuations)
        read = num_tokens_read(ours.model, lambda asked=requests: ours.loglikelihood(asked))
        assert read == context + heads * len(contexts)
        assert read <= num_tokens_read(stock.model, lambda asked=requests: stock.loglikelihood(asked))


def test_beginning_that_contexts_have_in_common_is_computed_once(
    thin: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of tasks whose solved examples are always the same ones."""
    stock, ours = both(thin, tokenizer)
    shots = "Roses are red. The sun is hot. Water is wet. "
    questions = [f"{start} mat there is" for start in ("On the", "Under the", "Beside a", "By that")]
    requests = each([shots + question for question in questions], [*LETTERS, ENDINGS[0]])
    assert_same(ours.loglikelihood(requests), stock.loglikelihood(requests))
    monkeypatch.setattr(ours, "_check", lambda *arguments: True)
    ids = [tokenizer.encode(shots + question) for question in questions]
    common = next(n for n, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    assert common >= 12
    ending = len(tokenizer.encode(ENDINGS[0])) - 1
    for asked_for, num_heads, after in ((LETTERS, 1, 0), ([*LETTERS, ENDINGS[0]], 2, ending)):
        requests = each([shots + question for question in questions], asked_for)
        read = num_tokens_read(ours.model, lambda asked=requests: ours.loglikelihood(asked))
        assert read == common + sum(num_heads * (len(one) - common) + after for one in ids)


def test_batch_size_sets_the_tokens_of_a_pack(thin: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = both(thin, tokenizer, batch_size=1)
    monkeypatch.setattr(ours, "_check", lambda *arguments: True)
    seen = []
    ours.model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    ours.loglikelihood(each([f"{number} {CONTEXTS[1]}" for number in range(100)], ENDINGS))
    assert len(seen) > 1
    assert TOKENS_A_DOCUMENT * 0.9 < max(seen) <= TOKENS_A_DOCUMENT


# ---- models that can't share


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("mamba", {"state_size": 4}, "nats a token from lm-eval's"),
        ("gemma2", {}, "has softcap, which packing has not$"),
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "nats a token from lm-eval's"),
    ],
)
def test_model_that_can_not_share_is_scored_by_lm_eval(
    kind: str, changes: dict[str, Any], problem: str, tokenizer: Any, capsys: Any
) -> None:
    stock, ours = both(random_model(kind, tokenizer, **changes), tokenizer)
    requests = each(CONTEXTS, [*LETTERS, *ENDINGS])
    assert ours.loglikelihood(requests) == stock.loglikelihood(requests)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if NOT_SHARED in line]
    assert line.startswith("evaluate: contexts are not shared by ")
    assert re.search(problem, line)
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation


def test_attention_that_sees_too_much_is_found(
    thin: Any, tokenizer: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain causal attention over a pack: other contexts and other continuations are seen."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def whole_row(*arguments: Any, segments: Any, **options: Any) -> Any:
        return sdpa_attention_forward(*arguments, **options)

    AttentionInterface.register("whole_row", whole_row)
    monkeypatch.setattr(evaluation, "use_packed_attention", lambda model: model.set_attn_implementation("whole_row"))
    stock, ours = both(thin, tokenizer)
    requests = each(CONTEXTS, ENDINGS)
    assert ours.loglikelihood(requests) == stock.loglikelihood(requests)
    assert re.search(rf"{NOT_SHARED} by LlamaForCausalLM: .* nats a token from lm-eval's", capsys.readouterr().err)
    # Where the check of the numbers is loose, as in 16 bits, it is found all the same.
    monkeypatch.setitem(evaluation.TOLERANCE, torch.float32, 100.0)
    ours._shares, ours._checked = True, 0
    assert ours.loglikelihood(requests) == stock.loglikelihood(requests)
    assert re.search(rf"{NOT_SHARED} by .*: a log-likelihood of .* beside other requests", capsys.readouterr().err)


# ---- the real model


@pytest.fixture(scope="module")
def real(smollm2: Path, tokenizer: Any) -> tuple[HFLM, SharedContextLM]:
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return both(weights, tokenizer, batch_size=16)


def measurement(name: str, **changes: Any) -> dict[str, Any]:
    """A task of the demonstration, as the resolved recipe holds it."""
    task = f"recipes/concise/{name}.yaml"
    files = [{"path": str(file), "sha256": sha256_file(ROOT / file)} for file in read_task(ROOT, task, name).files]
    asked = {"key": "0123456789ab", "task": task, "name": name, "data": None, "files": files, "num_fewshot": None}
    return {**asked, "limit": 40, "apply_chat_template": False, "fewshot_as_multiturn": False, **changes}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_fewshot": 3, "limit": 10}, {"num_fewshot": 2, "limit": 6, "fewshot_as_multiturn": True, "apply_chat_template": True}],
    ids=["plain", "few-shot", "chat"],
)  # fmt: skip
def test_demonstration_measures_what_lm_eval_measures(
    changes: dict[str, Any], real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    answers: dict[str, list[Any]] = {}
    results = {}
    for lm, who in zip(real, ("stock", "ours"), strict=True):

        def recorded(requests: list[Any], lm: Any = lm, who: str = who) -> list[Any]:
            answers[who] = type(lm).loglikelihood(lm, requests)
            return answers[who]

        monkeypatch.setattr(lm, "loglikelihood", recorded)
        results[who] = run_task(lm, measurement("common_sense", **changes), 1234, tmp_path)
    assert_same(answers["ours"], answers["stock"])
    assert len(answers["ours"]) > 15
    assert results["ours"] == results["stock"]
    assert NOT_SHARED not in capsys.readouterr().err


def test_demonstration_is_answered_as_before(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After log-likelihoods, generation has its own attention again."""
    monkeypatch.chdir(ROOT)
    asked = measurement("concise", apply_chat_template=True, limit=8)
    stock, ours = (run_task(lm, asked, 1234, tmp_path) for lm in real)
    assert ours == stock


def test_in_bfloat16_contexts_are_shared_too(smollm2: Path, tokenizer: Any, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    exact, ours = both(weights, tokenizer, softmax_dtype="float32")
    requests = each(CONTEXTS, [*LETTERS, *ENDINGS])
    found = ours.loglikelihood(requests)
    assert NOT_SHARED not in capsys.readouterr().err
    for (log_likelihood, _), (expected, _) in zip(found, exact.loglikelihood(requests), strict=True):
        assert log_likelihood == pytest.approx(expected, rel=0.02, abs=0.1)


def test_benchmark_measures_both_ways(tiny_model: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/evaluation.py"), str(tiny_model), "-n", "1", "--documents", "3"]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, check=True)
    assert NOT_SHARED not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["results"]) == 6
    for result in found["results"]:
        assert result["largest_difference"] < 1e-3
        assert result["other_choices"] == 0
        assert result["ratio"] > 0
