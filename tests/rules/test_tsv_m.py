"""TSV-M against the formula in NumPy, and where tasks outnumber or lack directions."""

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.rules.tsv_m import leading_rank, merge


def oracle(stack):
    """The authors' steps in float64, one task after another."""
    stack = stack.astype(np.float64)
    tasks, out, inn = stack.shape
    r = int(min(out, inn) * (1 / tasks))
    u, s, vt = np.zeros((out, r * tasks)), np.zeros(r * tasks), np.zeros((r * tasks, inn))
    for t in range(tasks):
        ut, st, vtt = np.linalg.svd(stack[t], full_matrices=False)
        at = slice(t * r, (t + 1) * r)
        u[:, at], s[at], vt[at] = ut[:, :r], st[:r], vtt[:r]
    (a, _, b), (c, _, d) = np.linalg.svd(u, full_matrices=False), np.linalg.svd(vt, full_matrices=False)
    return a @ b @ np.diag(s) @ c @ d


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in {"tall": (9, 6), "wide": (6, 9)}.items()}


@pytest.mark.parametrize("null_directions", ["drop", "keep"])
def test_equals_the_formula(stack, null_directions):
    merged = tj.merge_task_vectors(stack, tj.tsv_m(0.5, null_directions=null_directions))
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], 0.5 * oracle(x), atol=2e-5, err_msg=name)


def test_one_task_is_itself(stack):
    merged = tj.merge_task_vectors({n: x[:1] for n, x in stack.items()}, tj.tsv_m())
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], x[0], atol=1e-5)


def test_copies_of_one_model_keep_its_leading_directions(stack):
    x = stack["tall"][:1]
    u, s, vt = np.linalg.svd(x[0], full_matrices=False)
    merged = tj.merge_task_vectors({"w": np.repeat(x, 3, axis=0)}, tj.tsv_m())["w"]
    np.testing.assert_allclose(merged, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


def test_a_zero_task_vector_leaves_the_others_what_they_are(stack):
    """Its singular vectors are arbitrary: dropped, or kept as the authors keep them (the same LAPACK picks them)."""
    x = stack["tall"].copy()
    x[1] = 0
    dropped = tj.merge_task_vectors({"w": x}, tj.tsv_m())["w"]
    u, s, vt = (part[[0, 2]] for part in np.linalg.svd(x.astype(np.float64), full_matrices=False))
    left, right = np.concatenate(u[..., :2], axis=1), np.concatenate(vt[:, :2], axis=0)
    (a, _, b), (c, _, d) = np.linalg.svd(left, full_matrices=False), np.linalg.svd(right, full_matrices=False)
    np.testing.assert_allclose(dropped, a @ b @ np.diag(s[:, :2].ravel()) @ c @ d, atol=2e-5)
    kept = tj.merge_task_vectors({"w": x}, tj.tsv_m(null_directions="keep"))["w"]
    np.testing.assert_allclose(kept, oracle(x), atol=2e-5)
    assert np.max(np.abs(kept - dropped)) > 0.1


def test_more_tasks_than_directions_still_count():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3, 4)), jnp.float32)
    assert leading_rank(3, 5) == 1
    merged = merge(x)
    assert np.linalg.norm(merged) > 0.1
    assert np.all(np.isfinite(merged))


def test_ranks_are_rounded_as_the_authors_round_them():
    assert [leading_rank(768, t) for t in (8, 14, 20)] == [96, 54, 38]
    assert leading_rank(98, 49) == 1  # 98 * (1 / 49) is just below 2


def test_bad_choices_are_refused():
    with pytest.raises(tj.ParameterError, match="tsv_m: null_directions must be one of 'drop', 'keep', got 'skip'"):
        tj.tsv_m(null_directions="skip")
