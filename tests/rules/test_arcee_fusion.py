"""Arcee Fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import assert_close, family, ours, theirs


def transcription(base, model):
    """In float64, from the formula."""
    base, model = np.asarray(base, np.float64), np.asarray(model, np.float64)

    def softmax(values):
        values = np.exp(values - values.max(axis=-1, keepdims=True))
        return values / values.sum(axis=-1, keepdims=True) + 1e-8

    if base.ndim == 0:
        return model  # one entry: its importance is 0, and so is the threshold
    p, q = softmax(model), softmax(base)
    importance = abs(model - base) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    ranked = np.sort(importance, axis=None)
    low, median, high = (ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), model, base)


def test_formula(make_stacks):
    base, models = family(make_stacks, "normal", 1)
    expected = {n: transcription(base[n], models[0][n]) for n in base}
    merged = ours(base, models, tj.arcee_fusion())
    assert_close(merged, expected)
    assert 0 < np.sum(merged["conv/kernel"] == base["conv/kernel"]) < merged["conv/kernel"].size


def test_streamed(make_stacks):
    base, models = family(make_stacks, "normal", 1)
    assert_close(run_streamed(base, models, tj.arcee_fusion())[0], ours(base, models, tj.arcee_fusion()))


@pytest.mark.peers
def test_a_model_that_equals_the_base(make_stacks):
    base, _ = family(make_stacks, "normal", 1)
    with pytest.warns(tj.MergeWarning):
        merged = ours(base, [base], tj.arcee_fusion())
    assert_close(merged, theirs("arcee_fusion", base, [base]))


def test_rows_follow_the_layout():
    rng = np.random.default_rng(0)
    base, model = ({"w": rng.normal(size=(7, 5)).astype(np.float32)} for _ in range(2))
    merged = ours(base, [model], tj.arcee_fusion())["w"]
    turned = ours({"w": base["w"].T}, [{"w": model["w"].T}], tj.arcee_fusion(), layout={"w": (1, 0)})["w"]
    np.testing.assert_array_equal(turned.T, merged)
    unlaid = ours({"w": base["w"].T}, [{"w": model["w"].T}], tj.arcee_fusion())["w"]
    assert (merged != unlaid.T).any()


def test_the_choice_is_a_constant_for_gradients():
    def loss(model):
        merged = tj.merge({"w": jnp.zeros((7, 5))}, [{"w": model}], tj.arcee_fusion())["w"]
        return jnp.sum(merged * merged)

    model = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    chosen = ours({"w": np.zeros((7, 5), np.float32)}, [{"w": model}], tj.arcee_fusion())["w"]
    np.testing.assert_allclose(jax.grad(loss)(model), 2 * chosen, rtol=1e-6)


def test_refusals(make_stacks):
    base, models = family(make_stacks, "normal", 2)
    with pytest.raises(tj.ParameterError, match="arcee_fusion: merges exactly 1 fine-tuned model, got 2"):
        tj.merge(base, models, tj.arcee_fusion())
