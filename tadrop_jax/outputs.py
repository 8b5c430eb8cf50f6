"""What a merge on disk writes: its tensors, with their dtypes and shapes, and the files beside them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.errors import reading
from converters.files.sidecars import sidecars
from tadrop_jax.checkpoints import bundles
from tadrop_jax.checkpoints.safetensors import Source
from tadrop_jax.errors import CheckpointError, checkpoint_errors
from tadrop_jax.kinds import Kind
from tadrop_jax.planning import Plan

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def of_model(base: Source, plan: Plan, dtype: np.dtype | None) -> Layout:
    """The tensors of one merged model; a dtype of None keeps the base's."""
    return {
        name: (_kept(info.dtype, dtype), info.shape) for name, info in base.tensors.items() if name not in plan.aliases
    }


def of_bundle(
    sources: Sequence[Source], plan: Plan, tasks: Sequence[str], kind: Kind, dtype: np.dtype | None
) -> Layout:
    """The tensors of a bundle: the base, the parts of a kind, and what stays each task's own."""
    base = sources[0]
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        f"base/{n}": (_kept(i.dtype, dtype), i.shape)
        for n, i in base.tensors.items()
        if n not in plan.aliases and n not in plan.own
    }
    for name in plan.merged:
        info = base.tensors[name]
        for part, described in kind.parts(info.shape, len(tasks)).items():
            kept = {"values": dtype or np.float32, "float32": np.float32, "bits": np.uint8}[described.dtype]
            layout[f"{part}/{name}"] = (np.dtype(kept), described.stored)
    for source, task in zip(sources[1:], tasks, strict=True):
        for name in plan.own:
            if name in source.tensors:
                info = source.tensors[name]
                layout[f"own/{task}/{name}"] = (_kept(info.dtype, dtype), info.shape)
    return layout


def bytes_by_part(layout: Layout) -> dict[str, int]:
    """The bytes of a bundle's base, of its parts, and of what is each task's own, in this order."""
    sizes = {"base": 0} | {name.partition("/")[0]: 0 for name in layout if not name.startswith("own/")} | {"own": 0}
    for name, (dtype, shape) in layout.items():
        sizes[name.partition("/")[0]] += math.prod(shape) * np.dtype(dtype).itemsize
    return sizes


def beside(path: Path, dtype: np.dtype | None) -> dict[str, bytes | Path]:
    """What goes with a checkpoint's tensors, by name: files to copy, and its configuration with the result's dtype.

    Raises:
      CheckpointError: if one of them cannot be read.
    """
    # The description of a bundle that was merged before says nothing of this one.
    found: dict[str, bytes | Path] = {n: file for n, file in sidecars(path).items() if n != bundles.DESCRIPTION}
    with checkpoint_errors():
        for file in found.values():
            with reading(file), open(file, "rb") as stream:  # type: ignore[arg-type]
                stream.read(1)
    if dtype is not None and isinstance(config := found.get("config.json"), Path):
        found["config.json"] = _config_with_dtype(config, dtype)
    return found


def _kept(dtype: np.dtype, wanted: np.dtype | None) -> np.dtype:
    return dtype if wanted is None or dtype.kind in "iubc" else wanted


def _config_with_dtype(file: Path, dtype: np.dtype) -> bytes:
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds no configuration: its outermost value is no object")
    for field in ("torch_dtype", "dtype"):
        if field in config:
            config[field] = dtype.name
    return json.dumps(config, indent=2).encode()
