"""Exact integers in two limbs, and random numbers by position."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import pieces, randomness, wide

pytestmark = pytest.mark.optimised

SIZES = (1, 7, 1000, 38_597_376, 2**31 + 12_345, 2**40 + 77)


@pytest.mark.parametrize("n", SIZES)
def test_floor_times_is_exact_for_arrays(n):
    rng = np.random.default_rng(n)
    q = np.concatenate([rng.random(2000), rng.random(200) * 1e-7, [0, 1, 0.5, 1e-30, 1e-45]]).astype(np.float32)
    found = wide.to_int(jax.jit(lambda q: wide.floor_times(q, n))(q))
    # Subnormal shares count as 0: XLA on CPU flushes them.
    assert found == tuple(int(Fraction(float(v)) * n) if v > 1.2e-38 else 0 for v in q)


def test_floor_times_of_a_float_is_numpys():
    assert wide.floor_times(0.2, 38_597_376) == int(0.2 * 38_597_376)
    assert isinstance(wide.floor_times(np.float64(0.3), 10), int)


numbers = st.integers(0, wide.MAX // 2)


@hypothesis.given(numbers, numbers)
def test_arithmetic(a, b):
    big, small = max(a, b), min(a, b)
    assert wide.to_int(wide.add(wide.wide(a), wide.wide(b))) == a + b
    assert wide.to_int(wide.subtract(wide.wide(big), wide.wide(small))) == big - small
    assert bool(wide.at_least(wide.wide(a), wide.wide(b))) == (a >= b)
    assert wide.to_int(wide.maximum(wide.wide(a), wide.wide(b))) == big
    assert wide.to_int(wide.minimum(wide.wide(a), wide.wide(b))) == small


def test_out_of_range():
    for value in (-1, 2**48):
        with pytest.raises(OverflowError):
            wide.wide(value)


def test_uniform_is_jax_random_bits():
    key = randomness.tensor_key(jax.random.key(7), "layer/kernel")
    n = 1000
    found = randomness.uniform(key, (2, 0), jnp.zeros(n, jnp.uint32), jnp.arange(n, dtype=jnp.uint32))
    for task, row in zip((2, 0), found, strict=True):
        bits = jax.random.bits(jax.random.fold_in(key, task), (n,), "uint32")
        np.testing.assert_array_equal(row, (np.asarray(bits) >> 8).astype(np.float32) / 2**24)
        assert 0.45 < float(row.mean()) < 0.55


def test_positions_are_64_bits():
    """A shard that lies beyond 2^32 entries of a (2^20, 2^20) tensor."""
    offsets = [jnp.uint32(2**20 - 2), jnp.uint32(2**20 - 3)]
    high, low = pieces.positions((2, 3), (2**20, 2**20), None, offsets)
    found = (np.asarray(high).astype(np.int64) << 32) + np.asarray(low)
    rows, columns = np.mgrid[2**20 - 2 : 2**20, 2**20 - 3 : 2**20]
    np.testing.assert_array_equal(found, rows * 2**20 + columns)


@pytest.mark.parametrize("key", [None, 0, jax.random.key(0, impl="rbg"), jax.random.split(jax.random.key(0), 2)])
def test_keys_that_will_not_do(key):
    with pytest.raises(tj.MergeError, match="key"):
        tj.sparsify({"w": jnp.ones((1, 4))}, tj.dare(0.5), key=key)


def test_old_style_keys_are_taken():
    new, old = jax.random.key(5), jax.random.PRNGKey(5)
    stack = {"w": jnp.ones((1, 64))}
    np.testing.assert_array_equal(
        tj.sparsify(stack, tj.dare(0.5), key=new)["w"], tj.sparsify(stack, tj.dare(0.5), key=old)["w"]
    )


def test_floor_times_of_counts_is_pythons():
    """Counts in an array times a Python float: the product rounded to float64, as ``math.floor(q * n)`` has it."""
    rng = np.random.default_rng(0)
    counts = np.concatenate([np.arange(300), rng.integers(0, 1 << 32, 300), [(1 << 24) + 1, (1 << 32) - 1]])
    shares = [0.0, 1.0, 0.1, 0.3, 1 / 3, 0.29, 0.7, 1 - 2**-53, 2.0**-44, 1e-300, *rng.random(10)]
    for q in shares:
        found = wide.to_int(wide.floor_times(q, jnp.asarray(counts.astype(np.uint32))))
        assert found == tuple(math.floor(q * int(n)) for n in counts), q


def test_floor_times_of_counts_and_arrays():
    shares = np.float32([0.3, 0.7, 1e-9, 1, 0])
    for n in (0, 1, 10, 12345, (1 << 32) - 1):
        found = wide.to_int(jax.jit(wide.floor_times)(shares, jnp.full(5, n, jnp.uint32)))
        assert found == tuple(int(Fraction(float(q)) * n) for q in shares)
