"""The parts of Vision Transformers in Flax NNX, which BEiT has too."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from converters.activations import ACTIVATIONS
from converters.attention import attend
from converters.vit.config import EncoderConfig, ViTConfig, pair


def initializer(config: EncoderConfig) -> Any:
    """How weights start."""
    return nnx.initializers.truncated_normal(config.initializer_range)


def linear(config: EncoderConfig, inputs: int, outputs: int, rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    """A fully connected layer."""
    return nnx.Linear(inputs, outputs, kernel_init=initializer(config), rngs=rngs, **options)


def norm(config: EncoderConfig, rngs: nnx.Rngs, size: int | None = None) -> nnx.LayerNorm:
    """A normalisation, over the hidden size unless told otherwise."""
    size = config.hidden_size if size is None else size
    return nnx.LayerNorm(size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


def token(config: EncoderConfig, rngs: nnx.Rngs, count: int = 1) -> nnx.Param:
    """Learned tokens `(1, count, hidden)`."""
    return nnx.Param(initializer(config)(rngs.params(), (1, count, config.hidden_size)))


def patch_projection(config: EncoderConfig, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Conv:
    """Patches through a strided convolution."""
    patch = pair(config.patch_size)
    return nnx.Conv(
        config.num_channels,
        config.hidden_size,
        kernel_size=patch,
        strides=patch,
        padding="VALID",
        use_bias=use_bias,
        kernel_init=initializer(config),
        rngs=rngs,
    )


def project(images: jax.Array, projection: nnx.Conv, config: EncoderConfig) -> jax.Array:
    """Images (batch, height, width, channels) to patches (batch, patches, hidden).

    Raises:
        ValueError: the images are not of the model's size.
    """
    want = (*pair(config.image_size), config.num_channels)
    if images.ndim != 4 or images.shape[1:] != want:
        raise ValueError(f"images must be (batch, {want[0]}, {want[1]}, {want[2]}), got {images.shape}")
    patches = projection(jnp.asarray(images, projection.kernel[...].dtype))
    return patches.reshape(images.shape[0], -1, patches.shape[-1])


def before(tokens: list[jax.Array], x: jax.Array) -> jax.Array:
    """Puts tokens `(1, count, hidden)` before those of each image."""
    return jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in tokens), x], axis=1)


class SelfAttention(nnx.Module):
    """Query, key, value and the scaled dot products; the output projection belongs to the layer."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        size = config.hidden_size
        dense = partial(linear, config, size, size, rngs)
        self.query, self.value = (dense(use_bias=config.qkv_bias) for _ in range(2))
        self.key = dense(use_bias=config.key_bias)
        self.heads = config.num_attention_heads
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (norm(config, rngs, size // self.heads) for _ in range(2))

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (dense(x).reshape(split) for dense in (self.query, self.key, self.value))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return attend(q, k, v, bias)


class Layer(nnx.Module):
    """A pre-norm transformer layer.

    Args:
        config: with the fields of `ViTConfig` that a layer depends on.
        rngs: where initial weights come from.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        size, hidden = config.hidden_size, config.intermediate_size
        self.layernorm_before, self.layernorm_after = norm(config, rngs), norm(config, rngs)
        self.attention: Any = nnx.Dict(
            attention=SelfAttention(config, rngs=rngs), output=nnx.Dict(dense=linear(config, size, size, rngs))
        )
        self.intermediate = nnx.Dict(dense=linear(config, size, hidden, rngs))
        self.output = nnx.Dict(dense=linear(config, hidden, size, rngs))
        self.activation = config.hidden_act
        self.layer_scale = config.layer_scale
        if config.layer_scale:
            self.lambda_1, self.lambda_2 = (nnx.Param(jnp.full(size, 0.1)) for _ in range(2))

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        attended = self.attention.output.dense(self.attention.attention(self.layernorm_before(x), bias))
        x = x + (self.lambda_1[...] * attended if self.layer_scale else attended)
        hidden = ACTIVATIONS[self.activation](self.intermediate.dense(self.layernorm_after(x)))
        hidden = self.output.dense(hidden)
        return x + (self.lambda_2[...] * hidden if self.layer_scale else hidden)


class AttentionPool(nnx.Module):
    """Pooling by a learned query that attends to all tokens, and a feed-forward layer (MAP head)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        size, hidden = config.hidden_size, config.intermediate_size
        self.probe = token(config, rngs)
        dense = partial(linear, config, rngs=rngs)
        self.query, self.key, self.value = (dense(size, size, use_bias=config.qkv_bias) for _ in range(3))
        self.out, self.fc1, self.fc2 = dense(size, size), dense(size, hidden), dense(hidden, size)
        self.layernorm = norm(config, rngs)
        self.heads, self.activation = config.num_attention_heads, config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        def cut(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads)

        probe = jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[-1]))
        q, k, v = cut(self.query(probe)), cut(self.key(x)), cut(self.value(x))
        pooled = self.out(attend(q, k, v))
        return (pooled + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.layernorm(pooled)))))[:, 0]
