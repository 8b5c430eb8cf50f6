"""Configurations of Vision Transformers: that of Hugging Face, and what the models of others have besides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters import class_names
from converters.errors import ConversionError

Size = int | tuple[int, int]
POOLS = ("token", "avg", "max", "avgmax", "map")


def pair(size: Size) -> tuple[int, int]:
    """Height and width.

    Example:
        >>> pair(4)
        (4, 4)
    """
    return (size, size) if isinstance(size, int) else size


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The fields of Hugging Face's `config.json` that ViT and BEiT share, and in `other` those that nothing depends on.

    Raises:
        ConversionError: names every field that the module does not compute.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3
    initializer_range: float = 0.02
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        problems = self.problems()
        if problems:
            kind = type(self).__name__.removesuffix("Config")
            raise ConversionError(f"this {kind} configuration is not supported:", problems)

    def problems(self) -> list[str]:
        """A line for each field that the module does not compute."""
        from converters.activations import ACTIVATIONS

        found = []
        if self.hidden_act not in ACTIVATIONS:
            found.append(f"hidden_act is {self.hidden_act!r}, known are {', '.join(ACTIVATIONS)}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            found.append(f"the heads do not divide the hidden size: {sizes}")
        return found

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and along the width."""
        (height, width), patch = pair(self.image_size), pair(self.patch_size)
        return height // patch[0], width // patch[1]

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.num_hidden_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]):
        """Reads the contents of a `config.json`."""
        rest = dict(config)
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "other"}
        fields = {name: rest.pop(name) for name in known & rest.keys()}
        for name in ("image_size", "patch_size"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return cls(**fields, labels=class_names.taken(rest), other=rest)

    def to_dict(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        names, other = fields.pop("labels"), fields.pop("other")
        return {**other, **fields, **class_names.told(names)}


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """A Vision Transformer. The fields from `add_pooling_layer` on are not in Hugging Face's `config.json`.

    Attributes:
        add_pooling_layer: whether `ViTModel` has a pooler.
        global_pool: what the classifier looks at: "token" (the class token), "avg", "max", "avgmax" (the patches; the
            last is the mean of the two before it), or "map" (attention with a learned query).
        class_token: whether there is one.
        distilled: whether there is a second token of this kind, with a classifier of its own (DeiT).
        reg_tokens: number of register tokens.
        no_embed_class: the tokens before the patches have no position embedding.
        patch_bias: whether the patches' projection has a bias.
        pre_norm: a normalisation before the layers.
        final_norm: a normalisation after the layers.
        fc_norm: a normalisation after pooling.
        layer_scale: learned factors of what each half of a layer adds.
        qk_norm: normalisations of queries and keys, head by head.
        representation_size: width of a layer with tanh before the classifier; None for none.

    Example:
        >>> ViTConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4}).hidden_size
        64
    """

    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    add_pooling_layer: bool = True
    global_pool: str = "token"
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    layer_scale: bool = False
    qk_norm: bool = False
    representation_size: int | None = None

    def problems(self) -> list[str]:
        from converters.activations import ACTIVATIONS

        found = super().problems()
        if self.pooler_act not in ACTIVATIONS:
            found.append(f"pooler_act is {self.pooler_act!r}, known are {', '.join(ACTIVATIONS)}")
        if self.global_pool not in POOLS:
            found.append(f"global_pool is {self.global_pool!r}, known are {', '.join(POOLS)}")
        if self.global_pool == "token" and not self.class_token:
            found.append("global_pool is 'token', and there is no class token")
        if self.distilled and (self.global_pool != "token" or self.fc_norm or self.representation_size):
            found.append("distilled: the two classifiers look at their tokens, and at nothing else")
        return found

    @property
    def key_bias(self) -> bool:
        """Whether the projection of keys has a bias; BEiT's has none where that of queries has one."""
        return self.qkv_bias

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.distilled + self.reg_tokens

    def to_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in OWN_DEFAULTS.items() if getattr(self, name) == value}
        fields = {name: value for name, value in super().to_dict().items() if name not in own}
        return {"architectures": ["ViTForImageClassification"], "model_type": "vit", **fields}


# What transformers' ViT does not have, as it is there.
OWN_DEFAULTS: Mapping[str, Any] = {
    name: field.default
    for fields in [ViTConfig.__dataclass_fields__]
    for name, field in list(fields.items())[list(fields).index("add_pooling_layer") :]
}
