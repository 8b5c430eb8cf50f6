"""What mergekit's own merge methods make of arrays."""

from collections.abc import Mapping, Sequence

import numpy as np


def merged(method: str, base: Mapping[str, np.ndarray], models: Sequence[Mapping], per_model=None, **shared) -> dict:
    """Runs a merge method on each tensor of a base and its fine-tunes.

    Args:
      method: its name in mergekit's registry.
      base: arrays by name.
      models: the same names.
      per_model: for each parameter that models have of their own, one value a model.
      **shared: the other parameters (``lambda_`` for ``lambda``).

    Returns:
      float32 arrays by name.
    """
    import torch
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    merger = registry.get(method)
    ids = range(1, len(models) + 1)
    parameters = {spec.name: spec.default for spec in merger.spec.parameters}
    parameters |= {name.rstrip("_"): value for name, value in shared.items()}
    parameters |= {name: dict(zip(ids, values, strict=True)) for name, values in (per_model or {}).items()}
    found = {}
    for name in base:
        tensors = [torch.from_numpy(np.array(model[name])) for model in [base, *models]]
        found[name] = merger.merge_group(TensorGroup.from_tensors(tensors, base_index=0), **parameters).numpy()
    return found
