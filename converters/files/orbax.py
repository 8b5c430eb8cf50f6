"""Orbax checkpoints of a tree of arrays (PyTreeCheckpointer, StandardCheckpointer, the v1 interface, one step's item).

Leaves are read one by one through TensorStore, the store that Orbax writes to, so that a leaf is in memory only while
it is used. Writing goes through Orbax in groups of leaves; the result opens in both of Orbax's interfaces.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.leaves import Leaf

METADATA = "_METADATA"
# Where the tree lies below a directory: itself, an item of the v1 interface, of a CheckpointManager.
_ITEMS = ("", "state", "default", "params", "model", "pytree")
_GROUP_BYTES = 1 << 26
# A process that wants part of a tensor reads the chunks that hold it: not all of it, as without this.
_CHUNK_BYTES = 16 << 20


def find(directory: Path) -> Path | None:
    """The directory that holds the tree, below one that may be a checkpoint; None where there is none."""
    return next((directory / item for item in _ITEMS if (directory / item / METADATA).is_file()), None)


def read(directory: Path) -> dict[str, Leaf]:
    """The arrays of a checkpoint, by their '/'-joined paths.

    Args:
        directory: one that `find` gives.

    Raises:
        ConversionError: the checkpoint is damaged, incomplete, or holds something else than arrays.
    """
    import tensorstore

    file = directory / METADATA
    try:
        described = json.loads(file.read_text())
        leaves = {tuple(k["key"] for k in e["key_metadata"]): e for e in described["tree_metadata"].values()}
        keys = {key: e["value_metadata"].get("value_type") for key, e in leaves.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file}: is no description of an Orbax checkpoint: {error!r}") from None
    for key in keys:  # they become paths of files
        if any(not str(part).strip(".") or "/" in str(part) or "\0" in str(part) for part in key):
            raise ConversionError(f"{file}: {list(key)} is no path of a tree.")
    driver = "zarr3" if described.get("use_zarr3") else "zarr"
    base = {"driver": "file", "path": f"{directory.resolve()}/"}
    opening = {}
    for key, kind in keys.items():
        if kind in ("None", "Dict", "List", "Tuple", "NamedTuple"):  # empty containers
            continue
        name = ".".join(map(str, key))
        store: Any = {"driver": "ocdbt", "base": base, "path": name + "/"}
        if not described.get("use_ocdbt", True):
            store = {"driver": "file", "path": f"{directory.resolve()}/{name}/"}
        spec = {"driver": driver, "kvstore": store}
        opening["/".join(map(str, key))] = tensorstore.open(spec, open=True, read=True)
    found, problems = {}, []
    for name, future in opening.items():
        try:
            found[name] = _leaf(directory, name, future.result())
        except (ValueError, OSError) as error:
            problems.append(f"damaged: {name}: {str(error).splitlines()[0]}")
    if problems:
        raise ConversionError(f"{directory}: the Orbax checkpoint is incomplete or damaged:", problems)
    return found


def _leaf(directory: Path, name: str, store: Any) -> Leaf:
    def read() -> np.ndarray:
        try:
            return np.asarray(store.read().result())
        except (ValueError, OSError) as error:
            raise ConversionError(f"{directory}: {name} cannot be read: {error}") from None

    return Leaf(store.shape, store.dtype.numpy_dtype, read)


def write(directory: Path, tensors: Mapping[str, Any], group_bytes: int = _GROUP_BYTES) -> None:
    """Writes arrays or leaves as the nested tree that their '/'-joined names tell.

    Args:
        directory: where to; it must exist, and may hold other files.
        tensors: by name.
        group_bytes: so much is read at a time (one tensor at least).

    Raises:
        ConversionError: a name holds what Orbax takes for a step of a path.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    dotted = [name for name in tensors if "." in name]
    if dotted:
        raise ConversionError(f"{directory}: Orbax cannot tell '.' in a name from a path: {', '.join(dotted[:4])}")
    scratch = (directory / "orbax.writing").resolve()  # Orbax overlooks names that begin with a dot
    context = ocp.Context()
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES)
    with _quiet(), context:
        for group in _groups(tensors, group_bytes):
            tree: dict[str, Any] = {}
            for name in group:
                *parents, last = name.split("/")
                node = tree
                for key in parents:
                    node = node.setdefault(key, {})
                node[last] = np.ascontiguousarray(np.asarray(tensors[name])).reshape(tensors[name].shape)
            ocp.partial.save(str(scratch), tree)
        ocp.partial.finalize(str(scratch))
    for part in (scratch / "state").iterdir():
        part.rename(directory / part.name)
    shutil.rmtree(scratch)


def _groups(tensors: Mapping[str, Any], most: int) -> Iterator[list[str]]:
    group: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if group and filled + tensor.nbytes > most:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += tensor.nbytes
    yield group


@contextlib.contextmanager
def _quiet():
    """Orbax warns of things that are as they should be here (no sharding, one process).

    What it fails at, as on a full disk, it raises; its log would tell the same before, with a traceback.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
