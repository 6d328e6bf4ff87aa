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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
# How far a sample may be from lm-eval's, in nats a token on average. In 16 bits both are 0.1 from float32's, and up to
# 0.6 in single tokens: logits between 16 and 32 are a multiple of 0.125 in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}

Ids = tuple[int, ...]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the ids of context and continuation
Answer = tuple[float, bool]  # the log-likelihood of the continuation, and whether greedy decoding would write it


@dataclass(frozen=True)
class Part:
    """A beginning that requests have in common, and the requests, by index, that go on from it in each way."""

    prefix: Ids
    # What comes after the prefix, and how many tokens at its end are the continuation.
    asked: dict[tuple[Ids, int], list[int]]

    @property
    def heads(self) -> list[Ids]:
        """What the model reads after the prefix: all but the last tokens, which predict nothing; each once."""
        return list(dict.fromkeys(rest[:-1] for rest, _ in self.asked if len(rest) > 1))

    @property
    def size(self) -> int:
        """Tokens of it in a pack."""
        return len(self.prefix) + sum(map(len, self.heads))

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return len(self.prefix) + max(len(rest) for rest, _ in self.asked)


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
            for chosen in into_bins([part.size for part in parts], self._budget):
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


def share(requests: list[Request], max_length: int, budget: int) -> list[Part]:
    """Requests by what they have in common, each continuation of a context once; alike for alike requests.

    As in HFLM, what the model reads is cut on the left to `max_length` tokens. A part is no larger than `budget` tokens,
    unless it is one request. ValueError where lm-eval would fail too.
    """
    by_context: dict[Ids, dict[Ids, list[int]]] = {}
    for i, (_, before, after) in enumerate(requests):
        if not 0 < len(after) <= max_length:
            raise ValueError(
                f"request {i} has a continuation of {len(after)} tokens; it takes 1 to {max_length}, "
                "as many as the model's context"
            )
        # The last token of a continuation is not read.
        cut = max(0, len(before) + len(after) - max_length - 1)
        by_context.setdefault(tuple(before[cut:]), {}).setdefault(tuple(after), []).append(i)

    parts = []
    together: list[Context] = []
    prefix: Ids = ()
    # Those that begin alike are neighbours when sorted.
    for context in _in_budget(sorted(by_context.items()), budget):
        num_common = _num_common(prefix, context.ids)
        joint = _size([*together, context], num_common)
        apart = _size(together, len(prefix)) + _size([context], len(context.ids))
        if together and num_common and joint <= budget and joint < apart:
            prefix = prefix[:num_common]
        else:
            parts += [_part(prefix, together)] if together else []
            together, prefix = [], context.ids
        together.append(context)
    return [*parts, _part(prefix, together)]


class Context(NamedTuple):
    """A context, and the requests that ask for each of its continuations."""

    ids: Ids
    asked: dict[Ids, list[int]]
    num_heads: int  # continuations without their last tokens, no two alike
    num_read: int  # tokens of these


def _in_budget(contexts: list[tuple[Ids, dict[Ids, list[int]]]], budget: int) -> Iterator[Context]:
    """Contexts with no more of their continuations than the budget takes, several times if need be."""
    for ids, asked in contexts:
        chunks: list[dict[Ids, list[int]]] = [{}]
        size = len(ids)
        for continuation, indices in asked.items():
            size += len(continuation) - 1
            if chunks[-1] and size > budget:
                chunks.append({})
                size = len(ids) + len(continuation) - 1
            chunks[-1][continuation] = indices
        for chunk in chunks:
            heads = {continuation[:-1] for continuation in chunk}
            yield Context(ids, chunk, len(heads), sum(map(len, heads)))


def _size(contexts: list[Context], num_common: int) -> int:
    """Tokens of contexts that share their first `num_common`: each head has the rest of its context to itself."""
    return num_common + sum(c.num_heads * (len(c.ids) - num_common) + c.num_read for c in contexts)


def _num_common(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _part(prefix: Ids, contexts: list[Context]) -> Part:
    return Part(
        prefix,
        {
            (context.ids[len(prefix) :] + continuation, len(continuation)): indices
            for context in contexts
            for continuation, indices in context.asked.items()
        },
    )


def unlike(parts: list[Part], num_ids: int) -> list[Part]:
    """The parts with other tokens wherever the last request of the last part must not see them."""
    (*_, (last, _)) = parts[-1].asked
    others = [rest for rest, _ in parts[-1].asked if rest[:-1] != last[:-1]]

    def other(ids: Ids, by: int) -> Ids:
        return tuple((i + by) % num_ids for i in ids)

    # A head that became the last one's would be computed with it.
    by = next(n for n in range(1, num_ids) if all(other(rest[:-1], n) != last[:-1] for rest in others))
    return [
        *(Part(other(p.prefix, by), {(other(rest, by), n): i for (rest, n), i in p.asked.items()}) for p in parts[:-1]),
        Part(
            parts[-1].prefix,
            {(other(rest, by) if rest in others else rest, n): i for (rest, n), i in parts[-1].asked.items()},
        ),
    ]


def pack_parts(parts: list[Part], device: Any) -> Packed:
    """The parts' prefixes and heads in one row, of which every token of every continuation is scored."""
    packed = pack([(part.prefix, part.heads) for part in parts], device)
    sources: list[int] = []
    targets: list[int] = []
    start = 0
    for part in parts:
        end = start + len(part.prefix)
        begins: dict[Ids, int] = {}
        start = end
        for head in part.heads:
            begins[head] = start
            start += len(head)
        for rest, num_scored in part.asked:
            # The prefix' last token predicts the first of the rest, and each token of its head the next one.
            places = [end - 1, *(range(begins[rest[:-1]], begins[rest[:-1]] + len(rest) - 1) if len(rest) > 1 else ())]
            sources += places[-num_scored:]
            targets += rest[-num_scored:]
    return replace(
        packed,
        sources=torch.tensor(sources, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=[num_scored for part in parts for _, num_scored in part.asked],
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
