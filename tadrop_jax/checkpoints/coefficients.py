"""Learned coefficients on disk: ``coefficients/NAME`` for each tensor, or ``coefficients``, and ``losses``."""

from pathlib import Path

import numpy as np

from tadrop_jax.errors import CheckpointError, MergeError

_SHARED = "coefficients"


def save(path, coefficients, losses, format: str = "safetensors") -> None:
    """Writes coefficients and losses to a new directory.

    Args:
      path: a directory that does not exist, or is empty.
      coefficients: ``(T,)``, or a tree of them; None leaves are left out.
      losses: ``(steps, T)``.
      format: ``"safetensors"`` or ``"orbax"``.

    Raises:
      MergeError: for another format.
      CheckpointError: if the directory is not empty or cannot be written.
    """
    from tadrop_jax.checkpoints import orbax
    from tadrop_jax.checkpoints.safetensors import check_directory, open_sink
    from tadrop_jax.trees import named_leaves

    tensors = {"losses": np.asarray(losses, np.float32)}
    if getattr(coefficients, "ndim", None) == 1:
        tensors[_SHARED] = np.asarray(coefficients, np.float32)
    else:
        names, leaves, _ = named_leaves(coefficients)
        pairs = zip(names, leaves, strict=True)
        tensors |= {f"{_SHARED}/{n}": np.asarray(leaf, np.float32) for n, leaf in pairs if leaf is not None}
    if format == "orbax":
        orbax.save(path, tensors)
        return
    if format != "safetensors":
        raise MergeError(f"format must be 'safetensors' or 'orbax', got {format!r}")
    check_directory(Path(path), "coefficients are loaded from one")
    with open_sink(Path(path), {n: (v.dtype, v.shape) for n, v in tensors.items()}) as sink:
        for name, value in tensors.items():
            sink.write(name, 0, np.ravel(value))
            sink.mark_done(name)
        sink.finish()


def load(path, like=None) -> tuple:
    """Reads what :func:`save` wrote.

    Args:
      path: its directory.
      like: a tree like the base's, to get the coefficients in that type; None gives nested dicts, split at '/'.

    Returns:
      Coefficients and losses.

    Raises:
      CheckpointError: if there are no coefficients.
      MergeError: if ``like`` lacks a tensor that has coefficients.
    """
    import jax
    import jax.numpy as jnp

    from tadrop_jax.checkpoints import orbax
    from tadrop_jax.checkpoints.bundles import nested
    from tadrop_jax.checkpoints.safetensors import open_source
    from tadrop_jax.trees import named_leaves

    path = Path(path)
    if any(path.glob("*.safetensors")):
        with open_source(path) as source:
            tensors = {n: source.read(n, 0, i.size).reshape(i.shape) for n, i in source.tensors.items()}
    else:
        tensors = orbax.restore(path)
    if "losses" not in tensors:
        raise CheckpointError(f"{path}: holds no learned coefficients")
    losses = np.asarray(tensors["losses"])
    if _SHARED in tensors:
        return jnp.asarray(tensors[_SHARED]), losses
    found = {n.removeprefix(f"{_SHARED}/"): jnp.asarray(v) for n, v in tensors.items() if n != "losses"}
    if like is None:
        return nested(found), losses
    names, _, treedef = named_leaves(like)
    absent = sorted(set(found) - set(names))
    if absent:
        raise MergeError(f"{path}: has coefficients for {absent[0]!r}, which like= lacks")
    return jax.tree_util.tree_unflatten(treedef, [found.get(n) for n in names]), losses
