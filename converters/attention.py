"""Attention as the families' modules compute it. This needs jax."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot products, the softmax in float32; also in float16, which jax.nn's attention does not do on a CPU.

    Args:
        q: `(batch, queries, heads, head)`.
        k: `(batch, keys, heads, head)`.
        v: as k.
        bias: `(heads, queries, keys)`, added before the softmax.
        mask: bool, broadcast to `(batch, heads, queries, keys)`: true where a query sees a key. One that sees none gets
            the mean of all, as in transformers.

    Returns:
        `(batch, queries, heads * head)`.

    Example:
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> attend(x, x, x).shape
        (1, 3, 8)
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)
