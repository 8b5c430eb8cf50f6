"""Mixed precision: products of rounded operands, against the same in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.evidence.mixed import mixed, product


def _rounded(*shape, seed):
    """Numbers that bfloat16 holds exactly."""
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(found).astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 3, 4)])
def test_numbers_that_bfloat16_holds_are_multiplied_as_in_float32(lead):
    x, kernel = _rounded(*lead, 5, seed=0), _rounded(5, 7, seed=1)
    assert product(x, kernel).dtype == jnp.float32
    np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 3, 4)])
def test_derivatives_are_those_of_float32(lead):
    x, kernel, weights = _rounded(*lead, 5, seed=0), _rounded(5, 7, seed=1), _rounded(*lead, 7, seed=2)

    def of(multiply):
        return jax.grad(lambda x, kernel: jnp.sum(multiply(x, kernel) * weights), argnums=(0, 1))(x, kernel)

    for ours, wanted in zip(of(product), of(jnp.matmul), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


def test_other_numbers_are_rounded():
    third = jnp.full((1, 1), 1 / 3)
    assert float(product(third, jnp.ones((1, 1)))[0, 0]) == float(third.astype(jnp.bfloat16)[0, 0])


def test_all_linear_layers_of_a_module_multiply_so():
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.List([nnx.Linear(4, 2, rngs=nnx.Rngs(1))])[0])
    x = jnp.full((1, 3), 1 / 3)
    before = module(x)
    after = mixed(module)(x)
    np.testing.assert_allclose(after, before, rtol=0.03, atol=0.01)
    assert not np.array_equal(after, before)
