"""Bundles on disk: one directory of safetensors with the base, the unified vector, packed masks and own tensors.

Tensors are named ``base/NAME``, ``unified/NAME``, ``masks/NAME`` (``np.packbits`` of the row-major tensor, one row a
task) and ``own/TASK/NAME``; ``bundle.json`` holds the tasks' names and rescalers; configurations and tokenizers are in
``base/`` and ``tasks/TASK/``. What :meth:`EMRBundle.save` and ``tadrop merge --method emr`` write is the same.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tadrop_jax.checkpoints.safetensors import Source, open_sink, open_source
from tadrop_jax.errors import CheckpointError, MergeError

DESCRIPTION = "bundle.json"
_CHUNK = 1 << 21  # a multiple of 8: masks hold 8 entries a byte


def write_task(path: Path, task: str, out: Path, max_shard_size: int = 5_000_000_000) -> int:
    """Writes one task's full model, block by block.

    Args:
      path: directory of a bundle.
      task: name of the task.
      out: new directory.
      max_shard_size: bytes a file.

    Returns:
      Bytes of the model's tensors.

    Raises:
      MergeError: if there is no such task, or no bundle.
    """
    described = describe(path)
    tasks = described["tasks"]
    if task not in tasks:
        raise MergeError(f"{path}: has no task {task!r}; it has {', '.join(tasks)}")
    t, rescaler = tasks.index(task), np.float32(described["rescalers"][tasks.index(task)])
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(path))
        parts = _parts(source)
        own = parts["own"].get(task, {})
        layout = {n: source.tensors[f"base/{n}"] for n in parts["base"]}
        layout |= {n: source.tensors[f"own/{task}/{n}"] for n in own}
        sink = stack.enter_context(
            open_sink(out, {n: (i.dtype, i.shape) for n, i in layout.items()}, max_shard_size=max_shard_size)
        )
        try:
            for name, info in layout.items():
                for start in range(0, info.size, _CHUNK):
                    stop = min(start + _CHUNK, info.size)
                    block = source.read(info.name, start, stop)
                    if name in parts["unified"] and name not in own:
                        block = _rebuilt(source, name, t, rescaler, start, stop, block)
                    sink.write(name, start, block)
                sink.mark_done(name)
            folder = path / "tasks" / task
            for file in sorted((folder if folder.is_dir() else path / "base").glob("*")):
                sink.add_file(file.name, file)
            sink.finish()
        except BaseException:
            sink.discard()
            raise
    return sum(info.nbytes for info in layout.values())


def _rebuilt(source: Source, name: str, t: int, rescaler, start: int, stop: int, base: np.ndarray) -> np.ndarray:
    """``theta_0 + lambda_t * M_t * tau_uni`` for entries from start to stop, as EMRBundle.task_params computes it."""
    unified = source.read(f"unified/{name}", start, stop).astype(np.float32)
    row = source.tensors[f"masks/{name}"].shape[1]
    bits = source.read(f"masks/{name}", t * row + start // 8, t * row + -(-stop // 8))
    mask = np.unpackbits(bits, count=stop - start).astype(bool)
    return (base.astype(np.float32) + np.where(mask, unified * rescaler, np.float32(0))).astype(base.dtype)


def describe(path: Path) -> dict[str, Any]:
    """What a bundle says of itself.

    Raises:
      CheckpointError: if the directory holds no bundle, or one of a newer format.
    """
    file = Path(path) / DESCRIPTION
    if not file.is_file():
        raise CheckpointError(f"{path}: is no bundle (there is no {DESCRIPTION} in it)")
    try:
        described = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(described, dict) or described.get("format") != "tadrop-bundle" or described.get("version") != 1:
        raise CheckpointError(f"{file}: is no bundle of version 1")
    return described


def save(bundle, path, format: str = "safetensors") -> None:
    """Writes a bundle to a new directory.

    Args:
      bundle: an :class:`~tadrop_jax.bundles.EMRBundle`.
      path: a directory that does not exist, or is empty.
      format: ``"safetensors"`` or ``"orbax"``.

    Raises:
      MergeError: for another format.
      CheckpointError: if the directory is not empty or cannot be written.
    """
    tensors = _flat(bundle)
    described = _description(bundle)
    if format == "orbax":
        from tadrop_jax.checkpoints import orbax

        orbax.save(path, {"tensors": tensors, "description": np.frombuffer(json.dumps(described).encode(), np.uint8)})
        return
    if format != "safetensors":
        raise MergeError(f"format must be 'safetensors' or 'orbax', got {format!r}")
    layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    with open_sink(Path(path), layout) as sink:
        for name, value in tensors.items():
            sink.write(name, 0, np.ravel(value))
            sink.mark_done(name)
        sink.add_file(DESCRIPTION, json.dumps(described, indent=1).encode())
        sink.finish()


def load(path, like=None):
    """Reads a bundle that :func:`save` or ``tadrop merge --method emr`` wrote.

    Args:
      path: its directory.
      like: a tree of the base's structure (arrays or anything else as leaves), to get the bundle in that type; None
        gives nested dicts, split at '/'.

    Returns:
      An :class:`~tadrop_jax.bundles.EMRBundle`.

    Raises:
      CheckpointError: if there is no bundle, or a file is damaged.
      MergeError: if ``like`` has other tensors than the bundle.
    """
    import jax
    import jax.numpy as jnp

    from tadrop_jax.bundles import EMRBundle
    from tadrop_jax.trees import named_leaves

    path = Path(path)
    if (path / DESCRIPTION).is_file():
        described = describe(path)
        with open_source(path) as source:
            tensors = {n: source.read(n, 0, i.size).reshape(i.shape) for n, i in source.tensors.items()}
    else:
        from tadrop_jax.checkpoints import orbax

        stored = orbax.load(path)
        tensors, described = stored["tensors"], json.loads(bytes(np.asarray(stored["description"])))
    shapes = {n: tuple(s) for n, s in described["shapes"].items()}
    named = [n.split("/", 2 if n.startswith("own/") else 1)[-1] for n in tensors if n.startswith(("base/", "own/"))]
    names = described.get("names") or list(dict.fromkeys(named))
    tree = _nested({n: n for n in names}) if like is None else like
    found, _, treedef = named_leaves(tree)
    if sorted(found) != sorted(names):
        raise MergeError(f"{path}: the bundle's tensors are not those of like=")

    def column(part):
        return [jnp.asarray(tensors[f"{part}/{n}"]) if f"{part}/{n}" in tensors else None for n in found]

    own: tuple[dict, ...] = tuple({} for _ in described["tasks"])
    for name, value in tensors.items():
        if name.startswith("own/"):
            _, task, rest = name.split("/", 2)
            own[described["tasks"].index(task)][rest] = jnp.asarray(value)
    unflatten = jax.tree_util.tree_unflatten
    return EMRBundle(
        base=None if described.get("baseless") else unflatten(treedef, column("base")),
        unified=unflatten(treedef, column("unified")),
        packed=tuple(column("masks")),
        rescalers=jnp.asarray(described["rescalers"], jnp.float32),
        own=own,
        shapes=tuple(shapes.get(n) for n in found),
        tasks=tuple(described["tasks"]),
    )


def _description(bundle) -> dict[str, Any]:
    from tadrop_jax.trees import named_leaves

    names = named_leaves(bundle.unified)[0]
    return {
        "format": "tadrop-bundle",
        "version": 1,
        "method": "emr",
        "tasks": list(bundle.tasks) or [str(t) for t in range(bundle.rescalers.shape[0])],
        "names": names,
        "baseless": bundle.base is None,
        "shapes": {n: list(s) for n, s in zip(names, bundle.shapes, strict=True) if s is not None},
        "rescalers": [float(r) for r in np.asarray(bundle.rescalers)],
    }


def _flat(bundle) -> dict[str, np.ndarray]:
    """The tensors of a bundle by the names that they have on disk."""
    from tadrop_jax.trees import named_leaves

    tasks = _description(bundle)["tasks"]
    names, unified, _ = named_leaves(bundle.unified)
    tensors: dict[str, Any] = {}
    if bundle.base is not None:
        tensors |= {f"base/{n}": leaf for n, leaf in zip(names, named_leaves(bundle.base)[1], strict=True)}
    for name, vector, masks in zip(names, unified, bundle.packed, strict=True):
        if vector is not None:
            tensors[f"unified/{name}"], tensors[f"masks/{name}"] = vector, masks
    for task, kept in zip(tasks, bundle.own, strict=False):
        tensors |= {f"own/{task}/{name}": leaf for name, leaf in kept.items()}
    return {name: np.ascontiguousarray(value) for name, value in tensors.items() if value is not None}


def _parts(source: Source) -> dict[str, dict]:
    parts: dict[str, dict] = {"base": {}, "unified": {}, "masks": {}, "own": {}}
    for name in source.tensors:
        part, _, rest = name.partition("/")
        if part == "own":
            task, _, rest = rest.partition("/")
            parts["own"].setdefault(task, {})[rest] = name
        elif part in parts:
            parts[part][rest] = name
    return parts


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
