"""The tables of the Vision Transformer, as transformers names it, and how the weights lie on a mesh.

The Flax paths are those of FlaxViTModel and FlaxViTForImageClassification in transformers 4.
"""

import re
from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.mapping import Row, conv, linear, norm
from converters.vit.config import OWN_DEFAULTS, ViTConfig

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value|fc1|intermediate/dense)/kernel", (None, "model")),
    (r"(query|key|value|fc1|intermediate/dense)/bias", ("model",)),
    (r"(output/dense|out|fc2|classifier|classifier_dist)/kernel", ("model", None)),
)

# What transformers 5 calls otherwise in its modules than in its files.
_LAYERS = r"(^|\.)layers\.(\d+)\."
_NEW = {
    **{rf"attention\.{p[0]}_proj\.": f"attention.attention.{p}." for p in ("query", "key", "value")},
    r"attention\.o_proj\.": "attention.output.dense.",
    r"mlp\.fc1\.": "intermediate.dense.",
    r"mlp\.fc2\.": "output.dense.",
    "relative_position_bias": "attention.attention.relative_position_bias",
    "": "",
}
_TOKENS = "{e:cls_token|mask_token|position_embeddings}"
_PROJECTIONS = "{p:query|key|value}"
NEW_NAMES = [(_LAYERS + new, rf"\1encoder.layer.\2.{old}") for new, old in _NEW.items()]


def table(config: ViTConfig, architecture: str) -> list[Row]:
    """Rows between an architecture's names and its module's paths.

    Raises:
        ConversionError: the configuration has what the architecture cannot hold.

    Example:
        >>> table(ViTConfig(), "ViTModel")[-1].torch
        'pooler.dense.bias'
    """
    needs_own(config, architecture, allowed=("add_pooling_layer",))
    if architecture == "ViTModel":
        pooler = linear("pooler.dense", "pooler/dense") if config.add_pooling_layer else []
        return [*backbone("", ""), *pooler]
    return [*backbone("vit.", "vit/"), *(linear("classifier", "classifier") if config.labels else [])]


def needs_own(config: ViTConfig, architecture: str, allowed: tuple[str, ...]) -> None:
    """Refuses a configuration that an architecture cannot hold.

    Args:
        config: the configuration.
        architecture: its name, for the message.
        allowed: those of the fields that transformers' ViT does not have which the architecture has.

    Raises:
        ConversionError: another one of these is not as it is in transformers.
    """
    problems = [
        f"{name} is {getattr(config, name)!r}, there it is always {value!r}"
        for name, value in OWN_DEFAULTS.items()
        if name not in allowed and getattr(config, name) != value
    ]
    if problems:
        raise ConversionError(f"{architecture} cannot hold this ViT:", problems)


def backbone(torch: str, flax: str) -> list[Row]:
    """Rows of embeddings and layers, which BEiT has too."""
    layer, path = f"{torch}encoder.layer.{{i}}.", f"{flax}encoder/layer/{{i}}/"
    rows = [
        Row(f"{torch}embeddings.{_TOKENS}", f"{flax}embeddings/{_TOKENS}"),
        *conv(f"{torch}embeddings.patch_embeddings.projection", f"{flax}embeddings/patch_embeddings/projection"),
        *norm(f"{layer}layernorm_{{at:before|after}}", f"{path}layernorm_{{at:before|after}}"),
        *linear(f"{layer}attention.attention.{_PROJECTIONS}", f"{path}attention/attention/{_PROJECTIONS}"),
    ]
    for part in ("attention.output.dense", "intermediate.dense", "output.dense"):
        rows += linear(f"{layer}{part}", path + part.replace(".", "/"))
    return rows + norm(f"{torch}layernorm", f"{flax}layernorm")


def aliases(architecture: str) -> list[tuple[str, str]]:
    """The names of transformers 5's `state_dict()`; and those of a bare model in one with a head, or the other way."""
    if architecture in ("vit_jax/ViT", "big_vision/ViT"):
        return [("^opt/target/", "")]
    if "/" in architecture:
        return []
    if architecture == "ViTModel":
        return [(r"^vit\.", ""), *NEW_NAMES]
    return [(r"^(?=(embeddings|encoder|layers|layernorm)\.)", "vit."), *NEW_NAMES]


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> ViTConfig:
    """A configuration from a `config.json`, which has to be there: no tensor's shape tells the number of heads.

    Raises:
        ConversionError: it is not there, or is of another kind of model.
    """
    if not raw:
        raise ConversionError(
            f"{architecture}: the tensors do not tell the number of heads; put config.json beside them"
        )
    if raw.get("model_type", "vit") != "vit":
        raise ConversionError(f"{architecture}: model_type is {raw['model_type']!r}, must be 'vit'")
    pooler = any(re.match(r"(vit\.)?pooler[./]dense", name) for name in shapes)
    return ViTConfig.from_dict(
        dict(raw) | ({} if pooler or architecture != "ViTModel" else {"add_pooling_layer": False})
    )


def describe(config: ViTConfig, architecture: str) -> dict[str, Any]:
    """The `config.json` of transformers."""
    raw = {name: value for name, value in config.to_dict().items() if name not in {*OWN_DEFAULTS, "timm"}}
    return raw | {"architectures": [architecture], "model_type": "vit"}
