"""SVC against the formula in NumPy, on top of rules of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import registry
from tests.helpers import family, run_streamed

SHAPES = {"one/kernel": (7, 5), "embedding": (7, 5), "bias": (33,), "conv/kernel": (3, 3, 2, 4)}


def oracle(merged, stack, alpha):
    """Algorithm 1 in float64, a direction at a time."""
    merged, stack = merged.astype(np.float64), stack.astype(np.float64)
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    new = np.zeros_like(s)
    for r in range(len(s)):
        own, factors = u[:, r] @ merged, []
        for task in stack:
            response = u[:, r] @ task
            factors.append(max(own @ response / max(response @ response, 1e-12), alpha))
        new[r] = s[r] / np.mean(factors)
    return (u * new) @ vt


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in SHAPES.items()}


INNER = {
    "task_arithmetic": lambda: tj.task_arithmetic(0.3),
    "ties": lambda: tj.ties(0.4, 0.3),  # a trim, and statistics of the whole tree
    "tsv_m": lambda: tj.tsv_m(mean_only="embedding"),
    "cabs": lambda: tj.cabs(2, 4),
}


@pytest.mark.parametrize("name", INNER)
def test_equals_the_formula_on_the_dense_task_vectors(stack, name):
    rule = INNER[name]()
    inner = tj.merge_task_vectors(stack, rule)
    merged = tj.merge_task_vectors(stack, tj.svc(rule, 0.2, exclude="embedding"))
    expected = oracle(np.asarray(inner["one/kernel"]), stack["one/kernel"], 0.2)
    np.testing.assert_allclose(merged["one/kernel"], expected, rtol=1e-4, atol=1e-4)
    for tensor in ("embedding", "bias", "conv/kernel"):
        np.testing.assert_array_equal(merged[tensor], inner[tensor], err_msg=tensor)


@pytest.mark.parametrize("calibrate_on", ["dense", "sparse"])
def test_what_is_calibrated_on(stack, calibrate_on):
    """A sparsifier before the rule, and the rule's own trim: dense sees neither, sparse sees both."""
    before, rule = tj.magnitude(0.7), tj.ties(0.4)
    trimmed = tj.sparsify(tj.sparsify(stack, before), tj.magnitude(0.4, "global", keep="floor_plus_one"))
    measure = {"dense": stack, "sparse": trimmed}[calibrate_on]["one/kernel"]
    inner = tj.merge_task_vectors(stack, rule, sparsifier=before)["one/kernel"]
    merged = tj.merge_task_vectors(stack, tj.svc(rule, calibrate_on=calibrate_on), sparsifier=before)["one/kernel"]
    np.testing.assert_allclose(merged, oracle(np.asarray(inner), np.asarray(measure), 1 / 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calibrate_on", ["dense", "sparse"])
def test_a_vector_that_the_rule_goes_on_from_is_no_task(stack, calibrate_on):
    plain, on_top = tj.consensus(0), tj.consensus(0, multi_task=tj.task_arithmetic(1.0))
    expected = tj.merge_task_vectors(stack, tj.svc(plain, calibrate_on=calibrate_on))
    found = tj.merge_task_vectors(stack, tj.svc(on_top, calibrate_on=calibrate_on))
    np.testing.assert_allclose(found["one/kernel"], expected["one/kernel"], rtol=1e-5, atol=1e-5)


def test_svc_of_svc(stack):
    inner = tj.svc(tj.task_arithmetic(1.0), 0.2)
    expected = oracle(np.asarray(tj.merge_task_vectors(stack, inner)["one/kernel"]), stack["one/kernel"], 0.2)
    found = tj.merge_task_vectors(stack, tj.svc(inner, 0.2, calibrate_on="sparse"))["one/kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_coefficient_cancels_where_nothing_is_below_alpha():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(7, 5))
    stack = {"w": jnp.asarray(common + 0.1 * rng.normal(size=(3, 7, 5)), jnp.float32)}
    one = tj.merge_task_vectors(stack, tj.svc(tj.task_arithmetic(1.0), 0.01))["w"]
    other = tj.merge_task_vectors(stack, tj.svc(tj.task_arithmetic(0.3), 0.01))["w"]
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_streamed_and_in_a_layout():
    base, models = family(3, {"a": (7, 5), "b": (33,)})
    rule = tj.svc(tj.ties(0.4))
    expected = tj.merge(base, models, rule)
    merged, _, _ = run_streamed(base, models, rule)
    for name in base:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    turned = [{n: x.T for n, x in m.items()} for m in (base, *models)]
    other = tj.merge(turned[0], turned[1:], rule, layout={"a": (1, 0)})
    np.testing.assert_allclose(other["a"].T, expected["a"], rtol=1e-5, atol=1e-6)
    apart = tj.merge(turned[0], turned[1:], rule)
    assert np.max(np.abs(apart["a"].T - expected["a"])) > 1e-3  # left singular vectors: the layout matters


def test_rules_on_weights_and_restricted_rules():
    """The merged vector of a rule on weights is what it put out less the base."""
    base, models = family(3, {"a": (7, 5), "b": (5, 7)})

    def mean_of_weights(x, carry):
        return x.base + jnp.mean(x.stack, axis=0)

    weights = tj.Step(mean_of_weights, output="parameters", spec=("mean of weights",))
    expected = tj.merge(base, models, tj.svc(tj.average()))
    found = tj.merge(base, models, tj.svc(weights))
    for name in base:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    restricted = tj.merge(base, models, tj.svc(tj.masked(tj.average(), exclude="b")))
    np.testing.assert_allclose(restricted["a"], expected["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(restricted["b"], base["b"])


def test_named_in_text():
    step = registry.build("svc", {"rule": "ties:density=.4;coefficient=.3", "calibrate_on": "sparse"})
    base, models = family(2, {"a": (7, 5)})
    expected = tj.merge(base, models, tj.svc(tj.ties(0.4, 0.3), calibrate_on="sparse"))["a"]
    np.testing.assert_array_equal(tj.merge(base, models, step)["a"], expected)


def test_what_is_no_rule_is_refused():
    with pytest.raises(tj.MergeError, match="svc takes a merge rule that gives one model"):
        tj.svc(tj.magnitude(0.2))
    with pytest.raises(tj.MergeError, match="svc takes a merge rule that gives one model"):
        tj.svc(tj.emr())
    with pytest.raises(tj.ParameterError, match="alpha must be one number above 0, got 0"):
        tj.svc(tj.average(), 0)
    with pytest.raises(tj.ParameterError, match="calibrate_on must be one of"):
        tj.svc(tj.average(), calibrate_on="both")
