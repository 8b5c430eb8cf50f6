"""Pieces of tensors as steps see them, and the positions of their entries in 64 bits."""

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tadrop_jax import randomness
from tadrop_jax.errors import MergeError


class Piece(NamedTuple):
    """What a step sees: one piece of one tensor, of all tasks.

    A piece is the whole tensor in its natural shape S (in memory), one device's part of it (sharded), or a flat block
    (streamed). Steps are written so that they cannot tell.

    Attributes:
      stack: float32 ``(T, *S)``, the task vectors as the steps before left them.
      base: float32 ``S``, or None where only task vectors were given.
      tasks: the task that each entry of the leading axis belongs to.
      key: typed random key of this tensor, or None.
      position: a function that gives each entry's position in the row-major tensor (in PyTorch order where a layout
        is known): ``(high, low)`` uint32 arrays of shape S.
      valid: how many entries of the flattened piece are real (blocks are padded); an int or a traced scalar.
      order: permutation that brings S into PyTorch order, or None.
      given: the stack as it came, before any step.
      true: a boolean that is true, though XLA cannot know it; None where there is none.
      draw: which random numbers a step draws, see :class:`tadrop_jax.steps.Step`.
      numbers: of the step that looks, by name, see there.
      known: of the step that looks: what :meth:`shared` has made, and of which stack.
    """

    stack: jax.Array
    base: jax.Array | None = None
    tasks: tuple[int, ...] = ()
    key: jax.Array | None = None
    position: Callable[[], tuple[jax.Array, jax.Array]] | None = None
    valid: Any = None
    order: tuple[int, ...] | None = None
    given: jax.Array | None = None
    true: jax.Array | None = None
    draw: int = 0
    numbers: Mapping[str, Any] = types.MappingProxyType({})
    known: dict[str, tuple[jax.Array, Any]] | None = None

    def per_task(self, values) -> jax.Array:
        """Brings a number, or one number per task, into a shape that broadcasts against the stack."""
        if isinstance(values, tuple):
            values = jnp.stack([jnp.asarray(values[t], jnp.float32) for t in self.tasks])
        values = jnp.asarray(values, jnp.float32)
        return values if values.ndim == 0 else self.column(values)

    def column(self, values: jax.Array) -> jax.Array:
        """Brings statistics ``(T,)`` of any dtype into a shape that broadcasts against the stack.

        Raises:
          MergeError: if they are neither one for each task of this piece nor one for all.
        """
        tasks = self.stack.shape[0]
        if jnp.size(values) not in (1, tasks, len(self.tasks)):
            raise MergeError(f"there are {jnp.size(values)} numbers for the {tasks} tasks of a piece: see Piece.tasks")
        return jnp.reshape(values, (-1,) + (1,) * (self.stack.ndim - 1))

    def once(self, array: jax.Array) -> jax.Array:
        """An array that many look at, computed once: of shape S for every task, or small for every entry.

        XLA on CPU fuses what it is made of into what looks at it, and makes it anew for each task, or entry: a sum over
        tasks then costs the square of their number. It does not fuse across a conditional whose outcome it cannot know
        (an optimization barrier is gone before it fuses).
        """
        return array if self.true is None else lax.cond(self.true, lambda a: a, jnp.zeros_like, array)

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What several stages of a step and its ``apply`` look at, made by the first that asks.

        XLA does not see that two conditionals (:meth:`once`) are the same.
        """
        if self.known is None:
            return make()
        stack, value = self.known.get(name, (None, None))
        if stack is not self.stack:
            value = make()
            self.known[name] = self.stack, value
        return value

    def uniform(self) -> jax.Array:
        """One uniform number in [0, 1) for each entry and task, a function of key, draw, task and position alone."""
        if self.key is None or self.position is None:
            raise MergeError("this method is random: pass key=jax.random.key(seed)")
        key = randomness.drawn(self.key, self.draw)
        return randomness.uniform(key, self.tasks, *self.position())

    def groups(self, m: int) -> jax.Array:
        """The stack as ``(T, G, m)``: groups of m consecutive entries in PyTorch order, padded with zeros."""
        flat = jnp.reshape(self.in_torch_order(), (self.stack.shape[0], -1))
        flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % m)))
        return jnp.reshape(flat, (flat.shape[0], -1, m))

    def ungroup(self, groups: jax.Array) -> jax.Array:
        """The inverse of :meth:`groups`, for an array ``(T, G, m)``."""
        shape = self.stack.shape[1:]
        flat = jnp.reshape(groups, (groups.shape[0], -1))[:, : math.prod(shape)]
        order = self.order or range(len(shape))
        return self.from_torch_order(jnp.reshape(flat, (flat.shape[0], *(shape[a] for a in order))))

    def in_torch_order(self) -> jax.Array:
        """The stack ``(T, *S')`` with the axes as PyTorch has them: a linear layer's are ``(T, out, in)``."""
        return self.stack if self.order is None else jnp.transpose(self.stack, (0, *(a + 1 for a in self.order)))

    def from_torch_order(self, array: jax.Array) -> jax.Array:
        """The inverse of :meth:`in_torch_order`, for a stack ``(T, *S')`` or one tensor ``S'``."""
        if self.order is None:
            return array
        lead = array.ndim - len(self.order)
        inverse = sorted(range(len(self.order)), key=lambda a: self.order[a])  # type: ignore[index]
        return jnp.transpose(array, (*range(lead), *(a + lead for a in inverse)))


def piece_of(raw, site_order, tasks: int, key, shape, offsets=None, look: bool = False) -> Piece:
    """The piece that a step sees: task vectors in float32, whatever the storage dtype.

    Args:
      raw: base and models of this piece.
      site_order: permutation into PyTorch order, or None.
      tasks: T.
      key: of this tensor, or None.
      shape: S of the whole tensor.
      offsets: where the piece begins, along each axis.
      look: whether an entry may be looked at by itself; of an array that may be sharded out of sight it may not.
    """
    base, stack = base_and_stack(raw)
    local = stack.shape[1:]

    def position():
        return positions(local, shape, site_order, offsets)

    true = None
    if look and stack.size and jax.default_backend() == "cpu":
        bits = lax.bitcast_convert_type(lax.stop_gradient(stack[(0,) * stack.ndim]), jnp.uint32)
        true = (bits & 1) < 2
    return Piece(stack, base, tuple(range(tasks)), key, position, math.prod(local), site_order, true=true)


def base_and_stack(raw) -> tuple[jax.Array | None, jax.Array]:
    """Base S, or None where only task vectors were given, and task vectors ``(T, *S)``, in float32."""
    base, models = raw
    if base is None:
        return None, models[0].astype(jnp.float32)
    base = base.astype(jnp.float32)
    return base, jnp.stack([m.astype(jnp.float32) - base for m in models])


def positions(local, shape, order=None, offsets=None):
    """Row-major positions, in PyTorch order, of a shard of shape ``local``: high and low halves of 64 bits."""
    high = low = jnp.zeros(local, jnp.uint32)
    for axis in order or range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, local, axis)
        if offsets is not None:
            index = index + offsets[axis]
        high, low = _times_plus(high, low, shape[axis], index)
    return high, low


def _times_plus(high, low, factor: int, addend):
    """``value * factor + addend`` in 64 bits, for a factor below 2^32."""
    f1, f0 = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    a1, a0 = low >> 16, low & 0xFFFF
    middle = (a0 * f0 >> 16) + (a0 * f1 & 0xFFFF) + (a1 * f0 & 0xFFFF)
    carried = a1 * f1 + (a0 * f1 >> 16) + (a1 * f0 >> 16) + (middle >> 16)
    product = (a0 * f0 & 0xFFFF) | (middle << 16)
    total = product + addend
    return high * jnp.uint32(factor) + carried + (total < addend).astype(jnp.uint32), total
