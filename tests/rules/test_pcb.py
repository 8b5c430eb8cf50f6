"""PCB against a transcription of both official versions, with ties, zeros and rows that are constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.helpers import family, run_streamed

TASKS = 3


def normalize(row: np.ndarray) -> np.ndarray:
    span = row.max() - row.min()
    return (row - row.min()) / span if span else np.zeros_like(row)


def clamp(row: np.ndarray, low: float, high: float) -> np.ndarray:
    ordered, d = np.sort(row), row.size
    return np.clip(row, ordered[int(d * low)], ordered[int(d * (1 - high) - 1)])


def pcb(stacks: dict, ratio=0.1, version="repository", coefficient=None) -> dict:
    """Over each task's whole vector, in float32 as the authors' code."""
    x = oracles.as_vectors(stacks)
    clip, factor = {"repository": (0.0001, 1.0), "vision": (0.01, 1.2)}[version]
    factors = oracles.per_task(factor if coefficient is None else coefficient, x.shape[0])
    size = np.stack([clamp(np.abs(row), clip, clip) for row in x])
    share = np.stack([normalize(row) for row in size])
    total = (x if version == "repository" else np.sign(x) * share).sum(axis=0)
    balance = np.exp(x.shape[0] * share**2) * np.tanh(x * total)
    weights = np.stack([normalize(clamp(row, 1 - ratio, 0)) for row in balance])
    vectors = np.sign(x) * size * np.array(factors, np.float32)[:, None]
    merged = (weights * vectors).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
    like = {name: stack[:1] for name, stack in stacks.items()}
    return {name: value[0] for name, value in oracles.from_vectors(merged[None].astype(np.float32), like).items()}


SETTINGS = {
    "repository": {},
    "vision": {"version": "vision", "ratio": 0.05},
    "per_task": {"version": "vision", "ratio": 0.5, "coefficient": [0.5, 1.0, 2.0]},
    "all": {"ratio": 1.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pcb(name, make_stacks, nest, flatten):
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        if name in ("per_task", "all"):
            stacks = {k: stacks[k] for k in ("block/kernel", "scale")}
        out = flatten(tj.merge_task_vectors(nest(stacks), tj.pcb(**SETTINGS[name])))
        for tensor, expected in pcb(stacks, **SETTINGS[name]).items():
            np.testing.assert_allclose(out[tensor], expected, rtol=1e-4, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("version", ["repository", "vision"])
def test_streamed_equals_in_memory(version, small_blocks):
    """The weight of the entry at the floor is 0 in both."""
    base, models = family(TASKS)
    rule = tj.pcb(0.3, version)
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_constant_vectors_take_no_part():
    """Where the authors' code divides 0 by 0."""
    stack = {"w": jnp.array([[2.0, 2.0, 2.0, 2.0], [1.0, 3.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])}
    for version in ("repository", "vision"):
        assert np.all(np.isfinite(tj.merge_task_vectors(stack, tj.pcb(0.5, version))["w"]))
    assert not np.any(tj.merge_task_vectors({"w": stack["w"][:1]}, tj.pcb(0.5))["w"])


def test_many_tasks_do_not_overflow():
    """exp(T) is infinite in float32 from T = 89 on."""
    stack = {"w": jnp.array(np.random.default_rng(0).normal(size=(100, 40)), jnp.float32)}
    merged = tj.merge_task_vectors(stack, tj.pcb(0.5))["w"]
    assert np.all(np.isfinite(merged))
    assert np.any(merged)


@pytest.mark.parametrize("looked_up", [False, True])
def test_the_gradient_of_a_step_before_it(looked_up, make_stacks):
    """The floor has it too, where the task vectors are constants, and a step has what is differentiated.

    It closes over it, or looks it up among its numbers.
    """
    given = {"w": make_stacks("normal", TASKS)["block/kernel"]}

    def size(factor, stack):
        scaled = tj.Step(apply=lambda x, carry: x.stack * factor)
        if looked_up:
            scaled = tj.Step(
                lambda x, carry: x.stack * x.numbers["factor"], spec=("scaled",), numbers={"factor": factor}
            )
        merged = tj.merge_task_vectors(stack, tj.pcb(0.5), sparsifier=scaled)["w"]
        return jnp.sum(merged * jnp.arange(merged.size).reshape(merged.shape))

    wanted, _ = jax.grad(size, argnums=(0, 1))(jnp.float32(0.7), given)
    np.testing.assert_allclose(jax.grad(size)(jnp.float32(0.7), given), wanted, rtol=1e-4)


def test_a_vmap_over_ratios_equals_a_loop(make_stacks):
    stack = {"w": make_stacks("normal", TASKS)["block/kernel"]}
    ratios = [0.125, 0.5, 1.0]
    at_once = jax.vmap(lambda r: tj.merge_task_vectors(stack, tj.pcb(r))["w"])(jnp.array(ratios))
    for value, ratio in zip(at_once, ratios, strict=True):
        np.testing.assert_allclose(value, tj.merge_task_vectors(stack, tj.pcb(ratio))["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 0}, r"pcb: ratio is one number in \(0, 1\] for all tasks, got 0"),
        ({"ratio": 1.5}, r"pcb: ratio must lie in \[0, 1\], got 1.5"),
        ({"version": "nlp"}, "pcb: version must be one of 'repository', 'vision', got 'nlp'"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(tj.ParameterError, match=said):
        tj.pcb(**given)


def test_a_ratio_of_no_more_than_an_entry_is_refused():
    """The floor would be the largest entry, no weight above 0, and the result the base."""
    stack = {"w": jnp.arange(1.0, 21.0).reshape(2, 10) / 64}
    for ratio in (0.01, 0.1):
        with pytest.raises(tj.ParameterError, match=r"pcb: with ratio 0\.[01]+ none of 10 entries takes part"):
            tj.merge_task_vectors(stack, tj.pcb(ratio))
    assert np.any(tj.merge_task_vectors(stack, tj.pcb(0.15))["w"])
