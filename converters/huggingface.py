"""Hugging Face model directories: `config.json` beside safetensors, to Flax modules and back."""

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.mapping import to_flax, to_torch

# Each package offers Config (with from_dict and to_dict), Model(config, rngs=) and TABLE.
FAMILIES = {"ViTForImageClassification": "converters.vit"}

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def family(config: Mapping[str, Any], source: str | os.PathLike = "config.json"):
    """Finds the package of a model family by the `architectures` of its configuration.

    Raises:
        ConversionError: the architecture is not among `FAMILIES`.
    """
    names = config.get("architectures") or [f"(none; model_type {config.get('model_type')!r})"]
    if names[0] not in FAMILIES:
        raise ConversionError(
            f"{source}: architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return importlib.import_module(FAMILIES[names[0]])


def load(directory: str | os.PathLike) -> tuple[Any, Any]:
    """Loads a Hugging Face directory as a Flax NNX module.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.

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

    directory = Path(directory)
    config_path = directory / "config.json"
    try:
        raw = json.loads(config_path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConversionError(f"{config_path}: cannot be read: {error}") from error
    package = family(raw, config_path)
    config = package.Config.from_dict(raw)
    graph, params = nnx.split(_abstract(package, config))
    tensors = read_tensors(directory)
    try:
        tree = to_flax(tensors, package.TABLE, expect=params)
    except ConversionError as error:
        raise ConversionError(f"{directory}: cannot be loaded as {raw['architectures'][0]}:", error.problems) from error
    nnx.replace_by_pure_dict(params, jax.tree.map(jax.numpy.asarray, tree))
    module = nnx.merge(graph, params)
    return module, nnx.state(module, nnx.Param)


def save(directory: str | os.PathLike, model: Any, config: Any = None) -> None:
    """Writes a Flax model as a Hugging Face directory that transformers' `from_pretrained` opens.

    Args:
        directory: where to; must be absent or empty, and appears complete or not at all.
        model: an NNX module of ours, or its parameters in any tree (`nnx.State`, nested dictionaries).
        config: the family's Config; None takes the module's own.

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
    raw = config.to_dict()
    if directory.exists() and any(directory.iterdir()):
        raise ConversionError(f"{directory}: the directory is not empty")
    package = family(raw)
    tensors = to_torch(model, package.TABLE, expect=_abstract(package, config))
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


def _abstract(package: Any, config: Any) -> Any:
    """The module with shapes in place of arrays."""
    from flax import nnx

    return nnx.eval_shape(lambda: package.Model(config, rngs=nnx.Rngs(0)))


def read_tensors(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all safetensors of a directory, sharded with an index or not.

    Returns:
        Arrays by name, read-only, in the file's dtypes (bfloat16 by ml_dtypes).

    Raises:
        ConversionError: a file is missing or damaged.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= _read_file(directory / name)
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors

    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    return {
        name: np.frombuffer(entry["data"], np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
        for name, entry in entries
    }
