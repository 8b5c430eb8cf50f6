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


def scaled(factors, looked_up: bool = True) -> tj.Step:
    """A user's sparsifier that multiplies each task by a factor that it looks up, or closes over."""
    return tj.Step(
        lambda x, carry: x.stack * x.per_task(x.numbers["factors"] if looked_up else factors),
        spec=("scaled",) if looked_up else None,
        numbers={"factors": factors} if looked_up else {},
    )


@pytest.mark.parametrize("kind", [tuple, list, np.array, jnp.array])
def test_numbers_of_a_users_step_are_one_per_task(kind):
    """Whatever holds them; a piece of one task takes its own."""
    stack = {"w": jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}
    step = scaled(kind([2.0, 3.0, 4.0]))
    assert step == scaled(kind([2.0, 3.0, 4.0])) != scaled(kind([2.0, 3.0, 5.0]))
    assert hash(step) == hash(scaled((2.0, 3.0, 4.0)))
    for whole in (step, tj.conflict_aware(step)):
        np.testing.assert_array_equal(jnp.diag(tj.sparsify(stack, whole)["w"]), [2, 3, 4])


def test_numbers_that_are_no_numbers_or_of_other_tasks():
    stack = {"w": jnp.ones((3, 2))}
    for bad in (None, "x", 1j, True, np.nan, np.ones((3, 1)), ()):
        with pytest.raises(tj.ParameterError, match="a step: factors"):
            scaled(bad)
    for few in ((1.0, 2.0), np.ones(4)):
        with pytest.raises(tj.ParameterError, match=r"factors has \d values, one per task, but there are 3 tasks"):
            tj.sparsify(stack, scaled(few))
    # An array of all tasks does not tell a piece of one which is its own: each got the first task's.
    with pytest.raises(tj.MergeError, match="3 numbers for the 1 tasks of a piece"):
        tj.sparsify(stack, tj.conflict_aware(scaled(jnp.array([2.0, 3.0, 4.0]), looked_up=False)))


@pytest.mark.parametrize(
    "wrapped", [tj.conflict_aware, lambda s: tj.rescale(tj.chain(scaled(1.0), s))], ids=["conflict_aware", "chain"]
)
def test_order_statistics_inside_others_keep_their_gradient(wrapped):
    """Of one task, and of a chain behind a step that changes nothing."""

    def clipped(x, carry):
        return jnp.minimum(x.stack, x.column(carry["most"]))

    most = tj.Ranks(lambda x, carry: x.stack, lambda n, carry: {"most": n // 2}, "global", attached=True)
    clip = tj.Step(clipped, (most,))
    stack = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0, 6.0]])}

    def gradient(step):
        return jax.grad(lambda stack: jnp.sum(tj.sparsify(stack, step)["w"] ** 2))(stack)["w"]

    alone = clip if wrapped is tj.conflict_aware else tj.rescale(clip)
    np.testing.assert_allclose(gradient(wrapped(clip)), gradient(alone), rtol=1e-5)


def test_what_stages_and_apply_share_is_made_once_for_a_stack():
    made = []

    def total(x):
        return x.shared("total", lambda: made.append(x.stack) or jnp.sum(x.stack, axis=0))

    def twice(x, carry):
        other = x._replace(stack=2 * x.stack)
        return total(other) + total(x) + carry["norm"][0]

    step = tj.Step(twice, (tj.Sums(lambda x, carry, n: {"norm": total(x)[None]}),), output="vector")
    merged = tj.merge_task_vectors({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, step)
    assert merged["w"].tolist() == [3 * 4.0 + 10, 3 * 6.0 + 10]
    assert len(made) == 3  # the sum for the stage, that of the other stack, and again of the first
