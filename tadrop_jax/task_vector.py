"""Task vectors, and the check of two trees against each other."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tadrop_jax.errors import DtypeError, MergeError, MismatchError, RowsError
from tadrop_jax.trees import check_dtype, is_mergeable, named_leaves, tied


def task_vectors(base, models: Sequence[Any]):
    """``tau_t = theta_t - theta_0`` for all tasks, stacked.

    Args:
      base: pretrained parameters, any pytree.
      models: T fine-tuned parameters with the same tensors.

    Returns:
      The tree of the base; each float leaf a float32 stack ``(T, *shape)``, each integer or boolean leaf None. The
      difference is taken in float32 whatever the storage dtype, float64 too.

    Raises:
      MismatchError: naming the tensor and both values, if tensors, shapes or dtypes differ.

    Example:
      >>> import jax.numpy as jnp, tadrop_jax as tj
      >>> tj.task_vectors({"w": jnp.ones(2)}, [{"w": jnp.array([1.0, 3.0])}])["w"].tolist()
      [[0.0, 2.0]]
    """
    names, leaves, treedef = named_leaves(base)
    columns = match(names, leaves, models)
    rows = list(zip(leaves, columns, strict=True))
    stacks: list[Any] = []
    for i, first in enumerate(tied((leaf, *column) for leaf, column in rows)):
        leaf, column = rows[i]
        stacks.append(None if not is_mergeable(leaf) else _difference(leaf, *column) if first == i else stacks[first])
    return jax.tree_util.tree_unflatten(treedef, stacks)


@jax.jit
def _difference(base, *models):
    base = jnp.asarray(base, jnp.float32)
    return jnp.stack([jnp.asarray(m, jnp.float32) - base for m in models])


def match(names: Sequence[str], leaves: Sequence[Any], models: Sequence[Any], skip=frozenset()) -> list[tuple]:
    """Lines the models' leaves up with the base's, by name.

    Args:
      names: the base's names.
      leaves: the base's leaves.
      models: T trees.
      skip: names that need not be alike (they come from the base, or stay each task's own); their column is empty.

    Returns:
      For each leaf of the base, the T leaves of the models.

    Raises:
      MismatchError: naming the model, the tensor and both values.
      MergeError: for floats that JAX does not have.
    """
    if not isinstance(models, (list, tuple)):
        raise MergeError(f"the models must come as a list, got {type(models).__name__}")
    if not models:
        raise MergeError("no models to merge were given")
    if not any(name not in skip for name in names):
        raise MergeError("there is no tensor to merge")
    tables = []
    for t, model in enumerate(models):
        own_names, own_leaves, _ = named_leaves(model)
        table = dict(zip(own_names, own_leaves, strict=True))
        check_names(names, own_names, f"model {t}", skip)
        tables.append(table)
    columns: list[tuple] = []
    for name, leaf in zip(names, leaves, strict=True):
        if name in skip:
            columns.append(())
            continue
        check_dtype(name, leaf)
        column = tuple(table[name] for table in tables)
        for t, other in enumerate(column):
            check_alike(name, (np.shape(leaf), _dtype(leaf)), (np.shape(other), _dtype(other)), f"model {t}")
        columns.append(column)
    return columns


def _dtype(leaf):
    return getattr(leaf, "dtype", type(leaf).__name__)


def check_names(
    base: Sequence[str], model: Sequence[str], who: str, skip=frozenset(), base_is: str = "the base"
) -> None:
    """Refuses missing and extra tensors, all at once.

    Raises:
      MismatchError: with the names.
    """
    ours, theirs = set(base), set(model)
    missing = [n for n in base if n not in theirs and n not in skip]
    extra = [n for n in model if n not in ours and n not in skip]
    if missing or extra:
        said = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)}, which {base_is} lacks"] * bool(
            extra
        )
        raise MismatchError(f"{who} {' and '.join(said)}")


def check_alike(name: str, base: tuple, model: tuple, who: str, base_is: str = "the base") -> None:
    """Refuses a tensor whose shape or dtype differs from the base's; each side is (shape, dtype).

    Raises:
      MismatchError: with the tensor's name and both values.
    """
    for what, expected, found in zip(("shape", "dtype"), base, model, strict=True):
        if expected != found:
            show = list if what == "shape" else str
            rows = what == "shape" and expected and found and expected[1:] == found[1:]
            error = DtypeError if what == "dtype" else RowsError if rows else MismatchError
            raise error(f"tensor {name!r} has {what} {show(found)} in {who} and {show(expected)} in {base_is}")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return f"tensor{'s' * (len(names) > 1)} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
