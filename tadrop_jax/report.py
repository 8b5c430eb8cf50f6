"""The machine-readable report beside a merged checkpoint: what was merged from what, and what it did to each tensor."""

import importlib.metadata
import json
import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tadrop_jax import __version__
from tadrop_jax.checkpoints.safetensors import journal
from tadrop_jax.steps import reported

REPORT = "merge_report.json"
OURS = "tadrop-jax"  # its version among the others
# Goes when the result appears.
LINES = "merge_report.jsonl"


class TensorLog:
    """What became of each tensor, a line each in a file beside the work, so that a resumed merge knows it all."""

    def __init__(self, folder: Path, fresh: bool):
        """Opens the log in ``folder``; a fresh one forgets what an earlier run said."""
        self.file = folder / LINES
        self._lock = threading.Lock()
        if fresh or not self.file.exists():
            self.file.write_text("")
        journal.complete_lines(self.file)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Notes a tensor."""
        with self._lock, self.file.open("a") as file:
            file.write(json.dumps({"name": name, **row}) + "\n")

    def rows(self) -> dict[str, dict[str, Any]]:
        """What was noted of each tensor, by name; of each thing the last word."""
        found: dict[str, dict[str, Any]] = {}
        for row in (json.loads(line) for line in self.file.read_text().splitlines()):
            found.setdefault(row.pop("name"), {}).update(row)
        return found

    @staticmethod
    def describe(stream, carries, steps, tasks: int) -> dict[str, Any]:
        """A merged tensor in numbers: what the steps computed anyway, and what they say of its shape."""
        row: dict[str, Any] = {"shape": list(stream.shape), "dtype": stream.dtype.name}
        at = [k for k, step in enumerate(steps) if step.covers(stream.name, stream.aliases)]
        own = [steps[k].for_tensor(stream.name, stream.shape, tasks, stream.aliases) for k in at]
        row |= {name: _floats(values) for name, values in reported(own, [carries[k] for k in at]).items()}
        for step in own:
            row |= step.note(stream.shape, tasks) if step.note else {}
        return row


def describe_input(source, digests: bool) -> dict[str, Any]:
    """One input: path, size, digest of the headers; the full digest costs more than the merge, so only if asked for."""
    row = {"path": str(source.path), "bytes": source.size_bytes, "header_sha256": source.header_digest}
    return row | ({"sha256": source.full_digest()} if digests else {})


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    packages = ("jax", "jaxlib", "numpy", "safetensors")
    found = {"python": platform.python_version(), OURS: __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _floats(values) -> list[float]:
    return [float(np.float32(v)) for v in np.ravel(np.asarray(values))]
