"""Merge rules on weights, and rules on the directions of weights or task vectors."""

from tadrop_jax.registry.schema import SMOOTH, WEIGHTS, Method, Parameter

_SPACE = Parameter(
    "space", "choice", "task vectors", "of the task vectors, or of the models themselves", ("task vectors", "weights")
)
_HELD = frozenset({"zero", "gradients", "local"})

ENTRIES = (
    Method(
        "slerp",
        "rule",
        "tadrop_jax.rules.slerp:slerp",
        "a point on the arc from the base to one model",
        "Shoemake 1985; mergekit",
        "tensor",
        "one model",
        (
            Parameter("t", "number", 0.5, "share of the way: 0 is the base, 1 the model", range=(0, 1)),
            Parameter("threshold", "number", 0.9995, "cosine above which the chord is taken", range=(0, 1)),
        ),
        on="weights",
        models=(1, 1),
        properties=_HELD,
    ),
    Method(
        "nuslerp",
        "rule",
        "tadrop_jax.rules.nuslerp:nuslerp",
        "a point on the arc between the task vectors of two models",
        "mergekit",
        "tensor or row",
        "one model",
        (
            WEIGHTS,
            _SPACE,
            Parameter("granularity", "choice", "tensor", "one arc for each of these", ("tensor", "row", "column")),
        ),
        models=(2, 2),
        properties=_HELD | {"symmetric"},
    ),
    Method(
        "multislerp",
        "rule",
        "tadrop_jax.rules.multislerp:multislerp",
        "the mean direction of the task vectors, at their mean length",
        "mergekit",
        "tensor",
        "one model",
        (WEIGHTS, _SPACE, Parameter("normalize", "flag", True, "divide the weights by their sum")),
        properties=_HELD | {"symmetric", "copies"},
    ),
    Method(
        "karcher",
        "rule",
        "tadrop_jax.rules.karcher:karcher",
        "the mean of the models on the sphere, at their mean length",
        "arXiv 2603.04972; mergekit",
        "tensor",
        "one model",
        (
            WEIGHTS,
            Parameter("max_iter", "whole", 10, "most rounds", range=(0, None)),
            Parameter(
                "tol",
                "number",
                1e-5,
                "length of a step that ends the rounds, and norm of a zero tensor",
                range=(0, None),
            ),
        ),
        on="weights",
        properties=_HELD | {"symmetric", "copies"},
    ),
    Method(
        "nearswap",
        "rule",
        "tadrop_jax.rules.nearswap:nearswap",
        "moves each entry of the base by at most t towards the model",
        "mergekit",
        "entry",
        "one model",
        (Parameter("t", "number", 1e-4, "the most that an entry moves", range=(0, None)),),
        on="weights",
        models=(1, 1),
        properties=_HELD,
    ),
    Method(
        "arcee_fusion",
        "rule",
        "tadrop_jax.rules.arcee_fusion:arcee_fusion",
        "takes the entries of the model whose change is large and whose row diverges",
        "mergekit",
        "row and tensor",
        "one model",
        (),
        on="weights",
        models=(1, 1),
        properties=_HELD,
    ),
    Method(
        "model_stock",
        "rule",
        "tadrop_jax.rules.model_stock:model_stock",
        "the mean of the models, drawn to the base the more their task vectors differ in direction",
        "arXiv 2403.19522; mergekit, fusion_bench",
        "tensor or row",
        "one model",
        (
            Parameter("average", "choice", "cosine", "of the pairs of models", ("cosine", "angle")),
            Parameter("filter_wise", "flag", False, "one ratio a row in place of one a tensor"),
        ),
        models=(2, None),
        properties=SMOOTH | {"local"},
    ),
)
