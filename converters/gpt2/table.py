"""The tables of GPT-2: PyTorch's names, those of transformers 4's Flax trees, and how the weights lie on a mesh."""

import re
from collections.abc import Callable

import numpy as np

from converters.gpt2.config import GPT2Config
from converters.mapping import Row, Transform, linear, norm

# Widths are cut and the vocabulary is not: its size is seldom a multiple of anything. The fused projection is cut
# across query, key and value, which costs an exchange in each layer.
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"wte/embedding", (None, "model")),
    (r"(c_attn|c_fc)/kernel", (None, "model")),
    (r"(c_attn|c_fc)/bias", ("model",)),
    (r"c_proj/kernel", ("model", None)),
    (r"lm_head/kernel", ("model", None)),
)


def table(config: GPT2Config, architecture: str) -> list[Row]:
    """Rows between PyTorch's names, as transformers writes them, and the module's paths.

    Example:
        >>> table(GPT2Config(), "GPT2ForSequenceClassification")[-1].flax
        'score/kernel'
    """
    torch, flax = _prefixes(architecture)
    block, path = f"{torch}h.{{i}}.", f"{flax}h/{{i}}/"
    rows = [Row(f"{torch}{{e:wte|wpe}}.weight", f"{flax}{{e:wte|wpe}}/embedding")]
    for part, layers in (("attn", "{p:c_attn|c_proj}"), ("mlp", "{p:c_fc|c_proj}")):
        old, new = f"{block}{part}.{layers}", f"{path}{part}/{layers}"
        rows += [Row(f"{old}.weight", f"{new}/kernel"), Row(f"{old}.bias", f"{new}/bias")]
    rows += norm(f"{block}ln_{{n:1|2}}", f"{path}ln_{{n:1|2}}") + norm(f"{torch}ln_f", f"{flax}ln_f")
    if architecture == "GPT2LMHeadModel" and not config.tie_word_embeddings:
        rows.append(Row("lm_head.weight", "lm_head/kernel", Transform.LINEAR))
    if architecture == "GPT2ForSequenceClassification":
        rows.append(Row("score.weight", "score/kernel", Transform.LINEAR))
    if architecture == "GPT2ForTokenClassification":
        rows += linear("classifier", "classifier")
    return rows


def flax_table(config: GPT2Config, architecture: str) -> list[Row]:
    """Rows between the tree of transformers 4 (FlaxGPT2Model, FlaxGPT2LMHeadModel) and the module's paths.

    The names are the same. nnx.Linear keeps the kernels of the blocks (in, out), as PyTorch's Conv1D keeps its weight,
    but FlaxConv1D keeps them (out, in).

    Example:
        >>> [row.transform.name for row in flax_table(GPT2Config(), "GPT2Model") if "mlp" in row.flax]
        ['LINEAR', 'IDENTITY']
    """
    paths = [str(row.flax) for row in table(config, architecture)]
    turned = re.compile("(attn|mlp)/.*kernel")
    return [Row(path, path, Transform.LINEAR if turned.search(path) else Transform.IDENTITY) for path in paths]


def _prefixes(architecture: str) -> tuple[str, str]:
    """What stands before the names of the bare model: PyTorch's and Flax's."""
    return ("", "") if architecture == "GPT2Model" else ("transformer.", "transformer/")


def aliases(architecture: str) -> list[tuple[str, str]]:
    """Checkpoints of a bare model open in a model with a head, and the other way round."""
    if _prefixes(architecture)[0]:
        return [(r"^(?=(wte|wpe|h|ln_f)\.)", "transformer.")]
    return [(r"^transformer\.", "")]


def tied(config: GPT2Config, architecture: str) -> dict[str, str]:
    """The output weights are the token embedding, unless `tie_word_embeddings` is false."""
    ties = architecture == "GPT2LMHeadModel" and config.tie_word_embeddings
    return {"lm_head.weight": "transformer.wte.weight"} if ties else {}


def buffers(config: GPT2Config, architecture: str) -> dict[str, Callable]:
    """The causal mask and the number for what it hides, which transformers below 4.28 stored in every layer."""
    attention = re.escape(_prefixes(architecture)[0]) + r"h\.\d+\.attn\."
    places = config.n_positions
    return {
        attention + "bias": lambda match: np.tril(np.ones((places, places), np.bool_))[None, None],
        attention + "masked_bias": lambda match: np.array(-1e4, np.float32),
    }
