"""Merging inside the user's jit, vmap and grad, and how often it compiles."""

import contextlib
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj

TASKS = 3
# Two shapes are enough here, and each compiles anew in every transformation.
TENSORS = ("block/bias", "conv/kernel")


@pytest.fixture(scope="module")
def stack(make_stacks, nest):
    """No ties, so that a small step does not change what is selected."""
    return jax.tree.map(jnp.asarray, nest({k: v for k, v in make_stacks("normal", TASKS).items() if k in TENSORS}))


@pytest.fixture(scope="module")
def ragged(make_stacks, nest):
    """Ties, zeros, and a zero task vector."""
    return jax.tree.map(jnp.asarray, nest({k: v for k, v in make_stacks("exact", TASKS).items() if k in TENSORS}))


@pytest.fixture(scope="module")
def base(stack):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x[0].size, dtype=jnp.float32)).reshape(x.shape[1:]), stack)


@pytest.fixture(scope="module")
def models(base, stack):
    return [jax.tree.map(lambda b, x, t=t: b + x[t], base, stack) for t in range(TASKS)]


def assert_close(actual, expected, rtol=1e-6, atol=1e-6) -> None:
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


STEPS = {
    "tadrop_average": lambda: tj.chain(tj.tadrop(), tj.average()),
    "ties": lambda: tj.ties(0.3),
    "ties_mergekit": lambda: tj.ties(0.5, flavour="mergekit"),
    "cabs": lambda: tj.cabs(2, 8, 0.5),
    "dare_task_arithmetic": lambda: tj.chain(tj.dare(0.5), tj.task_arithmetic(0.3)),
}


@pytest.mark.parametrize("name", STEPS)
def test_inside_the_users_jit(name, base, models):
    key = jax.random.key(0)
    outside = tj.merge(base, models, STEPS[name](), key=key)
    inside = jax.jit(lambda b, m, k: tj.merge(b, m, STEPS[name](), key=k))(base, models, key)
    assert_close(inside, outside)


def test_emr_inside_the_users_jit(base, models):
    """The bundle is a pytree: a jitted function can return it."""
    outside = tj.merge(base, models, tj.emr())
    inside = jax.jit(lambda b, m: tj.merge(b, m, tj.emr()))(base, models)
    np.testing.assert_allclose(inside.rescalers, outside.rescalers, rtol=1e-5)
    for t in range(TASKS):
        assert_close(inside.task_params(t), outside.task_params(t), rtol=1e-5)


def test_vmap_over_both_quantiles(stack):
    low, high = [0.51, 0.76, 0.9], [0.91, 0.94, 0.99]
    swept = jax.jit(jax.vmap(lambda a, b: tj.sparsify(stack, tj.tadrop(q_low=a, q_high=b))))(
        jnp.array(low, jnp.float32), jnp.array(high, jnp.float32)
    )
    for i in range(3):
        alone = tj.sparsify(stack, tj.tadrop(q_low=low[i], q_high=high[i]))
        assert_close(jax.tree.map(lambda x, i=i: x[i], swept), alone, rtol=1e-5)


def test_vmap_over_seeds(stack):
    keys = jax.random.split(jax.random.key(0), 3)
    swept = jax.jit(jax.vmap(lambda k: tj.sparsify(stack, tj.dare(0.5), key=k)))(keys)
    for i in range(3):
        alone = tj.sparsify(stack, tj.dare(0.5), key=keys[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], swept), alone)


def test_what_is_traced_does_not_leak(base, models):
    """A step that closes over a tracer is compiled for the call alone."""

    def merged(coefficient):
        return tj.merge(base, models, tj.task_arithmetic(coefficient))

    with jax.checking_leaks():
        jax.jit(merged)(jnp.full(TASKS, 0.3))
        jax.vmap(merged)(jnp.full((2, TASKS), 0.3))


def test_what_a_step_without_a_spec_holds_is_let_go(base, models):
    held = jnp.float32(2)
    there = weakref.ref(held)
    tj.merge(base, models, tj.chain(tj.Step(apply=lambda x, carry, held=held: held * x.stack), tj.average()))
    del held
    gc.collect()
    assert there() is None


def squares(tree) -> jax.Array:
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))


# name -> a scalar function of (stack, parameter)
LOSSES = {
    "task_arithmetic": lambda s, c: squares(tj.merge_task_vectors(s, tj.task_arithmetic(c))),
    "task_arithmetic_weights": lambda s, c: squares(
        tj.merge_task_vectors(s, tj.task_arithmetic(0.5, weights=c * jnp.arange(1.0, TASKS + 1)))
    ),
    "ties_coefficient": lambda s, c: squares(tj.merge_task_vectors(s, tj.ties(0.4, c))),
    "ties_weights": lambda s, c: squares(
        tj.merge_task_vectors(s, tj.ties(0.4, weights=c * jnp.arange(1.0, TASKS + 1)))
    ),
    "ties_mergekit_weights": lambda s, c: squares(
        tj.merge_task_vectors(s, tj.ties(0.4, flavour="mergekit", weights=c + jnp.arange(TASKS)))
    ),
    "ties_max": lambda s, c: squares(tj.merge_task_vectors(s, tj.ties(0.4, c, combine="max"))),
    "tadrop": lambda s, c: squares(tj.merge_task_vectors(s, tj.task_arithmetic(c), sparsifier=tj.tadrop(q_low=0.5))),
    "tadrop_l1": lambda s, c: squares(tj.merge_task_vectors(s, tj.task_arithmetic(c), sparsifier=tj.tadrop(norm=1))),
    "cabs": lambda s, c: squares(tj.merge_task_vectors(s, tj.cabs(2, 8, c))),
    "dare_l1": lambda s, c: squares(
        tj.merge_task_vectors(s, tj.task_arithmetic(c), sparsifier=tj.dare(0.5, rescale="l1"), key=jax.random.key(0))
    ),
    "magnitude_global": lambda s, c: (
        squares(tj.merge_task_vectors(s, tj.average(), sparsifier=tj.magnitude(0.3, granularity="global"))) * c
    ),
    "quantile_ratios": lambda s, c: c * squares(tj.quantile_ratios(s, q_low=0.5, q_high=0.9)),
    "emr": lambda s, c: c * squares(tj.merge_task_vectors(s, tj.emr()).unified),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_everywhere(name, ragged):
    """Also at ties, at zeros and for a zero task vector."""
    for gradient in jax.tree.leaves(jax.grad(LOSSES[name], argnums=(0, 1))(ragged, 0.7)):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties_coefficient", "ties_weights", "tadrop"])
def test_gradients_of_an_all_zero_tree_are_finite(name, stack):
    zeros = jax.tree.map(jnp.zeros_like, stack)
    for gradient in jax.tree.leaves(jax.grad(LOSSES[name], argnums=(0, 1))(zeros, 0.7)):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name, stack):
    """In the parameter, and in the task vectors along a random direction, where no selection changes."""
    loss = jax.jit(LOSSES[name])
    by_stack, by_parameter = jax.jit(jax.grad(LOSSES[name], argnums=(0, 1)))(stack, 0.7)
    step = 2.0**-8
    slope = (loss(stack, 0.7 + step) - loss(stack, 0.7 - step)) / (2 * step)
    np.testing.assert_allclose(by_parameter, slope, rtol=2e-3, atol=2e-2)

    rng = np.random.default_rng(0)
    step = 2.0**-12
    # Scaling each entry a little keeps the order of all but the closest magnitudes.
    direction = jax.tree.map(lambda x: x * rng.uniform(-1, 1, size=x.shape).astype(np.float32), stack)
    ahead, behind = (jax.tree.map(lambda x, d, s=s: x + s * d, stack, direction) for s in (step, -step))
    slope = (loss(ahead, 0.7) - loss(behind, 0.7)) / (2 * step)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), by_stack, direction)))
    np.testing.assert_allclose(along, slope, rtol=2e-2, atol=0.1)


def test_the_gradient_of_a_quantile_ratio_goes_to_its_two_order_statistics():
    stack = jnp.array([[0.0, -2.0, 2.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0, 0.0]])

    def ratio(stack):
        return jnp.sum(tj.quantile_ratios({"w": stack}, q_low=0.5, q_high=1.0)["w"])

    # 2 / 8: the two entries of magnitude 2 share the gradient 1/8, with their signs; 8 has -2 / 64.
    expected = [[0.0, -1 / 16, 1 / 16, 0.0, -1 / 32], [0.0] * 5]
    np.testing.assert_array_equal(jax.grad(ratio)(stack), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(ratio)))(stack[None])[0], expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.grad(ratio)(stack), expected)


def test_coefficients_can_be_learned(base, models, stack):
    """One per task, through merge: gradient descent finds the coefficients that a target was made with."""
    wanted = jnp.array([0.2, 0.5, 0.9])
    target = tj.merge(base, models, tj.task_arithmetic(wanted))

    def loss(c):
        merged = tj.merge(base, models, tj.task_arithmetic(c))
        return squares(jax.tree.map(jnp.subtract, merged, target)) / 141

    gradient = jax.jit(jax.grad(loss))
    c = jnp.full(TASKS, 0.3)
    for _ in range(200):
        c = c - 0.2 * gradient(c)
    np.testing.assert_allclose(c, wanted, atol=1e-3)


@contextlib.contextmanager
def count_compilations():
    """Counts backend compilations inside the block."""
    seen: list[str] = []

    def listen(event: str, *_, **__) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_counter_counts():
    with count_compilations() as seen:
        jax.jit(lambda x: 3 * x + 1)(1.0)
    assert seen


@pytest.mark.parametrize("name", [*STEPS, "emr"])
def test_a_second_merge_does_not_compile(name, base, models):
    """Neither with the same step object nor with an equal one built anew."""
    make = (STEPS | {"emr": tj.emr})[name]
    rule = make()
    key = jax.random.key(0)
    tj.merge(base, models, rule, key=key)
    with count_compilations() as again:
        tj.merge(base, models, rule, key=key)
        tj.merge(base, models[::-1], make(), key=key)
    assert not again


@pytest.mark.parametrize(
    "number", [np.float32, np.array, jnp.float32, lambda c: jnp.full(TASKS, c), lambda c: [jnp.float32(c)] * TASKS]
)
def test_arrays_as_coefficients_do_not_compile_again(number, base, models):
    """Arrays that are not traced are numbers: a step built anew from them equals the one before."""
    assert tj.task_arithmetic(number(0.5)) == tj.task_arithmetic(number(0.5))
    once = tj.merge(base, models, tj.task_arithmetic(number(0.5)))
    coefficient = number(0.5)
    with count_compilations() as again:
        chex.assert_trees_all_equal(tj.merge(base, models, tj.task_arithmetic(coefficient)), once)
    assert not again


# Of a coefficient and a weight; the merged vector grows with the first.
NUMBERED = {
    "task_arithmetic": lambda c, w: tj.task_arithmetic(c, weights=[w, 1.0, 0.5], normalize=True),
    "ties": lambda c, w: tj.ties(0.3, c, weights=w),
    "ties_mergekit": lambda c, w: tj.ties(0.5, c, weights=[1.0, w, 0.5], flavour="mergekit"),
    "consensus": lambda c, w: tj.consensus(coefficient=c, multi_task=tj.task_arithmetic(w)),
    "pcb": lambda c, w: tj.pcb(coefficient=[c, c, c]),
    "ram": lambda c, w: tj.ram(coefficient=c),
    "ram_plus": lambda c, w: tj.ram_plus(coefficient=c),
    "sce": lambda c, w: tj.sce(0.5, c),
    "tsv_m": lambda c, w: tj.tsv_m(c),
    "wudi": lambda c, w: tj.wudi(coefficient=c),
    "cabs": lambda c, w: tj.cabs(2, 8, c),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_one_compilation_whatever_the_coefficient(name, base, models):
    rule = NUMBERED[name]
    once = tj.merge(base, models, rule(0.5, 0.7))
    tj.merge(base, models, rule(1.0, 0.7))
    with count_compilations() as again:
        other, weighed = tj.merge(base, models, rule(1.5, 0.7)), tj.merge(base, models, rule(0.5, 0.2))
    assert not again
    grown = jax.tree.map(lambda b, m: b + 3 * (m - b), base, once)
    assert_close(other, grown, rtol=1e-5, atol=1e-5)
    assert rule(0.5, 0.7) == rule(0.5, 0.7) != rule(0.6, 0.7)
    sees_weights = name in ("task_arithmetic", "ties", "ties_mergekit", "consensus")
    assert (rule(0.5, 0.7) != rule(0.5, 0.2)) == sees_weights
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(weighed), jax.tree.leaves(once), strict=True)]
    assert all(same) != sees_weights


# Of a weight, or a share of the way from one end to the other; and how many models it takes.
GEOMETRIC = {
    "karcher": (lambda w: tj.karcher([w, 0.5]), 2),
    "multislerp": (lambda w: tj.multislerp([w, 0.5]), 2),
    "nuslerp": (lambda w: tj.nuslerp([w, 0.5]), 2),
    "slerp": (tj.slerp, 1),
    "nearswap": (tj.nearswap, 1),
}


@pytest.mark.parametrize("name", GEOMETRIC)
def test_one_compilation_whatever_the_weights_of_two_models(name, base, models):
    rule, many = GEOMETRIC[name]
    once = tj.merge(base, models[:many], rule(0.25))
    with count_compilations() as again:
        other = tj.merge(base, models[:many], rule(0.75))
    assert not again
    chex.assert_trees_all_equal(tj.merge(base, models[:many], rule(0.25)), once)
    inside = jax.jit(lambda w: tj.merge(base, models[:many], rule(w)))(0.75)
    assert_close(other, inside, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(other["block"]["bias"], once["block"]["bias"])
    assert rule(0.25) == rule(0.25) != rule(0.75)


def above(limit) -> tj.Step:
    """A user's sparsifier whose stage and result look up a number."""

    def kept(x):
        return jnp.where(jnp.abs(x.stack) > x.numbers["limit"], x.stack, 0)

    stage = tj.Sums(lambda x, carry, n: {"kept": kept(x) != 0})
    return tj.Step(lambda x, carry: kept(x), (stage,), spec=("above",), numbers={"limit": limit})


@pytest.mark.parametrize("wrapped", [tj.rescale, tj.conflict_aware], ids=["rescale", "conflict_aware"])
def test_numbers_of_steps_inside_others(wrapped, stack):
    """Each step of a wrapped chain sees its own, and other numbers are another step."""
    first, second = (above(limit) for limit in (0.5, 1.0))
    for inner, alone in ((tj.chain(first, second), second), (tj.chain(second, first), second), (first, first)):
        assert_close(tj.sparsify(stack, wrapped(inner)), tj.sparsify(stack, wrapped(alone)))
    counts = [
        sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(tj.sparsify(stack, wrapped(s)))) for s in (first, second)
    ]
    assert counts[0] > counts[1] > 0


def test_one_compilation_per_shape_and_dtype():
    """A tensor whose shape and dtype were seen costs nothing, whatever its name or the tree around it."""
    rng = np.random.default_rng(0)

    def tree(names: str) -> tuple[dict, list[dict]]:
        models = [{n: jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for n in names} for _ in range(3)]
        return models[0], models[1:]

    tj.merge(*tree("ab"), tj.ties(0.3, flavour="peft"))
    with count_compilations() as again:
        tj.merge(*tree("cde"), tj.ties(0.3, flavour="peft"))
    assert not again
