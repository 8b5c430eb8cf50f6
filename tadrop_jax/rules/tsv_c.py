r"""TSV-Compress: the leading singular triples of each task's matrices (arXiv 2412.00081)."""

from tadrop_jax import linalg
from tadrop_jax.kinds import Kind, Part
from tadrop_jax.parameters import fixed
from tadrop_jax.steps import Step, patterns, spec


def tsv_c(*, share=None, per_task=()) -> Step:
    r"""Keeps of each task's matrices the leading singular triples, so that all T together are about one model.

    .. math::

      \tau_t = U_t S_t V_t^T, \quad r = int(rank \cdot share), \quad
      \theta_t = \theta_0 + U_t[:, :r] S_t[:r] V_t[:, :r]^T

    with rank the smaller side. What is no matrix (biases, norms, kernels of more axes) is kept whole, as in the
    authors' code (``AntoAndGar/task_singular_vectors``, ``TSVC_utils.py``). There a matrix whose r comes to 0 is
    dropped; here it keeps one triple.

    Args:
      share: share of the rank to keep, in [0, 1]; None means 1/T.
      per_task: regular expression(s) of tensors that stay each task's own, heads for instance.

    Returns:
      A per-task rule: :func:`tadrop_jax.merge` gives a :class:`~tadrop_jax.bundles.Bundle`.

    Raises:
      ParameterError: for a share outside [0, 1] or a broken pattern.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.stack([jnp.diag(jnp.array([3.0, 1.0])), jnp.diag(jnp.array([0.0, 2.0]))])}
      >>> tj.merge_task_vectors(stack, tj.tsv_c()).task_vector(0)["w"].tolist()
      [[3.0, 0.0], [0.0, 0.0]]
    """
    if share is not None:
        share = fixed("tsv_c", "share", share, 0, 1)

    def apply(x, carry):
        if x.stack.ndim != 3:
            return {"vectors": x.stack}
        u, s, vt = linalg.svd(x.stack)
        r = _rank(x.stack.shape[1:], len(x.tasks), share)
        return {"u": u[..., :r], "s": s[..., :r], "vt": vt[..., :r, :]}

    return Step(
        apply=apply,
        piece="tensor",
        output="bundle",
        kind=_kind(share),
        note=lambda shape, tasks: (
            {"treated": "matrix", "rank": _rank(shape, tasks, share), "of_rank": min(shape)}
            if len(shape) == 2
            else {"treated": "kept whole"}
        ),
        per_task=patterns(per_task),
        spec=spec("tsv_c", share=share),
    )


def _rank(shape, tasks: int, share) -> int:
    """``int(rank * share)`` in float64, as the authors compute it, but at least 1."""
    return min(max(int(min(shape) * (1 / tasks if share is None else share)), 1), *shape)


def _kind(share) -> Kind:
    def parts(shape, tasks):
        if len(shape) != 2:
            return {"vectors": Part((tasks, *shape), "tasks and entries")}
        r = _rank(shape, tasks, share)
        return {
            "u": Part((tasks, shape[0], r), "tasks"),
            "s": Part((tasks, r), "tasks", "float32"),
            "vt": Part((tasks, r, shape[1]), "tasks"),
        }

    return Kind("tsv_c", parts, _rebuild, elementwise=False)


def _rebuild(xp, parts, scalars):
    if "vectors" in parts:
        return parts["vectors"]
    return linalg.matmul(parts["u"] * parts["s"], parts["vt"])


KIND = _kind(None)
