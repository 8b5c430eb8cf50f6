"""NuSLERP between two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import ONE, assert_close, family, ours, theirs
from tests.rules.test_slerp import transcription

WEIGHTS = [0.3, 0.9]


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_formula(granularity, make_stacks):
    base, models = family(make_stacks, "normal", 2)
    expected = {}
    for name, start in base.items():
        first, second = (m[name] - start for m in models)
        axis = {"row": -1, "column": 0}.get(granularity)
        if axis is None or not start.shape:
            expected[name] = start + transcription(first, second, 0.75, 1 - 1e-6)
            continue
        first, second = (np.moveaxis(v, axis, -1) for v in (first, second))
        rows = [transcription(first[at], second[at], 0.75, 1 - 1e-6) for at in np.ndindex(first.shape[:-1])]
        expected[name] = start + np.moveaxis(np.reshape(rows, first.shape), -1, axis)
    merged = ours(base, models, tj.nuslerp(WEIGHTS, granularity=granularity))
    assert_close(merged, expected)


@pytest.mark.peers
@pytest.mark.parametrize("weights", [[1.0, -1.0], [2.0, -1.0], [0.0, 1.0]])
def test_mergekit_with_odd_weights(weights, make_stacks):
    base, models = family(make_stacks, "normal", 2, names=ONE)
    assert_close(ours(base, models, tj.nuslerp(weights)), theirs("nuslerp", base, models, weight=weights))


def test_streamed(make_stacks):
    base, models = family(make_stacks, "exact", 2)
    for rule in (tj.nuslerp(WEIGHTS), tj.nuslerp(WEIGHTS, space="weights")):
        assert_close(run_streamed(base, models, rule)[0], ours(base, models, rule))


def test_rows_streamed(make_stacks):
    base, models = family(make_stacks, "exact", 2)
    rule = tj.nuslerp(WEIGHTS, granularity="row")
    assert_close(run_streamed(base, models, rule)[0], ours(base, models, rule))


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_rows_follow_the_layout(granularity):
    rng = np.random.default_rng(0)
    base, first, second = ({"w": rng.normal(size=(7, 5)).astype(np.float32)} for _ in range(3))
    rule = tj.nuslerp(granularity=granularity)
    torch_layout = ours(base, [first, second], rule)["w"]
    turned = [{"w": tree["w"].T} for tree in (base, first, second)]
    assert_close({"w": ours(turned[0], turned[1:], rule, layout={"w": (1, 0)})["w"].T}, {"w": torch_layout})


@pytest.mark.parametrize("factor", [2.0, -2.0])
def test_parallel_and_opposite_vectors_are_interpolated_linearly(factor):
    """mergekit's test for opposite vectors misses them by rounding, and its result is some thousand times too long."""
    v = np.random.default_rng(3).normal(size=301).astype(np.float32)
    stack = {"w": np.stack([v, factor * v])}
    np.testing.assert_allclose(
        tj.merge_task_vectors(stack, tj.nuslerp([0.75, 0.25]))["w"], (0.75 + 0.25 * factor) * v, rtol=1e-5
    )


@pytest.mark.peers
def test_mergekit_takes_opposite_vectors_for_an_arc():
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=301).astype(np.float32) for _ in range(20)]
    lengths = []
    for v in vectors:
        merged = theirs("nuslerp", {"w": 0 * v}, [{"w": v}, {"w": -2 * v}], np.float32, weight=[1.0, 1.0])["w"]
        lengths.append(np.linalg.norm(merged) / np.linalg.norm(v))
    assert max(lengths) > 100  # linear interpolation gives 0.5


def test_norms_beyond_float32_leave_nan_and_no_other_vector():
    stack = {"w": np.float32([[3e19, 1e19], [1e19, 3e19]])}
    assert np.isnan(tj.merge_task_vectors(stack, tj.nuslerp())["w"]).all()


def test_gradients_are_finite():
    rows = np.float32([[1, 2, 0], [2, 4, 0], [-1, -2, 0], [0, 0, 0], [3, 0, 1]])

    def loss(stack, weights, granularity):
        return jnp.sum(tj.merge_task_vectors({"w": stack}, tj.nuslerp(weights, granularity=granularity))["w"] ** 2)

    for granularity in ("tensor", "row"):
        for second in (rows, 0 * rows, -rows, rows[::-1]):
            found = jax.grad(loss, argnums=(0, 1))(jnp.stack([rows, second]), jnp.ones(2), granularity)
            assert all(np.isfinite(g).all() for g in found)


def test_refusals(make_stacks):
    for tasks in (1, 3):
        base, models = family(make_stacks, "normal", tasks)
        with pytest.raises(tj.ParameterError, match=f"nuslerp: merges exactly 2 fine-tuned models, got {tasks}"):
            tj.merge(base, models, tj.nuslerp())
    with pytest.raises(tj.ParameterError, match="space must be"):
        tj.nuslerp(space="sphere")
    with pytest.raises(TypeError, match="call tj"):
        tj.merge_task_vectors({"w": jnp.ones((2, 3))}, tj.nuslerp(space="weights"))
