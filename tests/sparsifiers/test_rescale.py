"""Norms restored after any sparsifier, and after chains of them."""

import dataclasses

import jax
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed
from tests.oracles import as_vectors, from_vectors, rescale_to_norm

TASKS = 3
KEY = jax.random.key(2)
CHAIN = (tj.uniform(0.3, norm=None), tj.magnitude(0.4, granularity="global"))
INNER = {
    "magnitude": (tj.magnitude(0.3, keep="exact"), 2, "tensor"),
    "dare": (tj.dare(0.5, rescale=None), 1, "global"),
    "chain": (tj.chain(*CHAIN), 2, "tensor"),
    "conflict_aware": (tj.conflict_aware(tj.n_m(2, 8)), 1, "global"),
    "rescaled": (tj.rescale(tj.magnitude(0.3), norm=1), 2, "global"),
}


def restored(before: dict, after: dict, norm: int, granularity: str) -> dict:
    if granularity == "global":
        rows = [rescale_to_norm(b, a, norm) for b, a in zip(as_vectors(before), as_vectors(after), strict=True)]
        return from_vectors(np.stack(rows), before)
    return {
        k: np.stack([rescale_to_norm(b, a, norm) for b, a in zip(before[k], after[k], strict=True)]) for k in before
    }


@pytest.mark.parametrize("name", INNER)
def test_rescale(name, make_stacks, nest, flatten):
    inner, norm, granularity = INNER[name]
    stacks = make_stacks("exact", TASKS)
    del stacks["conv/kernel"]
    after = flatten(tj.sparsify(nest(stacks), inner, key=KEY))
    out = flatten(tj.sparsify(nest(stacks), tj.rescale(inner, norm, granularity), key=KEY))
    for tensor, expected in restored(stacks, after, norm, granularity).items():
        np.testing.assert_array_equal(out[tensor] != 0, after[tensor] != 0, err_msg=tensor)
        np.testing.assert_allclose(out[tensor], expected, rtol=1e-5, err_msg=tensor)


def test_it_is_the_norm_of_uniform(make_stacks, nest, flatten):
    stacks = nest(make_stacks("normal", TASKS))
    here = flatten(tj.sparsify(stacks, tj.rescale(tj.uniform(0.25, norm=None))))
    for name, there in flatten(tj.sparsify(stacks, tj.uniform(0.25))).items():
        np.testing.assert_allclose(here[name], there, rtol=1e-6)


@pytest.mark.parametrize("step", [tj.uniform(0.5), tj.rescale(tj.magnitude(0.5))], ids=["uniform", "rescale"])
def test_what_is_too_small_to_square_is_not_lost(step):
    """In memory its powers are 0, as those of nothing are; streamed, the first of these has them still."""
    base = {name: np.zeros(4, np.float32) for name in ("small", "smallest")}
    models = [
        {name: np.array([1, -2, 3, 8], np.float32) * size for name, size in zip(base, (2e-21, 1e-30), strict=True)}
    ]
    rule = tj.chain(step, tj.task_arithmetic(1.0))
    for merged in (tj.merge(base, models, rule), run_streamed(base, models, rule)[0]):
        for name, value in merged.items():
            np.testing.assert_array_equal(value != 0, [False, False, True, True], err_msg=name)
            np.testing.assert_allclose(value[2:], models[0][name][2:], rtol=0.1, err_msg=name)


def test_tensors_that_the_inner_sparsifier_leaves_alone_keep_their_bits(make_stacks, nest, flatten):
    stacks = make_stacks("normal", TASKS)
    step = tj.rescale(tj.masked(tj.chain(*CHAIN), include="kernel"), 1, "global")
    out = flatten(tj.sparsify(nest(stacks), step))
    chosen = {k: v for k, v in stacks.items() if "kernel" in k}
    alone = flatten(tj.sparsify(nest(chosen), tj.rescale(tj.chain(*CHAIN), 1, "global")))
    for name, value in (stacks | alone).items():
        np.testing.assert_array_equal(out[name], value, err_msg=name)


def test_what_takes_the_place_of_the_inner_sparsifier_is_rescaled_too(make_stacks, nest, flatten):
    stacks = make_stacks("normal", TASKS)
    half = tj.dare(0.5, None)
    mixed = dataclasses.replace(half, instead=lambda path, *_: tj.magnitude(0.3) if "kernel" in path else None)
    other = dataclasses.replace(half, instead=lambda path, *_: tj.dare(0.25, None) if "kernel" in path else None)
    for inner in (mixed, tj.chain(half, other), tj.chain(half, mixed)):
        after = flatten(tj.sparsify(nest(stacks), inner, key=KEY))
        out = flatten(tj.sparsify(nest(stacks), tj.rescale(inner), key=KEY))
        for name, expected in restored(stacks, after, 2, "tensor").items():
            np.testing.assert_allclose(out[name], expected, rtol=1e-5, err_msg=name)
        with pytest.raises(tj.ParameterError, match="rescale: granularity must be 'tensor'"):
            tj.sparsify(nest(stacks), tj.rescale(inner, granularity="global"), key=KEY)


def test_streamed_equals_in_memory(small_blocks):
    base, models = family()
    rule = tj.chain(tj.rescale(tj.chain(*CHAIN), 1, "global"), tj.task_arithmetic(0.5))
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, atol=1e-6)


def test_nothing_left_is_zero():
    stack = {"w": np.ones((1, 4), np.float32)}
    assert not np.any(tj.sparsify(stack, tj.rescale(tj.magnitude(0.0)))["w"])


def test_bad_requests_are_refused():
    with pytest.raises(tj.MergeError, match="rescale takes a sparsifier, not a merge rule"):
        tj.rescale(tj.average())
    with pytest.raises(tj.ParameterError, match="rescale: norm must be one of 1, 2, got 3"):
        tj.rescale(tj.magnitude(0.5), norm=3)
    with pytest.raises(tj.ParameterError, match="rescale: granularity must be one of 'tensor', 'global', got 'row'"):
        tj.rescale(tj.magnitude(0.5), granularity="row")
    mixed = tj.chain(tj.masked(tj.magnitude(0.5), include="w"), tj.magnitude(0.5))
    with pytest.raises(tj.ParameterError, match="rescale: the steps of a chain must be for the same tensors"):
        tj.sparsify({"w": np.ones((1, 4), np.float32)}, tj.rescale(mixed))
