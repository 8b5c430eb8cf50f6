"""RAM and RAM+ against transcriptions."""

import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed

TASKS = 3


def active_of(stacks: dict, threshold: float) -> tuple[dict, dict]:
    active = {name: np.abs(stack) > threshold for name, stack in stacks.items()}
    return active, {name: mask.sum(axis=0) for name, mask in active.items()}


def ram(stacks: dict, threshold=1e-5, coefficient=1.0) -> dict:
    active, counts = active_of(stacks, threshold)
    total = {name: np.where(active[name], stack, 0).sum(axis=0) for name, stack in stacks.items()}
    return {name: coefficient * total[name] / np.maximum(counts[name], 1) for name in stacks}


def ram_plus(stacks: dict, r=0.1, alpha=0.2, threshold=1e-5, granularity="tensor", coefficient=1.0) -> dict:
    active, counts = active_of(stacks, threshold)
    shared = {k: [(a & (counts[k] > 1)).sum() for a in masks] for k, masks in active.items()}
    unique = {k: [(a & (counts[k] == 1)).sum() for a in masks] for k, masks in active.items()}
    if granularity == "global":
        shared = dict.fromkeys(stacks, np.sum(list(shared.values()), axis=0))
        unique = dict.fromkeys(stacks, np.sum(list(unique.values()), axis=0))
    out = {}
    for name, stack in stacks.items():
        merged = np.zeros(stack.shape[1:])
        for t, x in enumerate(stack):
            factor = 1 + r * min(shared[name][t] / unique[name][t], alpha) if unique[name][t] else 1
            alone, several = active[name][t] & (counts[name] == 1), active[name][t] & (counts[name] > 1)
            merged += np.where(alone, factor * x, 0) + np.where(several, x / np.maximum(counts[name], 1), 0)
        out[name] = (coefficient * merged).astype(np.float32)
    return out


SETTINGS = {
    "ram": (tj.ram(), lambda x: ram(x)),
    "ram_threshold": (tj.ram(0.3, 0.5), lambda x: ram(x, 0.3, 0.5)),
    "ram_plus": (tj.ram_plus(threshold=0.3), lambda x: ram_plus(x, threshold=0.3)),
    "authors": (
        tj.ram_plus(0.2, threshold=0.3, flavour="authors"),
        lambda x: ram_plus(x, 0.2, 1.0, 0.3, "global"),
    ),
    "global": (
        tj.ram_plus(0.5, 3.0, threshold=0.3, granularity="global", coefficient=0.5),
        lambda x: ram_plus(x, 0.5, 3.0, 0.3, "global", 0.5),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_formula(name, make_stacks, nest, flatten):
    rule, oracle = SETTINGS[name]
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        if name not in ("ram", "authors"):
            stacks = {k: stacks[k] for k in ("block/kernel", "scale")}
        out = flatten(tj.merge_task_vectors(nest(stacks), rule))
        for tensor, expected in oracle(stacks).items():
            np.testing.assert_allclose(out[tensor], expected, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_without_a_unique_entry_nothing_is_scaled():
    stack = {"w": np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)}
    for flavour in ("mergekit", "authors"):
        merged = tj.merge_task_vectors(stack, tj.ram_plus(1.0, flavour=flavour))["w"]
        np.testing.assert_array_equal(merged, [2.0, -1.0])


def test_streamed_equals_in_memory(small_blocks):
    base, models = family(TASKS)
    rule = tj.ram_plus(0.5, threshold=0.1, granularity="global")
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tj.ram(-1.0), r"ram: threshold must lie in \[0, inf\], got -1.0"),
        (lambda: tj.ram(coefficient=[1.0, 2.0]), "ram: coefficient is one number, got 2"),
        (lambda: tj.ram_plus(-0.1), r"ram_plus: r must lie in \[0, inf\], got -0.1"),
        (lambda: tj.ram_plus(granularity="row"), "ram_plus: granularity must be one of 'tensor', 'global', got 'row'"),
        (lambda: tj.ram_plus(flavour="peft"), "ram_plus: flavour must be one of"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(tj.ParameterError, match=said):
        make()
