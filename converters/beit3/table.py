"""The table of BEiT3: torchscale's names, and how the weights lie on a mesh."""

from converters.beit3.config import BEiT3Config
from converters.mapping import Row, Transform, conv, linear, norm

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(text_embed|embed_positions/[AB])/embedding", (None, "model")),
    (r"(q_proj|k_proj|v_proj)/[AB]/kernel|ffn/[AB]/fc1/kernel", (None, "model")),
    (r"(q_proj|k_proj|v_proj)/[AB]/bias|ffn/[AB]/fc1/bias|ffn_layernorm/(scale|bias)", ("model",)),
    (r"out_proj/[AB]/kernel|ffn/[AB]/fc2/kernel|(language|vision|mlm)_head/kernel", ("model", None)),
)
_HEADS = {
    "BEiT3": [],
    "BEiT3ForImageClassification": [*norm("fc_norm", "fc_norm"), *linear("head", "head")],
    "BEiT3ForVisualQuestionAnswering": [
        *norm("pooler.norm", "pooler/norm"),
        *linear("pooler.dense", "pooler/dense"),
        *linear("head.0", "head/first"),
        *norm("head.1", "head/norm"),
        *linear("head.3", "head/last"),
    ],
    "BEiT3ForVisualReasoning": [
        *norm("head.norm{n:1|2}", "head/norm{n:1|2}"),
        *linear("head.dense{n:1|2}", "head/dense{n:1|2}"),
    ],
    "BEiT3ForRetrieval": [
        Row("{of:language|vision}_head.weight", "{of:language|vision}_head/kernel", Transform.LINEAR),
        Row("logit_scale", "logit_scale"),
    ],
    "BEiT3ForCaptioning": linear("mlm_head", "mlm_head"),
}


def table(config: BEiT3Config, architecture: str) -> list[Row]:
    """Rows between torchscale's names and the module's paths.

    Example:
        >>> table(BEiT3Config(), "torchscale/BEiT3")[0].flax
        'text_embed/embedding'
    """
    name = architecture.removeprefix("torchscale/")
    torch, flax = ("", "") if name == "BEiT3" else ("beit3.", "beit3/")
    layer, path = f"{torch}encoder.layers.{{i}}.", f"{flax}encoder/layers/{{i}}/"
    projections = "{p:q_proj|k_proj|v_proj|out_proj}"
    return [
        Row(f"{torch}text_embed.weight", f"{flax}text_embed/embedding"),
        Row(f"{torch}vision_embed.{{t:cls|mask}}_token", f"{flax}vision_embed/{{t:cls|mask}}_token"),
        *conv(f"{torch}vision_embed.proj", f"{flax}vision_embed/proj"),
        Row(f"{torch}encoder.embed_positions.{{w:A|B}}.weight", f"{flax}encoder/embed_positions/{{w:A|B}}/embedding"),
        *linear(f"{layer}self_attn.{projections}.{{w:A|B}}", f"{path}self_attn/{projections}/{{w:A|B}}"),
        *norm(f"{layer}self_attn.inner_attn_ln.{{w:A|B}}", f"{path}self_attn/inner_attn_ln/{{w:A|B}}"),
        *norm(
            f"{layer}{{n:self_attn|final}}_layer_norm.{{w:A|B}}", f"{path}{{n:self_attn|final}}_layer_norm/{{w:A|B}}"
        ),
        *linear(f"{layer}ffn.{{w:A|B}}.{{p:fc1|fc2}}", f"{path}ffn/{{w:A|B}}/{{p:fc1|fc2}}"),
        *norm(f"{layer}ffn.{{w:A|B}}.ffn_layernorm", f"{path}ffn/{{w:A|B}}/ffn_layernorm"),
        *norm(f"{torch}encoder.layer_norm.{{w:A|B}}", f"{flax}encoder/layer_norm/{{w:A|B}}"),
        *_HEADS[name],
    ]


def aliases(architecture: str) -> list[tuple[str, str]]:
    """The authors' models keep the encoder below `beit3.`; torchscale's own class does not."""
    if architecture == "torchscale/BEiT3":
        return [(r"^beit3\.", "")]
    return [(r"^(?=(text_embed|vision_embed|encoder)\.)", "beit3.")]
