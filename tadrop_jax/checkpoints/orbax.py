"""Orbax checkpoints of any tree: the one place that knows which of Orbax's interfaces we use.

Arrays that are spread over the devices of several processes stay spread: each process writes its own shards to the one
checkpoint, and reads from it what its devices are to hold. All processes make the same calls, and see the same files.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from tadrop_jax.errors import CheckpointError


def save(path, tree: Any) -> None:
    """Writes a tree of arrays to a new directory, by Orbax's stable interface.

    Args:
      path: a directory that does not exist, or is empty; or ``gs://...``, as Orbax takes it.
      tree: a tree of arrays. On several processes arrays are spread over the devices of all of them; an array of NumPy
        is the same in each, and written once.

    Raises:
      CheckpointError: if the directory exists and is not empty.

    Example:
      >>> import jax, tempfile
      >>> path = tempfile.mkdtemp()
      >>> save(path, {"w": jax.numpy.ones(4)})
      >>> restore(path)["w"].sum()
      np.float32(4.0)
    """
    import jax
    import orbax.checkpoint as ocp

    path = _path(path)
    with contextlib.suppress(FileNotFoundError):  # of several processes the first one may take it away meanwhile
        if path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path}: exists already and is not empty; nothing is overwritten")
    if path.exists() and jax.process_index() == 0:
        path.rmdir()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, shardings: Any = None) -> Any:
    """Reads a tree of arrays, each where it is to lie.

    Of a tensor a process reads the chunks that its devices hold a part of. Orbax writes a chunk for each shard that
    there was, or one a tensor if it was not spread: then every process reads all of it, and keeps its part.

    Args:
      path: an Orbax checkpoint.
      shardings: ``(name, shape) -> sharding`` for the '/'-joined name of each tensor, or a tree of shardings as the
        checkpoint; None gives arrays of NumPy, whole, in every process.

    Returns:
      The tree as Orbax keeps it: nested dictionaries, whatever types the tree had that was saved.

    Raises:
      CheckpointError: if there is no Orbax checkpoint, or it does not fit its shardings.

    Example:
      >>> import jax, tempfile
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> path = tempfile.mkdtemp()
      >>> save(path, {"dense": {"kernel": jax.numpy.ones((8, 4))}})
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> rows = lambda name, shape: NamedSharding(mesh, PartitionSpec("x"))
      >>> restore(path, rows)["dense"]["kernel"].sharding == rows("kernel", (8, 4))
      True
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    path = _path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: does not exist")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            described = checkpointer.metadata(path).item_metadata
            if described is None:
                raise ValueError("it does not describe its arrays")
            to = _shardings(described.tree, shardings)
            how = jax.tree.map(
                lambda s: ocp.RestoreArgs(restore_type=np.ndarray) if s is None else ocp.ArrayRestoreArgs(sharding=s),
                to,
                is_leaf=lambda s: s is None,
            )
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
    except CheckpointError:
        raise
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise CheckpointError(f"{path}: is no Orbax checkpoint: {error}") from None


def _path(path):
    """An absolute path, or an address such as ``gs://bucket/folder``, with the methods of ``pathlib.Path``."""
    from etils import epath

    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _shardings(described, shardings: Callable | Any) -> Any:
    """A sharding or None for each array of a checkpoint."""
    import jax

    from tadrop_jax.trees import path_name

    if shardings is None:
        return jax.tree.map(lambda leaf: None, described)
    if callable(shardings):
        return jax.tree_util.tree_map_with_path(lambda p, leaf: shardings(path_name(p), tuple(leaf.shape)), described)
    try:
        return jax.tree.map(lambda leaf, to: to, described, shardings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the tree of shardings does not fit the checkpoint: {error}") from None
