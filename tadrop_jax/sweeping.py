"""Search over hyper-parameters: arrays in one compilation, everything else in a loop."""

import csv
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr

from tadrop_jax.errors import ParameterError, meant
from tadrop_jax.parameters import whole


class Sweep(list):
    """The settings of a sweep and what they scored: a list of dicts, one for each setting."""

    def best(self, score: str | None = None, *, least: bool = False) -> dict[str, Any]:
        """The setting that scored best.

        Args:
          score: which score, if there are several.
          least: whether less is better.

        Returns:
          Its row. NaN is never best; of equal scores the first wins.

        Raises:
          ParameterError: for an unknown score, or if every score is NaN.
        """
        score = self._score(score)
        rows = [row for row in self if not math.isnan(row[score])]
        if not rows:
            raise ParameterError(f"sweep: every {score!r} is NaN")
        return (min if least else max)(rows, key=lambda row: row[score])

    def _score(self, score: str | None) -> str:
        scores = [name for name, value in self[0].items() if isinstance(value, _Score)]
        if score is None and len(scores) == 1:
            return scores[0]
        if score is None or score not in scores:
            raise ParameterError(f"sweep: best() wants one of the scores {', '.join(scores)}, got {score!r}")
        return score

    def to_csv(self, path) -> None:
        """Writes the table; a setting that is an array becomes a list of its numbers."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self[0]))
            writer.writeheader()
            writer.writerows({k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in self)


class _Score(float):
    """A number that was measured, not set."""


def sweep(
    rule_factory: Callable,
    grid: Mapping[str, Any],
    evaluate: Callable,
    *,
    product: bool = True,
    at_once: int | None = None,
) -> Sweep:
    """Evaluates a rule at every point of a grid of hyper-parameters.

    Hyper-parameters that are arrays are traced and vmapped: all their settings run in one call of one compiled
    function. Those that are lists are looped over, one compilation for each combination: strings, None, numbers that
    decide shapes. Without any array nothing is traced, and ``evaluate`` may be any Python.

    Args:
      rule_factory: ``(**setting) -> rule``, such as ``tj.ties`` or ``lambda c: tj.task_arithmetic(c)``.
      grid: by name an array of settings (along its leading axis: one of shape ``(N, T)`` is N settings of one number
        per task), or a list or tuple of them.
      evaluate: ``rule -> score``, or a dict of scores by name; with arrays in the grid, JAX code of static shape, most
        likely a merge followed by a loss.
      product: every combination; False: arrays and lists, all of one length, go side by side, as in a random search.
      at_once: how many settings of the arrays to vmap; None means all. Memory grows with it.

    Returns:
      A :class:`Sweep`: one dict for each setting, with the setting and its ``"score"`` (or its scores by name).

    Raises:
      ParameterError: for an empty grid, a hyper-parameter that the rule does not have, lengths that differ, scores that
        are not scalar, or ``at_once`` below 1.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]
      >>> def evaluate(rule):
      ...     return -jnp.sum((tj.merge(base, models, rule)["w"] - 0.6) ** 2)
      >>> found = tj.sweep(tj.task_arithmetic, {"coefficient": jnp.array([0.1, 0.3, 0.5])}, evaluate)
      >>> len(found), round(found.best()["coefficient"], 3)
      (3, 0.3)
    """
    if not grid:
        raise ParameterError("sweep: the grid is empty")
    at_once = None if at_once is None else whole("sweep", "at_once", at_once, 1)
    for name, values in grid.items():
        several = np.ndim(values) > 0 if hasattr(values, "shape") else isinstance(values, (list, tuple))
        if not several or len(values) == 0:
            raise ParameterError(f"sweep: {name} must be an array or a list of settings, got {values!r}")
    _check_names(rule_factory, grid)
    arrays = {n: jnp.asarray(v) for n, v in grid.items() if isinstance(v, (jax.Array, np.ndarray))}
    lists = {n: list(v) for n, v in grid.items() if n not in arrays}
    if not product:
        return _side_by_side(rule_factory, arrays, lists, evaluate, at_once)
    if arrays:
        index = jnp.meshgrid(*(jnp.arange(v.shape[0]) for v in arrays.values()), indexing="ij")
        arrays = {n: v[jnp.ravel(i)] for (n, v), i in zip(arrays.items(), index, strict=True)}
    rows = Sweep()
    for fixed in itertools.product(*lists.values()):
        rows += _run(rule_factory, dict(zip(lists, fixed, strict=True)), arrays, evaluate, at_once, list(grid))
    return rows


def _check_names(rule_factory: Callable, names: Iterable[str]) -> None:
    """Refuses hyper-parameters that a factory does not take, or that it wants besides."""
    try:
        signature = inspect.signature(rule_factory)
    except (TypeError, ValueError):  # it does not tell
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        unknown = [name for name in names if name not in signature.parameters]
        near = meant(unknown[0], signature.parameters) if unknown else ""
        called = getattr(rule_factory, "__name__", "the rule")
        raise ParameterError(f"sweep: {called}: {error}{near}") from None


def _side_by_side(rule_factory, arrays, lists, evaluate, at_once) -> Sweep:
    lengths = {n: len(v) for n, v in (arrays | lists).items()}
    if len(set(lengths.values())) != 1:
        raise ParameterError(f"sweep: product=False wants settings of one length, got {lengths}")
    order = list(lengths)
    if not lists:
        return Sweep(_run(rule_factory, {}, arrays, evaluate, at_once, order))
    rows = Sweep()
    for i in range(next(iter(lengths.values()))):
        fixed = {n: v[i] for n, v in lists.items()}
        rows += _run(rule_factory, fixed, {n: v[i : i + 1] for n, v in arrays.items()}, evaluate, at_once, order)
    return rows


def _run(rule_factory, fixed: dict, arrays: dict, evaluate, at_once: int | None, order: list[str]) -> list[dict]:
    """All settings of the arrays, at one setting of the lists."""

    def scores(traced: dict) -> dict:
        found = evaluate(rule_factory(**fixed, **traced))
        found = dict(found) if isinstance(found, Mapping) else {"score": found}
        for name, value in found.items():
            if np.shape(value) != ():
                raise ParameterError(f"sweep: {name} must be one number, got the shape {list(np.shape(value))}")
            if name in order:
                raise ParameterError(f"sweep: {name} is a hyper-parameter; call the score something else")
        return found

    if not arrays:
        return [_row(order, fixed, scores({}))]
    count = next(iter(arrays.values())).shape[0]
    one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), arrays)
    # What evaluate closes over (models, data) goes in as arguments: as constants it would be compiled into the program.
    closed, shape = jax.make_jaxpr(scores, return_shape=True)(one)
    structure = jax.tree.structure(shape)

    def call(consts, traced):
        return jax.tree.unflatten(structure, eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(traced)))

    def every(consts, arrays):
        if at_once is None or at_once >= count:
            return jax.vmap(lambda traced: call(consts, traced))(arrays)
        return jax.lax.map(lambda traced: call(consts, traced), arrays, batch_size=at_once)

    found = jax.device_get(jax.jit(every)(closed.consts, arrays))
    settings = jax.device_get(arrays)
    return [
        _row(order, fixed | {n: _plain(v[i]) for n, v in settings.items()}, {n: v[i] for n, v in found.items()})
        for i in range(count)
    ]


def _plain(value):
    return value.item() if np.ndim(value) == 0 else value


def _row(order: list[str], setting: dict, scores: dict) -> dict[str, Any]:
    try:
        found = {n: _Score(v) for n, v in scores.items()}
    except (TypeError, ValueError):
        raise ParameterError(f"sweep: a score must be one number, got {scores!r}") from None
    return {n: setting[n] for n in order} | found
