"""Rules that give one model per task, as a bundle."""

from tadrop_jax.registry.schema import MULTI_TASK, SMOOTH, TALL_LAMBDA, Method, Parameter

_PER_TASK = Parameter("per_task", "patterns", (), "regular expression(s) of tensors that stay each task's own")

ENTRIES = (
    Method(
        "emr",
        "rule",
        "tadrop_jax.rules.emr:emr",
        "one unified vector, and for each task a mask of one bit an entry and one number",
        "arXiv 2405.17461",
        "global",
        "one model per task",
        (
            Parameter(
                "rescaler", "choice", "tensor_mean", "the authors' code, or the paper", ("tensor_mean", "global")
            ),
            _PER_TASK,
        ),
        properties=SMOOTH | {"copies"},
    ),
    Method(
        "tall",
        "rule",
        "tadrop_jax.rules.tall:tall",
        "the sum of the task vectors, and for each task a mask of one bit an entry of where it serves the task",
        "arXiv 2405.07813",
        "entry",
        "one model per task",
        (TALL_LAMBDA, MULTI_TASK, _PER_TASK),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "t_switch",
        "rule",
        "tadrop_jax.rules.t_switch:t_switch",
        "drops small entries; for each task one mask bit and one sign bit an entry, and one number a tensor",
        "arXiv 2412.00054",
        "tensor",
        "one model per task",
        (
            Parameter(
                "density",
                "numbers",
                0.4,
                "share to keep of the positive and of the negative entries; none switches the drop off",
                optional=True,
                range=(0, 1),
            ),
            Parameter(
                "empty_side", "choice", "keep", "what becomes of a side of which nothing would stay", ("keep", "drop")
            ),
            _PER_TASK,
        ),
        properties=SMOOTH | {"local", "copies", "density"},
    ),
    Method(
        "tsv_c",
        "rule",
        "tadrop_jax.rules.tsv_c:tsv_c",
        "the leading singular triples of each task's matrices; the rest whole",
        "arXiv 2412.00081",
        "tensor",
        "one model per task",
        (
            Parameter(
                "share", "number", None, "share of the rank to keep; none means 1/T", optional=True, range=(0, 1)
            ),
            _PER_TASK,
        ),
        properties=frozenset({"symmetric", "zero", "gradients", "local"}),
    ),
)
