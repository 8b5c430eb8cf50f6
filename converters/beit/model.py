"""BEiT in Flax NNX (Bao et al., arXiv 2106.08254).

The modules compute what those of the same names in transformers compute in evaluation mode. The attribute names give
the parameter paths of FlaxBeitModel and its likes (transformers 4).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from converters.beit.config import BeitConfig
from converters.beit.positions import relative_position_index
from converters.vit.layers import Layer, before, linear, norm, patch_projection, project, token
from converters.vit.model import Features


class RelativePositionBias(nnx.Module):
    """What is added to the scores of attention, by relative position and head: `(heads, tokens, tokens)`."""

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        shape = (config.distances, config.num_attention_heads)
        self.relative_position_bias_table = nnx.Param(jnp.zeros(shape))
        self.grid = config.grid

    def __call__(self) -> jax.Array:
        height, width = self.grid
        rows = self.relative_position_bias_table[...]
        if height != width:
            # transformers takes the rows for a grid that is as wide as this one is high, and resizes that.
            grid = rows[:-3].reshape(2 * width - 1, 2 * height - 1, -1)
            shape = (2 * height - 1, 2 * width - 1, rows.shape[1])
            resized = jax.image.resize(grid, shape, "bilinear", antialias=False)
            rows = jnp.concatenate([resized.reshape(-1, rows.shape[1]), rows[-3:]])
        return rows[relative_position_index(height, width)].transpose(2, 0, 1)


class Embeddings(nnx.Module):
    """Patches, some of them masked; the class token before them; positions added where they are learned."""

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.cls_token = token(config, rngs)
        if config.use_mask_token:
            self.mask_token = token(config, rngs)
        if config.use_absolute_position_embeddings:
            self.position_embeddings = token(config, rngs, config.patches + 1)
        self.patch_embeddings = nnx.Dict(projection=patch_projection(config, rngs))

    def __call__(self, images: jax.Array, masked: jax.Array | None) -> jax.Array:
        x = project(images, self.patch_embeddings.projection, self.config)
        if masked is not None:
            if not self.config.use_mask_token:
                raise ValueError("masked patches need a mask token: use_mask_token is false")
            x = jnp.where(masked.astype(bool)[..., None], self.mask_token[...], x)
        x = before([self.cls_token[...]], x)
        return x + self.position_embeddings[...] if self.config.use_absolute_position_embeddings else x


class BeitLayer(Layer):
    """A layer with a table of relative positions of its own."""

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.relative = config.use_relative_position_bias
        if self.relative:
            self.attention.attention.relative_position_bias = RelativePositionBias(config, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        if self.relative:
            own = self.attention.attention.relative_position_bias()
            bias = own if bias is None else bias + own
        return super().__call__(x, bias)


class Backbone(nnx.Module):
    """Images to token features, with the pooler or without it."""

    def __init__(self, config: BeitConfig, pooler: bool, *, rngs: nnx.Rngs):
        self.config, self.pools = config, pooler
        self.embeddings = Embeddings(config, rngs=rngs)
        layers = [BeitLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.encoder: Any = nnx.Dict(layer=nnx.List(layers))
        if config.use_shared_relative_position_bias:
            self.encoder.relative_position_bias = RelativePositionBias(config, rngs=rngs)
        if not config.use_mean_pooling:
            self.layernorm = norm(config, rngs)
        elif pooler:
            self.pooler = nnx.Dict(layernorm=norm(config, rngs))

    def __call__(self, images: jax.Array, masked: jax.Array | None = None) -> Features:
        x = self.embeddings(images, masked)
        shared = self.config.use_shared_relative_position_bias
        bias = self.encoder.relative_position_bias() if shared else None
        for layer in self.encoder.layer:
            x = layer(x, bias)
        if not self.config.use_mean_pooling:
            x = self.layernorm(x)
        if not self.pools:
            return Features(x, None)
        if self.config.use_mean_pooling:
            return Features(x, self.pooler.layernorm(jnp.mean(x[:, 1:], axis=1)))
        return Features(x, x[:, 0])


class BeitModel(Backbone):
    """Images (batch, height, width, channels), and which patches are masked, to `Features`.

    Args:
        config: the model's configuration; without `add_pooling_layer` nothing is pooled.
        rngs: where initial weights come from.

    Example:
        >>> config = BeitConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                     image_size=8, patch_size=4, num_channels=1, use_relative_position_bias=True)
        >>> BeitModel(config, rngs=nnx.Rngs(0))(jnp.zeros((5, 8, 8, 1))).hidden.shape
        (5, 5, 8)
    """

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        super().__init__(config, config.add_pooling_layer, rngs=rngs)


class BeitForImageClassification(nnx.Module):
    """Images to logits `(batch, classes)`; without classes (`labels=()`) to pooled features."""

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.beit = Backbone(config, True, rngs=rngs)
        if config.labels:
            self.classifier = linear(config, config.hidden_size, len(config.labels), rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        pooled: Any = self.beit(images).pooled
        return self.classifier(pooled) if self.config.labels else pooled


class BeitForMaskedImageModeling(nnx.Module):
    """Images and which patches are masked to logits of visual words `(batch, patches, vocabulary)`."""

    def __init__(self, config: BeitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.beit = Backbone(config, False, rngs=rngs)
        self.layernorm = norm(config, rngs)
        self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(self, images: jax.Array, masked: jax.Array | None = None) -> jax.Array:
        return self.lm_head(self.layernorm(self.beit(images, masked).hidden)[:, 1:])


MODELS = {
    "BeitModel": BeitModel,
    "BeitForImageClassification": BeitForImageClassification,
    "BeitForMaskedImageModeling": BeitForMaskedImageModeling,
}
