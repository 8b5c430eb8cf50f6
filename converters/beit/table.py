"""The table of BEiT, as transformers' `save_pretrained` names it; the paths are those of FlaxBeit* (transformers 4)."""

import re
from collections.abc import Callable

from converters.beit.config import BeitConfig
from converters.beit.positions import relative_position_index
from converters.mapping import Row, linear, norm
from converters.vit.table import NEW_NAMES, backbone
from converters.vit.table import SHARDING as _VIT_SHARDING

SHARDING = (*_VIT_SHARDING, (r"lm_head/kernel", ("model", None)))
_TABLE = "relative_position_bias.relative_position_bias_table"


def table(config: BeitConfig, architecture: str) -> list[Row]:
    """Rows between an architecture's names and its module's paths.

    Example:
        >>> table(BeitConfig(), "BeitForMaskedImageModeling")[-1].torch
        'lm_head.bias'
    """
    torch, flax = _prefixes(architecture)
    rows = backbone(torch, flax) + norm(f"{torch}pooler.layernorm", f"{flax}pooler/layernorm")
    for place in ("encoder.layer.{i}.attention.attention.", "encoder."):
        rows.append(Row(f"{torch}{place}{_TABLE}", flax + f"{place}{_TABLE}".replace(".", "/")))
    rows.append(Row(f"{torch}encoder.layer.{{i}}.lambda_{{n:1|2}}", f"{flax}encoder/layer/{{i}}/lambda_{{n:1|2}}"))
    if architecture == "BeitForImageClassification" and config.labels:
        rows += linear("classifier", "classifier")
    if architecture == "BeitForMaskedImageModeling":
        rows += norm("layernorm", "layernorm") + linear("lm_head", "lm_head")
    return rows


def _prefixes(architecture: str) -> tuple[str, str]:
    """What stands before the names of the bare model: PyTorch's and Flax's."""
    return ("", "") if architecture == "BeitModel" else ("beit.", "beit/")


def aliases(architecture: str) -> list[tuple[str, str]]:
    """The names of transformers 5's `state_dict()`; and those of a bare model in one with a head, or the other way."""
    new = [*NEW_NAMES, (r"(^|\.)shared_position_bias\.", r"\1encoder.relative_position_bias.")]
    if architecture == "BeitModel":
        return [(r"^beit\.", ""), *new]
    return [(r"^(?=(embeddings|encoder|layers|shared_position_bias|pooler)\.)", "beit."), *new]


def buffers(config: BeitConfig, architecture: str) -> dict[str, Callable]:
    """The numbers of the relative positions, which transformers 4 stored beside each table."""
    prefix = re.escape(_prefixes(architecture)[0])
    places = (r"encoder\.layer\.\d+\.attention\.attention\.", r"encoder\.")
    name = r"relative_position_bias\.relative_position_index"
    return {prefix + place + name: lambda match: relative_position_index(*config.grid) for place in places}
