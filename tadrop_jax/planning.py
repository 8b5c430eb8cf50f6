"""What is to be merged, and the checks of base and models against each other before a tensor is read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.errors import few
from converters.files.sidecars import companion
from tadrop_jax.checkpoints.safetensors import Source, tied_aliases
from tadrop_jax.errors import CheckpointError, MergeError, ParameterError
from tadrop_jax.steps import AnyStep, expand, output_of, patterns, per_task_patterns
from tadrop_jax.task_vector import check_alike, check_names
from tadrop_jax.trees import check_patterns, copies_of, selected, selected_tied


class Request(NamedTuple):
    """What to merge, and how.

    Attributes:
      base: safetensors file or Hugging Face directory of the base.
      models: the same for each of T fine-tunes.
      out: where the result is to appear: a directory, or a file that ends in ``.safetensors``.
      chain: sparsifier and rule.
      recipe: the serialisable description, for the report and to recognise a merge that is resumed.
      include: regular expressions of tensors to merge; empty means all. A tied tensor is matched by any of its names.
      exclude: regular expressions of tensors to take from the base.
      differing: what becomes of tensors that a model lacks, or has in another shape: ``"refuse"``, or, for a per-task
        rule, ``"own"``: each task keeps its own; or, for a rule that gives one model, ``"overlap"``: of those with
        other numbers of rows (vocabularies that grew) the rows that all have merge, and the rest is the base's.
      seed: of the random numbers.
      dtype: of the output; None keeps the base's.
      max_shard_size: bytes a file.
      resume: go on from what an interrupted merge left.
      check_finite: refuse NaN and infinity.
      digests: put full SHA-256 digests of the inputs into the report.
      workers: threads; None means one a core.
      process: which of several processes this is, from 0; each merges its share of the tensors.
      processes: how many there are.
    """

    base: Path
    models: tuple[Path, ...]
    out: Path
    chain: AnyStep
    recipe: dict[str, Any]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    differing: str = "refuse"
    seed: int = 0
    dtype: np.dtype | None = None
    max_shard_size: int = 5_000_000_000
    resume: bool = False
    check_finite: bool = True
    digests: bool = False
    workers: int | None = None
    process: int = 0
    processes: int = 1


class Plan(NamedTuple):
    """What becomes of each tensor.

    Attributes:
      merged: names that the chain merges.
      kept: names that come from the base, and why.
      own: names that stay each task's own.
      aliases: tied tensors, and the tensor that each is a copy of.
      rows: how many rows merge of tensors whose number of rows differs.
    """

    merged: tuple[str, ...]
    kept: dict[str, str]
    own: tuple[str, ...]
    aliases: dict[str, str]
    rows: dict[str, int]


def make_plan(sources: Sequence[Source], request: Request) -> Plan:
    """Checks base and models against each other, before a tensor is read.

    Raises:
      MismatchError: naming file, tensor and both values.
      ParameterError: if a pattern matches nothing, or the seed has more than 64 bits.
    """
    if not -(2**63) <= request.seed < 2**63:
        raise ParameterError(f"seed must lie in [-2^63, 2^63 - 1], got {request.seed}")
    base, models = sources[0], sources[1:]
    per_task = per_task_patterns(request.chain)
    config = _config(request.base)
    ties = [tied_aliases(m, _config(p) or config) for p, m in zip(request.models, models, strict=True)]
    # A copy that some model trained apart is a tensor of its own.
    untied = {n for m, tied in zip(models, ties, strict=True) for n in m.tensors if n not in tied}
    aliases = {n: target for n, target in tied_aliases(base, config).items() if n not in untied}
    names = [n for n in base.tensors if n not in aliases]
    include, exclude = patterns(request.include), patterns(request.exclude)
    everywhere = dict.fromkeys([*names, *(n for m in models for n in m.tensors)])
    check_patterns((*include, *exclude, *per_task), everywhere)
    check_patterns(
        [pattern for step in expand(request.chain, len(models)) for pattern in step.named], [*names, *aliases]
    )
    apart = _differing(sources, request, names, everywhere)

    def chosen(name: str) -> bool:
        """Copies are one tensor in the result: what takes out one of them takes out all."""
        return selected_tied((name, *copies_of(name, aliases)), include, exclude)

    def stays_own(name: str) -> bool:
        """A tied tensor by any of its names, once: its copies are not written."""
        return name not in aliases and any(selected(n, per_task) for n in (name, *copies_of(name, aliases)))

    own = tuple(n for n in everywhere if n in apart or (per_task and stays_own(n)))
    kept: dict[str, str] = {}
    for name in names:
        dtype = base.tensors[name].dtype
        if name in own:
            continue
        if not chosen(name):
            kept[name] = "excluded"
        elif dtype.kind in "iub":
            kept[name] = f"{dtype} tensor"
        elif dtype.itemsize > 4 or dtype.kind == "c":
            raise MergeError(
                f"{base.tensors[name].file}: tensor {name!r} is {dtype}: only floats of up to 32 bits merge"
            )
    # What is excluded, tied or a task's own need not be alike; neither do extra tensors that a pattern takes out.
    loose = {n for n in everywhere if n in own or n in aliases or not chosen(n)}
    rows = _overlapping(sources, request, [n for n in names if n not in loose and n not in kept])

    def said(source: Source, name: str) -> tuple:
        info = source.tensors[name]
        return (rows[name], *info.shape[1:]) if name in rows else info.shape, info.dtype

    for path, model, tied in zip(request.models, models, ties, strict=True):
        stored = [n for n in model.tensors if n in base.tensors or n not in tied]
        check_names(names, stored, str(path), frozenset(loose), str(request.base))
        for name in names:
            if name in loose:
                continue
            files = (str(s.tensors[name].file) for s in (model, base))
            check_alike(name, said(base, name), said(model, name), *files)
    merged = tuple(n for n in names if n not in kept and n not in own)
    if not merged:
        why = ", ".join(sorted({*kept.values(), *(["each task's own"] if own else [])}))
        raise MergeError(f"{request.base}: there is no float tensor to merge (all of its {len(names)}: {why})")
    return Plan(merged, kept, own, aliases, rows)


def _differing(sources, request: Request, names: list[str], everywhere) -> set[str]:
    """The tensors that stay each task's own since they are not alike in the base and all models.

    Raises:
      MergeError: if the rule gives one model, which cannot keep them.
    """
    if request.differing != "own":
        return set()
    if output_of(request.chain) != "bundle":
        raise MergeError("differing tensors can stay each task's own only with a method that gives one model per task")

    def alike(name: str) -> bool:
        return len({s.tensors[name].shape if name in s.tensors else None for s in sources}) == 1

    merged = (n for n in everywhere if n in names or n not in sources[0].tensors)
    return {n for n in merged if not alike(n) and selected(n, request.include, request.exclude)}


def _overlapping(sources, request: Request, names: list[str]) -> dict[str, int]:
    """The tensors that differ in their number of rows alone, and how many of these all have.

    Raises:
      MergeError: if the rule gives one model per task, which has the base's rows.
    """
    if request.differing != "overlap":
        return {}
    if output_of(request.chain) == "bundle":
        raise MergeError("rows overlap only with a method that gives one model; --differing own keeps each task's own")
    shapes = {n: [s.tensors[n].shape for s in sources if n in s.tensors] for n in names}
    differ = {n: some for n, some in shapes.items() if len(set(some)) > 1 and all(some)}
    return {n: min(s[0] for s in some) for n, some in differ.items() if len({s[1:] for s in some}) == 1}


def implausible(sources: Sequence[Source], plan: Plan, paths: Sequence[Path]) -> list[str]:
    """Warnings of tensors that moved by more than their own size, as heads that were trained anew do.

    Sampled: at most the first 65,536 entries of each tensor, and at most five lines.
    """
    lines = []
    for name in plan.merged:
        count = min(sources[0].tensors[name].size, 1 << 16)
        base, *models = (s.read(name, 0, count).astype(np.float32) for s in sources)
        size = float(np.linalg.norm(base))
        for path, model in zip(paths, models, strict=True):
            ratio = float(np.linalg.norm(model - base)) / size if size else 0.0
            if ratio > 1:
                lines.append(
                    f"{path}: tensor {name!r} moved by {ratio:.1f} times its own size; "
                    "if it was trained anew, let it stay the task's own (per_task)"
                )
    return few(lines, of=" such tensors")


def task_names(models: Sequence[Path]) -> tuple[str, ...]:
    """The models' directory names (file names without suffix), made unique by their parents if need be."""
    # A file keeps the name that it was given by: in the cache of Hugging Face it is a link to one named by its hash.
    paths = [Path(os.path.abspath(p)) if p.is_file() else p.resolve() for p in models]
    names = [p.stem if p.is_file() else _name(p) for p in paths]
    if len(set(names)) < len(names):
        names = [f"{_name(p.parent)}-{n}" for p, n in zip(paths, names, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{n}-{t}" for t, n in enumerate(names)]
    return tuple(names)


def _name(directory: Path) -> str:
    """A directory's name; of one in the cache of Hugging Face that of the model, and not of the commit."""
    snapshots, repository = directory.parent.name, directory.parent.parent.name
    cached = snapshots == "snapshots" and repository.startswith("models--")
    return repository.rpartition("--")[-1] if cached else directory.name


def refuse_same_file(models: Sequence[Source]) -> None:
    """Refuses a model that is given twice, by whatever link or spelling.

    Single shards may be one: the cache of Hugging Face keeps what several models have in common once.

    Raises:
      MergeError: naming both paths.
    """
    seen: dict[frozenset[tuple[int, int]], Path] = {}
    for model in models:
        stats = [os.stat(file) for file in model.files]
        other = seen.setdefault(frozenset((stat.st_dev, stat.st_ino) for stat in stats), model.path)
        if other is not model.path:
            raise MergeError(f"two of the models are the same file: {other} and {model.path}")


def _config(path: Path) -> dict[str, Any] | None:
    file = companion(path, "config.json")
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else None
