"""Measures one command from outside: wall time, processor time, peak anonymous memory, children included."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PERIOD = 0.02


class Measurement(NamedTuple):
    """What one run took.

    Attributes:
        wall_s: seconds from start to end, start-up included.
        cpu_s: user and system seconds, of children too.
        anonymous_mb: peak of the sum of RssAnon over the process and its children, sampled 50 times a second,
            in units of 10^6 bytes; None where the system does not tell.
    """

    wall_s: float
    cpu_s: float
    anonymous_mb: float | None


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Measurement:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        environment: what is added to this process's environment.
        log: where its output goes.

    Returns:
        The measurement.

    Raises:
        RuntimeError: when the command fails; with the end of its output.
    """
    peak, stop = 0, threading.Event()
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment})

        def watch() -> None:
            nonlocal peak
            while not stop.wait(_PERIOD):
                peak = max(peak, _anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        stop.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
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
