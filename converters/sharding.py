"""How a family's module lies on a mesh: partition specs by path, from the `SHARDING` rules of its package."""

import re
from collections.abc import Sequence
from typing import Any

from converters.errors import ConversionError
from converters.mapping import flatten

Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def partition_specs(tree: Any, rules: Rules, mesh: Any = None) -> dict[str, Any]:
    """Gives each parameter's `jax.sharding.PartitionSpec` by its path.

    The first rule whose pattern is found at the end of the path decides, counted from the last axis; a parameter that
    no rule fits is on every device.

    Args:
        tree: a module, or its parameters in any tree of arrays or shapes.
        rules: (pattern of a path's end, mesh axis or None for each of the last axes), as `SHARDING` of a family.
        mesh: a `jax.sharding.Mesh`. Axes that it does not have, and those whose size does not divide the parameter's,
            are then left out.

    Returns:
        A dictionary from '/'-joined path to PartitionSpec.

    Example:
        >>> import numpy as np
        >>> tuple(partition_specs({"fc": {"kernel": np.ones((4, 6))}}, [("kernel", (None, "model"))])["fc/kernel"])
        (None, 'model')
    """
    return {path: _spec(path, leaf.shape, rules, mesh) for path, leaf in flatten(tree).items()}


def shard(module: Any, mesh: Any, rules: Rules | None = None) -> Any:
    """Puts a module's parameters on a mesh. What is then computed with it, or merged with its likes, runs there.

    Args:
        module: an NNX module of one of the families.
        mesh: a `jax.sharding.Mesh`, best with axes "data" and "model".
        rules: as in `partition_specs`; None takes `SHARDING` of the module's family.

    Returns:
        A module of the same class with sharded parameters; the given one is as it was.

    Raises:
        ConversionError: the module is of no family, or of one without rules.

    Example:
        >>> mesh = jax.make_mesh((2, 4), ("data", "model"))  # doctest: +SKIP
        >>> module = shard(converters.load("models/my-gpt2")[0], mesh)  # doctest: +SKIP
    """
    import jax
    from flax import nnx

    if rules is None:
        rules = _own_rules(module)
    graph, state = nnx.split(module)
    specs = iter(partition_specs(state, rules, mesh).values())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, next(specs))), state)
    return nnx.merge(graph, placed)


def _own_rules(module: Any) -> Rules:
    from converters import families

    entry = families.architecture_of(module)
    rules = getattr(families.package_of(entry), "SHARDING", None)
    if rules is None:
        raise ConversionError(f"{entry.package} has no sharding rules; pass rules=")
    return rules


def _spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Any) -> Any:
    from jax.sharding import PartitionSpec

    names = next((names for pattern, names in rules if re.search(rf"(^|/)({pattern})$", path)), ())
    names = (None,) * (len(shape) - len(names)) + tuple(names)
    if mesh is not None:
        sizes = dict(mesh.shape)
        names = tuple(
            name if name in sizes and size % sizes[name] == 0 else None for name, size in zip(names, shape, strict=True)
        )
    while names and names[-1] is None:  # as jax itself writes a spec
        names = names[:-1]
    return PartitionSpec(*names)
