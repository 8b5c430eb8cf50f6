"""Flax modules to files and directories, and from one layout and format to another."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import families
from converters.errors import ConversionError, reading
from converters.files import write_tensors
from converters.files.sidecars import sidecars
from converters.loading import NOTE, Opened, abstract, open_model
from converters.mapping import flatten, translate
from converters.names import Origin, restored

_SHARD = 5_000_000_000


def save(
    directory: str | os.PathLike,
    model: Any,
    config: Any = None,
    *,
    architecture: str | None = None,
    to: str = "torch",
    format: str | None = None,
    max_shard_size: int = _SHARD,
) -> None:
    """Writes a Flax model as a directory; transformers' `from_pretrained` opens a PyTorch one of its architectures.

    Args:
        directory: where to; must be absent or empty, and appears complete or not at all.
        model: an NNX module of ours, or its parameters in any tree (`nnx.State`, nested dictionaries).
        config: the family's Config; None takes the module's own.
        architecture: a name of `converters.families.ARCHITECTURES`, to write another layout than the model was read
            from; None writes the same.
        to: "torch" for the names and axes of the architecture, "flax" for those of the module.
        format: "safetensors", which is the only one of "torch"; "orbax" (the default of "flax"), "msgpack" (with the
            names that transformers 4 gave its Flax models) or "npz" (with the names of the architecture, if it is one
            of Google's archives).
        max_shard_size: bytes of a safetensors file.

    Raises:
        ConversionError: the directory is not empty or cannot be made, the configuration is missing, or a parameter is
            unmapped.
        OSError: writing failed midway; nothing is left behind.

    Example:
        >>> save("models/my-vit", module)  # doctest: +SKIP
    """
    directory = Path(directory)
    config = getattr(model, "config", None) if config is None else config
    if config is None:
        raise ConversionError(f"{directory}: pass config= with bare parameters")
    entry = families.architecture(architecture) if architecture else families.architecture_of(model, config)
    package = families.package_of(entry)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(model).items()}
    origin = getattr(model, "origin", None) or Origin(entry.name)
    _write(directory, leaves, package, entry, config, origin, {}, to, format, max_shard_size)


def convert(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    to: str,
    format: str | None = None,
    architecture: str | None = None,
    config: Any = None,
    max_shard_size: int = _SHARD,
) -> Opened:
    """Converts a checkpoint of PyTorch or of Flax, leaf by leaf: one tensor is in memory at a time.

    `config.json`, tokenizer and processor files travel along.

    Args:
        source: as in `converters.load`.
        directory: where to; must be absent or empty, and appears complete or not at all.
        to: "torch" or "flax", as in `converters.save`.
        format: as in `converters.save`.
        architecture: what to write; it must have the same module as what is read. None writes what is read.
        config: a Config of the family, or the contents of a `config.json`, where the files do not tell it, or tell it
            wrongly: it is what is written, too.
        max_shard_size: bytes of a safetensors file.

    Returns:
        What was read.

    Raises:
        ConversionError: as `converters.load` and `converters.save`, or the source cannot be read.
        OSError: writing failed midway; nothing is left behind.

    Example:
        >>> convert("models/gpt2", "models/gpt2-flax", to="flax")  # doctest: +SKIP
    """
    source, directory = Path(source), Path(directory)
    _check(directory, to, format)
    with reading(source):
        opened = open_model(source, config=config)
    beside = {name: file for name, file in _beside(source).items() if config is None or name != "config.json"}
    entry = families.architecture(architecture) if architecture else opened.entry
    if (
        not architecture
        and to == "torch"
        and any("/" in row.torch for row in opened.package.table(opened.config, entry.name))
    ):
        entry = families.counterpart(entry)  # a layout of trees: PyTorch has other names for it
    if families.module_of(entry) is not families.module_of(opened.entry):
        raise ConversionError(f"{source}: is {opened.entry.name}, which cannot be written as {entry.name}")
    _write(
        directory,
        opened.leaves,
        opened.package,
        entry,
        opened.config,
        opened.origin,
        beside,
        to,
        format,
        max_shard_size,
    )
    return opened


def in_layout_of(model: Opened, base: Opened) -> dict[str, Any]:
    """The tensors of one checkpoint with the names and axes of another's files.

    Args:
        model: whose tensors.
        base: whose layout; copies and buffers that its files hold are made for the model too.

    Returns:
        Leaves by name.

    Raises:
        ConversionError: their modules differ.
    """
    try:
        tensors = translate(model.leaves, base.rows, forward=False, expect=None)
    except ConversionError as error:
        at = f"{model.stored.path}: cannot be brought into the layout of {base.stored.path}:"
        raise ConversionError(at, error.problems) from error
    if base.rows != base.package.table(base.config, base.entry.name):
        return tensors  # a tree with the paths of the module, or of transformers 4
    return restored(tensors, base.package, base.entry, base.config, base.origin)


def _write(directory, leaves, package, entry, config, origin, beside, to, format, max_shard_size) -> None:
    """Writes leaves of a model, and the files `beside` them, by name."""
    format = _check(directory, to, format)
    expect = abstract(package, config, entry)
    rows = package.table(config, entry.name)
    tensors = translate(leaves, rows, forward=False, expect=expect)  # checks the leaves, whatever is written
    note: dict[str, Any] = {}
    same = origin.architecture == entry.name
    trees = any("/" in row.torch for row in rows)
    if to == "torch" or (trees and format == "npz"):
        tensors = restored(tensors, package, entry, config, origin)
    else:
        old = families.offered(package, "flax_table", None, config, entry.name) if format == "msgpack" else None
        tensors = leaves if old is None else translate(leaves, old, forward=False)
    if to == "flax":
        note = (origin if same else Origin(entry.name)).note() | {"config": config.to_dict()}
    raw = {**config.to_dict(), "architectures": [entry.name]}
    raw = dict(families.offered(package, "describe", raw, config, entry.name))
    raw["dtype"] = str(next(iter(tensors.values())).dtype)
    if "torch_dtype" in raw:  # the name that transformers 4 has for it
        raw["torch_dtype"] = raw["dtype"]
    files: dict[str, Any] = {"config.json": _json(raw)} | ({NOTE: _json(note)} if note else {})
    files |= {name: file for name, file in beside.items() if name != "config.json" or same}
    _appear(directory, files.items(), lambda partial: write_tensors(partial, tensors, format, max_shard_size))


def _beside(source: Path) -> dict[str, Path]:
    """The files that travel along."""
    with reading(source):
        return {name: file for name, file in sidecars(source).items() if name != NOTE}


def _check(directory: Path, to: str, format: str | None) -> str:
    """The format, checked together with the directory."""
    if to not in ("torch", "flax"):
        raise ConversionError(f"to must be torch or flax, got {to!r}")
    allowed = ("safetensors",) if to == "torch" else ("orbax", "safetensors", "msgpack", "npz")
    format = format or allowed[0]
    if format not in allowed:
        raise ConversionError(f"format must be {' or '.join(allowed)} with {to}, got {format!r}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConversionError(f"{directory}: the directory is not empty")
    return format


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _appear(directory: Path, files: Iterable[tuple[str, bytes | Path]], write: Any) -> None:
    """Writes into a directory beside it, which gets its name when all is done."""
    directory = directory.resolve()  # a link stays one, and "." has a name
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ConversionError(f"{directory}: cannot be written: {error.strerror}") from error
    try:
        partial.chmod(0o755)
        for name, data in files:
            (partial / name).parent.mkdir(exist_ok=True)
            if isinstance(data, Path):
                with reading(data):
                    data = data.read_bytes()
            (partial / name).write_bytes(data)
        write(partial)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
