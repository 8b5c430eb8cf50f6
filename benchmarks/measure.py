"""What every benchmark shares: timing in turns, a command measured from outside, the table, the JSON file.

A ratio is the median of the ratios of single rounds, in each of which every candidate ran once: what loads the machine
meanwhile loads both sides. Seconds are those of the fastest round.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tadrop_jax.workers import cores

_PERIOD = 0.02
PACKAGES = ("tadrop-jax", "jax", "jaxlib", "numpy", "mergekit", "torch", "peft", "transformers", "safetensors")
# Heading and format of each column, by the key that it has in a row.
Columns = Mapping[str, tuple[str, str]]


class Measurement(NamedTuple):
    """What one run took.

    Attributes:
        wall_s: seconds from start to end, start-up included.
        cpu_s: user and system seconds, of children too.
        anonymous_mb: peak of the sum of RssAnon over the process and its children, sampled 50 times a second,
            in units of 10^6 bytes; None where the system does not tell, or nobody asked.
    """

    wall_s: float
    cpu_s: float
    anonymous_mb: float | None = None


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float | None = None) -> Measurement:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        environment: what is added to this process's environment. Python keeps what it compiled, as it does for users:
            what was installed is compiled already, what is run from its sources would be compiled by every command.
        log: where its output goes.
        limit_s: after which it is stopped.

    Returns:
        The measurement.

    Raises:
        RuntimeError: when the command fails or is stopped; with the end of its output.
    """
    peak, stop = 0, threading.Event()
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | dict(environment)
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=given)

        def watch() -> None:
            nonlocal peak
            while not stop.wait(_PERIOD):
                peak = max(peak, _anonymous_bytes(process.pid))
                if limit_s is not None and time.perf_counter() - start > limit_s:
                    process.kill()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # stopped from outside: not to go on alone
            process.kill()
            raise
        finally:
            wall = time.perf_counter() - start
            stop.set()
            watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} after {wall:.0f} s:\n{end}")
    return Measurement(wall, usage.ru_utime + usage.ru_stime, peak / 1e6 or None)


def _anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its descendants; a process that ends meanwhile counts as nothing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except (OSError, ValueError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own + sum(_anonymous_bytes(child) for child in children)


def timed(function: Callable[[], Any], at_least_s: float = 0) -> Measurement:
    """One call inside this process, or the mean of as many as take so long; processor seconds of all its threads."""
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    while not calls or time.perf_counter() - wall < at_least_s:
        function()
        calls += 1
    return Measurement((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


def in_turns(candidates: Mapping[str, Callable[[], Measurement]], rounds: int) -> dict[str, list[Measurement]]:
    """Measures every candidate once a round, one after another."""
    found: dict[str, list[Measurement]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            found[name].append(candidate())
    return found


def ratio(
    runs: Sequence[Measurement], to: Sequence[Measurement] | None, less: float | None = 0, of: str = "wall_s"
) -> float | None:
    """The median over rounds of a ratio; None where the other was not measured.

    Args:
        runs: one measurement a round.
        to: those of what is compared with.
        less: seconds that are taken off ``runs`` first, start-up for instance.
        of: wall or processor seconds; the latter mind other load on the machine less.
    """
    if not to or not runs:
        return None
    sides = [[getattr(m, of) for m in side] for side in (runs, to)]
    # What was measured once (a slow peer) is set beside the middle of the other's rounds.
    if len(runs) != len(to):
        sides = [[statistics.median(side)] for side in sides]
    return statistics.median(max(a - (less or 0), 0) / b if b else math.inf for a, b in zip(*sides, strict=True))


def fastest(runs: Sequence[Measurement] | None) -> float | None:
    """Wall seconds of the fastest round."""
    return min(m.wall_s for m in runs) if runs else None


def processor(runs: Sequence[Measurement] | None) -> float | None:
    """Processor seconds of the cheapest round."""
    return min(m.cpu_s for m in runs) if runs else None


def memory(runs: Sequence[Measurement] | None) -> float | None:
    """Peak of the anonymous memory over the rounds."""
    return max((m.anonymous_mb for m in runs or () if m.anonymous_mb), default=None)


def has(*modules: str) -> bool:
    """Whether a peer is installed."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def machine() -> dict[str, Any]:
    """Facts that a measurement is worth nothing without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {"cpu": cpu, "cores": cores(), "load_before": os.getloadavg()[0], "system": platform.platform()}
    jax = sys.modules.get("jax")
    device = {} if jax is None else {"device": jax.devices()[0].device_kind}
    return {**facts, **device, "python": platform.python_version(), "versions": versions}


def parser(module_doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    text = (module_doc or "").strip()
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    made.add_argument("--rounds", type=int, help="how often each candidate runs (5; 3 with --quick)")
    made.add_argument("--json", type=Path, help="write the result there")
    return made


def chosen(options: argparse.Namespace, **choices: tuple[Any, Any]) -> argparse.Namespace:
    """Fills in what was not said: the first value, or with ``--quick`` the second."""
    for name, (usual, quick) in {"rounds": (5, 3), **choices}.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    return options


def numbers(text: str) -> list[int]:
    """A comma-separated list, ``1e4,1e5`` as well; it may be empty."""
    return [int(float(part)) for part in text.split(",") if part]


def table(columns: Columns, rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """The rows as text; what was not measured stays empty.

    Args:
        columns: heading and format by key, in order.
        rows: values by key; ``note`` stands at the end of a row that has one.
        markdown: for a page of the documentation.
    """
    noted = any(row.get("note") for row in rows)
    heads = [head for head, _ in columns.values()] + ["note"] * noted
    cells = [
        [_cell(row.get(key), form) for key, (_, form) in columns.items()] + [row.get("note") or ""] * noted
        for row in rows
    ]
    if markdown:
        lines = [heads, ["---"] * len(heads), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    aligned = [">" if form[-1:] in "fdg" and form else "<" for _, form in columns.values()] + ["<"] * noted
    return "\n".join(
        "  ".join(f"{cell:{way}{width}}" for cell, way, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in [heads, *cells]
    )


def _cell(value: Any, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def said(row: dict[str, Any]) -> dict[str, Any]:
    """Prints a row as it was measured, since the next one may take half an hour, and gives it back."""
    print(json.dumps(row), flush=True)
    return row


def show(
    name: str,
    facts: Mapping[str, Any],
    setting: Mapping[str, Any],
    columns: Columns,
    rows: Sequence[Mapping[str, Any]],
    file: Path | None,
) -> None:
    """Prints what was measured, and writes it where asked."""
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    print(f"{name}: {said}; {facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before")
    print(table(columns, rows))
    if file:
        kept = {"benchmark": name, "machine": facts, "setting": setting, "columns": columns, "rows": rows}
        file.write_text(json.dumps(kept, indent=1, default=str) + "\n")
