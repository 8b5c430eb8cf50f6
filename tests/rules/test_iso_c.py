"""Iso-C against the formula in NumPy."""

import numpy as np
import pytest

import tadrop_jax as tj


def oracle(stack):
    """The authors' steps in float64."""
    u, s, vt = np.linalg.svd(stack.astype(np.float64).sum(axis=0), full_matrices=False)
    return u @ np.diag(np.full_like(s, s.mean())) @ vt


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in {"tall": (9, 6), "wide": (6, 9)}.items()}


@pytest.mark.parametrize("null_directions", ["drop", "keep"])
def test_equals_the_formula(stack, null_directions):
    merged = tj.merge_task_vectors(stack, tj.iso_c(0.5, null_directions=null_directions))
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], 0.5 * oracle(x), atol=1e-5, err_msg=name)


def test_directions_without_a_sum_get_no_weight(stack):
    """Task vectors of rank 2, as LoRA makes them: the other directions would be an accident of rounding."""
    low = stack["tall"][:, :, :2] @ stack["wide"][:, :2]
    low = np.concatenate([low[:1], np.zeros_like(low[:1])])
    singular = np.linalg.svd(low[0])[1]
    merged = tj.merge_task_vectors({"w": low}, tj.iso_c())["w"]
    expected = np.r_[np.full(2, singular.sum() / 9), np.zeros(7)]
    np.testing.assert_allclose(np.linalg.svd(merged)[1], expected, atol=1e-4)
    kept = tj.merge_task_vectors({"w": low}, tj.iso_c(null_directions="keep"))["w"]
    np.testing.assert_allclose(np.linalg.svd(kept)[1], np.full(9, singular.sum() / 9), rtol=1e-4)


def test_task_vectors_that_cancel_give_zero(stack):
    x = stack["tall"][:1]
    assert not np.any(tj.merge_task_vectors({"w": np.concatenate([x, -x])}, tj.iso_c())["w"])
