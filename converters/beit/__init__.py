"""BEiT (Hugging Face, arXiv 2106.08254): features of images, classifier, model for masked images."""

from converters.beit.config import BeitConfig as Config
from converters.beit.config import configure, describe
from converters.beit.model import MODELS
from converters.beit.table import SHARDING, aliases, buffers, table
from converters.vit.model import Features

__all__ = ["MODELS", "SHARDING", "Config", "Features", "aliases", "buffers", "configure", "describe", "table"]
