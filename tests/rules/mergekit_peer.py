"""Trees for the rules that mergekit has, and what mergekit's own functions make of them."""

import numpy as np
import pytest

import tadrop_jax as tj

Tree = dict[str, np.ndarray]


ALL = ("block/bias", "block/kernel", "conv/kernel", "scale")
# Where the shape does not matter: every further one is a compilation.
ONE = ("block/kernel",)


def family(make_stacks, kind: str, tasks: int, dtype=np.float32, names=ALL) -> tuple[Tree, list[Tree]]:
    """A base and T models, by name; the models of kind "exact" have ties, zero task vectors and opposite entries."""
    stacks = {n: s for n, s in make_stacks(kind, tasks).items() if n in names}
    rng = np.random.default_rng(tasks)
    base = {n: (rng.integers(-64, 65, s.shape[1:]) / 64).astype(dtype) for n, s in stacks.items()}
    models = [{n: (base[n].astype(np.float32) + s[t]).astype(dtype) for n, s in stacks.items()} for t in range(tasks)]
    return base, models


def ours(base: Tree, models: list[Tree], rule, **how) -> Tree:
    return {n: np.asarray(x) for n, x in tj.merge(base, models, rule, **how).items()}


def theirs(method: str, base: Tree | None, models: list[Tree], dtype=np.float64, **parameters) -> Tree:
    """What mergekit's function makes of base (if there is one) and models, without its rounding unless asked for."""
    torch = pytest.importorskip("torch")
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    from mergekit.merge_methods.base import TensorGroup

    rows = [base, *models] if base is not None else models
    merged = {}
    for name in rows[0]:
        tensors = [torch.tensor(np.asarray(row[name], dtype)) for row in rows]
        group = TensorGroup.from_tensors(tensors, base_index=None if base is None else 0)
        merged[name] = registry.get(method)([group], parameters=parameters)[0].numpy()
    return merged


def assert_close(actual: Tree, expected: Tree, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(
            np.asarray(actual[name], np.float32), expected[name], rtol=rtol, atol=atol, err_msg=name
        )
