"""CLIP (Hugging Face, and the layout of OpenAI and OpenCLIP): both towers, alone, together, and as a classifier."""

from converters.clip.config import CLIPConfig as Config
from converters.clip.config import TextConfig, VisionConfig, configure
from converters.clip.model import MODELS, Features, Similarity
from converters.clip.table import SHARDING, aliases, buffers, table

__all__ = [
    "MODELS",
    "SHARDING",
    "Config",
    "Features",
    "Similarity",
    "TextConfig",
    "VisionConfig",
    "aliases",
    "buffers",
    "configure",
    "table",
]
