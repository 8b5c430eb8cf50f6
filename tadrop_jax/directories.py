"""Merging checkpoints on disk into a checkpoint on disk: what ``tadrop merge`` does."""

import contextlib
import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tadrop_jax import __version__, outputs, processes
from tadrop_jax.advancing import global_stages
from tadrop_jax.checkpoints import bundles
from tadrop_jax.checkpoints.opening import open_models, pytorch_places
from tadrop_jax.checkpoints.safetensors import Sink, Source, check_beside, check_directory, open_sink
from tadrop_jax.checkpoints.turned import Back, Turned
from tadrop_jax.errors import CheckpointError, ContentError, MergeError
from tadrop_jax.explaining import explaining_steps, explanation
from tadrop_jax.overflow import Overflow, warnings_of
from tadrop_jax.planning import Plan, Request, implausible, make_plan, refuse_same_file, task_names
from tadrop_jax.report import LINES, REPORT, TensorLog, describe_input, versions
from tadrop_jax.steps import expand, output_of, scalars_of
from tadrop_jax.streaming import Carries, NonFinite, Settings, Stream, measure, run
from tadrop_jax.trees import copies_of

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_CHUNK = 1 << 22


class MergeFailed(RuntimeError):
    """A merge broke off midway; what it did so far is in ``OUT.partial``."""


def merge_directories(request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> dict:
    """Merges checkpoints on disk, block by block.

    Args:
      request: what to merge, and how.
      progress: called with the bytes read so far, and about how many there are to read.

    Returns:
      The report, as it stands beside the result. For one of several processes that of its share, as long as the result
      is not there: :func:`tadrop_jax.processes.join` makes it when all shares are.

    Raises:
      MergeError: if the request or its inputs are wrong; then nothing is left behind.
      MergeFailed: if a file could not be read or written midway. That, or an interrupt, leaves ``OUT.partial``, which
        ``resume`` goes on from.
    """
    with contextlib.ExitStack() as stack:
        sources = open_models(stack, (request.base, *request.models))
        refuse_same_file(sources[1:])
        steps = expand(request.chain, len(request.models))
        bundle = output_of(request.chain) == "bundle"
        if bundle:
            check_directory(request.out, "one model per task makes a bundle of several files")
        tasks = task_names(request.models)
        plan = make_plan(sources, request)
        beside = _beside(request, tasks if bundle else ())
        if request.out.suffix == ".safetensors" and not request.resume:
            check_beside(request.out, {REPORT: b""} | beside)
        layout = (
            outputs.of_model(sources[0], plan, request.dtype)
            if (kind := steps[-1].kind) is None
            else outputs.of_bundle(sources, plan, tasks, kind, request.dtype)
        )
        fingerprint = _fingerprint(request, sources)
        share = _share(request, sources, plan, layout, bundle)
        several = request.processes > 1
        report = processes.begin(request, fingerprint) if several else None
        if report is None:
            sink = stack.enter_context(
                open_sink(
                    share.out,
                    share.layout,
                    max_shard_size=request.max_shard_size,
                    fingerprint=fingerprint,
                    resume=request.resume and (not several or processes.has_begun(share)),
                    among=share.among,
                )
            )
            try:
                report = _merge(
                    request, sources, steps, plan, tasks, sink, bundle, share, layout, beside, fingerprint, progress
                )
            except (CheckpointError, OSError) as error:
                raise MergeFailed(str(error)) from error
            except MergeError:
                sink.discard()  # the inputs are wrong: there is nothing to resume
                processes.abandon(request)
                raise
        try:
            return processes.join(request, fingerprint) or report if several else report
        except CheckpointError as error:
            raise MergeFailed(str(error)) from error


def inspect_directories(
    request: Request, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, dict[str, Any]]:
    """What a sparsifier does to each tensor of checkpoints on disk, as :func:`tadrop_jax.explain` says it.

    Args:
      request: base, models, include, exclude, seed and workers; the chain is a sparsifier, ``out`` is not written.
      progress: called with the bytes read so far, and about how many there are to read.

    Returns:
      For each float tensor, by name, the numbers that :func:`tadrop_jax.explain` gives, and its shape.

    Raises:
      MergeError: if the request or its inputs are wrong.
    """
    with contextlib.ExitStack() as stack:
        sources = open_models(stack, (request.base, *request.models))
        refuse_same_file(sources[1:])
        steps = explaining_steps(request.chain, len(request.models))
        plan = make_plan(sources, request)
        turned = Turned(sources, pytorch_places(sources[0]), request.workers)
        streams = [s for s in (_stream(turned, name, plan) for name in plan.merged) if s.size]
        settings = _settings(request, _counter(progress, _bytes_to_read(steps, sources, plan)))
        with _naming_files(turned):
            carries = measure(steps, streams, len(request.models), settings)
    said = (
        explanation([s.for_tensor(t.name, t.shape, len(request.models), t.aliases) for s in steps], found)
        for t, found in zip(streams, carries, strict=True)
    )
    return {
        stream.name: {"shape": sources[0].tensors[stream.name].shape} | {k: np.asarray(v) for k, v in row.items()}
        for stream, row in zip(streams, said, strict=True)
    }


def _merge(
    request, sources, steps, plan: Plan, tasks, sink: Sink, bundle: bool, share, layout, beside, fingerprint, progress
) -> dict:
    base = sources[0]
    turned = Turned(sources, {} if bundle else pytorch_places(base), request.workers)
    back = Back(turned, sink.write)
    streams = [_stream(turned, name, plan) for name in plan.merged]
    total = _bytes_to_read(steps, sources, plan)
    log = TensorLog(sink.partial, fresh=not sink.done)
    overflow = Overflow(log)
    prefix = "base/" if bundle else ""
    for name in base.tensors:
        if name not in share.tensors or (bundle and name in plan.own):
            continue
        if bundle or name in plan.kept or name in plan.own:
            _copy(base, name, sink, prefix + name, request, overflow)
        if name in plan.kept:
            log.add(name, {"from": "base", "because": plan.kept[name]})
    for name, target in plan.aliases.items():
        if target in share.tensors:
            log.add(name, {"tied_to": target})
    if bundle:
        for source, task in zip(sources[1:], tasks, strict=True):
            for name in plan.own:
                if name in source.tensors and name in share.tensors:
                    _copy(source, name, sink, f"own/{task}/{name}", request, overflow)
        for name in share.tensors & {*plan.own}:
            log.add(name, {"from": "each task's own model"})

    def outputs_of(stream: Stream) -> list[str]:
        parts = steps[-1].kind.parts(stream.shape, len(tasks)) if bundle else {}
        return [f"{part}/{stream.name}" for part in parts] if bundle else [stream.name]

    def look(k: int, start: int, value: np.ndarray) -> None:
        read = functools.partial(_finite_in_all, streams[k], len(sources), start, start + value.shape[-1])
        overflow.look(streams[k].name, value, None if request.check_finite else read)

    def write(k: int, start: int, value: Any) -> None:
        name = streams[k].name
        if value is None:
            return
        if not bundle:
            look(k, start, value)
            back.write(name, start, value)
            return
        parts = steps[-1].kind.parts(streams[k].shape, len(tasks))
        for part, array in value.items():
            if request.check_finite or parts[part].over != "tasks":  # the latter cannot be traced to single inputs
                look(k, start, array)
            if parts[part].over != "tasks and entries":
                sink.write(f"{part}/{name}", start, array)
                continue
            row = math.prod(parts[part].stored[1:])
            at = start // 8 if parts[part].dtype == "bits" else start
            for t in range(len(tasks)):
                sink.write(f"{part}/{name}", t * row + at, array[t])

    def done(k: int, carries: Carries) -> None:
        stream = streams[k]
        back.done(stream.name)
        row = log.describe(stream, carries, steps, len(tasks))
        if turned.places and "/" in turned.places.get(stream.name, (stream.name,))[0]:
            # It has no name in PyTorch: rows, groups and random numbers cannot follow it there.
            row["in PyTorch"] = "part of a fused tensor, or in another shape"
        if stream.name in plan.rows:
            row |= {"shape": list(base.tensors[stream.name].shape), "merged rows": plan.rows[stream.name]}
        log.add(stream.name, row)
        if stream.name in plan.rows:
            _copy(base, stream.name, sink, stream.name, request, overflow, start=stream.size)
            return
        overflow.note(stream.name)
        for name in outputs_of(stream):
            sink.mark_done(name)

    mine = [k for k, s in enumerate(streams) if s.name in share.tensors]
    there = [k for k in mine if set(outputs_of(streams[k])) <= sink.done]
    skip = {*range(len(streams))}.difference(mine).union(there)
    settings = _settings(request, _counter(progress, total))
    with _naming_files(turned):
        outcome = run(steps, streams, len(tasks), write, done, settings, skip)
    scalars = {k: np.asarray(v, np.float32) for k, v in scalars_of(steps[-1], outcome.carry, len(tasks)).items()}
    report = {
        "recipe": request.recipe,
        "inputs": [describe_input(s, request.digests) for s in sources],
        "versions": versions(),
        "tasks": list(tasks),
        "scalars": {k: v.tolist() for k, v in scalars.items()},
        "tensors": log.rows(),
    }
    dtype = request.dtype or (np.dtype(np.float32) if bundle else None)
    several = share.among is not None
    # A resumed merge has not seen all of its tensors, nor has one of several processes.
    report["warnings"] = [] if skip else processes.equal_to_base(request.models, outcome.differs)
    if several:
        report |= {"fingerprint": fingerprint, "differs": None if there else list(outcome.differs)}
    report["warnings"] += warnings_of(report["tensors"], lambda name: dtype or base.tensors[name].dtype)
    if request.differing == "own":
        report["warnings"] += implausible(sources, plan, request.models)
    for name in (n for n in plan.rows if n in share.tensors):
        count = base.tensors[name].shape[0]
        report["warnings"].append(f"{name}: its first {plan.rows[name]} rows merge, of {count} that the base has")
    if request.process == 0:
        _add_files(sink, beside, tasks, steps[-1].kind, scalars, report, sources, plan, layout)
    sink.add_file(REPORT, json.dumps(report, indent=1).encode())
    progress(total, total)
    sink.finish(without=[LINES])
    return report


def _settings(request: Request, progress) -> Settings:
    import jax

    key = jax.random.key(request.seed, impl="threefry2x32")
    return Settings(key, request.dtype, request.check_finite, request.workers, progress)


def _counter(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Adds up the bytes that threads read."""
    counted, lock = [0], threading.Lock()

    def advance(n: int) -> None:
        with lock:
            counted[0] += n
            progress(min(counted[0], total), total)

    return advance


@contextlib.contextmanager
def _naming_files(turned: Turned):
    """Says of NaN and infinity which file they are in."""
    try:
        yield
    except NonFinite as error:
        file = turned.sources[error.row].tensors[error.name].file
        raise ContentError(
            f"{file}: tensor {error.name!r} holds {error.value} at {turned.entry(error.name, error.entry)}"
        ) from None


def _beside(request: Request, tasks: Sequence[str]) -> dict[str, Any]:
    """What stands beside the tensors, by name: the base's files, and in a bundle those of the tasks' models.

    Raises:
      CheckpointError: if one of them cannot be read.
    """
    places = {"": request.base}
    if tasks:
        places = {"base/": request.base} | {f"tasks/{t}/": p for t, p in zip(tasks, request.models, strict=True)}
    found = {place: outputs.beside(path, request.dtype) for place, path in places.items()}
    return {place + name: data for place, files in found.items() for name, data in files.items()}


def _add_files(sink: Sink, beside, tasks, kind, scalars, report, sources, plan: Plan, layout) -> None:
    for name, data in beside.items():
        sink.add_file(name, data)
    if kind is not None:
        sizes = outputs.bytes_by_part(layout)
        full = sum(s.size_bytes for s in sources[1:])
        report["size"] = {"bundle_bytes": sum(sizes.values()), "full_models_bytes": full, "parts_bytes": sizes}
        shapes = {n: sources[0].tensors[n].shape for n in plan.merged}
        described = bundles.description(kind, tasks, shapes, scalars)
        sink.add_file(bundles.DESCRIPTION, json.dumps(described, indent=1).encode())


def _stream(turned: Turned, name: str, plan: Plan) -> Stream:
    shape, rows = turned.shape(name), plan.rows
    if name in rows and turned.order(name) is not None:
        raise MergeError(
            f"tensor {name!r}: its rows are the last axis of the base's file; --exclude takes it from there"
        )
    return Stream(
        name,
        (rows[name], *shape[1:]) if name in rows else shape,
        turned.sources[0].tensors[name].dtype,
        lambda row, start, stop, out: turned.read(row, name, start, stop, out),
        turned.places.get(name, (name, None))[0],
        copies_of(name, plan.aliases),
    )


def _share(request: Request, sources, plan: Plan, layout, bundle: bool) -> processes.Share:
    """The tensors of this process, with what it writes of them."""
    home = {n: n.split("/", 2 if n.startswith("own/") else 1)[-1] if bundle else n for n in layout}
    merged = {*plan.merged}
    sizes = {}
    for name in dict.fromkeys(home.values()):
        info = next(s.tensors[name] for s in sources if name in s.tensors)
        sizes[name] = info.nbytes, len(sources) if name in merged else 1
    return processes.share_of(request, layout, home, processes.work_of(sizes, layout, home))


def _finite_in_all(stream: Stream, rows: int, start: int, stop: int) -> np.ndarray:
    """Which entries of a tensor are finite in the base and all models."""
    block = np.empty((rows, stop - start), stream.dtype)
    for row in range(rows):
        stream.read(row, start, stop, block[row])
    return np.all(np.isfinite(block), axis=0)


def _copy(
    source: Source, name: str, sink: Sink, target: str, request: Request, overflow: Overflow, start: int = 0
) -> None:
    """Copies a tensor as it is, or cast to the output dtype, from an entry on."""
    if target in sink.done:
        return
    info, dtype = source.tensors[name], sink.plan[target][0]
    for at in range(start, info.size, _CHUNK):
        block = source.read(name, at, min(at + _CHUNK, info.size))
        if info.dtype.kind not in "iub" and request.check_finite and not np.isfinite(block).all():
            bad = int(np.flatnonzero(~np.isfinite(block))[0])
            entry = [int(i) for i in np.unravel_index(at + bad, info.shape)] if info.shape else []
            raise ContentError(f"{info.file}: tensor {name!r} holds {float(block[bad])} at {entry}")
        with np.errstate(over="ignore"):
            cast = block.astype(dtype, copy=False)
        if cast is not block:
            overflow.look(name, cast, functools.partial(np.isfinite, block))
        sink.write(target, at, cast)
    overflow.note(name)
    sink.mark_done(target)


def _bytes_to_read(steps, sources, plan: Plan) -> int:
    """About how much the passes read: one pass for each statistic of the tree, and one for the rest."""
    size = sum(sources[0].tensors[n].nbytes for n in plan.merged) * len(sources)
    return size * (len(global_stages(steps, passing=False)) + 1)


def _fingerprint(request: Request, sources: Sequence[Source]) -> str:
    parts = [json.dumps(request.recipe, sort_keys=True), f"tadrop_jax {__version__}"]
    if request.processes > 1:
        parts.append(f"{request.processes} processes, files of {request.max_shard_size}")
    for source in sources:
        stats = [os.stat(f) for f in source.files]
        parts.append(source.header_digest + json.dumps([(s.st_size, s.st_mtime_ns) for s in stats]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
