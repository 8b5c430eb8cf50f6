"""BEiT3 in Flax NNX (Wang et al., arXiv 2208.10442): the multiway encoder and its heads.

The modules compute what torchscale's BEiT3, and the models of the same names in its authors' repository
(microsoft/unilm, `beit3/modeling_finetune.py`), compute in evaluation mode. Paths are the PyTorch names with '/' in the
place of '.', and kernel, scale and embedding as the names of leaves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from converters.activations import ACTIVATIONS
from converters.attention import attend
from converters.beit3.config import BEiT3Config

_init = nnx.initializers.truncated_normal(0.02)
# Of the heads, whatever the encoder has (torch.nn.LayerNorm).
_HEAD_EPSILON = 1e-5


class Encoded(NamedTuple):
    """What the encoder gives.

    Attributes:
        features: `(batch, tokens, width)`: the class token and the patches, then the text.
        split: how many of the tokens are the image's.
    """

    features: jax.Array
    split: int


class Embeddings(NamedTuple):
    """What the retrieval model gives: unit vectors `(batch, width)`, None for what was not given."""

    image: jax.Array | None
    text: jax.Array | None


class Multiway(nnx.Module):
    """Two modules of one kind: A for the image's tokens, B for the text's."""

    def __init__(self, make: Callable[[], Any]):
        self.A, self.B = make(), make()

    def __call__(self, x: jax.Array, split: int) -> jax.Array:
        if split == x.shape[1]:
            return self.A(x)
        if split == 0:
            return self.B(x)
        return jnp.concatenate([self.A(x[:, :split]), self.B(x[:, split:])], axis=1)


class FeedForward(nnx.Module):
    """Two layers, with a normalisation between them."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, kernel_init=_init, rngs=rngs)
        self.fc1 = dense(config.encoder_embed_dim, config.encoder_ffn_embed_dim)
        self.fc2 = dense(config.encoder_ffn_embed_dim, config.encoder_embed_dim)
        self.ffn_layernorm = _norm(config.encoder_ffn_embed_dim, config.layernorm_eps, rngs) if config.subln else None
        self.activation = config.activation_fn

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.fc1(x))
        return self.fc2(x if self.ffn_layernorm is None else self.ffn_layernorm(x))


class SelfAttention(nnx.Module):
    """All tokens attend to all; only the projections are multiway."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        width = config.encoder_embed_dim
        dense = partial(Multiway, lambda: nnx.Linear(width, width, kernel_init=_init, rngs=rngs))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = dense(), dense(), dense(), dense()
        norm = partial(_norm, width, config.layernorm_eps, rngs)
        self.inner_attn_ln = Multiway(norm) if config.subln else None
        self.heads = config.encoder_attention_heads

    def __call__(self, x: jax.Array, split: int, mask: jax.Array | None) -> jax.Array:
        apart = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (project(x, split).reshape(apart) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = attend(q, k, v, mask=mask)
        if self.inner_attn_ln is not None:
            attended = self.inner_attn_ln(attended, split)
        return self.out_proj(attended, split)


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        norm = partial(_norm, config.encoder_embed_dim, config.layernorm_eps, rngs)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.self_attn_layer_norm, self.final_layer_norm = Multiway(norm), Multiway(norm)
        self.ffn = Multiway(lambda: FeedForward(config, rngs=rngs))

    def __call__(self, x: jax.Array, split: int, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attn(self.self_attn_layer_norm(x, split), split, mask)
        return x + self.ffn(self.final_layer_norm(x, split), split)


class BEiT3(nnx.Module):
    """The encoder: images, texts, or both.

    Args:
        config: the model's configuration.
        rngs: where initial weights come from.

    Example:
        >>> config = BEiT3Config(encoder_embed_dim=8, encoder_attention_heads=2, encoder_ffn_embed_dim=12, vocab_size=9,
        ...                      encoder_layers=1, img_size=8, patch_size=4, max_source_positions=6)
        >>> model = BEiT3(config, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 3), int), jnp.zeros((2, 8, 8, 3))).features.shape
        (2, 8, 8)
    """

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        self.config = config
        width = config.encoder_embed_dim
        embed = partial(nnx.Embed, features=width, embedding_init=_init, rngs=rngs)
        self.text_embed = embed(config.vocab_size)
        self.vision_embed: Any = nnx.Dict(
            proj=nnx.Conv(
                config.in_chans,
                width,
                kernel_size=(config.patch_size,) * 2,
                strides=(config.patch_size,) * 2,
                padding="VALID",
                kernel_init=_init,
                rngs=rngs,
            ),
            cls_token=nnx.Param(jnp.zeros((1, 1, width))),
            mask_token=nnx.Param(jnp.zeros((1, 1, width))),
        )
        # Positions count from 2, after fairseq; the class token has one.
        positions = nnx.Dict(A=embed(config.patches + 3), B=embed(config.max_source_positions))
        norm = partial(_norm, width, config.layernorm_eps, rngs)
        self.encoder: Any = nnx.Dict(
            embed_positions=positions,
            layers=nnx.List([Layer(config, rngs=rngs) for _ in range(config.encoder_layers)]),
            **({"layer_norm": Multiway(norm)} if config.normalize_output else {}),
        )

    def __call__(
        self,
        tokens: jax.Array | None = None,
        images: jax.Array | None = None,
        padding: jax.Array | None = None,
        *,
        attends: jax.Array | None = None,
        masked: jax.Array | None = None,
    ) -> Encoded:
        """Encodes texts, images, or pairs of both.

        Args:
            tokens: `(batch, tokens)`, or None.
            images: `(batch, height, width, channels)`, or None.
            padding: `(batch, tokens)`, true where the text is padding.
            attends: `(n, n)` bool over all tokens, true where a row's token sees a column's; None means everywhere.
            masked: `(batch, patches)`, true where the mask token stands in a patch's place.

        Returns:
            Features, and how many tokens are the image's.

        Raises:
            ValueError: neither was given.
        """
        if tokens is None and images is None:
            raise ValueError("BEiT3 wants tokens, images, or both")
        parts, split = [], 0
        if images is not None:
            parts.append(self._patches(images, masked))
            split = parts[0].shape[1]
        if tokens is not None:
            places = self.encoder.embed_positions.B.embedding[2 : tokens.shape[1] + 2]
            parts.append(self.text_embed(tokens) + places)
        x = jnp.concatenate(parts, axis=1)
        seen = None
        if padding is not None and tokens is not None:
            real = jnp.concatenate([jnp.ones((x.shape[0], split), bool), ~padding.astype(bool)], axis=1)
            x = x * real[..., None].astype(x.dtype)
            seen = real[:, None, None, :]
        if attends is not None:
            seen = attends[None, None] if seen is None else seen & attends[None, None]
        for layer in self.encoder.layers:
            x = layer(x, split, seen)
        return Encoded(self.encoder.layer_norm(x, split) if self.config.normalize_output else x, split)

    def _patches(self, images: jax.Array, masked: jax.Array | None) -> jax.Array:
        embed = self.vision_embed
        x = embed.proj(images.astype(embed.cls_token[...].dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if masked is not None:
            x = jnp.where(masked.astype(bool)[..., None], embed.mask_token[...], x)
        token = jnp.broadcast_to(embed.cls_token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        return x + self.encoder.embed_positions.A.embedding[2 : x.shape[1] + 2]


class _WithEncoder(nnx.Module):
    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.beit3 = BEiT3(config, rngs=rngs)


class BEiT3ForImageClassification(_WithEncoder):
    """Images to logits `(batch, classes)`, from the mean of the patches' features."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.encoder_embed_dim
        self.fc_norm = _norm(width, _HEAD_EPSILON, rngs)
        self.head = nnx.Linear(width, config.num_classes, kernel_init=_init, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = self.beit3(images=images).features
        return self.head(self.fc_norm(jnp.mean(features[:, 1:], axis=1)))


class BEiT3ForVisualQuestionAnswering(_WithEncoder):
    """Questions and images to logits `(batch, answers)`, from the class token."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.encoder_embed_dim
        dense = partial(nnx.Linear, kernel_init=_init, rngs=rngs)
        self.pooler: Any = nnx.Dict(norm=_norm(width, _HEAD_EPSILON, rngs), dense=dense(width, width))
        # A torch.nn.Sequential: the third, an activation, has no weights.
        self.head: Any = nnx.Dict(
            first=dense(width, 2 * width),
            norm=_norm(2 * width, _HEAD_EPSILON, rngs),
            last=dense(2 * width, config.num_classes),
        )

    def __call__(self, tokens: jax.Array, images: jax.Array, padding: jax.Array | None = None) -> jax.Array:
        token = self.beit3(tokens, images, padding).features[:, 0]
        pooled = jnp.tanh(self.pooler.dense(self.pooler.norm(token)))
        return self.head.last(ACTIVATIONS["gelu"](self.head.norm(self.head.first(pooled))))


class BEiT3ForVisualReasoning(_WithEncoder):
    """NLVR2: a sentence and two images to logits `(batch, classes)`."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.encoder_embed_dim
        dense = partial(nnx.Linear, kernel_init=_init, rngs=rngs)
        self.head: Any = nnx.Dict(
            norm1=_norm(4 * width, _HEAD_EPSILON, rngs),
            dense1=dense(4 * width, 2 * width),
            norm2=_norm(2 * width, _HEAD_EPSILON, rngs),
            dense2=dense(2 * width, config.num_classes),
        )

    def __call__(
        self, tokens: jax.Array, first: jax.Array, second: jax.Array, padding: jax.Array | None = None
    ) -> jax.Array:
        images = jnp.concatenate([first, second])
        both = None if padding is None else jnp.concatenate([padding, padding])
        features, split = self.beit3(jnp.concatenate([tokens, tokens]), images, both)
        pair = jnp.concatenate([features[:, 0], features[:, split]], axis=-1)
        x = self.head.norm1(jnp.concatenate(jnp.split(pair, 2), axis=-1))
        return self.head.dense2(ACTIVATIONS["gelu"](self.head.norm2(self.head.dense1(x))))


class BEiT3ForRetrieval(_WithEncoder):
    """Images and texts, each alone, to unit vectors."""

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.encoder_embed_dim
        dense = partial(nnx.Linear, width, width, use_bias=False, kernel_init=_init, rngs=rngs)
        self.language_head, self.vision_head = dense(), dense()
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def __call__(
        self, tokens: jax.Array | None = None, images: jax.Array | None = None, padding: jax.Array | None = None
    ) -> Embeddings:
        image = text = None
        if images is not None:
            image = _unit(self.vision_head(self.beit3(images=images).features[:, 0]))
        if tokens is not None:
            text = _unit(self.language_head(self.beit3(tokens, padding=padding).features[:, 0]))
        return Embeddings(image, text)


class BEiT3ForCaptioning(_WithEncoder):
    """Images and captions with masked tokens to logits `(batch, tokens, vocabulary)`.

    The image's tokens see the image; those of the caption see the image and what of the caption comes before them.
    """

    def __init__(self, config: BEiT3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.mlm_head = nnx.Linear(config.encoder_embed_dim, config.vocab_size, kernel_init=_init, rngs=rngs)

    def __call__(self, tokens: jax.Array, images: jax.Array, padding: jax.Array | None = None) -> jax.Array:
        image, length = self.config.patches + 1, tokens.shape[1]
        attends = jnp.tril(jnp.ones((image + length,) * 2, bool)).at[:image, :image].set(True)
        return self.mlm_head(self.beit3(tokens, images, padding, attends=attends).features[:, image:])


MODELS = {
    "torchscale/BEiT3ForImageClassification": BEiT3ForImageClassification,
    "torchscale/BEiT3ForVisualQuestionAnswering": BEiT3ForVisualQuestionAnswering,
    "torchscale/BEiT3ForVisualReasoning": BEiT3ForVisualReasoning,
    "torchscale/BEiT3ForRetrieval": BEiT3ForRetrieval,
    "torchscale/BEiT3ForCaptioning": BEiT3ForCaptioning,
    "torchscale/BEiT3": BEiT3,
}


def _norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
