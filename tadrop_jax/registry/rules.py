"""Merge rules on task vectors: one merged model."""

from tadrop_jax.registry.schema import KEEP, SMOOTH, TALL_LAMBDA, WEIGHTS, Method, Parameter

ENTRIES = (
    Method(
        "average",
        "rule",
        "tadrop_jax.rules.average:average",
        "the mean of the models",
        "arXiv 2203.05482",
        "entry",
        "one model",
        (WEIGHTS,),
        properties=SMOOTH | {"local", "copies"},
    ),
    Method(
        "task_arithmetic",
        "rule",
        "tadrop_jax.rules.task_arithmetic:task_arithmetic",
        "the base plus the scaled sum of the task vectors",
        "arXiv 2212.04089",
        "entry",
        "one model",
        (
            Parameter("coefficient", "numbers", 0.3, "multiplies the sum; one number, or one per task"),
            WEIGHTS,
            Parameter("normalize", "flag", False, "divide by the sum of the weights"),
        ),
        properties=SMOOTH | {"local"},
    ),
    Method(
        "ties",
        "rule",
        "tadrop_jax.rules.ties:ties",
        "trims, elects a sign for each entry, and averages what agrees with it",
        "arXiv 2306.01708; flavours: ties-merging, mergekit, PEFT",
        "global or tensor",
        "one model",
        (
            Parameter(
                "density", "numbers", 0.2, "share that the trim keeps; none switches the trim off", optional=True
            ),
            Parameter("coefficient", "number", 1.0, "multiplies the merged vector"),
            WEIGHTS,
            Parameter("flavour", "choice", None, "preset", ("authors", "mergekit", "peft"), optional=True),
            Parameter("granularity", "choice", None, "of the trim", ("tensor", "global"), optional=True),
            Parameter(
                "combine", "choice", None, "what becomes of agreeing entries", ("mean", "sum", "max"), optional=True
            ),
            Parameter(
                "elect", "choice", None, "what is summed", ("unweighted", "weighted", "frequency"), optional=True
            ),
            Parameter(
                "zero_sign", "choice", None, "sign of an undecided entry", ("majority", "positive"), optional=True
            ),
            Parameter("divisor", "choice", None, "of the mean", ("count", "weights"), optional=True),
            Parameter("keep", "choice", None, "how the number to keep is rounded", KEEP, optional=True),
        ),
        properties=SMOOTH | {"copies", "density"},
    ),
    Method(
        "cabs",
        "rule",
        "tadrop_jax.rules.cabs:cabs",
        "disjoint n:m masks, one task after another, then the scaled sum",
        "arXiv 2503.01874",
        "group",
        "one model",
        (
            Parameter("n", "whole", 3, "kept in each group"),
            Parameter("m", "whole", 32, "length of a group"),
            Parameter("coefficient", "numbers", 1.0, "multiplies the sum; one number, or one per task"),
            Parameter("order", "order", None, "order of the tasks, e.g. [1,0,2]", optional=True),
            Parameter("tail", "choice", "ceil", "what to do with a shorter last group", ("ceil", "drop")),
        ),
        properties=frozenset({"local", "scales", "zero", "gradients"}),
    ),
    Method(
        "consensus",
        "rule",
        "tadrop_jax.rules.consensus:consensus",
        "the scaled sum of the task vectors where at least so many TALL masks agree",
        "arXiv 2405.07813",
        "entry",
        "one model",
        (
            Parameter("agree", "whole", 2, "how many masks have to hold an entry"),
            TALL_LAMBDA,
            Parameter("coefficient", "number", 1.0, "multiplies the merged vector"),
        ),
        models=(2, None),
        properties=SMOOTH | {"local"},
    ),
)
