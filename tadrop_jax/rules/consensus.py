r"""Consensus merging: the sum of the task vectors where several tasks need it (arXiv 2405.07813)."""

import jax.numpy as jnp

from tadrop_jax.parameters import lengths, number, single, whole
from tadrop_jax.rules.tall import after, vector_and_masks
from tadrop_jax.steps import AnyStep, Chain, Step, over_tasks, spec


def consensus(agree: int = 2, tall_lambda=0.4, coefficient=1.0, *, multi_task: AnyStep | None = None) -> Chain:
    r"""Keeps of the sum of the task vectors the entries that at least ``agree`` TALL masks hold.

    .. math::

      \tau = \sum_t \tau_t, \quad m_t = |\tau_t| > \lambda_t |\tau - \tau_t|, \quad
      \theta = \theta_0 + coefficient \cdot \tau \cdot [\textstyle\sum_t m_t \ge agree]

    Entries that no task needs are catastrophic, those that one needs selfish (``nik-dim/tall_masks``,
    ``construct_consensus_mask`` with ``prun_thre_k = agree``; fusion-bench has the same function). See
    :func:`tadrop_jax.tall` for the masks.

    Args:
      agree: how many masks have to hold an entry: 0 keeps all (Task Arithmetic), 1 removes what no task needs, 2 also
        what only one does. More than there are tasks would leave nothing: that is refused.
      tall_lambda: :math:`\lambda_t` of the masks, at least 0; a number or one per task.
      coefficient: multiplies the merged vector.
      multi_task: a merge rule whose vector takes the place of the sum, as for :func:`tadrop_jax.tall`.

    Returns:
      A merge rule for at least ``agree`` models.

    Raises:
      ParameterError: for values out of range.
      MergeError: if ``multi_task`` is no rule that gives one model.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> stack = {"w": jnp.array([[1.0, -2.0, 0.0], [1.0, 0.5, 0.0]])}
      >>> tj.merge_task_vectors(stack, tj.consensus())["w"].tolist()
      [2.0, 0.0, 0.0]
    """
    agree = whole("consensus", "agree", agree, 0)
    tall_lambda = number("consensus", "tall_lambda", tall_lambda, 0)
    coefficient = single("consensus", "coefficient", coefficient)

    def apply(x, carry):
        vector, masks = vector_and_masks(x, tall_lambda, multi_task is not None)
        votes = over_tasks(jnp.add, masks.astype(jnp.int32))
        return x.numbers["coefficient"] * jnp.where(votes >= agree, vector, 0)

    step = Step(
        apply=apply,
        output="vector",
        lengths=lengths(tall_lambda=tall_lambda),
        models=("consensus", max(agree, 1), None),
        spec=spec(
            "consensus",
            agree=agree,
            tall_lambda=tall_lambda,
            of_sum=multi_task is None,
        ),
        numbers={"coefficient": coefficient},
    )
    return after(multi_task, step, "consensus")
