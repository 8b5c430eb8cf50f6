"""NearSwap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed
from tests.rules.mergekit_peer import assert_close, family, ours


@pytest.mark.parametrize("t", [0.0, 0.25, 3.0])
def test_formula(t, make_stacks):
    base, models = family(make_stacks, "exact", 1)

    def moved(a, b):
        return b if abs(b - a) < t else a + t * np.sign(b - a)

    expected = {n: np.vectorize(moved, [np.float32])(b, models[0][n]) for n, b in base.items()}
    merged = ours(base, models, tj.nearswap(t))
    assert_close(merged, expected)
    assert_close(run_streamed(base, models, tj.nearswap(t))[0], merged)


def test_gradients_are_finite():
    def loss(t, model):
        return jnp.sum(tj.merge({"w": jnp.ones(3)}, [{"w": model}], tj.nearswap(t))["w"] ** 2)

    for found in jax.grad(loss, argnums=(0, 1))(0.5, jnp.array([1.0, 1.5, 4.0])):
        assert np.isfinite(found).all()


def test_refusals(make_stacks):
    base, models = family(make_stacks, "normal", 2)
    with pytest.raises(tj.ParameterError, match="nearswap: merges exactly 1 fine-tuned model, got 2"):
        tj.merge(base, models, tj.nearswap())
    with pytest.raises(tj.ParameterError, match=r"nearswap: t must lie in \[0, inf\], got -1"):
        tj.nearswap(-1.0)
