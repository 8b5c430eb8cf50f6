"""Which steps may run on a device's part of a tensor."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tadrop_jax as tj
from tadrop_jax import placement


def groups_lie_together(shape, order, lengths, m: int) -> bool:
    """Whether each device's groups of m, in its own row-major part, are groups of the row-major tensor."""
    positions = np.arange(math.prod(shape)).reshape([shape[a] for a in order])
    where = np.indices(positions.shape).reshape(len(order), -1)
    device = [tuple(index[i] // lengths[a] for i, a in enumerate(order)) for index in where.T]
    parts: dict = {}
    for position, owner in zip(positions.ravel(), device, strict=True):
        parts.setdefault(owner, []).append(position)
    for part in parts.values():
        for start in range(0, len(part), m):
            group = part[start : start + m]
            whole = np.arange(group[0], min(group[0] + m, positions.size))
            if group[0] % m or not np.array_equal(group, whole):
                return False
    return True


@pytest.mark.parametrize("shape", [(8, 4, 6), (4, 12, 2), (16,)])
def test_where_groups_and_rows_are_local(shape):
    """Against the groups written out, for all ways in which two mesh axes can split a tensor."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    ndim, seen = len(shape), set()
    axes = [None, *range(ndim)]
    for a in axes:
        for b in axes:
            names = [tuple(n for n, at in (("a", a), ("b", b)) if at == axis) or None for axis in range(ndim)]
            spec = PartitionSpec(*names)
            try:
                lengths = NamedSharding(mesh, spec).shard_shape(shape)
            except ValueError:
                continue
            for order in (tuple(range(ndim)), tuple(reversed(range(ndim)))):
                for m in (1, 2, 3, 4, 5, 8, 12):
                    step = tj.Step(apply=lambda x, c: x.stack, piece="group", group=m)
                    found = placement.is_local(step, shape, order, mesh, spec)
                    assert found == groups_lie_together(shape, order, lengths, m), (spec, order, m)
                    seen.add(found)
                step = tj.Step(apply=lambda x, c: x.stack, piece="row")
                whole = lengths[order[-1]] == shape[order[-1]]
                assert placement.is_local(step, shape, order, mesh, spec) == whole
                step = tj.Step(apply=lambda x, c: x.stack, piece="slice")
                whole = all(lengths[a] == shape[a] for a in order[1:] or order)
                assert placement.is_local(step, shape, order, mesh, spec) == whole
    assert seen == {True, False}
