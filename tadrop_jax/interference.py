r"""WUDI's loss, which its solvers share: how a merged matrix interferes with the inputs of each task.

.. math::

  L(m) = \sum_t w_t \lVert (m - \tau_t) \tau_t^T \rVert_F^2, \quad w_t = 1 / \lVert \tau_t \rVert_F^2

over matrices (out, in): the rows of a task vector stand for the inputs of its task. Its gradient is
:math:`2 (m C - D)`, with :math:`C = \sum_t w_t \tau_t^T \tau_t` and
:math:`D = \sum_t w_t \tau_t \tau_t^T \tau_t`. C has trace T, whatever the size of the task vectors; a zero task vector
has no part in it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.parameters import choice
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, over_tasks, safe_ratio, safe_sqrt

Merge = Callable[[jax.Array], jax.Array]


def over_inputs(method: str, merge: Merge, input_axis: int) -> Merge:
    """A merge of matrices whose inputs lie along ``input_axis``, from one of matrices (out, in).

    Raises:
      ParameterError: for an axis that a matrix does not have.
    """
    choice(method, "input_axis", input_axis, (-1, 0, 1, -2))
    if input_axis in (-1, 1):
        return merge
    return lambda stack: merge(jnp.swapaxes(stack, -1, -2)).swapaxes(-1, -2)


def with_norms(rule: Step, **changes) -> Step:
    """The rule with the norms of the task vectors in its report: where they differ much, these rules do badly."""
    squares = Sums(lambda x, carry, n: {"squares": x.stack * x.stack})
    return dataclasses.replace(rule, stages=(squares,), report=lambda c: {"norm": safe_sqrt(c["squares"])}, **changes)


def directions(stack) -> jax.Array:
    """The task vectors ``(T, out, in)`` at Frobenius norm 1; a zero task vector stays zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(stack), axis=(1, 2), keepdims=True))
    stack = safe_ratio(stack, largest)  # squares of small entries would underflow
    return safe_ratio(stack, safe_sqrt(jnp.sum(stack * stack, axis=(1, 2), keepdims=True)))


def quadratic(stack) -> tuple[jax.Array, jax.Array]:
    """C ``(in, in)`` and D ``(out, in)`` of the task vectors ``(T, out, in)``."""
    outputs, inputs = stack.shape[1:]
    unit = directions(stack)
    rows = jnp.reshape(unit, (-1, inputs))
    gram = linalg.matmul(rows.T, rows)
    if outputs < inputs:
        pulls = [linalg.matmul(linalg.matmul(t, u.T), u) for t, u in zip(stack, unit, strict=True)]
    else:
        pulls = [linalg.matmul(t, linalg.matmul(u.T, u)) for t, u in zip(stack, unit, strict=True)]
    return gram, over_tasks(jnp.add, jnp.stack(pulls))
