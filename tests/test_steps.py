"""What a step of a user's own may hand over: ranks, and numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import run_streamed


def cut_at(ranks, scope="tensor") -> tj.Step:
    """A user's sparsifier that keeps what reaches a rank among the magnitudes."""

    def apply(x, carry):
        return jnp.where(tj.at_least(x.stack, x.column(carry["cut"])), x.stack, 0)

    return tj.Step(apply, (tj.Ranks(lambda x, carry: x.stack, at=lambda n, carry: {"cut": ranks(n)}, scope=scope),))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(
    "ranks",
    [lambda n: np.int64(n - 1), lambda n: jnp.int32(n - 1), lambda n: np.array([n - 1, 1]), lambda n: (n - 1, 1)],
    ids=["numpy", "jax", "vector", "tuple"],
)
def test_whole_numbers_are_ranks(ranks, scope):
    """Of any library, for all tasks or one for each."""
    kept = np.sum(tj.sparsify({"w": jnp.arange(1.0, 9.0).reshape(2, 4)}, cut_at(ranks, scope))["w"] != 0, axis=1)
    assert kept.tolist() == [1, 3 if np.ndim(ranks(4)) or type(ranks(4)) is tuple else 1]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "ranks",
    [lambda n: n / 2, lambda n: jnp.floor(n / 2), lambda n: (1.5, 2.0), lambda n: -1, lambda n: n + 1, lambda n: (1,)],
    ids=["float", "array", "tuple", "below", "above", "too few"],
)
def test_what_is_no_rank_is_refused(ranks, streamed):
    """Streamed it was cut to a whole number, or taken for the nearest rank; and in memory a rank below 0."""
    base, models = {"w": np.zeros(4, np.float32)}, [{"w": np.arange(1, 5, dtype=np.float32) * t} for t in (1, 2)]
    rule = tj.chain(cut_at(ranks), tj.average())
    with pytest.raises(tj.MergeError, match=r"a rank is a whole number from 0 to 4.*'cut' is"):
        run_streamed(base, models, rule) if streamed else tj.merge(base, models, rule)
