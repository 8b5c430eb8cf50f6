"""The Karcher mean on the sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import ALL, ONE, assert_close, family, ours, theirs

WEIGHTS = (0.3, 0.9, 1.0, 0.2, 0.5)


def transcription(models, weights, rounds=10, tol=1e-5):
    """From the paper, on the vectors themselves, in float64."""
    flat = [np.ravel(m).astype(np.float64) for m in models]
    if len(flat) == 1:
        return models[0]
    weights = np.array(weights) / sum(weights)
    lengths = np.array([np.linalg.norm(v) for v in flat])
    some = [t for t in range(len(flat)) if lengths[t] > tol]
    if not some:
        return np.zeros(np.shape(models[0]))
    share = {t: weights[t] / sum(weights[some]) for t in some}
    units = {t: flat[t] / lengths[t] for t in some}
    mean = sum(share[t] * units[t] for t in some)
    mean = units[some[0]] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(rounds):
        pull = np.zeros_like(mean)
        for t in some:
            cosine = np.clip(units[t] @ mean, -1, 1)
            if -1 + 1e-5 < cosine < 1:
                pull += share[t] * np.arccos(cosine) / np.sqrt(1 - cosine**2) * (units[t] - cosine * mean)
        step = np.linalg.norm(pull)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) * pull / step
        mean /= np.linalg.norm(mean)
    return np.reshape(mean * (weights @ lengths), np.shape(models[0]))


@pytest.mark.parametrize("kind", ["exact", "normal"])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_formula(kind, tasks, make_stacks):
    base, models = family(make_stacks, kind, tasks, names=ALL if tasks == 3 else ONE)
    rule = tj.karcher(WEIGHTS[:tasks])
    expected = {n: transcription([m[n] for m in models], WEIGHTS[:tasks]) for n in base}
    merged = ours(base, models, rule)
    assert_close(merged, expected)
    if kind == "exact" and tasks == 3:
        assert_close(run_streamed(base, models, rule)[0], merged)


@pytest.mark.peers
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_mergekit_where_models_lie_close(scale, make_stacks):
    """Inner products in float32 are enough: the rounds see differences that they cannot hold as angles."""
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(7, 5)).astype(np.float32)}
    models = [{"w": base["w"] + scale * rng.normal(size=(7, 5)).astype(np.float32)} for _ in range(5)]
    assert_close(ours(base, models, tj.karcher()), theirs("karcher", None, models))


@pytest.mark.peers
def test_mergekit_with_other_limits(make_stacks):
    base, models = family(make_stacks, "normal", 5, names=ONE)
    for limits in ({"max_iter": 0}, {"max_iter": 1}, {"tol": 0.1}):
        assert_close(ours(base, models, tj.karcher(**limits)), theirs("karcher", None, models, **limits))


@pytest.mark.peers
@pytest.mark.parametrize(
    "vectors",
    [
        [[1, 2, 2], [2, 4, 4], [3, 6, 6]],
        [[1, 2, 2], [-1, -2, -2]],
        [[1, 2, 2], [0, 0, 0], [2, 1, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 3, 4]],
    ],
    ids=["parallel", "antipodal", "one zero", "all zero", "one left"],
)
def test_mergekit_in_special_positions(vectors):
    models = [{"w": np.float32(v)} for v in vectors]
    assert_close(ours({"w": np.ones(3, np.float32)}, models, tj.karcher()), theirs("karcher", None, models, np.float32))


def test_it_is_the_nearest_point_of_the_sphere():
    """Mean squared angle: no neighbour on the sphere has less."""
    rng = np.random.default_rng(1)
    models = [{"w": rng.normal(size=12).astype(np.float32)} for _ in range(3)]
    found = np.asarray(ours({"w": np.zeros(12, np.float32)}, models, tj.karcher(max_iter=50))["w"], np.float64)

    def cost(point):
        point = point / np.linalg.norm(point)
        return sum(np.arccos(point @ m["w"].astype(np.float64) / np.linalg.norm(m["w"])) ** 2 for m in models)

    for _ in range(20):
        assert cost(found) <= cost(found + 1e-2 * np.linalg.norm(found) * rng.normal(size=12))


def test_the_base_does_not_enter(make_stacks):
    base, models = family(make_stacks, "exact", 5, names=ONE)
    elsewhere = {n: b + 1 for n, b in base.items()}
    assert_close(ours(base, models, tj.karcher()), ours(elsewhere, models, tj.karcher()))


def test_gradients_are_finite_and_right():
    def loss(stack, weights):
        models = [{"w": m} for m in stack]
        return jnp.sum(tj.merge({"w": jnp.zeros(3)}, models, tj.karcher(weights))["w"] ** 3)

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    v = np.float32([1, 2, 2])
    for stack in ([v, v, v], [v, -v, 0 * v], [0 * v] * 3, [v, -2 * v, v[::-1]]):
        for found in gradient(jnp.stack(stack), jnp.ones(3)):
            assert np.isfinite(found).all()
    apart = jnp.float32([[1, 0, 0.5], [0, 1, 0.2], [0.3, 0.1, 1]])
    h, weights = 1e-2, jnp.ones(3)
    other = jnp.array([h, 0, 0])
    numeric = (loss(apart, weights + other) - loss(apart, weights - other)) / (2 * h)
    assert float(gradient(apart, weights)[1][0]) == pytest.approx(float(numeric), rel=2e-2)


def test_refusals():
    with pytest.raises(tj.ParameterError, match="karcher: the sum of weights"):
        tj.karcher(0.0)
    with pytest.raises(tj.ParameterError, match=r"max_iter must lie in \[0, inf\], got -1"):
        tj.karcher(max_iter=-1)
    with pytest.raises(TypeError, match="call tj"):
        tj.merge_task_vectors({"w": jnp.ones((2, 3))}, tj.karcher())
