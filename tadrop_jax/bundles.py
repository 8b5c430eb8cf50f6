"""Per-task bundles: what a per-task rule leaves, from which each task's parameters are rebuilt."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tadrop_jax.errors import MergeError
from tadrop_jax.kinds import Kind
from tadrop_jax.placement import axis_names, entries_of, gathered, place, sharding_of, without_first_axis
from tadrop_jax.trees import as_dtype_of, is_traced, named_leaves


def pack(masks: jax.Array, lies: NamedSharding | None = None) -> jax.Array:
    """``(T, *S)`` masks as uint8 ``(T, ceil(n/8))``: ``np.packbits`` of the row-major tensor, one row a task.

    Of masks that are spread over devices by their first axis each device packs and keeps its part. For other axes the
    bits of this one tensor are brought together (not the masks, where the last axis divides into whole bytes), and are
    spread again where they divide evenly.

    Args:
      masks: of T tasks.
      lies: how the tensor S lies, where traced masks do not tell.
    """
    tasks, shape = masks.shape[0], masks.shape[1:]
    told = sharding_of(masks)
    lies = lies if told is None else without_first_axis(told)
    if lies is None:
        return _flat_bits(masks)
    spec = PartitionSpec(None, *entries_of(lies, len(shape)))
    names = axis_names(spec)
    spread = PartitionSpec(None, names)
    if _by_first_axis(shape, spec[1:], lies.mesh):
        return _on_each(_flat_bits, lies.mesh, spec, spread)(masks)
    if shape and lies.shard_shape(shape)[-1] % 8 == 0:
        masks = _on_each(functools.partial(jnp.packbits, axis=-1), lies.mesh, spec, spec)(masks)
        bits = jnp.reshape(gathered(masks, lies.mesh), (tasks, -1))
    else:
        bits = _flat_bits(gathered(masks, lies.mesh))
    even = bits.shape[1] % math.prod(lies.mesh.shape[name] for name in names) == 0
    return place(bits, NamedSharding(lies.mesh, spread)) if even else bits


def unpack(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`pack` for one task's row: bool array of shape S, spread by its first axis if bits are."""
    lies = sharding_of(bits)
    if lies is not None:
        spec = PartitionSpec(*entries_of(lies, 1))
        if _by_first_axis(shape, (*spec, *(None,) * (len(shape) - 1)), lies.mesh):
            parts = math.prod(lies.mesh.shape[name] for name in axis_names(spec))
            part = (shape[0] // parts, *shape[1:])
            return _on_each(functools.partial(unpack, shape=part), lies.mesh, spec, spec)(bits)
        bits = gathered(bits, lies.mesh)
    return jnp.reshape(jnp.unpackbits(bits, count=math.prod(shape)).astype(bool), shape)


def _flat_bits(masks):
    return jnp.packbits(jnp.reshape(masks, (masks.shape[0], -1)), axis=1)


def _beside(value, *others):
    """Brings an array to where the first of others of its shape that is spread over devices lies."""
    where = [sharding_of(o) for o in others if np.shape(o) == np.shape(value)]
    to = next((lies for lies in where if lies is not None), None)
    return value if to is None else place(value, to)


def _on_each(fn, mesh, given: PartitionSpec, found: PartitionSpec):
    """A function of each device's part."""
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=given, out_specs=found, check_vma=False))


def _by_first_axis(shape, entries, mesh) -> bool:
    """Whether the first axis is split alone, into parts that are whole bytes of the row-major tensor."""
    if not shape or entries[0] is None or any(entry is not None for entry in entries[1:]):
        return False
    parts = math.prod(mesh.shape[name] for name in axis_names(PartitionSpec(entries[0])))
    return shape[0] % parts == 0 and (math.prod(shape) // parts) % 8 == 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "parts", "scalars", "own"],
    meta_fields=["kind", "treedef", "shapes", "tasks"],
)
@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a per-task rule leaves: enough to rebuild each task's model. A pytree.

    Attributes:
      base: the pretrained parameters, or None if only task vectors were merged.
      parts: for each leaf its parts by name, as its kind says (bits packed), or None for tensors that come from the
        base or stay each task's own.
      scalars: by name the float32 ``(T,)`` that hold for the whole tree.
      own: for each task the tensors that stay its own, by name.
      kind: what the parts are, and how a task vector is rebuilt from them.
      treedef: of the base (with None as a leaf).
      shapes: for each leaf its shape, or None.
      tasks: names of the tasks.
    """

    base: Any
    parts: tuple[dict[str, Any] | None, ...]
    scalars: dict[str, jax.Array]
    own: tuple[dict[str, Any], ...]
    kind: Kind
    treedef: Any
    shapes: tuple[tuple[int, ...] | None, ...]
    tasks: tuple[str, ...]

    @property
    def unified(self):
        """EMR and TALL: the vector that all tasks share, a tree of float32, None where nothing was merged."""
        return self._tree(self._column("unified"))

    @property
    def rescalers(self) -> jax.Array:
        """EMR and TALL: float32 ``(T,)``, what multiplies the unified vector for each task."""
        if "rescalers" not in self.scalars:
            raise AttributeError(f"a bundle of {self.kind.name} has no rescalers")
        return self.scalars["rescalers"]

    @property
    def packed(self) -> tuple[Any, ...]:
        """For each leaf the masks, uint8 ``(T, ceil(n/8))``, or None."""
        return tuple(self._column("masks"))

    def mask(self, t):
        """The mask of task t (an index, also a traced one, or a name): a tree of bool; False where nothing was merged.

        Raises:
          AttributeError: if this kind of bundle has no masks.
          MergeError: if there is no such task.
        """
        t = self._task(t)
        base = [None] * len(self.shapes) if self.base is None else named_leaves(self.base)[1]
        masks = []
        for bits, shape, leaf in zip(self._column("masks"), self.shapes, base, strict=True):
            if bits is None or shape is None:
                masks.append(None if leaf is None else jnp.zeros(np.shape(leaf), bool))
            else:
                masks.append(unpack(_row(bits, t), shape))
        return self._tree(masks)

    def task_vector(self, t):
        """What is added to the base for task t (an index, also a traced one, or a name): float32.

        It is None where nothing was merged. In a bundle that was made from task vectors, what stays each task's own is
        its task vector.

        Raises:
          MergeError: if there is no such task.
        """
        t = self._task(t)
        scalars = {name: _row(values, t) for name, values in self.scalars.items()}
        own = self._own(t) if self.base is None else {}
        return self._tree(
            own.get(name) if parts is None else self.kind.rebuild(jnp, self._of_task(parts, shape, t), scalars)
            for name, parts, shape in zip(self._names(), self.parts, self.shapes, strict=True)
        )

    def task_params(self, t):
        """The parameters of task t (an index, also a traced one, or a name): type and dtypes of the base.

        Raises:
          MergeError: if the bundle has no base, or no such task (a traced index is not looked at), or if tensors that
            stay each task's own are not alike and the index is traced.
        """
        if self.base is None:
            raise MergeError("this bundle was made from task vectors and has no base: use task_vector(t)")
        t = self._task(t)
        names, leaves, treedef = named_leaves(self.base)
        _, vectors, _ = named_leaves(self.task_vector(t))
        own = self._own(t)
        out = []
        for name, leaf, vector in zip(names, leaves, vectors, strict=True):
            if vector is not None:
                ours = jnp.asarray(leaf)
                value = (ours.astype(jnp.float32) + _beside(vector, leaf)).astype(ours.dtype)
                out.append(as_dtype_of(leaf, value))
            else:
                out.append(own.get(name, leaf))
        return jax.tree_util.tree_unflatten(treedef, out)

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds, the base included."""
        return _nbytes(self)

    def size_report(self) -> dict[str, Any]:
        """How large the bundle is, part by part, against T full models.

        Returns:
          ``bundle_bytes`` (:attr:`nbytes`), ``full_models_bytes`` (T models in the base's dtypes, or T float32 task
          vectors if there is no base), and ``parts_bytes``: what base, each part, scalars and own tensors take.
        """
        names = [] if self.base is None else named_leaves(self.base)[0]
        leaves = [] if self.base is None else named_leaves(self.base)[1]
        own = set().union(*self.own) if self.own else set()
        shared = sum(_nbytes(leaf) for name, leaf in zip(names, leaves, strict=True) if name not in own)
        if self.base is None:
            shared = sum(4 * math.prod(shape) for shape in self.shapes if shape is not None)
        sizes = {"base": _nbytes(self.base)}
        for parts in self.parts:
            for name, value in (parts or {}).items():
                sizes[name] = sizes.get(name, 0) + _nbytes(value)
        sizes |= {"scalars": _nbytes(self.scalars), "own": _nbytes(self.own)}
        full = len(self.tasks) * shared + _nbytes(self.own)
        return {"bundle_bytes": self.nbytes, "full_models_bytes": full, "parts_bytes": sizes}

    def save(self, path, format: str = "safetensors") -> None:
        """Writes the bundle to a new directory; see :func:`tadrop_jax.checkpoints.bundles.save`."""
        from tadrop_jax.checkpoints import bundles

        bundles.save(self, path, format)

    @classmethod
    def load(cls, path, like=None, kind: Kind | None = None) -> "Bundle":
        """Reads a bundle; see :func:`tadrop_jax.checkpoints.bundles.load`."""
        from tadrop_jax.checkpoints import bundles

        return bundles.load(path, like, kind)

    def _task(self, t):
        """An index from 0, or a traced one."""
        if isinstance(t, str):
            if t not in self.tasks:
                raise MergeError(f"the bundle has no task {t!r}; it has {', '.join(self.tasks)}")
            return self.tasks.index(t)
        if is_traced(t):
            if t.ndim or not jnp.issubdtype(t.dtype, jnp.integer):
                raise MergeError(f"a task is a whole number or a name, got {t.aval}")
            return t
        count = len(self.tasks)
        if not -count <= t < count:
            raise MergeError(f"the bundle has {count} tasks, there is no task {t}")
        return t % count

    def _own(self, t) -> Mapping[str, Any]:
        """The tensors that stay the own of task t, by name."""
        if not self.own or not is_traced(t):
            return self.own[t] if self.own else {}
        found = {}
        for name in dict.fromkeys(name for own in self.own for name in own):
            values: list[Any] = [own.get(name) for own in self.own]
            if len({None if v is None else (np.shape(v), jnp.result_type(v)) for v in values}) > 1:
                raise MergeError(f"tensor {name!r} is not alike in all tasks: their index cannot be traced")
            found[name] = jnp.stack(values)[t]
        return found

    def _of_task(self, parts, shape, t) -> dict[str, Any]:
        found = {}
        for name, part in self.kind.parts(shape, len(self.tasks)).items():
            row = parts[name] if part.over == "entries" else _row(parts[name], t)
            found[name] = unpack(row, shape) if part.dtype == "bits" else row.astype(jnp.float32)
        return {name: _beside(value, *found.values()) for name, value in found.items()}

    def _column(self, part: str) -> list[Any]:
        if not any(part in parts for parts in self.parts if parts is not None):
            raise AttributeError(f"a bundle of {self.kind.name} has no {part}")
        return [None if parts is None else parts.get(part) for parts in self.parts]

    def _names(self) -> list[str]:
        return named_leaves(self._tree(range(len(self.parts))))[0]

    def _tree(self, leaves):
        return jax.tree_util.tree_unflatten(self.treedef, list(leaves))


# The name that the class had when EMR was the only per-task rule.
EMRBundle = Bundle


def _row(values, t):
    """One task's row; arrays of NumPy take no traced index."""
    return (jnp.asarray(values) if is_traced(t) else values)[t]


def _nbytes(tree) -> int:
    def one(leaf) -> int:
        if np.isscalar(leaf):
            return np.asarray(leaf).nbytes
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)  # of a bundle that jax.eval_shape made
        return math.prod(leaf.shape) * leaf.dtype.itemsize if abstract else leaf.nbytes

    return sum(map(one, jax.tree.leaves(tree)))
