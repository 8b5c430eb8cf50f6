"""Merge rules that treat matrices as matrices: by their singular values, or by least squares."""

from tadrop_jax.registry.schema import SMOOTH, Method, Parameter

_COEFFICIENT = Parameter("coefficient", "number", 1.0, "multiplies the merged vector")
_MEAN_ONLY = Parameter("mean_only", "patterns", (), "regular expression(s) of matrices that get the mean")
_INPUT_AXIS = Parameter("input_axis", "whole", -1, "axis of the inputs in PyTorch order; 0 for GPT-2's Conv1D")
_START = Parameter("start", "choice", "sum", "where the flow starts", ("sum", "mean", "zero"))
_NULL = Parameter(
    "null_directions", "choice", "drop", "what becomes of singular directions that are 0 to rounding", ("drop", "keep")
)

ENTRIES: tuple[Method, ...] = (
    Method(
        "tsv_m",
        "rule",
        "tadrop_jax.rules.tsv_m:tsv_m",
        "keeps the leading singular triples of each task and makes those of different tasks orthogonal",
        "arXiv 2412.00081",
        "tensor",
        "one model",
        (_COEFFICIENT, _MEAN_ONLY, _NULL),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "iso_c",
        "rule",
        "tadrop_jax.rules.iso_c:iso_c",
        "gives all singular directions of the summed task vectors the same weight",
        "arXiv 2502.04959",
        "tensor",
        "one model",
        (_COEFFICIENT, _MEAN_ONLY, _NULL),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "iso_cts",
        "rule",
        "tadrop_jax.rules.iso_cts:iso_cts",
        "iso_c, with the weakest common directions replaced by directions of single tasks",
        "arXiv 2502.04959",
        "tensor",
        "one model",
        (
            Parameter("common", "number", 0.8, "share of common directions", range=(0, 1)),
            _COEFFICIENT,
            _MEAN_ONLY,
            _NULL,
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "cart",
        "rule",
        "tadrop_jax.rules.cart:cart",
        "the mean, plus the scaled sum of what single tasks differ from it by, each at low rank",
        "arXiv 2412.12153; defaults: JH-GEECS/CART, ViT-B/32, 8 tasks",
        "tensor",
        "one model",
        (
            Parameter("rank", "number", 0.12, "share of the singular triples to keep", range=(0, 1)),
            Parameter("strength", "number", 2.0, "multiplies the low-rank sum"),
            _COEFFICIENT,
            _MEAN_ONLY,
        ),
        properties=SMOOTH | {"local", "copies"},
    ),
    Method(
        "dc_merge",
        "rule",
        "tadrop_jax.rules.dc_merge:dc_merge",
        "merges the tasks in a common orthogonal frame, in which each has a block of its own",
        "arXiv 2603.06242",
        "tensor",
        "one model",
        (
            Parameter("keep", "number", 0.001, "share of the entries that are kept in the frame", range=(0, 1)),
            _COEFFICIENT,
            Parameter(
                "smoothing", "choice", None, "of the singular values of a task", ("average", "linear"), optional=True
            ),
            Parameter("ratio", "number", 5.0, "of the singular values, at most, for linear smoothing", range=(1, None)),
            Parameter(
                "rank",
                "whole",
                None,
                "triples of each task; none means min(out, in) / T",
                optional=True,
                range=(1, None),
            ),
            _MEAN_ONLY,
            _NULL,
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "svc",
        "rule",
        "tadrop_jax.rules.svc:svc",
        "any rule, and then less of the singular directions that it counted more than once",
        "arXiv 2602.05536",
        "tensor, and that of the inner rule",
        "one model",
        (
            Parameter("rule", "rule", "task_arithmetic", "the inner rule, NAME or NAME:PARAMETER=VALUE;..."),
            Parameter(
                "alpha",
                "number",
                None,
                "the least coefficient, above 0; none means 1/T",
                optional=True,
                range=(0, None),
            ),
            Parameter(
                "calibrate_on", "choice", "dense", "task vectors as they came, or as pruned", ("dense", "sparse")
            ),
            Parameter("exclude", "patterns", (), "regular expression(s) of matrices that stay as the rule left them"),
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "wudi",
        "rule",
        "tadrop_jax.rules.wudi:wudi",
        "minimises the interference of the merged matrix with the inputs of each task",
        "arXiv 2503.08099",
        "tensor",
        "one model",
        (
            _COEFFICIENT,
            Parameter("solver", "choice", "adam", "early-stopped Adam, or the exact minimiser", ("adam", "closed")),
            Parameter("learning_rate", "number", 1e-5, "of Adam", range=(0, None)),
            Parameter("steps", "whole", 300, "of Adam", range=(0, None)),
            Parameter(
                "cutoff", "number", 2e-3, "of the exact minimiser: singular values that count as zero", range=(0.001, 1)
            ),
            _INPUT_AXIS,
            _MEAN_ONLY,
        ),
        models=(2, None),
        properties=frozenset({"symmetric", "zero", "gradients", "local"}),
    ),
    Method(
        "swudi",
        "rule",
        "tadrop_jax.rules.swudi:swudi",
        "stops WUDI's gradient flow at a time, in the strongest input directions",
        "WalkerWorldPeace/MLLMerging",
        "tensor",
        "one model",
        (
            Parameter("time", "number", 1300.0, "when the flow stops", range=(0, None)),
            Parameter("share", "number", 0.65, "of the input directions that are kept", range=(0, 1)),
            _COEFFICIENT,
            Parameter("natural_time", "flag", False, "count time in mean eigenvalues: T / in"),
            _START,
            _INPUT_AXIS,
            _MEAN_ONLY,
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "aswudi",
        "rule",
        "tadrop_jax.rules.swudi:aswudi",
        "solves WUDI's loss in as many input directions as its spectrum seems to have",
        "WalkerWorldPeace/MLLMerging",
        "tensor",
        "one model",
        (
            _COEFFICIENT,
            Parameter(
                "rank",
                "choice",
                "participation_sqrt",
                "how the number of directions is read off",
                ("participation_sqrt", "participation", "entropy", "stable_rank", "gavish_donoho"),
            ),
            _START,
            _INPUT_AXIS,
            _MEAN_ONLY,
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "ace",
        "rule",
        "tadrop_jax.rules.ace:ace",
        "fits every task under its own input covariance, read off its update",
        "arXiv 2603.02945",
        "tensor",
        "one model",
        (
            Parameter("epsilon", "number", 0.01, "keeps the covariances invertible", range=(1e-12, None)),
            _COEFFICIENT,
            Parameter(
                "threshold",
                "number",
                0.3,
                "on the spread of the norms, above which they are divided out",
                range=(0, None),
            ),
            Parameter("share", "number", 0.3, "of the directions that refine the result then", range=(0, 1)),
            _INPUT_AXIS,
            _MEAN_ONLY,
        ),
        properties=frozenset({"symmetric", "zero", "gradients", "local"}),
    ),
)
