"""A model that scores packed rows: how it is loaded, what of it is checked, and what a reference says to rows."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prefbuild.errors import StageError
from prefbuild.methods import DPO
from prefbuild.training.ahead import take
from prefbuild.training.attention import OTHER_ENGINE, use_packed_attention
from prefbuild.training.common import model_options
from prefbuild.training.fused import dequantise, fuse, leave_out_unread
from prefbuild.training.packing import Packed, pack, packed_size
from prefbuild.training.prepared import LogProbs, Row, group_of
from prefbuild.training.scoring import Scores, score

MULTIPLE = 128  # a row of tokens is filled up to this on a GPU, whose kernels are fastest on whole tiles
# Nats by which a packed answer may be likelier or less likely than the same answer alone, a token, on average.
DISAGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


# ---- scores


def pack_rows(rows: list[Row], device: Any) -> Packed:
    """Pairs in one row on a device: answers are completions, chosen and rejected by turns."""
    return pack([group_of(row) for row in rows], device, MULTIPLE if device.type == "cuda" else 1)


def score_rows(model: Any, rows: list[Row]) -> tuple[Scores, list[int]]:
    """Score pairs in one packed row; also how many tokens each answer has, chosen and rejected by turns."""
    packed = pack_rows(rows, next(model.parameters()).device)
    return score(model, packed), packed.lengths


def token_log_probs(model: Any, parts: Iterable[list[Row]]) -> Iterator[list[LogProbs]]:
    """Log-probabilities of every answer token of every row, part by part. A part goes through the model at once."""
    waiting: deque[tuple[Any, list[int]]] = deque()

    def collect() -> list[LogProbs]:
        values, lengths = waiting.popleft()
        answers = [answer.numpy() for answer in values.cpu().split(lengths)]
        return list(zip(answers[0::2], answers[1::2], strict=True))

    for rows in parts:
        with torch.no_grad():
            scores, lengths = score_rows(model, rows)
        waiting.append((scores.log_probs, lengths))
        if len(waiting) > 1:  # a GPU is given the next rows before the last ones' results are asked for
            yield collect()
    while waiting:
        yield collect()


def reference_log_probs(settings: DPO, model: Path, parts: list[list[Row]], bf16: bool) -> Iterator[list[LogProbs]]:
    """What a reference (a checkpoint's folder) says to rows, part by part: in the arithmetic it would be trained in."""
    if not parts:
        return
    reference = load_model(settings, model, bf16)
    fuse(reference)
    leave_out_unread(reference)
    with autocast(reference, bf16):
        check_packed(reference.eval(), parts[0])
        yield from token_log_probs(reference, parts)


def autocast(model: Any, bf16: bool) -> Any:
    """The arithmetic of a run, as Trainer has it."""
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=bf16)


# ---- the model


def load_model(settings: DPO, folder: Path, bf16: bool, *, dequantised: bool = True) -> Any:
    """A checkpoint on this process' device, with packed attention; NF4 weights are dequantised once, or at each use.

    StageError when the model has parts that packing would change.
    """
    options = model_options(settings, bf16)
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    with no_first_values():
        weights = take(folder)
        config: Any = None if weights is None else AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model = kind.from_pretrained(None, config=config, state_dict=weights, **options)
            model.config.name_or_path = str(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
        del weights
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise StageError(f"{folder}: its loss has a term of the experts' router, which packing has not; {OTHER_ENGINE}")
    if settings.quantization is not None and dequantised:
        dequantise(model)
    use_packed_attention(model)
    model.config.use_cache = False
    return model


@contextmanager
def no_first_values() -> Iterator[None]:
    """Leave out the random values that torch gives linear layers: a checkpoint's follow, and they take a second or two.

    transformers itself gives values to weights that a checkpoint lacks.
    """
    reset = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda _layer: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Linear.reset_parameters = reset  # type: ignore[method-assign]


def without_dropout(model: Any) -> None:
    """Switch off dropout, an adapter's too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def check_packed(model: Any, rows: list[Row]) -> None:
    """StageError unless packed pairs score as each answer does alone, by the model's own code on a plain row.

    On the two shortest rows: what is wrong with a model's attention or positions shows in any.
    """
    shortest = sorted(rows, key=lambda row: packed_size(group_of(row)))[:2]
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.no_grad():
        scores, _ = score_rows(model, shortest)
        whole.set_attn_implementation("sdpa")
        try:
            # Not cuDNN's, which first plans each length that it meets: a second of every start.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                alone = [
                    _alone(model, row["prompt_ids"], row[f"{answer}_ids"])
                    for row in shortest
                    for answer in ("chosen", "rejected")
                ]
        finally:
            use_packed_attention(whole)
    difference = (scores.log_probs - torch.cat(alone)).abs().mean().item()
    dtype = torch.get_autocast_dtype(scores.log_probs.device.type) if torch.is_autocast_enabled() else whole.dtype
    if not difference <= DISAGREEMENT.get(dtype, 1e-3):  # written so that NaN fails
        raise StageError(
            f"{type(whole).__name__}: packed answers score {difference:.3g} nats a token otherwise than alone, so "
            f"this model's attention is not what packing takes it for; {OTHER_ENGINE}"
        )


def _alone(model: Any, prompt: list[int], answer: list[int]) -> Any:
    ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(1).gather(1, torch.tensor(answer, device=ids.device)[:, None])[:, 0]
