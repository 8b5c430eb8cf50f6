"""The decompositions against NumPy in float64, and their gradients against finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tadrop_jax import linalg

SHAPES = [(6, 4), (4, 6)]


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_a_batch_equal_numpy(shape):
    batch = _normal(3, *shape)
    u, s, vt = linalg.svd(batch)
    expected = np.linalg.svd(batch.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(s, expected[1], rtol=1e-5)
    np.testing.assert_allclose(u * s[:, None] @ vt, batch, atol=1e-5)
    factor = expected[0] @ expected[2]
    np.testing.assert_allclose(linalg.polar(batch), factor, atol=1e-5)
    np.testing.assert_allclose(linalg.polar(batch, True), factor, atol=1e-5)
    low = (expected[0][..., :2] * expected[1][:, None, :2]) @ expected[2][:, :2]
    np.testing.assert_allclose(linalg.truncate(batch, 2), low, atol=1e-5)
    gram = batch.swapaxes(-1, -2) @ batch
    values, vectors = linalg.eigh(gram)
    np.testing.assert_allclose(vectors * values[:, None] @ vectors.swapaxes(-1, -2), gram, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12)])
def test_long_matrices_go_through_qr_with_the_same_digits(shape):
    a = _normal(*shape)
    u, s, vt = jax.jit(linalg.svd)(a)
    np.testing.assert_allclose(s, np.linalg.svd(a.astype(np.float64))[1], rtol=1e-6)
    np.testing.assert_allclose(u * s @ vt, a, atol=2e-6)
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=2e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(3), atol=2e-6)


def test_null_directions_take_no_part_in_the_polar_factor():
    u, s, vt = np.linalg.svd(_normal(6, 4), full_matrices=False)
    deficient = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(linalg.polar(deficient), u[:, :2] @ vt[:2], atol=1e-5)
    assert np.linalg.matrix_rank(linalg.polar(deficient, True), tol=0.5) == 4
    assert not np.any(linalg.polar(np.zeros((3, 2), np.float32)))
    assert linalg.not_null(jnp.zeros(3)).tolist() == [False] * 3


FUNCTIONS = {
    "svd": lambda a: _rebuilt(a),
    "polar": linalg.polar,
    "polar_with_null": lambda a: linalg.polar(a, True),
    "truncate": lambda a: linalg.truncate(a, 2),
    "eigh": lambda a: _powered(a @ a.T),
}


def _rebuilt(a):
    u, s, vt = linalg.svd(a)
    return (u * jnp.tanh(s)) @ vt


def _powered(a):
    values, vectors = linalg.eigh(a)
    return (vectors * jnp.cos(values)) @ vectors.T


def _slopes(function, a, direction, step=1e-5):
    """A weighted sum of the outputs along a direction: by jax.grad, and by central differences."""

    def scalar(x):
        out = function(x)
        return jnp.sum(out * jnp.cos(1 + jnp.arange(out.size, dtype=x.dtype)).reshape(out.shape))

    exact = jnp.sum(jax.grad(scalar)(a) * direction)
    return exact, (scalar(a + step * direction) - scalar(a - step * direction)) / (2 * step)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_finite_differences(name, shape):
    with jax.enable_x64(True):
        a, direction = _normal(*shape).astype(np.float64), _normal(*shape, seed=1).astype(np.float64)
        exact, differences = _slopes(FUNCTIONS[name], jnp.asarray(a), direction)
        np.testing.assert_allclose(exact, differences, rtol=1e-5, atol=1e-7)


def test_the_polar_factor_is_smooth_where_singular_values_repeat():
    with jax.enable_x64(True):
        a = jnp.asarray(np.linalg.qr(_normal(6, 4).astype(np.float64))[0])
        exact, differences = _slopes(linalg.polar, a, _normal(6, 4, seed=1).astype(np.float64))
        np.testing.assert_allclose(exact, differences, rtol=1e-6)


def test_the_polar_factor_of_a_deficient_matrix_varies_along_its_rank():
    with jax.enable_x64(True):
        left, right = _normal(6, 2).astype(np.float64), _normal(2, 4).astype(np.float64)
        exact, differences = _slopes(lambda x: linalg.polar(x @ right), jnp.asarray(left), _normal(6, 2, seed=1))
        np.testing.assert_allclose(exact, differences, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_finite_where_nothing_is_defined(name):
    cases = {
        "zero": jnp.zeros((5, 5)),
        "repeated": jnp.eye(5),
        "nearly repeated": jnp.eye(5) + 1e-7 * _normal(5, 5),
        "deficient": jnp.asarray(_normal(5, 2) @ _normal(2, 5)),
        "one small entry": jnp.zeros((5, 5)).at[1, 2].set(3e-20),
    }
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(FUNCTIONS[name](a) ** 2)))
    for what, a in cases.items():
        assert np.all(np.isfinite(gradient(a))), what


def test_a_vmap_equals_a_loop():
    batch = jnp.asarray(_normal(3, 6, 4))
    for name in ("polar", "truncate", "svd"):
        function = FUNCTIONS[name]
        looped = jnp.stack([function(a) for a in batch])
        np.testing.assert_allclose(jax.vmap(function)(batch), looped, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 3), (3, 24), (6, 4)])
def test_lapack_gets_one_matrix_at_a_time(shape):
    # A batch waits in jaxlib's threads for work that is given to the same threads: two of them may do so for ever.
    stack = jnp.asarray(_normal(2, 3, *shape))
    gram = stack @ jnp.swapaxes(stack, -1, -2)
    for function, of in ((linalg.svd, stack), (linalg.polar, stack), (linalg.eigh, gram)):
        for mapped in (function, jax.vmap(function), jax.vmap(jax.vmap(function))):
            calls = [x for x in jax.jit(mapped).lower(of).as_text().splitlines() if "lapack" in x]
            assert calls
            assert all('num_batch_dims = "0"' in call for call in calls)


@pytest.mark.parametrize(
    "sides", [(50, 3, 50, 2), (3, 50, 3, 50), (4, 4, 4, 4), (30, 2, 30, 2, 30), (2, 30, 5, 1, 40, 3), (5, 6)]
)
def test_products_in_the_cheapest_order(sides):
    factors = [_normal(*shape, seed=i) for i, shape in enumerate(itertools.pairwise(sides))]
    expected = np.linalg.multi_dot([f.astype(np.float64) for f in factors]) if len(factors) > 1 else factors[0]
    np.testing.assert_allclose(linalg.matmul(*factors), expected, rtol=1e-4, atol=1e-3)
    shapes = [v.aval.shape for e in jax.make_jaxpr(linalg.matmul)(*factors).eqns for v in e.outvars]
    largest = max((np.prod(s) for s in shapes), default=0)
    assert largest <= {(50, 3, 50, 2): 100, (30, 2, 30, 2, 30): 900}.get(sides, 10**6)
