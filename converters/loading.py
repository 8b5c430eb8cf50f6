"""Files and directories to Flax modules."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters import families
from converters.errors import ConversionError, configuring, reading
from converters.files import Stored, open_tensors
from converters.files.sidecars import companion
from converters.mapping import Row, flatten, nest, translate
from converters.names import Origin, learned, spelled

NOTE = "conversion.json"  # what a Flax directory of ours says of the files that it was made from


class Opened(NamedTuple):
    """A checkpoint of a known architecture. Its tensors were checked against the module, but not read.

    Attributes:
        entry: the architecture.
        package: its family's package.
        config: the family's Config.
        leaves: the module's parameters by their paths.
        rows: the table that the files go by.
        origin: what a module has to remember of the files.
        stored: the files.
    """

    entry: families.Architecture
    package: Any
    config: Any
    leaves: dict[str, Any]
    rows: Sequence[Row]
    origin: Origin
    stored: Stored


def load(source: str | os.PathLike, *, config: Any = None, architecture: str | None = None) -> tuple[Any, Any]:
    """Loads a checkpoint, of PyTorch or of Flax, as a Flax NNX module.

    Args:
        source: a directory with its `config.json`, or a file beside which there may be one: safetensors, a torch pickle
            (read without running it), an Orbax checkpoint, msgpack or npz.
        config: a Config of the family, or the contents of a `config.json`, in place of what the files say.
        architecture: a name of `converters.families.ARCHITECTURES`; None finds it out.

    Returns:
        The module, and its parameters as an `nnx.State`, in the file's dtypes (float64 in float32, unless JAX is told
        to have it; `convert` keeps it).

    Raises:
        ConversionError: the architecture is unknown, a file is missing or damaged, or tensors are unmapped,
            missing or of the wrong shape, all of them named.

    Example:
        >>> module, params = load("models/my-vit")  # doctest: +SKIP
        >>> logits = module(images)  # images (batch, height, width, channels)  # doctest: +SKIP
    """
    import jax.numpy as jnp
    from flax import nnx

    opened = open_model(source, config=config, architecture=architecture)
    graph, params = nnx.split(abstract(opened.package, opened.config, opened.entry))
    # Copies: a file that is mapped into memory may be gone tomorrow.
    arrays = {path: jnp.array(np.asarray(leaf)) for path, leaf in opened.leaves.items()}
    nnx.replace_by_pure_dict(params, nest(arrays))
    module = nnx.merge(graph, params)
    module.origin = opened.origin
    return module, nnx.state(module, nnx.Param)


def open_model(source: str | os.PathLike, *, config: Any = None, architecture: str | None = None) -> Opened:
    """Opens a checkpoint and finds out what it is, before a tensor is read. Arguments and errors as `load`."""
    source = Path(source)
    beside, noted_in = companion(source, "config.json"), companion(source, NOTE)
    raw, note = read_json(beside), read_json(noted_in)
    described = beside if config is None else "config"
    given = dict(config) if isinstance(config, Mapping) else {}
    if isinstance(config, Mapping):
        raw, config = given, None
    name = architecture or note.get("architecture")
    if name is None and raw.get("architectures"):
        # An unsupported architecture is told before files are looked at.
        with configuring(described, "model"):
            name = families.detect(raw, (), beside).name
    stored = open_tensors(source)
    if told := stored.why_no_model:
        raise ConversionError(f"{source}: {told}")
    entry = families.architecture(name) if name else families.detect(raw, stored.tensors, beside)
    package = families.package_of(entry)
    tensors, spelling = spelled(stored.tensors, package, entry)
    with configuring(described, entry.name):
        if config is None and "config" in note:
            config = package.Config.from_dict({**note["config"], **given})
        elif config is None:
            shapes = {name: tuple(leaf.shape) for name, leaf in tensors.items()}
            make = getattr(package, "configure", lambda raw, shapes, name: package.Config.from_dict(raw))
            config = make(raw, shapes, entry.name)
        # Each layer has a tensor; a module of a billion layers would never be done.
        if (depth := getattr(config, "depth", 0)) > len(tensors):
            raise ConversionError(f"{described}: tells of {depth} layers, and {source} holds {len(tensors)} tensors")
        expect = abstract(package, config, entry)
    if stored.is_tree:
        leaves, problems, rows = _of_tree(stored.tensors, tensors, package, entry, config, expect)
        noted = Origin.noted(entry.name, note if note.get("architecture") == entry.name else {}, noted_in)
        by_table = rows == package.table(config, entry.name)
        origin = Origin(entry.name).spelled_as(spelling) if by_table else noted
    else:
        kept, origin, problems = learned(tensors, spelling, package, entry, config)
        leaves, more, rows = _mapped(kept, package.table(config, entry.name), expect)
        problems += more
    if problems:
        raise ConversionError(f"{source}: cannot be loaded as {entry.name}:", problems)
    return Opened(entry, package, config, leaves, rows, origin, stored)


_Reading = tuple[dict[str, Any], list[str], Sequence[Row]]


def open_all(sources: Sequence[str | os.PathLike]) -> list[Opened]:
    """Opens checkpoints of one architecture; one without a `config.json` is taken to be as the first that has one.

    Raises:
        ConversionError: as `load`, or none of them tells what it is.
    """

    def told(source: Path) -> bool:
        return any(companion(source, name).exists() for name in ("config.json", NOTE))

    paths = [Path(source) for source in sources]
    known = next((path for path in paths if told(path)), paths[0])
    first = open_model(known)

    def opened(path: Path) -> Opened:
        if path == known:
            return first
        return open_model(path) if told(path) else open_model(path, config=first.config, architecture=first.entry.name)

    return [opened(path) for path in paths]


def _mapped(tensors: Mapping[str, Any], rows: Sequence[Row], expect: Any) -> _Reading:
    try:
        return translate(tensors, rows, forward=True, expect=expect), [], rows
    except ConversionError as error:
        return {}, list(error.problems), rows


def _of_tree(
    tensors: Mapping[str, Any], spelled_tensors: Mapping[str, Any], package: Any, entry, config: Any, expect: Any
) -> _Reading:
    """The leaves of a tree: with the module's own paths, those of transformers 4, or those of the entry's table.

    The first that fits in every name and shape is it; if none does, the least that is wrong is told.
    """
    own = [Row(path, path) for path in flatten(expect)]
    old = families.offered(package, "flax_table", None, config, entry.name)
    readings = [_mapped(tensors, rows, expect) for rows in (own, old) if rows is not None]
    readings.append(_mapped(spelled_tensors, package.table(config, entry.name), expect))
    return min(readings, key=lambda reading: len(reading[1]))


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a `config.json`.

    Raises:
        ConversionError: there is none, or it cannot be read.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise ConversionError(f"{path}: no such file")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; empty where there is none.

    Raises:
        ConversionError: it cannot be read.
    """
    with reading(path):
        if not path.exists():
            return {}
        text = path.read_bytes()
    try:
        raw = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{path}: is no JSON object")
    return raw


class _OneKey:
    """Stands for `nnx.Rngs` where only shapes are asked for.

    Counting keys while tracing costs most of the time: 5 of 5.5 seconds for BEiT3 of 12 layers.
    """

    def __init__(self, key: Any):
        self._key = key

    def __call__(self) -> Any:
        return self._key

    def __getattr__(self, stream: str) -> "_OneKey":
        return self


def abstract(package: Any, config: Any, entry: families.Architecture) -> Any:
    """The module with shapes in place of arrays."""
    import jax
    from flax import nnx

    return nnx.eval_shape(lambda: package.MODELS[entry.name](config, rngs=_OneKey(jax.random.key(0))))
