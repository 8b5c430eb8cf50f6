"""Which tensors of a Hugging Face directory are one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tadrop_jax.checkpoints.safetensors.source import Source

# transformers ties these to the input embedding. The first target that a checkpoint stores is the one kept.
_TARGETS = (
    "shared.weight",
    "model.shared.weight",
    "transformer.wte.weight",
    "wte.weight",
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight",
    "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
)
_ALIASES = (
    "lm_head.weight",
    "embed_out.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
)
_TIED_BY_DEFAULT = {"gpt2"}
_BLOCK = 1 << 22


def tied_aliases(source: Source, config: Mapping[str, Any] | None) -> dict[str, str]:
    """Finds the tensors that are a second copy of the input embedding.

    Args:
        source: an open checkpoint.
        config: its `config.json`. Embeddings are tied when `tie_word_embeddings` is true there, or absent for
            a `model_type` whose default it is (GPT-2).

    Returns:
        alias -> target, for every alias that is stored with the target's dtype, shape and bytes. Copies that
        differ are two tensors, whatever the configuration says.
    """
    config = config or {}
    if not config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT):
        return {}
    target = next((name for name in _TARGETS if name in source.tensors), None)
    if target is None:
        return {}
    return {name: target for name in _ALIASES if name != target and _equal(source, name, target)}


def _equal(source: Source, name: str, other: str) -> bool:
    if name not in source.tensors:
        return False
    a, b = source.tensors[name], source.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    for start in range(0, a.size, _BLOCK):
        stop = min(start + _BLOCK, a.size)
        ours, theirs = (source.read(tensor, start, stop).view(np.uint8) for tensor in (name, other))
        if not np.array_equal(ours, theirs):
            return False
    return True
