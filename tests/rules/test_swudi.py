"""SWUDI and ASWUDI against a float64 transcription of the authors' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.rules.swudi import RANKS, STARTS
from tests.rules.test_wudi import TALL, WIDE, make, run


def transcription(stack, gains, start="sum"):
    """``gains``: (eigenvalues from the largest down) -> f; eigenvalues below 1e-8 count as 1e-8."""
    stack = stack.astype(np.float64)
    gram, pull = np.zeros((stack.shape[2],) * 2), np.zeros(stack.shape[1:])
    for tau in stack:
        square = (tau**2).sum()
        if square > 0:
            gram, pull = gram + tau.T @ tau / square, pull + tau @ tau.T @ tau / square
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 1e-8), vectors[:, ::-1]
    f = gains(values)
    first = {"sum": stack.sum(0), "mean": stack.mean(0), "zero": 0 * stack[0]}[start]
    return first - first @ vectors @ np.diag(f) @ vectors.T + pull @ vectors @ np.diag(f / values) @ vectors.T


def early(time, share):
    def gains(values):
        keep = int(max(1, (values.size * share + 0.999) // 1))
        return np.where(np.arange(values.size) < keep, 1 - np.exp(-values * time), 0)

    return gains


def hard(count):
    return lambda values: np.where(np.arange(values.size) < count(values), 1.0, 0.0)


def rank(name, shape):
    def entropy(v):
        p = v / v.sum()
        return math.ceil(np.exp(-(p * np.log(p)).sum()))

    def gavish_donoho(v):
        beta = min(shape) / max(shape)
        middle = math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
        factor = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))) / middle
        roots = sorted(np.sqrt(v))
        return max(1, sum(r > factor * roots[(len(roots) - 1) // 2] for r in roots))

    return {
        "participation_sqrt": lambda v: math.ceil(np.sqrt(v).sum() ** 2 / v.sum()),
        "participation": lambda v: math.ceil(v.sum() ** 2 / (v**2).sum()),
        "entropy": entropy,
        "stable_rank": lambda v: math.ceil((v**2).sum() / v[0] ** 2),
        "gavish_donoho": gavish_donoho,
    }[name]


def low_rank(shape, seed: int = 0):
    rng = np.random.default_rng(seed)
    tasks, out, inputs = shape
    return (rng.normal(size=(tasks, out, 2)) @ rng.normal(size=(tasks, 2, inputs))).astype(np.float32)


@pytest.mark.parametrize("stack", [make(TALL, scale=1e-3), make(WIDE)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    ("start", "time", "share"), [("sum", 1300.0, 0.65), ("mean", 300.0, 0.85), ("zero", 30.0, 1.0)]
)
def test_swudi_equals_the_transcription(stack, start, time, share):
    expected = transcription(stack, early(time, share), start)
    merged = run(stack, tj.swudi(time, share, start=start))
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "start"), list(zip(RANKS, [*STARTS, *STARTS], strict=False)))
def test_aswudi_equals_the_transcription(name, start):
    stack = make(TALL, scale=1e-3)
    stack[1] *= 5
    expected = transcription(stack, hard(rank(name, TALL[1:])), start)
    merged = run(stack, tj.aswudi(rank=name, start=start))
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("zeros", [(), (0,), (0, 1, 2)])
def test_directions_that_no_task_has_stay_out(zeros):
    """Of 20 inputs, 6 directions or fewer are there: what rounding leaves of the others is not divided by."""
    stack = low_rank(WIDE)
    stack[list(zeros)] = 0
    for rule, gains in ((tj.swudi(), early(1300.0, 0.65)), (tj.aswudi(), hard(rank("participation_sqrt", WIDE[1:])))):
        expected = transcription(stack, gains)
        np.testing.assert_allclose(run(stack, rule), expected, rtol=1e-4, atol=2e-5 * (1 + np.abs(expected).max()))


def test_late_times_reach_the_closed_form():
    stack = make(TALL)
    closed = run(stack, tj.wudi(solver="closed"))
    np.testing.assert_allclose(run(stack, tj.swudi(1e6, 1.0)), closed, rtol=1e-4, atol=1e-5)
    kept = transcription(stack, hard(lambda values: 3))  # 0.4 of 6 directions, rounded up
    np.testing.assert_allclose(run(stack, tj.swudi(1e6, 0.4)), kept, rtol=1e-4, atol=1e-5)


def test_time_zero_is_the_start():
    stack = make(TALL)
    np.testing.assert_array_equal(run(stack, tj.swudi(0.0)), stack[0] + stack[1] + stack[2])


def test_natural_time_counts_mean_eigenvalues():
    stack = make(TALL)
    tasks, _, inputs = TALL
    natural = run(stack, tj.swudi(2.0, natural_time=True))
    np.testing.assert_allclose(natural, run(stack, tj.swudi(2.0 * inputs / tasks)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [tj.swudi(10.0), tj.aswudi()], ids=["swudi", "aswudi"])
def test_scale_axes_and_means(rule):
    stack = make(TALL)
    expected = run(stack, rule)
    np.testing.assert_array_equal(run(stack * 2.0**-60, rule) * 2.0**60, expected)
    conv1d = tj.swudi(10.0, input_axis=0) if rule == tj.swudi(10.0) else tj.aswudi(input_axis=0)
    np.testing.assert_allclose(run(stack.swapaxes(1, 2), conv1d).T, expected, rtol=1e-5, atol=1e-6)
    merged = tj.merge_task_vectors({"b": make((3, 7))}, rule)["b"]
    np.testing.assert_allclose(merged, make((3, 7)).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(run(stack[:1], rule), stack[0], rtol=1e-4, atol=1e-5)  # one task is its own minimum


@pytest.mark.parametrize("rule", [tj.swudi(10.0), tj.aswudi()], ids=["swudi", "aswudi"])
def test_gradients(rule):
    """Finite on every input; on one without ties and zeros they match differences."""

    def total(stack):
        return jnp.sum(jnp.sin(tj.merge_task_vectors({"w": stack}, rule)["w"]))

    slope = jax.jit(jax.grad(total))
    stack = make(TALL)
    for bad in (low_rank(TALL), np.zeros(TALL, np.float32), np.stack([np.eye(9, 6, dtype=np.float32)] * 3)):
        assert np.isfinite(slope(jnp.asarray(bad))).all()
    step = make(TALL, 9)
    along = float(jnp.sum(slope(jnp.asarray(stack)) * step))
    difference = float(total(stack + 2e-3 * step) - total(stack - 2e-3 * step)) / 4e-3
    np.testing.assert_allclose(along, difference, rtol=1e-2, atol=1e-2)


def test_gradient_in_time():
    stack = jnp.asarray(make(TALL))

    def total(time):
        return jnp.sum(tj.merge_task_vectors({"w": stack}, tj.swudi(time, 1.0))["w"] ** 2)

    np.testing.assert_allclose(jax.grad(total)(5.0), (total(5.05) - total(4.95)) / 0.1, rtol=1e-2)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("swudi", {"time": -1.0}),
        ("swudi", {"share": 1.5}),
        ("swudi", {"share": [0.5, 0.5]}),
        ("swudi", {"start": "middle"}),
        ("swudi", {"input_axis": 3}),
        ("aswudi", {"rank": "half"}),
        ("aswudi", {"coefficient": [1.0, 1.0]}),
    ],
)
def test_bad_values_are_refused(method, values):
    with pytest.raises(tj.ParameterError, match=f"{method}: {next(iter(values))}"):
        getattr(tj, method)(**values)


def test_times_in_one_call():
    """A vmap over the stopping time, inside jit, equals a loop."""
    stack = {"w": jnp.asarray(make(TALL))}
    times = jnp.array([1.0, 30.0, 1300.0])
    merged = jax.jit(jax.vmap(lambda t: tj.merge_task_vectors(stack, tj.swudi(t))["w"]))(times)
    for t, one in zip((1.0, 30.0, 1300.0), merged, strict=True):
        np.testing.assert_allclose(one, run(stack["w"], tj.swudi(t)), rtol=1e-4, atol=1e-5)
