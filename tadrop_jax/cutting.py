"""How the streamed executor cuts a tensor: into flat blocks, blocks of whole rows or slices, or not at all."""

import math
from collections.abc import Sequence

from tadrop_jax.steps import Step

# Of up to 8 tasks; more have blocks of a half, a quarter, ..., so that memory does not go with their number.
BLOCK = 1 << 17
SMALL = 1 << 13


def part_of(shape: tuple[int, ...], steps: Sequence[Step]) -> tuple[int, ...] | None:
    """What the blocks of a tensor are made of, for these steps: rows, slices or all of it; None if any entries will do.

    Args:
      shape: S, in PyTorch order.
      steps: those that are for the tensor.
    """
    pieces = {s.piece for s in steps} | {g.scope for s in steps for g in s.stages if g.scope == "row"}
    if not pieces & {"row", "slice", "tensor"}:
        return None
    if "tensor" in pieces or not shape:
        return shape
    return shape[1:] if "slice" in pieces and len(shape) > 1 else shape[-1:]


def widths(size: int, part: tuple[int, ...] | None, group: int, tasks: int) -> tuple[int, int]:
    """Entries of a block of a tensor of this size: if the first are enough for all of it, and else.

    Args:
      size: entries of the tensor.
      part: see :func:`part_of`.
      group: a block is a multiple of so many entries.
      tasks: T.
    """
    row = math.prod(part or ()) or 1
    # Packed masks want starts at multiples of 8.
    unit = min(math.lcm(8, group, row), max(size, 8))
    block = BLOCK >> max(math.ceil(math.log2((tasks + 1) / 9)), 0)
    return max(min(SMALL, block) // row, 1) * row, max(block // unit, 1) * unit
