"""How a Flax tensor lies in PyTorch, so that groups, rows and random positions follow it there."""

from typing import Any, NamedTuple

from tadrop_jax.errors import MergeError


class Layout(NamedTuple):
    """How a Flax tensor lies in PyTorch: its name there, and the permutation of its axes into PyTorch order.

    An order of None leaves the axes as they are.
    """

    name: str
    order: tuple[int, ...] | None


def laid_out(layout, name: str, ndim: int) -> tuple[tuple[int, ...] | None, str]:
    """The permutation into PyTorch order (None: as it is), and the name that random numbers are drawn by."""
    given: Any = None if layout is None else layout(name) if callable(layout) else layout.get(name)
    if given is None:
        return None, name
    named = len(given) == 2 and isinstance(given[0], str)
    torch_name, order = given if named else (name, given)
    order = tuple(range(ndim)) if order is None else tuple(int(a) for a in order)
    if sorted(order) != list(range(ndim)):
        raise MergeError(f"layout of {name!r} must be a permutation of its {ndim} axes, got {order}")
    return (None if order == tuple(range(ndim)) else order), torch_name
