"""lm-evaluation-harness' model class, with a context computed once for all of its continuations.

Covered: log-likelihoods, as multiple choice asks for them. The continuations of a context are packed behind one copy of
it, as training packs a pair behind its prompt, and packs fill a token budget without padding. Not covered, and left to
lm-eval's own code: generation, rolling log-likelihoods, and models for which a sample that is scored in both ways gives
two answers.

In one case lm-eval 0.4.13 is wrong where this is right: of two requests for one text that is cut into context and
continuation in two places, it takes the shorter continuation's log-likelihood from the wrong place (_loglikelihood_tokens,
where cached logits are not sliced as the greedy tokens are).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from tqdm import tqdm

from prefbuild.errors import StageError
from prefbuild.training.attention import use_packed_attention
from prefbuild.training.packing import Packed, into_bins, pack
from prefbuild.training.scoring import score

# A document of batch_size stands for this many tokens of a pack.
TOKENS_A_DOCUMENT = 512
# How far both ways may be apart, in nats a token. lm-eval takes the softmax in the model's number format, and a bfloat16
# between 16 and 32, as logits are, is up to 0.0625 wrong. Tokens that see what they should not are out by more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}

Ids = tuple[int, ...]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the ids of context and continuation
Answer = tuple[float, bool]  # the log-likelihood of the continuation, and whether greedy decoding would write it


@dataclass(frozen=True)
class Shared:
    """A context, and the requests, by index, that ask for each continuation of it."""

    context: Ids
    asked: dict[Ids, list[int]]

    @property
    def heads(self) -> list[Ids]:
        """What the model reads of the continuations: all but their last tokens, which predict nothing; each once."""
        return list(dict.fromkeys(continuation[:-1] for continuation in self.asked if len(continuation) > 1))

    @property
    def size(self) -> int:
        """Tokens of it in a pack."""
        return len(self.context) + sum(map(len, self.heads))


class SharedContextLM(HFLM):
    """HFLM that scores continuations with shared contexts. Its batch_size, in documents, must be a number."""

    _encoded: dict[str, list[int]] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Answers to `requests`, instances of (context, continuation)."""
        # lm-eval tokenises a context twice for each of its continuations, one text at a time. Here it is each text once,
        # and all at a time, which the tokenizer spreads over the cores.
        texts = {text: None for request in requests for text in _tokenised(*request.args)}
        self._encoded = self._encode_all(list(texts))
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text, as HFLM takes them."""
        if add_special_tokens is None and not options and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, **options)

    def _encode_all(self, texts: list[str]) -> dict[str, list[int]]:
        """What HFLM's tok_encode says of each text: one that begins with BOS gets no other."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        encoded: dict[str, list[int]] = {}
        for has_bos, options in ((False, {}), (True, {"add_special_tokens": False})):
            alike = [text for text in texts if has_bos_prefix(text, bos) is has_bos]
            if alike:
                encoded |= zip(alike, self.tokenizer(alike, **options)["input_ids"], strict=True)
        return encoded

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        # Windows of a rolling log-likelihood come with override_bs, and have a context of one token each.
        if override_bs is None and requests:
            too_long = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
            if too_long:
                print(
                    f"evaluate: {too_long} of {len(requests)} requests are longer than the model's {self.max_length} "
                    "tokens, and cut on the left",
                    file=sys.stderr,
                )
            parts = share(requests, self.max_length, self._budget)
            if self._agrees(requests, parts):
                return self._score_all(requests, parts, disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    @property
    def _budget(self) -> int:
        """Tokens of a pack; only one context with one continuation may be more."""
        return self.batch_size * TOKENS_A_DOCUMENT

    def _score_all(self, requests: list[Request], parts: list[Shared], disable_tqdm: bool) -> list[Answer]:
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for chosen in into_bins([part.size for part in parts], self._budget):
                some = [parts[i] for i in chosen]
                indices_of_each = [indices for part in some for indices in part.asked.values()]
                for indices, answer in zip(indices_of_each, self._score(some), strict=True):
                    for i in indices:
                        answers[i] = answer
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(len(indices))
        return answers

    def _score(self, parts: list[Shared]) -> list[Answer]:
        """Answers to all continuations of the parts, one after the other, from one forward pass."""
        packed = pack_shared(parts, self.device)
        with packed_attention(self.model), torch.no_grad():
            scores = score(self.model, packed, statistics=True)
        log_probs, greedy = scores.log_probs.double().cpu(), scores.top1.cpu()
        return [
            (float(of_one.sum()), bool(likeliest.all()))
            for of_one, likeliest in zip(log_probs.split(packed.lengths), greedy.split(packed.lengths), strict=True)
        ]

    def _agrees(self, requests: list[Request], parts: list[Shared]) -> bool:
        """Whether two contexts packed together are scored as lm-eval scores them alone: the shortest and the longest.

        So it is known of any model, without a list of architectures: attention that can't be replaced, layers that
        carry a state from token to token and windows of attention give other numbers.
        """

        def longest(part: Shared) -> int:
            return len(part.context) + max(map(len, part.asked))

        ends = (min(parts, key=longest), max(parts, key=longest))
        some = [Shared(p.context, dict(sorted(p.asked.items(), key=lambda item: -len(item[0]))[:2])) for p in ends]
        asked = [requests[indices[0]] for part in some for indices in part.asked.values()]
        theirs = [super(SharedContextLM, self)._loglikelihood_tokens([(None, *one[1:])], True)[0] for one in asked]
        try:
            ours = self._score(some)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's own code can fail in any way, and lm-eval's way is still there
            # What mends it is said for training, where nothing else can be done.
            told = isinstance(error, StageError)
            problem = str(error).partition("; ")[0] if told else f"{type(error).__name__}: {error}"
        else:
            apart = max(abs(a[0] - b[0]) / len(one[2]) for a, b, one in zip(ours, theirs, asked, strict=True))
            if apart <= TOLERANCE[self.model.dtype]:
                return True
            problem = f"log-likelihoods would be {apart:.3g} nats a token from lm-eval's"
        print(f"evaluate: contexts are not shared by {type(self.model).__name__}: {problem}", file=sys.stderr)
        return False


def share(requests: list[Request], max_length: int, budget: int) -> list[Shared]:
    """Requests by context, in the order of their first one, each continuation of a context once.

    As in HFLM, what the model reads is cut on the left to `max_length` tokens. What would be larger than `budget`
    tokens is split, and its context computed once for each part. ValueError where lm-eval would fail too.
    """
    by_context: dict[Ids, dict[Ids, list[int]]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"request {i} has a continuation of {len(continuation)} tokens; it takes 1 to {max_length}, "
                "as many as the model's context"
            )
        # The last token of a continuation is not read.
        cut = max(0, len(context) + len(continuation) - max_length - 1)
        by_context.setdefault(tuple(context[cut:]), {}).setdefault(tuple(continuation), []).append(i)
    parts = []
    for context, asked in by_context.items():
        size = budget + 1
        for continuation, indices in asked.items():
            size += len(continuation) - 1
            if size > budget:
                parts.append(Shared(context, {}))
                size = len(context) + len(continuation) - 1
            parts[-1].asked[continuation] = indices
    return parts


def pack_shared(parts: list[Shared], device: Any) -> Packed:
    """The parts' contexts and heads in one row, of which every token of every continuation is scored."""
    packed = pack([(part.context, part.heads) for part in parts], device)
    sources: list[int] = []
    targets: list[int] = []
    start = 0
    for part in parts:
        end = start + len(part.context)
        begins: dict[Ids, int] = {}
        start = end
        for head in part.heads:
            begins[head] = start
            start += len(head)
        for continuation in part.asked:
            targets += continuation
            sources.append(end - 1)  # a context's last token predicts the first of each continuation
            if len(continuation) > 1:
                sources += range(begins[continuation[:-1]], begins[continuation[:-1]] + len(continuation) - 1)
    return replace(
        packed,
        sources=torch.tensor(sources, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=[len(continuation) for part in parts for continuation in part.asked],
    )


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model's attention is that of packs while this lasts: generation needs its own, with masks."""
    before = model.config._attn_implementation
    try:
        use_packed_attention(model)
        yield
    finally:
        model.set_attn_implementation(before)


def _tokenised(context: str, continuation: str) -> Iterable[str]:
    """What HFLM tokenises of a request: spaces at the end of a context are the continuation's."""
    return (context.rstrip(), context + continuation) if context else ()
