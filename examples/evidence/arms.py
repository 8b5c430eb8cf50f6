"""What is compared: sparsifiers of the library, controls of TADrop, and other ways to share a budget of entries.

A control takes TADrop's budget, the share of all entries that it prunes of each task, and spreads it over the tensors
in another way; pruning and restoring the norm are the same. So a difference between two of them is one of the spread.
Entries that are zero before (rows of words that a task does not have, parts that it does not use) are nothing to prune:
shares and budgets are of the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import tadrop_jax as tj

Stack = Any  # the task vectors: a tree of arrays (T, ...)
# Of the nonzero entries, a sparsity for each tensor and task: (T,) each, in the order of jax.tree.leaves.
Shares = list[np.ndarray]
LARGEST = 0.98  # no tensor is pruned further than that


def tadrop_shares(stack: Stack, q_low: float, q_high: float, s_max: float = 0.9) -> Shares:
    """TADrop's sparsities: the quantile ratios, clipped."""
    ratios = jax.tree.leaves(tj.quantile_ratios(stack, q_low=q_low, q_high=q_high))
    found = []
    for leaf, ratio, there in zip(_leaves(stack), ratios, _nonzero(stack), strict=True):
        size = leaf[0].size
        pruned = np.floor(np.minimum(np.asarray(ratio, np.float64), s_max) * size) - (size - there)
        found.append(np.maximum(pruned, 0) / np.maximum(there, 1))
    return found


def nonzero_shares(stack: Stack, q_low: float, q_high: float, s_max: float = 0.9) -> Shares:
    """As TADrop's sparsities, from quantiles of what is not zero: rows of words that a task lacks are no tail."""

    def ratio(row):
        found = np.abs(row[row != 0])
        low, high = np.quantile(found, (q_low, q_high), method="lower") if found.size else (0, 1)
        return min(low / high, s_max)

    return [np.array([ratio(row) for row in leaf]) for leaf in _leaves(stack)]


def budget(stack: Stack, shares: Shares) -> np.ndarray:
    """The share of all nonzero entries that is pruned, one number a task."""
    there = _nonzero(stack)
    return np.sum([n * share for n, share in zip(there, shares, strict=True)], 0) / np.maximum(np.sum(there, 0), 1)


def uniform(stack: Stack, shares: Shares) -> Shares:
    """The mean for all tensors: the same budget without any adaptivity."""
    return [budget(stack, shares) for _ in shares]


def reversed_(stack: Stack, shares: Shares) -> Shares:
    """Mirrored at the mean: heavy tails are pruned the most."""
    return at_budget(stack, [-share for share in shares], budget(stack, shares))


def shuffled(stack: Stack, shares: Shares, seed: int = 0) -> Shares:
    """TADrop's own sparsities, each at another tensor with as many axes."""
    axes = np.array([leaf.ndim for leaf in jax.tree.leaves(stack)])
    mixed = np.array(shares)
    for there, column in zip(np.array(_nonzero(stack)).T, mixed.T, strict=True):
        rng = np.random.default_rng(seed)  # the same order for all tasks that have the same tensors
        for number in np.unique(axes):
            at = np.flatnonzero((axes == number) & (there > 0))
            column[at] = column[rng.permutation(at)]
    return at_budget(stack, list(mixed), budget(stack, shares))


def amplified(stack: Stack, shares: Shares, factor: float = 4.0) -> Shares:
    """TADrop's differences from the mean, times a factor."""
    return at_budget(stack, [factor * share for share in shares], budget(stack, shares))


def equal_energy(stack: Stack, shares: Shares) -> Shares:
    """All tensors of a task keep the same share of their squared norm, in as few entries as that takes."""
    return _by_curve(stack, shares, lambda ordered: np.cumsum(ordered**2) / max(np.sum(ordered**2), 1e-30))


def one_threshold(stack: Stack, shares: Shares) -> Shares:
    """One threshold for all tensors of a task: the least loss of squared norm at the budget (equal marginal loss)."""
    return _by_curve(stack, shares, lambda ordered: ordered)


def relative_threshold(stack: Stack, shares: Shares) -> Shares:
    """One threshold in units of each tensor's root mean square: tensors' scales are taken out of the last."""
    return _by_curve(stack, shares, lambda ordered: ordered / max(np.sqrt(np.mean(ordered**2)), 1e-30))


def by_conflict(stack: Stack, shares: Shares, factor: float = 2.0) -> Shares:
    """Tensors are pruned the more, the more of a task's magnitude lies where it has the sign that loses the vote."""

    def conflict(leaf):
        flat = leaf.reshape(len(leaf), -1)
        loses = np.sign(flat) * np.sign(flat.sum(0)) < 0
        return np.sum(np.abs(flat) * loses, 1) / np.maximum(np.sum(np.abs(flat), 1), 1e-30)

    return at_budget(stack, [factor * conflict(leaf) for leaf in _leaves(stack)], budget(stack, shares))


def by_norm(stack: Stack, shares: Shares, factor: float = 0.5) -> Shares:
    """A tensor is pruned the more, the smaller its norm is in this task, compared with the other tasks'."""

    def weakness(leaf):
        norms = np.linalg.norm(leaf.reshape(len(leaf), -1), axis=1)
        return -factor * norms / max(norms.mean(), 1e-30)

    return at_budget(stack, [weakness(leaf) for leaf in _leaves(stack)], budget(stack, shares))


CONTROLS: dict[str, Callable[[Stack, Shares], Shares]] = {
    "uniform": uniform,
    "shuffled": shuffled,
    "reversed": reversed_,
}
CANDIDATES: dict[str, Callable[[Stack, Shares], Shares]] = {
    "amplified": amplified,
    "equal energy": equal_energy,
    "one threshold": one_threshold,
    "relative threshold": relative_threshold,
    "by conflict": by_conflict,
    "by norm": by_norm,
}


def dominance_shares(stack: Stack, shares: Shares) -> tuple[float, ...]:
    """For `tj.dominance`: the share for each task that prunes as many of its entries as TADrop does.

    Dominance is no spread of a budget over tensors: entries compete with the same entry of the other tasks.
    """
    sizes = [np.abs(leaf) for leaf in _leaves(stack)]
    standing = [(size / np.maximum(size.max(0), 1e-30)).reshape(len(size), -1) for size in sizes]
    flat = np.concatenate(standing, 1)
    there = np.sum(_nonzero(stack), 0)
    counts = np.floor(budget(stack, shares) * there).astype(int) + flat.shape[1] - there
    return tuple(float(np.partition(row, k)[k]) for row, k in zip(flat, counts, strict=True))


def prune(stack: Stack, shares: Shares) -> Stack:
    """Zeros the smallest entries of each tensor and task, then restores its 2-norm, as TADrop does.

    Args:
        stack: the task vectors.
        shares: how much of each tensor's nonzero entries is pruned; entries that equal the smallest kept stay.

    Returns:
        As `stack`.
    """
    leaves = [_prune(leaf, share) for leaf, share in zip(_leaves(stack), shares, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(stack), leaves)


def pruned_as(stack: Stack, other: Stack) -> Stack:
    """Every tensor of a task pruned to one sparsity, so that as much of the task goes as another arm prunes of it."""
    counts = [np.sum(_nonzero(tree), 0) for tree in (stack, other)]
    return prune(stack, [1 - counts[1] / np.maximum(counts[0], 1)] * len(_leaves(stack)))


def scaled_only(stack: Stack, pruned: Stack) -> Stack:
    """Nothing is pruned, but each tensor grows as it would have: the scaling alone."""

    def grow(leaf, after):
        return (leaf * _growth(leaf, np.where(after != 0, leaf, 0))).astype(np.float32)

    leaves = [grow(leaf, after) for leaf, after in zip(_leaves(stack), _leaves(pruned), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(stack), leaves)


def at_budget(stack: Stack, scores: Shares, wanted: np.ndarray) -> Shares:
    """Sparsities that differ as the scores do, moved so far up or down that the whole tree is at its budget.

    Args:
        stack: the task vectors.
        scores: for each tensor `(T,)`.
        wanted: the budget of each task `(T,)`.
    """

    def shares(offset):
        return [np.clip(score + offset, 0, LARGEST) for score in scores]

    span = 1 + max(float(np.abs(score).max()) for score in scores)
    offset = _solve(lambda offset: budget(stack, shares(offset)), -span, span, wanted)
    return shares(offset)


def _by_curve(stack: Stack, shares: Shares, rising: Callable[[np.ndarray], np.ndarray]) -> Shares:
    """Prunes each tensor up to where a function of its ordered magnitudes reaches a level, one level a task."""

    def curve(row):
        ordered = np.sort(np.abs(row))
        return rising(ordered)[np.searchsorted(ordered, 0, side="right") :]

    curves = [[curve(row) for row in leaf.reshape(len(leaf), -1)] for leaf in _leaves(stack)]

    def shares_at(levels):
        def share(row, level):
            return np.searchsorted(row, level) / max(len(row), 1)

        rows = [[share(row, level) for row, level in zip(rows, levels, strict=True)] for rows in curves]
        return [np.minimum(row, LARGEST) for row in np.array(rows)]

    tasks = range(len(curves[0]))
    high = np.array([max(float(rows[t][-1]) for rows in curves if len(rows[t])) for t in tasks])
    levels = _solve(lambda levels: budget(stack, shares_at(levels)), 0 * high, high, budget(stack, shares))
    return shares_at(levels)


def _solve(rising: Callable[[np.ndarray], np.ndarray], low, high, wanted: np.ndarray) -> np.ndarray:
    """Bisection, for all tasks at once."""
    low, high = np.broadcast_to(low, wanted.shape).astype(float), np.broadcast_to(high, wanted.shape).astype(float)
    for _ in range(50):
        middle = (low + high) / 2
        below = rising(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _prune(leaf: np.ndarray, share: np.ndarray) -> np.ndarray:
    sizes = np.abs(leaf.reshape(len(leaf), -1))
    zeros = np.sum(sizes == 0, axis=1)
    # What is all zero has no smallest kept entry: any will do.
    ranks = np.minimum(zeros + np.rint(share * (sizes.shape[1] - zeros)).astype(int), sizes.shape[1] - 1)
    levels = np.array([np.partition(row, rank)[rank] for row, rank in zip(sizes, ranks, strict=True)])
    kept = np.where(np.abs(leaf) >= across(levels, leaf), leaf, 0)
    return (kept * _growth(leaf, kept)).astype(np.float32)


def _growth(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What gives each task's entries (T, ...) the 2-norm from before; 1 where nothing is left."""
    norms = [np.linalg.norm(leaf.reshape(len(leaf), -1), axis=1) for leaf in (before, after)]
    return across(np.where(norms[1] > 0, norms[0] / np.maximum(norms[1], 1e-30), 1), before)


def across(values: Any, leaf: Any) -> Any:
    """One value a task (T,), to go with a leaf (T, ...)."""
    return values.reshape(-1, *[1] * (leaf.ndim - 1))


def _leaves(stack: Stack) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(stack)]


def _nonzero(stack: Stack) -> list[np.ndarray]:
    """How many entries of each tensor and task are not zero: (T,) each."""
    return [np.count_nonzero(leaf.reshape(len(leaf), -1), axis=1) for leaf in _leaves(stack)]
