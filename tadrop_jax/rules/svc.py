"""SVC, Singular Value Calibration (arXiv 2602.05536): a second look at what any rule merged."""

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.errors import ParameterError
from tadrop_jax.parameters import choice, single
from tadrop_jax.rules.on_top import parts_of, put_on_top
from tadrop_jax.steps import AnyStep, Chain, Step, chain, patterns, spec
from tadrop_jax.trees import selected


def svc(rule: AnyStep, alpha=None, *, calibrate_on: str = "dense", exclude=()) -> Chain:
    r"""Scales down the singular directions that the rule counted more than once.

    For each singular direction :math:`u_r` of the merged matrix :math:`\tau = U S V^T`, what the merge does along it is
    set beside what each task does:

    .. math::

      s_{rt} = \frac{\langle u_r^T \tau, u_r^T \tau_t \rangle}{\max(\|u_r^T \tau_t\|^2, 10^{-12})}, \quad
      S'_r = S_r \Big/ \frac1T \sum_t \max(s_{rt}, \alpha)

    Tensors that are no matrices stay as the rule left them. Where no coefficient falls below alpha, a coefficient of
    the rule cancels.

    As steps: the rule's last step puts its merged vector on top of the stack that it saw, and a last step of SVC's own
    takes both apart. The stages of the rule, its trimming and its statistics of the whole tree, stay what they are; the
    task vectors as they came are part of every piece (:attr:`tadrop_jax.steps.Piece.given`).

    ``lyymuwu/SVC``: ``exclude=["embedding", "text_projection"]``, alpha as on their command line (there 1 if nothing is
    said; the paper takes 1/T, and 1 after TSV-M). fusion-bench (``SingularValueCalibration``): nothing excluded.

    Args:
      rule: any rule that gives one model.
      alpha: the least coefficient, above 0; small values leave more of the spectrum to the data, 1 only scales down.
        None means 1/T.
      calibrate_on: the task vectors that are the measure: ``"dense"`` as they came, also where a sparsifier stands
        before this rule, or ``"sparse"`` as sparsifiers and the rule's own trimming left them.
      exclude: regular expression(s) of matrices that stay as the rule left them, such as embeddings.

    Returns:
      A merge rule.

    Raises:
      MergeError: if what is given is no rule, or one that gives a model per task.
      ParameterError: for alpha out of range, or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]]])}
      >>> tj.merge_task_vectors(stack, tj.svc(tj.task_arithmetic(1.0)))["w"].tolist()
      [[3.0, 0.0], [0.0, 1.0]]
    """
    *before, last = parts_of(rule, "svc")
    choice("svc", "calibrate_on", calibrate_on, ("dense", "sparse"))
    if alpha is not None:
        alpha = single("svc", "alpha", alpha, 0)
        if isinstance(alpha, (int, float)) and alpha == 0:
            raise ParameterError(f"svc: alpha must be one number above 0, got {alpha}")
    return chain(*before, put_on_top(last), _calibrate(last, alpha, calibrate_on == "dense", patterns(exclude)))


def _calibrate(rule: Step, alpha, dense: bool, exclude: tuple[str, ...]) -> Step:
    def put_out(x, merged):
        return x.base + merged if rule.output == "parameters" else merged

    def apply(x, carry):
        stack = x.in_torch_order()
        merged, tasks = stack[0], stack[1:]
        if dense:
            tasks = x._replace(stack=x.given).in_torch_order()
        return put_out(x, x.from_torch_order(calibrated(merged, tasks, alpha)))

    identity = spec("svc", alpha=alpha, dense=dense, of=rule.output)
    as_it_is = Step(
        lambda x, carry: put_out(x, x.stack[0]),
        output=rule.output,
        include=rule.include,
        exclude=rule.exclude,
        note=lambda shape, tasks: {"calibrated": "no"},
        spec=("svc leaves", rule.output),
    )

    def instead(path: str, shape: tuple[int, ...], tasks: int) -> Step | None:
        is_matrix = len(shape) == 2 and not (exclude and selected(path, exclude))
        return None if is_matrix else as_it_is

    return Step(
        apply,
        piece="tensor",
        output=rule.output,
        include=rule.include,
        exclude=rule.exclude,
        instead=instead,
        mentions=exclude,
        note=lambda shape, tasks: {"calibrated": "yes"},
        spec=None if identity is None else (*identity, exclude),
    )


def calibrated(merged, stack, alpha=None):
    """The formula.

    Args:
      merged: ``(out, in)``.
      stack: ``(T, out, in)``.
      alpha: number, or None for 1/T.
    """
    u, s, vt = linalg.svd(merged)
    of_tasks = linalg.matmul(u.T, stack)
    sizes = jnp.maximum(jnp.sum(of_tasks * of_tasks, axis=-1), 1e-12)
    coefficients = jnp.sum((s[:, None] * vt) * of_tasks, axis=-1) / sizes
    least = 1 / stack.shape[0] if alpha is None else alpha
    return linalg.matmul(u * (s / jnp.mean(jnp.maximum(coefficients, least), axis=0)), vt)
