"""Merge an adapter into its base, or round trained weights to its number format; prove that nothing else changed.

The merged weights are the base's in its own number format, so they are rounded once more than base and adapter
apart. What is measured is what that rounding did: both are loaded from disk in float32 and compared on fixed prompts.
Of a reward model the rewards of fixed answers are compared instead.
The base is verified while it is merged, and the merged files are hashed while they are written (prefbuild/merging.py).
Covered: LoRA, rsLoRA and DoRA as PEFT merges them, tied embeddings, and all weights trained in float32 (input `trained`
instead of `adapter`). Not covered: quantised bases, which PEFT would quantise a second time, and several adapters at
once.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefbuild.artifact import read_json, read_manifest, verify_artifact, write_json
from prefbuild.digests import Digest, Digests
from prefbuild.errors import StageError
from prefbuild.merging import NotCovered, refuse_tied, stream_merge
from prefbuild.rows import Message
from prefbuild.template import load_tokenizer, render_prompt, tokenize
from prefbuild.tensors import FORMATS, find_tensors, read_tensor

NUM_NEW_TOKENS = 16
# Questions, code, other scripts, digits: tokens that differ in what the model does with them.
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that adds up the squares of a list of numbers.",
    "Explain in two sentences why the sky is blue.",
    "Translate to German: The train leaves at half past seven.",
    "If a book costs 12.50 and I pay with 20, how much do I get back?",
    "Name three animals that lay eggs, separated by commas.",
    "寿司は好きですか。Answer in English.",
    "My friend is sad because her cat died. What could I say to her?",
)
# What a reward model scores, after each prompt.
ANSWERS = ("I don't know.", "Yes, and here is why: it follows from what you say, as anybody can check.")
# What a checkpoint has beside its weights: copied from the base as it is. config.json is written with the weights.
COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
NOT_COPIED = {"config.json", "manifest.json", "adapter_config.json", "trainer_state.json"}
MAX_SHARD_SIZE = "50GB"  # transformers' own
# Bits of a float32's mantissa that a shorter format has not.
LOST_BITS = {"torch.bfloat16": 16, "torch.float16": 13}


def run(
    settings: dict[str, Any], inputs: dict[str, Path | list[Path]], outputs: dict[str, Path], work: Path, name: str
) -> None:
    """Write the merged checkpoint and merge.json. StageError when it is not what was trained."""
    full = "trained" in inputs
    model, trained, merged = inputs["model"], inputs["trained" if full else "adapter"], outputs["merged"]
    assert isinstance(model, Path) and isinstance(trained, Path)
    whole = str(trained) if full else "base and adapter"

    check_pair(model, trained)
    if "max_reward_difference" in settings["merge"]:
        verify_artifact(model)
        check_adapter(trained)
        write_json(outputs["metrics"], merge_reward_model(model, trained, merged, **settings["merge"]))
        return
    max_kl = settings["merge"]["max_kl"]
    with verified(model):
        if full:
            check_weights(model, trained)
            round_weights(model, trained, merged)
            digests = {}
        else:
            check_adapter(trained)
            digests = merge(model, trained, merged)
    hashed = Digests(work)
    for path, digest in digests.items():
        hashed.add(path, digest)
    hashed.save()
    result = compare(model, trained, merged, full=full)

    print(
        f"merge: KL {result.kl:.2e} nats a token (at most {max_kl}; the base's is {result.kl_of_base:.2e}), "
        f"logits differ by at most {result.max_logit_difference:.2e}, "
        f"{result.greedy_agreement:.0%} of the prompts continue alike",
        file=sys.stderr,
    )
    if not result.kl < result.kl_of_base:
        raise StageError(
            f"{merged}: is no nearer to {whole} (KL {result.kl:.3g} nats a token) than the base alone is "
            f"({result.kl_of_base:.3g}), so what was trained is lost in rounding; "
            "train further, or store the base in a finer number format (base.dtype: float32)"
        )
    if not result.kl <= max_kl:  # written so that NaN fails
        raise StageError(
            f"{merged}: is not {whole}: KL {result.kl:.3g} nats a token is over merge.max_kl {max_kl} "
            f"(largest difference of a logit {result.max_logit_difference:.3g}, "
            f"{result.greedy_agreement:.0%} of {len(PROMPTS)} prompts continue alike). Store the base in a finer "
            "number format (base.dtype: float32), or raise merge.max_kl if this much rounding is acceptable"
        )
    write_json(
        outputs["metrics"],
        {
            "kl": result.kl,
            "max_logit_difference": result.max_logit_difference,
            "greedy_agreement": result.greedy_agreement,
            "tolerance": {"max_kl": max_kl},
            "bytes": sum(path.stat().st_size for path in merged.rglob("*") if path.is_file()),
        },
    )


# ---- what may be merged


def check_pair(model: Path, trained: Path) -> None:
    """StageError unless this was trained on exactly this base and is whole, and the base is not quantised.

    Whether the base is whole is left to `verified`.
    """
    base_digest = read_manifest(model)["digest"]
    trained_on = verify_artifact(trained)["inputs"].get("model")
    if trained_on != base_digest:
        raise StageError(
            f"{trained}: was trained on a base with digest {trained_on}, but {model} is {base_digest}; "
            "merging them would give a model nobody trained. Run `dvc repro` to train on this base"
        )
    if read_json(model / "config.json").get("quantization_config"):
        raise StageError(
            f"{model / 'config.json'}: the base is quantised, and merging would quantise the trained weights again; "
            "give the recipe a base in bfloat16, float16 or float32"
        )


@contextmanager
def verified(model: Path) -> Iterator[None]:
    """Hash every file of the base while it is used, so that the disk gives its bytes once. StageError when one differs.

    That error comes before whatever a broken base did to its user.
    """
    with ThreadPoolExecutor(1) as thread:
        manifest = thread.submit(verify_artifact, model)
        try:
            yield
        finally:
            manifest.result()


def check_adapter(adapter: Path) -> None:
    """StageError when the adapter's weights are not finite numbers, or change nothing at all."""
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    zero = []
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, a safe_open is no dict
            tensor = file.get_tensor(key)
            if not tensor.isfinite().all():
                raise StageError(f"{path}: {key} holds NaN or infinity; train again with a lower learning_rate")
            # An update is B times A, and B starts as zeros.
            if "lora_B" in key or "lora_embedding_B" in key:
                zero.append(not tensor.any())
    if zero and all(zero):
        raise StageError(
            f"{path}: all {len(zero)} lora_B tensors are zero, as before training, so merging would give the base; "
            "look at the loss and grad_norm in train.json"
        )


def check_weights(model: Path, trained: Path) -> None:
    """StageError when trained weights are not finite numbers, or are all those of the base."""
    import torch

    # Places in files, of which one tensor after the other is read; or, where names differ, tensors in memory.
    before: dict[str, Any] = find_tensors(model)
    after: dict[str, Any] = find_tensors(trained)
    read: Callable[[Any], Any] = read_tensor
    if before.keys() != after.keys() or {place.format for place in [*before.values(), *after.values()]} - set(FORMATS):
        before, after = _load(model, "auto").state_dict(), _load(trained, "auto").state_dict()
        read = torch.Tensor.detach
    shapes = [{key: weight.shape for key, weight in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        keys = sorted(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
        raise StageError(f"{trained}: {keys[0]} is not shaped as in {model}; run `dvc repro` to train on this base")
    same = True
    for key in after:
        tensor = read(after[key])
        if not tensor.isfinite().all():
            raise StageError(f"{trained}: {key} holds NaN or infinity; train again with a lower learning_rate")
        same = same and torch.equal(read(before[key]).to(tensor.dtype), tensor)
    if same:
        raise StageError(
            f"{trained}: all {len(after)} weights are those of {model}, as before training; "
            "look at the loss and grad_norm in train.json"
        )


# ---- merge


def round_weights(model: Path, trained: Path, merged: Path) -> None:
    """Write trained weights in the base's number format, and the base's other files. The same bytes each time.

    StageError when a weight is too large for that format.
    """
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).dtype
    if not isinstance(dtype, torch.dtype):  # it is that of the weights
        dtype = _load(model, "auto").dtype
    exact, whole = _load(trained, torch.float32), _load(trained, dtype)
    if str(dtype) in LOST_BITS:
        _round_all(exact, whole, trained)
    _save(whole, model, merged)


def _round_all(exact: Any, whole: Any, trained: Path) -> None:
    """Give `whole` the weights of `exact`, which has the same in float32, rounded at random. StageError as above."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = dict(exact.named_parameters())
    for name, rounded in whole.named_parameters():
        rounded.data.copy_(round_at_random(weights.pop(name).data, whole.dtype, generator))
        if not rounded.data.isfinite().all():
            raise StageError(
                f"{trained}: a weight is too large for the base's {str(whole.dtype).removeprefix('torch.')}; "
                "set base.dtype: float32, or train with a lower learning_rate"
            )
    assert not weights, "two models of one kind have other weights"


def round_at_random(weights: Any, dtype: Any, generator: Any) -> Any:
    """Round float32 up or down to a shorter format, up the likelier the nearer that is: right on average.

    What training does to a weight is mostly less than half a step of bf16, which rounding to nearest takes back: after
    16 steps of recipes/examples/sft-full.yaml 82 % of the weights were the base's again, and KL from what was trained
    0.17 nats a token (the base's is 0.50). Rounded at random it is 0.0002: what one weight loses, its neighbours gain.
    """
    import torch

    lost = LOST_BITS[str(dtype)]
    noise = torch.randint(0, 1 << lost, weights.shape, generator=generator, dtype=torch.int32)
    bits = (weights.contiguous().view(torch.int32) + noise) & -(1 << lost)
    return bits.view(torch.float32).to(dtype)


def merge(model: Path, adapter: Path, merged: Path, max_shard_size: str = MAX_SHARD_SIZE) -> dict[Path, Digest]:
    """Write base and adapter as one checkpoint: safetensors in the base's number format, and the base's other files.

    Returns the digests of the files that were hashed while they were written. On the CPU, whatever the machine has, so that
    the bytes do not depend on the kind of GPU; hashing takes longer than adding anyway.
    """
    try:
        digests = stream_merge(model, adapter, merged, max_shard_size)
    except NotCovered as why:
        print(f"merge: the whole model is loaded, since {why}", file=sys.stderr)
        merge_whole(model, adapter, merged, max_shard_size)
        return {}
    copy_text_files(model, merged)
    return digests


def merge_whole(model: Path, adapter: Path, merged: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """As `merge`, by PEFT, with the whole model in memory."""
    import peft

    base = _load(model, "auto")
    tied = _tied(base)
    pair = peft.PeftModel.from_pretrained(base, adapter)
    refuse_tied(base, model, adapter, tied)
    _save(_merged(pair, model, adapter), model, merged, max_shard_size)


def _merged(pair: Any, model: Path, adapter: Path) -> Any:
    try:
        return pair.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge found NaN or infinity
        raise StageError(f"{adapter}: can't be merged into {model}: {error}") from error


def _save(whole: Any, model: Path, merged: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    from transformers import GenerationConfig

    if (model / "generation_config.json").exists():
        # The base's own file is copied below; saving it here would fail on many that people publish
        # (a temperature without do_sample, say).
        whole.generation_config = GenerationConfig()
    whole.save_pretrained(merged, max_shard_size=max_shard_size)
    copy_text_files(model, merged)
    for path in merged.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner may read


def copy_text_files(model: Path, merged: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence byte for byte: no weights, code or pickles."""
    files = [path for path in model.iterdir() if path.is_file()] + list(model.glob("additional_chat_templates/*.jinja"))
    for path in files:
        legal = path.name.startswith(("LICENSE", "NOTICE"))
        wanted = (
            path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED and not path.name.endswith(".index.json")
        )
        if legal or wanted:
            target = merged / path.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


# ---- prove


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What merging did, over every position of the fixed prompts and their continuations."""

    kl: float  # mean KL(what was trained || merged), nats a token
    max_logit_difference: float
    greedy_agreement: float  # part of the prompts whose greedy continuations are the same tokens
    kl_of_base: float  # mean KL(what was trained || base): how far training moved the model


@dataclass(frozen=True, kw_only=True)
class _Answer:
    ids: list[int]  # prompt and greedy continuation
    num_prompt: int
    logits: Any  # [tokens, vocabulary], float32, on the CPU
    kl_of_base: float  # summed over tokens


def compare(model: Path, trained: Path, merged: Path, *, full: bool = False) -> Comparison:
    """Compare base and adapter, or trained weights, with the merged folder, each in float32, one after the other.

    StageError when one ties its embeddings and the other does not.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers, tied = (_of_weights if full else _of_adapter)(model, trained, device)
    torch.cuda.empty_cache()

    one = _load(merged, torch.float32, device).eval()
    if _tied(one) != tied:
        raise StageError(
            f"{merged}: input and output embeddings are {'not ' * tied}one tensor, "
            f"but in {model} they are {'not ' * (not tied)}so"
        )
    kl_sum, largest, agreed = 0.0, 0.0, 0
    for answer in answers:
        logits = _logits(one, answer.ids)
        kl_sum += _kl(answer.logits, logits)
        difference = (answer.logits - logits).abs().max().item()
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        agreed += _continue(one, answer.ids[: answer.num_prompt]) == answer.ids
    num_positions = sum(len(answer.ids) for answer in answers)
    return Comparison(
        kl=kl_sum / num_positions,
        max_logit_difference=largest,
        greedy_agreement=agreed / len(answers),
        kl_of_base=sum(answer.kl_of_base for answer in answers) / num_positions,
    )


def _of_adapter(model: Path, adapter: Path, device: str) -> tuple[list[_Answer], bool]:
    """What base and adapter say to the prompts, and whether the base ties its embeddings."""
    import peft
    import torch

    base = _load(model, torch.float32, device)
    tied = _tied(base)
    pair = peft.PeftModel.from_pretrained(base, adapter).to(device).eval()
    answers = []
    for ids in _prompt_ids(model):
        whole = _continue(pair, ids)
        logits = _logits(pair, whole)
        with pair.disable_adapter():
            kl_of_base = _kl(logits, _logits(pair, whole))
        answers.append(_Answer(ids=whole, num_prompt=len(ids), logits=logits, kl_of_base=kl_of_base))
    return answers, tied


def _of_weights(model: Path, trained: Path, device: str) -> tuple[list[_Answer], bool]:
    """What the trained weights say to the prompts, and whether the base ties its embeddings."""
    import torch

    whole = _load(trained, torch.float32, device).eval()
    said = []
    for ids in _prompt_ids(model):
        continued = _continue(whole, ids)
        said.append((continued, len(ids), _logits(whole, continued)))
    del whole  # or two models in float32 would be in memory
    base = _load(model, torch.float32, device).eval()
    answers = [
        _Answer(ids=ids, num_prompt=length, logits=logits, kl_of_base=_kl(logits, _logits(base, ids)))
        for ids, length, logits in said
    ]
    return answers, _tied(base)


def _load(folder: Path, dtype: Any, device: str = "cpu") -> Any:
    """The model on a device, each tensor sent there as it is read, so that it is never whole in the machine's memory."""
    from transformers import AutoModelForCausalLM

    # With a map, even of nothing but the CPU, transformers takes a model for an offloaded one when it saves it.
    where = {} if device == "cpu" else {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **where
    )


def _prompt_ids(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        texts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    return tokenize(tokenizer, texts)


def _tied(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def _continue(model: Any, ids: list[int]) -> list[int]:
    """The ids and up to NUM_NEW_TOKENS greedy ones, whatever sampling the checkpoint's generation config asks for."""
    import torch
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=eos, pad_token_id=0)
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        whole = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    result: list[int] = whole[0].tolist()
    return result


def _logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def _kl(reference: Any, other: Any) -> float:
    """Sum over positions of KL(reference || other) in nats. Both [tokens, vocabulary] logits."""
    import torch

    p, q = torch.log_softmax(reference.double(), dim=-1), torch.log_softmax(other.double(), dim=-1)
    return float((p.exp() * (p - q)).sum())


# ---- a reward model


def merge_reward_model(model: Path, adapter: Path, merged: Path, *, max_reward_difference: float) -> dict[str, Any]:
    """Write base, adapter and head as one reward model, and compare its rewards; returns merge.json.

    The same on the same machine, whatever head the base was given: the adapter holds the trained one. StageError when
    a reward differs by more than `max_reward_difference`, or by what was trained.
    """
    import peft
    import torch

    from prefbuild.rewards.model import HEAD, load, make

    exact = _merged(peft.PeftModel.from_pretrained(make(model, seed=0, dtype=torch.float32), adapter), model, adapter)
    whole = make(model, seed=0, dtype="auto")
    if str(whole.dtype) in LOST_BITS:
        # To nearest, most of what a short training did would go: rewards of recipes/examples/reward.yaml were off by up
        # to 0.34. At random it is 0.015.
        _round_all(exact, whole, adapter)
    else:
        whole = exact
    _save(whole, model, merged)
    (merged / "generation_config.json").unlink(missing_ok=True)  # it generates nothing
    del exact, whole

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = peft.PeftModel.from_pretrained(make(model, seed=0, dtype=torch.float32), adapter)
    wanted = _rewards(pair.to(device), model)
    # The base with the trained head: what is left of the adapter when rounding eats all of LoRA.
    head = getattr(pair.base_model.model, HEAD).modules_to_save["default"].weight.detach().clone()
    del pair
    alone = make(model, seed=0, dtype=torch.float32)
    getattr(alone, HEAD).weight = torch.nn.Parameter(head.cpu())
    of_base = _differences(wanted, _rewards(alone.to(device), model))
    del alone
    torch.cuda.empty_cache()
    found = _differences(wanted, _rewards(load(merged, torch.float32).to(device), merged))

    largest, mean = max(found), math.fsum(found) / len(found)
    mean_of_base = math.fsum(of_base) / len(of_base)
    print(
        f"merge: rewards differ by at most {largest:.2e} (allowed: {max_reward_difference}), in the mean by {mean:.2e} "
        f"(the base's with the trained head: {mean_of_base:.2e}); they are {min(wanted):.3g} to {max(wanted):.3g}",
        file=sys.stderr,
    )
    if not mean < mean_of_base:
        raise StageError(
            f"{merged}: is no nearer to base and adapter (its rewards differ by {mean:.3g} in the mean) than the base with "
            f"the trained head is ({mean_of_base:.3g}), so what was trained is lost in rounding; "
            "train further, or store the base in a finer number format (base.dtype: float32)"
        )
    if not largest <= max_reward_difference:  # written so that NaN fails
        raise StageError(
            f"{merged}: is not base and adapter: a reward differs by {largest:.3g}, which is over "
            f"merge.max_reward_difference {max_reward_difference}. Store the base in a finer number format (base.dtype: "
            "float32), or raise merge.max_reward_difference if this much rounding is acceptable"
        )
    return {
        "max_reward_difference": largest,
        "mean_reward_difference": mean,
        "tolerance": {"max_reward_difference": max_reward_difference},
        "bytes": sum(path.stat().st_size for path in merged.rglob("*") if path.is_file()),
    }


def _rewards(model: Any, folder: Path) -> list[float]:
    """The rewards of fixed answers to the fixed prompts."""
    from prefbuild.rewards.model import ids_of, scores

    asked = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    prompts: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt, _ in asked]
    return scores(model.eval(), ids_of(load_tokenizer(folder), prompts, [answer for _, answer in asked]))


def _differences(wanted: list[float], found: list[float]) -> list[float]:
    apart = [abs(one - other) for one, other in zip(wanted, found, strict=True)]
    return [value if math.isfinite(value) else math.inf for value in apart]
