"""Mixed precision: matrix products of bfloat16 operands, everything else float32.

Twice as fast on a processor with matrix units for bfloat16 (Intel's AMX); on others it may be slower, and XLA's CPU
backend does not have these products in all shapes there.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def mixed(module: Any) -> Any:
    """Lets the module's linear layers multiply in mixed precision, forwards and backwards; gives the module."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Linear):
            layer.dot_general = _dot_general
    return module


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` for x (..., K) and kernel (K, N), float32; operands are rounded to bfloat16, sums are float32.

    XLA differentiates such a product into products with a bfloat16 result, which its CPU backend has no fast kernel
    for: that is why the derivative is written out.

    Example:
        >>> product(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
        (2, 3, 5)
    """
    return _product(_rounded(x), _rounded(kernel), (x.ndim - 1,), (0,))


def _forwards(x: jax.Array, kernel: jax.Array):
    rounded = _rounded(x), _rounded(kernel)
    return _product(*rounded, (x.ndim - 1,), (0,)), rounded


def _backwards(rounded: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, kernel = rounded
    gradient = _rounded(gradient)
    rows = tuple(range(x.ndim - 1))
    return _product(gradient, kernel, (x.ndim - 1,), (1,)), _product(x, gradient, rows, rows)


product.defvjp(_forwards, _backwards)


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array, over_a: Sequence[int], over_b: Sequence[int]) -> jax.Array:
    return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """Takes the place of `jax.lax.dot_general` in `nnx.Linear`: the last axis of x meets the first of the kernel."""
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions
    return product(x, kernel)
