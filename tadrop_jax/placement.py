"""Where tensors lie on a mesh, and which steps run on a device's part of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tadrop_jax.errors import MergeError
from tadrop_jax.steps import Step
from tadrop_jax.trees import is_traced, named_leaves

AnyMesh = Mesh | AbstractMesh


def sharding_of(leaf) -> NamedSharding | None:
    """How an array is spread over several devices, or None.

    A traced array tells on a mesh of ``AxisType.Explicit`` axes. On other meshes it is decided after tracing.
    """
    found: Any = jax.typeof(leaf).sharding if is_traced(leaf) else getattr(leaf, "sharding", None)
    if is_traced(leaf):
        known = all(t == AxisType.Explicit for t in found.mesh.axis_types)
    else:
        known = isinstance(found, NamedSharding)
    return found if known and found.mesh.size > 1 else None


def entries_of(sharding: NamedSharding, ndim: int) -> tuple:
    """The mesh axes of each axis of an array: None, a name, or a tuple of names."""
    return (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))


def without_first_axis(sharding: NamedSharding) -> NamedSharding:
    """How one task's tensor lies, of a stack."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def axis_names(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that a spec names, in order."""
    names: list[str] = []
    for entry in spec:
        names += [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
    return tuple(names)


def place(leaf, to: NamedSharding):
    """Brings an array to a sharding, inside ``jit`` too."""
    if is_traced(leaf) and AxisType.Explicit in to.mesh.axis_types:
        return jax.sharding.reshard(leaf, to)
    return jax.device_put(leaf, to)


def devices_of(leaf) -> frozenset | None:
    """The devices that a concrete array lies on; None of what is traced, or no array of JAX."""
    return frozenset(leaf.devices()) if isinstance(leaf, jax.Array) and not is_traced(leaf) else None


def apart(tree) -> bool:
    """Whether the concrete arrays of a tree lie on different sets of devices: then no computation takes them all."""
    return len({devices_of(leaf) for leaf in jax.tree.leaves(tree)} - {None}) > 1


def together(leaf, others) -> tuple:
    """Others brought to where an array lies, if not all of them lie on the same devices."""
    if not apart((leaf, others)):
        return tuple(others)
    to = next(a for a in (leaf, *others) if isinstance(a, jax.Array)).sharding
    return tuple(jax.device_put(other, to) for other in others)


def gathered(leaf, mesh: AnyMesh):
    """Brings all of an array to every device."""
    return place(leaf, NamedSharding(mesh, PartitionSpec(*(None,) * leaf.ndim)))


def is_local(step: Step, shape: Sequence[int], order: Sequence[int] | None, mesh: AnyMesh, spec: PartitionSpec) -> bool:
    """Whether a step may run on each device's part of a tensor by itself, its sums and counts aside.

    In PyTorch order let the tensor have the shape ``s``, and each device ``l[a]`` of the ``s[a]`` entries along axis a.

    - ``piece="any"``: always. ``"tensor"``: never.
    - ``"row"``: if the last axis is not split, so that a device holds whole rows. ``"slice"``: if none but the first
      is.
    - ``"group"`` of m: let b be the last axis that is split. A part is a number of runs of ``L = l[b] * s[b + 1] *
      ...`` neighbours in the row-major tensor, and each run starts at a multiple of L; a run ends where the neighbour
      lies on another device. So the groups lie on one device each, and are the groups of the part, exactly if m
      divides L. A tensor that is not split has one run, in which a last, shorter group is allowed.
    - A stage of scope ``"row"`` reduces the last axis as the tensor lies: that axis must not be split, and be the last
      in PyTorch order too.

    Args:
      step: a step.
      shape: S.
      order: permutation of the axes into PyTorch order, or None.
      mesh: the mesh.
      spec: how S lies on it.
    """
    axes = tuple(order or range(len(shape)))
    parts = [math.prod(mesh.shape[name] for name in axis_names(PartitionSpec(spec[a]))) for a in axes]
    rows = not parts or parts[-1] == 1
    if any(stage.scope == "row" for stage in step.stages) and not (rows and axes == tuple(range(len(shape)))):
        return False
    whole = {"row": rows, "slice": all(many == 1 for many in parts[1:] or parts), "tensor": False}
    if not whole.get(step.piece, True):
        return False
    split = [a for a, many in enumerate(parts) if many > 1]
    if step.group == 1 or not split:
        return True
    run = math.prod(shape[a] for a in axes[split[-1] :]) // parts[split[-1]]
    return run % step.group == 0


def shardings_by_name(tree, tensors: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The shardings over several devices of a tree of them, by the names of their tensors.

    Raises:
      MergeError: naming the tensor, if there is none of that name, or it does not fit its sharding.
    """
    names, leaves, _ = named_leaves(tree)
    found = {}
    for name, sharding in zip(names, leaves, strict=True):
        if name not in tensors:
            raise MergeError(f"shardings has {name!r}, which is not there")
        if sharding is None or isinstance(sharding, SingleDeviceSharding):
            continue
        if not isinstance(sharding, NamedSharding):
            raise MergeError(f"shardings: {name!r} must have a NamedSharding or None, got {type(sharding).__name__}")
        try:
            sharding.shard_shape(np.shape(tensors[name]))
        except (ValueError, IndexError):
            shape = list(np.shape(tensors[name]))
            raise MergeError(f"shardings: tensor {name!r} of shape {shape} cannot lie as {sharding.spec}") from None
        if sharding.mesh.size > 1:
            found[name] = sharding
    return found
