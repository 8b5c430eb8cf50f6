"""Vision Transformers of Hugging Face: `ViTModel` and `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.vit.config import ViTConfig as Config
from converters.vit.model import Features, ViTForImageClassification, ViTModel
from converters.vit.table import SHARDING, aliases, described, table

MODELS = {"ViTModel": ViTModel, "ViTForImageClassification": ViTForImageClassification}

__all__ = [
    "MODELS",
    "SHARDING",
    "Config",
    "Features",
    "ViTForImageClassification",
    "ViTModel",
    "aliases",
    "configure",
    "describe",
    "table",
]


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> Config:
    """The configuration of a checkpoint. That of Hugging Face has to be there: no shape tells the number of heads.

    Raises:
        ConversionError: it is not there, or is of another kind of model.
    """
    if not raw:
        raise ConversionError(
            f"{architecture}: the tensors do not tell the number of heads; put config.json beside them"
        )
    if raw.get("model_type", "vit") != "vit":
        raise ConversionError(f"{architecture}: model_type is {raw['model_type']!r}, must be 'vit'")
    pooler = any(name.endswith("pooler.dense.weight") or name.startswith("pooler/") for name in shapes)
    return Config.from_dict(dict(raw) | ({} if pooler or architecture != "ViTModel" else {"add_pooling_layer": False}))


def describe(config: Config, architecture: str) -> dict[str, Any]:
    """The contents of `config.json`."""
    return described(config, architecture)
