"""CART against the formula in NumPy."""

import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.rules.cart import kept_rank


def oracle(stack, rank, strength):
    """The authors' steps in float64: differences from the mean, truncated one by one."""
    stack = stack.astype(np.float64)
    mean = stack.mean(axis=0)
    total = np.zeros_like(mean)
    for task in stack:
        u, s, vt = np.linalg.svd(task - mean, full_matrices=False)
        r = 0 if rank == 0 else max(1, int(rank * len(s)))
        total += (u[:, :r] * s[:r]) @ vt[:r]
    return mean + strength * total


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in {"tall": (9, 6), "wide": (6, 9)}.items()}


@pytest.mark.parametrize(("rank", "strength"), [(0.12, 2.0), (0.5, 1.5)])
def test_equals_the_formula(stack, rank, strength):
    merged = tj.merge_task_vectors(stack, tj.cart(rank, strength, 0.5))
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], 0.5 * oracle(x, rank, strength), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("rank", [0, 1.0])
def test_no_direction_and_all_directions_give_the_mean(stack, rank):
    merged = tj.merge_task_vectors(stack, tj.cart(rank, 2.0))
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], x.mean(axis=0), atol=1e-5)


def test_ranks():
    assert [kept_rank(768, share) for share in (0, 0.0001, 0.12, 1)] == [0, 1, 92, 768]


def test_bad_numbers_are_refused():
    with pytest.raises(tj.ParameterError, match=r"cart: rank must lie in \[0, 1\], got -0.1"):
        tj.cart(-0.1)
    with pytest.raises(tj.ParameterError, match="cart: rank is one number, got 2"):
        tj.cart([0.1, 0.2])
    with pytest.raises(tj.ParameterError, match="cart: strength is one number, got 2"):
        tj.cart(strength=[1, 2])
