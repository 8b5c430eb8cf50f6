"""Model Stock."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import ALL, ONE, assert_close, family, ours, theirs


def transcription(vectors, average="cosine"):
    """In float64, from the paper (cosines) and from fusion_bench's description (angles)."""
    vectors = [np.asarray(v, np.float64) for v in vectors]
    pairs = []
    for first, second in itertools.combinations(vectors, 2):
        size = np.linalg.norm(first) * np.linalg.norm(second)
        pairs.append(np.clip(np.sum(first * second) / size, -1, 1) if size else 0.0)
    mean = np.mean(pairs) if average == "cosine" else np.cos(np.mean(np.arccos(pairs)))
    divisor = 1 + (len(vectors) - 1) * mean
    ratio = 0 if abs(divisor) < 1e-6 else len(vectors) * mean / divisor
    return ratio * np.mean(vectors, axis=0)


@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_formula(average, tasks, make_stacks):
    for kind in ("exact", "normal"):
        base, models = family(make_stacks, kind, tasks, names=ALL if tasks == 3 else ONE)
        expected = {n: b + transcription([m[n] - b for m in models], average) for n, b in base.items()}
        assert_close(ours(base, models, tj.model_stock(average)), expected)


def test_formula_by_rows(make_stacks):
    base, models = family(make_stacks, "normal", 3)
    expected = {}
    for name, start in base.items():
        vectors = np.stack([m[name] - start for m in models]).reshape(3, -1, start.shape[-1] if start.ndim else 1)
        rows = [transcription(vectors[:, i]) for i in range(vectors.shape[1])]
        expected[name] = start + np.reshape(rows, start.shape)
    assert_close(ours(base, models, tj.model_stock(filter_wise=True)), expected, rtol=1e-4, atol=1e-5)


def test_streamed(make_stacks):
    base, models = family(make_stacks, "exact", 3)
    assert_close(run_streamed(base, models, tj.model_stock())[0], ours(base, models, tj.model_stock()))


def test_rows_streamed(make_stacks):
    base, models = family(make_stacks, "exact", 3)
    rule = tj.model_stock(filter_wise=True)
    assert_close(run_streamed(base, models, rule)[0], ours(base, models, rule))


@pytest.mark.peers
def test_mergekit_at_the_pole():
    """Two opposite task vectors: the base."""
    v = np.float32([1, 2, 2])
    base, models = {"w": 0 * v}, [{"w": v}, {"w": -v}]
    assert_close(ours(base, models, tj.model_stock()), theirs("model_stock", base, models))


@pytest.mark.peers
def test_mergekit_takes_small_moves_back():
    """Its least divisor of 1e-6 is as large as the product of norms of a tensor that moved by 1e-3."""
    stack = np.float32([[1, 0], [0.6, 0.8]])
    for size, share in ((1.0, 1.0), (1e-4, 0.02)):
        base, models = {"w": np.zeros(2, np.float32)}, [{"w": size * v} for v in stack]
        merged = ours(base, models, tj.model_stock())["w"]
        np.testing.assert_allclose(merged, size * np.float32([0.6, 0.3]), rtol=1e-5)
        assert np.linalg.norm(theirs("model_stock", base, models)["w"]) <= share * 1.0001 * np.linalg.norm(merged)


def test_rows_follow_the_layout():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(2, 7, 5)).astype(np.float32)
    rule, zero = tj.model_stock(filter_wise=True), np.zeros((7, 5), np.float32)
    merged = ours({"w": zero}, [{"w": v} for v in stack], rule)
    turned = ours({"w": zero.T}, [{"w": v.T} for v in stack], rule, layout={"w": (1, 0)})
    assert_close({"w": turned["w"].T}, merged)


@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_gradients_are_finite(average, filter_wise):
    def loss(stack):
        merged = tj.merge_task_vectors({"w": stack}, tj.model_stock(average, filter_wise=filter_wise))
        return jnp.sum(merged["w"] ** 2)

    gradient = jax.jit(jax.grad(loss))
    v = np.float32([[1, 2, 2], [0, 0, 0]])
    for stack in ([v, v], [v, -v], [v, 0 * v], [v, v[:, ::-1]]):
        assert np.isfinite(gradient(jnp.stack(stack))).all()


def test_refusals(make_stacks):
    base, models = family(make_stacks, "normal", 1)
    with pytest.raises(tj.ParameterError, match="model_stock: merges at least 2 fine-tuned models, got 1"):
        tj.merge(base, models, tj.model_stock())
    with pytest.raises(tj.ParameterError, match="average must be one of 'cosine', 'angle'"):
        tj.model_stock("mean")
