"""n:m masks of several tasks that overlap only where they must: CABS at high densities (arXiv 2503.01874)."""

import jax.numpy as jnp

from tadrop_jax.parameters import choice, whole
from tadrop_jax.sparsifiers.conflict_aware import turns_of, whole_order
from tadrop_jax.sparsifiers.n_m import group_counts, largest_in_groups
from tadrop_jax.steps import PerTasks, Step, spec

OVERLAPS = ("exact", "authors")


def overlapping(n: int, m: int, overlap: str = "exact", order=None, tail: str = "ceil") -> PerTasks:
    """n:m masks, one task after another, on free entries first and then on entries that earlier tasks have taken.

    A group of m has room for ``m / n`` disjoint masks. Beyond that, masks have to overlap, or later tasks go short.
    :func:`tadrop_jax.cabs` runs it where its ``overlap`` is given.

    Args:
      n: kept in each group of m, from 0 to m.
      m: length of a group.
      overlap: ``"exact"``: each task takes its largest free entries up to n, and where fewer are free, its largest
        taken ones up to n (with two tasks and n >= m/2: 2n - m of them); ``"authors"``
        (``mistral_leaderboard_experiments/prune_task_vector_7b.py``): for n below ``m // 2`` the free entries alone,
        else all free entries and the ``m // 2`` largest taken ones, which together are n at n = 3m/4 only.
      order: the order of the tasks, a permutation of 0 to T - 1; None means as given.
      tail: of the last group, see :func:`tadrop_jax.n_m`.

    Returns:
      A sparsifier for pieces of whole groups.

    Raises:
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> from tadrop_jax.sparsifiers.overlapping import overlapping
      >>> stack = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]])}
      >>> tj.sparsify(stack, overlapping(3, 4))["w"].tolist()
      [[4.0, 3.0, 2.0, 0.0], [8.0, 7.0, 0.0, 5.0]]
    """
    m = whole("cabs", "m", m, 1)
    n = whole("cabs", "n", n, 0, m)
    choice("cabs", "overlap", overlap, OVERLAPS)
    choice("cabs", "tail", tail, ("ceil", "drop"))
    order = whole_order("cabs", order)

    def build(tasks: int) -> tuple[Step, ...]:
        turns = turns_of("cabs", order, tasks)
        return tuple(_turn(task, turns[:i], n, m, overlap, tail) for i, task in enumerate(turns))

    return PerTasks(build, ("overlapping", n, m, overlap, order, tail))


def _turn(task: int, earlier: tuple[int, ...], n: int, m: int, overlap: str, tail: str) -> Step:
    """The step for one task, after the earlier ones."""

    def apply(x, carry):
        own = x._replace(stack=x.stack[task][None])
        used = jnp.zeros_like(own.stack, bool)
        for other in earlier:
            used |= x.stack[other] != 0
        groups = own.groups(m)
        taken = x._replace(stack=used.astype(jnp.float32)).groups(m) != 0
        count = group_counts(groups.shape[1], x.valid, n, m, tail)[None, :, None]
        length = group_counts(groups.shape[1], x.valid, m, m, tail)[None, :, None]
        real = jnp.arange(m) < length
        first, more = count, 0 * count
        if overlap == "authors" and earlier and n >= m // 2:
            first, more = length, length // 2
        kept = largest_in_groups(groups, first, real & ~taken)
        if overlap == "exact":
            more = count - jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32)
        kept |= largest_in_groups(groups, more, taken)
        return x.stack.at[task].set(own.ungroup(jnp.where(kept, groups, 0))[0])

    return Step(
        apply=apply,
        piece="group",
        group=m,
        across_tasks=True,
        spec=spec("overlapping", task=task, earlier=earlier, n=n, m=m, overlap=overlap, tail=tail),
    )
