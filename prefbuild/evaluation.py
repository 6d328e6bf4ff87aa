"""lm-evaluation-harness' model class, with what requests have in common computed once.

Covered: log-likelihoods, as multiple choice asks for them. The continuations of a context are packed behind one copy of
it, as training packs a pair behind its prompt; so are contexts that begin alike, as with the same solved examples, where
that is less to compute. Packs fill a token budget without padding. Not covered, and left to lm-eval's own code:
generation, rolling log-likelihoods, and models that fail the check of a sample.

In one case lm-eval 0.4.13 is wrong where this is right: of two requests for one text that is cut into context and
continuation in two places, it takes the shorter continuation's log-likelihood from the wrong place (_loglikelihood_tokens,
where cached logits are not sliced as the greedy tokens are).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from tqdm import tqdm

from prefbuild.errors import StageError
from prefbuild.sharing import Part, Request, pack_parts, share, unlike
from prefbuild.training.attention import use_packed_attention
from prefbuild.training.packing import into_bins
from prefbuild.training.scoring import score

# A document of batch_size stands for this many tokens of a pack.
TOKENS_A_DOCUMENT = 512
# How far a sample may be from lm-eval's, in nats a token on average. In 16 bits both are 0.1 from float32's, and up to
# 0.6 in single tokens: logits between 16 and 32 are a multiple of 0.125 in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}

Answer = tuple[float, bool]  # the log-likelihood of the continuation, and whether greedy decoding would write it


class SharedContextLM(HFLM):
    """HFLM that scores continuations with shared contexts. Its batch_size, in documents, must be a number."""

    _encoded: dict[str, list[int]] = {}
    _shares = True
    _checked = 0  # tokens of the longest request for which that is known

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
            longest = max(part.longest for part in parts)
            if self._shares and longest > self._checked:
                self._shares, self._checked = self._check(requests, parts), longest
            if self._shares:
                return self._score_all(requests, parts, disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    @property
    def _budget(self) -> int:
        """Tokens of a pack; only one request may be more."""
        return self.batch_size * TOKENS_A_DOCUMENT

    def _score_all(self, requests: list[Request], parts: list[Part], disable_tqdm: bool) -> list[Answer]:
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for chosen in into_bins([part.weight for part in parts], self._budget):
                some = [parts[i] for i in chosen]
                indices_of_each = [indices for part in some for indices in part.asked.values()]
                for indices, answer in zip(indices_of_each, self._score(some), strict=True):
                    for i in indices:
                        answers[i] = answer
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(len(indices))
        return answers

    def _score(self, parts: list[Part]) -> list[Answer]:
        """Answers to all continuations of the parts, one after the other, from one forward pass."""
        packed = pack_parts(parts, self.device)
        with packed_attention(self.model), torch.no_grad():
            scores = score(self.model, packed, statistics=True)
        log_probs, greedy = scores.log_probs.double().cpu(), scores.top1.cpu()
        return [
            (float(of_one.sum()), bool(likeliest.all()))
            for of_one, likeliest in zip(log_probs.split(packed.lengths), greedy.split(packed.lengths), strict=True)
        ]

    def _check(self, requests: list[Request], parts: list[Part]) -> bool:
        """Whether the shortest and the longest part, packed together, are scored as lm-eval scores them alone, and the
        end of the pack to the last bit as before when all that it must not see is changed.

        So it is known of any model, without a list of architectures: attention that can't be replaced, layers that
        carry a state from token to token, and windows of attention fail.
        """
        some = [
            Part(part.prefix, dict(sorted(part.asked.items(), key=lambda item: -len(item[0][0]))[:2]))
            for part in (min(parts, key=lambda part: part.longest), max(parts, key=lambda part: part.longest))
        ]
        asked = [requests[indices[0]] for part in some for indices in part.asked.values()]
        own = super()._loglikelihood_tokens
        # One by one: some models' positions depend on the longest row.
        theirs = [own([(None, context, answer)], True)[0] for _, context, answer in asked]
        try:
            ours, again = self._score(some), self._score(unlike(some, self.config.get_text_config().vocab_size))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's own code can fail in any way, and lm-eval's way is still there
            # What mends it is said for training, where nothing else can be done.
            told = isinstance(error, StageError)
            problem = str(error).partition("; ")[0] if told else f"{type(error).__name__}: {error}"
        else:
            apart = sum(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
            apart /= sum(len(answer) for *_, answer in asked)
            problem = ""
            if apart > TOLERANCE[self.model.dtype]:
                problem = f"log-likelihoods would be {apart:.3g} nats a token from lm-eval's"
            elif ours[-1] != again[-1]:
                problem = f"a log-likelihood of {ours[-1][0]:.6g} would be {again[-1][0]:.6g} beside other requests"
        if problem:
            print(f"evaluate: contexts are not shared by {type(self.model).__name__}: {problem}", file=sys.stderr)
        return not problem


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
