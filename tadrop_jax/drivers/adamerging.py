r"""AdaMerging: coefficients learned from unlabelled data (arXiv 2310.02575)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tadrop_jax.drivers import common
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import choice, flag, single, whole
from tadrop_jax.steps import AnyStep
from tadrop_jax.trees import named_leaves


class AdaMerged(NamedTuple):
    """What :func:`adamerging` found.

    Attributes:
      params: the merged parameters, type and dtypes of the base; None in what :meth:`load` gives.
      coefficients: float32 ``(T,)``, or a tree like the base's with ``(T,)`` for each tensor that was merged and None
        for the others. Already clipped where ``bounds="clip"``.
      losses: float32 ``(steps, T)``: each task's mean entropy before each step.
    """

    params: Any
    coefficients: Any
    losses: np.ndarray

    def table(self) -> dict[str, np.ndarray]:
        """The coefficients by tensor, ``(T,)`` each; ``"all tensors"`` where tensors share them."""
        if getattr(self.coefficients, "ndim", None) == 1:
            return {"all tensors": np.asarray(self.coefficients)}
        names, leaves, _ = named_leaves(self.coefficients)
        return {n: np.asarray(leaf) for n, leaf in zip(names, leaves, strict=True) if leaf is not None}

    def save(self, path, format: str = "safetensors") -> None:
        """Writes coefficients and losses to a new directory; see :mod:`tadrop_jax.checkpoints.coefficients`."""
        from tadrop_jax.checkpoints import coefficients

        coefficients.save(path, self.coefficients, self.losses, format)

    @classmethod
    def load(cls, path, like=None) -> "AdaMerged":
        """Reads what :meth:`save` wrote; ``like``, a tree like the base's, gives the coefficients its type."""
        from tadrop_jax.checkpoints import coefficients

        return cls(None, *coefficients.load(path, like))


def adamerging(
    apply_fns,
    batches,
    base,
    models: Sequence[Any],
    *,
    granularity: str = "tensor",
    init=0.3,
    steps: int = 500,
    learning_rate=1e-3,
    bounds: str | None = "clip",
    patience: int | None = None,
    remat: bool = True,
    optimizer: optax.GradientTransformation | None = None,
    sparsifier: AnyStep | None = None,
    include=None,
    exclude=None,
    layout=None,
    key=None,
    progress: bool = False,
) -> AdaMerged:
    r"""Learns the coefficients of a weighted sum of task vectors by making predictions certain.

    .. math::

      \theta(\lambda) = \theta_0 + \sum_t \lambda_t \tau_t, \quad
      \min_\lambda \sum_t mean_{x \in B_t} H(softmax(f_t(x; \theta(\lambda))))

    with one :math:`\lambda_t` for each task, or one for each task and tensor. A step draws one batch of each task and
    is one jitted optax update. The defaults are the authors' layer-wise code (``EnnengYang/AdaMerging``,
    ``main_layer_wise_adamerging.py``); ``granularity="task"`` is their task-wise code, and
    ``sparsifier=tj.magnitude(0.2, granularity="global")`` makes it AdaMerging++ (the trim of TIES; any sparsifier will
    do). fusion-bench (``LayerWiseAdaMergingAlgorithm``, ``TaskWiseAdaMergingAlgorithm``) does the same with
    ``clamp_weights=True``; its configuration for CLIP has False and 1000 steps: ``bounds=None, steps=1000``.

    Memory: base and task vectors (float32), and beside them about one model and what one task's backward pass keeps;
    ``benchmarks/adamerging_memory.py`` measures it. If all tasks share one function and the shape of their batches, the
    model is compiled once, else once for each task.

    Args:
      apply_fns: ``(params, batch) -> logits (..., classes)``, one for all tasks or a list of T. ``params`` is a tree
        like ``base``. Linen: ``lambda p, x: model.apply({"params": p}, x)``; nnx: see :func:`tadrop_jax.nnx_apply`.
      batches: a list of T: for each task an iterable of batches, begun again when it ends, or a function of the step.
      base: the pretrained parameters.
      models: T fine-tuned parameters.
      granularity: ``"tensor"`` (a coefficient for each task and tensor; the paper says layer-wise) or ``"task"``.
      init: what coefficients start at, a number or one per task.
      steps: updates at most.
      learning_rate: of Adam.
      bounds: ``"clip"``: coefficients are clipped to [0, 1] where they are used, as the authors do; one that has left
        the interval gets no gradient and stays. ``"project"``: each update is projected back to [0, 1], and stays
        alive. None: no bounds.
      patience: stop early when this many steps in a row did not lower the summed loss below its least value.
      remat: build the merged model anew for each task, which keeps one model in memory; False builds it once a step
        and keeps its gradient as well: faster, one model more.
      optimizer: any optax optimiser in place of ``optax.adam(learning_rate)``.
      sparsifier: what to do to the task vectors first.
      include: regular expression(s) of the tensors to merge, as in :func:`tadrop_jax.merge`.
      exclude: regular expression(s) of tensors to take from the base.
      layout: maps a path to the permutation into PyTorch order, for the sparsifier.
      key: random key, for a random sparsifier.
      progress: show a progress bar on stderr.

    Returns:
      An :class:`AdaMerged`: the merged parameters after the last step, coefficients and losses.

    Raises:
      MergeError: if trees do not match, batches run out, or a loss is no finite number.
      ParameterError: for values out of range, or not one function or batch source per task.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, models = {"w": jnp.eye(2)}, [{"w": 2 * jnp.eye(2)}, {"w": 3 * jnp.eye(2)}]
      >>> inputs = [[jnp.array([[1.0, 0.0]])], [jnp.array([[0.0, 1.0]])]]
      >>> found = tj.adamerging(lambda p, x: x @ p["w"], inputs, base, models, steps=2)
      >>> [f"{c:.3f}" for c in found.coefficients["w"]], found.losses.shape
      (['0.302', '0.302'], (2, 2))
    """
    choice("adamerging", "granularity", granularity, ("tensor", "task"))
    remat = flag("adamerging", "remat", remat)
    choice("adamerging", "bounds", bounds, ("clip", "project", None))
    whole("adamerging", "steps", steps, 1)
    learning_rate = single("adamerging", "learning_rate", learning_rate, 0)
    if patience is not None:
        whole("adamerging", "patience", patience, 1)
    if optimizer is not None and learning_rate != 1e-3:
        raise ParameterError("adamerging: learning_rate is Adam's; give it to your own optimizer instead")
    problem = common.problem("adamerging", base, models, include, exclude)
    functions = common.each("adamerging", "apply_fns", apply_fns, problem.tasks)
    feeds = [
        common.endless("adamerging", source, t)
        for t, source in enumerate(common.sources("adamerging", batches, problem.tasks))
    ]
    start = common.numbers("adamerging", "init", init, problem.tasks)
    raw: Any = start if granularity == "task" else dict.fromkeys(problem.base, start)
    vectors = common.vectors(problem, sparsifier, layout, key)

    rule = optax.adam(learning_rate) if optimizer is None else optimizer
    state = rule.init(raw)
    update = compiled_step(problem, functions, rule, bounds, remat)
    bound = _clip if bounds == "clip" else lambda c: c
    losses: list[np.ndarray] = []
    best, waited = np.inf, 0
    with common.Bar(progress, "adamerging", steps) as bar:
        for step in range(steps):
            batch = tuple(next(feed) for feed in feeds)
            raw, state, found = update(raw, state, problem.base, vectors, problem.rest, batch)
            losses.append(np.asarray(found))
            total = float(losses[-1].sum())
            if not np.isfinite(total):
                raise MergeError(f"adamerging: the loss at step {step} is {total}; by task {losses[-1].tolist()}")
            bar.step(f"entropy {total:.4f}")
            best, waited = (total, 0) if total < best else (best, waited + 1)
            if patience is not None and waited >= patience:
                break
    coefficients = jax.tree.map(bound, raw)
    merged = jax.jit(combine)(coefficients, problem.base, vectors)
    tree = coefficients if granularity == "task" else problem.tree(coefficients, {})
    return AdaMerged(problem.finished(merged), tree, np.stack(losses))


def with_coefficients(base, models, coefficients, *, sparsifier: AnyStep | None = None, layout=None, key=None):
    """The base plus the task vectors, weighted by coefficients that :func:`adamerging` found.

    Args:
      base: the pretrained parameters.
      models: T fine-tuned parameters.
      coefficients: ``(T,)``, or a tree like the base's of ``(T,)``, None for tensors that come from the base.
      sparsifier: as it was given to :func:`adamerging`.
      layout: likewise.
      key: likewise.

    Returns:
      Parameters of the type and dtypes of ``base``.

    Raises:
      MergeError: if trees do not match, or if there is not one coefficient per task.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, models = {"w": jnp.zeros(2), "b": jnp.ones(1)}, [{"w": jnp.ones(2), "b": jnp.zeros(1)}]
      >>> merged = tj.with_coefficients(base, models, {"w": jnp.array([0.5]), "b": None})
      >>> merged["w"].tolist(), merged["b"].tolist()
      ([0.5, 0.5], [1.0])
    """
    problem = common.problem("with_coefficients", base, models)
    if getattr(coefficients, "ndim", None) != 1:
        names, leaves, _ = named_leaves(coefficients)
        given = dict(zip(names, leaves, strict=True))
        if sorted(given) != sorted(problem.names):
            raise MergeError("with_coefficients: the coefficients' tensors are not those of the base")
        taken = {n for n in problem.base if given[n] is not None}
        coefficients = {n: jnp.asarray(given[n], jnp.float32) for n in taken}
        problem = problem.only(taken)
    for name, values in coefficients.items() if isinstance(coefficients, dict) else [("all tensors", coefficients)]:
        if values.shape != (problem.tasks,):
            raise MergeError(
                f"with_coefficients: {name} has coefficients of shape {values.shape}, but there are "
                f"{problem.tasks} tasks"
            )
    vectors = common.vectors(problem, sparsifier, layout, key)
    return problem.finished(jax.jit(combine)(coefficients, problem.base, vectors))


def combine(coefficients, base: dict, vectors: dict) -> dict:
    """``theta_0 + sum_t lam_t tau_t`` in the base's dtypes, by name."""

    def one(name):
        leaf = jnp.asarray(base[name])
        weights = coefficients[name] if isinstance(coefficients, dict) else coefficients
        return (leaf.astype(jnp.float32) + common.sum_of(vectors[name], weights)).astype(leaf.dtype)

    return {name: one(name) for name in base}


def _clip(coefficients):
    """To [0, 1], with the gradient of torch.clamp: 1 inside and on the edge, 0 outside."""
    inside = (coefficients >= 0) & (coefficients <= 1)
    return jnp.where(inside, coefficients, lax.stop_gradient(jnp.clip(coefficients, 0, 1)))


def _entropy(logits) -> jax.Array:
    logs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return -jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))


def compiled_step(problem: common.Problem, functions: tuple[Callable, ...], rule, bounds: str | None, remat: bool):
    """One jitted step: losses of all tasks, gradients, and an update of the coefficients."""

    def losses_and_gradients(of, argument, batch, rest):
        """A loop over tasks: whatever the compiler's taste, one task's backward pass is in memory at a time."""

        def task(t):
            def loss(argument, batch):
                return _entropy(functions[t](problem.tree(of(argument), rest), batch))

            return jax.value_and_grad(loss)

        if len(set(functions)) == 1 and _alike(batch):
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
            found = lambda t: task(0)(argument, jax.tree.map(lambda leaf: leaf[t], stacked))  # noqa: E731
        else:
            branches = [lambda argument, batch, t=t: task(t)(argument, batch[t]) for t in range(problem.tasks)]
            found = lambda t: lax.switch(t, branches, argument, batch)  # noqa: E731

        def body(gradient, t):
            loss, own = found(t)
            return jax.tree.map(jnp.add, gradient, own), loss

        gradient, losses = lax.scan(body, jax.tree.map(jnp.zeros_like, argument), jnp.arange(problem.tasks))
        return losses, gradient

    def update(raw, state, base, vectors, rest, batch):
        def merged(raw):
            return combine(jax.tree.map(_clip, raw) if bounds == "clip" else raw, base, vectors)

        if remat:
            losses, gradient = losses_and_gradients(merged, raw, batch, rest)
        else:
            params, pull = jax.vjp(merged, raw)
            losses, by_params = losses_and_gradients(lambda params: params, params, batch, rest)
            (gradient,) = pull(by_params)
        change, state = rule.update(gradient, state, raw)
        raw = optax.apply_updates(raw, change)
        if bounds == "project":
            raw = jax.tree.map(lambda c: jnp.clip(c, 0, 1), raw)
        return raw, state, losses

    return jax.jit(update)


def _alike(batch) -> bool:
    def shapes(tree):
        return jax.tree.structure(tree), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]

    return all(shapes(one) == shapes(batch[0]) for one in batch)
