"""Dominance against its formula, and its ends: the identity at share 0, MagMax at share 1."""

import jax
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed
from tests.oracles import rescale_to_norm

TASKS = 3


def expected(stacks: dict, shares: list[float], norm: int | None) -> dict:
    """By loops over tasks."""
    out = {}
    for name, stack in stacks.items():
        largest = np.max(np.abs(stack), axis=0)
        kept = [np.where(np.abs(x) >= np.float32(s) * largest, x, 0) for x, s in zip(stack, shares, strict=True)]
        out[name] = np.stack([rescale_to_norm(x, k, norm) for x, k in zip(stack, kept, strict=True)])
    return out


@pytest.mark.parametrize("values", ["exact", "normal"])
@pytest.mark.parametrize(("share", "norm"), [(0.5, 2), ((0.25, 0.5, 1.0), 1), (0.75, None)])
def test_formula(values, share, norm, make_stacks, nest, flatten):
    stacks = make_stacks(values, TASKS)
    wanted = expected(stacks, list(share) if isinstance(share, tuple) else [share] * TASKS, norm)
    out = flatten(tj.sparsify(nest(stacks), tj.dominance(share, norm)))
    for name, value in wanted.items():
        np.testing.assert_array_equal(out[name] != 0, value != 0, err_msg=name)
        np.testing.assert_allclose(out[name], value, rtol=1e-5, err_msg=name)


def test_ends(make_stacks, nest, flatten):
    stacks = make_stacks("normal", TASKS)
    same = flatten(tj.sparsify(nest(stacks), tj.dominance(0.0, norm=None)))
    largest = flatten(
        tj.merge_task_vectors(nest(stacks), tj.chain(tj.dominance(1.0, norm=None), tj.task_arithmetic(1.0)))
    )
    one = {name: stack[:1] for name, stack in stacks.items()}
    alone = flatten(tj.sparsify(nest(one), tj.dominance(1.0, norm=None)))
    for name, stack in stacks.items():
        np.testing.assert_array_equal(same[name], stack)
        np.testing.assert_array_equal(alone[name], one[name])
        magmax = np.take_along_axis(stack, np.abs(stack).argmax(0)[None], 0)[0]
        np.testing.assert_array_equal(largest[name], magmax)


def test_share_may_be_traced(make_stacks, nest):
    stacks = nest(make_stacks("normal", TASKS))
    many = jax.jit(jax.vmap(lambda share: tj.sparsify(stacks, tj.dominance(share))))(np.array([0.25, 0.75], np.float32))
    for i, share in enumerate((0.25, 0.75)):
        one = tj.sparsify(stacks, tj.dominance(share))
        jax.tree.map(lambda m, o, i=i: np.testing.assert_allclose(m[i], o, rtol=1e-6), many, one)


def test_streamed_equals_in_memory_and_emr_keeps_fewer_bits(small_blocks):
    base, models = family()
    rule = tj.chain(tj.dominance(), tj.emr())
    streamed, *_ = run_streamed(base, models, tj.chain(tj.dominance(), tj.task_arithmetic(0.5)))
    for name, value in tj.merge(base, models, tj.chain(tj.dominance(), tj.task_arithmetic(0.5))).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, atol=1e-6)
    bits = [
        sum(np.count_nonzero(b.task_vector(0)[n]) for n in base)
        for b in (tj.merge(base, models, r) for r in (rule, tj.emr()))
    ]
    assert bits[0] < bits[1]


def test_bad_shares_are_refused():
    with pytest.raises(tj.ParameterError, match="dominance: share must lie in"):
        tj.dominance(1.5)
    with pytest.raises(tj.ParameterError, match="dominance: norm must be 1, 2 or None, got 3"):
        tj.dominance(0.5, norm=3)
