"""Google's Vision Transformers in `.npz`: the trees of google-research/vision_transformer and of big_vision.

Their kernels of attention have an axis for the heads, which the module has not. Their gelu is the one by tanh, where
transformers' and timm's copies of the same weights take the exact one: `config={"hidden_act": "gelu"}` does as these.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.mapping import Row
from converters.vit.config import ViTConfig
from converters.vit.table import needs_own
from converters.vit.timm import places

# Flax numbers what has no name: attention, second normalisation and feed-forward layer of a block.
_NUMBERS = {"vit_jax/ViT": (1, 2, 3), "big_vision/ViT": (0, 1, 0)}
_POSITIONS = {"vit_jax/ViT": "Transformer/posembed_input/pos_embedding", "big_vision/ViT": "pos_embedding"}
_HOLDS = ("global_pool", "class_token", "no_embed_class", "representation_size", "add_pooling_layer")


def table(config: ViTConfig, architecture: str) -> list[Row]:
    """Rows between Google's names and the module's paths.

    Raises:
        ConversionError: the configuration has what the architecture cannot hold.

    Example:
        >>> table(ViTConfig(), "vit_jax/ViT")[-1].torch
        'head/{p:kernel|bias}'
    """
    needs_own(config, architecture, allowed=_HOLDS)
    of_big_vision = architecture == "big_vision/ViT"
    if config.class_token and config.no_embed_class != of_big_vision:
        raise ConversionError(f"{architecture} cannot hold this ViT:", [f"no_embed_class is {not of_big_vision}"])
    attention, second, mlp = _NUMBERS[architecture]
    block, path = "Transformer/encoderblock_{i}/", "vit/encoder/layer/{i}/"
    rows = [
        Row("cls", "vit/embeddings/cls_token"),
        _same("embedding", "vit/embeddings/patch_embeddings/projection"),
        Row(_POSITIONS[architecture], "vit/embeddings/position_embeddings"),
        _norm(f"{block}LayerNorm_0", f"{path}layernorm_before"),
        *_attention(
            config,
            f"{block}MultiHeadDotProductAttention_{attention}",
            f"{path}attention/attention",
            f"{path}attention/output/dense",
        ),
        _norm(f"{block}LayerNorm_{second}", f"{path}layernorm_after"),
        _same(f"{block}MlpBlock_{mlp}/Dense_0", f"{path}intermediate/dense"),
        _same(f"{block}MlpBlock_{mlp}/Dense_1", f"{path}output/dense"),
        _norm("Transformer/encoder_norm", "vit/layernorm"),
    ]
    if config.global_pool == "map":
        rows += [
            Row("MAPHead_0/probe", "attn_pool/probe"),
            *_attention(config, "MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool", "attn_pool/out"),
            _norm("MAPHead_0/LayerNorm_0", "attn_pool/layernorm"),
            _same("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool/fc1"),
            _same("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool/fc2"),
        ]
    return [*rows, _same("pre_logits", "pre_logits"), _same("head", "classifier")]


def _same(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}/{{p:kernel|bias}}", f"{ours}/{{p:kernel|bias}}")


def _norm(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}/{{p:scale|bias}}", f"{ours}/{{p:scale|bias}}")


def _attention(config: ViTConfig, theirs: str, ours: str, out: str) -> list[Row]:
    size, heads = config.hidden_size, config.num_attention_heads
    head = size // heads
    parts = "{p:query|key|value}"
    return [
        Row(f"{theirs}/{parts}/kernel", f"{ours}/{parts}/kernel", shapes=((size, heads, head), (size, size))),
        Row(f"{theirs}/{parts}/bias", f"{ours}/{parts}/bias", shapes=((heads, head), (size,))),
        Row(f"{theirs}/out/kernel", f"{out}/kernel", shapes=((heads, head, size), (size, size))),
        Row(f"{theirs}/out/bias", f"{out}/bias"),
    ]


def configure(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: str) -> ViTConfig:
    """The configuration of an archive, from its shapes.

    Args:
        raw: fields of `ViTConfig` that are to be otherwise; `image_size` for images that are not square.
        shapes: by Google's names.
        architecture: "vit_jax/ViT" or "big_vision/ViT".

    Raises:
        ConversionError: tensors that tell a size are missing, or the number of patches is no square.
    """
    attention, _, mlp = _NUMBERS[architecture]
    block = "Transformer/encoderblock_0/"
    needed = {
        "embedding": "embedding/kernel",
        "query": f"{block}MultiHeadDotProductAttention_{attention}/query/kernel",
        "mlp": f"{block}MlpBlock_{mlp}/Dense_0/kernel",
        "positions": _POSITIONS[architecture],
    }
    ranks = {"embedding": 4, "query": 3, "mlp": 2, "positions": 3}
    if wrong := [n for what, n in needed.items() if len(shapes.get(n, ())) != ranks[what]]:
        raise ConversionError(f"not a {architecture}:", [f"missing, or of other axes: {name}" for name in wrong])
    height, width, channels, size = shapes["embedding/kernel"]
    token = "cls" in shapes
    no_embed_class = token and architecture == "big_vision/ViT"
    told = {"no_embed_class": no_embed_class or not token, "img_size": raw.get("image_size")}
    image_size, _ = places(told, shapes[needed["positions"]][1], int(token), (height, width))
    names = {f.name for f in dataclasses.fields(ViTConfig)} - {"labels", "other"}
    config = ViTConfig(
        hidden_size=size,
        num_hidden_layers=sum(bool(re.fullmatch(r"Transformer/encoderblock_\d+/LayerNorm_0/scale", n)) for n in shapes),
        num_attention_heads=shapes[needed["query"]][1],
        intermediate_size=shapes[needed["mlp"]][1],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=image_size,
        patch_size=height if height == width else (height, width),
        num_channels=channels,
        labels=tuple(f"LABEL_{i}" for i in range(shapes.get("head/kernel", (0, 0))[1])),
        global_pool="token" if token else "map" if "MAPHead_0/probe" in shapes else "avg",
        class_token=token,
        no_embed_class=no_embed_class,
        representation_size=shapes.get("pre_logits/kernel", (0, None))[1],
    )
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items() if name in names}
    return dataclasses.replace(config, **given)


def describe(config: ViTConfig, architecture: str) -> dict[str, Any]:
    """All fields, since Google's files have no `config.json` of their own."""
    return {name: value for name, value in config.to_dict().items() if name != "timm"} | {
        "architectures": [architecture]
    }
