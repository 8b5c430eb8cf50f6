"""One merge on disk by several processes: each writes the files of its share of the tensors; the last one joins them.

Nothing passes between the processes but files, so that any launcher will do, on one machine or on many that see the
same disk. ``OUT.partial/I`` is the share of process I once it is complete, a directory of its own
(``OUT.partial/I.partial`` until then, as of any merge). Whoever finds all shares there moves them together: files whose
numbers were dealt out beforehand, one index, one report. What is done may be done again, so that a process that broke
off, in the middle of that too, is simply run again. Statistics of the whole tree are computed by every process for
itself: they are the same in each to the last bit, and nobody waits for another; it costs that every process reads all
inputs for them.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converters.files.safetensors import INDEX, index
from tadrop_jax.checkpoints.safetensors import check_directory, count_shards, journal
from tadrop_jax.errors import CheckpointError, MergeError
from tadrop_jax.report import LINES, OURS, REPORT


class Share(NamedTuple):
    """What one process does.

    Attributes:
      out: where its part of the result is to appear.
      tensors: names of the tensors that it merges or copies.
      layout: what it writes: dtype and shape by name.
      among: how many files of the result come before its own, and how many there are; None for one process.
    """

    out: Path
    tensors: frozenset[str]
    layout: dict[str, tuple]
    among: tuple[int, int] | None


def share_of(request, layout: Mapping[str, tuple], tensor_of: Mapping[str, str], work: Mapping[str, int]) -> Share:
    """The share of a process, the same from wherever it is computed.

    Largest tensors first, each goes to the process that has the least to do so far.

    Args:
      request: its ``process``, ``processes``, ``out`` and ``max_shard_size``.
      layout: all that is written: dtype and shape by name.
      tensor_of: for each of these names the tensor that it belongs to.
      work: bytes that each tensor makes a process read and write.

    Raises:
      MergeError: if there are more processes than tensors, or the result is to be one file.
    """
    if request.processes == 1:
        return Share(request.out, frozenset(work), dict(layout), None)
    check_directory(request.out, "several processes write several files")
    if len(work) < request.processes:
        raise MergeError(f"there are {len(work)} tensors, too few for {request.processes} processes")
    home, load = dict[str, int](), [0] * request.processes
    for name in sorted(work, key=lambda n: (-work[n], n)):
        home[name] = load.index(min(load))
        load[home[name]] += work[name] + 1
    layouts: list[dict] = [{} for _ in load]
    for name, described in layout.items():
        layouts[home[tensor_of[name]]][name] = described
    files = [count_shards(part, request.max_shard_size) for part in layouts]
    return Share(
        _folder(request.out) / str(request.process),
        frozenset(n for n, process in home.items() if process == request.process),
        layouts[request.process],
        (sum(files[: request.process]), sum(files)),
    )


def begin(request, fingerprint: str) -> dict | None:
    """Looks what there is of a share already; the report if this process has nothing left to do but to join.

    Raises:
      MergeError: if ``OUT`` holds something else, or is being made by one process; or if the share that is to be
        resumed is of another merge, or by another version of this library.
    """
    folder = _folder(request.out)
    if (folder / journal.NAME).exists():
        raise CheckpointError(f"{folder}: is an unfinished merge by one process; resume that, or move it away first")
    mine = folder / str(request.process)
    if request.resume:
        for done in (request.out, mine):
            report = _report(done)
            if report.get("fingerprint") == fingerprint:
                return report
        if report := _report(mine):
            raise journal.not_resumed(mine, report.get("versions", {}).get(OURS))
    if request.out.exists() and (request.out.is_file() or any(request.out.iterdir())):
        raise CheckpointError(f"{request.out}: exists already and is not empty; nothing is overwritten")
    shutil.rmtree(mine, ignore_errors=True)
    return None


def has_begun(share: Share) -> bool:
    """Whether an earlier run left a part of a share to go on from."""
    return share.out.with_name(share.out.name + ".partial").is_dir()


def join(request, fingerprint: str) -> dict | None:
    """Makes the result of the shares, if all are there; gives its report, or None if some are still missing.

    Any number of processes may call this at once, and again after one of them broke off.

    Raises:
      CheckpointError: if files cannot be moved.
    """
    folder, out = _folder(request.out), request.out.resolve()
    parts = [folder / str(i) for i in range(request.processes)]
    whole = folder / f"whole-{fingerprint[:16]}"
    try:
        with _locked(folder / "lock"):
            if _report(out).get("fingerprint") != fingerprint:
                reports = [_report(part) for part in parts]
                if any(report.get("fingerprint") != fingerprint for report in reports):
                    return None
                _assemble(parts, whole, _joined(request, reports))
                if out.is_dir():
                    out.rmdir()  # an empty one may be there
                whole.rename(out)
            shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        pass  # on a disk without locks another process was faster, and is at it still or done
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from error
    return _report(out) or None


def of_another_merge(request, fingerprint: str) -> list[Path]:
    """The complete shares beside this one that will not be joined with it, until their processes run again."""
    shares = [_folder(request.out) / str(i) for i in range(request.processes)]
    return [share for share in shares if _report(share).get("fingerprint", fingerprint) != fingerprint]


def abandon(request) -> None:
    """Leaves nothing behind of a process whose request is wrong, if no other one is at work."""
    with contextlib.suppress(OSError):
        _folder(request.out).rmdir()


def _assemble(parts: Sequence[Path], whole: Path, report: dict[str, Any]) -> None:
    weights: dict[str, str] = {}
    total = 0
    for part in parts:
        described = json.loads((part / INDEX).read_text())
        weights |= described["weight_map"]
        total += described["metadata"]["total_size"]
        for file in sorted(f for f in part.rglob("*") if f.is_file()):
            name = file.relative_to(part)
            # A process that broke off as its share appeared may have left its records there.
            if str(name) not in (INDEX, REPORT, LINES, journal.NAME):
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                file.rename(whole / name)
    missing = sorted(name for name in set(weights.values()) if not (whole / name).is_file())
    if missing:
        raise CheckpointError(f"{whole}: {missing[0]} is missing; start afresh without resume")
    for name, content in ((INDEX, index(weights, total)), (REPORT, json.dumps(report, indent=1))):
        with (whole / name).open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _joined(request, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of those of the shares."""
    differs = [report["differs"] for report in reports]
    rows = {name: row for report in reports for name, row in report["tensors"].items()}
    warnings = [line for report in reports for line in report["warnings"]]
    if None not in differs:  # a share that was resumed has not seen all of its tensors
        warnings = equal_to_base(request.models, [any(column) for column in zip(*differs, strict=True)]) + warnings
    first = {k: v for k, v in reports[0].items() if k not in ("share", "differs")}
    return first | {"warnings": list(dict.fromkeys(warnings)), "tensors": rows, "processes": request.processes}


def equal_to_base(models: Sequence[Path], differs: Sequence[bool]) -> list[str]:
    """A warning of each model that does not differ from the base."""
    same = [path for path, found in zip(models, differs, strict=True) if not found]
    return [f"{path}: equals the base, its task vector is zero" for path in same]


def work_of(sizes: Mapping[str, tuple[int, int]], layout: Mapping[str, tuple], tensor_of) -> dict[str, int]:
    """Bytes that each tensor makes a process read and write.

    Args:
      sizes: by tensor, its bytes in a file and how many files it is read from.
      layout: dtype and shape of what is written, by name.
      tensor_of: the tensor of each of these names.
    """
    work = {name: nbytes * files for name, (nbytes, files) in sizes.items()}
    for name, (dtype, shape) in layout.items():
        work[tensor_of[name]] += math.prod(shape) * dtype.itemsize
    return work


def _folder(out: Path) -> Path:
    return out.resolve().with_name(out.resolve().name + ".partial")


def _report(folder: Path) -> dict[str, Any]:
    """The report in a directory; empty where there is none."""
    try:
        return json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def _locked(file: Path):
    """Waits for its turn, on disks that have locks."""
    with file.open("w") as held:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
