r"""Core Space: merges LoRA adapters as small cores between shared bases (arXiv 2509.17786)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.lora.pairs import Pair, Shared, merged_in_basis
from tadrop_jax.steps import AnyStep


def core_space(
    adapters: Sequence[Any],
    rule: AnyStep,
    *,
    scaling: Any = 1.0,
    sparsifier: AnyStep | None = None,
    factored: bool = False,
    key=None,
):
    r"""Merges the cores of the adapters, :math:`\sum r_t` wide and high, and rebuilds; nothing is lost on the way.

    .. math::

      [B_1, \dots, B_T] = U \Sigma W^T, \quad [A_1; \dots; A_T] = W' \Sigma' V^T, \quad
      M_t = scaling_t U^T B_t A_t V, \quad \Delta = U \, merge(M_1, \dots, M_T) \, V^T

    A linear rule gives what it gives on the dense matrices. The authors (apanariello4/core-space-merging) merge weight
    by weight: give ``granularity="tensor"`` to rules that have it. Their Core Space with Iso-C is ``tj.iso_c()``, with
    TSV ``tj.tsv_m()``: the rule sees the cores as matrices.

    Args:
      adapters: T trees of pairs of factors, as in :func:`tadrop_jax.knots`; ranks may differ.
      rule: any rule on task vectors with one model as result.
      scaling: alpha / r of the adapters, a number or one per task.
      sparsifier: a sparsifier before the rule.
      factored: give the merged adapter, in the first one's tree, with scaling 1 and the rank of the cores; not the
        dense changes.
      key: random key, for random steps.

    Returns:
      A nested dictionary of the merged changes (out, in), float32, at the weights' names; add it to the base. Or the
      merged adapter.

    Raises:
      MismatchError: if the adapters do not have the same weights, or shapes do not go together.
      MergeError: for leaves that are no pair, a rule with one model per task, or a random step without a key.
      TypeError: for rules on weights.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> first = {"q": {"lora_A": jnp.array([[1.0, 0.0]]), "lora_B": jnp.array([[2.0], [0.0]])}}
      >>> second = {"q": {"lora_A": jnp.array([[0.0, 1.0]]), "lora_B": jnp.array([[0.0], [1.0]])}}
      >>> tj.core_space([first, second], tj.average())["q"].tolist()
      [[1.0, 0.0], [0.0, 0.5]]
    """

    def basis(pair: Pair) -> Shared:
        left = linalg.svd(jnp.concatenate(pair.b, axis=1))[0]
        right = linalg.svd(jnp.concatenate(pair.a, axis=0))[2]
        cores = [
            linalg.matmul(linalg.matmul(left.T, b), linalg.matmul(a, right.T))
            for a, b in zip(pair.a, pair.b, strict=True)
        ]
        return Shared(jnp.stack(cores), left, right)

    return merged_in_basis("core_space", adapters, rule, basis, scaling, sparsifier, factored, key)
