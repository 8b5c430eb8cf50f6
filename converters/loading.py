"""Directories and files to Flax modules, and back."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from converters import families
from converters.errors import ConversionError
from converters.files import read_tensors
from converters.mapping import to_flax, to_torch
from converters.names import Origin, learned, restored, spelled


class Opened(NamedTuple):
    """A checkpoint of a known architecture, not read yet.

    Attributes:
        entry: the architecture.
        package: its family's package.
        config: the family's Config.
        tensors: the learned parameters by the table's names: arrays that are mapped into memory, or leaves.
        origin: what a module has to remember of the file.
    """

    entry: families.Architecture
    package: Any
    config: Any
    tensors: Mapping[str, Any]
    origin: Origin

    def rows(self):
        """The table's rows."""
        return self.package.table(self.config, self.entry.name)


def load(source: str | os.PathLike, *, config: Any = None, architecture: str | None = None) -> tuple[Any, Any]:
    """Loads a checkpoint as a Flax NNX module.

    Args:
        source: a directory with its `config.json`, or a file beside which there may be one.
        config: a Config of the family, in place of what the files say.
        architecture: a name of `converters.families.ARCHITECTURES`; None finds it out.

    Returns:
        The module, and its parameters as an `nnx.State`, in the file's dtypes.

    Raises:
        ConversionError: the architecture is unknown, a file is missing or damaged, or tensors are unmapped,
            missing or of the wrong shape, all of them named.

    Example:
        >>> module, params = load("models/my-vit")  # doctest: +SKIP
        >>> logits = module(images)  # images (batch, height, width, channels)  # doctest: +SKIP
    """
    import jax
    from flax import nnx

    opened = open_model(source, config=config, architecture=architecture)
    graph, params = nnx.split(abstract(opened.package, opened.config, opened.entry))
    try:
        tree = to_flax(opened.tensors, opened.rows(), expect=params)
    except ConversionError as error:
        raise ConversionError(f"{source}: cannot be loaded as {opened.entry.name}:", error.problems) from error
    nnx.replace_by_pure_dict(params, jax.tree.map(jax.numpy.asarray, tree))
    module = nnx.merge(graph, params)
    module.origin = opened.origin
    return module, nnx.state(module, nnx.Param)


def open_model(source: str | os.PathLike, *, config: Any = None, architecture: str | None = None) -> Opened:
    """Opens a checkpoint and finds out what it is, before a tensor is read. Arguments and errors as `load`."""
    source = Path(source)
    path = (source if source.is_dir() else source.parent) / "config.json"
    raw = read_config(path)
    if architecture is None and raw.get("architectures"):
        families.detect(raw, (), path)  # an unsupported architecture is told before files are looked at
    tensors = read_tensors(source)
    entry = families.architecture(architecture) if architecture else families.detect(raw, tensors, path)
    package = families.package_of(entry)
    tensors = spelled(tensors, package, entry)
    if config is None:
        shapes = {name: tuple(array.shape) for name, array in tensors.items()}
        make = getattr(package, "configure", lambda raw, shapes, name: package.Config.from_dict(raw))
        config = make(raw, shapes, entry.name)
    tensors, origin, problems = learned(tensors, package, entry, config)
    if problems:
        raise ConversionError(f"{source}: cannot be loaded as {entry.name}:", problems)
    return Opened(entry, package, config, tensors, origin)


def save(directory: str | os.PathLike, model: Any, config: Any = None, *, architecture: str | None = None) -> None:
    """Writes a Flax model as a PyTorch directory; transformers' `from_pretrained` opens those of its architectures.

    Args:
        directory: where to; must be absent or empty, and appears complete or not at all.
        model: an NNX module of ours, or its parameters in any tree (`nnx.State`, nested dictionaries).
        config: the family's Config; None takes the module's own.
        architecture: a name of `converters.families.ARCHITECTURES`, to write another layout than the model was read
            from; None writes the same.

    Raises:
        ConversionError: the directory is not empty, the configuration is missing, or a parameter is unmapped.

    Example:
        >>> save("models/my-vit", module)  # doctest: +SKIP
    """
    import safetensors.numpy

    directory = Path(directory)
    config = getattr(model, "config", None) if config is None else config
    if config is None:
        raise ConversionError(f"{directory}: pass config= with bare parameters")
    if directory.exists() and any(directory.iterdir()):
        raise ConversionError(f"{directory}: the directory is not empty")
    own = families.architecture(architecture) if architecture else families.architecture_of(model, config)
    package = families.package_of(own)
    origin = getattr(model, "origin", None)
    stored = origin.stored if origin is not None and origin.architecture == own.name else ()
    tensors = to_torch(model, package.table(config, own.name), expect=abstract(package, config, own))
    tensors = restored(tensors, package, own, config, stored)
    raw = {**config.to_dict(), "architectures": [own.name]}
    raw = families.offered(package, "describe", raw, config, own.name)
    raw["dtype"] = str(next(iter(tensors.values())).dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        partial.chmod(0o755)
        (partial / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        safetensors.numpy.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a `config.json`; empty where there is none.

    Raises:
        ConversionError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{path}: is no JSON object")
    return raw


def abstract(package: Any, config: Any, entry: families.Architecture) -> Any:
    """The module with shapes in place of arrays."""
    from flax import nnx

    return nnx.eval_shape(lambda: package.MODELS[entry.name](config, rngs=nnx.Rngs(0)))
