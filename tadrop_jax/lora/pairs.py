"""Pairs of LoRA factors in trees of adapters, and the merge of what the tasks have in a shared basis."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tadrop_jax import linalg
from tadrop_jax.errors import MergeError, MismatchError
from tadrop_jax.merging import merge_task_vectors
from tadrop_jax.parameters import flag, number
from tadrop_jax.steps import AnyStep, output_of
from tadrop_jax.task_vector import check_names
from tadrop_jax.trees import is_mergeable

# PEFT's lora_A (r, in) and lora_B (out, r), with the adapter's name; Flax's lora_a (in, r) and lora_b (r, out).
_FACTOR = re.compile(r"lora_([ABab])(\.default)?(?![A-Za-z])")


class Pair(NamedTuple):
    """The factors of one weight in all tasks: task t changes it by ``b[t] @ a[t]``, scaling included.

    Attributes:
      name: of the weight, the factor's own name left out.
      a: T float32 arrays ``(r_t, in)``.
      b: T float32 arrays ``(out, r_t)``.
      flax: whether the tree holds them transposed.
      at: where the tree's leaves have the two factors.
    """

    name: tuple[str, ...]
    a: tuple[jax.Array, ...]
    b: tuple[jax.Array, ...]
    flax: bool
    at: tuple[int, int]


class Shared(NamedTuple):
    """The tasks of one weight in a shared basis: task t changes the weight by ``left @ stack[t] @ right``.

    Attributes:
      stack: ``(T, k, l)``.
      left: ``(out, k)``, or None for the identity.
      right: ``(l, in)``, or None for the identity.
    """

    stack: jax.Array
    left: jax.Array | None = None
    right: jax.Array | None = None


def merged_in_basis(
    method: str,
    adapters: Sequence[Any],
    rule: AnyStep,
    basis: Callable[[Pair], Shared],
    scaling,
    sparsifier: AnyStep | None,
    factored: bool,
    key,
):
    """Merges adapters in the bases of their weights.

    Args:
      method: its name, for messages.
      adapters: T trees.
      rule: any rule on task vectors that gives one model; it sees the stacks of all weights as one tree.
      basis: of one weight.
      scaling: a number, or one per task.
      sparsifier: a step before the rule, or None.
      factored: whether to give the merged adapter in place of dense changes.
      key: for random steps.

    Returns:
      See :func:`tadrop_jax.knots`.
    """
    factored = flag(method, "factored", factored)
    if output_of(rule) == "bundle":
        raise MergeError(f"{method} gives one model; this rule gives one for each task")
    found, leaves, treedef = pairs(method, adapters, scaling)
    shared = {"/".join(pair.name): basis(pair) for pair in found}
    stacks = {name: s.stack for name, s in shared.items()}
    merged: Any = merge_task_vectors(stacks, rule, sparsifier=sparsifier, key=key)
    changes: dict[tuple[str, ...], jax.Array] = {}
    for pair, (name, s) in zip(found, shared.items(), strict=True):
        b, a = _factors(merged[name], s)
        if factored:
            leaves[pair.at[0]], leaves[pair.at[1]] = (a.T, b.T) if pair.flax else (a, b)
        else:
            dense = linalg.matmul(b, a)
            changes[pair.name] = dense.T if pair.flax else dense
    return jax.tree_util.tree_unflatten(treedef, leaves) if factored else _nested(changes)


def _factors(merged, shared: Shared) -> tuple[jax.Array, jax.Array]:
    if shared.left is None:
        return merged, shared.right  # type: ignore[return-value]
    return shared.left, merged if shared.right is None else linalg.matmul(merged, shared.right)


def pairs(method: str, adapters: Sequence[Any], scaling) -> tuple[list[Pair], list[Any], Any]:
    """The pairs of all adapters, with leaves and tree definition of the first.

    Raises:
      MismatchError: if the adapters do not have the same weights, or shapes do not go together.
      MergeError: if there is no adapter, or a leaf is no half of a pair.
      ParameterError: for a scaling that is no number, or not one per task.
    """
    if not isinstance(adapters, (list, tuple)) or not adapters:
        raise MergeError(f"{method}: the adapters must come as a list of at least one tree")
    scaling = number(method, "scaling", scaling)
    scaling = scaling if isinstance(scaling, tuple) else (scaling,) * len(adapters)
    if len(scaling) != len(adapters):
        raise MergeError(f"{method}: scaling has {len(scaling)} values, but there are {len(adapters)} adapters")
    tables, first = [], None
    for adapter in adapters:
        flat, treedef = jax.tree_util.tree_flatten_with_path(adapter)
        first = first or ([leaf for _, leaf in flat], treedef)
        tables.append(_by_weight(method, flat))
    assert first is not None
    names = ["/".join(name) for name, _ in tables[0]]
    for t, table in enumerate(tables[1:], 1):
        check_names(names, ["/".join(name) for name, _ in table], f"{method}: adapter {t}", base_is="adapter 0")
    found = []
    for weight in tables[0]:
        name, flax = weight
        if any(weight not in table for table in tables):
            raise MismatchError(
                f"{method}: {'/'.join(name)!r} has PEFT's factors in some adapters and Flax's in others"
            )
        halves = [(_matrix(table[weight]["a"], flax), _matrix(table[weight]["b"], flax)) for table in tables]
        _check_shapes(method, "/".join(name), halves)
        a = tuple(a for a, _ in halves)
        b = tuple(b * s for (_, b), s in zip(halves, scaling, strict=True))
        at = tables[0][weight]
        found.append(Pair(name, a, b, flax, (at["a"][0], at["b"][0])))
    return found, *first


def _by_weight(method: str, flat) -> dict[tuple[tuple[str, ...], bool], dict[str, tuple[int, Any]]]:
    """From (name of the weight, whether Flax's) to the place and value of "a" and "b"."""
    table: dict = {}
    for i, (path, leaf) in enumerate(flat):
        keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        whole = "/".join(keys)
        at = next((k for k in reversed(range(len(keys))) if _FACTOR.search(keys[k])), None)
        if at is None or not is_mergeable(leaf):
            raise MergeError(f"{method}: {whole!r} is no LoRA factor (lora_A, lora_B); leave it out of the adapters")
        letter = _FACTOR.search(keys[at]).group(1)  # type: ignore[union-attr]
        rest = _FACTOR.sub("", keys[at]).replace("..", ".").strip("./")
        name = (*keys[:at], *((rest,) if rest else ()), *keys[at + 1 :])
        if name and name[-1] == "value":  # nnx
            name = name[:-1]
        table.setdefault((name, letter.islower()), {})[letter.lower()] = (i, leaf)
    for (name, flax), halves in table.items():
        if len(halves) < 2:
            lacks = {"a": "lora_b" if flax else "lora_B", "b": "lora_a" if flax else "lora_A"}[next(iter(halves))]
            raise MergeError(f"{method}: {'/'.join(name) or 'the tree'} lacks {lacks}")
    return table


def _matrix(half: tuple[int, Any], flax: bool) -> jax.Array:
    leaf = jnp.asarray(half[1], jnp.float32)
    return leaf.T if flax else leaf


def _check_shapes(method: str, name: str, halves) -> None:
    for t, (a, b) in enumerate(halves):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise MismatchError(
                f"{method}: the factors of {name!r} in adapter {t} do not go together: A (r, in) is {list(a.shape)}, "
                f"B (out, r) is {list(b.shape)}"
            )
        sides = (b.shape[0], a.shape[1])
        expected = (halves[0][1].shape[0], halves[0][0].shape[1])
        if sides != expected:
            raise MismatchError(f"{method}: {name!r} is {list(sides)} in adapter {t} and {list(expected)} in adapter 0")


def _nested(changes: Mapping[tuple[str, ...], jax.Array]):
    tree: dict = {}
    for name, value in changes.items():
        if not name:
            return value
        node = tree
        for key in name[:-1]:
            node = node.setdefault(key, {})
        node[name[-1]] = value
    return tree
