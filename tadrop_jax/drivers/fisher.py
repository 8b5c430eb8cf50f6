r"""Fisher-weighted averaging (arXiv 2111.09832)."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax.drivers import common
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import choice, single, whole
from tadrop_jax.steps import over_tasks, safe_ratio
from tadrop_jax.trees import is_traced, named_leaves

LABELS = ("exact", "sampled", "argmax", "given")


class FisherMerged(NamedTuple):
    """What :func:`fisher` found.

    Attributes:
      params: the merged parameters, type and dtypes of the base.
      fishers: for each task a tree like the base's: the mean squared gradients, float32; None where nothing is merged.
    """

    params: Any
    fishers: tuple[Any, ...]


def fisher(
    apply_fns,
    batches,
    base,
    models: Sequence[Any],
    *,
    labels: str = "exact",
    weights=1.0,
    normalize: str | None = "model",
    floor=1e-6,
    floor_on: str = "first",
    chunk: int = 1,
    fishers: Sequence[Any] | None = None,
    include=None,
    exclude=None,
    key=None,
    progress: bool = False,
) -> FisherMerged:
    r"""Averages the models, each entry weighted by how much it matters to its model's predictions.

    .. math::

      F_t = mean_x \, E_{y} (\partial_\theta \log p(y | x; \theta_t))^2, \quad
      \theta = \sum_t w_t \hat F_t \theta_t / \sum_t w_t \hat F_t, \quad \hat F_t = \max(F_t, floor) / \|F_t\|

    The defaults are the authors' (``mmatena/model_merging``): the exact expectation over the model's own labels, each
    Fisher divided by its Euclidean norm over the model, and the floor on the first model alone, which therefore fills
    in where no model's Fisher says anything. With ``floor_on="all"`` the order of the models does not matter. An entry
    whose weights are all 0 gets the weighted mean; a Fisher that is 0 everywhere is not divided.

    dataless-model-merging squares the gradient of a batch's mean loss, which is no Fisher but for batches of one
    example; ``labels="argmax"`` with such batches is its ``hard`` variant.

    Args:
      apply_fns: ``(params, inputs) -> logits (batch, ..., classes)``, one for all tasks or a list of T.
      batches: a list of T: for each task an iterable of batches (arrays or trees whose first axis is the examples), or
        a function of the step that gives None when there are no more. Each is read once.
      base: the pretrained parameters: they give type, dtypes, and what is not merged.
      models: T fine-tuned parameters.
      labels: ``"exact"``: the expectation over all classes (a backward pass for each example, class and position);
        ``"sampled"``: one label drawn from the model for each position; ``"argmax"``: the most likely one;
        ``"given"``: the empirical Fisher, batches are ``(inputs, labels)`` with integer labels ``(batch, ...)``.
      weights: w_t, a number or one per task: none negative, and not all 0.
      normalize: divide each Fisher by its norm over the ``"model"``, by its norm over each ``"tensor"``, or None.
      floor: least value of a Fisher, before it is divided.
      floor_on: ``"first"`` model, or ``"all"``. ``"added"``: the floor is added to all Fishers, and to the norms that
        divide them, as fusion-bench (``merging_with_fisher_weights``) and dataless-model-merging do.
      chunk: how many examples to differentiate at a time; each takes the memory of a gradient.
      fishers: T Fishers from an earlier run (or from :func:`fisher_diagonal`), in place of functions and batches, which
        are then None.
      include: regular expression(s) of the tensors to merge, as in :func:`tadrop_jax.merge`.
      exclude: regular expression(s) of tensors to take from the base.
      key: random key, for ``labels="sampled"``.
      progress: show a progress bar on stderr.

    Returns:
      A :class:`FisherMerged`: parameters, and the Fishers.

    Raises:
      MergeError: if trees do not match, there are no batches, or a Fisher is negative or not finite.
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, models = {"w": jnp.zeros((2, 2))}, [{"w": jnp.full((2, 2), 1.0)}, {"w": jnp.full((2, 2), 3.0)}]
      >>> inputs = [[jnp.array([[1.0, 0.0]])], [jnp.array([[0.0, 1.0]])]]  # each task sees one input
      >>> tj.fisher(lambda p, x: x @ p["w"], inputs, base, models, floor=0.0).params["w"].tolist()
      [[1.0, 1.0], [3.0, 3.0]]
    """
    choice("fisher", "normalize", normalize, ("model", "tensor", None))
    choice("fisher", "floor_on", floor_on, ("first", "all", "added"))
    floor = single("fisher", "floor", floor, 0)
    problem = common.problem("fisher", base, models, include, exclude)
    by_task = common.weights("fisher", weights, problem.tasks)
    if fishers is None:
        functions = common.each("fisher", "apply_fns", apply_fns, problem.tasks)
        feeds = common.sources("fisher", batches, problem.tasks)
        found = []
        for t, model in enumerate(problem.models):
            task_key = None if key is None else jax.random.fold_in(key, t)
            rest = problem.rest
            found.append(
                _diagonal(problem.tree, functions[t], model, rest, feeds[t], labels, chunk, task_key, progress, t)
            )
    else:
        if apply_fns is not None or batches is not None:
            raise ParameterError("fisher: fishers= stands in place of apply_fns and batches: pass None for them")
        found = [_by_name(f, problem) for f in fishers]
        if len(found) != problem.tasks:
            raise MergeError(f"fisher: there are {len(found)} fishers, one per task, but {problem.tasks} tasks")
    merged = _average(problem.models, found, by_task, floor, normalize, floor_on)
    return FisherMerged(problem.finished(merged), tuple(problem.tree(f, {}) for f in found))


def fisher_diagonal(apply_fn: Callable, params, batches, *, labels: str = "exact", chunk: int = 1, key=None):
    """The diagonal of one model's Fisher information: mean squared gradients of its log-likelihood.

    Args:
      apply_fn: as in :func:`fisher`.
      params: the model's parameters.
      batches: of this one task.
      labels: as in :func:`fisher`.
      chunk: likewise.
      key: likewise.

    Returns:
      A tree like ``params``, float32; None for integer leaves.

    Raises:
      MergeError: as :func:`fisher`.
      ParameterError: as :func:`fisher`.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> params, inputs = {"w": jnp.zeros((1, 2))}, [jnp.array([[2.0]])]
      >>> tj.fisher_diagonal(lambda p, x: x @ p["w"], params, inputs)["w"].tolist()
      [[1.0, 1.0]]
    """
    problem = common.problem("fisher", params, [params], same=True)
    (source,) = common.sources("fisher", [batches], 1)
    found = _diagonal(problem.tree, apply_fn, problem.base, problem.rest, source, labels, chunk, key, False, 0)
    return problem.tree(found, {})


def _diagonal(tree, apply_fn, model, rest, source, labels, chunk, key, progress, task) -> dict[str, jax.Array]:
    """One model's Fisher by name; one jitted step a batch, which adds to the sum."""
    choice("fisher", "labels", labels, LABELS)
    whole("fisher", "chunk", chunk, 1)
    if labels == "sampled" and key is None:
        raise MergeError("fisher: labels='sampled' draws random labels: pass key=jax.random.key(seed)")

    @jax.jit
    def accumulate(total, model, rest, batch, key):
        def logs(model, one):
            return jax.nn.log_softmax(jnp.asarray(apply_fn(tree(model, rest), one), jnp.float32))[0]

        def example(one, key):
            inputs, given = one if labels == "given" else (one, None)
            one = jax.tree.map(lambda leaf: leaf[None], inputs)
            found, pull = jax.vjp(lambda model: logs(model, one), model)
            if labels == "exact":
                return _expected_squares(found, pull, model)
            if labels == "sampled":
                given = jax.random.categorical(key, found)
            elif labels == "argmax":
                given = jnp.argmax(found, axis=-1)
            return _squares(pull(jax.nn.one_hot(given, found.shape[-1], dtype=jnp.float32))[0])

        def some(total, part):
            return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, jax.vmap(example)(*part)), None

        count = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.key(0) if key is None else key, count)
        whole_chunks = count // chunk * chunk
        parts = jax.tree.map(lambda leaf: jnp.reshape(leaf[:whole_chunks], (-1, chunk, *leaf.shape[1:])), (batch, keys))
        total, _ = lax.scan(some, total, parts)
        if whole_chunks < count:
            total, _ = some(total, jax.tree.map(lambda leaf: leaf[whole_chunks:], (batch, keys)))
        return total

    total = {n: jnp.zeros(jnp.shape(leaf), jnp.float32) for n, leaf in model.items()}
    examples = 0
    with common.Bar(progress, f"fisher {task}", None) as bar:
        for step, batch in zip(itertools.count(), common.once(source)):
            batch = jax.tree.map(jnp.asarray, batch)
            if labels == "given" and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise MergeError("fisher: labels='given' takes batches of (inputs, labels)")
            total = accumulate(total, model, rest, batch, None if key is None else jax.random.fold_in(key, step))
            examples += jax.tree.leaves(batch)[0].shape[0]
            bar.step()
    if examples == 0:
        raise MergeError(f"fisher: batches[{task}] has no example")
    for name, value in total.items():
        if not bool(jnp.all(jnp.isfinite(value))):
            raise MergeError(f"fisher: the Fisher of {name!r} of model {task} is not finite")
    return {n: v / examples for n, v in total.items()}


def _squares(gradient):
    return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), gradient)


def _expected_squares(logs, pull, model):
    """``sum_y p(y) (d log p(y))^2``, summed over positions: scores of different positions are uncorrelated."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), model)

    def add(total, i):
        p = jnp.exp(jnp.ravel(logs)[i])
        direction = jnp.reshape(jnp.zeros(logs.size, jnp.float32).at[i].set(1), logs.shape)
        return jax.tree.map(lambda t, s: t + p * s, total, _squares(pull(direction)[0])), None

    return lax.scan(add, zeros, jnp.arange(logs.size))[0]


def _by_name(given, problem: common.Problem) -> dict[str, jax.Array]:
    names, leaves, _ = named_leaves(given)
    table = dict(zip(names, leaves, strict=True))
    for name, leaf in problem.base.items():
        found = table.get(name)
        if found is None or jnp.shape(found) != jnp.shape(leaf):
            shape = "none" if found is None else list(jnp.shape(found))
            raise MergeError(f"fisher: the Fisher of {name!r} has shape {shape}, the tensor {list(jnp.shape(leaf))}")
        with jax.ensure_compile_time_eval():  # also inside a user's jit
            if not is_traced(found) and not bool(jnp.all(jnp.isfinite(found) & (jnp.asarray(found) >= 0))):
                raise MergeError(f"fisher: the Fisher of {name!r} holds NaN, infinity or a negative number")
    return {n: jnp.asarray(table[n], jnp.float32) for n in problem.base}


def _average(models, fishers, weights, floor, normalize, floor_on: str) -> dict[str, jax.Array]:
    def norm(fisher: dict, names) -> jax.Array:
        total = jnp.sqrt(sum(jnp.sum(jnp.square(fisher[n])) for n in names)) + (floor if floor_on == "added" else 0)
        return jnp.where(total == 0, 1, total)

    @jax.jit
    def average(models, fishers, weights):
        shares = [norm(f, f) for f in fishers] if normalize == "model" else [jnp.float32(1)] * len(fishers)
        out = {}
        for name in models[0]:
            terms = []
            for t, fisher in enumerate(fishers):
                if floor_on == "added":
                    value = fisher[name] + floor
                else:
                    value = fisher[name] if floor_on == "first" and t else jnp.maximum(fisher[name], floor)
                by = norm(fisher, [name]) if normalize == "tensor" else shares[t]
                terms.append(weights[t] / by * value)
            values = [jnp.asarray(m[name], jnp.float32) for m in models]
            total = over_tasks(jnp.add, jnp.stack(terms))
            mean = safe_ratio(sum(w * v for w, v in zip(terms, values, strict=True)), total)
            out[name] = jnp.where(total == 0, common.weighted_mean(values, weights), mean)
        return out

    return average(models, fishers, weights)
