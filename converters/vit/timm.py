"""Vision Transformers of timm: the table of its names, and the configuration that its `config.json` and shapes tell.

timm's `config.json` names a variant, and holds what was changed of it in `model_args`. What the variant itself says of
sizes is read from the shapes; what no shape tells (heads, activation, epsilon) is below.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from converters.errors import ConversionError, advice
from converters.mapping import Row, Transform, conv, linear, norm
from converters.vit.config import POOLS, ViTConfig, pair

Shapes = Mapping[str, tuple[int, ...]]

# Variants whose heads are not 64 wide, by their width; vit_base_patch16_gap_224 and giantopt differ from their likes.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
_HEADS_OF = {r"^vit_base_patch16_gap_": 16, "giantopt": 16, "^test_vit[34]?": 0}
# Those that compute something else with the same names: normalisations after the layers, rotary positions.
_OTHERS = re.compile("^(?!vit_|deit|flexivit_|test_vit)|_rpn_|_rope|^vit_pe_|_dinov3|_lingbot|_sapiens2|^test_vit3$")
_TANH_GELU = re.compile("(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip(_gap)?_512")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
_ACTIVATIONS |= {"silu": "silu", "swish": "silu", "tanh": "tanh"}
# Arguments of timm's VisionTransformer that have to be as they are here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "pos_embed": ("learn",),
    "global_pool": (None, *POOLS),
    "proj_bias": (True,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "pool_include_prefix": (False,),
    "embed_norm_layer": (None,),
    "norm_layer": (None, "layernorm"),
    "attn_layer": (None, "", "attn"),
    "mlp_layer": (None, "mlp"),
    "block_fn": (None,),
}


def table(config: ViTConfig, architecture: str) -> list[Row]:
    """Rows between timm's names and the module's paths.

    Example:
        >>> table(ViTConfig(), "timm/VisionTransformer")[1].flax
        'vit/embeddings/position_embeddings'
    """
    block, path = "blocks.{i}.", "vit/encoder/layer/{i}/"
    rows = [
        Row("{t:cls|reg|dist}_token", "vit/embeddings/{t:cls|reg|dist}_token"),
        Row("pos_embed", "vit/embeddings/position_embeddings"),
        *conv("patch_embed.proj", "vit/embeddings/patch_embeddings/projection"),
        *norm("norm_pre", "vit/pre_layernorm"),
        *norm(f"{block}norm1", f"{path}layernorm_before"),
        *_fused(f"{block}attn.qkv", [f"{path}attention/attention/{p}" for p in ("query", "key", "value")]),
        *norm(f"{block}attn.{{p:q|k}}_norm", f"{path}attention/attention/{{p:q|k}}_norm"),
        *linear(f"{block}attn.proj", f"{path}attention/output/dense"),
        Row(f"{block}ls{{n:1|2}}.gamma", f"{path}lambda_{{n:1|2}}"),
        *norm(f"{block}norm2", f"{path}layernorm_after"),
        *linear(f"{block}mlp.fc1", f"{path}intermediate/dense"),
        *linear(f"{block}mlp.fc2", f"{path}output/dense"),
        *norm("norm", "vit/layernorm"),
        *norm("fc_norm", "fc_norm"),
        *linear("pre_logits.fc", "pre_logits"),
        *linear("head", "classifier"),
        *linear("head_dist", "classifier_dist"),
        Row("attn_pool.latent", "attn_pool/probe"),
        *linear("attn_pool.q", "attn_pool/query"),
        *_fused("attn_pool.kv", ["attn_pool/key", "attn_pool/value"]),
        *linear("attn_pool.proj", "attn_pool/out"),
        *norm("attn_pool.norm", "attn_pool/layernorm"),
        *linear("attn_pool.mlp.{n:fc1|fc2}", "attn_pool/{n:fc1|fc2}"),
    ]
    if config.distilled != (architecture == "timm/VisionTransformerDistilled"):
        raise ConversionError(f"{architecture} cannot hold this ViT:", [f"distilled is {config.distilled}"])
    return rows


def _fused(torch: str, paths: Sequence[str]) -> list[Row]:
    return [
        Row(f"{torch}.weight", tuple(f"{path}/kernel" for path in paths), Transform.LINEAR),
        Row(f"{torch}.bias", tuple(f"{path}/bias" for path in paths)),
    ]


def configure(raw: Mapping[str, Any], shapes: Shapes, architecture: str) -> ViTConfig:
    """The configuration of timm's files.

    Args:
        raw: timm's `config.json`, or arguments of its VisionTransformer (`num_heads`, `act_layer`, ...); empty for a
            variant whose width tells the number of heads, with gelu and an epsilon of 1e-6.
        shapes: by timm's names.
        architecture: with or without distillation.

    Raises:
        ConversionError: a tensor that tells a size is missing, nothing tells the number of heads or the size of
            images, or the variant computes something else.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if absent := [f"missing: {name}" for name in needed if name not in shapes]:
        raise ConversionError("not a ViT of timm:", absent)
    args = {**raw, **raw.get("model_args", {})}
    variant = str(raw.get("architecture", ""))
    problems = [
        f"{name} is {args[name]!r}, supported is {' or '.join(map(repr, values))}"
        for name, values in _FIXED.items()
        if name in args and args[name] not in values
    ]
    if variant and _OTHERS.search(variant):
        problems.append(f"{variant} computes something else")
    activation = args.get("act_layer") or ("gelu_tanh" if _TANH_GELU.search(variant) else _of_clip(variant))
    if activation not in _ACTIVATIONS:
        problems.append(f"act_layer is {activation!r}, known are {', '.join(_ACTIVATIONS)}")
    if problems:
        raise ConversionError("this ViT of timm is not supported:", problems)
    width, channels, *patch = shapes["patch_embed.proj.weight"]
    fc_norm, attn_pool, token = (n in shapes for n in ("fc_norm.weight", "attn_pool.latent", "cls_token"))
    told = "map" if attn_pool else "avg" if fc_norm or not token else "token"
    reg_tokens = shapes["reg_token"][1] if "reg_token" in shapes else 0
    prefix = token + ("dist_token" in shapes) + reg_tokens
    size, no_embed_class = places(args, shapes["pos_embed"][1], prefix, (patch[0], patch[1]))
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)) for name in shapes),
        num_attention_heads=_heads(args, variant, width, shapes),
        intermediate_size=shapes["blocks.0.mlp.fc1.weight"][0],
        hidden_act=_ACTIVATIONS[activation],
        layer_norm_eps=1e-5 if "_clip_" in variant else 1e-6,
        image_size=size,
        patch_size=patch[0] if patch[0] == patch[1] else (patch[0], patch[1]),
        num_channels=channels,
        labels=tuple(f"LABEL_{i}" for i in range(args.get("num_classes", shapes.get("head.weight", (0,))[0]))),
        other={"timm": dict(raw)} if variant else {},
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        global_pool=args.get("global_pool") or told,
        class_token=token,
        distilled="dist_token" in shapes,
        reg_tokens=reg_tokens,
        no_embed_class=no_embed_class,
        patch_bias="patch_embed.proj.bias" in shapes,
        pre_norm="norm_pre.weight" in shapes,
        final_norm="norm.weight" in shapes,
        fc_norm=fc_norm,
        layer_scale="blocks.0.ls1.gamma" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        representation_size=shapes["pre_logits.fc.weight"][0] if "pre_logits.fc.weight" in shapes else None,
    )


def _of_clip(variant: str) -> str:
    return "quick_gelu" if "quickgelu" in variant else "gelu"


def _heads(args: Mapping[str, Any], variant: str, width: int, shapes: Shapes) -> int:
    if "num_heads" in args:
        return args["num_heads"]
    if "blocks.0.attn.q_norm.weight" in shapes:
        return width // shapes["blocks.0.attn.q_norm.weight"][0]
    special = next((heads for pattern, heads in _HEADS_OF.items() if re.search(pattern, variant)), None)
    if special is not None:
        return special or width // 32
    if width in _HEADS or (width % 64 == 0 and width >= 192):
        return _HEADS.get(width, width // 64)
    raise ConversionError(
        f"nothing tells the number of heads of a ViT of width {width}: " + advice('{"num_heads": N}') + "; timm's own "
        "config.json tells it too"
    )


def places(args: Mapping[str, Any], places: int, prefix: int, patch: tuple[int, int]) -> tuple[Any, bool]:
    """What a number of position embeddings tells.

    Args:
        args: what is known, as timm names it: `img_size`, `pretrained_cfg`, `no_embed_class`.
        places: how many there are.
        prefix: tokens before the patches.
        patch: height and width of a patch.

    Returns:
        The size of images, and whether the tokens before the patches have no position.

    Raises:
        ConversionError: they do not fit, or several sizes would.

    Example:
        >>> places({}, 17, 1, (8, 8))
        (32, False)
    """
    given = args.get("img_size") or (args.get("pretrained_cfg") or {}).get("input_size", [])[1:]
    counts = [places - prefix, places]
    if "no_embed_class" in args or not prefix:
        counts = [places - (0 if args.get("no_embed_class") or not prefix else prefix)]
    if given:
        height, width = (given, given) if isinstance(given, int) else given
        patches = (height // patch[0]) * (width // patch[1])
        if patches in counts:
            size = height if height == width else (height, width)
            return size, bool(prefix) and patches == places
        raise ConversionError(f"pos_embed has {places} places, images of {height} by {width} need {patches}")
    squares = [patches for patches in counts if patches > 0 and round(patches**0.5) ** 2 == patches]
    if len(set(squares)) != 1:
        raise ConversionError(
            f"pos_embed has {places} places, {prefix} tokens stand before the patches: this does not tell the size of "
            "images: " + advice('{"img_size": [HEIGHT, WIDTH]}')
        )
    side = round(squares[0] ** 0.5)
    height, width = side * patch[0], side * patch[1]
    return (height if height == width else (height, width)), bool(prefix) and squares[0] == places


def describe(config: ViTConfig, architecture: str) -> dict[str, Any]:
    """timm's `config.json`: as it was read, or a variant and all that differs from it.

    Raises:
        ConversionError: no argument of timm's gives this ViT.
    """
    known = config.other.get("timm")
    if known:
        return dict(known)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()} | {
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
    }
    problems = []
    if config.hidden_act not in names:
        problems.append(f"hidden_act is {config.hidden_act!r}, which timm has no name for")
    if config.representation_size:
        problems.append("representation_size: timm has no such layer any more")
    epsilons = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    if config.layer_norm_eps not in epsilons or (config.distilled and config.layer_norm_eps != 1e-6):
        problems.append(f"layer_norm_eps is {config.layer_norm_eps}, which timm's config.json cannot say")
    if problems:
        raise ConversionError(f"{architecture} cannot hold this ViT:", problems)
    variant = "deit_base_distilled_patch16_224" if config.distilled else epsilons[config.layer_norm_eps]
    size = pair(config.image_size)
    args = {
        "img_size": list(size),
        "patch_size": config.patch_size if isinstance(config.patch_size, int) else list(config.patch_size),
        "in_chans": config.num_channels,
        "num_classes": len(config.labels),
        "global_pool": config.global_pool,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": 1e-5 if config.layer_scale else None,
        "class_token": config.class_token,
        "no_embed_class": config.no_embed_class,
        "reg_tokens": config.reg_tokens,
        "pre_norm": config.pre_norm,
        "final_norm": config.final_norm or config.fc_norm,
        "fc_norm": config.fc_norm,
        "act_layer": names[config.hidden_act],
    }
    return {
        "architecture": variant,
        "num_classes": len(config.labels),
        "num_features": config.hidden_size,
        "global_pool": config.global_pool,
        "model_args": args,
        "pretrained_cfg": {"input_size": [config.num_channels, *size], "num_classes": len(config.labels)},
    }
