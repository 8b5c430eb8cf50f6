"""Vision Transformer image classifiers (`ViTForImageClassification` of Hugging Face)."""

from converters.vit.model import ViTConfig as Config
from converters.vit.model import ViTForImageClassification
from converters.vit.table import table

MODELS = {"ViTForImageClassification": ViTForImageClassification}

__all__ = ["MODELS", "Config", "table"]
