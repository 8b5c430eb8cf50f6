"""A candidate that learns: the sparsity of each tensor and task, by gradient descent on inputs without labels.

In AdaMerging's manner (arXiv 2310.02575): what is made small is the entropy of the merged models' answers. Pruning is
made soft for that (an entry stays by a sigmoid of its magnitude), and the rule is EMR, for which the sparsities are
learned.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.evidence.arms import LARGEST, Shares, Stack, across
from examples.evidence.suites import Suite
from examples.evidence.training import shuffled

_POINTS = 101  # of a tensor's quantiles
_SOFT = 0.1  # width of the sigmoid, in units of the threshold


def shares(
    suite: Suite, stack: Stack, *, start: float = 0.5, steps: int = 60, rate: float = 0.1, size: int = 16
) -> Shares:
    """Sparsities after which EMR's models are sure of their answers on the tasks' validation inputs.

    Args:
        suite: a base and its fine-tunes.
        stack: their task vectors.
        start: the sparsity of all tensors to begin with.
        steps: of Adam.
        rate: of Adam, on the sparsities' logits.
        size: inputs of each task a step.
    """
    leaves, tree = jax.tree.flatten(stack)
    tables = [jnp.asarray([_quantiles(np.asarray(task)) for task in leaf], jnp.float32) for leaf in leaves]
    orders = [shuffled(len(tuned.task.validation.labels), size, seed=0) for tuned in suite.tuned]

    def loss(logits, batches):
        vectors = emr([_softly(*some) for some in zip(leaves, tables, sparsities(logits), strict=True)])
        total = jnp.zeros(())
        for t, (tuned, inputs) in enumerate(zip(suite.tuned, batches, strict=True)):
            params = jax.tree.map(jnp.add, suite.base, jax.tree.unflatten(tree, [vector[t] for vector in vectors]))
            answers = jax.nn.log_softmax(tuned.encode(params, inputs) @ tuned.head.kernel + tuned.head.bias)
            total -= jnp.sum(jnp.exp(answers) * answers, 1).mean() / np.log(answers.shape[1])
        return total / len(suite.tuned)

    optimiser = optax.adam(rate)

    @jax.jit
    def step(logits, state, batches):
        updates, state = optimiser.update(jax.grad(loss)(logits, batches), state)
        return optax.apply_updates(logits, updates), state

    share = start / LARGEST
    logits = [jnp.full(len(leaf), np.log(share / (1 - share)), jnp.float32) for leaf in leaves]
    state = optimiser.init(logits)
    for number in range(steps):
        parts = [tuned.task.validation for tuned in suite.tuned]
        batches = [part.take(order(number)).inputs for part, order in zip(parts, orders, strict=True)]
        logits, state = step(logits, state, batches)
    return [np.asarray(share) for share in sparsities(logits)]


def sparsities(logits: list[jax.Array]) -> list[jax.Array]:
    """Between nothing and `LARGEST`."""
    return [LARGEST * jax.nn.sigmoid(logit) for logit in logits]


def emr(pruned: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """EMR's task vectors (T, ...) of each tensor, where entries are partly there.

    Args:
        pruned: of each tensor the entries that are left `(T, ...)`, and how much each is there, from 0 to 1.
    """
    found, own, shown = [], 0.0, 0.0
    for kept, there in pruned:
        sign = jnp.where(kept.sum(0) > 0, 1.0, -1.0)
        agrees = kept * sign > 0
        unified = sign * jnp.max(jnp.where(agrees, jnp.abs(kept), 0), 0)
        vectors = unified * there * agrees
        own += _mean(jnp.abs(kept))
        shown += _mean(jnp.abs(vectors))
        found.append(vectors)
    factor = own / jnp.maximum(shown, 1e-30)
    return [vectors * across(factor, vectors) for vectors in found]


def _quantiles(tensor: np.ndarray) -> np.ndarray:
    """Quantiles `(_POINTS,)` of the magnitudes that are not zero, which sparsities are shares of."""
    sizes = np.abs(tensor[tensor != 0])
    return np.quantile(sizes, np.linspace(0, 1, _POINTS)) if sizes.size else np.zeros(_POINTS)


def _softly(leaf: jax.Array, table: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is left of a tensor `(T, ...)` at sparsities `(T,)`, its 2-norm restored; how much each entry is there."""
    at = share * (_POINTS - 1)
    low = jnp.clip(at.astype(int), 0, _POINTS - 2)
    ends = jnp.take_along_axis(table, jnp.stack([low, low + 1], 1), 1)
    cut = ends[:, 0] + (at - low) * (ends[:, 1] - ends[:, 0])
    standing = jnp.abs(leaf) / across(jnp.where(cut > 0, cut, 1), leaf)
    there = jnp.where(across(cut > 0, leaf), jax.nn.sigmoid((standing - 1) / _SOFT), 1)
    kept = leaf * there
    before, after = (_mean(x**2) for x in (leaf, kept))
    growth = jnp.sqrt(jnp.where(after > 0, before, 1) / jnp.where(after > 0, after, 1))
    return kept * across(growth, leaf), there


def _mean(array: jax.Array) -> jax.Array:
    return array.reshape(len(array), -1).mean(1)
