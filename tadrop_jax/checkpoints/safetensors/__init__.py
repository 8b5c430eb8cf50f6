"""safetensors files and Hugging Face directories of them: blocks in, blocks out. Imports no jax.

Reading is `open_source`, writing `open_sink`; both move flat blocks of one tensor at a time, from any thread.
"""

from tadrop_jax.checkpoints.safetensors.huggingface import tied_aliases
from tadrop_jax.checkpoints.safetensors.sink import Sink, check_beside, check_directory, count_shards, open_sink
from tadrop_jax.checkpoints.safetensors.source import Source, TensorInfo, open_source

__all__ = [
    "Sink",
    "Source",
    "TensorInfo",
    "check_beside",
    "check_directory",
    "count_shards",
    "open_sink",
    "open_source",
    "tied_aliases",
]
