"""LoRA (arXiv 2106.09685): of each matrix only the product of two thin ones is trained, and added to it.

kernel + ALPHA / rank * (a @ b),    a (inputs, rank) random,    b (rank, outputs) zeros at first
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

ALPHA = 16
Factors = Mapping[str, Mapping[str, jax.Array]]


def factors(params: Any, rank: int, seed: int = 0, frozen: str | None = None) -> Factors:
    """Gives the two matrices, by path, of every kernel (inputs, outputs) outside the part that stays as it is.

    Args:
        params: a pytree of arrays.
        rank: of the products.
        seed: of the random matrices.
        frozen: a key of the top level.

    Example:
        >>> found = factors({"body": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}, rank=2)
        >>> {path: sorted(pair) for path, pair in found.items()}
        {'body/kernel': ['a', 'b']}
    """
    found = {}
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(params)):
        name = _name(path)
        if "kernel" in name.split("/") and leaf.ndim == 2 and name.split("/")[0] != frozen:
            key = jax.random.fold_in(jax.random.key(seed), number)
            a = jax.random.normal(key, (leaf.shape[0], rank)) / leaf.shape[0] ** 0.5
            found[name] = {"a": a, "b": jnp.zeros((rank, leaf.shape[1]))}
    return found


def added(base: Any, factors: Factors) -> Any:
    """Gives the parameters with every product added to its kernel: a plain model again."""

    def one(path, leaf):
        pair = factors.get(_name(path))
        return leaf if pair is None else leaf + ALPHA / pair["a"].shape[1] * (pair["a"] @ pair["b"])

    return jax.tree.map_with_path(one, base)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
