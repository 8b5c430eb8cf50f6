"""DC-Merge against the formula in NumPy, in the form of the authors' two scripts."""

import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.rules.dc_merge import merge


def oracle(stack, keep, smoothing=None, ratio=5.0, rank=None):
    """The authors' steps in float64: whole frames for full fine-tuning, r T columns of them for LoRA."""
    stack = stack.astype(np.float64)
    tasks, (out, inn) = stack.shape[0], stack.shape[1:]
    k = min(out, inn)
    r = int(k * (1 / tasks)) if rank is None else rank
    left, right, parts = np.zeros((out, k)), np.zeros((k, inn)), []
    for t in range(tasks):
        u, s, vt = np.linalg.svd(stack[t], full_matrices=False)
        left[:, t * r : (t + 1) * r], right[t * r : (t + 1) * r] = u[:, :r], vt[:r]
        s = s[:r]
        if smoothing == "average":
            s = np.full(r, s.sum() / r)
        if smoothing == "linear":
            falling = np.linspace(min(ratio, s[0] / s[-1]), 1, r)
            s = s.sum() * falling / falling.sum()
        parts.append((u[:, :r] * s) @ vt[:r])
    (a, _, b), (c, _, d) = np.linalg.svd(left, full_matrices=False), np.linalg.svd(right, full_matrices=False)
    left, right = a @ b, c @ d
    if rank is not None:
        left, right = left[:, : r * tasks], right[: r * tasks]
    tops = []
    for part in parts:
        m = left.T @ part @ right.T
        count = max(1, int(keep * m.size))
        tops.append(np.where(abs(m) >= np.sort(abs(m), axis=None)[-count], m, 0))
    sign = np.sign(sum(tops))
    agree = [(np.sign(m) == sign) for m in tops]
    mean = sum(m * a for m, a in zip(tops, agree, strict=True)) / np.maximum(sum(agree), 1)
    mean[sign == 0] = 0
    mask, each = np.zeros_like(mean), mean.shape[0] // tasks
    for t in range(tasks):
        mask[t * each : (t + 1) * each, t * each : (t + 1) * each] = 1
    return left @ (mean * mask) @ right


@pytest.fixture(scope="module")
def stack():
    """With three tasks, r T is 6 of 7 directions."""
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in {"tall": (9, 7), "wide": (7, 9)}.items()}


CASES = {
    "full fine-tuning": {"keep": 0.001},
    "many entries": {"keep": 0.4},
    "null directions": {"keep": 0.4, "null_directions": "keep"},
    "average": {"keep": 0.3, "smoothing": "average"},
    "LoRA": {"keep": 0.3, "smoothing": "linear", "ratio": 1.5, "rank": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(stack, case):
    merged = tj.merge_task_vectors(stack, tj.dc_merge(coefficient=0.5, **CASES[case]))
    options = {k: v for k, v in CASES[case].items() if k != "null_directions"}
    for name, x in stack.items():
        np.testing.assert_allclose(merged[name], 0.5 * oracle(x, **options), atol=5e-5, err_msg=name)


def test_more_tasks_than_directions_still_count():
    x = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)
    for rank in (None, 5):
        merged = merge(x, 0.1, "linear", rank=rank)
        assert np.all(np.isfinite(merged))
        assert np.linalg.norm(merged) > 0.1


def test_bad_numbers_are_refused():
    with pytest.raises(tj.ParameterError, match=r"dc_merge: keep must lie in \[0, 1\], got 2"):
        tj.dc_merge(2)
    with pytest.raises(tj.ParameterError, match="dc_merge: keep is one number, got 2"):
        tj.dc_merge([0.1, 0.2])
    with pytest.raises(tj.ParameterError, match="dc_merge: ratio must lie in"):
        tj.dc_merge(ratio=0.5)
    with pytest.raises(tj.ParameterError, match="dc_merge: rank must lie in"):
        tj.dc_merge(rank=0)
    with pytest.raises(tj.ParameterError, match="dc_merge: smoothing must be one of"):
        tj.dc_merge(smoothing="cubic")
    with pytest.raises(tj.ParameterError, match="null_directions"):
        tj.dc_merge(null_directions="skip")
