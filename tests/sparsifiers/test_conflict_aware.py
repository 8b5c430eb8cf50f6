"""What conflict-aware sparsification takes inside: its formula is in test_sparsifiers_against_oracles.py."""

import dataclasses

import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed

STACK = {name: np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32) for name in "vw"}
# A step as a user may write it: another sparsifier takes its place for one tensor.
MIXED = dataclasses.replace(
    tj.magnitude(0.5), instead=lambda path, shape, tasks: tj.magnitude(0.25) if path == "v" else None, spec=None
)


def test_what_takes_the_place_of_the_inner_sparsifier_is_restricted_too():
    out = tj.sparsify(STACK, tj.conflict_aware(MIXED))
    for name, density in (("v", 0.25), ("w", 0.5)):
        alone = tj.sparsify({name: STACK[name]}, tj.conflict_aware(tj.magnitude(density)))
        np.testing.assert_array_equal(out[name], alone[name], err_msg=name)


def test_what_takes_the_place_streamed(small_blocks):
    base, models = family(2)
    inner = dataclasses.replace(MIXED, instead=lambda path, *_: tj.magnitude(0.25) if "kernel" in path else None)
    rule = tj.chain(tj.rescale(tj.conflict_aware(inner)), tj.task_arithmetic(1.0))
    streamed, *_ = run_streamed(base, models, rule)
    for name, value in tj.merge(base, models, rule).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "inner",
    [tj.dominance(), tj.chain(tj.magnitude(0.5), tj.rescale(tj.dominance())), tj.conflict_aware(tj.magnitude(0.5))],
    ids=["dominance", "inside a chain", "itself"],
)
def test_a_sparsifier_that_compares_tasks_is_refused(inner):
    """Of one task alone dominance keeps every entry."""
    with pytest.raises(tj.ParameterError, match="conflict_aware: gives its sparsifier one task at a time"):
        tj.sparsify(STACK, tj.conflict_aware(inner))
