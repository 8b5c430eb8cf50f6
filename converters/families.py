"""Every supported architecture as data, and what the package of a family has to offer. Imports neither jax nor torch.

`ARCHITECTURES` is what detection, `load`, `save`, `tadrop convert` and the table in docs/converters.md go by. A name
is what `config.json` calls the architecture ("ViTForImageClassification"), or, for files whose names are someone
else's, "layout/Name" ("timm/VisionTransformer"): then `marks` tells it by the names of its tensors.

A family is a package `converters/NAME` with `model.py` (Flax NNX modules), `table.py` (rows, see
`converters.mapping`) and an `__init__.py` that offers

    Config      the configuration: `Config.from_dict(raw)` reads a config.json, `config.to_dict()` writes one,
                `config.depth` is the number of layers. What the computation does not depend on travels in it unchanged.
    MODELS      {architecture name: module class}. `MODELS[name](config, rngs=)` builds the module, which keeps the
                configuration as `.config`. Architectures of different layouts may share a class: what one reads
                another writes.
    table(config, architecture)
                the rows between the names in that architecture's files and the paths of its module.

and, where it needs them (absent means: nothing of the kind),

    aliases(architecture)
                [(pattern, replacement)]: other spellings of the names (of older and newer versions, a missing or an
                extra prefix), turned by `re.sub`, in this order, into those that the table has. What was read is
                written again with the names that its file had.
    tied(config, architecture)
                {name: name of the tensor that it is a copy of}. A copy that is stored has to hold the same bytes.
    buffers(config, architecture)
                {pattern: make}: tensors that are computed, not learned (causal masks, position numbers).
                `make(match)` gives the array for a match of the name. A buffer that is stored has to hold these values.
                Copies and buffers that a file stored are written again, in the dtype that they had.
    configure(raw, shapes, architecture)
                a Config where config.json is someone else's or absent: `raw` is its contents ({} without one), `shapes`
                the tensors' {name: shape} under the table's names. The default is `Config.from_dict(raw)`.
    describe(config, architecture)
                the contents of config.json; the default is `config.to_dict()` with `architectures` set.
    flax_table(config, architecture)
                the rows between the tree of transformers 4 (FlaxGPT2LMHeadModel, ...) and the module's own paths, where
                the two differ: '/'-joined paths stand in the place of the PyTorch names.
    SHARDING    [(pattern of a path, axis name or None for each axis)]: how the module lies on a mesh.

`tests/converters/test_families.py` checks every entry against its package.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converters.errors import ConversionError


class Architecture(NamedTuple):
    """One line of the table of supported architectures.

    Attributes:
        name: as in `config.json`, or "layout/Name".
        package: the family's package.
        head: what the module gives, in a few words.
        marks: regular expressions; files without a `config.json` that names its architecture are of this one if each
            pattern matches a tensor's name. The first entry that fits is taken: the more special ones go first.
        absent: regular expressions that no tensor's name may match.
    """

    name: str
    package: str
    head: str
    marks: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """Whose names the files have: "transformers", or what stands before the '/'."""
        return self.name.rpartition("/")[0] or "transformers"


_GPT2 = "converters.gpt2"
_GPT2_BLOCK = r"^(transformer\.)?h\.\d+\.attn\.c_attn\.weight$"
_VIT = "converters.vit"
_VIT_LAYER = r"^(vit\.)?(encoder\.layer|layers)\.0\.attention\.(attention\.query|q_proj)\.weight$"
_NOT_VIT = (r"lambda_1$", r"distillation_token$", r"^decoder\.")  # BEiT, DeiT, a model for masked images
_TIMM_BLOCK = r"^blocks\.0\.attn\.qkv\.weight$"
_GOOGLE_BLOCK = r"^(opt/target/)?Transformer/encoderblock_0/"
_BEIT = "converters.beit"
_BEIT_LAYER = r"^(beit\.)?(encoder\.layer|layers)\.0\.lambda_1$"
_CLIP = "converters.clip"
_BEIT3 = "converters.beit3"
_BEIT3_LAYER = r"(^|\.)encoder\.layers\.0\.self_attn\.q_proj\.A\.weight$"

_ALL = (
    Architecture("GPT2ForSequenceClassification", _GPT2, "class logits", (_GPT2_BLOCK, r"^score\.weight$")),
    Architecture("GPT2ForTokenClassification", _GPT2, "class logits of each token", (_GPT2_BLOCK, r"^classifier\.")),
    Architecture(
        "GPT2LMHeadModel", _GPT2, "logits of the next token; text", (_GPT2_BLOCK, r"^(transformer|lm_head)\.")
    ),
    Architecture("GPT2Model", _GPT2, "token features", (_GPT2_BLOCK,)),
    Architecture(
        "ViTForImageClassification", _VIT, "class logits", (r"^vit\.", _VIT_LAYER, r"^classifier\."), _NOT_VIT
    ),
    Architecture("ViTModel", _VIT, "features of images", (_VIT_LAYER, r"^(vit\.)?layernorm\."), _NOT_VIT),
    Architecture("timm/VisionTransformerDistilled", _VIT, "class logits", (_TIMM_BLOCK, r"^dist_token$")),
    Architecture("timm/VisionTransformer", _VIT, "class logits", (_TIMM_BLOCK, r"^patch_embed\.proj\.weight$")),
    Architecture(
        "vit_jax/ViT", _VIT, "class logits", (_GOOGLE_BLOCK + r"MultiHeadDotProductAttention_1/query/kernel$",)
    ),
    Architecture(
        "big_vision/ViT", _VIT, "class logits", (_GOOGLE_BLOCK + r"MultiHeadDotProductAttention_0/query/kernel$",)
    ),
    Architecture("BeitForMaskedImageModeling", _BEIT, "logits of visual words", (_BEIT_LAYER, r"^lm_head\.")),
    Architecture("BeitForImageClassification", _BEIT, "class logits", (_BEIT_LAYER, r"^classifier\.")),
    Architecture("BeitModel", _BEIT, "features of images", (_BEIT_LAYER,)),
    Architecture("CLIPModel", _CLIP, "similarities of texts and images"),
    Architecture("CLIPVisionModel", _CLIP, "features of images"),
    Architecture("CLIPVisionModelWithProjection", _CLIP, "embeddings of images"),
    Architecture("CLIPForImageClassification", _CLIP, "class logits"),
    Architecture("CLIPTextModel", _CLIP, "features of texts"),
    Architecture("CLIPTextModelWithProjection", _CLIP, "embeddings of texts"),
    Architecture(
        "openai/CLIP",
        _CLIP,
        "similarities of texts and images",
        marks=(r"^visual\.conv1\.weight$", r"^(text\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$"),
    ),
    Architecture("torchscale/BEiT3ForCaptioning", _BEIT3, "token logits", (_BEIT3_LAYER, r"^mlm_head\.")),
    Architecture("torchscale/BEiT3ForRetrieval", _BEIT3, "unit vectors", (_BEIT3_LAYER, r"^language_head\.")),
    Architecture("torchscale/BEiT3ForVisualReasoning", _BEIT3, "class logits", (_BEIT3_LAYER, r"^head\.dense1\.")),
    Architecture("torchscale/BEiT3ForVisualQuestionAnswering", _BEIT3, "answer logits", (_BEIT3_LAYER, r"^pooler\.")),
    Architecture("torchscale/BEiT3ForImageClassification", _BEIT3, "class logits", (_BEIT3_LAYER, r"^fc_norm\.")),
    Architecture("torchscale/BEiT3", _BEIT3, "features of images and texts", (_BEIT3_LAYER,)),
)

ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _ALL}


def architecture(name: str, where: Any = "") -> Architecture:
    """Finds an architecture by its name.

    Args:
        name: as in `ARCHITECTURES`.
        where: the file that names it, for the message.

    Raises:
        ConversionError: it is not supported; the message lists what is.

    Example:
        >>> architecture("ViTForImageClassification").package
        'converters.vit'
    """
    if name not in ARCHITECTURES:
        at = f"{where}: " if str(where) else ""
        raise ConversionError(f"{at}architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def detect(config: Mapping[str, Any], names: Iterable[str] = (), where: Any = "config.json") -> Architecture:
    """Finds the architecture of a checkpoint by its configuration, else by the names of its tensors.

    Args:
        config: the contents of `config.json`; empty where there is none.
        names: the tensors' names.
        where: the file, for the message.

    Raises:
        ConversionError: the architecture is not supported, or cannot be told.

    Example:
        >>> detect({"architectures": ["ViTForImageClassification"]}).head
        'class logits'
    """
    given = config.get("architectures")
    if given:
        return architecture(given[0], where)
    names = list(names)
    for entry in ARCHITECTURES.values():
        if entry.marks and _fits(entry, names):
            return entry
    said = "is missing (tadrop convert takes --config FILE)"
    if config:
        kind = config.get("model_type")
        said = "names no architecture" if kind is None else f"model_type {kind!r} is not supported"
    known = ", ".join(ARCHITECTURES)
    raise ConversionError(
        f"{where}: {said}, and the tensors' names do not tell the architecture; supported are {known}"
    )


def _fits(entry: Architecture, names: list[str]) -> bool:
    def found(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    return all(found(p) for p in entry.marks) and not any(found(p) for p in entry.absent)


def package_of(entry: Architecture) -> Any:
    """Imports the package of an architecture's family (and with it jax and flax)."""
    return importlib.import_module(entry.package)


def module_of(entry: Architecture) -> Any:
    """The class of an architecture's module."""
    return package_of(entry).MODELS[entry.name]


def counterpart(entry: Architecture) -> Architecture:
    """The architecture of transformers with the module of another layout.

    Raises:
        ConversionError: there is none.
    """
    for other in ARCHITECTURES.values():
        same = other.package == entry.package and module_of(other) is module_of(entry)
        if same and other.layout == "transformers":
            return other
    raise ConversionError(f"pass architecture=: none of transformers has the module of {entry.name}")


def offered(package: Any, what: str, default: Any, *arguments: Any) -> Any:
    """Calls an optional function of a family's package; the default where the package has none."""
    function = getattr(package, what, None)
    return default if function is None else function(*arguments)


def architecture_of(model: Any, config: Any = None) -> Architecture:
    """Finds the architecture of a module, or of a configuration with bare parameters.

    A module that was loaded knows which it is (`module.origin`). Otherwise it is the first entry with its class; for
    bare parameters the one that the configuration names, or else the first to whose paths theirs are nearest.

    Raises:
        ConversionError: it is none of ours, or there are several and nothing tells which.
    """
    origin = getattr(model, "origin", None)
    if origin is not None:
        return architecture(origin.architecture)
    for kind in type(model).__mro__:
        package = kind.__module__.rpartition(".")[0]
        for entry in ARCHITECTURES.values():
            if entry.package == package and module_of(entry) is kind:
                return entry
    named = (getattr(config, "other", None) or {}).get("architectures")
    if named:
        return architecture(named[0])
    package = type(config).__module__.rpartition(".")[0]
    entries = [entry for entry in ARCHITECTURES.values() if entry.package == package]
    if len(entries) == 1:
        return entries[0]
    distances = [_distance(entry, model, config) for entry in entries]
    if entries and min(distances) < 0.5:
        return entries[distances.index(min(distances))]
    said = ", ".join(entry.name for entry in entries) or "none"
    raise ConversionError(f"pass architecture= with bare parameters: those with this configuration are {said}")


def _distance(entry: Architecture, model: Any, config: Any) -> float:
    """The share of paths that parameters and an architecture's module do not have in common."""
    from converters.loading import abstract
    from converters.mapping import flatten

    try:
        package_of(entry).table(config, entry.name)
        wanted = flatten(abstract(package_of(entry), config, entry)).keys()
    except ConversionError:  # the configuration is of another architecture of the package
        return 1.0
    paths = flatten(model).keys()
    return len(paths ^ wanted) / len(paths | wanted)
