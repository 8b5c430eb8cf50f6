"""GPT-2 in Flax NNX (Radford et al. 2019), with a key-value cache.

It computes what transformers' classes of the same names compute in evaluation mode; dropout is not applied.
The attribute names give transformers' parameter paths; kernels are (in, out), as PyTorch's Conv1D has them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from converters.activations import ACTIVATIONS
from converters.gpt2.config import GPT2Config


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for a fixed number of places; a pytree, never changed in place.

    Attributes:
        keys: an array (batch, places, heads, head width) a layer.
        values: likewise.
        mask: (batch, places), which places hold a token that may be looked at.
        length: a scalar, the number of places written.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array


def empty_cache(config: GPT2Config, batch: int, places: int, dtype: Any = jnp.float32) -> Cache:
    """A cache with nothing in it.

    Args:
        config: the model's configuration.
        batch: the number of sequences.
        places: how many tokens a sequence can grow to.
        dtype: of keys and values, best the parameters' own.

    Example:
        >>> empty_cache(GPT2Config(n_embd=8, n_head=2, n_layer=1), batch=3, places=5).keys[0].shape
        (3, 5, 2, 4)
    """
    shape = (batch, places, config.n_head, config.n_embd // config.n_head)
    layers = tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer))
    return Cache(layers, layers, jnp.zeros((batch, places), bool), jnp.int32(0))


class Attention(nnx.Module):
    """Causal self-attention with query, key and value from one fused projection."""

    def __init__(self, config: GPT2Config, layer: int, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, kernel_init=nnx.initializers.normal(config.initializer_range), rngs=rngs)
        self.c_attn = dense(config.n_embd, 3 * config.n_embd)
        self.c_proj = dense(config.n_embd, config.n_embd)
        self.heads = config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def __call__(self, x: jax.Array, mask: jax.Array, past: tuple[jax.Array, jax.Array] | None, start: Any):
        """Attends; `past` holds keys and values of all places, those from `start` on are written now."""
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (part.reshape(split) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(past, (k, v), strict=True)
            )
        # Scores and softmax are float32 whatever the dtype: reorder_and_upcast_attn asks for no more.
        mixed = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask, scale=self.scale)
        return self.c_proj(mixed.reshape(x.shape)), (k, v)


class MLP(nnx.Module):
    """Two fully connected layers."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, kernel_init=nnx.initializers.normal(config.initializer_range), rngs=rngs)
        self.c_fc = dense(config.n_embd, config.inner)
        self.c_proj = dense(config.inner, config.n_embd)
        self.activation = config.activation_function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


def _norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: GPT2Config, layer: int, *, rngs: nnx.Rngs):
        self.ln_1, self.ln_2 = _norm(config, rngs), _norm(config, rngs)
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, past: tuple[jax.Array, jax.Array] | None, start: Any):
        attended, kept = self.attn(self.ln_1(x), mask, past, start)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), kept


class GPT2Model(nnx.Module):
    """Token ids (batch, tokens) to features (batch, tokens, width).

    Args of the call, for this class and those with a head:
        input_ids: integers (batch, tokens).
        attention_mask: (batch, tokens), nonzero where a token may be looked at; None where all may.
        position_ids: integers (batch, tokens) or (tokens,); None counts on from the cache's length.
        token_type_ids: integers like `input_ids`, whose token embeddings are added.
        cache: what `empty_cache` or an earlier call gave; the result is then `(output, cache)`. Inside jit, where
            its length is not known, the output of a cache that overflows is NaN.

    Raises:
        ValueError: the tokens are more than the model has positions, or than the cache has places left.

    Example:
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=6)
        >>> GPT2Model(config, rngs=nnx.Rngs(0))(jnp.array([[3, 1, 4]])).shape
        (1, 3, 8)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(config.initializer_range)
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, embedding_init=init, rngs=rngs)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, embedding_init=init, rngs=rngs)
        self.h = nnx.List([Block(config, layer, rngs=rngs) for layer in range(config.n_layer)])
        self.ln_f = _norm(config, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        batch, tokens = input_ids.shape
        start = jnp.int32(0) if cache is None else cache.length
        self._check_room(tokens, cache)
        positions = start + jnp.arange(tokens) if position_ids is None else position_ids
        x = self.wte(input_ids) + self.wpe(positions)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)

        seen = jnp.ones((batch, tokens), bool) if attention_mask is None else attention_mask.astype(bool)
        if cache is not None:
            seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, seen, start, axis=1)
        causal = jnp.arange(seen.shape[1]) <= start + jnp.arange(tokens)[:, None]
        mask = seen[:, None, None, :] & causal

        keys, values = [], []
        for layer, block in enumerate(self.h):
            past = None if cache is None else (cache.keys[layer], cache.values[layer])
            x, (key, value) = block(x, mask, past, start)
            keys.append(key)
            values.append(value)
        x = self.ln_f(x)
        if cache is None:
            return x
        # A full cache would overwrite its last places; inside jit nothing can be raised.
        x = jnp.where(start + tokens <= seen.shape[1], x, jnp.nan)
        return x, Cache(tuple(keys), tuple(values), seen, start + tokens)

    def _check_room(self, tokens: int, cache: Cache | None) -> None:
        if tokens > self.config.n_positions:
            raise ValueError(f"{tokens} tokens, but the model has n_positions = {self.config.n_positions}")
        if cache is not None and not isinstance(cache.length, Tracer):
            written, places = int(cache.length), cache.mask.shape[1]
            if written + tokens > places:
                raise ValueError(f"the cache has {places} places, {written} are taken, {tokens} more asked for")


class _WithHead(nnx.Module):
    """A GPT2Model as `transformer`, and what a subclass makes of its features."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.transformer = GPT2Model(config, rngs=rngs)

    def _dense(self, outputs: int, rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
        init = nnx.initializers.normal(self.config.initializer_range)
        return nnx.Linear(self.config.n_embd, outputs, kernel_init=init, rngs=rngs, **options)

    def head(self, features: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Features (batch, tokens, width) to the output."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        features = self.transformer(input_ids, attention_mask, position_ids, token_type_ids, cache)
        if cache is None:
            return self.head(features, input_ids)
        return self.head(features[0], input_ids), features[1]


class GPT2LMHeadModel(_WithHead):
    """Token ids (batch, tokens) to logits of the next token (batch, tokens, vocabulary).

    Called as `GPT2Model` is. The output weights are the token embedding, unless `tie_word_embeddings` is false.

    Example:
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=6)
        >>> model = GPT2LMHeadModel(config, rngs=nnx.Rngs(0))
        >>> logits, cache = model(jnp.array([[3, 1, 4]]), cache=empty_cache(config, batch=1, places=6))
        >>> logits.shape, int(cache.length)
        ((1, 3, 20), 3)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = self._dense(config.vocab_size, rngs, use_bias=False)

    def head(self, features: jax.Array, input_ids: jax.Array | None = None) -> jax.Array:
        """Features (..., width) to logits (..., vocabulary)."""
        tied = self.config.tie_word_embeddings
        return self.transformer.wte.attend(features) if tied else self.lm_head(features)


class GPT2ForSequenceClassification(_WithHead):
    """Token ids (batch, tokens) to logits (batch, classes), from the last token that is not `pad_token_id`.

    Called as `GPT2Model` is. Without a `pad_token_id` it takes the last token, and only a batch of one sequence,
    as transformers does.

    Raises:
        ValueError: several sequences and no `pad_token_id`.

    Example:
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20,
        ...                     n_positions=6, pad_token_id=0)
        >>> GPT2ForSequenceClassification(config, rngs=nnx.Rngs(0))(jnp.array([[3, 1, 4], [5, 9, 0]])).shape
        (2, 2)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.score = self._dense(len(config.labels), rngs, use_bias=False)

    def head(self, features: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Features (batch, tokens, width) to logits (batch, classes)."""
        pad = self.config.pad_token_id
        if pad is None and input_ids.shape[0] != 1:
            raise ValueError(f"{input_ids.shape[0]} sequences at once need pad_token_id in the configuration")
        if pad is None:
            last = jnp.full(1, input_ids.shape[1] - 1)
        else:
            last = jnp.argmax(jnp.arange(input_ids.shape[1]) * (input_ids != pad), axis=1)
        return self.score(features[jnp.arange(input_ids.shape[0]), last])


class GPT2ForTokenClassification(_WithHead):
    """Token ids (batch, tokens) to logits (batch, tokens, classes). Called as `GPT2Model` is.

    Example:
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20,
        ...                     n_positions=6, labels=("in", "out", "begin"))
        >>> GPT2ForTokenClassification(config, rngs=nnx.Rngs(0))(jnp.array([[3, 1, 4]])).shape
        (1, 3, 3)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.classifier = self._dense(len(config.labels), rngs)

    def head(self, features: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Features (batch, tokens, width) to logits (batch, tokens, classes)."""
        return self.classifier(features)


MODELS: dict[str, Any] = {
    model.__name__: model
    for model in (GPT2LMHeadModel, GPT2Model, GPT2ForSequenceClassification, GPT2ForTokenClassification)
}
