"""Ask a model one question, through its chat template."""

from pathlib import Path
from typing import Any

from prefbuild.errors import DataError, UsageError
from prefbuild.machine import leave_out
from prefbuild.measure import machine
from prefbuild.rewards.model import is_reward_model
from prefbuild.template import load_tokenizer, render_prompt, tokenize


def generate(
    model_dir: Path,
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stream: bool = True,
) -> str:
    """The model's answer, also written to stdout as it comes when `stream` is set.

    Greedy at temperature 0, else sampled with `seed` among the likeliest tokens of probability `top_p`, without those
    less likely than `min_p` of the likeliest one.
    UsageError when there is no model, or it takes no such prompt.
    """
    if not (model_dir / "config.json").exists():
        raise UsageError(f"{model_dir}: holds no model; build it with `dvc repro`")
    if is_reward_model(model_dir):
        raise UsageError(
            f"{model_dir}: is a reward model, which writes nothing; `prefbuild reward {model_dir.parent.name} --try` scores "
            "completions with it"
        )

    leave_out("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed

    try:
        tokenizer = load_tokenizer(model_dir)
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = render_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])
    except (DataError, ValueError) as error:  # ValueError: the tokenizer has no chat template
        raise UsageError(f"{model_dir}: {error}") from None

    dtype, device = machine()
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.to(device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        limits = {"top_p": top_p, "min_p": min_p}
        sampling = {"do_sample": True, "temperature": temperature}
        sampling |= {key: value for key, value in limits.items() if value is not None}
    set_seed(seed)
    ids = torch.tensor(tokenize(tokenizer, [text]), device=device)
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            **sampling,
        )
    answer: str = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return answer
