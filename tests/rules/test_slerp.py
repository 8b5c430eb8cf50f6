"""SLERP between the base and one model."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import ALL, ONE, assert_close, family, ours, theirs


def transcription(a, b, t, threshold=0.9995):
    """In float64, from the formula."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = [np.sqrt(np.sum(v * v)) for v in (a, b)]
    cosine = 0.0 if min(lengths) == 0 else np.clip(np.sum(a * b) / (lengths[0] * lengths[1]), -1, 1)
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def pair(base, model):
    return {"w": np.asarray(base, np.float32)}, [{"w": np.asarray(model, np.float32)}]


@pytest.mark.parametrize("kind", ["exact", "normal"])
@pytest.mark.parametrize(("t", "names"), [(0.3, ALL), (0.0, ONE), (1.0, ONE)])
def test_formula(kind, t, names, make_stacks):
    base, models = family(make_stacks, kind, 1, names=names)
    expected = {n: transcription(base[n], models[0][n], t) for n in base}
    merged = ours(base, models, tj.slerp(t))
    assert_close(merged, expected)
    assert_close(run_streamed(base, models, tj.slerp(t))[0], merged)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("base", "model"),
    [
        ([1, 2, 2], [2, 4, 4]),
        ([1, 2, 2], [-2, -4, -4]),
        ([0, 0, 0], [1, 2, 3]),
        ([1, 2, 3], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
        ([1, 0, 0], [0.03, 1, 0]),
    ],
    ids=["parallel", "antipodal", "zero base", "zero model", "both zero", "nearly orthogonal"],
)
def test_mergekit_in_special_positions(base, model):
    base, models = pair(base, model)
    assert_close(ours(base, models, tj.slerp(0.3)), theirs("slerp", base, models, t=0.3))


def test_bfloat16_is_worked_out_in_float32(make_stacks):
    base, models = family(make_stacks, "normal", 1, ml_dtypes.bfloat16, ONE)
    merged = ours(base, models, tj.slerp(0.3))
    for name in base:
        assert merged[name].dtype == ml_dtypes.bfloat16
        expected = transcription(base[name], models[0][name], 0.3).astype(np.float32).astype(ml_dtypes.bfloat16)
        np.testing.assert_allclose(merged[name].astype(np.float32), expected.astype(np.float32), rtol=1e-2)


def test_threshold():
    base, models = pair([1, 0], [0.8, 0.6])
    arc = ours(base, models, tj.slerp(0.5))["w"]
    assert np.linalg.norm(arc) == pytest.approx(1)
    np.testing.assert_allclose(ours(base, models, tj.slerp(0.5, threshold=0.7))["w"], [0.9, 0.3], rtol=1e-6)


@pytest.mark.parametrize("model", [[1, 2, 2], [-2, -4, -4], [3, 6, 6]], ids=["equal", "opposite", "parallel"])
def test_collinear_vectors_have_no_arc_whatever_the_threshold(model):
    base, models = pair([1, 2, 2], model)
    chord = 0.7 * base["w"] + 0.3 * models[0]["w"]
    np.testing.assert_allclose(ours(base, models, tj.slerp(0.3, threshold=1.0))["w"], chord, rtol=1e-6)


def test_gradients_are_finite_and_right():
    base, models = pair([1, 0, 2], [0, 1, 1])

    def loss(t, model):
        return jnp.sum(tj.merge(base, [{"w": model}], tj.slerp(t))["w"] ** 3)

    gradient = float(jax.grad(loss)(0.3, models[0]["w"]))
    h = 1e-3
    numeric = float(loss(0.3 + h, models[0]["w"]) - loss(0.3 - h, models[0]["w"])) / (2 * h)
    assert gradient == pytest.approx(numeric, rel=1e-2)
    for model in (base["w"], 0 * base["w"], -base["w"]):
        assert all(np.isfinite(g).all() for g in jax.grad(loss, argnums=(0, 1))(0.3, model))


def test_a_sparsifier_goes_before_it(make_stacks):
    """The model that is met is the base plus what the sparsifier left."""
    base, models = family(make_stacks, "exact", 1, names=ONE)
    sparse = tj.sparsify(tj.task_vectors(base, models), tj.magnitude(0.3))
    left = [{n: base[n] + np.asarray(sparse[n][0]) for n in base}]
    assert_close(ours(base, models, tj.slerp(0.3), sparsifier=tj.magnitude(0.3)), ours(base, left, tj.slerp(0.3)))


def test_refusals(make_stacks):
    base, models = family(make_stacks, "normal", 2)
    with pytest.raises(tj.ParameterError, match="slerp: merges exactly 1 fine-tuned model, got 2"):
        tj.merge(base, models, tj.slerp(0.5))
    with pytest.raises(tj.ParameterError, match=r"slerp: t must lie in \[0, 1\], got 1.5"):
        tj.slerp(1.5)
    with pytest.raises(tj.ParameterError, match="slerp: t is one number, got 2"):
        tj.slerp([0.1, 0.2])
    with pytest.raises(TypeError, match="call tj"):
        tj.merge_task_vectors({"w": jnp.ones((1, 3))}, tj.slerp(0.5))
