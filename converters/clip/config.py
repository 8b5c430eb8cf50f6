"""Configurations of CLIP: those of Hugging Face, and what the shapes of an OpenAI or OpenCLIP checkpoint tell."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters import class_names
from converters.errors import ConversionError, advice


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """A transformer of CLIP: what both towers have.

    Attributes:
        other: fields that the computation does not depend on.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, kw_only=True)

    def __post_init__(self):
        from converters.activations import ACTIVATIONS

        problems = []
        if self.hidden_act not in ACTIVATIONS:
            problems.append(f"hidden_act is {self.hidden_act!r}, known are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            problems.append(f"the heads do not divide the hidden size: {sizes}")
        if problems:
            raise ConversionError("this CLIP configuration is not supported:", problems)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]):
        """Reads one tower's part of a `config.json`."""
        known = {f.name for f in dataclasses.fields(cls)} - {"other"}
        return cls(
            **{name: value for name, value in config.items() if name in known},
            other={name: value for name, value in config.items() if name not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives one tower's part of a `config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields.pop("other") | fields


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower. An `eos_token_id` of 2 means that the largest token ends a text, as in OpenAI's code."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The vision tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512

    @property
    def positions(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """One tower, or both; the fields of Hugging Face's `config.json` that the computation depends on.

    Example:
        >>> CLIPConfig.from_dict({"model_type": "clip_vision_model", "hidden_size": 24}).vision.hidden_size
        24
    """

    text: TextConfig | None = None
    vision: VisionConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def depth(self) -> int:
        """Number of layers, of both towers together."""
        return sum(tower.num_hidden_layers for tower in (self.text, self.vision) if tower is not None)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Reads the contents of a `config.json`: of both towers, or of one."""
        named = "".join(config.get("architectures") or ())
        alone = "" if "text_config" in config or "vision_config" in config else str(config.get("model_type"))
        if alone == "clip_vision_model" or (alone and "Vision" in named):
            return cls(vision=VisionConfig.from_dict(config))
        if alone == "clip_text_model" or (alone and "Text" in named):
            return cls(text=TextConfig.from_dict(config))
        # transformers 4 wrote what differs from the defaults into *_config_dict as well, which wins.
        text, vision = (
            dict(config.get(f"{part}_config") or {}) | dict(config.get(f"{part}_config_dict") or {})
            for part in ("text", "vision")
        )
        rest = {
            name: value
            for name, value in config.items()
            if name not in ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
        }
        fields = {name: rest.pop(name) for name in ("projection_dim", "logit_scale_init_value") if name in rest}
        rest["id2label"] = rest.get("id2label") or None  # a CLIP without classes has none, and takes no head
        towers = {"text": TextConfig.from_dict(text), "vision": VisionConfig.from_dict(vision)}
        return cls(**towers, **fields, labels=class_names.taken(rest), other=rest)

    def to_dict(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads."""
        if self.vision is None or self.text is None:
            tower = self.vision or self.text
            kind = "clip_text_model" if self.vision is None else "clip_vision_model"
            return {"model_type": kind, **(tower.to_dict() if tower else {})}
        return {
            "model_type": "clip",
            **self.other,
            "text_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            **class_names.told(self.labels),
        }


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> CLIPConfig:
    """The configuration of a checkpoint; OpenAI's have none, and their shapes tell it (`clip/model.py`, `build_model`).

    There heads are 64 wide, the activation is quick_gelu, and a text ends at its largest token. OpenCLIP's later models
    use gelu, which their weights do not tell: what `config=` or a `config.json` says goes before the shapes.

    Raises:
        ConversionError: the vision tower is a ResNet, tensors that tell a size are missing, or nothing tells the number
            of heads.
    """
    if not architecture.startswith("openai/"):
        return CLIPConfig.from_dict(raw)
    needed = ("visual.conv1.weight", "visual.proj", "positional_embedding", "token_embedding.weight", "text_projection")
    absent = [name for name in needed if name not in shapes]
    if absent:
        if "text_config" in raw and "vision_config" in raw:
            return CLIPConfig.from_dict(raw)  # the table tells what is missing
        raise ConversionError("not a CLIP of two transformers:", [f"missing: {name}" for name in absent])
    width, channels, patch, _ = shapes["visual.conv1.weight"]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    context, text_width = shapes["positional_embedding"]
    dim = shapes["text_projection"][1]

    def tower(part: str, width: int, prefix: str) -> dict[str, Any]:
        given = dict(raw.get(f"{part}_config") or {})
        if width % 64 and "num_attention_heads" not in given:
            raise ConversionError(
                f"the shapes do not tell how many heads a tower of width {width} has: "
                + advice(f'{{"{part}_config": {{"num_attention_heads": N}}}}')
            )
        return {
            "hidden_size": width,
            "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
            "num_hidden_layers": sum(
                n.startswith(f"{prefix}transformer.") and n.endswith(".ln_1.weight") for n in shapes
            ),
            "num_attention_heads": width // 64,
            "projection_dim": dim,
        } | given

    text = {"vocab_size": shapes["token_embedding.weight"][0], "max_position_embeddings": context, "eos_token_id": 2}
    vision = {"num_channels": channels, "image_size": side * patch, "patch_size": patch}
    described = {
        "text_config": text | tower("text", text_width, ""),
        "vision_config": vision | tower("vision", width, "visual."),
    }
    return CLIPConfig.from_dict({"projection_dim": dim} | dict(raw) | described)
