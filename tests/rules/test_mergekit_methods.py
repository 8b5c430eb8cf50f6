"""Breadcrumbs, DELLA and DARE merging, as mergekit has them, against transcriptions."""

import jax
import ml_dtypes
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.steps import expand
from tests import oracles
from tests.sparsifiers.test_breadcrumbs import breadcrumbs
from tests.sparsifiers.test_della import KEY, della, uniforms

TASKS = 3
WEIGHTS = [0.5, 1.0, 2.0]


def elected(stacks: dict, weights, normalize: bool, coefficient: float) -> dict:
    combine = "mean" if normalize else "sum"
    return oracles.ties(stacks, None, coefficient, weights=weights, flavour="mergekit", combine=combine)


def linear(stacks: dict, weights, normalize: bool, coefficient: float) -> dict:
    return oracles.task_arithmetic(stacks, coefficient / (sum(weights) if normalize else 1), weights)


def mergekit_crumbs(stacks: dict) -> dict:
    return breadcrumbs(stacks, 0.5, 0.2, "tensor", "density")


def crumbs_l1(stacks: dict) -> dict:
    after = mergekit_crumbs(stacks)
    return {
        k: np.stack([oracles.rescale_to_norm(b, a, 1) for b, a in zip(v, after[k], strict=True)])
        for k, v in stacks.items()
    }


def dare_l1(stacks: dict) -> dict:
    masks = {k: np.stack([uniforms(k, t, v.shape[1:]) < 0.5 for t in range(TASKS)]) for k, v in stacks.items()}
    return oracles.dare(stacks, masks, 0.5, "l1")


# Ours; the transcription.
METHODS = {
    "breadcrumbs": (
        tj.breadcrumbs_merging(0.5, 0.2, 0.75, weights=WEIGHTS, flavour="mergekit"),
        lambda x: linear(mergekit_crumbs(x), WEIGHTS, False, 0.75),
    ),
    "breadcrumbs_normalize": (
        tj.breadcrumbs_merging(0.5, 0.2, 0.75, weights=WEIGHTS, normalize=True, rescale=True, flavour="mergekit"),
        lambda x: linear(crumbs_l1(x), WEIGHTS, True, 0.75),
    ),
    "breadcrumbs_ties": (
        tj.breadcrumbs_ties(0.5, 0.2, 0.75, weights=WEIGHTS),
        lambda x: elected(mergekit_crumbs(x), WEIGHTS, False, 0.75),
    ),
    "della": (
        tj.della_merging(0.5, 0.15, 0.75, weights=WEIGHTS, flavour="mergekit"),
        lambda x: elected(della(x, 0.5, 0.15, "second_axis", "l1"), WEIGHTS, True, 0.75),
    ),
    "della_linear": (
        tj.della_linear(0.5, 0.15, 0.75, weights=WEIGHTS),
        lambda x: linear(della(x, 0.5, 0.15, "second_axis", "l1"), WEIGHTS, False, 0.75),
    ),
    "dare_linear": (
        tj.dare_linear(0.5, 0.75, weights=WEIGHTS),
        lambda x: linear(dare_l1(x), WEIGHTS, False, 0.75),
    ),
    "dare_ties": (
        tj.dare_ties(0.5, 0.75, weights=WEIGHTS, normalize=True),
        lambda x: elected(dare_l1(x), WEIGHTS, True, 0.75),
    ),
}


def fine_tunes(make_stacks) -> tuple[dict, dict, list[dict]]:
    """Task vectors, a base of zeros and the models; one tensor of each kind that mergekit takes."""
    stacks = {k: v for k, v in make_stacks("normal", TASKS).items() if k in ("block/bias", "conv/kernel")}
    base = {k: np.zeros(v.shape[1:], np.float32) for k, v in stacks.items()}
    return stacks, base, [{k: v[t] for k, v in stacks.items()} for t in range(TASKS)]


def assert_close(actual: dict, expected: dict) -> None:
    for tensor, value in expected.items():
        np.testing.assert_allclose(actual[tensor], value, rtol=1e-5, atol=1e-6, err_msg=tensor)


@pytest.mark.parametrize("name", METHODS)
def test_against_the_formula(name, make_stacks):
    rule, oracle = METHODS[name]
    stacks, base, models = fine_tunes(make_stacks)
    assert_close(tj.merge(base, models, rule, key=KEY), oracle(stacks))


def test_della_of_the_authors(make_stacks, nest, flatten):
    """Rows, each entry by its own probability, the election on weighted sums, the mean of what agrees."""
    stacks = {"block/kernel": make_stacks("exact", TASKS)["block/kernel"]}
    rule = tj.della_merging(0.5, 0.2, 0.75, weights=WEIGHTS)
    out = flatten(tj.merge_task_vectors(nest(stacks), rule, key=KEY))
    assert_close(out, elected(della(stacks, 0.5, 0.2), WEIGHTS, True, 0.75))


def test_a_bfloat16_checkpoint_is_merged_in_float32(make_stacks):
    stacks = {"block/kernel": make_stacks("normal", TASKS)["block/kernel"]}
    base = {name: np.ones(stack.shape[1:], ml_dtypes.bfloat16) for name, stack in stacks.items()}
    models = [{k: (1 + v[t]).astype(ml_dtypes.bfloat16) for k, v in stacks.items()} for t in range(TASKS)]
    deltas = {k: np.stack([m[k].astype(np.float32) - 1 for m in models]) for k in stacks}
    merged = tj.merge(base, models, tj.della_merging(0.5, 0.2), key=KEY)
    for name, expected in elected(della(deltas, 0.5, 0.2), [1.0] * TASKS, True, 1.0).items():
        assert merged[name].dtype == jax.numpy.bfloat16
        np.testing.assert_allclose(np.asarray(merged[name], np.float32), 1 + expected, rtol=0.004, atol=1e-6)


def test_coefficients_per_task_are_refused():
    with pytest.raises(tj.ParameterError, match="dare_ties: coefficient is one number, got"):
        tj.dare_ties(coefficient=[1.0, 2.0])


@pytest.mark.parametrize(
    "rule",
    [tj.dare_linear, tj.dare_ties, tj.della_merging, tj.della_linear, tj.breadcrumbs_merging, tj.breadcrumbs_ties],
)
def test_no_density_switches_the_own_sparsifier_off(rule):
    """So that one given apart takes its place."""
    steps = expand(rule(None, coefficient=1.0), 2)
    assert len(steps) == 1
    assert not steps[0].random
    assert len(expand(rule(0.5, coefficient=1.0), 2)) == 2
