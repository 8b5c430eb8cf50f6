"""PyTorch weight layouts to Flax pytrees and back, one table a model family, used in both directions.

    module, params = converters.load("a-hugging-face-directory")
    converters.save("another-directory", module)

Importing this package imports neither jax nor flax nor torch.
"""

from converters.errors import ConversionError
from converters.files import read_tensors
from converters.loading import load, read_config
from converters.mapping import Row, Transform, fused, layout, to_flax, to_torch
from converters.saving import convert, save
from converters.sharding import partition_specs, shard

__all__ = [
    "ConversionError",
    "Row",
    "Transform",
    "convert",
    "fused",
    "layout",
    "load",
    "partition_specs",
    "read_config",
    "read_tensors",
    "save",
    "shard",
    "to_flax",
    "to_torch",
]
