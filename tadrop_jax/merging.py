"""The functions a user calls: merge, sparsify, explain."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax import donation, memory
from tadrop_jax.bundles import Bundle, pack
from tadrop_jax.contents import check_contents
from tadrop_jax.errors import MergeError
from tadrop_jax.explaining import explaining_steps, explanation, ratio_step
from tadrop_jax.kinds import Kind
from tadrop_jax.layouts import laid_out
from tadrop_jax.parameters import ordered, single
from tadrop_jax.placement import apart, shardings_by_name, together, without_first_axis
from tadrop_jax.selection import attached, magnitude
from tadrop_jax.sites import Tensor
from tadrop_jax.steps import (
    AnyStep,
    Chain,
    Step,
    chain,
    expand,
    is_on_weights,
    output_of,
    patterns,
    per_task_patterns,
    scalars_of,
)
from tadrop_jax.task_vector import match
from tadrop_jax.trees import (
    as_dtype_of,
    check_dtype,
    check_patterns,
    is_mergeable,
    is_traced,
    named_leaves,
    selected,
    tied,
)


def merge(
    base,
    models: Sequence[Any],
    rule: AnyStep,
    *,
    sparsifier: AnyStep | None = None,
    include=None,
    exclude=None,
    layout: Mapping | Callable | None = None,
    key=None,
    shardings=None,
    donate: bool = False,
):
    """Merges fine-tunes of one base into one model, or into one model per task.

    Traces inside ``jit``, ``grad`` and ``vmap``. Tensors that carry a ``NamedSharding`` are merged where they lie.
    Arithmetic is in float32, for float64 tensors too, whose values are rounded to it. What overflows the base's dtype
    becomes infinite without a warning: to look at the result would cost another pass over it.

    Args:
      base: the pretrained parameters: nested dict, FrozenDict, ``nnx.State``, Linen variables, or any pytree.
      models: T fine-tuned parameters with the same tensors, shapes and dtypes.
      rule: a merge rule, e.g. ``tj.ties(0.2)``, or a chain that ends with one.
      sparsifier: goes before the rule. It does not switch off the rule's own trimming: pass ``density=None`` for that.
      include: regular expression(s) of the tensors to merge (``re.search`` on '/'-joined paths); None means all.
      exclude: regular expression(s) of tensors to take from the base; beats include. Such tensors leave global
        statistics, and need not be alike in the models. Of weights that are tied each name counts by itself here: one
        that is excluded is the base's, also where its copy merges. (In files copies cannot come apart: all stay.)
      layout: maps a path to the permutation into PyTorch order, or to a :class:`Layout` (any pair of name and
        permutation, as ``converters.layout`` gives them), so that groups, rows and random positions follow the
        PyTorch tensor.
      key: ``jax.random.key(seed)``, for methods that are random.
      shardings: where to merge: a tree as the base, of ``NamedSharding`` or None; None is where the base lies. Inside
        ``jit`` a tensor does not tell how it lies on a mesh of ``AxisType.Auto`` axes: so that only counts and sums
        cross devices there too, pass ``jax.tree.map(lambda x: x.sharding, base)`` of the concrete base.
      donate: use up the models: each merged tensor takes the place of the first model's, and the others' are freed one
        tensor after another. Arrays that occur more than once among base and models, or share memory there, are spared.
        Of a model whose tensors were merged nothing may be used afterwards, also if the merge fails, nor arrays outside
        that share its memory (as ``jax.device_put`` of an array to its own device does).

    Returns:
      Parameters of the type and dtypes of ``base``, or an :class:`~tadrop_jax.bundles.Bundle` for a per-task rule.
      Integer and boolean tensors come from the base.

    Raises:
      MergeError: (a ``ValueError``) if trees do not match, a tensor holds NaN or infinity, a pattern matches nothing,
        or a random method gets no key.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> base = {"w": jnp.zeros(4)}
      >>> models = [{"w": jnp.array([1.0, 0.1, 0.0, 2.0])}, {"w": jnp.array([1.0, 0.0, -3.0, 0.1])}]
      >>> tj.merge(base, models, tj.ties(density=None), sparsifier=tj.magnitude(0.5))["w"].tolist()
      [1.0, 0.0, -3.0, 2.0]
    """
    whole = with_sparsifier(sparsifier, rule)
    include, exclude, per_task = patterns(include), patterns(exclude), per_task_patterns(whole)
    names, leaves, treedef = named_leaves(base)
    check_patterns((*include, *exclude, *per_task), names)
    own = {
        n for n, leaf in zip(names, leaves, strict=True) if per_task and selected(n, per_task) and is_mergeable(leaf)
    }
    kept = {n for n in names if n not in own and not selected(n, include, exclude)}
    aside = frozenset(own | kept)
    columns = match(names, leaves, models, skip=aside)
    at = {i: name for i, name in enumerate(names) if name not in aside and is_mergeable(leaves[i])}
    if not at:
        raise MergeError("there is no float tensor to merge")
    check_contents([(names[i], leaves[i], columns[i]) for i in at])
    lies = {} if shardings is None else shardings_by_name(shardings, dict(zip(names, leaves, strict=True)))
    spare = donation.spare(base, models) if donate else frozenset()

    def tensor(i: int) -> Tensor:
        order, seed_name = laid_out(layout, names[i], np.ndim(leaves[i]))
        to = lies.get(names[i])
        models_i = tuple(map(jnp.asarray, columns[i] if to is not None else together(leaves[i], columns[i])))
        return Tensor(names[i], models_i, jnp.asarray(leaves[i]), order, seed_name, to)

    steps = expand(whole, len(models))
    held = [(leaves[i], *columns[i]) for i in at]
    results = _run_once(tensor, at, held, names, steps, len(models), key, spare)
    values = [results[i].value if i in results else None for i in range(len(leaves))]
    if steps[-1].output == "bundle":
        own_tensors = tuple({n: leaf for n, leaf in _by_name(model).items() if n in own} for model in models)
        return _bundle(
            base,
            treedef,
            values,
            [np.shape(leaf) for leaf in leaves],
            steps[-1],
            results.values(),
            own_tensors,
            len(models),
            [lies.get(name) for name in names],
        )
    out = [leaf if value is None else as_dtype_of(leaf, value) for value, leaf in zip(values, leaves, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, out)


def merge_task_vectors(
    stack,
    rule: AnyStep,
    *,
    sparsifier: AnyStep | None = None,
    layout: Mapping | Callable | None = None,
    key=None,
    shardings=None,
):
    """Merges task vectors; the base is not added.

    Args:
      stack: tree of ``(T, *shape)`` float arrays, as :func:`task_vectors` gives it; None leaves stay None.
      rule: a merge rule on task vectors.
      sparsifier: goes before the rule.
      layout: as for :func:`merge`; it is about ``shape``, without T.
      key: random key, for methods that are random.
      shardings: as for :func:`merge`, a tree as the stack, of how ``(T, *shape)`` lies. The tasks of a tensor are
        merged on one device: a first axis that is split is gathered.

    Returns:
      Tree of float32 arrays of shape ``shape``, the coefficient applied; or a bundle without a base for a per-task
      rule.

    Raises:
      TypeError: for rules on weights, which need :func:`merge`.
      MergeError: as :func:`merge`.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.merge_task_vectors({"w": jnp.array([[1.0], [3.0]])}, tj.task_arithmetic(0.5))["w"].tolist()
      [2.0]
    """
    whole = with_sparsifier(sparsifier, rule)
    if is_on_weights(whole):
        raise TypeError("this rule works on weights, not on task vectors: call tj.merge(base, models, rule)")
    return _run_stack(stack, whole, key, layout, shardings)


def sparsify(stack, sparsifier: AnyStep, *, layout: Mapping | Callable | None = None, key=None, shardings=None):
    """Sparsifies task vectors.

    Args:
      stack: tree of ``(T, *shape)`` float arrays, as :func:`task_vectors` gives it; None leaves stay None.
      sparsifier: any sparsifier, or a chain of them.
      layout: as for :func:`merge`, about ``shape`` without T: for n:m, DARE and what else goes by a tensor's order.
      key: random key, for methods that are random.
      shardings: as for :func:`merge_task_vectors`.

    Returns:
      The same tree, float32, with more zeros.

    Raises:
      MergeError: for a merge rule, a random method without a key, NaN or infinity, or stacks of different T.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.sparsify({"w": jnp.array([[1.0, -4.0]])}, tj.magnitude(0.5))["w"].tolist()
      [[0.0, -4.0]]
    """
    if output_of(sparsifier) != "stack":
        raise MergeError("sparsify takes a sparsifier, not a merge rule: call tj.merge or tj.merge_task_vectors")
    return _run_stack(stack, sparsifier, key, layout, shardings)


def explain(base, models: Sequence[Any], sparsifier: AnyStep, *, key=None) -> dict[str, dict[str, np.ndarray]]:
    """What a sparsifier does to each tensor, in numbers.

    Args:
      base: the pretrained parameters.
      models: T fine-tuned parameters.
      sparsifier: any sparsifier.
      key: random key, for methods that are random.

    Returns:
      For each float tensor that is not empty, by path: ``quantile_ratio`` (T,), of the sparsifier's own quantiles if it
      is TADrop, else of (.95, .99); ``sparsity`` (T,), the share of zeros after; ``norm`` and ``norm_after`` (T,),
      Euclidean; and ``sign_conflict``, the share of entries whose non-zero task values differ in sign, before.

    Raises:
      MergeError: as :func:`merge`.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> report = tj.explain({"w": jnp.zeros(4)}, [{"w": jnp.array([1.0, 2.0, 3.0, 8.0])}], tj.magnitude(0.5))
      >>> report["w"]["sparsity"].tolist()
      [0.5]
    """
    steps = explaining_steps(sparsifier, len(models))
    names, leaves, _ = named_leaves(base)
    columns = match(names, leaves, models)
    rows = [(n, b, c) for n, b, c in zip(names, leaves, columns, strict=True) if is_mergeable(b) and np.size(b)]
    check_contents(rows)

    def tensor(i: int) -> Tensor:
        name, leaf, column = rows[i]
        return Tensor(name, tuple(map(jnp.asarray, together(leaf, column))), jnp.asarray(leaf))

    at = {i: name for i, (name, _, _) in enumerate(rows)}
    results = _run_once(tensor, at, [(b, *c) for _, b, c in rows], names, steps, len(models), key)
    return {
        rows[i][0]: {k: np.asarray(v) for k, v in explanation(result.steps, result.carries).items()}
        for i, result in results.items()
    }


def quantile_ratios(stack, *, q_low=0.95, q_high=0.99):
    """The quantile ratio of each tensor of each task: what TADrop reads a tensor's sparsity off.

    Here the ratio has a gradient: that of the entries which are the two quantiles, evenly split among equal magnitudes,
    and 0 where a quantile is 0. (Inside :func:`tadrop_jax.tadrop` it decides what is kept, and is a constant.)

    Args:
      stack: tree of ``(T, *shape)`` float arrays; None leaves stay None.
      q_low: lower quantile in [0, 1], NumPy's method "lower".
      q_high: upper quantile, at least ``q_low``.

    Returns:
      Tree of float32 ``(T,)`` ratios in [0, 1]; 0 where the upper quantile is 0.

    Raises:
      MergeError: for stacks of different T, NaN or infinity.
      ParameterError: for quantiles outside [0, 1], or a lower one above the upper one.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.quantile_ratios({"w": jnp.array([[1.0, -2.0, 3.0, -8.0]])}, q_low=0.5, q_high=1.0)["w"].tolist()
      [0.25]
    """
    q_low, q_high = (single("quantile_ratios", n, q, 0, 1) for n, q in (("q_low", q_low), ("q_high", q_high)))
    ordered("quantile_ratios", q_low, q_high, "q_low <= q_high")
    step = ratio_step(q_low, q_high)
    treedef, leaves, results, tasks = _run_tensors(stack, (step,), None)
    for i, result in results.items():
        (carry,) = result.carries
        if is_traced(leaves[i]):  # someone may differentiate
            sizes = magnitude(jnp.asarray(leaves[i]).astype(jnp.float32))
            carry = {name: attached(found, sizes) for name, found in carry.items()}
        leaves[i] = step.report(carry)["quantile_ratio"] if carry else jnp.zeros((tasks,), jnp.float32)  # type: ignore[misc]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def with_sparsifier(sparsifier: AnyStep | None, rule: AnyStep) -> Chain:
    """The chain of a sparsifier and a rule, checked.

    Raises:
      MergeError: if either is not what its place asks for.
    """
    if output_of(rule) == "stack":
        raise MergeError("a merge needs a merge rule, e.g. tj.task_arithmetic(0.3); sparsifiers go to sparsifier=")
    if sparsifier is None:
        return chain(rule)
    if output_of(sparsifier) != "stack":
        raise MergeError("sparsifier= takes a sparsifier, e.g. tj.tadrop(), not a merge rule")
    return chain(sparsifier, rule)


def _run_tensors(stack, steps_of, key, layout=None, lies: Mapping = types.MappingProxyType({}), own=frozenset()):
    """Runs steps over a tree of stacks, without what stays each task's own: tree definition, leaves, results and T."""
    names, leaves, treedef = named_leaves(stack)
    at = {i: names[i] for i, leaf in enumerate(leaves) if leaf is not None}
    sizes = {}
    for i in at:
        if not is_mergeable(leaves[i]) or np.ndim(leaves[i]) < 1:
            raise MergeError(f"{names[i]!r} is no stack of task vectors: it wants a float array (T, *shape)")
        check_dtype(names[i], leaves[i])
        sizes.setdefault(np.shape(leaves[i])[0], names[i])
    if len(sizes) != 1:
        said = "; ".join(f"{name!r} has {t} tasks" for t, name in sizes.items()) or "it has no tensor"
        raise MergeError(f"a stack holds the same number of tasks in every tensor: {said}")
    (tasks,) = sizes
    if tasks == 0:
        raise MergeError("the stack holds no task")
    check_contents([(names[i], None, (leaves[i],)) for i in at])

    def tensor(i: int) -> Tensor:
        order, seed_name = laid_out(layout, names[i], np.ndim(leaves[i]) - 1)
        return Tensor(names[i], (jnp.asarray(leaves[i]),), None, order, seed_name, lies.get(names[i]))

    steps = steps_of if isinstance(steps_of, tuple) else expand(steps_of, tasks)
    at = {i: name for i, name in at.items() if name not in own}
    return treedef, leaves, _run_once(tensor, at, [(leaves[i],) for i in at], names, steps, tasks, key), tasks


def _run_once(tensor: Callable[[int], Tensor], at, held, names, steps, tasks: int, key, spare=frozenset()) -> dict:
    """The results by their places; weights that are tied count once in statistics of the tree, and are merged once.

    Args:
      tensor: what to run on at a place.
      at: the places, and the names there.
      held: for each of them the leaves.
      names: all of the tree: a pattern of a step has to match one.
      steps: see :func:`memory.run`, as the rest.
      tasks: T.
      key: random key or None.
      spare: arrays that are used up.
    """
    check_patterns([p for s in steps for p in s.named], names)
    places = [*at]
    firsts = [places[k] for k in tied(held)]
    aliases: dict[int, tuple[str, ...]] = dict.fromkeys(firsts, ())
    for i, first in zip(places, firsts, strict=True):
        if i != first:
            aliases[first] += (at[i],)
    tensors = [tensor(i)._replace(aliases=others) for i, others in aliases.items()]
    of_first = dict(zip(aliases, memory.run(steps, tensors, tasks, key, spare), strict=True))
    return {i: of_first[first] for i, first in zip(places, firsts, strict=True)}


def _run_stack(stack, whole: AnyStep, key, layout, shardings):
    named = _by_name(stack)
    lies = {} if shardings is None else shardings_by_name(shardings, named)
    per_task = per_task_patterns(whole)
    # Each name counts by itself, as in merge: a copy of what is tied may merge.
    held = [n for n, leaf in named.items() if per_task and leaf is not None and selected(n, per_task)]
    treedef, leaves, results, tasks = _run_tensors(stack, whole, key, layout, lies, frozenset(held))
    values = [results[i].value if i in results else None for i in range(len(leaves))]
    last = expand(whole, tasks)[-1:]
    if last and last[0].output == "bundle":
        check_patterns(per_task, named)
        own = tuple({n: named[n][t] for n in held} for t in range(tasks))
        shapes = [np.shape(leaf)[1:] for leaf in leaves]
        each = [without_first_axis(lies[name]) if name in lies else None for name in named]
        return _bundle(None, treedef, values, shapes, last[0], results.values(), own, tasks, each)
    return jax.tree_util.tree_unflatten(treedef, values)


def _bundle(base, treedef, values, shapes, rule: Step, results, own, tasks: int, lies: Sequence) -> Bundle:
    kind: Kind = rule.kind  # type: ignore[assignment]

    def packed(value, shape, lies):
        described = kind.parts(shape, tasks)
        return {n: pack(v, lies) if described[n].dtype == "bits" else v for n, v in value.items()}

    carry = next((r.carries[-1] for r in results if r.carries[-1]), {})
    scalars = scalars_of(rule, carry, tasks)
    if apart(values):
        scalars = {name: jnp.asarray(jax.device_get(value)) for name, value in scalars.items()}
    return Bundle(
        base=base,
        parts=tuple(None if v is None else packed(v, s, to) for v, s, to in zip(values, shapes, lies, strict=True)),
        scalars=scalars,
        own=own,
        kind=kind,
        treedef=treedef,
        shapes=tuple(None if v is None else s for v, s in zip(values, shapes, strict=True)),
        tasks=tuple(str(t) for t in range(tasks)),
    )


def _by_name(tree) -> dict[str, Any]:
    names, leaves, _ = named_leaves(tree)
    return dict(zip(names, leaves, strict=True))
