"""Triton kernel of packed attention's backward: a prompt's keys have gradients from its own tokens and each completion."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _add_uses(out, gradient, prompts, uses, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    place = tl.load(prompts + number)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.load(out + place * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    for use in range(NUM):
        row = tl.load(uses + number * NUM + use)
        total += tl.load(gradient + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place * WIDTH + columns, total.to(out.dtype.element_ty), mask=inside)


def add_uses(out, gradient, prompts, uses):
    """To the rows `prompts` [P] of out [T, ...] add the rows `uses` [P, C] of gradient [K, ...], summed in float32.

    In a fixed order, so that the bits are the same each time. A row that stands in `prompts` twice has uses of gradient 0.
    """
    width = out[0].numel()
    _add_uses[(len(prompts),)](
        out, gradient, prompts, uses, NUM=uses.shape[1], WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4
    )
