"""Merges of LoRA adapters: functions of pairs of factors, with any rule inside."""

from tadrop_jax.registry.schema import Method, Parameter

_ADAPTERS = Parameter("adapters", "object", None, "the adapters: T trees of pairs lora_A (r, in), lora_B (out, r)")
_RULE = Parameter("rule", "rule", "ties", "the rule that merges them in the shared basis")
_SCALING = Parameter("scaling", "numbers", 1.0, "alpha / r of the adapters")
_SPARSIFIER = Parameter("sparsifier", "sparsifier", None, "a sparsifier before the rule", optional=True)
_FACTORED = Parameter("factored", "flag", False, "give the merged adapter, not the dense changes")
_KEY = Parameter("key", "object", None, "random key, for random steps")

ENTRIES = (
    Method(
        "knots",
        "rule",
        "tadrop_jax.lora.knots:knots",
        "merges LoRA adapters by any rule in the basis of their joint SVD",
        "arXiv 2410.19735",
        "tensor, and that of the inner rule",
        "one model",
        (
            _ADAPTERS,
            _RULE,
            _SCALING,
            Parameter("shared", "choice", "output", "the side that shares a basis", ("output", "input")),
            Parameter("cutoff", "number", 1e-5, "singular values up to this are left out"),
            _SPARSIFIER,
            _FACTORED,
            _KEY,
        ),
        on="LoRA pairs",
    ),
    Method(
        "core_space",
        "rule",
        "tadrop_jax.lora.core_space:core_space",
        "merges LoRA adapters by any rule as small cores between shared bases",
        "arXiv 2509.17786",
        "tensor, and that of the inner rule",
        "one model",
        (_ADAPTERS, _RULE, _SCALING, _SPARSIFIER, _FACTORED, _KEY),
        on="LoRA pairs",
    ),
)
