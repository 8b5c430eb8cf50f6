"""What a sparsifier does to each tensor, as steps: the same numbers in memory (`tj.explain`) and from files."""

from collections.abc import Sequence

import jax.numpy as jnp

from tadrop_jax.errors import MergeError
from tadrop_jax.selection import magnitude
from tadrop_jax.stages import Ranks, Sums
from tadrop_jax.steps import AnyStep, Step, expand, floor_times, output_of, reported, safe_ratio, spec


def ratio_step(q_low, q_high) -> Step:
    """Leaves the stack as it is, and finds its quantile ratios."""
    return Step(
        stages=(
            Ranks(
                lambda x, carry: magnitude(x.stack),
                at=lambda n, carry: {"low": floor_times(q_low, n - 1), "high": floor_times(q_high, n - 1)},
            ),
        ),
        apply=lambda x, carry: x.stack,
        report=lambda carry: {"quantile_ratio": safe_ratio(carry["low"], carry["high"])},
        spec=spec("quantile_ratios", q_low=q_low, q_high=q_high),
    )


def explaining_steps(sparsifier: AnyStep, tasks: int) -> tuple[Step, ...]:
    """A sparsifier between the steps that look at what goes in and what comes out.

    Raises:
      MergeError: for a merge rule.
    """
    if output_of(sparsifier) != "stack":
        raise MergeError("what is explained is a sparsifier, not a merge rule")
    return (_before(), ratio_step(0.95, 0.99), *expand(sparsifier, tasks), _after())


def explanation(steps: Sequence[Step], carries: Sequence[dict]) -> dict:
    """The numbers of one tensor, from the steps that :func:`explaining_steps` gave, as they are for it, and carries."""
    first, between, last = (reported(steps[at], carries[at]) for at in (slice(1), slice(1, -1), slice(-1, None)))
    return {"quantile_ratio": between["quantile_ratio"], **first, **last}


def _before() -> Step:
    def sums(x, carry, n):
        conflict = jnp.any(x.stack > 0, axis=0) & jnp.any(x.stack < 0, axis=0)
        return {"squares": x.stack**2, "conflicts": conflict[None], "entries": jnp.ones_like(x.stack[:1])}

    def report(carry):
        return {"norm": jnp.sqrt(carry["squares"]), "sign_conflict": (carry["conflicts"] / carry["entries"])[0]}

    return Step(stages=(Sums(sums),), apply=lambda x, carry: x.stack, report=report, spec=("explain", "before"))


def _after() -> Step:
    def sums(x, carry, n):
        return {"squares": x.stack**2, "zeros": x.stack == 0, "entries": jnp.ones_like(x.stack[:1])}

    def report(carry):
        return {"sparsity": carry["zeros"] / carry["entries"], "norm_after": jnp.sqrt(carry["squares"])}

    return Step(stages=(Sums(sums),), apply=lambda x, carry: x.stack, report=report, spec=("explain", "after"))
