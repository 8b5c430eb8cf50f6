"""Multi-SLERP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import ALL, ONE, assert_close, family, ours, theirs

WEIGHTS = (0.3, 0.9, 1.0, 0.2, 0.5)


def transcription(vectors, weights):
    """As mergekit's page describes it, tangent space and all, in float64."""
    if len(vectors) == 1:
        return vectors[0]
    flat = [np.ravel(v).astype(np.float64) for v in vectors]
    lengths = [np.linalg.norm(v) for v in flat]
    units = [v / n if n else v for v, n in zip(flat, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if np.linalg.norm(mean) == 0:
        return sum(w * v for w, v in zip(weights, vectors, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    assert np.linalg.norm(tangent) < 1e-12  # whatever the vectors: why the rule has no such step
    return np.reshape(mean * sum(w * n for w, n in zip(weights, lengths, strict=True)), np.shape(vectors[0]))


@pytest.mark.parametrize("kind", ["exact", "normal"])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_formula(kind, tasks, make_stacks):
    base, models = family(make_stacks, kind, tasks, names=ALL if tasks == 3 else ONE)
    weights = np.array(WEIGHTS[:tasks]) / sum(WEIGHTS[:tasks])
    expected = {n: b + transcription([m[n] - b for m in models], weights) for n, b in base.items()}
    merged = ours(base, models, tj.multislerp(WEIGHTS[:tasks]))
    assert_close(merged, expected)
    if kind == "exact" and tasks == 3:
        assert_close(run_streamed(base, models, tj.multislerp(WEIGHTS[:tasks]))[0], merged)


@pytest.mark.peers
def test_mergekit_with_two_that_balance_out():
    v = np.float32([1, 2, 2])
    base, models = {"w": 0 * v}, [{"w": v}, {"w": -v}]
    assert_close(ours(base, models, tj.multislerp()), theirs("multislerp", base, models, np.float32, weight=[1.0, 1.0]))


def test_vectors_that_balance_out_give_the_weighted_mean():
    v = np.float32([3, 4])
    stack = {"w": np.stack([v, -2 * v])}
    np.testing.assert_allclose(tj.merge_task_vectors(stack, tj.multislerp())["w"], -v / 2, rtol=1e-6)
    four = {"w": np.float32([[1, 0], [-1, 0], [0, 1], [0, -3]])}
    np.testing.assert_allclose(tj.merge_task_vectors(four, tj.multislerp())["w"], [0, -0.5], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_vectors_that_balance_out_to_within_rounding_have_no_direction(scale):
    turns = 2 * np.pi / 3 * np.arange(3) + 0.3
    stack = {"w": np.stack([np.cos(turns), np.sin(turns)], 1).astype(np.float32)}
    rule = tj.multislerp(scale, normalize=False)
    np.testing.assert_allclose(tj.merge_task_vectors(stack, rule)["w"] / scale, [0, 0], atol=1e-6)
    numbers = {"w": np.float32([[1.1e4], [2.3e4], [-3.1e4]])}
    found = tj.merge_task_vectors(numbers, tj.multislerp([0.5, 1.0, 1.5]))["w"]
    np.testing.assert_allclose(found, [(0.5 * 1.1e4 + 2.3e4 - 1.5 * 3.1e4) / 3], rtol=1e-6)


def test_zero_task_vectors_count_in_the_length_alone():
    stack = {"w": np.float32([[3, 4], [0, 0]]), "zero": np.zeros((2, 3), np.float32)}
    merged = tj.merge_task_vectors(stack, tj.multislerp())
    np.testing.assert_allclose(merged["w"], [1.5, 2], rtol=1e-6)
    np.testing.assert_array_equal(merged["zero"], 0)


def test_gradients_are_finite():
    def loss(stack, weights):
        return jnp.sum(tj.merge_task_vectors({"w": stack}, tj.multislerp(weights))["w"] ** 2)

    v = np.float32([1, 2, 2])
    for stack in ([v, v, v], [v, -v, 0 * v], [0 * v] * 3, [v, -2 * v, v[::-1]]):
        for found in jax.grad(loss, argnums=(0, 1))(jnp.stack(stack), jnp.ones(3)):
            assert np.isfinite(found).all()


def test_refusals():
    with pytest.raises(tj.ParameterError, match=r"multislerp: the sum of weights .* must not be 0, got \[1.0, -1.0\]"):
        tj.multislerp([1.0, -1.0])
    tj.multislerp([1.0, -1.0], normalize=False)
    with pytest.raises(tj.ParameterError, match="weights has 2 values, one per task, but there are 3 tasks"):
        tj.merge_task_vectors({"w": jnp.ones((3, 2))}, tj.multislerp([1.0, 2.0]))
    with pytest.raises(TypeError, match="call tj"):
        tj.merge_task_vectors({"w": jnp.ones((2, 3))}, tj.multislerp(space="weights"))
