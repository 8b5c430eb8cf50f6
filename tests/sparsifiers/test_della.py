"""DELLA's MAGPRUNE: ranks, probabilities, rescales; against a transcription, and mergekit's own function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import randomness
from tests import oracles
from tests.helpers import family, run_streamed

TASKS = 3
KEY = jax.random.key(5)


def uniforms(name: str, task: int, shape: tuple[int, ...]) -> np.ndarray:
    """The random numbers that decide, by position in the row-major tensor."""
    low = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32)
    return np.asarray(randomness.uniform(randomness.tensor_key(KEY, name), [task], 0 * low, low)).reshape(shape)


def ranked(row: np.ndarray) -> list[float]:
    """Ranks of magnitudes in [0, 1], ties in order; 1/2 for a row of one entry."""
    order = sorted(range(row.size), key=lambda i: abs(row[i]))
    shares = [0.5] * row.size
    for rank, i in enumerate(order):
        if row.size > 1:
            shares[i] = rank / (row.size - 1)
    return shares


def probabilities(x: np.ndarray, density: float, epsilon: float, granularity: str) -> np.ndarray:
    """The keep probabilities of one tensor of one task."""
    if granularity == "tensor" or x.ndim == 0:
        rows = x.reshape(1, -1)
        shares = np.array([ranked(row) for row in rows]).reshape(x.shape)
    else:
        axis = 1 if granularity == "second_axis" and x.ndim > 1 else x.ndim - 1
        moved = np.moveaxis(x, axis, -1)
        shares = np.array([ranked(row) for row in moved.reshape(-1, moved.shape[-1])]).reshape(moved.shape)
        shares = np.moveaxis(shares, -1, axis)
    return (density - epsilon) + shares * 2 * epsilon


def della(stacks: dict, density, epsilon, granularity="row", rescale="entry") -> dict:
    """MAGPRUNE by its formula, for the random numbers of `uniforms`."""
    densities, epsilons = oracles.per_task(density, TASKS), oracles.per_task(epsilon, TASKS)
    out = {}
    for name, stack in stacks.items():
        rows = []
        for t, x in enumerate(stack.astype(np.float64)):
            p = probabilities(x, densities[t], epsilons[t], granularity)
            kept = np.where(uniforms(name, t, x.shape) < p, x, 0)
            if rescale == "entry":
                kept = kept / p
            if rescale == "l1":
                kept = kept * (np.abs(x).sum() / np.abs(kept).sum() if np.any(kept) else 1)
            rows.append(kept)
        out[name] = np.stack(rows).astype(np.float32)
    return out


SETTINGS = {
    "authors": ({"density": 0.5, "epsilon": 0.2}, {}),
    "mergekit": (
        {"density": 0.3, "epsilon": 0.15, "flavour": "mergekit"},
        {"granularity": "second_axis", "rescale": "l1"},
    ),
    "tensor": ({"density": 0.6, "epsilon": 0.3, "granularity": "tensor"}, {"granularity": "tensor"}),
    "no_rescale": ({"density": [0.2, 0.5, 0.7], "epsilon": [0.1, 0.0, 0.2], "rescale": None}, {"rescale": None}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_della(name, make_stacks, nest, flatten):
    given, meant = SETTINGS[name]
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        if name != "mergekit":  # which has a rule of its own for four axes
            stacks = {k: stacks[k] for k in ("block/kernel", "scale")}
        out = flatten(tj.sparsify(nest(stacks), tj.della(**given), key=KEY))
        expected = della(stacks, given["density"], given["epsilon"], **meant)
        for tensor, value in expected.items():
            np.testing.assert_array_equal(out[tensor] != 0, value != 0, err_msg=tensor)
            np.testing.assert_allclose(out[tensor], value, rtol=2e-6, err_msg=tensor)


def test_the_mean_share_that_stays_is_the_density():
    stack = {"w": np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)}
    pruned = np.asarray(tj.sparsify(stack, tj.della(0.4, 0.3), key=KEY)["w"][0])
    assert abs((pruned != 0).mean() - 0.4) < 4 * np.sqrt(0.24 / pruned.size)
    large = np.abs(stack["w"][0]) > 1
    assert (pruned != 0)[large].mean() > 0.55
    assert (pruned != 0)[~large].mean() < 0.4


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.0, 0.05), (1.0, 0.05), (0.1, 0.1), (0.9, 0.1), ([0.5, 0.95], 0.05), (0.3, [0.1, 0.4])]
)
def test_probabilities_that_leave_the_open_interval_are_refused(density, epsilon):
    with pytest.raises(tj.ParameterError, match=r"della: density - epsilon and density \+ epsilon must lie inside"):
        tj.della(density, epsilon)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"granularity": "global"}, "della: granularity must be one of 'row', 'second_axis', 'tensor', got 'global'"),
        ({"rescale": "inverse"}, "della: rescale must be one of"),
        ({"flavour": "peft"}, "della: flavour must be one of"),
        ({"epsilon": 0.6}, r"della: epsilon must lie in \[0, 0.5\], got 0.6"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(tj.ParameterError, match=said):
        tj.della(**{"density": 0.5} | given)


@pytest.mark.peers
def test_della_is_mergekit(make_stacks, nest, flatten, monkeypatch):
    """Its own function, with our random numbers in place of its generator; its ties are up to its sort."""
    torch = pytest.importorskip("torch")
    sparsify = pytest.importorskip("mergekit.sparsify")
    stacks = make_stacks("normal", TASKS)
    out = flatten(tj.sparsify(nest(stacks), tj.della(0.5, 0.3, flavour="mergekit"), key=KEY))
    for name, stack in stacks.items():
        if name == "scale":
            with pytest.raises(IndexError):
                sparsify.della_magprune(torch.tensor(1.0), 0.5, 0.3)
            continue
        for t, x in enumerate(stack):
            drawn = torch.from_numpy(np.array(uniforms(name, t, x.shape)))
            monkeypatch.setattr(torch, "bernoulli", lambda p, u=drawn: (u.reshape(p.shape) < p).to(p.dtype))
            theirs = sparsify.della_magprune(torch.from_numpy(x), 0.5, 0.3, sparsify.RescaleNorm.l1).numpy()
            np.testing.assert_allclose(out[name][t], theirs, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_streamed_equals_in_memory(granularity, small_blocks):
    base, models = family(TASKS)
    rule = tj.chain(tj.della(0.5, 0.3, granularity=granularity, rescale="l1"), tj.task_arithmetic(0.5))
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule, key=jax.random.key(0)).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
