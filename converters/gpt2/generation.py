"""Text generation with GPT-2: greedy or by drawing, one compiled loop over a key-value cache."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.gpt2.model import GPT2LMHeadModel, empty_cache


class _Static(NamedTuple):
    """What the loop is compiled for."""

    new_tokens: int
    draw: bool
    top_k: int | None
    eos: tuple[int, ...]
    pad: int


def generate(
    model: GPT2LMHeadModel,
    input_ids: Any,
    *,
    max_new_tokens: int,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> jax.Array:
    """Continues token sequences.

    Args:
        model: the language model.
        input_ids: integers (batch, tokens); shorter sequences are padded on the left.
        max_new_tokens: how many tokens to add, at least 1.
        attention_mask: (batch, tokens), zero at the padding; None where there is none.
        temperature: 0 takes the most likely token each time. Above 0 draws, from logits that are divided by it.
        top_k: draws from this many most likely tokens (and those as likely as the last of them).
        top_p: draws from the fewest most likely tokens whose probabilities sum to this or more, in (0, 1].
        key: `jax.random.key`, needed for drawing.
        eos_token_id: one or several tokens that end a sequence; None takes the configuration's, () none.
        pad_token_id: stands after the end; None takes the configuration's, or else the first of `eos_token_id`.

    Returns:
        Integers (batch, tokens + max_new_tokens): the given tokens, then the new ones. It computes no further
        than the step in which the last sequence ends.

    Raises:
        ValueError: an argument out of its range; padding on the right; more tokens than the model has positions.

    Example:
        >>> from converters.gpt2.config import GPT2Config
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
        >>> model = GPT2LMHeadModel(config, rngs=nnx.Rngs(0))
        >>> generate(model, jnp.array([[3, 1, 4]]), max_new_tokens=5).shape
        (1, 8)
    """
    config = model.config
    ids = np.asarray(input_ids, np.int32)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    _check(model, ids, mask, max_new_tokens, temperature, top_k, top_p, key)
    graph, state = nnx.split(model)
    static = _Static(max_new_tokens, temperature > 0, top_k, eos, pad)
    key = jax.random.key(0) if key is None else key
    return _loop(graph, state, static, jnp.asarray(ids), jnp.asarray(mask), key, temperature, top_p)


def filter_logits(logits: jax.Array, top_k: int | None = None, top_p: jax.Array | float | None = None) -> jax.Array:
    """Sets the logits of tokens that are not to be drawn to -inf: first all but `top_k`, then all but `top_p`.

    Args:
        logits: (batch, vocabulary).
        top_k: as in `generate`.
        top_p: as in `generate`.

    Example:
        >>> filter_logits(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), top_p=0.7).tolist()[0][0]
        -inf
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        share = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(share, axis=-1) - share  # 0 for the most likely one, which so always stays
        drop = jnp.take_along_axis(before >= top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(drop, -jnp.inf, logits)
    return logits


def _check(model, ids, mask, max_new_tokens, temperature, top_k, top_p, key) -> None:
    if ids.ndim != 2 or not ids.size or mask.shape != ids.shape:
        raise ValueError(f"input_ids {ids.shape} and attention_mask {mask.shape} have to be one (batch, tokens)")
    if not mask[:, -1].all() or (np.diff(mask.astype(int), axis=1) < 0).any():
        raise ValueError("padding has to be on the left: attention_mask ends with 0, or has 0 after 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be in (0, 1]")
    if temperature > 0 and key is None:
        raise ValueError("drawing (temperature above 0) needs key, a jax.random.key")
    # The last new token is given back, never fed in.
    needed, places = ids.shape[1] + max_new_tokens - 1, model.config.n_positions
    if needed > places:
        raise ValueError(f"{ids.shape[1]} tokens and {max_new_tokens} new ones, but n_positions is {places}")


@partial(jax.jit, static_argnames=("graph", "static"))
def _loop(graph, state, static: _Static, ids, mask, key, temperature, top_p):
    model = nnx.merge(graph, state)
    batch, width = ids.shape

    def pick(features, ended, key):
        logits = model.head(features[:, -1]).astype(jnp.float32)
        if static.draw:
            logits = filter_logits(logits / temperature, static.top_k, top_p)
            token = jax.random.categorical(key, logits, axis=-1)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(ended, static.pad, token.astype(jnp.int32))
        return token, ended | jnp.isin(token, jnp.array(static.eos, jnp.int32))

    def unfinished(carry):
        step, _, _, ended, _ = carry
        return (step < static.new_tokens) & ~jnp.all(ended)

    def add(carry):
        step, out, last, ended, cache = carry
        positions = (mask.sum(axis=1) + step - 1)[:, None]
        features, cache = model.transformer(last[:, None], position_ids=positions, cache=cache)
        token, ended = pick(features, ended, jax.random.fold_in(key, step))
        return step + 1, out.at[:, width + step].set(token), token, ended, cache

    dtype = model.transformer.wte.embedding.dtype
    cache = empty_cache(model.config, batch, width + static.new_tokens - 1, dtype)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    features, cache = model.transformer(ids, mask, positions, cache=cache)
    token, ended = pick(features, jnp.zeros(batch, bool), jax.random.fold_in(key, 0))
    out = jnp.full((batch, width + static.new_tokens), static.pad, jnp.int32)
    out = out.at[:, :width].set(ids).at[:, width].set(token)
    return jax.lax.while_loop(unfinished, add, (jnp.int32(1), out, token, ended, cache))[1]
