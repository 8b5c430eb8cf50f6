"""Model Breadcrumbs: exact counts by row and by tensor; against transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.helpers import family, run_streamed

TASKS = 3


def by_rank(row: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Zeros all but the entries of these ranks, ascending, ties in order."""
    out = np.zeros_like(row)
    chosen = sorted(range(row.size), key=lambda i: abs(row[i]))[start:stop]
    out[chosen] = row[chosen]
    return out


def row(x: np.ndarray, density: float, gamma: float, first: str) -> np.ndarray:
    n, kept, outliers = x.size, int(density * x.size), int(gamma * x.size)
    if density == 1:
        return x
    if first == "gamma":  # remove the largest, then keep the largest of the rest
        return by_rank(x, max(n - outliers - kept, 0), n - outliers)
    bottom = n - kept - outliers
    top = outliers + min(bottom, 0)
    return by_rank(x, max(bottom, 0), n - top)


def breadcrumbs(stacks: dict, density, gamma, granularity="row", first="gamma") -> dict:
    densities, gammas = oracles.per_task(density, TASKS), oracles.per_task(gamma, TASKS)
    out = {}
    for name, stack in stacks.items():
        shape = stack.shape[1:]
        if granularity == "row" and not shape:
            out[name] = np.where(np.array(densities) > 0, stack, 0)
            continue
        width = shape[-1] if granularity == "row" else stack[0].size
        rows = stack.reshape(TASKS, -1, width)
        pruned = [[row(r, densities[t], gammas[t], first) for r in rows[t]] for t in range(TASKS)]
        out[name] = np.array(pruned, np.float32).reshape(stack.shape)
    return out


MERGEKIT = {"granularity": "tensor", "first": "density"}
SETTINGS = {
    "authors": ({"density": 0.3, "gamma": 0.2}, {}),
    "authors_overfull": ({"density": 0.9, "gamma": 0.25}, {}),
    "per_task": ({"density": [0.5, 0.0, 1.0], "gamma": [0.2, 0.2, 0.4]}, {}),
    "mergekit": ({"density": 0.5, "gamma": 0.1, "flavour": "mergekit"}, MERGEKIT),
    "mergekit_overfull": ({"density": 0.9, "gamma": 0.25, "flavour": "mergekit"}, MERGEKIT),
    "mergekit_no_outlier": ({"density": 0.5, "gamma": 0.0, "flavour": "mergekit"}, MERGEKIT),
    "mergekit_per_task": ({"density": [0.5, 0.0, 1.0], "gamma": 0.1, "flavour": "mergekit"}, MERGEKIT),
    "tensor": ({"density": 0.9, "gamma": 0.25, "granularity": "tensor"}, {"granularity": "tensor"}),
}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("name", SETTINGS)
def test_breadcrumbs(name, make_stacks, nest, flatten):
    given, meant = SETTINGS[name]
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        if name not in ("authors", "mergekit"):
            stacks = {k: stacks[k] for k in ("block/kernel", "scale")}
        out = flatten(tj.sparsify(nest(stacks), tj.breadcrumbs(**given)))
        assert_same(out, breadcrumbs(stacks, given["density"], given["gamma"], **meant))


@pytest.mark.parametrize("flavour", ["authors", "mergekit"])
def test_a_vmap_over_shares_equals_a_loop(flavour, make_stacks):
    stack = {"w": make_stacks("exact", TASKS)["block/kernel"]}
    shares = [(0.5, 0.25), (0.875, 0.25), (0.0, 0.125), (1.0, 0.5)]

    def run(density, gamma):
        return tj.sparsify(stack, tj.breadcrumbs(density, gamma, flavour=flavour))["w"]

    at_once = jax.vmap(run)(*(jnp.array(column) for column in zip(*shares, strict=True)))
    for values, (density, gamma) in zip(at_once, shares, strict=True):
        np.testing.assert_array_equal(values, run(density, gamma))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"density": 1.5}, r"breadcrumbs: density must lie in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"breadcrumbs: gamma must lie in \[0, 1\], got -0.1"),
        ({"granularity": "global"}, "breadcrumbs: granularity must be one of 'row', 'tensor', got 'global'"),
        ({"first": "both"}, "breadcrumbs: first must be one of 'gamma', 'density', got 'both'"),
        ({"flavour": "peft"}, "breadcrumbs: flavour must be one of"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(tj.ParameterError, match=said):
        tj.breadcrumbs(**{"density": 0.5, "gamma": 0.1} | given)


@pytest.mark.parametrize("flavour", ["authors", "mergekit"])
def test_streamed_equals_in_memory(flavour, small_blocks):
    base, models = family(TASKS)
    rule = tj.chain(tj.breadcrumbs(0.5, 0.1, flavour=flavour), tj.task_arithmetic(0.5))
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_density_0_leaves_nothing_of_a_number_either():
    stack = {"s": jnp.array([2.0, 3.0])}
    assert tj.sparsify(stack, tj.breadcrumbs([0.0, 0.5]))["s"].tolist() == [0.0, 3.0]


def test_one_density_per_task_of_rows_that_are_free():
    stack = {"w": jnp.array([[[5.0, 4.0, 0.0, 0.0]], [[9.0, 3.0, 2.0, 1.0]]])}
    found = tj.sparsify(stack, tj.conflict_aware(tj.breadcrumbs([0.5, 0.25], 0.0)))["w"]
    assert found.tolist() == [[[5.0, 4.0, 0.0, 0.0]], [[0.0, 0.0, 2.0, 0.0]]]


def test_a_long_vector_goes_by_blocks_as_the_one_row_that_it_is(small_blocks, monkeypatch):
    rng = np.random.default_rng(6)
    models = [{"w": rng.integers(-9, 9, 5000).astype(np.float32)} for _ in range(2)]
    base, rule = {"w": np.zeros(5000, np.float32)}, tj.chain(tj.breadcrumbs(0.3, 0.1), tj.average())
    wanted = sum(row(m["w"], 0.3, 0.1, "gamma") for m in models) / 2
    np.testing.assert_array_equal(tj.merge(base, models, rule)["w"], wanted)
    monkeypatch.setattr("tadrop_jax.sparsifiers.breadcrumbs._LONG", 1000)
    np.testing.assert_array_equal(tj.merge(base, models, rule)["w"], wanted)
    np.testing.assert_array_equal(run_streamed(base, models, rule)[0]["w"], wanted)
    (step,) = tj.steps.expand(tj.breadcrumbs(0.3, 0.1), 2)
    assert step.for_tensor("w", (5000,), 2).piece == "any" != step.piece
