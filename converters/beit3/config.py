"""The configuration of BEiT3, in the names of torchscale's EncoderConfig, and what shapes tell where there is none."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError, advice

# What torchscale can do and BEiT3 does not: a value other than this one is refused.
_FIXED = {
    "multiway": True,
    "encoder_normalize_before": True,
    "deepnorm": False,
    "layernorm_embedding": False,
    "no_scale_embedding": True,
    "xpos_rel_pos": False,
    "rel_pos_buckets": 0,
    "moe_freq": 0,
    "no_output_layer": True,
}


@dataclasses.dataclass(frozen=True)
class BEiT3Config:
    """The fields that the computation depends on, and in `other` the rest.

    Attributes:
        subln: a further normalisation inside attention and feed-forward layers.
        normalize_output: the encoder's last normalisation; off for classification and question answering.
        num_classes: of heads that classify.

    Example:
        >>> BEiT3Config.from_dict({"img_size": 32, "patch_size": 8}).patches
        16
    """

    encoder_embed_dim: int = 768
    encoder_attention_heads: int = 12
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    activation_fn: str = "gelu"
    layernorm_eps: float = 1e-5
    subln: bool = True
    normalize_output: bool = True
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    vocab_size: int = 64010
    max_source_positions: int = 1024
    num_classes: int = 2
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        from converters.activations import ACTIVATIONS

        problems = [
            f"{name} is {self.other[name]!r}, BEiT3 has {value!r}"
            for name, value in _FIXED.items()
            if self.other.get(name, value) != value
        ]
        if self.activation_fn not in ACTIVATIONS:
            problems.append(f"activation_fn is {self.activation_fn!r}, known are {', '.join(ACTIVATIONS)}")
        if self.encoder_embed_dim % self.encoder_attention_heads:
            sizes = f"{self.encoder_embed_dim} and {self.encoder_attention_heads}"
            problems.append(f"the heads do not divide the width: encoder_embed_dim, encoder_attention_heads {sizes}")
        if problems:
            raise ConversionError("this BEiT3 configuration is not supported:", problems)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.encoder_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "BEiT3Config":
        """Reads the contents of a `config.json`, as :meth:`to_dict` writes it."""
        known = {f.name for f in dataclasses.fields(cls)} - {"other"}
        return cls(
            **{name: value for name, value in config.items() if name in known},
            other={name: value for name, value in config.items() if name not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives the contents of a `config.json`; torchscale itself has none."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"model_type": "beit3", **fields.pop("other"), **fields}


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> BEiT3Config:
    """The configuration of a checkpoint: what a `config.json` says, and from the shapes what it leaves open.

    Without one, heads are taken to be 64 wide, as in the base and the large model, and the activation to be gelu.

    Raises:
        ConversionError: tensors that tell a size are missing, or nothing tells the number of heads.
    """
    prefix = "" if architecture == "torchscale/BEiT3" else "beit3."
    layer = f"{prefix}encoder.layers.0."
    needed = {
        "patch": f"{prefix}vision_embed.proj.weight",
        "text": f"{prefix}text_embed.weight",
        "image": f"{prefix}encoder.embed_positions.A.weight",
        "tokens": f"{prefix}encoder.embed_positions.B.weight",
        "ffn": f"{layer}ffn.A.fc1.weight",
    }
    absent = [f"missing: {name}" for name in needed.values() if name not in shapes]
    if absent:
        if "encoder_embed_dim" in raw:
            return BEiT3Config.from_dict(raw)  # the table tells what is missing
        raise ConversionError("not a BEiT3:", absent)
    sizes = {what: shapes[name] for what, name in needed.items()}
    width, channels, patch, _ = sizes["patch"]
    head = next((shapes[n][0] for n in ("head.3.weight", "head.dense2.weight", "head.weight") if n in shapes), 2)
    told = {
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": sizes["ffn"][0],
        "encoder_layers": sum(
            n.startswith(f"{prefix}encoder.layers.") and n.endswith("ffn.A.fc1.weight") for n in shapes
        ),
        "subln": f"{layer}ffn.A.ffn_layernorm.weight" in shapes,
        "normalize_output": f"{prefix}encoder.layer_norm.A.weight" in shapes,
        "img_size": round((sizes["image"][0] - 3) ** 0.5) * patch,
        "patch_size": patch,
        "in_chans": channels,
        "vocab_size": sizes["text"][0],
        "max_source_positions": sizes["tokens"][0],
        "num_classes": head,
    }
    if "encoder_attention_heads" not in raw:
        if width % 64:
            raise ConversionError(
                f"the shapes do not tell how many heads a BEiT3 of width {width} has: "
                + advice('{"encoder_attention_heads": N}')
            )
        told["encoder_attention_heads"] = width // 64
    return BEiT3Config.from_dict(told | dict(raw))
