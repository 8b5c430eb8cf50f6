r"""RegMean: the weights that regress each layer's outputs best (arXiv 2212.09849)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax.drivers import common
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import single
from tadrop_jax.steps import over_tasks, patterns, safe_ratio
from tadrop_jax.trees import check_patterns, copies_of, selected


class RegMeanMerged(NamedTuple):
    """What :func:`regmean` found.

    Attributes:
      params: the merged parameters, type and dtypes of the base.
      grams: for each task ``{name of a kernel: (in, in) float32}``, the mean of ``x x^T`` over its inputs.
    """

    params: Any
    grams: tuple[dict[str, jax.Array], ...]


def regmean(
    capture_fns,
    batches,
    base,
    models: Sequence[Any],
    *,
    scale=0.9,
    weights=1.0,
    ridge=1e-6,
    out_in=(),
    grams: Sequence[Mapping[str, Any]] | None = None,
    include=None,
    exclude=None,
    progress: bool = False,
) -> RegMeanMerged:
    r"""Merges linear layers so that their outputs on each task's inputs stay near those of that task's model.

    .. math::

      W = \Big(\sum_t w_t \tilde G_t\Big)^{-1} \sum_t w_t \tilde G_t W_t, \quad
      G_t = mean_x \, x x^T, \quad \tilde G_t = scale \cdot G_t + (1 - scale) \, diag(G_t)

    for kernels that lie (in, out); the weighted mean for every other tensor. With ``scale=1`` and ``ridge=0`` this is
    the least-squares optimum. It is solved in float32 for the difference to the base. To each Gram matrix a multiple of
    the identity is added, so that a direction which no input excites gets the weighted mean: in total ``ridge`` times
    the mean of the diagonal of the sum. The authors' code adds nothing (``ridge=0``).

    The authors (``bloomberg/dataless-model-merging``, ``regmean_mean_params``) scale by .9 in most experiments, .1 for
    DeBERTa on emotions; other reports use .6 for GPT-2. With ``ridge=0`` this is also fusion-bench's
    ``merging_with_regmean_weights``, whose scale is 1 by default.

    Args:
      capture_fns: ``(params, batch) -> {name of a kernel: inputs (..., in)}``, or a list of inputs for a layer that
        runs several times (of a tied kernel any of its names will do); one for all tasks, or a list of T.
        :func:`tadrop_jax.linen_inputs` and :func:`tadrop_jax.nnx_inputs` make it from a module. Leave out inputs that
        are padding.
      batches: a list of T: for each task an iterable of batches, or a function of the step that gives None when there
        are no more. Each is read once.
      base: the pretrained parameters: they give type, dtypes, and what is not merged.
      models: T fine-tuned parameters.
      scale: of the off-diagonal of the Gram matrices, in [0, 1].
      weights: w_t, a number or one per task: none negative, and not all 0.
      ridge: what is added to the diagonal, as a share of its mean.
      out_in: regular expression(s) of the kernels that lie (out, in), as PyTorch's Linear does. All others lie (in,
        out), as Flax kernels and GPT-2's Conv1D do; kernels of several axes are flattened.
      grams: T dictionaries from an earlier run (or from :func:`gram_matrices`), in place of functions and batches,
        which are then None.
      include: regular expression(s) of the tensors to merge, as in :func:`tadrop_jax.merge`.
      exclude: regular expression(s) of tensors to take from the base.
      progress: show a progress bar on stderr.

    Returns:
      A :class:`RegMeanMerged`: parameters, and the Gram matrices.

    Raises:
      MergeError: if trees do not match, inputs do not fit their kernel, a tied kernel has several Gram matrices, or
        the sum of Gram matrices is singular.
      ParameterError: for values out of range.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, models = {"kernel": jnp.zeros((2, 1))}, [{"kernel": jnp.full((2, 1), v)} for v in (1.0, 3.0)]
      >>> inputs = [[jnp.array([[1.0, 0.0]])], [jnp.array([[0.0, 1.0]])]]  # each task sees one input
      >>> found = tj.regmean(lambda p, x: {"kernel": x}, inputs, base, models, ridge=0.0)
      >>> found.params["kernel"].tolist()
      [[1.0], [3.0]]
    """
    scale = single("regmean", "scale", scale, 0, 1)
    ridge = single("regmean", "ridge", ridge, 0)
    problem = common.problem("regmean", base, models, include, exclude)
    by_task = common.weights("regmean", weights, problem.tasks)
    out_in = patterns(out_in)
    check_patterns(out_in, problem.names)
    if grams is None:
        functions = common.each("regmean", "capture_fns", capture_fns, problem.tasks)
        feeds = common.sources("regmean", batches, problem.tasks)
        grams = [_grams(problem, functions[t], model, feeds[t], progress, t) for t, model in enumerate(problem.models)]
    elif capture_fns is not None or batches is not None:
        raise ParameterError("regmean: grams= stands in place of capture_fns and batches: pass None for them")
    elif isinstance(grams, Mapping):
        raise ParameterError("regmean: grams must be a list, one dictionary per task")
    grams = [_of_tensors(problem, found) for found in grams]
    lying = frozenset(
        name
        for name in problem.base
        if out_in and any(selected(n, out_in) for n in (name, *copies_of(name, problem.aliases)))
    )
    _check(problem, grams, lying)

    merged = {}
    for name, leaf in problem.base.items():
        values = tuple(jnp.asarray(m[name]) for m in problem.models)
        if name not in grams[0]:
            merged[name] = common.weighted_mean(values, by_task)
            continue
        own = tuple(jnp.asarray(g[name], jnp.float32) for g in grams)
        merged[name] = _regress(jnp.asarray(leaf), values, own, by_task, scale, ridge, transposed=name in lying)
        if not bool(jnp.all(jnp.isfinite(merged[name]))):
            raise MergeError(f"regmean: the sum of Gram matrices of {name!r} is singular in float32: raise ridge")
    return RegMeanMerged(problem.finished(merged), tuple(grams))


def gram_matrices(capture_fn: Callable, params, batches) -> dict[str, jax.Array]:
    """The Gram matrices of the inputs of one model's linear layers.

    Args:
      capture_fn: as in :func:`regmean`.
      params: the model's parameters.
      batches: of this one task.

    Returns:
      ``{name of a kernel: (in, in) float32}``, the mean of ``x x^T``.

    Raises:
      MergeError: if there is no batch.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> inputs = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> tj.gram_matrices(lambda p, x: {"kernel": x}, {"kernel": jnp.ones((2, 3))}, inputs)["kernel"].tolist()
      [[5.0, 1.0], [1.0, 2.0]]
    """
    problem = common.problem("regmean", params, [params], same=True)
    (source,) = common.sources("regmean", [batches], 1)
    return _grams(problem, capture_fn, problem.base, source, False, 0)


def _grams(problem: common.Problem, capture, model, source, progress, task) -> dict[str, jax.Array]:
    def of_batch(model, rest, batch):
        sums, rows = {}, {}
        for seen, inputs in capture(problem.tree(model, rest), batch).items():
            name = problem.aliases.get(seen, seen)  # the uses of a tied kernel add up
            for x in inputs if isinstance(inputs, (list, tuple)) else (inputs,):
                flat = jnp.reshape(jnp.asarray(x, jnp.float32), (-1, x.shape[-1]))
                gram = jnp.matmul(flat.T, flat, precision="highest")
                sums[name] = gram + sums[name] if name in sums else gram
                rows[name] = rows.get(name, 0) + flat.shape[0]
        return sums, rows

    @jax.jit
    def accumulate(total, model, rest, batch):
        sums, rows = of_batch(model, rest, batch)
        return jax.tree.map(jnp.add, total, sums), rows

    total, count = None, None
    with common.Bar(progress, f"regmean {task}", None) as bar:
        for batch in common.once(source):
            if total is None:
                shapes, _ = jax.eval_shape(of_batch, model, problem.rest, batch)
                total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, rows = accumulate(total, model, problem.rest, batch)
            rows = {n: int(r) for n, r in rows.items()}
            count = rows if count is None else {n: count[n] + r for n, r in rows.items()}
            bar.step()
    if not total or count is None:
        raise MergeError(f"regmean: batches[{task}] gave no inputs of a linear layer")
    return {n: gram / count[n] for n, gram in total.items()}


def _of_tensors(problem: common.Problem, found: Mapping[str, Any]) -> dict[str, Any]:
    """Gram matrices by the names that stand for tied kernels.

    Raises:
      MergeError: if one tensor has several: how many inputs each is the mean of is not known.
    """
    table: dict[str, Any] = {}
    for name, gram in found.items():
        first = problem.aliases.get(name, name)
        if first in table:
            raise MergeError(f"regmean: {name!r} and {first!r} are tied: give one Gram matrix for both")
        table[first] = gram
    return table


def _check(problem: common.Problem, grams, lying) -> None:
    """Refuses Gram matrices that are not alike in all tasks, belong to no tensor, or do not fit one."""
    if len(grams) != problem.tasks:
        raise MergeError(f"regmean: there are {len(grams)} sets of grams, one per task, but {problem.tasks} tasks")
    for t, found in enumerate(grams):
        if set(found) != set(grams[0]):
            odd = sorted(set(found) ^ set(grams[0]))[0]
            raise MergeError(f"regmean: {odd!r} has a Gram matrix for some tasks only (see task {t})")
        for name, gram in found.items():
            if name not in problem.names:
                raise MergeError(f"regmean: there are inputs for {name!r}, but no such tensor")
            shape = np.shape(problem.base.get(name, ()))
            if name in problem.base and not (np.shape(gram) == (_width(shape, gram, name in lying),) * 2):
                raise MergeError(
                    f"regmean: the Gram matrix of {name!r} has shape {list(np.shape(gram))}, which does not fit the "
                    f"kernel {list(shape)} read as {'(out, in)' if name in lying else '(in, out)'}"
                )


def _width(shape: tuple[int, ...], gram, out_in: bool) -> int | None:
    """The width of a kernel's inputs: a product of its first axes, of its last if it lies (out, in)."""
    axes = shape[::-1] if out_in else shape
    width = 1
    for axis in axes[:-1]:
        width *= axis
        if width == np.shape(gram)[0]:
            return width
    return None


@functools.partial(jax.jit, static_argnames="transposed")
def _regress(base, values, grams, weights, scale, ridge, transposed: bool) -> jax.Array:
    """``base + (sum G_t)^-1 sum G_t tau_t``: less rounding than in the weights themselves."""
    width = grams[0].shape[0]

    def matrix(tensor):
        tensor = tensor.astype(jnp.float32)
        return jnp.reshape(tensor, (-1, width)).T if transposed else jnp.reshape(tensor, (width, -1))

    scaled = [w * (scale * g + (1 - scale) * jnp.diag(jnp.diag(g))) for w, g in zip(weights, grams, strict=True)]
    total = over_tasks(jnp.add, jnp.stack(scaled))
    size = jnp.trace(total) / width
    eye = jnp.where(size == 0, 1, ridge * size) * jnp.eye(width, dtype=jnp.float32)
    shares = safe_ratio(weights, over_tasks(jnp.add, weights))
    start = matrix(base)
    moved = [
        jnp.matmul(g + share * eye, matrix(v) - start, precision="highest")
        for g, share, v in zip(scaled, shares, values, strict=True)
    ]
    factor = jax.scipy.linalg.cho_factor(total + eye)
    found = start + jax.scipy.linalg.cho_solve(factor, over_tasks(jnp.add, jnp.stack(moved)))
    return jnp.reshape(found.T if transposed else found, base.shape)
