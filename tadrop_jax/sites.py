"""Where and on what the in-memory executor runs: tensors, and what the functions that are compiled for them hang on."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tadrop_jax.placement import AnyMesh, axis_names, entries_of, is_local, sharding_of
from tadrop_jax.steps import Step
from tadrop_jax.trees import is_traced

# So many compiled functions of a kind stay: one for each shape of a model, and a megabyte each.
_KEPT = 256


class Tensor(NamedTuple):
    """One tensor of the tree, of the base and of every model (or a stack of task vectors).

    Attributes:
      path: its name in the tree.
      models: the T fine-tuned tensors of shape S, or one stack ``(T, *S)`` if ``base`` is None.
      base: shape S, or None.
      order: permutation of the axes into PyTorch order, or None.
      seed_name: the name that random numbers are drawn by; the PyTorch name where a layout is given.
      sharding: where to merge it, if not where it lies.
      aliases: further names of it, where it is tied.
    """

    path: str
    models: tuple[Any, ...]
    base: Any = None
    order: tuple[int, ...] | None = None
    seed_name: str = ""
    sharding: NamedSharding | None = None
    aliases: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """S."""
        return self.models[0].shape[1:] if self.base is None else self.base.shape

    @property
    def like(self):
        """The array that says where the tensor lies."""
        return self.models[0] if self.base is None else self.base

    @property
    def lies(self) -> NamedSharding | None:
        """How it is spread over several devices; None if it is not, or if that cannot be seen."""
        return sharding_of(self.like) if self.sharding is None else self.sharding

    @property
    def size(self) -> int:
        """Entries of S."""
        return math.prod(self.shape)


class OfRun(dict):
    """Compiled functions of one run, for its sites alone."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Site(NamedTuple):
    """What a compiled function depends on besides shapes and dtypes; and where it is kept, if not for good.

    The steps are without their numbers (:attr:`Step.form`). What a step without a spec closes over may be a tracer of
    the caller's, or other with every call: it is compiled for one run, and forgotten.
    """

    steps: tuple[Step, ...]
    active: tuple[bool, ...]
    tasks: int
    stacked: bool
    order: tuple[int, ...] | None
    shape: tuple[int, ...]
    mesh: AnyMesh | None
    spec: PartitionSpec
    one_pass: bool
    functions: OfRun | None


class Given(NamedTuple):
    """What a compiled function is given besides tensors: the tensor's random key or None, and each step's numbers."""

    key: Any
    numbers: tuple[dict, ...]

    def of(self, forms: Sequence[Step]) -> tuple[Step, ...]:
        """The steps of these numbers."""
        pairs = zip(forms, self.numbers, strict=True)
        return tuple(dataclasses.replace(form, numbers=own) if own else form for form, own in pairs)


def given(key, steps: Sequence[Step]) -> Given:
    """What functions that are compiled for the forms of some steps are given."""
    return Given(key, tuple(jax.tree.map(_argument, dict(step.numbers)) for step in steps))


def _argument(number):
    """A number of Python as one that has a dtype: of float32, like the task vectors."""
    return number if isinstance(number, jax.Array) else np.float32(number)


def kept(make):
    """Caches a function that compiles for a site, and for a stop in its chain if there is one."""
    for_good = functools.lru_cache(maxsize=_KEPT)(make)

    @functools.wraps(make)
    def found(site: Site, *stop):
        if site.functions is None:
            return for_good(site, *stop)
        key = (make, site, *stop)
        if key not in site.functions:
            site.functions[key] = make(site, *stop)
        return site.functions[key]

    return found


def site_of(steps, tensor: Tensor, tasks: int, functions: OfRun) -> tuple[Site, tuple[Step, ...]]:
    """The site of a chain of expanded steps at a tensor, and the chain as it is there.

    Functions of steps without a spec go to those of the run.
    """
    stacked = tensor.base is None
    shape = tuple(tensor.shape[a] for a in tensor.order or range(len(tensor.shape)))
    active = tuple(s.covers(tensor.path, tensor.aliases) and tensor.size > 0 for s in steps)
    steps = tuple(s.for_tensor(tensor.path, shape, tasks, tensor.aliases) for s in steps)
    mesh, spec = None, PartitionSpec()
    lies = tensor.lies
    if lies is not None:
        spec = PartitionSpec(*entries_of(lies, tensor.like.ndim)[1 if stacked else 0 :])
        here = (is_local(s, tensor.shape, tensor.order, lies.mesh, spec) for s in steps)
        mesh = lies.mesh if all(h or not a for h, a in zip(here, active, strict=True)) else None
    # Where shardings cannot be seen, a variadic reduction of a sharded array would be gathered.
    hidden = jax.device_count() > 1 and mesh is None and is_traced((tensor.base, tensor.models))
    own = None if all(s.spec is not None for s in steps) else functions
    forms = tuple(s.form for s in steps)
    site = Site(forms, active, tasks, stacked, tensor.order, tuple(tensor.shape), mesh, spec, not hidden, own)
    return site, steps


def crossed(site: Site) -> tuple[str, ...]:
    """The mesh axes that statistics are added up over."""
    return () if site.mesh is None else axis_names(site.spec)
