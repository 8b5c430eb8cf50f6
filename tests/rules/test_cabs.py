"""CABS with several models, and with masks that overlap."""

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed
from tests.oracles import keep_exactly

TASKS = 3


def largest(group: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Which entries are the largest of those that may be taken."""
    order = [i for i in np.argsort(-np.abs(group), kind="stable") if among[i]]
    kept = np.zeros(group.size, bool)
    kept[order[: max(count, 0)]] = True
    return kept


def overlapping(stacks: dict, n: int, m: int, overlap: str, tail="ceil", order=None) -> dict:
    """Group by group and task by task."""
    out = {}
    for name, stack in stacks.items():
        flat = stack.reshape(stack.shape[0], -1)
        pruned = np.zeros_like(flat)
        for start in range(0, flat.shape[1], m):
            taken = np.zeros(flat[0, start : start + m].size, bool)
            for turn, t in enumerate(order or range(stack.shape[0])):
                group = flat[t, start : start + m]
                whole = group.size == m
                count = n if whole else -(-group.size * n // m) if tail == "ceil" else 0
                if overlap == "authors" and turn > 0 and n >= m // 2:
                    kept = ~taken | largest(group, taken, group.size // 2) if count else np.zeros_like(taken)
                else:
                    kept = largest(group, ~taken, count)
                if overlap == "exact":
                    kept |= largest(group, taken, count - kept.sum())
                pruned[t, start : start + m] = np.where(kept, group, 0)
                taken |= pruned[t, start : start + m] != 0
        out[name] = pruned.reshape(stack.shape)
    return out


SETTINGS = [
    (3, 4, "exact", {}),
    (3, 8, "exact", {"order": [2, 0, 1]}),
    (3, 4, "authors", {"tail": "drop"}),
    (5, 8, "authors", {}),
    (3, 8, "authors", {}),
]


@pytest.mark.parametrize(("n", "m", "overlap", "more"), SETTINGS, ids=str)
def test_overlapping_masks(n, m, overlap, more, make_stacks, nest, flatten):
    lams = [1.0, 4.0, 16.0]
    rule = tj.cabs(n, m, lams, overlap=overlap, **more)
    for kind in ("exact", "normal"):
        stacks = {k: v for k, v in make_stacks(kind, TASKS).items() if k in ("block/bias", "block/kernel")}
        out = flatten(tj.merge_task_vectors(nest(stacks), rule))
        for name, pruned in overlapping(stacks, n, m, overlap, **more).items():
            expected = sum(lam * x for lam, x in zip(lams, pruned, strict=True))
            np.testing.assert_allclose(out[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_exact_overlap_keeps_n_of_every_task():
    """Two tasks at 5:8: the second takes the 3 free entries and its 2 largest of the others; the authors take 4."""
    stack = {"w": np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)}
    for overlap, second in [("exact", 5), ("authors", 7), (None, 3)]:
        for lams, count in [([1.0, 0.0], 5), ([0.0, 1.0], second)]:
            merged = tj.merge_task_vectors(stack, tj.cabs(5, 8, lams, overlap=overlap))["w"]
            assert [np.count_nonzero(row) for row in merged] == [count] * 4


def test_later_tasks_get_what_is_left():
    """Four tasks at 3:8, disjoint: two in full, one with the 2 entries that are left, one with none."""
    stack = {"w": np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)}
    counts = []
    for t in range(4):
        lams = [float(t == s) for s in range(4)]
        counts.append([np.count_nonzero(row) for row in tj.merge_task_vectors(stack, tj.cabs(3, 8, lams))["w"]])
    assert counts == [[3] * 5, [3] * 5, [2] * 5, [0] * 5]
    first = np.stack([keep_exactly(row, 3) for row in stack["w"][0]])
    merged = tj.merge_task_vectors(stack, tj.cabs(3, 8, [1.0, 0.0, 0.0, 0.0]))["w"]
    np.testing.assert_array_equal(merged, first)


def test_streamed_equals_in_memory(small_blocks):
    base, models = family(2)
    rule = tj.cabs(5, 8, 0.5, overlap="exact")
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_array_equal(streamed[name], value, err_msg=name)


def test_bad_requests_are_refused():
    with pytest.raises(tj.ParameterError, match="cabs: overlap must be one of None, 'exact', 'authors', got 'some'"):
        tj.cabs(overlap="some")
    with pytest.raises(tj.ParameterError, match=r"cabs: n must lie in \[0, 4\], got 5"):
        tj.cabs(5, 4, overlap="exact")
    with pytest.raises(tj.ParameterError, match="cabs: order must be a permutation of 0 to 1"):
        tj.merge_task_vectors({"w": np.ones((2, 8), np.float32)}, tj.cabs(5, 8, overlap="exact", order=[0, 2]))


@pytest.mark.parametrize("order", [[0.9, 1.2], "01", 1, [True, False]], ids=str)
def test_an_order_is_a_list_of_whole_numbers(order):
    for make in (tj.cabs, lambda **given: tj.cabs(overlap="exact", **given)):
        with pytest.raises(tj.ParameterError, match="order must be a"):
            make(order=order)


def test_an_order_may_be_anything_that_lists_tasks():
    expected = tj.conflict_aware(tj.magnitude(0.5), [1, 0])
    for order in ((1, 0), np.array([1, 0]), jnp.array([1, 0]), range(1, -1, -1)):
        assert tj.conflict_aware(tj.magnitude(0.5), order) == expected
