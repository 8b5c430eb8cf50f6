"""Order statistics of magnitudes against NumPy."""

import tracemalloc
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tadrop_jax as tj
from tadrop_jax import selection, wide

pytestmark = pytest.mark.optimised

RNG = np.random.default_rng(8)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
TINY = {jnp.float32: 1e-45, jnp.bfloat16: 9.2e-41, jnp.float16: 6e-8}  # the smallest subnormal, or near it


def magnitudes(x) -> np.ndarray:
    """|x| as sorted float64, which holds every float32, bfloat16 and float16 exactly."""
    return np.sort(np.abs(np.asarray(x).astype(np.float64)), axis=None)


def same_bits(actual, expected: float, dtype) -> bool:
    """Equal as stored numbers; a comparison on the device would flush subnormals."""
    actual = np.asarray(actual)
    return actual.dtype == dtype and bool(np.asarray(actual, np.float64) == expected)


def values_with_everything(dtype) -> np.ndarray:
    """33 values: ties, both zeros, subnormals, infinities, and the rest normal."""
    rng = np.random.default_rng(0)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        TINY[dtype],
        -2 * TINY[dtype],
        3 * TINY[dtype],
        0.5,
        -0.5,
        0.5,
        2,
        2,
    ]
    x = np.concatenate([special, rng.normal(size=33 - len(special))])
    return rng.permutation(x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_every_rank(dtype):
    x = values_with_everything(dtype)
    select = jax.jit(tj.kth_largest_magnitude)  # k is traced: one compilation for all ranks
    for k in range(1, x.size + 1):
        assert same_bits(select(x, k), magnitudes(x)[-k], dtype), k


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_subnormals_outside_jit(dtype):
    x = values_with_everything(dtype)
    expected = magnitudes(x)
    smallest = int(np.count_nonzero(expected == 0))
    assert 0 < expected[smallest] < jnp.finfo(dtype).tiny
    assert same_bits(tj.kth_largest_magnitude(x, x.size - smallest), expected[smallest], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("axis", [None, 0, -1, (1, 2)], ids=str)
def test_axis(dtype, axis):
    x = np.random.default_rng(1).normal(size=(4, 7, 5)).astype(dtype)
    axes = (0, 1, 2) if axis is None else tuple(a % 3 for a in np.atleast_1d(axis))
    kept = [a for a in range(3) if a not in axes]
    rows = np.abs(x.astype(np.float64)).transpose(*kept, *axes).reshape(*[x.shape[a] for a in kept], -1)
    select = jax.jit(lambda x, k: tj.kth_largest_magnitude(x, k, axis=axis))
    for k in (1, rows.shape[-1] // 2 + 1, rows.shape[-1]):
        actual = np.asarray(select(x, k))
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual.astype(np.float64), np.sort(rows, axis=-1)[..., -k])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_a_larger_matrix(dtype):
    x = np.random.default_rng(2).normal(size=(64, 48)).astype(dtype)
    for k in (1, 2, 614, 1536, 3071, 3072):
        expected = np.partition(np.abs(x.astype(np.float64)), x.size - k, axis=None)[x.size - k]
        assert same_bits(tj.kth_largest_magnitude(x, k), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("data", ["everything", "normal", "mostly zero"])
def test_the_host_samples_and_counts(dtype, data, monkeypatch):
    """What runs outside jit on a CPU, beyond the sizes that are partitioned as they are; the bits of the other way."""
    for name, value in {"_PARTITION": {2: 100, 4: 100}, "_FEW": 100, "_STRIDE": 4, "_BLOCK": 256}.items():
        monkeypatch.setattr(selection, name, value)
    x = {
        "everything": lambda: np.tile(values_with_everything(dtype), 93).reshape(93, 33),
        "normal": lambda: RNG.normal(size=(93, 33)).astype(dtype),
        "mostly zero": lambda: (RNG.normal(size=3069) * (RNG.random(3069) < 0.1)).astype(dtype),
    }[data]()
    expected = magnitudes(x)
    for k in (1, 7, 300, 1535, 3000, 3069):
        assert same_bits(tj.kth_largest_magnitude(x, k), expected[-k], dtype)
    for q in (0.0, 0.3, 0.75, 1.0):
        assert same_bits(tj.magnitude_quantile(x, q, method="lower"), expected[int(q * 3068)], dtype)


@pytest.mark.parametrize("size", [1 << 21, 1 << 23])
def test_the_host_takes_no_more_memory_for_more_entries(size, monkeypatch):
    """NumPy tells tracemalloc of its arrays: a sample, what is near the rank, and a block for each thread."""
    monkeypatch.setattr(selection, "_PARTITION", {2: 1 << 18, 4: 1 << 18})
    x = jnp.asarray(RNG.normal(size=size).astype(np.float32))
    tj.kth_largest_magnitude(x, size // 5)
    tracemalloc.start()
    try:
        tj.kth_largest_magnitude(x, size // 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


@given(hnp.arrays(np.float32, (33,), elements=st.floats(width=32, allow_nan=False)), st.integers(1, 33))
def test_any_values(x, k):
    assert same_bits(tj.kth_largest_magnitude(x, k), magnitudes(x)[-k], jnp.float32)


@given(hnp.arrays(np.float32, (33,), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0])), st.integers(1, 33))
def test_ties(x, k):
    assert same_bits(tj.kth_largest_magnitude(x, k), magnitudes(x)[-k], jnp.float32)


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)], ids=str)
def test_size_one(shape):
    x = np.full(shape, -3.0, np.float32)
    assert same_bits(tj.kth_largest_magnitude(x, 1), 3.0, jnp.float32)
    for method in ("linear", "lower"):
        assert same_bits(tj.magnitude_quantile(x, 0.3, method=method), 3.0, jnp.float32)


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_size_zero_is_refused(shape):
    with pytest.raises(tj.MergeError, match=r"(?i)empty|no entr|size 0|0 entr"):
        tj.kth_largest_magnitude(np.zeros(shape, np.float32), 1)
    with pytest.raises(tj.MergeError, match=r"(?i)empty|no entr|size 0|0 entr"):
        tj.magnitude_quantile(np.zeros(shape, np.float32), 0.5)


@pytest.mark.parametrize("k", [0, -1, 34])
def test_rank_out_of_range_is_refused(k):
    with pytest.raises(tj.MergeError, match=str(k)):
        tj.kth_largest_magnitude(np.ones(33, np.float32), k)


@pytest.mark.parametrize("q", [-0.1, 1.5])
def test_quantile_out_of_range_is_refused(q):
    with pytest.raises(tj.MergeError, match=str(q)):
        tj.magnitude_quantile(np.ones(33, np.float32), q)


def test_several_quantiles_are_refused():
    with pytest.raises(tj.ParameterError, match=r"q must be one number, got an array of shape \(2,\)"):
        tj.magnitude_quantile(np.ones(33, np.float32), jnp.array([0.1, 0.3]))


def test_unknown_method_is_refused():
    with pytest.raises(tj.MergeError, match="nearest-ish"):
        tj.magnitude_quantile(np.ones(33, np.float32), 0.5, method="nearest-ish")


QUANTILES = [0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("q", QUANTILES)
def test_quantile_lower(dtype, q):
    x = values_with_everything(dtype)
    expected = np.quantile(magnitudes(x), q, method="lower")
    assert same_bits(tj.magnitude_quantile(x, q, method="lower"), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(33,), (64, 48)], ids=str)
def test_quantile_linear(dtype, shape):
    x = np.random.default_rng(3).normal(size=shape).astype(dtype)
    for q in QUANTILES:
        expected = np.quantile(magnitudes(x), q)
        actual = np.asarray(tj.magnitude_quantile(x, q)).astype(np.float64)
        np.testing.assert_allclose(actual, expected, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("q", [0.0, 0.2, 0.25, 0.3, 0.5, 0.8, 1.0])
def test_quantile_linear_beside_infinities(q):
    """NumPy gives NaN between two infinities, and at infinity times zero; ours is never finite there."""
    x = np.array([1.0, -np.inf, np.inf, 2.0, np.inf], np.float32)
    actual = np.asarray(tj.magnitude_quantile(x, q), np.float64)
    expected = np.quantile(magnitudes(x), q)
    if np.isnan(expected):
        assert not np.isfinite(actual)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@given(st.integers(0, 3071))
def test_a_quantile_at_a_rank_is_that_entry(rank):
    """q = rank / (n - 1) in float64, as NumPy takes it, for any rank."""
    x = np.arange(3072, dtype=np.float32).reshape(64, 48)
    q = rank / 3071
    assert np.asarray(tj.magnitude_quantile(x, q, method="lower")) == np.quantile(
        x.astype(np.float64), q, method="lower"
    )


def test_vmap_over_ranks_and_rows():
    x = np.random.default_rng(5).normal(size=(4, 33)).astype(np.float32)
    expected = np.sort(np.abs(x), axis=1)
    k = np.array([1, 5, 17, 33])
    one_row = jax.vmap(lambda k: tj.kth_largest_magnitude(x[0], k))(k)
    np.testing.assert_array_equal(one_row, expected[0][-k])
    rows = jax.vmap(tj.kth_largest_magnitude)(x, k)
    np.testing.assert_array_equal(rows, expected[np.arange(4), -k])


@pytest.mark.parametrize("method", ["linear", "lower"])
def test_vmap_over_quantiles(method):
    x = np.random.default_rng(6).normal(size=(64, 48)).astype(np.float32)
    q = np.array([0.0, 0.1, 0.33, 0.75, 0.951, 1.0], np.float32)
    actual = jax.jit(jax.vmap(lambda q: tj.magnitude_quantile(x, q, method=method)))(q)
    expected = np.quantile(magnitudes(x), q.astype(np.float64), method=method)
    np.testing.assert_allclose(actual, expected, rtol=0 if method == "lower" else 1e-6)


def test_gradients_are_finite():
    x = values_with_everything(jnp.float32)
    x = np.where(np.isfinite(x), x, 0)
    for select in (lambda x: tj.kth_largest_magnitude(x, 5), lambda x: tj.magnitude_quantile(x, 0.3)):
        gradient = jax.grad(lambda x, select=select: jnp.sum(x) * select(x))(x)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_counts_beyond_what_one_sum_holds(axes, one_pass, monkeypatch):
    monkeypatch.setattr(selection, "_COUNTED", 10)
    keys = RNG.integers(0, 9, (7, 5, 6), np.uint32)
    kept = tuple(1 if a in axes else s for a, s in enumerate(keys.shape))
    pivots = jnp.asarray(np.stack([np.full(kept, 3, np.uint32), np.full(kept, 7, np.uint32)]))
    found = selection.exact_count(jnp.asarray(keys), pivots, axes, one_pass)
    expected = [np.sum(keys >= pivot, axes, keepdims=True) for pivot in (3, 7)]
    np.testing.assert_array_equal(np.asarray(found.high).astype(int) << 16 | np.asarray(found.low), expected)


@pytest.mark.parametrize("upper", [1, 2])
def test_a_quantile_between_a_value_that_many_have_and_one_that_the_sample_misses(upper, monkeypatch):
    for name, value in {"_PARTITION": {2: 100, 4: 100}, "_FEW": 100, "_STRIDE": 4, "_BLOCK": 256}.items():
        monkeypatch.setattr(selection, name, value)
    x = np.zeros(4096, np.float32)
    x[1::2] = upper  # a sample of every fourth entry is all zeros
    assert float(tj.magnitude_quantile(jnp.asarray(x), 0.5)) == np.quantile(x, 0.5)


@pytest.mark.parametrize("n", [1000, (1 << 26) + 3, (1 << 35) + 1])
def test_fractions_of_traced_quantiles(n):
    q = np.float32(0.7)
    exact = float(Fraction(float(q)) * n % 1)
    digits = min(22, 48 - n.bit_length())
    assert 0 <= exact - float(selection._fraction(jnp.asarray(q), n)) < 2.0**-digits


@pytest.mark.parametrize("k", [1.5, "2", None, jnp.array(1.0)])
def test_a_rank_that_is_no_whole_number_is_refused(k):
    with pytest.raises(tj.ParameterError, match="k must be a whole number"):
        tj.kth_largest_magnitude(jnp.ones((2, 3)), k)
    assert tj.kth_largest_magnitude(jnp.ones((2, 3)), jnp.array(6)) == 1


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, -2), (0, 5)], ids=str)
def test_axes_that_are_not_there_are_refused(axis):
    with pytest.raises(tj.ParameterError, match=r"axes of an array of shape \(2, 3\), each once, got"):
        tj.kth_largest_magnitude(jnp.ones((2, 3)), 1, axis=axis)
    with pytest.raises(tj.ParameterError, match=r"shape \(\)"):
        tj.kth_largest_magnitude(jnp.ones(()), 1, axis=0)


@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_keys_are_made_in_each_round_and_not_held(axes):
    """By XLA's account: of the whole array, and of rows, whose counts are small beside it."""
    k = wide.wide(np.full((1, *(1 if a in axes else s for a, s in enumerate((64, 4096)))), 5))

    def fifth(x):
        def made(pivots):
            return selection.magnitude(selection.anew(x, pivots))

        return selection.order_statistic(selection.magnitude(x), k, axes, made=made)

    compiled = jax.jit(fifth).lower(jax.ShapeDtypeStruct((64, 4096), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 4096
