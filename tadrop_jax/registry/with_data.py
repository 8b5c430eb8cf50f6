"""Methods that need data and gradients: drivers on top of the steps. The parameters are those that are no data."""

from tadrop_jax.registry.schema import WEIGHTS, Method, Parameter

ENTRIES: tuple[Method, ...] = (
    Method(
        "adamerging",
        "rule",
        "tadrop_jax.drivers.adamerging:adamerging",
        "learns the coefficients that make predictions on unlabelled data certain",
        "arXiv 2310.02575",
        "global or tensor",
        "one model",
        (
            Parameter("granularity", "choice", "tensor", "what has a coefficient of its own", ("tensor", "task")),
            Parameter("init", "numbers", 0.3, "what coefficients start at"),
            Parameter("steps", "whole", 500, "updates at most", range=(1, None)),
            Parameter("learning_rate", "number", 1e-3, "of Adam", range=(0, None)),
            Parameter(
                "bounds", "choice", "clip", "how coefficients stay in [0, 1]", ("clip", "project"), optional=True
            ),
            Parameter(
                "patience", "whole", None, "steps without progress before it stops", optional=True, range=(1, None)
            ),
            Parameter("remat", "flag", True, "build the merged model anew for each task, to save memory"),
        ),
        needs_data=True,
    ),
    Method(
        "fisher",
        "rule",
        "tadrop_jax.drivers.fisher:fisher",
        "averages the models, each entry weighted by its Fisher information",
        "arXiv 2111.09832",
        "entry or global",
        "one model",
        (
            Parameter(
                "labels",
                "choice",
                "exact",
                "labels of the likelihood: the expectation, drawn, the likeliest, or given",
                ("exact", "sampled", "argmax", "given"),
            ),
            WEIGHTS,
            Parameter(
                "normalize", "choice", "model", "norm that divides each Fisher", ("model", "tensor"), optional=True
            ),
            Parameter("floor", "number", 1e-6, "least value of a Fisher", range=(0, None)),
            Parameter("floor_on", "choice", "first", "which models have the floor", ("first", "all", "added")),
            Parameter("chunk", "whole", 1, "examples to differentiate at a time", range=(1, None)),
        ),
        on="weights",
        needs_data=True,
    ),
    Method(
        "regmean",
        "rule",
        "tadrop_jax.drivers.regmean:regmean",
        "merges linear layers by least squares on their inputs, and averages the rest",
        "arXiv 2212.09849",
        "tensor",
        "one model",
        (
            Parameter("scale", "number", 0.9, "of the off-diagonal of the Gram matrices", range=(0, 1)),
            WEIGHTS,
            Parameter(
                "ridge", "number", 1e-6, "what is added to the diagonal, as a share of its mean", range=(0, None)
            ),
            Parameter("out_in", "patterns", (), "kernels that lie (out, in), as PyTorch's Linear does"),
        ),
        on="weights",
        needs_data=True,
    ),
)
