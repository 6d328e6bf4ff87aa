"""Decoding with a static cache writes what transformers' generate writes, and draws with the probabilities it should."""

from pathlib import Path
from typing import Any

import pytest

from prefbuild.errors import StageError
from prefbuild.methods import GRPO
from prefbuild.training.graph_engine import engine_arguments

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [40, 41] * 40]


def tiny(model_type: str = "llama", **own: Any) -> Any:
    """A random model of two layers whose adapter changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    config = AutoConfig.for_model(model_type, **shape | {"initializer_range": 0.1} | own)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rollout(model: Any, **own: Any) -> Any:
    from prefbuild.training.rollout import Rollout

    options: dict[str, Any] = {"max_prompt": 80, "max_new_tokens": 20, "stops": [], "bf16": False}
    made = Rollout(model, **options | own)
    made.refresh()
    return made


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_the_models_own(model_type: str) -> None:
    import torch

    model = tiny(model_type)
    decoder = rollout(model).decoder
    ids = torch.tensor(PROMPTS[2][:30] + PROMPTS[0] * 3)
    cache = decoder.empty_cache(1, 64)
    with torch.no_grad():
        wanted = model(input_ids=ids[None]).logits[0, 29:]
        found = [decoder.prefill(ids[None, :30], torch.tensor([30]), cache, torch.tensor([0]))]
        found += [decoder.step(ids[at, None], torch.tensor([at]), cache) for at in range(30, len(ids))]
    assert torch.allclose(torch.cat(found), wanted, rtol=1e-4, atol=1e-4)


def generated(model: Any, prompt: list[int], num: int, stops: list[int] | None = None, **own: Any) -> list[int]:
    import torch

    ids = torch.tensor([prompt], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": stops, "pad_token_id": 0} | own
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, **options)
    found: list[int] = whole[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_greedy_tokens_are_generates(model_type: str) -> None:
    from prefbuild.training.sampling import GREEDY

    model = tiny(model_type)
    made = rollout(model)
    rows = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    wanted = [generated(model, prompt, 20) for prompt in rows]
    assert made.complete(rows, GREEDY) == wanted
    assert made.complete(rows[::-1], GREEDY) == wanted[::-1], "what the cache held before is not read"


def test_a_completion_ends_with_its_first_stop_token_and_all_ended_ends_the_writing() -> None:
    from prefbuild.training.sampling import GREEDY

    model = tiny()
    whole = [generated(model, prompt, 200) for prompt in PROMPTS[:2]]
    stops = [whole[0][3], whole[1][5]]
    made, steps = rollout(model, stops=stops, max_new_tokens=200), []
    step = made.decoder.step
    made.decoder.step = lambda *arguments: steps.append(1) or step(*arguments)
    found = made.complete(PROMPTS[:2], GREEDY)
    assert found == [generated(model, prompt, 200, stops) for prompt in PROMPTS[:2]]
    assert max(map(len, found)) <= 6 and len(steps) == 15, "looked at the 16th token"


def test_the_copy_follows_the_model_when_it_is_refreshed() -> None:
    import torch

    from prefbuild.training.sampling import GREEDY

    model = tiny()
    made = rollout(model)
    before = made.complete(PROMPTS, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-2)
    assert made.complete(PROMPTS, GREEDY) == before
    made.refresh()
    after = made.complete(PROMPTS, GREEDY)
    assert after == [generated(model, prompt, 20) for prompt in PROMPTS] and after != before


def test_without_an_adapter_the_weights_are_the_models() -> None:
    from prefbuild.training.sampling import GREEDY

    model = tiny().merge_and_unload()
    assert rollout(model).complete(PROMPTS, GREEDY) == [generated(model, prompt, 20) for prompt in PROMPTS]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.6},
    {"min_p": 0.2, "temperature": 1.5},
    {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
]


@pytest.mark.parametrize("options", SAMPLINGS)
def test_sampling_is_transformers(options: dict[str, Any]) -> None:
    import torch
    from transformers import GenerationConfig

    from prefbuild.training.sampling import Sampling, processed

    model = tiny()
    torch.manual_seed(1)
    logits, ids = torch.randn(4, 97) * 3, torch.randint(0, 97, (4, 30))
    config = GenerationConfig(do_sample=True, **{"top_k": 0} | options)
    processors = model._get_logits_processor(config, input_ids_seq_length=30, device="cpu", logits_processor=[])
    seen = torch.zeros(4, 97, dtype=torch.bool).scatter_(1, ids, True)
    wanted, found = processors(ids, logits.clone()), processed(logits, Sampling(**options), seen)
    assert wanted.isneginf().any() == any(key in options for key in ("top_k", "top_p", "min_p")) or "top_k" in options
    assert torch.equal(wanted.isneginf(), found.isneginf())
    assert torch.allclose(wanted.softmax(1), found.softmax(1), atol=1e-6)


def test_repetition_is_penalised_in_prompt_and_completion() -> None:
    from prefbuild.training.sampling import Sampling

    model = tiny()
    found = rollout(model).complete(PROMPTS, Sampling(temperature=0, repetition_penalty=1.5))
    assert found == [generated(model, prompt, 20, repetition_penalty=1.5) for prompt in PROMPTS]
    assert found != [generated(model, prompt, 20) for prompt in PROMPTS]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Pearson's chi-square of first and second tokens; the 0.999 quantile by Wilson and Hilferty."""
    import torch

    from prefbuild.training.sampling import Sampling

    model, num = tiny(), 4000
    made = rollout(model, max_new_tokens=2)
    prompt, sampling = PROMPTS[0], Sampling(temperature=0.7)
    drawn = [tuple(ids) for number in range(4) for ids in made.complete([prompt] * (num // 4), sampling, number)]
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).double().softmax(0)
        follows = torch.tensor([[*prompt, token] for token in range(97)])
        second = (model(input_ids=follows).logits[:, -1] / 0.7).double().softmax(1)
    for number, expected in enumerate((first, first @ second)):
        counts = torch.bincount(torch.tensor([ids[number] for ids in drawn]), minlength=97)
        likely = expected * num >= 5
        observed = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
        wanted = torch.cat([expected[likely], expected[~likely].sum()[None]]) * num
        statistic = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
        free = len(wanted) - 1
        assert free > 10 and statistic < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3


def test_a_round_is_drawn_again_the_same_and_another_is_not() -> None:
    from prefbuild.training.sampling import Sampling

    model = tiny()
    first = rollout(model, seed=3)
    found = [first.complete(PROMPTS, Sampling(), number) for number in (0, 1)]
    assert found[0] != found[1]
    assert rollout(model, seed=3).complete(PROMPTS, Sampling(), 1) == found[1]
    assert rollout(model, seed=4).complete(PROMPTS, Sampling(), 1) != found[1]


@pytest.mark.parametrize(
    ("model_type", "own", "what"),
    [
        ("mistral", {"sliding_window": 99}, "attention over a window of 99 tokens, which is shorter than prompt and"),
        ("llama", {"hidden_act": "gelu"}, "models with gelu in their layers"),
        ("olmo2", {}, "models of type olmo2, but for llama, mistral, qwen2, qwen3"),
    ],
)
def test_a_model_that_it_does_not_cover_is_refused(model_type: str, own: dict[str, Any], what: str) -> None:
    with pytest.raises(StageError, match=rf"^train.rollout: the graph engine does not do {what}.*rollout: .engine: hf"):
        rollout(tiny(model_type, **own))
    if "sliding_window" in own:
        rollout(tiny(model_type, sliding_window=200))


def test_vllm_that_is_not_there_is_named() -> None:
    settings = GRPO(method="grpo", rewards=[{"reward": "length", "target": 9}], rollout={"engine": "vllm"})  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"^train.rollout.engine is vllm, which is not installed here; install it"):
        engine_arguments(settings)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_kernels_and_graphs_write_what_generate_writes(model_type: str) -> None:
    from prefbuild.training.sampling import GREEDY

    assert rollout(tiny(model_type).to("cuda")).decoder.kernels is None, "heads too narrow for them"
    model = tiny(model_type, head_dim=32).to("cuda")
    made = rollout(model)
    assert made.decoder.kernels is not None and made.graphs.on_gpu
    wanted = [generated(model, prompt, 20) for prompt in PROMPTS]
    assert made.complete(PROMPTS, GREEDY) == wanted
    assert made.complete(PROMPTS[::-1], GREEDY) == wanted[::-1], "replayed"
    made.decoder.kernels = None
    made.graphs.captured.clear()
    assert made.complete(PROMPTS, GREEDY) == wanted, "the same operations by torch"


def test_a_run_with_few_held_out_prompts_measures_them_by_graphs(tmp_path: Path, tiny_model: Path) -> None:
    from trained import train, write_prepared

    prepared = write_prepared(tmp_path / "prepared", tiny_model, "prompts", train=4, held_out=5)
    found = {
        engine: train(tmp_path / engine, "grpo", tiny_model, prepared, rollout={"engine": engine}, max_steps=1)
        for engine in ("hf", "graph")
    }
    assert found["graph"]["step_0"] == found["hf"]["step_0"], "greedy tokens of the base, five in a batch of four"
