r"""KnOTS: merges LoRA adapters in the basis of their joint SVD (arXiv 2410.19735)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tadrop_jax import linalg
from tadrop_jax.lora.pairs import Pair, Shared, merged_in_basis
from tadrop_jax.parameters import choice, single
from tadrop_jax.steps import AnyStep
from tadrop_jax.trees import is_traced


def knots(
    adapters: Sequence[Any],
    rule: AnyStep,
    *,
    scaling: Any = 1.0,
    shared: str = "output",
    cutoff: float = 1e-5,
    sparsifier: AnyStep | None = None,
    factored: bool = False,
    key=None,
):
    r"""Lines the tasks up in one basis for each weight, merges what they have in it, and rebuilds.

    .. math::

      [\Delta_1, \dots, \Delta_T] = U S [V_1, \dots, V_T]^T, \quad
      \Delta = U \, merge(S V_1^T, \dots, S V_T^T), \quad \Delta_t = scaling_t B_t A_t

    The SVD is taken of the factors, :math:`\sum r_t` wide, which is the same and does not need the dense matrices. The
    rule sees the merged coordinates of all weights as one tree, as in the authors' code (gstoica27/KnOTS): their
    "KnOTS-TIES" of ``vitB_r16_knots_ties.py`` is ``tj.ties(0.2, 0.6)``, and "KnOTS-DARE-TIES" the same with
    ``sparsifier=tj.dare(...)`` before. fusion-bench's ``subspace_alignment`` gives the same basis.

    Args:
      adapters: T trees of the same weights, whose leaves are pairs: ``lora_A`` (r, in) and ``lora_B`` (out, r) as PEFT
        names them, in nested trees or in dotted names; or Flax's ``lora_a`` (in, r) and ``lora_b`` (r, out), which give
        (in, out). Ranks may differ between tasks and weights. Other leaves (heads, biases) are refused: leave them out.
      rule: any rule on task vectors with one model as result, such as ``tj.ties(0.2)``.
      scaling: alpha / r of the adapters (alpha / sqrt(r) for rank-stabilised ones), a number or one per task.
      shared: the side that shares a basis: ``"output"`` as above, or ``"input"`` (the task matrices are stacked on top
        of each other; ``concat_across_output=False`` in the authors' code).
      cutoff: directions whose singular value is at most this are left out (the authors'). Inside ``jit`` they stay, as
        zeros, and count as entries for a rule that keeps a share of them.
      sparsifier: a sparsifier before the rule.
      factored: give the merged adapter, in the first one's tree, with scaling 1 and the rank of the basis; not the
        dense changes.
      key: random key, for random steps.

    Returns:
      A nested dictionary of the merged changes (out, in), float32, at the weights' names (those of the factors without
      the ``lora_A``); add it to the base. Or the merged adapter.

    Raises:
      MismatchError: if the adapters do not have the same weights, or shapes do not go together.
      MergeError: for leaves that are no pair, a rule with one model per task, or a random step without a key.
      TypeError: for rules on weights.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> first = {"q": {"lora_A": jnp.array([[1.0, 0.0]]), "lora_B": jnp.array([[2.0], [0.0]])}}
      >>> second = {"q": {"lora_A": jnp.array([[0.0, 1.0]]), "lora_B": jnp.array([[0.0], [1.0]])}}
      >>> tj.knots([first, second], tj.task_arithmetic(1.0))["q"].tolist()
      [[2.0, 0.0], [0.0, 1.0]]
    """
    choice("knots", "shared", shared, ("output", "input"))
    cutoff = single("knots", "cutoff", cutoff, 0)

    def basis(pair: Pair) -> Shared:
        if shared == "output":
            stack, left = _joint_svd(pair.a, pair.b, cutoff)
            return Shared(stack, left=left)
        stack, left = _joint_svd(tuple(b.T for b in pair.b), tuple(a.T for a in pair.a), cutoff)
        return Shared(jnp.swapaxes(stack, 1, 2), right=left.T)

    return merged_in_basis("knots", adapters, rule, basis, scaling, sparsifier, factored, key)


def _joint_svd(a, b, cutoff: float):
    """``S V_t^T`` of all tasks ``(T, n, in)``, and U ``(out, n)``, of the matrices ``b[t] @ a[t]`` side by side."""
    u, s, vt = linalg.svd(jnp.concatenate(b, axis=1))
    weights = jnp.split(s[:, None] * vt, np.cumsum([x.shape[1] for x in b])[:-1], axis=1)
    inputs = [linalg.svd(x) for x in a]
    inner = jnp.concatenate([linalg.matmul(w, ui * si) for w, (ui, si, _) in zip(weights, inputs, strict=True)], axis=1)
    turn, strength, rest = linalg.svd(inner)
    kept = strength > cutoff
    n = strength.size if is_traced(strength) else int(jnp.sum(kept))
    rest = jnp.where(kept[:, None], strength[:, None] * rest, 0)[:n]
    blocks = jnp.split(rest, np.cumsum([vi.shape[0] for _, _, vi in inputs])[:-1], axis=1)
    stack = jnp.stack([linalg.matmul(x, vi) for x, (_, _, vi) in zip(blocks, inputs, strict=True)])
    return stack, linalg.matmul(u, turn[:, :n])
