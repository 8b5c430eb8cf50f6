"""The table of the Vision Transformer: names as `save_pretrained` writes them, and the Flax paths.

The Flax paths are those of FlaxViTForImageClassification in transformers 4.
"""

from converters.mapping import Row, conv, linear, norm

_LAYER = "vit.encoder.layer.{i}.", "vit/encoder/layer/{i}/"


def _in_layer(rows, torch: str, flax: str) -> list[Row]:
    return rows(_LAYER[0] + torch, _LAYER[1] + flax)


_ROWS: tuple[Row, ...] = (
    Row("vit.embeddings.cls_token", "vit/embeddings/cls_token"),
    Row("vit.embeddings.position_embeddings", "vit/embeddings/position_embeddings"),
    *conv("vit.embeddings.patch_embeddings.projection", "vit/embeddings/patch_embeddings/projection"),
    *_in_layer(norm, "layernorm_{at:before|after}", "layernorm_{at:before|after}"),
    *_in_layer(linear, "attention.attention.{p:query|key|value}", "attention/attention/{p:query|key|value}"),
    *_in_layer(linear, "attention.output.dense", "attention/output/dense"),
    *_in_layer(linear, "intermediate.dense", "intermediate/dense"),
    *_in_layer(linear, "output.dense", "output/dense"),
    *norm("vit.layernorm", "vit/layernorm"),
    *linear("classifier", "classifier"),
)


def table(config, architecture: str) -> tuple[Row, ...]:
    """The rows of an architecture; they hold for any configuration."""
    return _ROWS
