"""Completions of prompts with a static cache and, on a GPU, captured CUDA graphs: one launch a token.

A prompt is read once for all its completions. Weights are a copy with the adapter merged in; see decoder.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefbuild.training.decoder import Decoder
from prefbuild.training.sampling import Sampling, draw, processed

TOKENS_BETWEEN_LOOKS = 16  # looking whether all have ended waits for the GPU
PROMPT_STEP = 64  # prompts are padded to a multiple of this, so that few graphs are captured


class Graphs:
    """Functions that work in place, captured at their first call on a GPU and replayed at the next ones."""

    def __init__(self, device: torch.device, generator: torch.Generator):
        self.on_gpu, self.generator = device.type == "cuda", generator
        self.captured: dict[Any, Any] = {}

    def prepare(self, key: Any, function: Callable[[], None]) -> Callable[[], None]:
        """What does as `function`, which is called three times here on a GPU, and must leave nothing that matters."""
        if not self.on_gpu:
            return function
        if key not in self.captured:
            # On another stream, as capturing wants it: kernels are compiled and libraries set up.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
                function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                function()
            self.captured[key] = graph
        replay: Callable[[], None] = self.captured[key].replay
        return replay


class Rows:
    """What `num_rows` completions, written at once, have on the device: their cache, and where each one is."""

    def __init__(self, decoder: Decoder, num_rows: int, length: int, max_new_tokens: int, remembers: bool):
        device, vocabulary = decoder.device, decoder.head.shape[0]
        self.cache = decoder.empty_cache(num_rows, length)
        self.logits = torch.zeros(num_rows, vocabulary, dtype=decoder.dtype, device=device)
        self.tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.lengths = torch.ones_like(self.tokens)  # of prompt and completion, with the token that is read next
        self.written = torch.zeros(num_rows, max_new_tokens, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of `written`, where the next token goes
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.seen = torch.zeros(num_rows, vocabulary, dtype=torch.bool, device=device) if remembers else None


class Rollout:
    """Writes completions of a model as it was at the last `refresh`."""

    def __init__(
        self, model: Any, *, max_prompt: int, max_new_tokens: int, stops: list[int], bf16: bool, seed: int = 0
    ):
        """`max_prompt` and `max_new_tokens` are in tokens. StageError for a model that decoder.py does not cover."""
        self.max_new_tokens, self.stops, self.seed = max_new_tokens, set(stops), seed
        self.longest = -(-max_prompt // PROMPT_STEP) * PROMPT_STEP
        self.decoder = Decoder(model, torch.bfloat16 if bf16 else torch.float32, self.longest + max_new_tokens)
        self.device = self.decoder.device
        self.stop_ids = torch.tensor(sorted(self.stops), device=self.device)
        self.generator = torch.Generator(device=self.device)
        self.graphs = Graphs(self.device, self.generator)
        self.rows: dict[Any, Rows] = {}
        self.inputs: dict[Any, tuple[Tensor, ...]] = {}  # what a captured prefill reads

    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        if self.device.type != "cuda" or self.quantised:
            self.decoder.refresh()
        else:
            self.graphs.prepare(("refresh", self.decoder.addresses()), self.decoder.refresh)()

    @functools.cached_property
    def quantised(self) -> bool:
        """Whether weights are in 4 bits, whose unpacking can't be captured."""
        layers = [getattr(source, "base_layer", source) for _, source in self.decoder.copies]
        return any(hasattr(getattr(layer, "weight", None), "quant_state") for layer in layers)

    @torch.no_grad()
    def complete(self, prompts: list[list[int]], sampling: Sampling, round_number: int = 0) -> list[list[int]]:
        """A completion of each prompt, to its first stop token, with it, or cut at max_new_tokens.

        The same prompt several times is read once. The same `round_number`, as the step of a training, draws the same.
        """
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Nothing here writes one place twice, and the slower forms of index_put and cumsum are for that.
        torch.use_deterministic_algorithms(False)
        try:
            return self._complete(prompts, sampling, round_number)
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def _complete(self, prompts: list[list[int]], sampling: Sampling, round_number: int) -> list[list[int]]:
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        where = {prompt: index for index, prompt in enumerate(distinct)}
        rows = self._rows_for(len(prompts), sampling)
        key = (len(prompts), sampling)

        def step() -> None:
            rows.logits.copy_(self.decoder.step(rows.tokens, rows.lengths - 1, rows.cache))
            self._choose(rows, sampling)

        decode = self.graphs.prepare(("step", *key), step)
        first = self.graphs.prepare(("first", *key), lambda: self._choose(rows, sampling))
        self.generator.manual_seed((self.seed * 1_000_003 + round_number) % 2**63)
        self._read(rows, distinct, [where[tuple(prompt)] for prompt in prompts])
        first()
        for number in range(1, self.max_new_tokens):
            if number % TOKENS_BETWEEN_LOOKS == 0 and bool(rows.ended.all()):
                break
            decode()
        return [self._until_stop(ids) for ids in rows.written.tolist()]

    def _rows_for(self, num_rows: int, sampling: Sampling) -> Rows:
        key = (num_rows, sampling)
        if key not in self.rows:
            length = self.longest + self.max_new_tokens
            remembers = sampling.repetition_penalty != 1.0
            self.rows[key] = Rows(self.decoder, num_rows, length, self.max_new_tokens, remembers)
        return self.rows[key]

    def _read(self, rows: Rows, prompts: list[tuple[int, ...]], places: list[int]) -> None:
        """Prefill: the cache and the first logits of each row, whose prompt is `prompts[places[row]]`."""
        length = -(-max(map(len, prompts)) // PROMPT_STEP) * PROMPT_STEP
        ids = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inputs = tuple(tensor.to(self.device) for tensor in (ids, lengths, torch.tensor(places)))
        key = ("read", id(rows), *ids.shape)
        static = self.inputs.setdefault(key, inputs)

        def read() -> None:
            logits = self.decoder.prefill(static[0], static[1], rows.cache, static[2])
            rows.logits.copy_(logits.index_select(0, static[2]))

        for to, new in zip(static, inputs, strict=True):
            to.copy_(new)
        self.graphs.prepare(key, read)()
        rows.lengths.copy_(static[1][static[2]])
        rows.column.zero_()
        rows.ended.zero_()
        if rows.seen is not None:
            own = [ids[place, : lengths[place]] for place in places]
            rows.seen.zero_()
            for row, prompt in enumerate(own):
                rows.seen[row, prompt.to(self.device)] = True

    def _choose(self, rows: Rows, sampling: Sampling) -> None:
        """Take each row's next token from its logits, and note where it stands then."""
        scores = processed(rows.logits, sampling, rows.seen)
        tokens = draw(scores, sampling, self.generator)
        here = torch.arange(self.max_new_tokens, device=self.device) == rows.column
        rows.written.copy_(torch.where(here, tokens[:, None], rows.written))
        if rows.seen is not None:
            rows.seen.scatter_(1, tokens[:, None], True)
        rows.ended.logical_or_((tokens[:, None] == self.stop_ids).any(dim=1))
        rows.tokens.copy_(tokens)
        rows.lengths.add_(1)
        rows.column.add_(1)

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((position for position, token in enumerate(ids) if token in self.stops), len(ids) - 1)
        return ids[: end + 1]
