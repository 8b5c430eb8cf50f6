"""Per-task bundles: one unified vector, and for each task a mask of one bit an entry and one number."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax.errors import MergeError
from tadrop_jax.trees import named_leaves


def pack(masks: jax.Array) -> jax.Array:
    """``(T, *S)`` masks as uint8 ``(T, ceil(n/8))``: ``np.packbits`` of the row-major tensor, one row a task."""
    return jnp.packbits(jnp.reshape(masks, (masks.shape[0], -1)), axis=1)


def unpack(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`pack` for one task's row: bool array of shape S."""
    return jnp.reshape(jnp.unpackbits(bits, count=math.prod(shape)).astype(bool), shape)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "unified", "packed", "rescalers", "own"],
    meta_fields=["shapes", "tasks"],
)
@dataclasses.dataclass(frozen=True)
class EMRBundle:
    """What EMR-Merging leaves: enough to rebuild each task's model.

    Attributes:
      base: the pretrained parameters, or None if only task vectors were merged.
      unified: the unified vector, float32; None for tensors that come from the base or stay each task's own.
      packed: for each leaf the masks, uint8 ``(T, ceil(n/8))``, or None.
      rescalers: float32 ``(T,)``.
      own: for each task the tensors that stay its own, by name.
      shapes: for each leaf its shape, or None.
      tasks: names of the tasks.
    """

    base: Any
    unified: Any
    packed: tuple[Any, ...]
    rescalers: jax.Array
    own: tuple[dict[str, Any], ...] = ()
    shapes: tuple[Any, ...] = ()
    tasks: tuple[str, ...] = ()

    def _task(self, t) -> int:
        if isinstance(t, str):
            if t not in self.tasks:
                raise MergeError(f"the bundle has no task {t!r}; it has {', '.join(self.tasks) or 'no names'}")
            return self.tasks.index(t)
        count = self.rescalers.shape[0]
        if not -count <= t < count:
            raise MergeError(f"the bundle has {count} tasks, there is no task {t}")
        return t % count

    def mask(self, t):
        """The mask of task t (an index, or a name): a tree of bool; False where nothing was merged."""
        t = self._task(t)
        _, unified, treedef = named_leaves(self.unified)
        like = unified if self.base is None else named_leaves(self.base)[1]
        masks = [
            unpack(bits[t], shape) if bits is not None else (None if leaf is None else jnp.zeros(np.shape(leaf), bool))
            for bits, shape, leaf in zip(self.packed, self.shapes, like, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, masks)

    def task_vector(self, t):
        """``lambda_t * M_t * tau_uni``: float32; None where nothing was merged."""
        t = self._task(t)
        _, unified, treedef = named_leaves(self.unified)
        vectors = [
            None if leaf is None else jnp.where(unpack(bits[t], shape), leaf * self.rescalers[t], 0)
            for leaf, bits, shape in zip(unified, self.packed, self.shapes, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, vectors)

    def task_params(self, t):
        """The parameters of task t (an index, or a name): type and dtypes of the base.

        Raises:
          MergeError: if the bundle has no base, or no such task.
        """
        if self.base is None:
            raise MergeError("this bundle was made from task vectors and has no base: use task_vector(t)")
        t = self._task(t)
        names, leaves, treedef = named_leaves(self.base)
        _, vectors, _ = named_leaves(self.task_vector(t))
        own = self.own[t] if self.own else {}
        out = []
        for name, leaf, vector in zip(names, leaves, vectors, strict=True):
            if vector is not None:
                out.append((jnp.asarray(leaf).astype(jnp.float32) + vector).astype(leaf.dtype))
            else:
                out.append(own.get(name, leaf))
        return jax.tree_util.tree_unflatten(treedef, out)

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds, the base included."""
        return sum(np.asarray(leaf).nbytes if np.isscalar(leaf) else leaf.nbytes for leaf in jax.tree.leaves(self))

    def save(self, path, format: str = "safetensors") -> None:
        """Writes the bundle to a new directory; see :func:`tadrop_jax.checkpoints.bundles.save`."""
        from tadrop_jax.checkpoints import bundles

        bundles.save(self, path, format)

    @classmethod
    def load(cls, path, like=None) -> "EMRBundle":
        """Reads a bundle; see :func:`tadrop_jax.checkpoints.bundles.load`."""
        from tadrop_jax.checkpoints import bundles

        return bundles.load(path, like)
