"""GPT-2 (Hugging Face): the bare model, the language model, and classifiers of sequences and of tokens."""

from converters.gpt2.config import GPT2Config as Config
from converters.gpt2.config import configure
from converters.gpt2.generation import filter_logits, generate
from converters.gpt2.model import MODELS, Cache, empty_cache
from converters.gpt2.table import SHARDING, aliases, buffers, flax_table, table, tied

__all__ = [
    "MODELS",
    "SHARDING",
    "Cache",
    "Config",
    "aliases",
    "buffers",
    "configure",
    "empty_cache",
    "filter_logits",
    "flax_table",
    "generate",
    "table",
    "tied",
]
