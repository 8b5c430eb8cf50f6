"""The tables of CLIP: Hugging Face's names, those of OpenAI and OpenCLIP, and how the weights lie on a mesh."""

from collections.abc import Callable

import numpy as np

from converters.clip.config import CLIPConfig
from converters.mapping import Row, Transform, conv, linear, norm

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(token|position)_embedding/embedding", (None, "model")),
    (r"(q_proj|k_proj|v_proj|fc1)/kernel", (None, "model")),
    (r"(q_proj|k_proj|v_proj|fc1)/bias", ("model",)),
    (r"(out_proj|fc2|visual_projection|text_projection|classifier)/kernel", ("model", None)),
)


def table(config: CLIPConfig, architecture: str) -> list[Row]:
    """Rows between an architecture's names and its module's paths.

    Example:
        >>> [row.torch for row in table(CLIPConfig(), "CLIPTextModelWithProjection") if "projection" in row.torch]
        ['text_projection.weight']
    """
    if architecture.startswith("openai/"):
        return _openai()
    rows = []
    for tower in ("vision", "text"):
        if architecture in ("CLIPModel", *_TOWERS[tower]):
            # Since transformers 5 a tower alone has no prefix.
            alone = architecture in ("CLIPVisionModel", "CLIPTextModel")
            rows += _TABLES[tower]("" if alone else f"{tower}_model.")
    if architecture == "CLIPForImageClassification":
        rows += linear("classifier", "classifier")
    if architecture in ("CLIPModel", "CLIPVisionModelWithProjection"):
        rows.append(Row("visual_projection.weight", "visual_projection/kernel", Transform.LINEAR))
    if architecture in ("CLIPModel", "CLIPTextModelWithProjection"):
        rows.append(Row("text_projection.weight", "text_projection/kernel", Transform.LINEAR))
    if architecture == "CLIPModel":
        rows.append(Row("logit_scale", "logit_scale"))
    return rows


def aliases(architecture: str) -> list[tuple[str, str]]:
    """Other spellings: a tower's prefix (transformers 4), and that of OpenCLIP's `CustomTextCLIP`."""
    return {
        "CLIPVisionModel": [(r"^vision_model\.", "")],
        "CLIPTextModel": [(r"^text_model\.", "")],
        "openai/CLIP": [(r"^text\.", "")],
    }.get(architecture, [])


def buffers(config: CLIPConfig, architecture: str) -> dict[str, Callable]:
    """Position numbers that older files store; sizes and the causal mask of OpenAI's."""
    towers = {"vision": config.vision.positions if config.vision else 0}
    towers["text"] = config.text.max_position_embeddings if config.text else 0
    if not architecture.startswith("openai/"):
        alone = architecture in ("CLIPVisionModel", "CLIPTextModel")
        return {
            ("" if alone else rf"{tower}_model\.") + r"embeddings\.position_ids": _numbers(count)
            for tower, count in towers.items()
            if count
        }
    sizes = {
        "input_resolution": config.vision.image_size if config.vision else 0,
        "context_length": towers["text"],
        "vocab_size": config.text.vocab_size if config.text else 0,
    }
    causal = np.triu(np.full((towers["text"],) * 2, -np.inf, np.float32), 1)
    numbers: dict[str, Callable] = {name: lambda match, size=size: np.asarray(size) for name, size in sizes.items()}
    return numbers | {"attn_mask": lambda match: causal}


def _numbers(count: int) -> Callable:
    return lambda match: np.arange(count)[None]


def _vision_rows(prefix: str) -> list[Row]:
    path = "vision_model/"
    return [
        Row(f"{prefix}embeddings.class_embedding", f"{path}embeddings/class_embedding"),
        conv(f"{prefix}embeddings.patch_embedding", f"{path}embeddings/patch_embedding")[0],
        Row(f"{prefix}embeddings.position_embedding.weight", f"{path}embeddings/position_embedding/embedding"),
        *norm(f"{prefix}pre_layrnorm", f"{path}pre_layrnorm"),
        *_layers(f"{prefix}encoder.layers.{{i}}.", f"{path}encoder/layers/{{i}}/"),
        *norm(f"{prefix}post_layernorm", f"{path}post_layernorm"),
    ]


def _text_rows(prefix: str) -> list[Row]:
    path = "text_model/"
    embedding = "{e:token_embedding|position_embedding}"
    return [
        Row(f"{prefix}embeddings.{embedding}.weight", f"{path}embeddings/{embedding}/embedding"),
        *_layers(f"{prefix}encoder.layers.{{i}}.", f"{path}encoder/layers/{{i}}/"),
        *norm(f"{prefix}final_layer_norm", f"{path}final_layer_norm"),
    ]


def _layers(torch: str, flax: str) -> list[Row]:
    rows = norm(f"{torch}layer_norm{{n:1|2}}", f"{flax}layer_norm{{n:1|2}}")
    for part, names in (("self_attn", "{p:q_proj|k_proj|v_proj|out_proj}"), ("mlp", "{p:fc1|fc2}")):
        rows += linear(f"{torch}{part}.{names}", f"{flax}{part}/{names}")
    return rows


_TABLES = {"vision": _vision_rows, "text": _text_rows}
_TOWERS = {
    "vision": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    "text": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}


def _openai() -> list[Row]:
    """`clip/model.py` of openai/CLIP; OpenCLIP has the same names. Projections are kept (in, out) there."""
    return [
        Row("visual.class_embedding", "vision_model/embeddings/class_embedding"),
        Row("visual.positional_embedding", "vision_model/embeddings/position_embedding/embedding"),
        Row("visual.conv1.weight", "vision_model/embeddings/patch_embedding/kernel", Transform.CONV),
        *norm("visual.ln_pre", "vision_model/pre_layrnorm"),
        *_blocks("visual.transformer.resblocks.{i}.", "vision_model/encoder/layers/{i}/"),
        *norm("visual.ln_post", "vision_model/post_layernorm"),
        Row("visual.proj", "visual_projection/kernel"),
        Row("token_embedding.weight", "text_model/embeddings/token_embedding/embedding"),
        Row("positional_embedding", "text_model/embeddings/position_embedding/embedding"),
        *_blocks("transformer.resblocks.{i}.", "text_model/encoder/layers/{i}/"),
        *norm("ln_final", "text_model/final_layer_norm"),
        Row("text_projection", "text_projection/kernel"),
        Row("logit_scale", "logit_scale"),
    ]


def _blocks(torch: str, flax: str) -> list[Row]:
    fused = tuple(f"{flax}self_attn/{p}_proj/" for p in "qkv")
    return [
        Row(f"{torch}attn.in_proj_weight", tuple(f"{path}kernel" for path in fused), Transform.LINEAR),
        Row(f"{torch}attn.in_proj_bias", tuple(f"{path}bias" for path in fused)),
        *linear(f"{torch}attn.out_proj", f"{flax}self_attn/out_proj"),
        *linear(f"{torch}mlp.c_fc", f"{flax}mlp/fc1"),
        *linear(f"{torch}mlp.c_proj", f"{flax}mlp/fc2"),
        *norm(f"{torch}ln_{{n:1|2}}", f"{flax}layer_norm{{n:1|2}}"),
    ]
