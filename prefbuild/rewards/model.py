"""A reward model: made from a base, loaded from a checkpoint, and asked for its scores.

Covered: models that transformers has with a head called `score`, as it does for most that write text. A score is read
at the last token that is no padding, as transformers does it. Not covered: the bytes of a checkpoint, which who loads it
verifies.
"""

import math
from pathlib import Path
from typing import Any

from prefbuild.artifact import merged_folder, read_json
from prefbuild.errors import DataError, StageError
from prefbuild.rows import Message
from prefbuild.template import padding_tokenizer, render_completion, render_prompt, special_tokens, tokenize

HEAD = "score"
BATCH = 8  # answers scored at once


def is_reward_model(folder: Path) -> bool:
    """Whether a checkpoint folder holds a model that scores, rather than one that writes."""
    names = read_json(folder / "config.json").get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def make(base: Path, seed: int, **options: Any) -> Any:
    """The base with a new head in place of lm_head; the same seed gives the same head. `options` are from_pretrained's.

    StageError when transformers has no such model, or the checkpoint lacks more than the head.
    """
    import torch

    model, missing = _load(base, num_labels=1, **options)
    head = getattr(model, HEAD, None)
    if missing != {f"{HEAD}.weight"} or not isinstance(head, torch.nn.Linear):
        raise StageError(
            f"{base}: a {type(model).__name__} of it lacks {', '.join(sorted(missing)) or 'nothing'}, and it should lack "
            f"{HEAD}.weight alone, the head that is trained; take another base"
        )
    # Drawn here, so that it does not depend on what else drew, nor on the kind of GPU.
    start = torch.empty(head.weight.shape, dtype=torch.float32)
    start.normal_(0.0, model.config.get_text_config().initializer_range, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(start)
    model.config.get_text_config().pad_token_id = padding_tokenizer(base).pad_token_id
    return model


def load(folder: Path, dtype: Any) -> Any:
    """A reward model from its checkpoint. StageError when it is none."""
    if not (folder / "config.json").exists():
        raise StageError(f"{folder}: holds no model; `prefbuild build {folder.parent.name}` makes it")
    if not is_reward_model(folder):
        raise StageError(f"{folder}: is no reward model; a recipe with method: reward makes one")
    model, missing = _load(folder, dtype=dtype)
    if missing or model.config.num_labels != 1 or model.config.get_text_config().pad_token_id is None:
        raise StageError(f"{folder}: is no reward model as prefbuild writes them; build it again")
    return model


def ids_of(tokenizer: Any, prompts: list[list[Message]], completions: list[str]) -> list[list[int]]:
    """Prompts and completions in the words of the model's own chat template, as its training had them.

    A completion that was clipped is scored as if it had ended there. Special tokens in its text would end it earlier, so
    they are taken out. DataError when the template refuses the messages.
    """
    special = special_tokens(tokenizer)
    texts = []
    for messages, completion in zip(prompts, completions, strict=True):
        prompt = render_prompt(tokenizer, messages)
        texts += [prompt, _answer(tokenizer, messages, prompt, special.sub("", completion))]
    ids = tokenize(tokenizer, texts)  # apart, as prepare does it
    return [prompt + answer for prompt, answer in zip(ids[::2], ids[1::2], strict=True)]


def _answer(tokenizer: Any, messages: list[Message], prompt: str, text: str) -> str:
    """A completion as the template renders answers, whatever the model wrote."""
    try:
        return render_completion(tokenizer, messages, prompt, [{"role": "assistant", "content": text}])
    except DataError:
        # Templates of reasoning models rewrite some texts; no sampled one may end a training.
        plain: Message = {"role": "assistant", "content": "Green."}
        opening, _, closing = render_completion(tokenizer, messages, prompt, [plain]).partition(plain["content"])
        return opening + text + closing


def scores(model: Any, ids: list[list[int]]) -> list[float]:
    """The model's score of each row of token ids, in batches padded on the right."""
    import torch

    pad = model.config.get_text_config().pad_token_id
    found: list[float] = []
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        longest = max(map(len, batch))
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=model.device)
        # The same from within a trainer that computes in bf16 as from anywhere else.
        with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        found += logits[:, 0].float().tolist()
    return found


class Judge:
    """A recipe's reward model, ready to be asked: `judge(prompts, completions)`."""

    def __init__(self, recipe: str):
        """StageError when its build left none."""
        import torch

        self.folder = Path(merged_folder(recipe))
        # In float32 on a CPU, whose bf16 is slower, and in the checkpoint's own format on a GPU.
        on_gpu = torch.cuda.is_available()
        self.model = load(self.folder, "auto" if on_gpu else torch.float32).eval()
        self.model.to("cuda" if on_gpu else "cpu").requires_grad_(False)
        self.tokenizer = padding_tokenizer(self.folder)

    def __call__(self, prompts: list[list[Message]], completions: list[str]) -> list[float]:
        """A score a completion. StageError when the template refuses, or a score is no number."""
        try:
            ids = ids_of(self.tokenizer, prompts, completions)
        except DataError as error:
            raise StageError(f"{self.folder}: {error}") from None
        found = scores(self.model, ids)
        for completion, score in zip(completions, found, strict=True):
            if not math.isfinite(score):
                raise StageError(f"{self.folder}: scores {completion[:60]!r} with {score}, which is no number")
        return found


def _load(folder: Path, **options: Any) -> tuple[Any, set[str]]:
    """A sequence classification model, and the weights that its checkpoint lacks."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # that lm_head goes and a head comes is what is wanted
    try:
        model, about = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ValueError as error:  # no such class for this kind of model
        raise StageError(f"{folder}: can't be made a reward model: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(told)
    return model, set(about["missing_keys"])
