"""Sparsifiers: task vectors to task vectors with more zeros."""

from tadrop_jax.registry.schema import KEEP, NORM, SMOOTH, Method, Parameter

ENTRIES = (
    Method(
        "tadrop",
        "sparsifier",
        "tadrop_jax.sparsifiers.tadrop:tadrop",
        "gives each tensor its own sparsity, read off its quantile ratio, and restores its norm",
        "arXiv 2508.06163; quantiles, mapping and norm are ours",
        "tensor",
        "task vectors",
        (
            Parameter("q_low", "number", 0.95, "lower quantile", range=(0, 1)),
            Parameter("q_high", "number", 0.99, "upper quantile", range=(0, 1)),
            NORM,
            Parameter(
                "mapping", "text", "identity", "ratio to sparsity: identity, affine:SLOPE,OFFSET or power:EXPONENT"
            ),
            Parameter("s_min", "number", 0.0, "least sparsity", range=(0, 1)),
            Parameter("s_max", "number", 0.9, "largest sparsity, below 1", range=(0, 1)),
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "uniform",
        "sparsifier",
        "tadrop_jax.sparsifiers.uniform:uniform",
        "prunes every tensor to one sparsity and restores its norm: TADrop's control",
        "ours, as a control",
        "tensor",
        "task vectors",
        (Parameter("sparsity", "numbers", 0.5, "share to prune", range=(0, 1)), NORM),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "dominance",
        "sparsifier",
        "tadrop_jax.sparsifiers.dominance:dominance",
        "prunes entries that are small beside the same entry of another task, and restores the norm",
        "ours; half of the largest is EMR's best mask in least squares",
        "entry",
        "task vectors",
        (Parameter("share", "numbers", 0.5, "of the largest magnitude of all tasks, to be kept", range=(0, 1)), NORM),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "magnitude",
        "sparsifier",
        "tadrop_jax.sparsifiers.magnitude:magnitude",
        "keeps the largest magnitudes",
        "arXiv 2306.01708 (the trim of TIES)",
        "tensor or global",
        "task vectors",
        (
            Parameter("density", "numbers", 0.2, "share to keep", range=(0, 1)),
            Parameter(
                "granularity", "choice", "tensor", "one threshold a tensor, or one for all", ("tensor", "global")
            ),
            Parameter("keep", "choice", "at_least_one", "how the number to keep is rounded", KEEP),
        ),
        properties=SMOOTH | {"local", "density"},
    ),
    Method(
        "dare",
        "sparsifier",
        "tadrop_jax.sparsifiers.dare:dare",
        "drops entries at random and rescales the rest",
        "arXiv 2311.03099",
        "entry",
        "task vectors",
        (
            Parameter("density", "numbers", 0.5, "probability to keep an entry", range=(0, 1)),
            Parameter(
                "rescale",
                "choice",
                "inverse",
                "by 1/density, to the L1 norm, or none",
                ("inverse", "l1"),
                optional=True,
            ),
        ),
        random=True,
        properties=frozenset({"scales", "zero", "local", "density", "gradients"}),
    ),
    Method(
        "n_m",
        "sparsifier",
        "tadrop_jax.sparsifiers.n_m:n_m",
        "keeps n of every m consecutive weights",
        "arXiv 2503.01874 (balanced sparsification)",
        "group",
        "task vectors",
        (
            Parameter("n", "whole", 3, "kept in each group", range=(0, None)),
            Parameter("m", "whole", 32, "length of a group", range=(1, None)),
            Parameter("tail", "choice", "ceil", "what to do with a shorter last group", ("ceil", "drop")),
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "conflict_aware",
        "sparsifier",
        "tadrop_jax.sparsifiers.conflict_aware:conflict_aware",
        "sparsifies one task after another on the entries that are still free: disjoint masks",
        "arXiv 2503.01874",
        "that of the inner sparsifier",
        "task vectors",
        (
            Parameter(
                "sparsifier", "sparsifier", "magnitude", "the inner sparsifier, NAME or NAME:PARAMETER=VALUE;..."
            ),
            Parameter("order", "order", None, "order of the tasks, e.g. [1,0,2]", optional=True),
        ),
        properties=frozenset({"local", "scales", "zero", "gradients"}),
    ),
    Method(
        "della",
        "sparsifier",
        "tadrop_jax.sparsifiers.della:della",
        "drops entries by chance, large magnitudes less often",
        "arXiv 2406.11617 (MAGPRUNE); flavours: authors (declare-lab/della), mergekit",
        "row or tensor",
        "task vectors",
        (
            Parameter("density", "numbers", 0.5, "mean probability to keep an entry", range=(0, 1)),
            Parameter("epsilon", "numbers", 0.05, "half the width of the probabilities", range=(0, 0.5)),
            Parameter(
                "granularity",
                "choice",
                None,
                "what is ranked together",
                ("row", "second_axis", "tensor"),
                optional=True,
            ),
            Parameter(
                "rescale",
                "choice",
                "flavour",
                "by 1/probability, to the L1 norm, none, or the flavour's",
                ("flavour", "entry", "l1"),
                optional=True,
            ),
            Parameter("flavour", "choice", None, "preset", ("authors", "mergekit"), optional=True),
        ),
        random=True,
        properties=frozenset({"scales", "zero", "local", "gradients"}),
    ),
    Method(
        "breadcrumbs",
        "sparsifier",
        "tadrop_jax.sparsifiers.breadcrumbs:breadcrumbs",
        "drops the largest and the smallest magnitudes",
        "arXiv 2312.06795; flavours: authors (rezazzr/breadcrumbs), mergekit",
        "row or tensor",
        "task vectors",
        (
            Parameter("density", "numbers", 0.15, "share to keep", range=(0, 1)),
            Parameter("gamma", "numbers", 0.01, "share of the largest to drop", range=(0, 1)),
            Parameter("granularity", "choice", None, "of the counts", ("row", "tensor"), optional=True),
            Parameter(
                "first", "choice", None, "what holds if both exceed 1 together", ("gamma", "density"), optional=True
            ),
            Parameter("flavour", "choice", None, "preset", ("authors", "mergekit"), optional=True),
        ),
        properties=SMOOTH | {"local", "density"},
    ),
    Method(
        "rescale",
        "sparsifier",
        "tadrop_jax.sparsifiers.rescale:rescale",
        "restores the norm from before a sparsifier",
        "ours; the norm of TADrop for any sparsifier",
        "tensor or global",
        "task vectors",
        (
            Parameter(
                "sparsifier", "sparsifier", "magnitude", "the inner sparsifier, NAME or NAME:PARAMETER=VALUE;..."
            ),
            Parameter("norm", "choice", 2, "p of the norm", (1, 2)),
            Parameter("granularity", "choice", "tensor", "of the norm", ("tensor", "global")),
        ),
        properties=SMOOTH | {"local"},
    ),
)
