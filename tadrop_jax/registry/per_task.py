"""Rules that give one model per task, as a bundle."""

from tadrop_jax.registry.schema import SMOOTH, Method, Parameter

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
            Parameter("per_task", "patterns", (), "regular expression(s) of tensors that stay each task's own"),
        ),
        properties=SMOOTH | {"copies"},
    ),
)
