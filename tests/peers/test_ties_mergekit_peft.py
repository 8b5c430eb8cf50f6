"""TIES, Task Arithmetic and magnitude pruning against mergekit's and PEFT's own functions."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.peers.by_mergekit import merged as merged_by_mergekit

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")
pytest.importorskip("peft")

SHAPES = {"conv": (3, 3, 2, 4), "kernel": (7, 5), "bias": (33,), "pair": (2,), "scale": ()}
TASKS = 3
DENSITIES = [0.1, 0.2, 0.5, 0.9, 1.0]
WEIGHTS = {"equal": 1.0, "per_task": [0.5, 1.25, 2.0], "negative": [1.0, -0.5, 0.75]}


def random_inputs(seed: int) -> tuple[dict, dict]:
    """A base and a stack of task vectors without two equal magnitudes."""
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    stacks = {name: rng.normal(size=(TASKS, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return base, stacks


def cancelling_inputs() -> tuple[dict, dict]:
    """Multiples of 1/64 that are all different in magnitude; the second task is minus the first in places."""
    rng = np.random.default_rng(7)
    base, stacks = {}, {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        base[name] = (rng.integers(-64, 64, size=shape) / 64).astype(np.float32)
        rows = [rng.permutation(np.arange(1, size + 1)) * rng.choice([-1, 1], size=size) for _ in range(TASKS)]
        opposite = rng.random(size) < 0.5
        rows[1] = np.where(opposite, -rows[0], rows[1] + np.sign(rows[1]) * size)
        rows[2] = np.where(opposite, 0, rows[2])
        stacks[name] = (np.stack(rows).reshape(TASKS, *shape) / 64).astype(np.float32)
    return base, stacks


INPUTS = {"random": lambda: random_inputs(0), "cancelling": cancelling_inputs}


def models_of(base: dict, stacks: dict) -> list[dict]:
    return [{name: base[name] + stacks[name][t] for name in base} for t in range(TASKS)]


def by_mergekit(method: str, base: dict, models: list[dict], density, weights, coefficient: float = 1.0) -> dict:
    per_model = {"density": oracles.per_task(density, TASKS), "weight": oracles.per_task(weights, TASKS)}
    return merged_by_mergekit(method, base, models, per_model, lambda_=coefficient)


def by_peft(function: str, stacks: dict, weights, *arguments) -> dict:
    from peft.utils import merge_utils

    factors = torch.tensor(oracles.per_task(weights, TASKS))
    merged = {}
    for name, stack in stacks.items():
        rows = [torch.from_numpy(np.array(row)) for row in stack]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns at density 1
            merged[name] = getattr(merge_utils, function)(rows, factors, *arguments).numpy()
    return merged


def on_device(tree: dict) -> dict:
    return {name: jnp.asarray(value) for name, value in tree.items()}


def assert_same(ours: dict, theirs: dict) -> None:
    for name, expected in theirs.items():
        np.testing.assert_allclose(np.asarray(ours[name]), expected, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_oracle_is_mergekit(inputs, weights):
    base, stacks = INPUTS[inputs]()
    models = models_of(base, stacks)
    deltas = {name: np.stack([model[name] - base[name] for model in models]) for name in base}
    del deltas["pair"], deltas["scale"]  # where int(density * n) is 0 mergekit keeps one entry: tested below
    for density in [*DENSITIES, [0.2, 0.5, 1.0]]:
        theirs = by_mergekit("ties", base, models, density, WEIGHTS[weights], 0.75)
        ours = oracles.ties(deltas, density, 0.75, weights=WEIGHTS[weights], flavour="mergekit")
        assert_same({name: base[name] + ours[name] for name in ours}, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_oracle_is_peft(inputs, weights):
    _, stacks = INPUTS[inputs]()
    for density in DENSITIES:
        for method, elect in {"total": "unweighted", "frequency": "frequency"}.items():
            theirs = by_peft("ties", stacks, WEIGHTS[weights], density, method)
            ours = oracles.ties(stacks, density, weights=WEIGHTS[weights], flavour="peft", elect=elect)
            assert_same(ours, theirs)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [*DENSITIES, [0.2, 0.5, 1.0]], ids=str)
def test_merge_is_mergekit(inputs, weights, density):
    base, stacks = INPUTS[inputs]()
    models = models_of(base, stacks)
    rule = tj.ties(density, 0.75, weights=WEIGHTS[weights], flavour="mergekit")
    merged = tj.merge(on_device(base), [on_device(model) for model in models], rule)
    assert_same(merged, by_mergekit("ties", base, models, density, WEIGHTS[weights], 0.75))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_task_arithmetic_is_mergekit(weights):
    base, stacks = random_inputs(1)
    models = models_of(base, stacks)
    rule = tj.task_arithmetic(WEIGHTS[weights])
    merged = tj.merge(on_device(base), [on_device(model) for model in models], rule)
    assert_same(merged, by_mergekit("task_arithmetic", base, models, 1.0, WEIGHTS[weights]))


def test_mergekit_keeps_one_entry_of_a_small_tensor():
    """Its count is max(1, int(density * n)): the pair keeps its larger entry at density 0.2."""
    base, stacks = random_inputs(2)
    models = models_of(base, stacks)
    merged = tj.merge(on_device(base), [on_device(m) for m in models], tj.ties(0.2, flavour="mergekit"))
    theirs = by_mergekit("ties", base, models, 0.2, 1.0)
    assert np.any(theirs["pair"] != base["pair"])
    assert_same({"pair": merged["pair"], "scale": merged["scale"]}, {k: theirs[k] for k in ("pair", "scale")})


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_merge_task_vectors_is_peft(inputs, weights, density):
    _, stacks = INPUTS[inputs]()
    for method, elect in {"total": "unweighted", "frequency": "frequency"}.items():
        rule = tj.ties(density, weights=WEIGHTS[weights], flavour="peft", elect=elect)
        merged = tj.merge_task_vectors(on_device(stacks), rule)
        assert_same(merged, by_peft("ties", stacks, WEIGHTS[weights], density, method))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_task_arithmetic_is_peft(weights):
    _, stacks = random_inputs(3)
    merged = tj.merge_task_vectors(on_device(stacks), tj.task_arithmetic(WEIGHTS[weights]))
    assert_same(merged, by_peft("task_arithmetic", stacks, WEIGHTS[weights]))


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune_is_peft(density):
    """Where int(density * n) is at least 1; below, PEFT keeps nothing and `tj.magnitude` keeps one entry."""
    _, stacks = random_inputs(4)
    stacks = {name: stack for name, stack in stacks.items() if int(density * stack[0].size) > 0}
    weights = WEIGHTS["per_task"]
    merged = tj.merge_task_vectors(
        on_device(stacks), tj.task_arithmetic(weights), sparsifier=tj.magnitude(density, granularity="tensor")
    )
    assert_same(merged, by_peft("magnitude_prune", stacks, weights, density))
