"""Model merging for JAX: every sparsifier with every merge rule, over any parameter tree.

Names load on first use, so that ``import tadrop_jax`` (and the command line) starts without jax. The methods' names
come from the registry; ``__init__.pyi``, which type checkers read, is written by ``docs/generate_methods.py``.
"""

import importlib

from tadrop_jax.registry import METHODS

__version__ = "0.1.0"

_HOME = {
    "errors": [
        "MergeError",
        "MismatchError",
        "ParameterError",
        "ContentError",
        "CheckpointError",
        "MergeWarning",
    ],
    "merging": ["merge", "merge_task_vectors", "sparsify", "explain", "quantile_ratios"],
    "layouts": ["Layout"],
    "task_vector": ["task_vectors"],
    "selection": ["kth_largest_magnitude", "magnitude_quantile"],
    "stages": ["Sums", "Min", "Max", "Ranks"],
    "steps": [
        "Step",
        "Piece",
        "chain",
        "masked",
        "at_least",
        "floor_times",
        "safe_ratio",
    ],
    "bundles": ["Bundle", "EMRBundle"],
    "kinds": ["Kind", "Part"],
    "drivers.adamerging": ["AdaMerged", "with_coefficients"],
    "drivers.fisher": ["FisherMerged", "fisher_diagonal"],
    "drivers.regmean": ["RegMeanMerged", "gram_matrices"],
    "drivers.capture": ["nnx_apply", "nnx_inputs", "linen_inputs"],
    "sweeping": ["sweep", "Sweep"],
}
# The module below this package that each public name lives in.
HOMES = {name: module for module, names in _HOME.items() for name in names} | {
    name: method.home.partition(":")[0].removeprefix(f"{__name__}.") for name, method in METHODS.items()
}
__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
