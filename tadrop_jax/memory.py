"""The in-memory and the sharded executor: runs steps over the tensors of a tree where they lie.

Everything runs through functions that are compiled once per step, shape and dtype, and that trace inside a user's
``jit``, ``grad`` and ``vmap``. A tensor that carries a ``NamedSharding`` over several devices runs in ``shard_map``:
counts and sums cross devices, tensors never do. Steps that want whole tensors, or groups or rows that lie across
devices (:func:`tadrop_jax.placement.is_local`), gather one tensor at a time.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tadrop_jax import randomness, selection, wide
from tadrop_jax.advancing import advance, global_stages, merge_stages
from tadrop_jax.pieces import base_and_stack, piece_of
from tadrop_jax.placement import apart, devices_of, place, without_first_axis
from tadrop_jax.reductions import combine, from_the_top, reduce_stage
from tadrop_jax.sites import Given, OfRun, Site, Tensor, crossed, given, kept, site_of
from tadrop_jax.stages import Sums, magnitudes
from tadrop_jax.steps import Piece, Step
from tadrop_jax.trees import is_traced
from tadrop_jax.wide import Wide

# Tensors that run together take at most this much in float32.
_BATCH_BYTES = 256 << 20


class Result(NamedTuple):
    """What a chain did to one tensor.

    Attributes:
      value: what the last step puts out (parameters in the base's dtype where a base was given).
      carries: the statistics of each step, by name; empty for steps that leave the tensor alone.
      steps: the chain as it is for this tensor.
    """

    value: Any
    carries: tuple[dict[str, jax.Array], ...]
    steps: tuple[Step, ...]


def run(
    steps: Sequence[Step], tensors: Sequence[Tensor], tasks: int, key=None, spare: frozenset[int] = frozenset()
) -> list[Result]:
    """Runs a chain of steps over all tensors of a tree.

    Args:
      steps: expanded steps (see :func:`tadrop_jax.steps.expand`).
      tensors: the float tensors; all of T tasks.
      tasks: T.
      key: random key, needed if a step is random.
      spare: ``id`` of each array of the models that is used up: a result takes its place, or it is freed.

    Returns:
      One result a tensor.

    Raises:
      MergeError: if a random step gets no key.
    """
    functions = OfRun()
    try:
        # What a user forbids to promote is meant for the user's own code.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _run(tuple(steps), tensors, tasks, key, spare, functions)
    finally:
        functions.clear()


def _run(steps: tuple[Step, ...], tensors: Sequence[Tensor], tasks: int, key, spare, functions: OfRun) -> list[Result]:
    key = randomness.check_needed(any(s.random for s in steps), key)
    there = [site_of(steps, t, tasks, functions) for t in tensors]
    sites, chains = [site for site, _ in there], [chain for _, chain in there]
    keys = [None if key is None else randomness.tensor_key(key, t.seed_name or t.path) for t in tensors]
    own = [given(k, chain) for k, chain in zip(keys, chains, strict=True)]

    def raw(k):
        """Base and models, brought to where the site wants them only while they are needed."""
        return _raw(tensors[k], sites[k])

    carries: list[tuple] = [tuple((None,) * len(s.stages) for s in site.steps) for site in sites]

    for stop in global_stages(steps):
        i, j = stop
        at = [k for k, site in enumerate(sites) if site.active[i] and chains[k][i] == steps[i]]
        if not at:
            continue
        stage = steps[i].stages[j]
        if isinstance(stage, Sums):
            parts = []
            for k in at:
                part, carries[k] = _partial(sites[k], stop)(raw(k), own[k], carries[k])
                parts.append(part)
            found = combine(stage, parts)
        else:
            for k in at:
                carries[k] = _prepared(sites[k], stop)(raw(k), own[k], carries[k])
            found = _global_ranks(stage, stop, at, tensors, sites, raw, own, carries)
        for k in at:
            done = list(carries[k][i])
            done[j] = found
            carries[k] = (*carries[k][:i], tuple(done), *carries[k][i + 1 :])

    finished = _finish(tensors, sites, raw, own, carries, spare)
    return [
        Result(value, tuple(merge_stages(c) for c in filled), chain)
        for (value, filled), chain in zip(finished, chains, strict=True)
    ]


def _finish(tensors, sites, raw, own, carries, spare) -> list[tuple]:
    """What the chain puts out for each tensor; tensors of one site that are wanted whole run together."""
    together: dict[Any, list[int]] = {}
    for k, site in enumerate(sites):
        whole = site.mesh is None and any(
            a and s.piece == "tensor" for a, s in zip(site.active, site.steps, strict=True)
        )
        where = tensors[k].lies or devices_of(tensors[k].like)
        alike = site, where, tuple(leaf.dtype for leaf in jax.tree.leaves(tensors[k][1:3]))
        batch = together.setdefault(alike if whole else k, [])
        batch.append(k)
    found: list[Any] = [None] * len(sites)
    for batch in together.values():
        site = sites[batch[0]]
        bytes_each = 4 * (site.tasks + 1) * max(math.prod(site.shape), 1)
        gathered = tensors[batch[0]].lies is not None  # one at a time, on every device
        size = 1 if gathered else max(_BATCH_BYTES // bytes_each, 1)
        for start in range(0, len(batch), size):
            at = batch[start : start + size]
            if len(at) == 1:
                results = [_finish_one(site, tensors[at[0]], raw(at[0]), own[at[0]], carries[at[0]], spare)]
            else:
                results = _finished_together(site)([(raw(k), own[k], carries[k]) for k in at])
            for k, (value, filled) in zip(at, results, strict=True):
                lies, shape = tensors[k].lies, getattr(value, "shape", None)
                if site.mesh is None and lies is not None:  # it was gathered for a step that needs it whole
                    if shape == tensors[k].like.shape:
                        value = place(value, lies)
                    elif site.stacked and shape == site.shape:
                        value = place(value, without_first_axis(lies))
                found[k] = value, filled
                for model in tensors[k].models:
                    if id(model) in spare and not model.is_deleted():
                        model.delete()
    return found


def _finish_one(site, tensor: Tensor, raw, own, carries, spare):
    base, models = raw
    # What has the shape and dtype of a model takes the place of one.
    alike = bool(spare) and site.active[-1] and site.steps[-1].output in ("vector", "parameters")
    if alike and id(tensor.models[0]) in spare:
        return _consuming(site)(models[0], base, models[1:], own, carries)
    return _finished(site)(raw, own, carries)


def _raw(tensor: Tensor, site: Site):
    lies = tensor.lies
    if lies is None:
        return tensor.base, tensor.models
    spec = PartitionSpec(None, *site.spec) if site.stacked else site.spec
    if site.mesh is None:  # a step wants more than lies on one device: gather this one tensor
        spec = PartitionSpec(*(None,) * tensor.like.ndim)
    to = NamedSharding(lies.mesh, spec)
    return jax.tree.map(lambda leaf: place(leaf, to), (tensor.base, tensor.models))


def _global_ranks(stage, stop, at, tensors, sites, raw, own, carries):
    """Selection over the tree: the counts of each round add over tensors."""
    i, j = stop
    n = sum(math.prod(sites[k].shape) for k in at)
    carry = merge_stages(carries[at[0]][i][:j])
    # The tensors agree on dtype and leading axis of what is selected; ask the first without computing it.
    probe = jax.eval_shape(_selected(sites[at[0]], stop), raw(at[0]), own[at[0]], carries[at[0]])
    names, ranks = from_the_top(stage.at(n, carry), n, probe.shape[0])

    scattered = apart([tensors[k].like for k in at])

    def count(pivots):
        parts = [_counted(sites[k], stop)(raw(k), own[k], carries[k], pivots) for k in at]
        return functools.reduce(wide.add, jax.device_get(parts) if scattered else parts)

    # What is selected hangs on the tensors, on what was found, and on the numbers of the steps before.
    seen = [(tensors[k][1:3], own[k], carries[k]) for k in at]
    eager = not is_traced((seen, ranks))
    group = selection.bits_per_round(sites[at[0]].one_pass)
    varies = selection.varying(*jax.tree.leaves(seen))
    found = selection.search(count, ranks, 32, jnp.uint32, group=group, eager=eager, varies=varies)
    found = selection.from_ordered_bits(found, probe.dtype)
    # What a step without a spec closes over may be traced, though the tensors are not.
    if stage.attached and (not eager or any(sites[k].functions is not None for k in at)):
        values = [_selected(sites[k], stop)(raw(k), own[k], carries[k]) for k in at]
        found = [selection.attached(f, values) for f in found]
    return dict(zip(names, found, strict=True))


def _whole(site: Site, raw, key) -> Piece:
    offsets = None
    if site.mesh is not None:
        local = (raw[1][0].shape[1:]) if site.stacked else raw[0].shape
        offsets = [
            jnp.uint32(0) if entry is None else (lax.axis_index(entry) * size).astype(jnp.uint32)
            for entry, size in zip(site.spec, local, strict=True)
        ]
    return piece_of(raw, site.order, site.tasks, key, site.shape, offsets, look=site.one_pass)


def _advance(site: Site, raw, own: Given, carries, stop=None):
    """Applies the steps before ``stop``, filling in the statistics of single tensors on the way."""
    n, names, steps = math.prod(site.shape), crossed(site), own.of(site.steps)

    def reduce(stage, x, carry):
        return reduce_stage(stage, x, carry, n, names, site.one_pass, _made(stage, x, raw))

    return advance(steps, site.active, _whole(site, raw, own.key), carries, reduce, stop)


def _made(stage, x: Piece, raw):
    """How magnitudes of task vectors as they came are made anew, for each round of counting; None for all else."""
    if stage.of is not magnitudes or x.stack is not x.given:
        return None
    return lambda pivots: selection.magnitude(base_and_stack(selection.anew(raw, pivots))[1])


def store(step: Step, reached, base, dtype):
    """What a chain puts out, in the dtype that is kept."""
    value = reached.value
    if value is None:  # the rule leaves this tensor alone
        return None if step.output == "bundle" else jnp.zeros_like(reached.x.stack[0]) if base is None else base
    if step.output == "vector" and base is not None:
        value = reached.x.base + value
    return value if dtype is None or step.output not in ("vector", "parameters") else value.astype(dtype)


def _carried(site: Site):
    """How statistics lie: on every device, but those of rows with their rows."""
    rows = PartitionSpec(None, *site.spec)
    return tuple(tuple(rows if g.scope == "row" else PartitionSpec() for g in s.stages) for s in site.steps)


def _mapped(site: Site, fn, outputs, extra=()):
    """Compiles a function of (raw, own, carries, ...), in shard_map for a sharded tensor."""
    if site.mesh is None:
        return jax.jit(fn)
    whole, stack = site.spec, PartitionSpec(None, *site.spec)
    raw = (None, (stack,)) if site.stacked else (whole, (whole,) * site.tasks)
    none, carries = PartitionSpec(), _carried(site)
    return jax.jit(
        jax.shard_map(
            fn,
            mesh=site.mesh,
            in_specs=(raw, none, carries, *(none,) * len(extra)),
            out_specs=outputs(whole, stack, none, carries),
            check_vma=False,
        )
    )


@kept
def _partial(site: Site, stop):
    def fn(raw, own, carries):
        at = _advance(site, raw, own, carries, stop)
        stage = site.steps[stop[0]].stages[stop[1]]
        n, names = math.prod(site.shape), crossed(site)
        return reduce_stage(stage, at.x, at.carry, n, names, site.one_pass), at.carries

    return _mapped(site, fn, lambda whole, stack, none, carries: (none, carries))


@kept
def _prepared(site: Site, stop):
    def fn(raw, own, carries):
        return _advance(site, raw, own, carries, stop).carries

    return _mapped(site, fn, lambda whole, stack, none, carries: carries)


@kept
def _selected(site: Site, stop):
    def fn(raw, own, carries):
        at = _advance(site, raw, own, carries, stop)
        stage = site.steps[stop[0]].stages[stop[1]]
        return stage.of(at.x, at.carry)

    return _mapped(site, fn, lambda whole, stack, none, carries: stack)


@kept
def _counted(site: Site, stop):
    def fn(raw, own, carries, pivots):
        at = _advance(site, raw, own, carries, stop)
        stage = site.steps[stop[0]].stages[stop[1]]
        made = _made(stage, at.x, raw)
        values = stage.of(at.x, at.carry) if made is None else made(pivots)
        flat = jnp.reshape(pivots, (-1, pivots.shape[-1], *(1,) * (values.ndim - 1)))
        axes = tuple(range(1, values.ndim))
        counts = selection.exact_count(selection.ordered_bits(values), flat, axes, site.one_pass)
        counts = Wide(*(jnp.reshape(c, pivots.shape) for c in counts))
        names = crossed(site)
        return wide.psum(counts, names) if names else counts

    return _mapped(site, fn, lambda whole, stack, none, carries: none, extra=("pivots",))


def _finisher(site: Site):
    def fn(raw, own, carries):
        reached, base = _advance(site, raw, own, carries), raw[0]
        if not site.steps:
            return reached.value, reached.carries
        return store(site.steps[-1], reached, base, None if base is None else base.dtype), reached.carries

    return fn


@kept
def _finished_together(site: Site):
    """The same for several tensors at once: decompositions of small matrices run batched."""

    def fn(given):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
        results = jax.vmap(_finisher(site))(*stacked)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(len(given))]

    return jax.jit(fn)


@kept
def _finished(site: Site):
    outputs = {"stack": "stack", "vector": "whole", "parameters": "whole"}
    kind = site.steps[-1].output if site.steps else "stack"

    def specs(whole, stack, none, carries):
        if kind == "bundle":
            lies = {"entries": whole, "tasks and entries": stack, "tasks": none}
            parts = site.steps[-1].kind.parts(site.shape, site.tasks)  # type: ignore[union-attr]
            return ({n: lies[p.over] for n, p in parts.items()} if site.active[-1] else None), carries
        return (stack if outputs[kind] == "stack" else whole), carries

    return _mapped(site, _finisher(site), specs)


@kept
def _consuming(site: Site):
    """The same, with the first model's buffer for the result."""
    finished = _finished(site)

    def fn(model, base, rest, own, carries):
        return finished((base, (model, *rest)), own, carries)

    return jax.jit(fn, donate_argnums=0)
