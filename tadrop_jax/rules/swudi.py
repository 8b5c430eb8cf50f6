r"""SWUDI and ASWUDI: WUDI's gradient flow, stopped in its spectrum (WalkerWorldPeace/MLLMerging)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from tadrop_jax import linalg
from tadrop_jax.interference import over_inputs, quadratic, with_norms
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice, fixed, flag, single
from tadrop_jax.steps import Step, over_tasks

_LEAST = 1e-8  # eigenvalues below count as this (the authors')
# Below this share of the largest, an eigenvalue of a Gram matrix in float32 is what rounding left.
_NOISE = 8 * float(np.finfo(np.float32).eps)

STARTS = ("sum", "mean", "zero")
RANKS = ("participation_sqrt", "participation", "entropy", "stable_rank", "gavish_donoho")


def swudi(
    time=1300.0,
    share: float = 0.65,
    coefficient=1.0,
    *,
    natural_time: bool = False,
    start: str = "sum",
    input_axis: int = -1,
    mean_only=(),
) -> Step:
    r"""Stops WUDI's gradient flow at a time, in the strongest directions of the inputs.

    .. math::

      C = V \Lambda V^T, \quad \tau = m_0 + (D - m_0 C) V \frac{f(\Lambda)}{\Lambda} V^T, \quad
      f(\lambda) = 1 - e^{-\lambda t} \text{ in the top share, else } 0

    with C and D of WUDI's loss (:mod:`tadrop_jax.interference`) and :math:`m_0` the sum of the task vectors. The
    defaults are those of the authors' ``swudi.yaml`` (ViT-B/32, 8 tasks); their functions have t = 300, and they advise
    a share of 0.85 for language models. With t towards infinity this is the closed form of :func:`tadrop_jax.wudi` on
    the kept directions. A matrix of task vectors whose squared norms are all below 1e-12 gets the mean in their code;
    here the result does not depend on a common scale.

    Args:
      time: t. The eigenvalues of C sum to T, whatever the scale of the task vectors.
      share: of the input directions that are kept: ``int(in * share + 0.999)`` of them, at least 1.
      coefficient: multiplies the merged vector. Started at the mean or at zero, the result is about T times smaller.
      natural_time: whether ``time`` counts in units of the mean eigenvalue, T / in: the same number then stops
        matrices of all widths, and merges of few and many tasks, at a like point. (1300 with 8 tasks and 768 inputs is
        13.5.)
      start: :math:`m_0`: the ``"sum"`` or the ``"mean"`` of the task vectors, or ``"zero"``.
      input_axis: the axis of the inputs, in PyTorch order: -1 for ``torch.nn.Linear``, 0 for GPT-2's ``Conv1D``.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings; the authors': ``"lm_head"``.
        So do tensors that are no matrices.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])}
      >>> tj.merge_task_vectors(stack, tj.swudi(share=1.0))["w"].round(3).tolist()
      [[1.0, 2.0]]
    """
    time = single("swudi", "time", time, 0)
    natural_time = flag("swudi", "natural_time", natural_time)
    share = fixed("swudi", "share", share, 0, 1)

    def gains(values, shape):
        tasks, _, inputs = shape
        t = time * inputs / tasks if natural_time else time
        kept = jnp.arange(inputs) >= inputs - max(1, int((inputs * share + 0.999) // 1))
        return jnp.where(kept, -jnp.expm1(-values * t), 0)

    return _spectral(
        "swudi", gains, coefficient, start, input_axis, mean_only, time=time, share=share, natural_time=natural_time
    )


def aswudi(
    coefficient=1.0,
    *,
    rank: str = "participation_sqrt",
    start: str = "sum",
    input_axis: int = -1,
    mean_only=(),
) -> Step:
    r"""Solves WUDI's loss exactly in as many directions of the inputs as the spectrum seems to have.

    .. math::

      C = V \Lambda V^T, \quad K = \lceil (\sum \sqrt\lambda)^2 / \sum \lambda \rceil, \quad
      \tau = m_0 + (D - m_0 C) V_K \Lambda_K^{-1} V_K^T

    with C and D of WUDI's loss (:mod:`tadrop_jax.interference`), and :math:`m_0` and the eigenvalues as in
    :func:`tadrop_jax.swudi`. Nothing has to be chosen. The count is a constant for gradients. Directions whose
    eigenvalue is no more than rounding stay at :math:`m_0`; the authors' float32 code divides by them.

    Args:
      coefficient: multiplies the merged vector.
      rank: how K is read off the eigenvalues: ``"participation_sqrt"`` as above (the authors' default),
        ``"participation"`` :math:`(\sum\lambda)^2/\sum\lambda^2`, ``"entropy"`` (the exponential of the entropy),
        ``"stable_rank"`` :math:`\sum\lambda^2/\lambda_1^2`, all rounded up, or ``"gavish_donoho"`` (how many
        :math:`\sqrt\lambda` exceed a multiple of their median; the authors' advice for full fine-tunes of language
        models).
      start: :math:`m_0`: the ``"sum"`` or the ``"mean"`` of the task vectors, or ``"zero"``.
      input_axis: the axis of the inputs, in PyTorch order: -1 for ``torch.nn.Linear``, 0 for GPT-2's ``Conv1D``.
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings; the authors': ``"lm_head"``.
        So do tensors that are no matrices.

    Returns:
      A merge rule.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])}
      >>> tj.merge_task_vectors(stack, tj.aswudi())["w"].round(3).tolist()
      [[1.0, 2.0]]
    """
    choice("aswudi", "rank", rank, RANKS)

    def gains(values, shape):
        count = effective_rank(values, rank, shape[1:])
        return jnp.where(jnp.arange(values.size) >= values.size - count, 1.0, 0.0)

    return _spectral("aswudi", gains, coefficient, start, input_axis, mean_only, rank=rank)


def effective_rank(values, rank: str, shape: tuple[int, int]):
    """How many of the eigenvalues, from the smallest up and all positive, count; from 1 to all of them."""
    values = lax.stop_gradient(values)[::-1]
    roots = jnp.sqrt(values)
    if rank == "participation_sqrt":
        count = jnp.ceil(jnp.sum(roots) ** 2 / jnp.sum(values))
    elif rank == "participation":
        count = jnp.ceil(jnp.sum(values) ** 2 / jnp.sum(values * values))
    elif rank == "entropy":
        p = values / jnp.sum(values)
        count = jnp.ceil(jnp.exp(-jnp.sum(p * jnp.log(p))))
    elif rank == "stable_rank":
        count = jnp.ceil(jnp.sum(values * values) / values[0] ** 2)
    else:
        median = roots[values.size // 2]  # PyTorch's: the lower of the two in the middle
        count = jnp.sum(roots > _median_factor(min(shape) / max(shape)) * median)
    return jnp.clip(count.astype(jnp.int32), 1, values.size)


def _median_factor(beta: float) -> float:
    """The authors' stand-in for the factor of Gavish and Donoho (2014): its median is a rough one."""
    median = math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    b = beta + 1
    return math.sqrt(2 * b + 8 * beta / (b + math.sqrt(beta**2 + 14 * beta + 1))) / median


def _spectral(method, gains, coefficient, start, input_axis, mean_only, **parameters) -> Step:
    """The rule of the gains f: ``(eigenvalues, (T, out, in)) -> (in,)``."""
    choice(method, "start", start, STARTS)

    def merge(stack):
        gram, pull = quadratic(stack)
        values, vectors = linalg.eigh(gram)
        real = values > jnp.maximum(_NOISE * values[-1], 0)
        values = jnp.where(real & (values > _LEAST), values, _LEAST)
        gain = jnp.where(real, gains(values, stack.shape) / values, 0)
        first = {"sum": 1.0, "mean": 1 / stack.shape[0], "zero": 0.0}[start] * over_tasks(jnp.add, stack)
        push = linalg.matmul(pull - linalg.matmul(first, gram), vectors)
        return first + linalg.matmul(push * gain, vectors.T)

    rule = matrix_rule(
        method,
        over_inputs(method, merge, input_axis),
        coefficient=single(method, "coefficient", coefficient),
        mean_only=mean_only,
        start=start,
        input_axis=input_axis,
        **parameters,
    )
    return with_norms(rule)
