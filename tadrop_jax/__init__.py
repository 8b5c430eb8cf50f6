"""Model merging for JAX: every sparsifier with every merge rule, over any parameter tree.

The names below load on first use, so that ``import tadrop_jax`` (and the command line) starts without jax.
"""

import importlib
from typing import TYPE_CHECKING

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
    "merging": ["merge", "merge_task_vectors", "sparsify", "explain", "quantile_ratios", "Layout"],
    "task_vector": ["task_vectors"],
    "selection": ["kth_largest_magnitude", "magnitude_quantile"],
    "steps": [
        "Step",
        "Sums",
        "Min",
        "Max",
        "Ranks",
        "Piece",
        "chain",
        "masked",
        "at_least",
        "floor_times",
        "safe_ratio",
    ],
    "bundles": ["EMRBundle"],
    "sparsifiers.tadrop": ["tadrop"],
    "sparsifiers.uniform": ["uniform"],
    "sparsifiers.magnitude": ["magnitude"],
    "sparsifiers.dare": ["dare"],
    "sparsifiers.n_m": ["n_m"],
    "sparsifiers.conflict_aware": ["conflict_aware"],
    "rules.average": ["average"],
    "rules.task_arithmetic": ["task_arithmetic"],
    "rules.ties": ["ties"],
    "rules.cabs": ["cabs"],
    "rules.emr": ["emr"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from tadrop_jax.bundles import EMRBundle as EMRBundle
    from tadrop_jax.errors import CheckpointError as CheckpointError
    from tadrop_jax.errors import ContentError as ContentError
    from tadrop_jax.errors import MergeError as MergeError
    from tadrop_jax.errors import MergeWarning as MergeWarning
    from tadrop_jax.errors import MismatchError as MismatchError
    from tadrop_jax.errors import ParameterError as ParameterError
    from tadrop_jax.merging import Layout as Layout
    from tadrop_jax.merging import explain as explain
    from tadrop_jax.merging import merge as merge
    from tadrop_jax.merging import merge_task_vectors as merge_task_vectors
    from tadrop_jax.merging import quantile_ratios as quantile_ratios
    from tadrop_jax.merging import sparsify as sparsify
    from tadrop_jax.rules.average import average as average
    from tadrop_jax.rules.cabs import cabs as cabs
    from tadrop_jax.rules.emr import emr as emr
    from tadrop_jax.rules.task_arithmetic import task_arithmetic as task_arithmetic
    from tadrop_jax.rules.ties import ties as ties
    from tadrop_jax.selection import kth_largest_magnitude as kth_largest_magnitude
    from tadrop_jax.selection import magnitude_quantile as magnitude_quantile
    from tadrop_jax.sparsifiers.conflict_aware import conflict_aware as conflict_aware
    from tadrop_jax.sparsifiers.dare import dare as dare
    from tadrop_jax.sparsifiers.magnitude import magnitude as magnitude
    from tadrop_jax.sparsifiers.n_m import n_m as n_m
    from tadrop_jax.sparsifiers.tadrop import tadrop as tadrop
    from tadrop_jax.sparsifiers.uniform import uniform as uniform
    from tadrop_jax.steps import Max as Max
    from tadrop_jax.steps import Min as Min
    from tadrop_jax.steps import Piece as Piece
    from tadrop_jax.steps import Ranks as Ranks
    from tadrop_jax.steps import Step as Step
    from tadrop_jax.steps import Sums as Sums
    from tadrop_jax.steps import at_least as at_least
    from tadrop_jax.steps import chain as chain
    from tadrop_jax.steps import floor_times as floor_times
    from tadrop_jax.steps import masked as masked
    from tadrop_jax.steps import safe_ratio as safe_ratio
    from tadrop_jax.task_vector import task_vectors as task_vectors


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
