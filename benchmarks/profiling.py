"""Where a streamed merge spends its time: what its threads are at, looked at some hundred times a second.

    python -m benchmarks.profiling [--methods ties,emr+tadrop] [--models 7] [--size 124M] [--json FILE]

Shares are of the cores' time from the first read to the end: 100 % is every core of the process busy all along. "Idle"
is what no thread of the merge takes: stretches that one thread works through alone, and waiting for another. "Cores
busy" is by the kernel's account of processor seconds. Inputs are in the page cache, and once more have to come from
the disk; start-up is not looked at.
"""

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tadrop_jax import processors

processors.prefer_avx2()  # as the command line does

from benchmarks import gpt2_directories, measure, merges  # noqa: E402
from tadrop_jax import cli  # noqa: E402
from tadrop_jax.workers import cores  # noqa: E402

COLUMNS = {
    "method": ("method", ""),
    "wall_s": ("wall, s", ".2f"),
    "rate": ("inputs, GB/s", ".2f"),
    "busy": ("cores busy", ".2f"),
    "reading": ("reading", ".0%"),
    "checking": ("looking for NaN", ".0%"),
    "computing": ("compiled functions", ".0%"),
    "selecting": ("counting and partitioning", ".0%"),
    "writing": ("writing", ".0%"),
    "other": ("other", ".0%"),
    "idle": ("idle", ".0%"),
}
_PERIOD = 0.003
# What a thread is at, by file and function of its innermost frame that is here; "" is any function of the file.
_PLACES = {
    ("reading.py", "_check"): "checking",
    ("reading.py", "all_finite"): "checking",
    ("reading.py", ""): "reading",
    ("sampling.py", ""): "selecting",
    ("sink.py", ""): "writing",
    ("tensors.py", "parts_of"): "writing",
    ("tensors.py", "call"): "computing",
    ("workers.py", "side_by_side"): "",  # waits for its threads
}


def at(frame: FrameType | None) -> str | None:
    """What a thread is at: a column, "" if it waits for its threads, None if it is no thread of the merge."""
    inside = False
    while frame is not None:
        path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.parent.name in ("tadrop_jax", "checkpoints", "safetensors"):
            found = _PLACES.get((path.name, function), _PLACES.get((path.name, "")))
            if found is not None:
                return found
            inside = True
        frame = frame.f_back
    return "other" if inside else None


def watch(stop: threading.Event) -> Iterator[tuple[float, float, Counter]]:
    """Times, processor seconds so far, and what the threads are at, until it is stopped."""
    own = threading.get_ident()
    while not stop.wait(_PERIOD):
        seen = (at(frame) for thread, frame in sys._current_frames().items() if thread != own)
        yield time.perf_counter(), time.process_time(), Counter(what for what in seen if what)


def forget(inputs: Sequence[Path]) -> None:
    """Takes files out of the page cache, so that they are read from the disk next time."""
    for path in (file for folder in inputs for file in folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(inputs: Sequence[Path]) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for folder in inputs for file in folder.iterdir())


def profile(method: str, inputs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Merges in this process, and gives a row of the table."""
    looks: list[tuple[float, float, Counter]] = []
    stop = threading.Event()
    watcher = threading.Thread(target=lambda: looks.extend(watch(stop)))
    base, *models = map(str, inputs)
    watcher.start()
    try:
        given = ["merge", "--base", base, "--models", *models, *merges.options(method), "--out", str(out), "--quiet"]
        if cli.main(given):
            raise RuntimeError(f"{method} failed")
    finally:
        stop.set()
        watcher.join()
        merges.remove(out)
    # A small merge may be over between two looks.
    first = next((i for i, (_, _, seen) in enumerate(looks) if seen["reading"] or seen["checking"]), 0)
    looks = looks[first:]
    (begin, cpu, _), (end, cpu_end, _) = looks[0], looks[-1]
    total, all_ = Counter[str](), cores() * len(looks)
    for _, _, seen in looks:
        total += seen
    shares = {name: total[name] / all_ for name in COLUMNS if name not in ("method", "wall_s", "rate", "busy", "idle")}
    busy = (cpu_end - cpu) / (end - begin)
    took = {"method": method, "wall_s": end - begin, "rate": size_of(inputs) / 1e9 / (end - begin), "busy": busy}
    return {**took, **shares, "idle": max(1 - sum(shares.values()), 0.0)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--models", type=int, metavar="N", help="fine-tunes (7; 2 with --quick)")
    parser.add_argument("--size", choices=gpt2_directories.SIZES, help="parameters (124M; 1M with --quick)")
    parser.add_argument("--methods", default="task_arithmetic,ties,task_arithmetic+tadrop,emr+tadrop")
    parser.add_argument("--dir", type=Path, help="keep the models there for the next run (a temporary directory)")
    options = measure.chosen(parser.parse_args(arguments), models=(7, 2), size=("124M", "1M"))
    facts = measure.machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder, scratch = options.dir or Path(temporary), Path(temporary)
        kind = gpt2_directories.DTYPES["float32"]
        base, models = gpt2_directories.make(folder, options.models, kind, size=gpt2_directories.SIZES[options.size])
        inputs = [base, *models]
        forget(inputs)
        floor = merges.floor(inputs, scratch / "floor")  # into the page cache
        rate = size_of(inputs) / 1e9 / floor.wall_s
        rows: list[dict[str, Any]] = [{"method": "the floor, from the disk", "wall_s": floor.wall_s, "rate": rate}]
        for method in options.methods.split(","):
            profile(method, inputs, scratch / "merged")  # compiled
            rows.append(profile(method, inputs, scratch / "merged"))
            forget(inputs)
            rows.append({**profile(method, inputs, scratch / "merged"), "method": f"{method}, from the disk"})
    setting = {"models": options.models, "size": options.size, "cores": cores()}
    measure.show("profiling", facts, setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
