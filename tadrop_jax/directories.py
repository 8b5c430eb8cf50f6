"""Merging checkpoints on disk into a checkpoint on disk: what ``tadrop merge`` does."""

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tadrop_jax.checkpoints.safetensors import Sink, Source, copy_sidecars, open_sink, open_source, tied_aliases
from tadrop_jax.errors import CheckpointError, ContentError, MergeError
from tadrop_jax.report import REPORT, TensorLog, describe_input, versions
from tadrop_jax.steps import AnyStep, expand, output_of, patterns, per_task_patterns
from tadrop_jax.streaming import Carries, NonFinite, Settings, Stream, run
from tadrop_jax.task_vector import check_alike, check_names
from tadrop_jax.trees import check_patterns, selected

BUNDLE = "bundle.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_CHUNK = 1 << 22
# What an earlier merge left beside its result says nothing of this one.
_NOT_COPIED = {REPORT, BUNDLE}


class MergeFailed(RuntimeError):
    """A merge broke off midway; what it did so far is in ``OUT.partial``."""


class Request(NamedTuple):
    """What to merge, and how.

    Attributes:
      base: safetensors file or Hugging Face directory of the base.
      models: the same for each of T fine-tunes.
      out: where the result is to appear: a directory, or a file that ends in ``.safetensors``.
      chain: sparsifier and rule.
      recipe: the serialisable description, for the report and to recognise a merge that is resumed.
      include: regular expressions of tensors to merge; empty means all.
      exclude: regular expressions of tensors to take from the base.
      seed: of the random numbers.
      dtype: of the output; None keeps the base's.
      max_shard_size: bytes a file.
      resume: go on from what an interrupted merge left.
      check_finite: refuse NaN and infinity.
      digests: put full SHA-256 digests of the inputs into the report.
      workers: threads; None means one a core.
    """

    base: Path
    models: tuple[Path, ...]
    out: Path
    chain: AnyStep
    recipe: dict[str, Any]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: np.dtype | None = None
    max_shard_size: int = 5_000_000_000
    resume: bool = False
    check_finite: bool = True
    digests: bool = False
    workers: int | None = None


class Plan(NamedTuple):
    """What becomes of each tensor.

    Attributes:
      merged: names that the chain merges.
      kept: names that come from the base, and why.
      own: names that stay each task's own.
      aliases: tied tensors, and the tensor that each is a copy of.
    """

    merged: tuple[str, ...]
    kept: dict[str, str]
    own: tuple[str, ...]
    aliases: dict[str, str]


def merge_directories(request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> dict:
    """Merges checkpoints on disk, block by block.

    Args:
      request: what to merge, and how.
      progress: called with the bytes read so far, and about how many there are to read.

    Returns:
      The report, as it stands beside the result.

    Raises:
      MergeError: if the request or its inputs are wrong; then nothing is left behind.
      MergeFailed: if a file could not be read or written midway. That, or an interrupt, leaves ``OUT.partial``, which
        ``resume`` goes on from.
    """
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(_open(p)) for p in (request.base, *request.models)]
        _refuse_same_file(sources[1:])
        steps = expand(request.chain, len(request.models))
        bundle = output_of(request.chain) == "bundle"
        tasks = _task_names(request.models)
        plan = make_plan(sources, request)
        layout = (
            _bundle_layout(sources, plan, tasks, request.dtype) if bundle else _layout(sources[0], plan, request.dtype)
        )
        sink = stack.enter_context(
            open_sink(
                request.out,
                layout,
                max_shard_size=request.max_shard_size,
                fingerprint=_fingerprint(request, sources),
                resume=request.resume,
            )
        )
        try:
            return _merge(request, sources, steps, plan, tasks, sink, bundle, progress)
        except (CheckpointError, OSError) as error:
            raise MergeFailed(str(error)) from error
        except MergeError:
            sink.discard()  # the inputs are wrong: there is nothing to resume
            raise


def make_plan(sources: Sequence[Source], request: Request) -> Plan:
    """Checks base and models against each other, before a tensor is read.

    Raises:
      MismatchError: naming file, tensor and both values.
      ParameterError: if a pattern matches nothing.
    """
    base, models = sources[0], sources[1:]
    per_task = per_task_patterns(request.chain)
    config = _config(request.base)
    ties = [tied_aliases(m, _config(p) or config) for p, m in zip(request.models, models, strict=True)]
    # A copy that some model trained apart is a tensor of its own.
    apart = {n for m, tied in zip(models, ties, strict=True) for n in m.tensors if n not in tied}
    aliases = {n: target for n, target in tied_aliases(base, config).items() if n not in apart}
    names = [n for n in base.tensors if n not in aliases]
    include, exclude = patterns(request.include), patterns(request.exclude)
    everywhere = dict.fromkeys([*names, *(n for m in models for n in m.tensors)])
    check_patterns((*include, *exclude), names)
    check_patterns(per_task, everywhere)
    own = tuple(n for n in everywhere if per_task and selected(n, per_task))
    kept: dict[str, str] = {}
    for name in names:
        dtype = base.tensors[name].dtype
        if name in own:
            continue
        if not selected(name, include, exclude):
            kept[name] = "excluded"
        elif dtype.kind in "iub":
            kept[name] = f"{dtype} tensor"
        elif dtype.itemsize > 4 or dtype.kind == "c":
            raise MergeError(
                f"{base.tensors[name].file}: tensor {name!r} is {dtype}: only floats of up to 32 bits merge"
            )
    # What is excluded, tied or a task's own need not be alike; neither do extra tensors that a pattern takes out.
    loose = {n for n in everywhere if n in own or n in aliases or not selected(n, include, exclude)}
    for path, model, tied in zip(request.models, models, ties, strict=True):
        stored = [n for n in model.tensors if n in base.tensors or n not in tied]
        check_names(names, stored, str(path), frozenset(loose), str(request.base))
        for name in names:
            if name in loose:
                continue
            ours, theirs = base.tensors[name], model.tensors[name]
            check_alike(name, (ours.shape, ours.dtype), (theirs.shape, theirs.dtype), str(theirs.file), str(ours.file))
    merged = tuple(n for n in names if n not in kept and n not in own)
    if not merged:
        why = ", ".join(sorted({*kept.values(), *(["each task's own"] if own else [])}))
        raise MergeError(f"{request.base}: there is no float tensor to merge (all of its {len(names)}: {why})")
    return Plan(merged, kept, own, aliases)


def _merge(request, sources, steps, plan: Plan, tasks, sink: Sink, bundle: bool, progress) -> dict:
    import jax

    base = sources[0]
    streams = [_stream(sources, name) for name in plan.merged]
    total = _bytes_to_read(steps, sources, plan)
    counted, lock = [0], threading.Lock()

    def advance(n: int) -> None:
        with lock:
            counted[0] += n
            progress(min(counted[0], total), total)

    log = TensorLog(sink.partial, fresh=not sink.done)
    prefix = "base/" if bundle else ""
    for name in base.tensors:
        if name in plan.aliases or (bundle and name in plan.own):
            continue
        if bundle or name in plan.kept or name in plan.own:
            _copy(base, name, sink, prefix + name, request)
        if name in plan.kept:
            log.add(name, {"from": "base", "because": plan.kept[name]})
    for name, target in plan.aliases.items():
        log.add(name, {"tied_to": target})
    if bundle:
        for source, task in zip(sources[1:], tasks, strict=True):
            for name in plan.own:
                if name in source.tensors:
                    _copy(source, name, sink, f"own/{task}/{name}", request)
        for name in plan.own:
            log.add(name, {"from": "each task's own model"})

    def write(k: int, start: int, value: Any) -> None:
        name = streams[k].name
        if value is None:
            return
        if not bundle:
            sink.write(name, start, value)
            return
        sink.write(f"unified/{name}", start, value["unified"])
        row = -(-streams[k].size // 8)
        for t, bits in enumerate(value["masks"]):
            sink.write(f"masks/{name}", t * row + start // 8, bits)

    def done(k: int, carries: Carries) -> None:
        stream = streams[k]
        log.add(stream.name, log.describe(stream, carries, steps))
        for name in _outputs_of(stream.name, bundle):
            sink.mark_done(name)

    skip = [k for k, s in enumerate(streams) if set(_outputs_of(s.name, bundle)) <= sink.done]
    key = jax.random.key(request.seed, impl="threefry2x32")
    settings = Settings(key, request.dtype, request.check_finite, request.workers, advance)
    try:
        outcome = run(steps, streams, len(tasks), write, done, settings, skip)
    except NonFinite as error:
        file = sources[error.row].tensors[error.name].file
        raise ContentError(f"{file}: tensor {error.name!r} holds {error.value} at {error.entry}") from None
    scalars = {
        k: np.asarray(v, np.float32) for k, v in (steps[-1].scalars(outcome.carry) if steps[-1].scalars else {}).items()
    }
    report = {
        "recipe": request.recipe,
        "inputs": [describe_input(s, request.digests) for s in sources],
        "versions": versions(),
        "tasks": list(tasks),
        "scalars": {k: v.tolist() for k, v in scalars.items()},
        "tensors": log.close(),
    }
    same = [p for p, differs in zip(request.models, outcome.differs, strict=True) if not differs]
    report["warnings"] = [f"{p}: equals the base, its task vector is zero" for p in same if not skip]
    _add_files(request, sink, tasks, bundle, scalars, report, sources, plan)
    progress(total, total)
    sink.finish()
    return report


def _outputs_of(name: str, bundle: bool) -> list[str]:
    return [f"unified/{name}", f"masks/{name}"] if bundle else [name]


def _add_files(request, sink: Sink, tasks, bundle: bool, scalars, report, sources, plan: Plan) -> None:
    if bundle:
        for folder, path in (
            ("base", request.base),
            *((f"tasks/{t}", p) for t, p in zip(tasks, request.models, strict=True)),
        ):
            for file in copy_sidecars(path):
                if file.name not in _NOT_COPIED:
                    sink.add_file(f"{folder}/{file.name}", file)
        sizes = {part: _part_bytes(sink, part) for part in ("base", "unified", "masks", "own")}
        full = sum(s.size_bytes for s in sources[1:])
        report["size"] = {"bundle_bytes": sum(sizes.values()), "full_models_bytes": full, "parts_bytes": sizes}
        described = {
            "format": "tadrop-bundle",
            "version": 1,
            "method": request.recipe["method"],
            "tasks": list(tasks),
            "shapes": {n: list(sources[0].tensors[n].shape) for n in plan.merged},
            **{k: v.tolist() for k, v in scalars.items()},
        }
        sink.add_file(BUNDLE, json.dumps(described, indent=1).encode())
    else:
        for file in copy_sidecars(request.base):
            if file.name == "config.json" and request.dtype is not None:
                sink.add_file(file.name, _config_with_dtype(file, request.dtype))
            elif file.name not in _NOT_COPIED:
                sink.add_file(file.name, file)
    sink.add_file(REPORT, json.dumps(report, indent=1).encode())


def _part_bytes(sink: Sink, part: str) -> int:
    return sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for name, (dtype, shape) in sink.plan.items()
        if name.startswith(part + "/")
    )


def _stream(sources: Sequence[Source], name: str) -> Stream:
    info = sources[0].tensors[name]
    return Stream(
        name,
        info.shape,
        info.dtype,
        lambda row, start, stop, out: sources[row].read(name, start, stop, out),
    )


def _layout(base: Source, plan: Plan, dtype) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {
        name: (_out_dtype(info.dtype, dtype), info.shape)
        for name, info in base.tensors.items()
        if name not in plan.aliases
    }


def _bundle_layout(sources, plan: Plan, tasks, dtype) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    base = sources[0]
    layout = {
        f"base/{n}": (_out_dtype(i.dtype, dtype), i.shape)
        for n, i in base.tensors.items()
        if n not in plan.aliases and n not in plan.own
    }
    for name in plan.merged:
        info = base.tensors[name]
        layout[f"unified/{name}"] = (dtype or DTYPES["float32"], info.shape)
        layout[f"masks/{name}"] = (np.dtype(np.uint8), (len(tasks), -(-info.size // 8)))
    for source, task in zip(sources[1:], tasks, strict=True):
        for name in plan.own:
            if name in source.tensors:
                info = source.tensors[name]
                layout[f"own/{task}/{name}"] = (_out_dtype(info.dtype, dtype), info.shape)
    return layout


def _out_dtype(dtype: np.dtype, wanted: np.dtype | None) -> np.dtype:
    return dtype if wanted is None or dtype.kind in "iubc" else wanted


def _copy(source: Source, name: str, sink: Sink, target: str, request: Request) -> None:
    """Copies a tensor as it is, or cast to the output dtype."""
    if target in sink.done:
        return
    info, dtype = source.tensors[name], sink.plan[target][0]
    for start in range(0, info.size, _CHUNK):
        block = source.read(name, start, min(start + _CHUNK, info.size))
        if info.dtype.kind not in "iub" and request.check_finite and not np.isfinite(block).all():
            at = int(np.flatnonzero(~np.isfinite(block))[0])
            entry = [int(i) for i in np.unravel_index(start + at, info.shape)] if info.shape else []
            raise ContentError(f"{info.file}: tensor {name!r} holds {float(block[at])} at {entry}")
        sink.write(target, start, block.astype(dtype, copy=False))
    sink.mark_done(target)


def _bytes_to_read(steps, sources, plan: Plan) -> int:
    """About how much the passes read: one pass for each statistic of the tree, and one for the rest."""
    from tadrop_jax.steps import global_stages

    size = sum(sources[0].tensors[n].nbytes for n in plan.merged) * len(sources)
    return size * (len(global_stages(steps)) + 1)


def _fingerprint(request: Request, sources: Sequence[Source]) -> str:
    parts = [json.dumps(request.recipe, sort_keys=True)]
    for source in sources:
        stats = [os.stat(f) for f in source.files]
        parts.append(source.header_digest + json.dumps([(s.st_size, s.st_mtime_ns) for s in stats]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _task_names(models: Sequence[Path]) -> tuple[str, ...]:
    """The models' directory names (file names without suffix), made unique by their parents if need be."""
    names = [p.resolve().stem if p.is_file() else p.resolve().name for p in models]
    if len(set(names)) < len(names):
        names = [f"{p.resolve().parent.name}-{n}" for p, n in zip(models, names, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{n}-{t}" for t, n in enumerate(names)]
    return tuple(names)


def _open(path: Path) -> Source:
    try:
        return open_source(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _refuse_same_file(models: Sequence[Source]) -> None:
    """By what the names lead to: links and other spellings are the same file."""
    seen: dict[tuple[int, int], Path] = {}
    for model in models:
        for file in model.files:
            stat = os.stat(file)
            other = seen.setdefault((stat.st_dev, stat.st_ino), model.path)
            if other is not model.path:
                raise MergeError(f"two of the models are the same file: {other} and {model.path}")


def _config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json" if path.is_dir() else path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else None


def _config_with_dtype(file: Path, dtype: np.dtype) -> bytes:
    config = json.loads(file.read_text())
    for field in ("torch_dtype", "dtype"):
        if field in config:
            config[field] = dtype.name
    return json.dumps(config, indent=2).encode()
