"""Plain NumPy transcriptions of the published formulas, to test the library against.

Written from the formulas alone, with loops and no cleverness, and never from the library's own code. A tree
is a `dict` from a tensor's name to its stack of task vectors, of shape `(T, *shape)`. Each function takes the
whole tree, since some statistics are taken over it, and returns a tree of stacks (sparsifiers) or of tensors
(rules). Counts and ranks use Python integers; values are float32, sums float64.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Tree = dict[str, np.ndarray]
Sparsifier = Callable[[Tree], Tree]


def number_of_tasks(stacks: Tree) -> int:
    return next(iter(stacks.values())).shape[0]


def per_task(value, tasks: int) -> list:
    """One value per task, from a number or a sequence."""
    return [value] * tasks if np.ndim(value) == 0 else list(value)


def each_tensor(stacks: Tree, function: Callable[[np.ndarray, int], np.ndarray]) -> Tree:
    """Apply `function(flat tensor, task)` to every tensor of every task."""
    out = {}
    for name, stack in stacks.items():
        rows = [function(row.reshape(-1).astype(np.float32), t) for t, row in enumerate(stack)]
        out[name] = np.stack([row.reshape(stack.shape[1:]) for row in rows]).astype(np.float32)
    return out


# Order statistics


def kth_largest(a: np.ndarray, k: int) -> np.float32:
    """The k-th largest entry, k from 1."""
    return np.sort(a)[::-1][k - 1]


def quantile_lower(a: np.ndarray, q: float) -> np.float32:
    """NumPy's method "lower": the order statistic of (0-based) rank floor(q * (n - 1))."""
    return np.sort(a)[math.floor(q * (a.size - 1))]


def keep_largest(x: np.ndarray, k: int) -> np.ndarray:
    """Zero all but the k largest magnitudes; entries equal to the k-th stay as well."""
    if k == 0:
        return np.zeros_like(x)
    return np.where(np.abs(x) >= kth_largest(np.abs(x), k), x, np.float32(0))


def keep_exactly(x: np.ndarray, k: int) -> np.ndarray:
    """Zero all but exactly the k largest magnitudes; ties go to the lowest index."""
    chosen = np.argsort(-np.abs(x), kind="stable")[:k]
    out = np.zeros_like(x)
    out[chosen] = x[chosen]
    return out


# Sparsifiers


def rescale_to_norm(before: np.ndarray, after: np.ndarray, norm: int | None) -> np.ndarray:
    """Multiply `after` so that its p-norm is that of `before`; an empty `after` stays zero."""
    if norm is None:
        return after
    total = np.sum(np.abs(before.astype(np.float64)) ** norm)
    kept = np.sum(np.abs(after.astype(np.float64)) ** norm)
    if kept == 0:
        return after
    return (after * (total / kept) ** (1 / norm)).astype(np.float32)


def tadrop_sparsity(
    x: np.ndarray,
    q_low: float = 0.95,
    q_high: float = 0.99,
    s_min: float = 0.0,
    s_max: float = 0.9,
    mapping: Callable[[np.float32], np.float32] = lambda ratio: ratio,
) -> np.float32:
    """The share of entries to drop; 0 where the upper quantile is 0."""
    a = np.abs(x)
    low, high = quantile_lower(a, q_low), quantile_lower(a, q_high)
    if high == 0:
        return np.float32(0)
    return np.float32(np.clip(mapping(low / high), np.float32(s_min), np.float32(s_max)))


def tadrop(stacks: Tree, *, norm: int | None = 2, **parameters) -> Tree:
    def one(x: np.ndarray, _: int) -> np.ndarray:
        s = tadrop_sparsity(x, **parameters)
        if quantile_lower(np.abs(x), parameters.get("q_high", 0.99)) == 0:
            return x
        return rescale_to_norm(x, keep_largest(x, x.size - math.floor(float(s) * x.size)), norm)

    return each_tensor(stacks, one)


def uniform(stacks: Tree, sparsity: float, norm: int | None = 2) -> Tree:
    def one(x: np.ndarray, _: int) -> np.ndarray:
        return rescale_to_norm(x, keep_largest(x, x.size - math.floor(sparsity * x.size)), norm)

    return each_tensor(stacks, one)


def trim(stacks: Tree, density, granularity: str, keep: Callable[[np.ndarray, float], np.ndarray]) -> Tree:
    """Apply `keep(x, density)` to each tensor or to each task's whole vector; density 0: zeros, 1: all."""
    densities = per_task(density, number_of_tasks(stacks))

    def one(x: np.ndarray, t: int) -> np.ndarray:
        if densities[t] == 1:
            return x
        return np.zeros_like(x) if densities[t] == 0 else keep(x, densities[t])

    if granularity == "tensor":
        return each_tensor(stacks, one)
    vectors = np.stack([one(vector, t) for t, vector in enumerate(as_vectors(stacks))])
    return from_vectors(vectors, stacks)


def as_vectors(stacks: Tree) -> np.ndarray:
    """Each task's whole vector, shape (T, total)."""
    tasks = number_of_tasks(stacks)
    return np.concatenate([stack.reshape(tasks, -1) for stack in stacks.values()], axis=1).astype(np.float32)


def from_vectors(vectors: np.ndarray, like: Tree) -> Tree:
    out, start = {}, 0
    for name, stack in like.items():
        size = math.prod(stack.shape[1:])
        out[name] = vectors[:, start : start + size].reshape(stack.shape)
        start += size
    return out


def floor_count(x: np.ndarray, density: float) -> np.ndarray:
    return keep_largest(x, math.floor(density * x.size))


def at_least_one_count(x: np.ndarray, density: float) -> np.ndarray:
    return keep_largest(x, max(1, math.floor(density * x.size)))


def floor_plus_one_count(x: np.ndarray, density: float) -> np.ndarray:
    """The authors of TIES: the threshold is the (d - int(d * K))-th smallest magnitude, k from 1."""
    threshold = np.sort(np.abs(x))[x.size - int(x.size * density) - 1]
    return np.where(np.abs(x) >= threshold, x, np.float32(0))


def exact_count(x: np.ndarray, density: float) -> np.ndarray:
    return keep_exactly(x, int(density * x.size))


KEEP = {
    "at_least_one": at_least_one_count,
    "floor": floor_count,
    "floor_plus_one": floor_plus_one_count,
    "exact": exact_count,
}


def magnitude(stacks: Tree, density, granularity: str = "tensor") -> Tree:
    return trim(stacks, density, granularity, at_least_one_count)


def dare(stacks: Tree, masks: Tree, density: float, rescale: str | None = "inverse") -> Tree:
    """DARE with given masks (1 where an entry is kept)."""
    out = {}
    for name, stack in stacks.items():
        kept = np.where(masks[name] != 0, stack, 0).astype(np.float64)
        if rescale == "inverse" and density > 0:
            kept = kept / density
        if rescale == "l1":
            for t, row in enumerate(kept):
                total = np.abs(row).sum()
                kept[t] = row * (np.abs(stack[t].astype(np.float64)).sum() / total) if total else row
        out[name] = kept.astype(np.float32)
    return out


def n_m(stacks: Tree, n: int, m: int, tail: str = "ceil") -> Tree:
    """Keep the n largest of each m consecutive entries of the row-major tensor."""

    def one(x: np.ndarray, _: int) -> np.ndarray:
        out = np.zeros_like(x)
        for start in range(0, x.size, m):
            group = x[start : start + m]
            in_tail = -(-group.size * n // m) if tail == "ceil" else 0
            count = n if group.size == m else in_tail
            out[start : start + m] = keep_exactly(group, count)
        return out

    return each_tensor(stacks, one)


def conflict_aware(stacks: Tree, inner: Sparsifier, order: Sequence[int] | None = None) -> Tree:
    """Each task in turn sees only the entries that no earlier task's output uses."""
    tasks = number_of_tasks(stacks)
    out = {name: np.zeros(stack.shape, np.float32) for name, stack in stacks.items()}
    free = {name: np.ones(stack.shape[1:], bool) for name, stack in stacks.items()}
    for t in range(tasks) if order is None else order:
        seen = {name: np.where(free[name], stack[t], 0)[None].astype(np.float32) for name, stack in stacks.items()}
        for name, result in inner(seen).items():
            out[name][t] = result[0]
            free[name] &= result[0] == 0
    return out


# Rules that give one task vector


def average(stacks: Tree) -> Tree:
    return {name: stack.astype(np.float64).mean(axis=0).astype(np.float32) for name, stack in stacks.items()}


def task_arithmetic(stacks: Tree, coefficient=1.0, weights=1.0) -> Tree:
    tasks = number_of_tasks(stacks)
    factors = [c * w for c, w in zip(per_task(coefficient, tasks), per_task(weights, tasks), strict=True)]
    out = {}
    for name, stack in stacks.items():
        total = np.zeros(stack.shape[1:], np.float64)
        for factor, row in zip(factors, stack, strict=True):
            total = total + factor * row.astype(np.float64)
        out[name] = total.astype(np.float32)
    return out


def cabs(stacks: Tree, n: int, m: int, coefficient=1.0, order=None, tail: str = "ceil") -> Tree:
    return task_arithmetic(conflict_aware(stacks, lambda tree: n_m(tree, n, m, tail), order), coefficient)


FLAVOURS = {
    "authors": {
        "granularity": "global",
        "combine": "mean",
        "elect": "unweighted",
        "zero_sign": "majority",
        "divisor": "count",
        "keep": "floor_plus_one",
    },
    "mergekit": {
        "granularity": "tensor",
        "combine": "mean",
        "elect": "weighted",
        "zero_sign": "positive",
        "divisor": "weights",
        "keep": "exact",
    },
    "peft": {
        "granularity": "tensor",
        "combine": "mean",
        "elect": "unweighted",
        "zero_sign": "positive",
        "divisor": "count",
        "keep": "exact",
    },
}


def ties(
    stacks: Tree,
    density=0.2,
    coefficient: float = 1.0,
    *,
    weights=1.0,
    flavour: str = "authors",
    **overrides,
) -> Tree:
    """TIES by its explicit parameters; a flavour names a set of them. `density=None` does not trim."""
    parameters = FLAVOURS[flavour] | overrides
    tasks = number_of_tasks(stacks)
    factors = np.array(per_task(weights, tasks), np.float64)
    if density is not None:
        stacks = trim(stacks, density, parameters["granularity"], KEEP[parameters["keep"]])
    plain = as_vectors(stacks).astype(np.float64)
    weighted = factors[:, None] * plain

    voters = weighted if parameters["elect"] == "weighted" else plain
    votes = np.sign(voters) if parameters["elect"] == "frequency" else voters
    elected = np.sign(votes.sum(axis=0))
    elected[elected == 0] = np.sign(elected.sum()) if parameters["zero_sign"] == "majority" else 1

    merged = np.zeros(plain.shape[1], np.float64)
    for i in range(merged.size):
        # Where the majority is 0 too, the authors' code takes the negative entries.
        agreeing = [t for t in range(tasks) if (voters[t, i] > 0 if elected[i] > 0 else voters[t, i] < 0)]
        if not agreeing:
            continue
        values = [weighted[t, i] for t in agreeing]
        if parameters["combine"] == "max":
            merged[i] = elected[i] * max(abs(value) for value in values)
            continue
        merged[i] = sum(values)
        if parameters["combine"] == "mean":
            divisor = len(agreeing) if parameters["divisor"] == "count" else sum(factors[t] for t in agreeing)
            merged[i] /= divisor if divisor != 0 else 1
    merged = (coefficient * merged).astype(np.float32)
    like = {name: stack[:1] for name, stack in stacks.items()}
    return {name: stack[0] for name, stack in from_vectors(merged[None], like).items()}


# Rules that give one model per task


def emr(stacks: Tree, rescaler: str = "tensor_mean") -> tuple[Tree, Tree, np.ndarray]:
    """Returns the unified task vector, the masks (T, *shape) and one rescaler per task."""
    tasks = number_of_tasks(stacks)
    unified, masks = {}, {}
    own, shared = np.zeros(tasks), np.zeros(tasks)
    for name, stack in stacks.items():
        flag = np.where(stack.astype(np.float64).mean(axis=0) > 0, 1, -1)
        masks[name] = stack * flag > 0
        unified[name] = (flag * np.where(masks[name], np.abs(stack), 0).max(axis=0)).astype(np.float32)
        size = math.prod(stack.shape[1:]) if rescaler == "tensor_mean" else 1
        for t in range(tasks):
            own[t] += np.abs(stack[t].astype(np.float64)).sum() / size
            shared[t] += np.abs(np.where(masks[name][t], unified[name], 0).astype(np.float64)).sum() / size
    rescalers = np.array([o / s if s else 0.0 for o, s in zip(own, shared, strict=True)], np.float32)
    return unified, masks, rescalers


def emr_task_vector(stacks: Tree, t: int, rescaler: str = "tensor_mean") -> Tree:
    unified, masks, rescalers = emr(stacks, rescaler)
    return {name: (rescalers[t] * np.where(masks[name][t], unified[name], 0)).astype(np.float32) for name in stacks}
