"""Log-probabilities of completions that share their prompts, for GRPO and RLOO: each prompt once, nothing padded.

On a GPU the forward and the backward are two captured CUDA graphs: a small model's step is thousands of kernels, and a
host that starts them one by one takes longer than they do. What is captured has fixed sizes, so a batch is filled up to
them with tokens that nothing reads; there are few sizes, and each is captured when it first comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefbuild.training.attention import use_packed_attention
from prefbuild.training.fused import Rows, fuse
from prefbuild.training.packing import Ids, Segments

STEP = 256  # prompt tokens, and completion tokens, of a captured batch are multiples of this
FILLING = 128  # tokens at least that fill such a batch up; elsewhere one does


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a captured batch's arrays are sized by. Two batches of the same sizes replay the same graph."""

    num_completions: int
    num_groups: int
    largest_group: int  # at most so many completions a prompt
    prompt_tokens: int
    scored_tokens: int
    longest: int  # tokens of a segment, at most
    filling: int  # tokens beyond those

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of a batch: those of Segments and Packed (packing.py), all int64."""
        tokens = self.prompt_tokens + self.scored_tokens + self.filling
        keys = tokens + self.prompt_tokens * self.largest_group
        ends = self.num_groups + self.num_completions + 2
        return {
            "ids": (tokens,),
            "positions": (tokens,),
            "keys": (keys,),
            "query_ends": (ends,),
            "key_ends": (ends,),
            "own": (tokens,),
            "prompts": (self.prompt_tokens,),
            "uses": (self.prompt_tokens, self.largest_group),
            "sources": (self.scored_tokens,),
            "targets": (self.scored_tokens,),
        }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Completions laid out group by group, and where their scored tokens belong."""

    sizes: Sizes
    flat: Any  # int64 array: those of Sizes.shapes one after another
    rows: list[int]  # the completion's number, in the order they are laid out
    num_scored: int


def lay_out(prompts: Sequence[Ids], completions: Sequence[Ids], largest_group: int, longest: int, step: int) -> Batch:
    """Completions and the prompt of each, laid out in one row with every prompt once. `longest` is at least a segment's.

    Groups may differ in number; token counts are filled up to multiples of `step`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    num_prompt, num_scored = sum(map(len, groups)), sum(map(len, completions))
    filling = FILLING if step > 1 else 1
    sizes = Sizes(
        num_completions=len(completions),
        num_groups=len(groups),
        largest_group=largest_group,
        prompt_tokens=-(-num_prompt // step) * step,
        scored_tokens=-(-num_scored // step) * step,
        longest=max(longest, 2 * step + filling),
        filling=filling,
    )
    lengths = {name: int(np.prod(shape)) for name, shape in sizes.shapes.items()}
    flat = np.zeros(sum(lengths.values()), np.int64)
    cuts = np.cumsum(list(lengths.values()))[:-1]
    part = dict(zip(lengths, np.split(flat, cuts), strict=True))  # views
    uses = part["uses"].reshape(sizes.shapes["uses"])

    at = key = scored = prompt_at = segment = 0  # how far the arrays are filled
    order = []

    def add(ids: Any, before: Any, first_position: int) -> None:
        nonlocal at, key, segment
        end, length = at + len(ids), len(before) + len(ids)
        part["ids"][at:end], part["positions"][at:end] = ids, np.arange(first_position, first_position + len(ids))
        part["keys"][key : key + length] = np.r_[before, np.arange(at, end)]
        part["own"][at:end] = np.arange(key + len(before), key + length)
        at, key, segment = end, key + length, segment + 1
        part["query_ends"][segment], part["key_ends"][segment] = at, key

    filling_from, filling_key = num_prompt + num_scored, num_prompt + num_scored
    filling_key += sum(len(prompt) * len(members) for prompt, members in groups.items())
    uses[:] = filling_key
    for prompt, members in groups.items():
        place = np.arange(at, at + len(prompt))
        part["prompts"][prompt_at : prompt_at + len(prompt)] = place
        add(prompt, place[:0], 0)
        for number, row in enumerate(members):
            completion, begin = completions[row], at
            uses[prompt_at : prompt_at + len(prompt), number] = np.arange(key, key + len(prompt))
            add(completion, place, len(prompt))
            part["sources"][scored : scored + len(completion)] = np.r_[place[-1], np.arange(begin, at - 1)]
            part["targets"][scored : scored + len(completion)] = completion
            scored += len(completion)
            order.append(row)
        prompt_at += len(prompt)
    # What fills up reads itself alone, and whatever has no place of its own points there, where all gradients are 0.
    assert (at, key) == (filling_from, filling_key)
    add(np.zeros(len(part["ids"]) - at, np.int64), part["ids"][:0], 0)
    part["keys"][key:] = part["prompts"][prompt_at:] = part["sources"][scored:] = filling_from
    return Batch(sizes=sizes, flat=flat, rows=order, num_scored=num_scored)


class GroupedScores:
    """Scores completions by a model with a LoRA adapter, whose attention and LoRA layers it replaces."""

    def __init__(self, model: Any, *, temperature: float, bf16: bool, largest_group: int, longest: int, capture: bool):
        """`longest` is the most tokens of prompt and completion. `capture` is for GPUs."""
        whole = model.get_base_model()
        use_packed_attention(whole)
        fuse(model)
        self.model, self.whole, self.temperature, self.bf16 = model, whole, temperature, bf16
        self.largest_group, self.longest = largest_group, longest
        self.device = next(model.parameters()).device
        self.step = STEP if capture else 1
        self.captured: dict[Any, _Captured] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        # By name: while an adapter is switched off, as for a reference's first scores, PEFT has its gradients off too.
        self.trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        self.gradient: Tensor | None = None  # all of them in one, which captured backwards add to
        self.parts: list[Tensor] = []  # of it, a parameter each
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)

    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids], width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities, with gradient, and entropies of completions' tokens: float32 [completions, width].

        Places after a completion's end are 0. Prompts are one a completion; the same ones are computed once.
        """
        batch = lay_out(prompts, completions, min(self.largest_group, len(prompts)), self.longest, self.step)
        if self.pool is None:
            log_probs, entropies = self.forward(batch.sizes, self._to_device(batch.flat), _ends(batch))
        else:
            log_probs, entropies = self._replay(batch)
        places = np.concatenate([row * width + np.arange(len(completions[row])) for row in batch.rows])
        where = self._to_device(places)
        shape = len(completions), width
        found = (
            values.new_zeros(shape[0] * shape[1]).index_copy(0, where, values[: batch.num_scored]).view(shape)
            for values in (log_probs, entropies)
        )
        return next(found), next(found)

    def _to_device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def forward(self, sizes: Sizes, flat: Tensor, ends: Any = ([], [])) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies) of what is laid out in `flat`, [scored tokens]."""
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        parts = flat.split([int(np.prod(shape)) for shape in sizes.shapes.values()])
        part = {name: one.view(shape) for (name, shape), one in zip(sizes.shapes.items(), parts, strict=True)}
        segments = Segments(
            keys=part["keys"],
            query_ends=part["query_ends"].to(torch.int32),
            key_ends=part["key_ends"].to(torch.int32),
            ends=ends,
            longest_query=sizes.longest,
            longest_key=sizes.longest,
            own=part["own"],
            prompts=part["prompts"],
            uses=part["uses"],
        )
        # No cache of casts: a captured one would be of weights as they were.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            hidden = self.whole.base_model(
                input_ids=part["ids"][None], position_ids=part["positions"][None], use_cache=False, segments=segments
            ).last_hidden_state[0]
            head = self.whole.get_output_embeddings()
            # TRL's own, which its trainers score by: the head a tile at a time.
            log_probs, entropies, *_ = _ChunkedLogProbFunction.apply(
                Rows.apply(hidden, part["sources"], True),  # a prompt's last token predicts each completion's first
                head.weight,
                head.bias,
                part["targets"],
                self.temperature,
                _CHUNKED_LOGPROB_CHUNK_SIZE,
                None,
                1.0,
                ("log_probs", "entropy"),
            )
        return log_probs, entropies.detach()

    # ---- captured
    def _replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with_gradient = torch.is_grad_enabled()
        adapted = not next(one.disable_adapters for one in self.model.modules() if hasattr(one, "disable_adapters"))
        key = (batch.sizes, with_gradient, adapted)
        if key not in self.captured:
            self.captured[key] = _Captured(self, batch, with_gradient)
        captured = self.captured[key]
        captured.flat.copy_(torch.from_numpy(batch.flat).pin_memory(), non_blocking=True)
        if not with_gradient:
            captured.forward.replay()
            return captured.log_probs, captured.entropies
        self.hold_gradients()
        found: tuple[Tensor, Tensor] = _Replay.apply(self.anchor, captured)
        return found

    def hold_gradients(self) -> Tensor:
        """One tensor that all gradients are views of; what Trainer has dropped starts again from 0."""
        if self.gradient is None:
            sizes = [one.numel() for one in self.trained]
            self.gradient = torch.zeros(sum(sizes), device=self.device)
            parts = zip(self.gradient.split(sizes), self.trained, strict=True)
            self.parts = [part.view(parameter.shape) for part, parameter in parts]
        if self.trained[0].grad is None:
            self.gradient.zero_()
            for parameter, part in zip(self.trained, self.parts, strict=True):
                parameter.grad = part
        return self.gradient


class _Captured:
    """The graphs of batches of one size: a forward, and a backward that adds to the gradients."""

    def __init__(self, scores: GroupedScores, batch: Batch, with_gradient: bool):
        self.flat = torch.from_numpy(batch.flat).to(scores.device)
        self.forward = torch.cuda.CUDAGraph()
        self.backward = torch.cuda.CUDAGraph() if with_gradient else None
        held = scores.hold_gradients() if with_gradient else None
        before = None if held is None else held.clone()

        def forward() -> None:
            self.log_probs, self.entropies = scores.forward(batch.sizes, self.flat)

        def backward() -> None:
            found = torch.autograd.grad(self.log_probs, scores.trained, self.incoming)
            torch._foreach_add_([one.grad for one in scores.trained], list(found))

        self.incoming = torch.zeros(batch.sizes.scored_tokens, device=scores.device)
        # Twice on another stream before, as capturing wants it: kernels are compiled and libraries set up.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
                if with_gradient:
                    backward()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.forward, pool=scores.pool):
            forward()
        if self.backward is not None:
            with torch.cuda.graph(self.backward, pool=scores.pool):
                backward()
        self.log_probs, self.entropies = self.log_probs.detach(), self.entropies.detach()
        if held is not None and before is not None:
            held.copy_(before)


class _Replay(torch.autograd.Function):
    """A captured forward, and its backward, which returns no gradients: it adds them where they are held."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: _Captured) -> tuple[Tensor, Tensor]:
        captured.forward.replay()
        ctx.captured = captured
        entropies = captured.entropies.clone()
        ctx.mark_non_differentiable(entropies)
        return captured.log_probs.clone(), entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[None, None]:
        ctx.captured.incoming.copy_(gradient)
        ctx.captured.backward.replay()
        return None, None


def _ends(batch: Batch) -> tuple[list[int], list[int]]:
    """Where segments end, on the host, for attention segment by segment."""
    sizes = batch.sizes.shapes
    start = sum(int(np.prod(sizes[name])) for name in ("ids", "positions", "keys"))
    num = sizes["query_ends"][0]
    return batch.flat[start : start + num].tolist(), batch.flat[start + num : start + 2 * num].tolist()
