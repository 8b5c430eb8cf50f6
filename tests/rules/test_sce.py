"""SCE against a transcription."""

import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed

TASKS = 4


def sce(stacks: dict, density=0.1, coefficient=1.0) -> dict:
    out = {}
    for name, stack in stacks.items():
        x = stack.astype(np.float64).reshape(TASKS, -1)
        if density is not None and density < 1:
            variance = x.var(axis=0)
            kept = int(np.float32(np.count_nonzero(variance)) * np.float32(density))
            chosen = np.argsort(-variance, kind="stable")[:kept]
            x = np.where(np.isin(np.arange(x.shape[1]), chosen), x, 0)
        weights = (x**2).mean(axis=1)
        weights = np.full(TASKS, 1 / TASKS) if weights.sum() < 1e-6 else weights / weights.sum()
        sign = np.where(x.sum(axis=0) >= 0, 1, -1)
        agreeing = np.where(np.sign(x) == sign, weights[:, None], 0)
        merged = (x * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1e-6)
        out[name] = (coefficient * merged).astype(np.float32).reshape(stack.shape[1:])
    return out


SETTINGS = [{"density": 0.1}, {"density": 0.5, "coefficient": 0.5}, {"density": None}]


def scaled(stacks: dict, factor: float) -> dict:
    return {name: (stack * factor).astype(np.float32) for name, stack in stacks.items()}


def fine_tunes(make_stacks, kind: str, factor: float) -> tuple[dict, dict, list[dict]]:
    stacks = scaled(make_stacks(kind, TASKS), factor)
    base = {name: np.zeros(stack.shape[1:], np.float32) for name, stack in stacks.items()}
    return stacks, base, [{name: stack[t] for name, stack in stacks.items()} for t in range(TASKS)]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_sce(given, make_stacks):
    rule = tj.sce(**given)
    for kind, factor in [("exact", 1), ("normal", 1), ("normal", 2.0**-12)]:  # the last: equal weights
        stacks, base, models = fine_tunes(make_stacks, kind, factor)
        merged = tj.merge(base, models, rule)
        for tensor, expected in sce(stacks, **given).items():
            np.testing.assert_allclose(merged[tensor], expected, rtol=1e-5, atol=1e-6 * factor, err_msg=tensor)


def test_what_varies_most_is_told_with_many_tasks_of_which_the_first_is_far_off():
    stack = np.random.default_rng(0).normal(size=(30, 4000)).astype(np.float32)
    stack[0] *= 1000
    changed = np.abs(tj.merge_task_vectors({"w": stack}, tj.sce(0.1))["w"]) > 0
    variance = stack.astype(np.float64).var(axis=0)
    assert set(np.flatnonzero(changed)) == set(np.argsort(-variance)[:400])


def test_density_0_and_1(make_stacks):
    stack = {"w": make_stacks("exact", TASKS)["block/kernel"]}
    assert not np.any(tj.merge_task_vectors(stack, tj.sce(0.0))["w"])
    whole = tj.merge_task_vectors(stack, tj.sce(None))["w"]
    np.testing.assert_array_equal(tj.merge_task_vectors(stack, tj.sce(1.0))["w"], whole)


def test_copies_of_one_model_do_not_vary():
    """0.1 three times over has a mean that is not 0.1 in float32; the variance is 0 all the same."""
    stack = {"w": np.full((3, 8), 0.1, np.float32)}
    assert not np.any(tj.merge_task_vectors(stack, tj.sce(0.5))["w"])
    np.testing.assert_allclose(tj.merge_task_vectors(stack, tj.sce(None))["w"], stack["w"][0], rtol=1e-6)


def test_streamed_equals_in_memory(small_blocks):
    base, models = family(TASKS)
    streamed, *_ = run_streamed(base, models, tj.sce(0.3))
    for name, value in tj.merge(base, models, tj.sce(0.3)).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_values_out_of_range_are_refused():
    with pytest.raises(tj.ParameterError, match=r"sce: density must lie in \[0, 1\], got 10"):
        tj.sce(10)
    with pytest.raises(tj.ParameterError, match="sce: density and coefficient are one number for all tasks"):
        tj.sce([0.1, 0.2])
