"""The configuration of BEiT: what `config.json` says, checked."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.vit.config import EncoderConfig, pair


@dataclasses.dataclass(frozen=True)
class BeitConfig(EncoderConfig):
    """The fields of Hugging Face's `config.json` that the computation depends on, and in `other` the rest.

    Attributes:
        add_pooling_layer: whether `BeitModel` has a pooler; `config.json` does not say it.

    Example:
        >>> BeitConfig.from_dict({"image_size": 32, "patch_size": 8}).distances
        52
    """

    vocab_size: int = 8192
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    use_mean_pooling: bool = True
    add_pooling_layer: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        height, width = pair(self.image_size)
        if self.use_absolute_position_embeddings and height != width:
            found.append(f"absolute position embeddings need square images, image_size is {self.image_size}")
        relative = self.use_relative_position_bias or self.use_shared_relative_position_bias
        if relative and len(set(pair(self.patch_size))) > 1:
            found.append(f"relative positions need square patches, patch_size is {self.patch_size}")
        return found

    # What the layers of ViT ask for.
    qkv_bias = True
    key_bias = False
    qk_norm = False

    @property
    def layer_scale(self) -> bool:
        """Whether there are factors of what each half of a layer adds."""
        return self.layer_scale_init_value > 0

    @property
    def distances(self) -> int:
        """Rows of a table of relative positions: distances of patches, and three with the class token."""
        height, width = self.grid
        return (2 * height - 1) * (2 * width - 1) + 3

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self.add_pooling_layer:
            del fields["add_pooling_layer"]
        return {"architectures": ["BeitForImageClassification"], "model_type": "beit", **fields}


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> BeitConfig:
    """A configuration from a `config.json`, which has to be there: no tensor's shape tells all of it.

    Raises:
        ConversionError: there is none, or it is of another kind of model.
    """
    if raw.get("model_type") != "beit":
        found = f"model_type is {raw.get('model_type')!r}" if raw else "there is no config.json"
        raise ConversionError(f"{architecture}: {found}; it has to be that of a BEiT")
    config = BeitConfig.from_dict(raw)
    # Without mean pooling the pooler has no weights, and takes the class token.
    pooled = any(re.match(r"(beit\.)?pooler[./]layernorm", name) for name in shapes)
    if architecture == "BeitModel" and config.use_mean_pooling and not pooled:
        return dataclasses.replace(config, add_pooling_layer=False)
    return config


def describe(config: BeitConfig, architecture: str) -> dict[str, Any]:
    """The contents of `config.json`."""
    raw = {name: value for name, value in config.to_dict().items() if name != "add_pooling_layer"}
    return raw | {"architectures": [architecture]}
