"""Rules that go on from what another rule merged: SVC, and the masks of TALL and Consensus."""

import dataclasses

import jax.numpy as jnp

from tadrop_jax.errors import MergeError
from tadrop_jax.steps import AnyStep, Chain, Step, output_of


def parts_of(rule: AnyStep, method: str) -> list:
    """The steps of a rule that gives one model, in order.

    Raises:
      MergeError: if what is given is no rule, or one that gives a model per task.
    """
    if output_of(rule) not in ("vector", "parameters"):
        raise MergeError(f"{method} takes a merge rule that gives one model, for example task_arithmetic(0.3)")
    return _parts(rule)


def put_on_top(rule: Step) -> Step:
    """A rule's last step, with its merged vector put on top of the task vectors that it saw: ``(1 + T, *S)``."""

    def apply(x, carry):
        merged = rule.apply(x, carry)
        if rule.output == "parameters":
            merged = merged - x.base
        # The rule may itself go on from a vector on top of the stack: that is no task.
        return jnp.concatenate([merged[None], x.stack[-len(x.tasks) :]])

    return dataclasses.replace(
        rule,
        apply=apply,
        output="stack",
        on_weights=rule.output == "parameters",
        instead=rule.others(put_on_top),
        spec=None if rule.spec is None else ("on top", rule.spec),
    )


def _parts(rule) -> list:
    if isinstance(rule, Chain):
        return [part for inner in rule.parts for part in _parts(inner)]
    return [rule]
