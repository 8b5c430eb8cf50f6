"""What a per-task bundle is made of, as data: its parts, and how a task vector is rebuilt from them.

A per-task rule gives, in place of one merged vector, the *parts* of a bundle. Its :class:`Kind` says which parts a
tensor has, how they lie over entries and tasks, and what rebuilds a task vector; the executors, the bundle in memory
and the one on disk all read it, so that a new kind touches no other file than its method's.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from tadrop_jax.errors import CheckpointError


class Part(NamedTuple):
    """One part of one tensor.

    Attributes:
      shape: of the whole part: S, or with a leading task axis.
      over: ``"entries"`` (S, what all tasks share), ``"tasks and entries"`` (``(T, *S)``), or ``"tasks"``
        (``(T, ...)``, small and not cut into blocks).
      dtype: ``"values"`` (float32, or the dtype that a merge is asked for), ``"float32"``, or ``"bits"``: bool from
        the rule, kept as ``np.packbits`` of the row-major tensor, one row a task.
    """

    shape: tuple[int, ...]
    over: Literal["entries", "tasks and entries", "tasks"]
    dtype: Literal["values", "float32", "bits"] = "values"

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape as it is kept: bits are packed."""
        return (self.shape[0], -(-math.prod(self.shape[1:]) // 8)) if self.dtype == "bits" else self.shape


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of per-task bundle. Two kinds of one name are one.

    Attributes:
      name: the method's name, by which a bundle on disk finds its kind again.
      parts: ``(shape, tasks) -> {name: Part}``: what a tensor of this shape has.
      rebuild: ``(xp, parts, scalars) -> task vector``, float32: ``xp`` is ``numpy`` or ``jax.numpy``, ``parts`` and
        ``scalars`` are those of one task: for ``"entries"`` and ``"tasks and entries"`` the shape S, or a block of the
        flattened tensor (bits as bool); for ``"tasks"`` the task's row.
      scalars: names of the numbers ``(T,)`` that hold for the whole tree.
      elementwise: whether ``rebuild`` takes any block of a tensor.
    """

    name: str
    parts: Callable[[tuple[int, ...], int], Mapping[str, Part]] = dataclasses.field(compare=False)
    rebuild: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Any] = dataclasses.field(compare=False)
    scalars: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    elementwise: bool = dataclasses.field(default=True, compare=False)


def masked_vector(name: str) -> Kind:
    """One vector for all tasks, for each task a mask of one bit an entry and one number: EMR and TALL."""

    def parts(shape, tasks):
        return {"unified": Part(shape, "entries"), "masks": Part((tasks, *shape), "tasks and entries", "bits")}

    def rebuild(xp, parts, scalars):
        return xp.where(parts["masks"], parts["unified"] * scalars["rescalers"], np.float32(0))

    return Kind(name, parts, rebuild, scalars=("rescalers",))


def kind_of(method: str) -> Kind:
    """The kind of bundle that a method of the registry leaves: ``KIND`` in the method's file.

    Raises:
      CheckpointError: if there is no such method, or it leaves no bundle.
    """
    from tadrop_jax import registry

    found = registry.METHODS.get(method)
    module = None if found is None else importlib.import_module(found.home.partition(":")[0])
    if not hasattr(module, "KIND"):
        known = ", ".join(m.name for m in registry.METHODS.values() if m.output == "one model per task")
        raise CheckpointError(f"there is no bundle of method {method!r} (there are {known})")
    return module.KIND  # type: ignore[union-attr]
