"""Properties that the registry declares for each method, tested for every method that declares them.

Parametrised from the registry: a new entry is tested without a change here. Each property is tested at the defaults
and at every option of every choice, unless it says otherwise.
"""

import collections
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import registry
from tadrop_jax.steps import expand, output_of

TASKS = 3
# One shape: every other one costs a compilation for each variant. A whole group of 32 entries, and a tail.
SHAPE = (5, 8)
NAMES = ("block/kernel", "block/other", "head")
KEY = jax.random.key(7)
# Of rules on weights. Adding an exact task vector to it, and taking it away again, is exact.
BASE = (np.random.default_rng(1).integers(-8, 9, SHAPE) / 4).astype(np.float32)
settings = hypothesis.settings(max_examples=6)
RUNNABLE = [m for m in registry.METHODS.values() if not m.from_python]


def variants(method: registry.Method) -> list[dict]:
    """The defaults, and every option of every choice and flag, with another option where it cannot stand alone."""
    options = [
        {p.name: option}
        for p in method.parameters
        for option in ((True, False) if p.kind == "flag" else p.options + (None,) * p.optional)
        if p.kind in ("choice", "flag")
    ]
    found, steps = [{}], [registry.build(method.name, {})]
    for option in options:
        for other in ({}, *options):
            try:
                step = registry.build(method.name, other | option)
            except tj.ParameterError:
                continue
            break
        else:
            raise AssertionError(f"{method.name} cannot be built with {option}")
        if step not in steps:  # the option is not the default spelt out
            steps.append(step)
            found.append(other | option)
    return found


def declaring(name: str, every_option: bool = True):
    """Parametrises a test by the methods that declare a property."""
    methods = [m for m in RUNNABLE if name in m.properties]
    cases = [(m.name, values) for m in methods for values in (variants(m) if every_option else [{}])]
    ids = ["-".join([n, *(f"{k}={v}" for k, v in values.items())]) for n, values in cases]
    return pytest.mark.parametrize(("name", "values"), cases, ids=ids)


def every_method(function):
    """Parametrises a test by all methods at their defaults."""
    return pytest.mark.parametrize("name", [m.name for m in RUNNABLE])(function)


def run(name: str, values: dict, stack, key=KEY):
    """What a method makes of task vectors: sparser ones, one merged vector, or one for each task (stacked)."""
    return apply(registry.build(name, values), registry.METHODS[name], stack, key)


def apply(step, method: registry.Method, stack, key=KEY):
    stack = jax.tree.map(lambda x: x[: tasks_of(method)], stack)
    if method.role == "sparsifier":
        return tj.sparsify(stack, step, key=key)
    if output_of(step) == "parameters":
        base = jax.tree.map(lambda x: BASE, stack)
        models = [jax.tree.map(lambda x, t=t: BASE + x[t], stack) for t in range(len(jax.tree.leaves(stack)[0]))]
        return jax.tree.map(lambda merged: merged - BASE, tj.merge(base, models, step, key=key))
    merged = tj.merge_task_vectors(stack, step, key=key)
    if method.output != "one model per task":
        return merged
    tasks = jax.tree.leaves(stack)[0].shape[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(merged.task_vector(t) for t in range(tasks)))


def tasks_of(method: registry.Method) -> int:
    """How many models a method gets."""
    return min(TASKS, method.models[1] or TASKS)


def per_task(method: registry.Method) -> bool:
    return method.output != "one model"


def exact(rng: np.random.Generator) -> np.ndarray:
    """Multiples of 1/4: many ties and zeros, and every sum is exact, so that no election hangs on rounding."""
    return (rng.integers(-6, 7, (TASKS, *SHAPE)) / 4).astype(np.float32)


def normal(rng: np.random.Generator) -> np.ndarray:
    """No ties, some zeros, and of another size for each tensor; far from overflow and underflow, also when squared."""
    values = rng.normal(size=(TASKS, *SHAPE)) * (rng.random((TASKS, *SHAPE)) < 0.9)
    return (values * 2.0 ** rng.integers(-6, 7)).astype(np.float32)


@st.composite
def stacks(draw, values=exact, names=NAMES):
    """Task vectors; some with a tensor, a task, or the tensor of a task that is all zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stack = {name: values(rng) for name in names}
    zero_tensor = draw(st.sampled_from((None, *names)))
    zero_task = draw(st.sampled_from((None, *range(TASKS))))
    if zero_tensor is not None:
        stack[zero_tensor][slice(None) if zero_task is None else zero_task] = 0
    elif zero_task is not None:
        for name in names:
            stack[name][zero_task] = 0
    return stack


def assert_same(actual: dict, expected: dict) -> None:
    """Equal bits, but for the sign of zero."""
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def assert_close(actual: dict, expected: dict, share: float = 0.0) -> None:
    """Equal to rounding of an entry, or to a share of the largest one."""
    assert actual.keys() == expected.keys()
    for name in expected:
        atol = 1e-6 + share * float(np.abs(expected[name]).max())
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=atol, err_msg=name)


def solves(step, tasks: int) -> bool:
    """Whether a rule works on whole matrices: what a solve or an SVD rounds grows with the condition of the matrix."""
    return any(s.piece == "tensor" for s in expand(step, tasks))


def test_the_registry_declares_known_properties():
    known = {"symmetric", "local", "scales", "zero", "copies", "density", "gradients"}
    declared = set().union(*(m.properties for m in registry.METHODS.values()))
    assert declared == known


@declaring("symmetric")
@settings
@hypothesis.given(stack=stacks(), order=st.permutations(range(TASKS)))
def test_symmetric(name, values, stack, order):
    """The order of the tasks does not matter."""
    order = [t for t in order if t < tasks_of(registry.METHODS[name])]
    there = run(name, values, {n: x[order] for n, x in stack.items()})
    here = run(name, values, stack)
    here = {n: x[jnp.array(order)] for n, x in here.items()} if per_task(registry.METHODS[name]) else here
    whole = solves(registry.build(name, values), tasks_of(registry.METHODS[name]))
    assert_close(there, here, share=1e-4 if whole else 0.0)


@declaring("local", every_option=False)
@settings
@hypothesis.given(stack=stacks(normal), extra=stacks(normal, names=("more/kernel",)))
def test_local(name, values, stack, extra):
    """Another tensor in the tree changes nothing, at the defaults."""
    together = run(name, values, extra | stack)
    assert_same({n: together[n] for n in stack}, run(name, values, stack))


@declaring("scales")
@settings
@hypothesis.given(stack=stacks(normal), exponent=st.integers(-8, 8))
def test_scales(name, values, stack, exponent):
    """Task vectors times a power of two give the result times it, bit for bit."""
    factor = np.float32(2.0**exponent)
    scaled = run(name, values, {n: x * factor for n, x in stack.items()})
    assert_same(scaled, {n: np.asarray(x) * factor for n, x in run(name, values, stack).items()})


@declaring("zero")
def test_zero(name, values):
    """Zero task vectors give zero, and no NaN."""
    found = run(name, values, {n: np.zeros((TASKS, *SHAPE), np.float32) for n in NAMES})
    on_weights = output_of(registry.build(name, values)) == "parameters"
    for leaf in found.values():
        np.testing.assert_allclose(leaf, np.zeros(leaf.shape), atol=1e-6 if on_weights else 0)


@declaring("copies", every_option=False)
@settings
@hypothesis.given(stack=stacks())
def test_copies(name, values, stack):
    """T copies of one model give what one gives, at the defaults."""
    copies = run(name, values, {n: np.stack([x[0]] * TASKS) for n, x in stack.items()})
    alone = run(name, values, {n: x[:1] for n, x in stack.items()})
    if per_task(registry.METHODS[name]):
        alone = {n: np.concatenate([x] * TASKS) for n, x in alone.items()}
    assert_close(copies, alone)


@declaring("density")
@settings
@hypothesis.given(stack=stacks())
def test_density(name, values, stack):
    """Density 0 gives zeros; density 1 is the identity, of a rule: the rule without its trim."""
    for leaf in run(name, values | {"density": 0.0}, stack).values():
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    kept = run(name, values | {"density": 1.0}, stack)
    rule = registry.METHODS[name].role == "rule"
    assert_same(kept, run(name, values | {"density": None}, stack) if rule else stack)


@functools.cache
def gradient_of(name: str, items: tuple):
    """A sum of squares and its gradient in task vectors, coefficients and weights, compiled once a variant."""
    method = registry.METHODS[name]
    differentiable = [p for p in method.parameters if p.name in ("coefficient", "weights")]
    where = {p.name: jnp.full((tasks_of(method),) if p.kind == "numbers" else (), 0.75) for p in differentiable}

    def loss(stack, where):
        found = apply(registry.build(name, dict(items) | where), method, stack)
        return sum(jnp.sum(x * x) for x in found.values())

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), where


@declaring("gradients")
@settings
@hypothesis.given(stack=stacks(names=NAMES[:1]))
def test_gradients(name, values, stack):
    """Gradients are finite, with ties, zeros and zero tensors in the input."""
    gradient, where = gradient_of(name, tuple(values.items()))
    for leaf in jax.tree.leaves(gradient(stack, where)):
        assert np.isfinite(leaf).all()


@declaring("gradients", every_option=False)
def test_gradients_match_finite_differences(name, values):
    """In task vectors, coefficients and weights at once, where two steps agree: there no selection changes between."""
    gradient, where = gradient_of(name, ())
    compared = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        at = ({n: normal(rng) for n in NAMES[:1]}, where)
        # Scaling each entry a little keeps the order of all but the closest magnitudes.
        towards = jax.tree.map(lambda x, rng=rng: x * rng.uniform(-1, 1, size=x.shape).astype(np.float32), at)

        def value(step, at=at, towards=towards):
            return gradient(*jax.tree.map(lambda x, d: x + np.float32(step) * d, at, towards))[0]

        coarse, fine = ((value(h) - value(-h)) / (2 * h) for h in (2.0**-7, 2.0**-8))
        size, slopes = gradient(*at)
        if abs(coarse - fine) > 1e-3 * (abs(coarse) + size):
            continue
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), slopes, towards)))
        np.testing.assert_allclose(along, fine, rtol=1e-2, atol=3e-3 * float(size))
        compared += 1
    assert compared >= 2


# Values that float32 holds, by range; and for parameters whose range hangs on others.
VALUES = {(0, 1): (0.25, 0.625), (0, 0.5): (0.125, 0.25), (1, None): (2.0, 4.0), (None, None): (0.5, 2.0)}
OWN_VALUES = {"q_high": (0.875, 1.0), "learning_rate": (2.0**-10, 2.0**-8), "time": (64.0, 128.0)}


def swept(method: registry.Method) -> tuple[dict[str, tuple], list[str]]:
    """Values of the parameters that may be traced, three of each, and the names of those that may not."""
    values, refused = {}, []
    for p in method.parameters:
        if p.kind not in ("number", "numbers"):
            continue
        low, high = OWN_VALUES.get(p.name, VALUES.get(p.range, (0.25, 0.5)))
        edges = p.name == "density" and "density" in method.properties
        try:
            jax.make_jaxpr(lambda v, p=p: registry.build(method.name, {p.name: v}) and v)(low)
        except tj.ParameterError as refusal:
            said = f"{method.name}: {p.name} decides on shapes and cannot be traced"
            if not str(refusal).startswith(said):
                raise
            refused.append(p.name)
        else:
            values[p.name] = (0.0, high, 1.0) if edges else (low, high, low)
    return values, refused


SWEPT = [m for m in RUNNABLE if any(p.kind in ("number", "numbers") for p in m.parameters)]


@pytest.mark.parametrize("name", [m.name for m in SWEPT])
def test_a_vmap_over_parameters_equals_a_loop(name):
    """Over all parameters of a method that may be traced at once; the others are refused by name."""
    method = registry.METHODS[name]
    values, _ = swept(method)
    if not values:
        pytest.skip("each of its numbers decides on shapes")
    stack = {NAMES[0]: normal(np.random.default_rng(0))}
    arrays = {p: jnp.array(v, jnp.float32) for p, v in values.items()}
    at_once = jax.jit(jax.vmap(lambda given: run(name, given, stack)))(arrays)
    whole = solves(registry.build(name, {}), tasks_of(method))
    for i, column in enumerate(zip(*values.values(), strict=True)):
        if column in list(zip(*values.values(), strict=True))[:i]:
            continue
        alone = run(name, dict(zip(values, column, strict=True)), stack)
        assert_close({n: x[i] for n, x in at_once.items()}, alone, share=1e-4 if whole else 1e-6)


@every_method
def test_float32_where_64_bits_are_enabled(name):
    """Whatever NumPy and JAX make of numbers; tracing tells the dtypes."""
    method = registry.METHODS[name]
    stack = {NAMES[0]: normal(np.random.default_rng(0))}
    with jax.enable_x64(True):
        values = {p: v[1] for p, v in swept(method)[0].items()}
        for given in ({}, {p: np.float64(v) for p, v in values.items()}):
            found = jax.eval_shape(lambda x, given=given: run(name, given, x), stack)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
        found = jax.eval_shape(lambda x, given: run(name, given, x), stack, values)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def test_shares_that_decide_on_shapes_are_not_traced():
    refused = {(m.name, p) for m in SWEPT for p in swept(m)[1]}
    fixed = {
        "iso_cts": "common",
        "cart": "rank",
        "dc_merge": "keep",
        "wudi": "cutoff",
        "swudi": "share",
        "ace": "share",
    }
    assert refused == {*fixed.items(), ("tsv_c", "share")}


@every_method
@settings
@hypothesis.given(stack=stacks(), order=st.permutations(NAMES))
def test_order_of_paths(name, stack, order):
    """The order in which a container gives its tensors does not matter."""
    assert_close(dict(run(name, {}, collections.OrderedDict((n, stack[n]) for n in order))), run(name, {}, stack))


@every_method
@settings
@hypothesis.given(stack=stacks())
def test_names_of_containers(name, stack):
    """What containers are called does not matter, but to random masks, which are drawn by name."""
    if registry.METHODS[name].random:
        pytest.skip("random masks are drawn by name")
    kernel, other, head = (stack[n] for n in NAMES)
    renamed = run(name, {}, {"z": [kernel, {"y": head}], "a": (other,)})
    back = {NAMES[0]: renamed["z"][0], NAMES[1]: renamed["a"][0], NAMES[2]: renamed["z"][1]["y"]}
    assert_close(back, run(name, {}, stack))


def pairs(every: int = 9) -> list[tuple[str, str]]:
    """TADrop before every rule, and a part of the other pairs that takes in every sparsifier: each pair compiles."""
    rules = [m.name for m in RUNNABLE if m.role == "rule"]
    sparsifiers = [m.name for m in RUNNABLE if m.role == "sparsifier"]
    return [
        (sparsifier, rule)
        for i, rule in enumerate(rules)
        for j, sparsifier in enumerate(sparsifiers)
        if sparsifier == "tadrop" or (i + j) % every == 0
    ]


@pytest.mark.parametrize(("sparsifier", "rule"), pairs())
def test_sparsifiers_before_rules(sparsifier, rule, make_stacks):
    """A pair runs, with ties, zeros and a zero task vector, and does what one after the other does."""
    values = make_stacks("exact", TASKS)["conv/kernel"].reshape(TASKS, -1)[:, : SHAPE[0] * SHAPE[1]]
    stack = {n: (values * f).reshape(TASKS, *SHAPE) for n, f in zip(NAMES, (1, -0.5, 0), strict=True)}
    stack = {n: x[: tasks_of(registry.METHODS[rule])] for n, x in stack.items()}
    # A rule that may look at the task vectors as they came looks at the pruned ones here.
    options = {p.name: "sparse" for p in registry.METHODS[rule].parameters if p.name == "calibrate_on"}
    before, step = registry.build(sparsifier, {}), registry.build(rule, options)
    together = apply(tj.chain(before, step), registry.METHODS[rule], stack)
    assert all(np.isfinite(x).all() for x in together.values())
    assert_close(together, run(rule, options, tj.sparsify(stack, before, key=KEY)))
