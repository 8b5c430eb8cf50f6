"""Vision Transformers: `ViTModel` and `ViTForImageClassification` of Hugging Face, those of timm, Google's `.npz`."""

from collections.abc import Mapping
from typing import Any

from converters.mapping import Row
from converters.vit import google, timm
from converters.vit import table as hugging_face
from converters.vit.config import ViTConfig as Config
from converters.vit.model import Features, ViTForImageClassification, ViTModel
from converters.vit.table import SHARDING, aliases

MODELS = {
    "ViTModel": ViTModel,
    "ViTForImageClassification": ViTForImageClassification,
    "timm/VisionTransformer": ViTForImageClassification,
    "timm/VisionTransformerDistilled": ViTForImageClassification,
    "vit_jax/ViT": ViTForImageClassification,
    "big_vision/ViT": ViTForImageClassification,
}

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

_LAYOUTS: Mapping[str, Any] = {"timm": timm, "vit_jax": google, "big_vision": google}


def _of(architecture: str) -> Any:
    """The module with a layout's table and configuration."""
    return _LAYOUTS.get(architecture.rpartition("/")[0], hugging_face)


def table(config: Config, architecture: str) -> list[Row]:
    """Rows between an architecture's names and its module's paths.

    Raises:
        ConversionError: the configuration has what the architecture cannot hold.

    Example:
        >>> table(Config(), "ViTModel")[-1].torch
        'pooler.dense.bias'
    """
    return _of(architecture).table(config, architecture)


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> Config:
    """The configuration of a checkpoint, from its `config.json` and the shapes of its tensors.

    Raises:
        ConversionError: they do not tell it, or it is of another kind of model.
    """
    if "hidden_size" in raw:  # written by us, or by Hugging Face
        return hugging_face.configure(raw, shapes, architecture)
    return _of(architecture).configure(raw, shapes, architecture)


def describe(config: Config, architecture: str) -> dict[str, Any]:
    """The contents of `config.json`."""
    return _of(architecture).describe(config, architecture)
