"""Iso-CTS against the formula in NumPy, and its ranks."""

import jax
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.rules.iso_cts import ranks


def oracle(stack, common):
    """The authors' steps in float64."""
    stack = stack.astype(np.float64)
    tasks, k = stack.shape[0], min(stack.shape[1:])
    c = int(k * common)
    own = round((k - c) / tasks) * tasks
    c = k - own
    n = int((k - c) / tasks)
    u, s, vt = np.linalg.svd(stack.sum(axis=0), full_matrices=False)
    us, ss, vts = [], [], []
    for task in stack:
        outside = task - u[:, :c] @ u[:, :c].T @ task
        ut, st, vtt = np.linalg.svd(outside, full_matrices=False)
        us.append(ut[:, :n]), ss.append(st[:n]), vts.append(vtt[:n])
    left, right = np.concatenate([*us, u[:, :c]], axis=1), np.concatenate([*vts, vt[:c]], axis=0)
    mean = np.concatenate([*ss, s[:c]]).mean()
    (a, _, b), (p, _, q) = np.linalg.svd(left, full_matrices=False), np.linalg.svd(right, full_matrices=False)
    return mean * (a @ b @ p @ q)


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in {"tall": (12, 9), "wide": (9, 12)}.items()}


@pytest.mark.parametrize(("common", "null_directions"), [(0.8, "drop"), (0.4, "drop"), (0.4, "keep")])
def test_equals_the_formula(stack, common, null_directions):
    merged = tj.merge_task_vectors(stack, tj.iso_cts(common, 0.5, null_directions=null_directions))
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], 0.5 * oracle(x, common), atol=2e-5, err_msg=name)


def test_without_directions_of_tasks_it_is_iso_c(stack):
    merged = tj.merge_task_vectors(stack, tj.iso_cts(1.0))
    expected = tj.merge_task_vectors(stack, tj.iso_c())
    for name in stack:
        np.testing.assert_allclose(merged[name], expected[name], atol=1e-5)


def test_ranks():
    assert ranks(768, 8, 0.8) == (616, 19)  # 614 by the share; 154 / 8 is 19.25
    assert ranks(10, 4, 0.0) == (2, 2)  # 2.5 to even
    assert ranks(12, 8, 0.0) == (4, 1)  # 1.5 to even is 2, and 2 * 8 would not fit
    assert ranks(5, 8, 0.0) == (5, 0)
    assert ranks(3, 8, 0.8) == (3, 0)


def test_a_task_inside_the_common_subspace_adds_nothing():
    """One direction, shared: outside of it there is rounding, and no direction of a task."""
    x = np.outer(np.arange(1, 7), np.arange(1, 6)).astype(np.float32)
    merged = tj.merge_task_vectors({"w": np.stack([x, 2 * x])}, tj.iso_cts(0.5))["w"]
    assert np.linalg.matrix_rank(merged, tol=1e-2) == 1
    assert not np.any(tj.merge_task_vectors({"w": 0 * np.stack([x, x])}, tj.iso_cts(0.5))["w"])


def test_bad_shares_are_refused():
    with pytest.raises(tj.ParameterError, match=r"common must lie in \[0, 1\], got 1.5"):
        tj.iso_cts(1.5)
    with pytest.raises(tj.ParameterError, match="common is one number, got 2"):
        tj.iso_cts([0.5, 0.5])
    with pytest.raises(tj.ParameterError, match="common decides on shapes and cannot be traced"):
        jax.make_jaxpr(lambda share: tj.iso_cts(share) and share)(0.5)
    with pytest.raises(tj.ParameterError, match="null_directions"):
        tj.iso_cts(null_directions="skip")
