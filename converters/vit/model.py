"""A Vision Transformer image classifier in Flax NNX (Dosovitskiy et al., arXiv 2010.11929).

It computes what transformers' ViTForImageClassification computes in evaluation mode; dropout is not applied.
The attribute names give the parameter paths of FlaxViTForImageClassification (transformers 4).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from converters.activations import ACTIVATIONS
from converters.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The fields of Hugging Face's `config.json` that the computation depends on, and in `other` the rest.

    Example:
        >>> ViTConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4}).hidden_size
        64
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    initializer_range: float = 0.02
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        problems = []
        if self.hidden_act not in ACTIVATIONS:
            problems.append(f"hidden_act is {self.hidden_act!r}, known are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            problems.append(f"the heads do not divide the hidden size: {sizes}")
        if problems:
            raise ConversionError("this ViT configuration is not supported:", problems)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Reads the contents of a `config.json`."""
        rest = dict(config)
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "other"}
        fields = {name: rest.pop(name) for name in known & rest.keys()}
        for name in ("image_size", "patch_size"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        names = rest.pop("id2label", None)
        rest.pop("label2id", None)
        count = rest.pop("num_labels", 2)
        if names is None:
            names = {str(i): f"LABEL_{i}" for i in range(count)}
        labels = tuple(names[key] for key in sorted(names, key=int))
        return cls(**fields, labels=labels, other=rest)

    def to_dict(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        labels, other = fields.pop("labels"), fields.pop("other")
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **other,
            **fields,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class Embeddings(nnx.Module):
    """Patches through a strided convolution, the class token before them, positions added."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        height, width = _pair(config.image_size)
        patch = _pair(config.patch_size)
        init = nnx.initializers.truncated_normal(config.initializer_range)
        count = (height // patch[0]) * (width // patch[1]) + 1
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.hidden_size)))
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, count, config.hidden_size)))
        projection = nnx.Conv(
            config.num_channels,
            config.hidden_size,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            kernel_init=init,
            rngs=rngs,
        )
        self.patch_embeddings = nnx.Dict(projection=projection)

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch_embeddings.projection(images)
        patches = patches.reshape(images.shape[0], -1, patches.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...], (images.shape[0], 1, patches.shape[-1]))
        return jnp.concatenate([token, patches], axis=1) + self.position_embeddings[...]


class SelfAttention(nnx.Module):
    """Query, key, value and the scaled dot products; the output projection belongs to the layer."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        init = nnx.initializers.truncated_normal(config.initializer_range)
        dense = partial(nnx.Linear, size, size, use_bias=config.qkv_bias, kernel_init=init, rngs=rngs)
        self.query, self.key, self.value = dense(), dense(), dense()
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (dense(x).reshape(split) for dense in (self.query, self.key, self.value))
        return jax.nn.dot_product_attention(q, k, v).reshape(x.shape)


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        size, hidden = config.hidden_size, config.intermediate_size
        init = nnx.initializers.truncated_normal(config.initializer_range)
        dense = partial(nnx.Linear, kernel_init=init, rngs=rngs)
        norm = partial(nnx.LayerNorm, size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.layernorm_before, self.layernorm_after = norm(), norm()
        self.attention: Any = nnx.Dict(
            attention=SelfAttention(config, rngs=rngs), output=nnx.Dict(dense=dense(size, size))
        )
        self.intermediate = nnx.Dict(dense=dense(size, hidden))
        self.output = nnx.Dict(dense=dense(hidden, size))
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        attended = self.attention.attention(self.layernorm_before(x))
        x = x + self.attention.output.dense(attended)
        hidden = ACTIVATIONS[self.activation](self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dense(hidden)


class Backbone(nnx.Module):
    """Embeddings, layers and the last normalisation: images to token features (batch, tokens, hidden)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        layers = [Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.encoder = nnx.Dict(layer=nnx.List(layers))
        self.layernorm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embeddings(images)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)


class ViTForImageClassification(nnx.Module):
    """Images (batch, height, width, channels) to logits (batch, classes).

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
        init = nnx.initializers.truncated_normal(config.initializer_range)
        self.classifier = nnx.Linear(config.hidden_size, len(config.labels), kernel_init=init, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classifier(self.vit(images)[:, 0])
