"""Vision Transformers in Flax NNX (Dosovitskiy et al., arXiv 2010.11929): token features, and classifiers.

They compute what transformers' ViTModel and ViTForImageClassification, timm's VisionTransformer and Google's ViT
compute in evaluation mode; dropout is not applied. The attribute names give the parameter paths of FlaxViTModel and
FlaxViTForImageClassification (transformers 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from converters.activations import ACTIVATIONS
from converters.vit.config import ViTConfig
from converters.vit.layers import AttentionPool, Layer, before, linear, norm, patch_projection, project, token


class Features(NamedTuple):
    """What ViTModel gives.

    Attributes:
        hidden: `(batch, tokens, hidden)`, after the last normalisation.
        pooled: `(batch, pooler_output_size)`; None without a pooler.
    """

    hidden: jax.Array
    pooled: jax.Array | None


class Embeddings(nnx.Module):
    """Patches through a strided convolution, tokens before them, positions added."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.class_token:
            self.cls_token = token(config, rngs)
        if config.distilled:
            self.dist_token = token(config, rngs)
        if config.reg_tokens:
            self.reg_token = token(config, rngs, config.reg_tokens)
        places = config.patches + (0 if config.no_embed_class else config.prefix_tokens)
        self.position_embeddings = token(config, rngs, places)
        self.patch_embeddings = nnx.Dict(projection=patch_projection(config, rngs, config.patch_bias))

    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        x = project(images, self.patch_embeddings.projection, config)
        there = (config.class_token, config.distilled, config.reg_tokens)
        names = ("cls_token", "dist_token", "reg_token")
        tokens = [getattr(self, name)[...] for name, has in zip(names, there, strict=True) if has]
        if config.no_embed_class:
            return before(tokens, x + self.position_embeddings[...])
        return before(tokens, x) + self.position_embeddings[...]


class Backbone(nnx.Module):
    """Embeddings, layers and the last normalisation: images to token features (batch, tokens, hidden)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        if config.pre_norm:
            self.pre_layernorm = norm(config, rngs)
        layers = [Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.encoder = nnx.Dict(layer=nnx.List(layers))
        if config.final_norm:
            self.layernorm = norm(config, rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Images (batch, height, width, channels) to token features."""
        x = self.embeddings(images)
        if self.config.pre_norm:
            x = self.pre_layernorm(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x) if self.config.final_norm else x

    def __call__(self, images: jax.Array) -> Any:
        return self.features(images)


class ViTModel(Backbone):
    """Images (batch, height, width, channels) to `Features`.

    Args:
        config: the model's configuration; without `add_pooling_layer` there is no pooler.
        rngs: where initial weights come from.

    Example:
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                    intermediate_size=16, image_size=8, patch_size=4, num_channels=1)
        >>> ViTModel(config, rngs=nnx.Rngs(0))(jnp.zeros((5, 8, 8, 1))).hidden.shape
        (5, 5, 8)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.add_pooling_layer:
            size = config.hidden_size
            self.pooler = nnx.Dict(dense=linear(config, size, config.pooler_output_size or size, rngs))

    def __call__(self, images: jax.Array) -> Features:
        hidden = self.features(images)
        if not self.config.add_pooling_layer:
            return Features(hidden, None)
        return Features(hidden, ACTIVATIONS[self.config.pooler_act](self.pooler.dense(hidden[:, 0])))


class ViTForImageClassification(nnx.Module):
    """Images (batch, height, width, channels) to logits (batch, classes).

    Without classes (`labels=()`) it gives what the classifier would look at.

    Args:
        config: the model's configuration.
        rngs: where initial weights come from.

    Example:
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                    intermediate_size=16, image_size=8, patch_size=4, num_channels=1)
        >>> model = ViTForImageClassification(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((5, 8, 8, 1))).shape
        (5, 2)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vit = Backbone(config, rngs=rngs)
        size = config.hidden_size
        if config.global_pool == "map":
            self.attn_pool = AttentionPool(config, rngs=rngs)
        if config.fc_norm:
            self.fc_norm = norm(config, rngs)
        if config.representation_size:
            self.pre_logits = linear(config, size, config.representation_size, rngs)
            size = config.representation_size
        if config.labels:
            self.classifier = linear(config, size, len(config.labels), rngs)
            if config.distilled:
                self.classifier_dist = linear(config, size, len(config.labels), rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        x = self.vit(images)
        if config.distilled:
            first, second = x[:, 0], x[:, 1]
            if config.labels:
                first, second = self.classifier(first), self.classifier_dist(second)
            return (first + second) / 2
        x = self._pool(x)
        if config.fc_norm:
            x = self.fc_norm(x)
        if config.representation_size:
            x = jnp.tanh(self.pre_logits(x))
        return self.classifier(x) if config.labels else x

    def _pool(self, x: jax.Array) -> jax.Array:
        how = self.config.global_pool
        if how == "token":
            return x[:, 0]
        x = x[:, self.config.prefix_tokens :]
        if how == "map":
            return self.attn_pool(x)
        if how == "avg":
            return jnp.mean(x, axis=1)
        largest = jnp.max(x, axis=1)
        return largest if how == "max" else (largest + jnp.mean(x, axis=1)) / 2
