"""Orbax checkpoints of flat trees: the one place that knows which of Orbax's interfaces we use."""

from pathlib import Path
from typing import Any

from tadrop_jax.errors import CheckpointError


def save(path, tree: Any) -> None:
    """Writes a tree of arrays to a new directory, by Orbax's stable interface.

    Raises:
      CheckpointError: if the directory exists and is not empty.
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    if path.exists():
        if any(path.iterdir()):
            raise CheckpointError(f"{path}: exists already and is not empty; nothing is overwritten")
        path.rmdir()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load(path) -> Any:
    """Reads a tree of arrays.

    Raises:
      CheckpointError: if there is no Orbax checkpoint.
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    if not path.is_dir():
        raise CheckpointError(f"{path}: does not exist")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path)
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise CheckpointError(f"{path}: is no Orbax checkpoint: {error}") from None
