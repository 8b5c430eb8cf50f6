"""CLIP in Flax NNX (Radford et al., arXiv 2103.00020): both towers, alone, with projections, together, as a classifier.

The modules compute what those of the same names in transformers compute in evaluation mode. The attribute names give
the parameter paths of FlaxCLIPModel, FlaxCLIPVisionModel and FlaxCLIPTextModel (transformers 4), misspelling included.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from converters.activations import ACTIVATIONS
from converters.attention import attend
from converters.clip.config import CLIPConfig, TextConfig, TowerConfig, VisionConfig


class Features(NamedTuple):
    """What a tower gives.

    Attributes:
        hidden: `(batch, tokens, hidden)`; of the text tower after the last normalisation.
        pooled: `(batch, hidden)`: the class token, or the token that ends the text, normalised.
    """

    hidden: jax.Array
    pooled: jax.Array


class Similarity(NamedTuple):
    """What CLIPModel gives.

    Attributes:
        logits_per_image: `(images, texts)`, cosines times the exponential of the scale.
        logits_per_text: its transpose.
        text_embeds: `(texts, projection)`, unit vectors.
        image_embeds: `(images, projection)`, unit vectors.
    """

    logits_per_image: jax.Array
    logits_per_text: jax.Array
    text_embeds: jax.Array
    image_embeds: jax.Array


class Attention(nnx.Module):
    """Self-attention with separate projections of query, key and value."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        dense = partial(nnx.Linear, config.hidden_size, config.hidden_size, kernel_init=init, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = dense(), dense(), dense(), dense()
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (dense(x).reshape(split) for dense in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask=mask))


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        dense = partial(nnx.Linear, kernel_init=init, rngs=rngs)
        self.layer_norm1, self.layer_norm2 = _norm(config, rngs), _norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp: Any = nnx.Dict(
            fc1=dense(config.hidden_size, config.intermediate_size),
            fc2=dense(config.intermediate_size, config.hidden_size),
        )
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp.fc2(ACTIVATIONS[self.activation](self.mlp.fc1(self.layer_norm2(x))))


class VisionTower(nnx.Module):
    """Images (batch, height, width, channels) to features."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.embeddings: Any = nnx.Dict(
            class_embedding=nnx.Param(init(rngs.params(), (config.hidden_size,))),
            patch_embedding=nnx.Conv(
                config.num_channels,
                config.hidden_size,
                kernel_size=(config.patch_size,) * 2,
                strides=(config.patch_size,) * 2,
                padding="VALID",
                use_bias=False,
                kernel_init=init,
                rngs=rngs,
            ),
            position_embedding=nnx.Embed(config.positions, config.hidden_size, embedding_init=init, rngs=rngs),
        )
        self.pre_layrnorm, self.post_layernorm = _norm(config, rngs), _norm(config, rngs)
        self.encoder = _encoder(config, rngs)

    def __call__(self, images: jax.Array) -> Features:
        embeddings = self.embeddings
        token = embeddings.class_embedding[...]
        patches = embeddings.patch_embedding(images.astype(token.dtype))
        patches = patches.reshape(images.shape[0], -1, patches.shape[-1])
        tokens = jnp.broadcast_to(token, (images.shape[0], 1, token.shape[0]))
        x = jnp.concatenate([tokens, patches], axis=1) + embeddings.position_embedding.embedding[...]
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x, None)
        return Features(x, self.post_layernorm(x[:, 0]))


class TextTower(nnx.Module):
    """Token numbers (batch, tokens) to features; a token sees those before it."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=config.hidden_size, embedding_init=init, rngs=rngs)
        self.embeddings: Any = nnx.Dict(
            token_embedding=embed(config.vocab_size), position_embedding=embed(config.max_position_embeddings)
        )
        self.encoder = _encoder(config, rngs)
        self.final_layer_norm = _norm(config, rngs)
        self.eos_token_id = config.eos_token_id

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None) -> Features:
        length = tokens.shape[1]
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.embedding[:length]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.astype(bool)[:, None, None, :]
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.final_layer_norm(x)
        ends = tokens if self.eos_token_id == 2 else tokens == self.eos_token_id
        return Features(x, x[jnp.arange(x.shape[0]), jnp.argmax(ends, axis=1)])


class CLIPVisionModel(nnx.Module):
    """The vision tower alone.

    Args:
        config: with the vision tower.
        rngs: where initial weights come from.

    Example:
        >>> tower = VisionConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        ...                      image_size=8, patch_size=4)
        >>> CLIPVisionModel(CLIPConfig(vision=tower), rngs=nnx.Rngs(0))(jnp.zeros((5, 8, 8, 3))).pooled.shape
        (5, 8)
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = VisionTower(_vision(config), rngs=rngs)

    def __call__(self, images: jax.Array) -> Features:
        return self.vision_model(images)


class CLIPVisionModelWithProjection(CLIPVisionModel):
    """Images to embeddings `(batch, projection)`."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.visual_projection = _projection(_vision(config), _vision(config).projection_dim, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.visual_projection(self.vision_model(images).pooled)


class CLIPForImageClassification(CLIPVisionModel):
    """Images to logits `(batch, classes)`, from the mean of the patches' features."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        init = nnx.initializers.normal(_vision(config).initializer_range)
        self.classifier = nnx.Linear(_vision(config).hidden_size, len(config.labels), kernel_init=init, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classifier(jnp.mean(self.vision_model(images).hidden[:, 1:], axis=1))


class CLIPTextModel(nnx.Module):
    """The text tower alone: token numbers (batch, tokens) to features."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = TextTower(_text(config), rngs=rngs)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None) -> Features:
        return self.text_model(tokens, attention_mask)


class CLIPTextModelWithProjection(CLIPTextModel):
    """Token numbers to embeddings `(batch, projection)`."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.text_projection = _projection(_text(config), _text(config).projection_dim, rngs)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        return self.text_projection(self.text_model(tokens, attention_mask).pooled)


class CLIPModel(nnx.Module):
    """Texts and images to their similarities."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = TextTower(_text(config), rngs=rngs)
        self.vision_model = VisionTower(_vision(config), rngs=rngs)
        self.text_projection = _projection(_text(config), config.projection_dim, rngs)
        self.visual_projection = _projection(_vision(config), config.projection_dim, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def encode_text(self, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Token numbers to embeddings `(batch, projection)`, not normalised."""
        return self.text_projection(self.text_model(tokens, attention_mask).pooled)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Images to embeddings `(batch, projection)`, not normalised."""
        return self.visual_projection(self.vision_model(images).pooled)

    def __call__(self, tokens: jax.Array, images: jax.Array, attention_mask: jax.Array | None = None) -> Similarity:
        text, image = (
            x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            for x in (self.encode_text(tokens, attention_mask), self.encode_image(images))
        )
        per_text = jnp.exp(self.logit_scale[...]) * (text @ image.T)
        return Similarity(per_text.T, per_text, text, image)


MODELS = {
    "CLIPModel": CLIPModel,
    "CLIPVisionModel": CLIPVisionModel,
    "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
    "CLIPForImageClassification": CLIPForImageClassification,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "openai/CLIP": CLIPModel,
}


def _vision(config: CLIPConfig) -> VisionConfig:
    return VisionConfig() if config.vision is None else config.vision


def _text(config: CLIPConfig) -> TextConfig:
    return TextConfig() if config.text is None else config.text


def _norm(config: TowerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


def _encoder(config: TowerConfig, rngs: nnx.Rngs) -> nnx.Dict:
    return nnx.Dict(layers=nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]))


def _projection(config: TowerConfig, size: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(config.hidden_size, size, use_bias=False, kernel_init=init, rngs=rngs)
