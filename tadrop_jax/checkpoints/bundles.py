"""Bundles on disk: one directory of safetensors with the base, the parts of the bundle and own tensors.

Tensors are named ``base/NAME``, ``PART/NAME`` (``unified`` and ``masks`` of EMR, for instance; bits are ``np.packbits``
of the row-major tensor, one row a task) and ``own/TASK/NAME``; ``bundle.json`` holds the method, the tasks' names, the
tensors' shapes and the numbers that hold for the whole tree; configurations and tokenizers are in ``base/`` and
``tasks/TASK/``. What :meth:`Bundle.save` and ``tadrop merge`` with a per-task rule write is the same.
"""

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.files import orbax
from tadrop_jax.checkpoints.safetensors import Source, TensorInfo, check_directory, open_sink, open_source
from tadrop_jax.errors import CheckpointError, MergeError
from tadrop_jax.kinds import Kind, Part, kind_of

DESCRIPTION = "bundle.json"
_FORMAT = "tadrop-bundle"
Look = Callable[[str, np.ndarray, Callable[[], np.ndarray]], None]
_CHUNK = 1 << 21  # a multiple of 8: bits hold 8 entries a byte


def description(
    kind: Kind, tasks: Iterable[str], shapes: Mapping[str, Any], scalars: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """What ``bundle.json`` says.

    Args:
      kind: of the bundle.
      tasks: names of the tasks.
      shapes: by name the shape of each tensor that has parts.
      scalars: the numbers ``(T,)`` of the whole tree.
      **more: further fields.
    """
    numbers = {name: [float(v) for v in np.asarray(values)] for name, values in scalars.items()}
    listed = {name: list(shape) for name, shape in shapes.items()}
    return {
        "format": _FORMAT,
        "version": 1,
        "method": kind.name,
        "tasks": list(tasks),
        **more,
        "shapes": listed,
        **numbers,
    }


def write_task(
    path: Path, task: str, out: Path, max_shard_size: int = 5_000_000_000, look: Look = lambda *values: None
) -> dict[str, TensorInfo]:
    """Writes one task's full model, block by block (tensor by tensor if the kind of bundle asks for that).

    Args:
      path: directory of a bundle.
      task: name of the task.
      out: new directory.
      max_shard_size: bytes a file.
      look: ``(name, values, of_finite)``, called with what is written of a rebuilt tensor, and a function that tells
        which of the values came of finite ones.

    Returns:
      The model's tensors, by name.

    Raises:
      MergeError: if there is no such task, no bundle, or one of task vectors alone.
    """
    described = describe(path)
    if described.get("baseless"):
        raise MergeError(f"{path}: is a bundle of task vectors without their base, so that no model can be made of it")
    tasks, kind = described["tasks"], kind_of(described["method"])
    if task not in tasks:
        raise MergeError(f"{path}: has no task {task!r}; it has {', '.join(tasks)}")
    t = tasks.index(task)
    scalars = {name: np.float32(described[name][t]) for name in kind.scalars}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(path))
        base, own = _named(source, "base/"), _named(source, f"own/{task}/")
        layout = {**base, **own}
        sink = stack.enter_context(
            open_sink(out, {n: (i.dtype, i.shape) for n, i in layout.items()}, max_shard_size=max_shard_size)
        )
        try:
            for name, info in layout.items():
                parts = {} if name in own else _parts_of(source, kind, name, described, len(tasks))
                chunk = _CHUNK if kind.elementwise else max(info.size, 1)
                for start in range(0, info.size, chunk):
                    stop = min(start + chunk, info.size)
                    block = source.read(info.name, start, stop)
                    if parts:
                        of_task = {p: _read(source, f"{p}/{name}", part, t, start, stop) for p, part in parts.items()}
                        vector = np.ravel(kind.rebuild(np, of_task, scalars))
                        with np.errstate(over="ignore"):  # whoever looks tells
                            whole = (block.astype(np.float32) + vector).astype(info.dtype)
                        look(name, whole, lambda block=block, vector=vector: np.isfinite(block) & np.isfinite(vector))
                        block = whole
                    sink.write(name, start, block)
                sink.mark_done(name)
            folder = path / "tasks" / task
            folder = folder if folder.is_dir() else path / "base"
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                sink.add_file(file.relative_to(folder).as_posix(), file)
            sink.finish()
        except BaseException:
            sink.discard()
            raise
    return layout


def _named(source: Source, prefix: str) -> dict[str, TensorInfo]:
    return {name.removeprefix(prefix): info for name, info in source.tensors.items() if name.startswith(prefix)}


def _parts_of(source: Source, kind: Kind, name: str, described, tasks: int) -> Mapping[str, Part]:
    """The parts of a tensor with the shapes that they have on disk; none if it comes from the base."""
    if name not in described["shapes"]:
        return {}
    parts = kind.parts(tuple(described["shapes"][name]), tasks)
    return {p: Part(source.tensors[f"{p}/{name}"].shape, *part[1:]) for p, part in parts.items()}


def _read(source: Source, name: str, part: Part, t: int, start: int, stop: int) -> np.ndarray:
    """One task's share of a part: entries from start to stop, or its whole row."""
    if part.over == "entries":
        return source.read(name, start, stop).astype(np.float32)
    row = math.prod(part.shape[1:])
    if part.dtype == "bits":
        bits = source.read(name, t * row + start // 8, t * row + -(-stop // 8))
        return np.unpackbits(bits, count=stop - start).astype(bool)
    if part.over == "tasks":
        return source.read(name, t * row, (t + 1) * row).astype(np.float32).reshape(part.shape[1:])
    return source.read(name, t * row + start, t * row + stop).astype(np.float32)


def refuse(path: Path) -> None:
    """Refuses a bundle where a model is wanted.

    Raises:
      CheckpointError: telling how a model is taken out of it.
    """
    _refuse_orbax(path)
    described = None
    with contextlib.suppress(OSError, ValueError):  # a file of that name may be anything
        described = _described(path)
    if _is_bundle(described):
        command = f"'tadrop task {shlex.quote(str(path))} --task NAME --out DIR'"
        raise CheckpointError(f"{path}: is a bundle, no model: {command} takes one task's model out of it")


def describe(path: Path) -> dict[str, Any]:
    """What a bundle says of itself.

    Raises:
      CheckpointError: if the directory holds no bundle, or one of a newer format.
    """
    file = Path(path) / DESCRIPTION
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such directory")
    _refuse_orbax(path)
    if not file.is_file():
        raise CheckpointError(f"{path}: is no bundle (there is no {DESCRIPTION} in it)")
    try:
        described = _described(path)
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}") from None
    if not _is_bundle(described) or described.get("version") != 1:
        raise CheckpointError(f"{file}: is no bundle of version 1")
    return described


def _described(path: Path) -> Any:
    return json.loads((Path(path) / DESCRIPTION).read_text())


def _is_bundle(described: Any) -> bool:
    return isinstance(described, dict) and described.get("format") == _FORMAT


def _refuse_orbax(path: Path) -> None:
    """Refuses a bundle that was saved by Orbax: the command line does not read it.

    Raises:
      CheckpointError: telling what does.
    """
    arrays: Any = ()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        arrays = json.loads((Path(path) / orbax.METADATA).read_text())["tree_metadata"].keys()
    if "('description',)" in arrays and any(name.startswith("('tensors', ") for name in arrays):
        opened = f"tj.Bundle.load({str(path)!r})"
        raise CheckpointError(
            f"{path}: is a bundle in Orbax's format, which Python opens: {opened} gives a model by task_params(NAME), "
            "and by save(DIR) a bundle that 'tadrop task' takes"
        )


def save(bundle, path, format: str = "safetensors") -> None:
    """Writes a bundle to a new directory.

    Args:
      bundle: a :class:`~tadrop_jax.bundles.Bundle`.
      path: a directory that does not exist, or is empty.
      format: ``"safetensors"`` or ``"orbax"``. A bundle that is spread over several processes is saved by Orbax, by all
        of them at once.

    Raises:
      MergeError: for another format, or safetensors of tensors that are spread over several processes.
      CheckpointError: if the directory is not empty or cannot be written.
    """
    tensors, described = _flat(bundle)
    if format == "orbax":
        from tadrop_jax.checkpoints import orbax

        # Orbax refuses arrays without entries.
        described["empty"] = {n: [v.dtype.name, list(v.shape)] for n, v in tensors.items() if not v.size}
        tensors = {n: v for n, v in tensors.items() if v.size}
        orbax.save(path, {"tensors": tensors, "description": np.frombuffer(json.dumps(described).encode(), np.uint8)})
        return
    if format != "safetensors":
        raise MergeError(f"format must be 'safetensors' or 'orbax', got {format!r}")
    far = next((n for n, value in tensors.items() if not isinstance(value, np.ndarray)), None)
    if far is not None:
        raise MergeError(f"tensor {far!r} is spread over several processes, which write one bundle by format='orbax'")
    layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    check_directory(Path(path), "a bundle is several files")
    with open_sink(Path(path), layout) as sink:
        for name, value in tensors.items():
            sink.write(name, 0, np.ravel(value))
            sink.mark_done(name)
        sink.add_file(DESCRIPTION, json.dumps(described, indent=1).encode())
        sink.finish()


def load(path, like=None, kind: Kind | None = None):
    """Reads a bundle that :func:`save` or ``tadrop merge`` with a per-task rule wrote.

    Args:
      path: its directory.
      like: a tree of the base's structure (arrays or anything else as leaves), to get the bundle in that type; None
        gives nested dicts, split at '/'.
      kind: its kind, for a rule that is not in the registry.

    Returns:
      A :class:`~tadrop_jax.bundles.Bundle`.

    Raises:
      CheckpointError: if there is no bundle, or a file is damaged.
      MergeError: if ``like`` has other tensors than the bundle.
    """
    import jax
    import jax.numpy as jnp

    from tadrop_jax.bundles import Bundle
    from tadrop_jax.trees import named_leaves

    path = Path(path)
    if (path / DESCRIPTION).is_file():
        described = describe(path)
        with open_source(path) as source:
            tensors = {n: source.read(n, 0, i.size).reshape(i.shape) for n, i in source.tensors.items()}
    else:
        from tadrop_jax.checkpoints import orbax

        stored = orbax.restore(path)
        described = json.loads(bytes(np.asarray(stored["description"])))
        empty = {n: np.zeros(shape, dtype) for n, (dtype, shape) in described.get("empty", {}).items()}
        tensors = stored["tensors"] | empty
    kind, tasks = kind or kind_of(described["method"]), tuple(described["tasks"])
    shapes = {n: tuple(s) for n, s in described["shapes"].items()}
    named = [n.split("/", 2 if n.startswith("own/") else 1)[-1] for n in tensors if n.startswith(("base/", "own/"))]
    names = described.get("names") or list(dict.fromkeys(named))
    found, _, treedef = named_leaves(nested({n: n for n in names}) if like is None else like)
    # Of files each name counts in full, of trees without a leading params/ (see trees.path_name).
    on_disk = {n.removeprefix("params/"): n for n in names}
    if sorted(found) != sorted(on_disk):
        raise MergeError(f"{path}: the bundle's tensors are not those of like=")
    stored_names = [on_disk[n] for n in found]

    def parts_of(name):
        wanted = [] if name not in shapes else kind.parts(shapes[name], len(tasks))
        return {p: jnp.asarray(tensors[f"{p}/{name}"]) for p in wanted} or None

    def kept(value):
        """An array of JAX, unless that has no such dtype."""
        return jnp.asarray(value) if jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype else np.asarray(value)

    own: tuple[dict, ...] = tuple({} for _ in tasks)
    for name, value in tensors.items():
        if name.startswith("own/"):
            _, task, rest = name.split("/", 2)
            own[tasks.index(task)][rest.removeprefix("params/")] = kept(value)
    base = [kept(tensors[f"base/{n}"]) if f"base/{n}" in tensors else None for n in stored_names]
    return Bundle(
        base=None if described.get("baseless") else jax.tree_util.tree_unflatten(treedef, base),
        parts=tuple(parts_of(n) for n in stored_names),
        scalars={n: jnp.asarray(described[n], jnp.float32) for n in kind.scalars},
        own=own,
        kind=kind,
        treedef=treedef,
        shapes=tuple(shapes.get(n) for n in stored_names),
        tasks=tasks,
    )


def _flat(bundle) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a bundle by the names that they have on disk, and what ``bundle.json`` says."""
    import jax

    from tadrop_jax.trees import named_leaves

    names = named_leaves(jax.tree_util.tree_unflatten(bundle.treedef, range(len(bundle.shapes))))[0]
    tensors: dict[str, Any] = {}
    if bundle.base is not None:
        tensors |= {f"base/{n}": leaf for n, leaf in zip(names, named_leaves(bundle.base)[1], strict=True)}
    for name, parts in zip(names, bundle.parts, strict=True):
        tensors |= {f"{part}/{name}": value for part, value in (parts or {}).items()}
    for task, kept in zip(bundle.tasks, bundle.own, strict=False):
        tensors |= {f"own/{task}/{name}": leaf for name, leaf in kept.items()}
    arrays = {name: _here(value) for name, value in tensors.items() if value is not None}
    shapes = {n: s for n, s in zip(names, bundle.shapes, strict=True) if s is not None}
    more = {"names": names, "baseless": bundle.base is None}
    return arrays, description(bundle.kind, bundle.tasks, shapes, bundle.scalars, **more)


def _here(value):
    """The array in this process's memory, unless other processes hold parts of it."""
    return value if not getattr(value, "is_fully_addressable", True) else np.asarray(value, order="C")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from '/'-joined names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
