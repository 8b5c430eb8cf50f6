"""Flax and PyTorch layouts of one checkpoint give the same masks: groups, rows, ties and random positions."""

import jax
import numpy as np
import pytest

import tadrop_jax as tj

TASKS = 2
# Flax shapes, and the permutations that bring them into PyTorch order.
ORDERS = {"dense/kernel": (1, 0), "conv/kernel": (3, 2, 0, 1), "bias": (0,)}
SHAPES = {"dense/kernel": (6, 10), "conv/kernel": (3, 3, 2, 4), "bias": (11,)}
LAYOUT = {name: tj.Layout(name.replace("kernel", "weight"), order) for name, order in ORDERS.items()}
STEPS = {
    "n_m": tj.n_m(3, 8),
    "magnitude_exact": tj.magnitude(0.4, keep="exact"),
    "dare": tj.dare(0.5),
    "della_row": tj.della(0.5, 0.3),
    "della_second_axis": tj.della(0.5, 0.3, granularity="second_axis"),
    "della_tensor": tj.della(0.5, 0.3, granularity="tensor"),
    "breadcrumbs_row": tj.breadcrumbs(0.5, 0.2),
    "breadcrumbs_tensor": tj.breadcrumbs(0.5, 0.2, granularity="tensor"),
    "conflict_aware": tj.conflict_aware(tj.n_m(3, 8)),
    "cabs_overlap": tj.cabs(6, 8, overlap="exact"),
    "sce": tj.sce(0.4),
}


def flax_models() -> tuple[dict, list[dict]]:
    """Few values, so that ties decide."""
    rng = np.random.default_rng(0)
    models = [{k: rng.integers(-4, 5, s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(TASKS)]
    return {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}, models


def to_torch(tree: dict) -> dict:
    return {LAYOUT[k].name: np.transpose(v, ORDERS[k]) for k, v in tree.items()}


@pytest.mark.parametrize("name", STEPS)
def test_both_layouts_give_the_same(name):
    base, models = flax_models()
    step, key = STEPS[name], jax.random.key(0)
    rule = tj.chain(step, tj.task_arithmetic([1.0, 16.0])) if name not in ("cabs_overlap", "sce") else step
    flax = tj.merge(base, models, rule, layout=LAYOUT, key=key)
    torch = tj.merge(to_torch(base), [to_torch(m) for m in models], rule, key=key)
    for tensor, value in to_torch({k: np.asarray(v) for k, v in flax.items()}).items():
        np.testing.assert_allclose(value, torch[tensor], rtol=1e-6, err_msg=tensor)


def test_without_a_layout_they_differ():
    base, models = flax_models()
    rule = tj.chain(tj.n_m(3, 8), tj.average())
    flax = tj.merge(base, models, rule)
    torch = tj.merge(to_torch(base), [to_torch(m) for m in models], rule)
    assert np.any(np.transpose(flax["dense/kernel"]) != torch["dense/weight"])
