r"""WUDI-Merging: a merged matrix that interferes least with each task's inputs (arXiv 2503.08099)."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tadrop_jax import linalg
from tadrop_jax.interference import directions, over_inputs, quadratic, with_norms
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.parameters import choice, fixed, single, whole
from tadrop_jax.steps import Step, over_tasks


def wudi(
    coefficient=1.0,
    *,
    solver: str = "adam",
    learning_rate=1e-5,
    steps: int = 300,
    cutoff: float = 2e-3,
    input_axis: int = -1,
    mean_only=(),
) -> Step:
    r"""Minimises the interference of the merged matrix with the inputs of each task.

    .. math::

      \tau = \arg\min_m \sum_t \lVert (m - \tau_t) \tau_t^T \rVert_F^2 / \lVert \tau_t \rVert_F^2,
      \quad \theta = \theta_0 + coefficient \cdot \tau

    The authors stop Adam early, and that is part of the method: they report that the exact minimiser scores two points
    less (ViT-B/32, 8 tasks). Tensors that are no matrices get the mean of the task vectors, as in the port
    ``yongxianwei_merging`` of MLLMerging and in fusion-bench (``wudi_merging``), which the defaults reproduce; the
    authors' vision code (``nathanielyvo/WUDI-Merging``, ``get_redundant_task_vector``) leaves them, and all but the
    attention and MLP weights, at the base: ``tadrop_jax.merge(..., include=...)``. Early-stopped Adam depends on the
    size of the task vectors, and on how different they are in size: the report has their norms.

    Args:
      coefficient: multiplies the merged vector.
      solver: ``"adam"`` from the sum of the task vectors (the authors' code), or ``"closed"``: the exact minimiser of
        least norm, by a pseudo-inverse.
      learning_rate: of Adam.
      steps: of Adam; the authors take 300 (vision) to 400.
      cutoff: of the pseudo-inverse: singular values of the stacked task vectors, each at norm 1, up to this share of
        the largest count as zero; at least 1e-3, below which float32 does not tell them from rounding.
      input_axis: the axis of the inputs, in PyTorch order: -1 for ``torch.nn.Linear`` (out, in), 0 for GPT-2's
        ``Conv1D`` (in, out).
      mean_only: regular expression(s) of matrices that get the mean, such as embeddings, ``text_projection``,
        ``lm_head``.

    Returns:
      A merge rule for two models or more.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])}  # two tasks with inputs of their own
      >>> tj.merge_task_vectors(stack, tj.wudi(solver="closed"))["w"].round(3).tolist()
      [[1.0, 2.0]]
    """
    choice("wudi", "solver", solver, ("adam", "closed"))
    learning_rate = single("wudi", "learning_rate", learning_rate, 0)
    steps = whole("wudi", "steps", steps, 0)
    cutoff = fixed("wudi", "cutoff", cutoff, 1e-3, 1)

    def merge(stack):
        return minimiser(stack, cutoff) if solver == "closed" else descended(stack, learning_rate, steps)

    rule = matrix_rule(
        "wudi",
        over_inputs("wudi", merge, input_axis),
        coefficient=single("wudi", "coefficient", coefficient),
        mean_only=mean_only,
        solver=solver,
        learning_rate=learning_rate,
        steps=steps,
        cutoff=cutoff,
        input_axis=input_axis,
    )
    return with_norms(rule, models=("wudi", 2, None))


def descended(stack, learning_rate, steps: int):
    """Adam on the loss, from the sum: ``(T, out, in)`` to ``(out, in)``."""
    gram, pull = quadratic(stack)
    start = over_tasks(jnp.add, stack)
    # The epsilon under the root is far below Adam's own; it makes the gradient of an entry that never moves finite.
    adam = optax.adam(learning_rate, eps_root=1e-30)

    def step(carry, _):
        merged, state = carry
        updates, state = adam.update(2 * (linalg.matmul(merged, gram) - pull), state)
        return (merged + updates, state), None

    return lax.scan(step, (start, adam.init(start)), length=steps)[0][0]


def minimiser(stack, cutoff: float):
    """The exact minimiser of least norm: ``(T, out, in)`` to ``(out, in)``.

    With the unit task vectors stacked to A, C is :math:`A^T A` and D is B A, so that :math:`D C^+ = B A^{+T}`, without
    the squared condition number of C.
    """
    unit = directions(stack)
    shares = jnp.concatenate([linalg.matmul(t, u.T) for t, u in zip(stack, unit, strict=True)], axis=1)
    return _fitted(shares, jnp.reshape(unit, (-1, unit.shape[-1])), cutoff)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _fitted(b, a, cutoff):
    """``b`` times the transposed pseudo-inverse of ``a``."""
    left, gram, right = _inverted(a, cutoff)
    return linalg.matmul(jnp.linalg.solve(gram, linalg.matmul(b, left).T).T, right)


@_fitted.defjvp
def _fitted_jvp(cutoff, primals, tangents):
    (b, a), (db, da) = primals, tangents
    left, gram, right = _inverted(a, cutoff)
    x = linalg.matmul(left, jnp.linalg.solve(gram, right))  # the transposed pseudo-inverse
    y = linalg.matmul(b, x)
    # The derivative of a pseudo-inverse of constant rank: it needs no gaps between singular values.
    turned = linalg.matmul(linalg.matmul(y, x.T), da)
    tangent = linalg.matmul(db, x) - linalg.matmul(y, da.T, x)
    tangent += linalg.matmul(b - linalg.matmul(y, a.T), da, x.T, x)
    return y, tangent + turned - linalg.matmul(turned, x.T, a)


def _inverted(a, cutoff):
    """Factors L, G, R of the transposed pseudo-inverse L G^-1 R: the small Gram matrix of ``a``, diagonalised twice.

    An SVD of the tall stack costs ten times as much. The first eigenvectors are exact to rounding of the largest
    eigenvalue; what that leaves between the weaker directions, once they are at norm 1, is G, close to the identity.
    """
    if a.shape[0] < a.shape[1]:
        left, gram, right = _inverted(a.T, cutoff)
        return right.T, gram, left.T
    vectors = linalg.eigh(linalg.matmul(a.T, a))[1]
    turned = linalg.matmul(a, vectors)
    norms = jnp.sqrt(jnp.sum(turned * turned, axis=0))
    kept = (norms > cutoff * jnp.max(norms)) & (norms > 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, norms, 1), 0)
    unit = turned * inverse
    gram = linalg.matmul(unit.T, unit) + jnp.diag(jnp.where(kept, 0.0, 1.0))
    return unit, gram, (vectors * inverse).T
