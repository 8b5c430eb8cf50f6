"""Names of the leaves of any pytree, alike in all containers, and selection by them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tadrop_jax.errors import MergeError, ParameterError


def path_name(path) -> str:
    """The name of a leaf: its keys joined by '/', without nnx's trailing ``value`` and a leading ``params``.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"params": {"Dense_0": {"kernel": 1.0}}})
      >>> path_name(path)
      'Dense_0/kernel'
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        name = name.removesuffix("/value").removesuffix("value")
    return name.removeprefix("params/")


def named_leaves(tree) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and tree definition; None is a leaf, so that stacks with holes keep their shape.

    Raises:
      MergeError: if two leaves have one name, as ``params/w`` and ``w``.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    names = [path_name(path) for path, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise MergeError(f"two tensors of one tree have the name {twice!r}")
    return names, [leaf for _, leaf in pairs], treedef


def tied(leaves: Iterable[tuple]) -> list[int]:
    """For each tuple of leaves the number of the first of the same objects: weights that are tied are merged once."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(map(id, some)), k) for k, some in enumerate(leaves)]


def is_traced(tree) -> bool:
    """Whether a tree holds values that are being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def is_mergeable(leaf) -> bool:
    """Whether a leaf is a float tensor. Integer and boolean tensors and random keys come from the base.

    Raises:
      MergeError: for complex tensors, whose order is not defined, and for arrays of other libraries.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, float):
        return True
    if dtype is None:
        return False
    try:
        number = jnp.issubdtype(dtype, np.number)
    except TypeError:
        raise MergeError(
            f"parameters are arrays of JAX or NumPy, got {type(leaf).__module__}.{type(leaf).__qualname__} "
            "(converters.load reads PyTorch checkpoints)"
        ) from None
    if not number:
        return False
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise MergeError(f"complex tensors cannot be merged (shape {leaf.shape}, dtype {dtype})")
    return jnp.issubdtype(dtype, jnp.floating)


def check_dtype(name: str, leaf) -> None:
    """Refuses NumPy's floats that JAX does not have: of another byte order, or longer than 64 bits.

    Raises:
      MergeError: naming the tensor and its dtype.
    """
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind == "f" and not (dtype.isnative and dtype.itemsize <= 8):
        raise MergeError(f"tensor {name!r} is {dtype}, a dtype that JAX does not have: give it as float32")


def as_dtype_of(leaf, value):
    """The base's dtype, also float64 where JAX has none."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or dtype == value.dtype:
        return value
    return (value if jax.dtypes.canonicalize_dtype(dtype) == dtype else np.asarray(value)).astype(dtype)


def selected(name: str, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> bool:
    """Whether regular expressions select a name: none to include means all; exclude beats include."""
    include = tuple(include)
    if any(re.search(p, name) for p in exclude):
        return False
    return not include or any(re.search(p, name) for p in include)


def selected_tied(names: Iterable[str], include: Iterable[str] = (), exclude: Iterable[str] = ()) -> bool:
    """The same of one tensor with several names, since it is tied: what matches one of them matches the tensor."""
    names = tuple(names)
    return all(selected(n, (), exclude) for n in names) and any(selected(n, include) for n in names)


def copies_of(name: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """The further names of a tensor, of a table from such names to the one that stands for them."""
    return tuple(alias for alias, first in aliases.items() if first == name)


def check_pattern(pattern: str) -> None:
    """Refuses what is no regular expression.

    Raises:
      ParameterError: with the pattern, and what is wrong with it.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ParameterError(f"{pattern!r} is not a regular expression: {error}") from None


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuses a regular expression that matches no tensor: most likely a misspelt name.

    Raises:
      ParameterError: with the pattern and the first names there are.
    """
    names = list(names)
    for pattern in patterns:
        check_pattern(pattern)
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ParameterError(f"the pattern {pattern!r} matches none of the {len(names)} tensors ({some})")
