"""What holds for every rule by singular values: other tensors, layouts, batches, gradients, the report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.planning import Request
from tests.helpers import save_family

RULES = {
    "tsv_m": tj.tsv_m,
    "iso_c": tj.iso_c,
    "iso_cts": lambda **options: tj.iso_cts(0.4, **options),
    "cart": lambda **options: tj.cart(0.4, 1.5, **options),
    "dc_merge": lambda **options: tj.dc_merge(0.1, **options),
    "svc": lambda **options: tj.svc(tj.average(), 0.1),
}
by_rule = pytest.mark.parametrize("name", RULES)


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (7, 5), "b/kernel": (7, 5), "embedding": (7, 5), "bias": (33,), "conv": (3, 3, 2, 4), "s": ()}
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in shapes.items()}


@by_rule
def test_what_is_no_matrix_gets_the_mean_and_a_batch_equals_a_loop(name, stack):
    rule = RULES[name](**({} if name == "svc" else {"mean_only": "^embedding"}))
    merged = tj.merge_task_vectors(stack, rule)
    for tensor in ("bias", "conv", "s", *(() if name == "svc" else ("embedding",))):
        np.testing.assert_allclose(merged[tensor], stack[tensor].mean(axis=0), rtol=1e-5, atol=1e-6, err_msg=tensor)
    # The two kernels ran together; here each runs alone.
    for tensor in ("a/kernel", "b/kernel"):
        alone = tj.merge_task_vectors({tensor: stack[tensor]}, RULES[name]())[tensor]
        np.testing.assert_allclose(merged[tensor], alone, rtol=1e-5, atol=1e-5, err_msg=tensor)


@by_rule
def test_a_flax_kernel_gives_the_transpose_of_the_pytorch_matrix(name, stack):
    torch, flax = stack["a/kernel"], stack["a/kernel"].swapaxes(-1, -2)
    base = np.zeros_like(torch[0])
    one = tj.merge({"w": base}, [{"w": x} for x in torch], RULES[name]())["w"]
    other = tj.merge({"w": base.T}, [{"w": x} for x in flax], RULES[name](), layout={"w": (1, 0)})["w"]
    np.testing.assert_allclose(other.T, one, rtol=1e-5, atol=1e-5)


@by_rule
def test_a_task_more_than_directions_and_one_task_alone(name, stack):
    for x in (stack["a/kernel"][:1], np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)):
        merged = tj.merge_task_vectors({"w": x}, RULES[name]())["w"]
        assert np.all(np.isfinite(merged))
        assert np.linalg.norm(merged) > 0.1


@by_rule
def test_gradients_match_finite_differences(name, stack):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, direction = (jnp.asarray(rng.normal(size=(2, 7, 5)), jnp.float64) for _ in range(2))
        functions = {
            "tsv_m": lambda s: _merge("tsv_m", s),
            "iso_c": lambda s: _merge("iso_c", s),
            "iso_cts": lambda s: _merge("iso_cts", s, common=0.4),
            "cart": lambda s: _merge("cart", s, rank=0.4, strength=1.5),
            "dc_merge": lambda s: _merge("dc_merge", s, keep=0.1, smoothing="linear"),
            "svc": lambda s: _calibrated(s),
        }
        scalar = jax.jit(lambda s: jnp.sum(jnp.sin(functions[name](s))))
        step = 1e-5
        differences = (scalar(x + step * direction) - scalar(x - step * direction)) / (2 * step)
        exact = jnp.sum(jax.jit(jax.grad(scalar))(x) * direction)
        np.testing.assert_allclose(exact, differences, rtol=2e-5)


def _merge(name, stack, **options):
    import importlib

    return importlib.import_module(f"tadrop_jax.rules.{name}").merge(stack, **options)


def _calibrated(stack):
    from tadrop_jax.rules.svc import calibrated

    return calibrated(jnp.sum(stack, axis=0), stack, 0.1)


@by_rule
def test_gradients_are_finite_where_nothing_is_defined(name, stack):
    """A zero task vector, copies of one model, only zeros, and the identity."""
    x = stack["a/kernel"]
    cases = [
        np.concatenate([x[:2], 0 * x[:1]]),
        np.repeat(x[:1], 3, axis=0),
        0 * x,
        np.stack([np.eye(7, 5, dtype=np.float32)] * 3),
    ]
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(tj.merge_task_vectors({"w": s}, RULES[name]())["w"] ** 2)))
    for case in cases:
        assert np.all(np.isfinite(gradient(case)))


def test_coefficients_map_and_learn(stack):
    x = {"w": stack["a/kernel"]}
    coefficients = jnp.array([0.5, 2.0])
    both = jax.vmap(lambda c: tj.merge_task_vectors(x, tj.iso_c(c))["w"])(coefficients)
    one = tj.merge_task_vectors(x, tj.iso_c(1.0))["w"]
    np.testing.assert_allclose(both, coefficients[:, None, None] * one, rtol=1e-6)
    slope = jax.grad(lambda s: jnp.sum(tj.merge_task_vectors(x, tj.cart(0.4, s))["w"]))(1.5)
    low = tj.merge_task_vectors(x, tj.cart(0.4, 1.0))["w"] - tj.merge_task_vectors(x, tj.cart(0.4, 0.0))["w"]
    np.testing.assert_allclose(slope, jnp.sum(low), rtol=1e-4)


def test_the_report_says_what_was_done_to_a_tensor(tmp_path):
    from tadrop_jax.directories import merge_directories

    save_family(tmp_path, 2, {"w": (7, 5), "embedding": (7, 5), "bias": (3,)})
    paths = [tmp_path / p for p in ("base", "m0", "m1")]
    rule = tj.svc(tj.iso_cts(0.4, mean_only="embedding"), exclude="embedding")
    request = Request(base=paths[0], models=paths[1:], out=tmp_path / "out", chain=rule, recipe={"method": "svc"})
    merge_directories(request)
    rows = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
    facts = {n: {k: row.get(k) for k in ("treated", "common rank", "rank", "calibrated")} for n, row in rows.items()}
    assert facts["w"] == {"treated": "matrix", "common rank": 1, "rank": 2, "calibrated": "yes"}
    left = {"treated": "mean", "common rank": None, "rank": None, "calibrated": "no"}
    assert facts["embedding"] == facts["bias"] == left
