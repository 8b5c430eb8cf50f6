"""BEiT3 (torchscale, microsoft/unilm): the multiway encoder and its heads."""

from converters.beit3.config import BEiT3Config as Config
from converters.beit3.config import configure
from converters.beit3.model import MODELS, Embeddings, Encoded
from converters.beit3.positions import resize_positions
from converters.beit3.table import SHARDING, aliases, table

__all__ = [
    "MODELS",
    "SHARDING",
    "Config",
    "Embeddings",
    "Encoded",
    "aliases",
    "configure",
    "resize_positions",
    "table",
]
