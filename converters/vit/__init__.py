"""Vision Transformer image classifiers (`ViTForImageClassification` of Hugging Face)."""

from converters.vit.model import ViTConfig as Config
from converters.vit.model import ViTForImageClassification as Model
from converters.vit.table import TABLE

__all__ = ["TABLE", "Config", "Model"]
