r"""ACE-Merging: weights each task by the covariance of its inputs, read off its update (arXiv 2603.02945)."""

import jax.numpy as jnp
from jax import lax

from tadrop_jax import linalg
from tadrop_jax.interference import over_inputs, with_norms
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import fixed, single
from tadrop_jax.steps import Step, over_tasks

_TINY = 1e-12  # the authors'


def ace(
    epsilon=1e-2,
    coefficient=1.0,
    *,
    threshold: float = 0.3,
    share: float = 0.3,
    input_axis: int = -1,
    mean_only=(),
) -> Step:
    r"""Solves for the matrix that fits every task under its own estimate of the input covariance.

    .. math::

      c_t = \tau_t - mean_{out}(\tau_t), \quad S_t = c_t^T c_t, \quad
      \tau = \Big(\sum_t c_t (S_t + \epsilon I)\Big) \Big(\sum_t (S_t + \epsilon I) + 1 \bar{S}\Big)^{-1}

    with :math:`\bar S` the mean row of :math:`\sum_t S_t`. Where the tasks differ in size, that is where
    :math:`\gamma = var(\log \lVert\tau_t\rVert^2) / mean(\log \lVert\tau_t\rVert^2)^2` exceeds the threshold,
    :math:`S_t` and :math:`\epsilon` are divided by the trace of :math:`S_t`, :math:`\bar S` by the mean of
    :math:`\lVert\tau_t\rVert^2`, and :math:`\tau` gains the k leading directions of
    :math:`\sum_t \tau_t (S_t - \frac{1}{T} \sum_j (S_j + \epsilon_j I)) + \tau`, each as strong as their mean.

    This is ``ace_merging`` of the authors' repository (unravel-xu/ACE-Merging); :math:`\gamma` depends on the scale of
    the task vectors, by their definition. Two cases in which their code gives no number, or none of use, are settled:
    k = 0 adds nothing, and a task vector that is zero has :math:`\epsilon_t = 0` in the divided form (not
    :math:`\epsilon / 10^{-12}`, which drowns the other tasks).

    Args:
      epsilon: keeps the covariances invertible, at least 1e-12. 0.01 is the default of the authors' code, for all
        models; of their reported settings we know 0.04 for GPT-2, 2e-4 for RoBERTa and 1e-5 otherwise.
      coefficient: multiplies the merged vector.
      threshold: on :math:`\gamma`; a constant for gradients.
      share: of the smaller side of the matrix: k is ``int(share * min(out, in))``.
      input_axis: the axis of the inputs, in PyTorch order: -1 for ``torch.nn.Linear``. The authors' code takes the last
        axis of every matrix, also of GPT-2's ``Conv1D`` (in, out), whose inputs are at 0.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings; the authors':
        ``"text_projection"``. So do tensors that are no matrices.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])}
      >>> tj.merge_task_vectors(stack, tj.ace(1e-6))["w"].round(3).tolist()
      [[0.5, 0.5], [-0.5, -0.5]]
    """
    epsilon, threshold = single("ace", "epsilon", epsilon, _TINY), single("ace", "threshold", threshold, 0)
    share = fixed("ace", "share", share, 0, 1)

    def merge(stack):
        return solved(stack, epsilon, threshold, share)

    rule = matrix_rule(
        "ace",
        over_inputs("ace", merge, input_axis),
        coefficient=single("ace", "coefficient", coefficient),
        mean_only=mean_only,
        epsilon=epsilon,
        threshold=threshold,
        share=share,
        input_axis=input_axis,
    )
    return with_norms(rule)


def solved(stack, epsilon, threshold, share: float):
    """The formula, ``(T, out, in)`` to ``(out, in)``."""
    tasks, outputs, inputs = stack.shape
    squares = jnp.sum(stack * stack, axis=(1, 2))
    differ = _differ(squares, threshold)
    centred = stack - jnp.mean(stack, axis=1, keepdims=True)
    traces = jnp.sum(centred * centred, axis=(1, 2))
    size = jnp.where(differ, traces + _TINY, 1)
    floors = epsilon * jnp.where(differ & (traces == 0), 0, 1 / size)

    eye = jnp.eye(inputs, dtype=stack.dtype)
    covariances = jnp.stack([linalg.matmul(c.T, c) for c in centred]) / size[:, None, None]
    total = over_tasks(jnp.add, covariances)
    bars = jnp.mean(total, axis=0) / jnp.where(differ, jnp.mean(squares) + _TINY, 1)
    weighted = [linalg.matmul(c, s) + e * c for c, s, e in zip(centred, covariances, floors, strict=True)]
    regular = total + jnp.sum(floors) * eye
    # Where every update is the same in all outputs there is no covariance, and nothing to invert.
    empty = jnp.all(regular == 0)
    matrix = jnp.where(empty, eye, regular + bars)
    merged = jnp.linalg.solve(matrix.T, over_tasks(jnp.add, jnp.stack(weighted)).T).T

    k = int(share * min(outputs, inputs))
    if k == 0 or tasks == 1:
        return merged

    def refined(merged):
        fit = merged
        for t, s in zip(stack, covariances, strict=True):
            fit = fit + linalg.matmul(t, s - regular / tasks)
        u, s, vt = linalg.svd(fit)
        return merged + jnp.mean(s[:k]) * linalg.matmul(u[:, :k], vt[:k])

    return lax.cond(differ, refined, lambda merged: merged, merged)


def _differ(squares, threshold):
    """Whether the tasks differ in size, from their squared norms ``(T,)``."""
    if squares.size == 1:
        return jnp.array(False)
    logs = jnp.log(lax.stop_gradient(squares) + _TINY)
    return jnp.var(logs, ddof=1) / (jnp.mean(logs) ** 2 + _TINY) > threshold
