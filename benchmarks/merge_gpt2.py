"""Merges GPT-2-small-sized directories and sets our time beside bare reading and writing, and mergekit's.

    python -m benchmarks.merge_gpt2                                   # TIES of 7 models against the floor
    python -m benchmarks.merge_gpt2 --peer --methods ties,ties+tadrop,emr --json result.json

Everything is measured in the same run, from outside the process, start-up included, with all inputs in the
page cache (the floor excepted, which runs in this process). `METHOD+SPARSIFIER` puts a sparsifier before a
rule.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from benchmarks import gpt2_directories, measure
from tadrop_jax.checkpoints.safetensors import open_source

BLOCK = 1 << 20
DENSITY, COEFFICIENT = 0.2, 0.3
# What each method is run with; a method that is not listed gets its defaults.
OPTIONS = {"ties": ["--density", str(DENSITY)], "task_arithmetic": ["--coefficient", str(COEFFICIENT)]}
PEER_PARAMETERS = {"ties": {"density": DENSITY, "weight": 1.0}, "task_arithmetic": {"weight": COEFFICIENT}}
PACKAGES = ("tadrop-jax", "jax", "jaxlib", "numpy", "mergekit", "torch", "transformers", "safetensors")


def floor(inputs: Sequence[Path], out: Path, threads: int = 2) -> measure.Measurement:
    """Reads every entry of every input once and writes one model's bytes: what no merge can be faster than.

    Args:
        inputs: directories of equal structure, the base first.
        out: file to write; not synced to the disk.
        threads: readers and writers.

    Returns:
        The measurement; memory is not measured.
    """
    before, start = os.times(), time.perf_counter()
    sources = [open_source(path) for path in inputs]
    tensors = sources[0].tensors.values()
    blocks = [(info, at) for info in tensors for at in range(0, info.size, BLOCK)]
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def work(thread: int) -> None:
        buffers = {info.dtype: np.empty(BLOCK, info.dtype) for info in tensors}
        for info, at in blocks[thread::threads]:
            for source in sources:
                block = source.read(info.name, at, min(at + BLOCK, info.size), buffers[info.dtype])
            os.pwrite(fd, block.view(np.uint8).data, info.offset + at * info.dtype.itemsize)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    os.close(fd)
    for source in sources:
        source.close()
    wall, after = time.perf_counter() - start, os.times()
    return measure.Measurement(wall, after.user + after.system - before.user - before.system, None)


def ours(method: str, inputs: Sequence[Path], scratch: Path) -> measure.Measurement:
    """One run of `tadrop merge`."""
    rule, _, sparsifier = method.partition("+")
    # A sparsifier replaces the rule's own trimming.
    options = ["--sparsify", sparsifier] if sparsifier else OPTIONS.get(rule, [])
    base, *models = map(str, inputs)
    command = [sys.executable, "-m", "tadrop_jax.cli", "merge", "--base", base, "--models", *models]
    command += ["--method", rule, *options, "--out", str(scratch / "ours")]
    try:
        return measure.run(command, {}, scratch / "ours.log")
    finally:
        _remove(scratch / "ours", scratch / "ours.partial")


def peer(method: str, inputs: Sequence[Path], scratch: Path) -> measure.Measurement:
    """One run of mergekit on the equal recipe."""
    recipe = {
        "merge_method": method,
        "base_model": str(inputs[0]),
        "models": [{"model": str(model), "parameters": PEER_PARAMETERS[method]} for model in inputs[1:]],
        "dtype": "float32",
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = Path(sys.executable).with_name("mergekit-yaml")
    if not program.exists():
        raise SystemExit(f"{program} does not exist; --peer needs mergekit in this environment.")
    command = [str(program), str(scratch / "recipe.yaml"), str(scratch / "peer"), "--no-write-model-card"]
    try:
        return measure.run(command, {"HF_HUB_OFFLINE": "1"}, scratch / "peer.log")
    finally:
        _remove(scratch / "peer")


def machine() -> dict[str, object]:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": cpu, "cores": cores, "load_before": os.getloadavg()[0], "system": platform.platform()}
    return {**facts, "python": platform.python_version(), "versions": versions}


def summarise(runs: Sequence[measure.Measurement]) -> dict[str, object]:
    """Medians over the runs, peak of the memory, and the runs themselves."""
    memory = [run.anonymous_mb for run in runs if run.anonymous_mb]
    return {
        "wall_s": statistics.median(run.wall_s for run in runs),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "anonymous_mb": max(memory) if memory else None,
        "runs": [run._asdict() for run in runs],
    }


def table(rows: dict[str, dict]) -> str:
    """Ratios first, then what they were made of."""
    base = rows["floor"]["wall_s"]
    lines = [f"{'':34}{'/ floor':>9}{'/ ours':>9}{'wall s':>9}{'first s':>9}{'cpu s':>9}{'anon MB':>9}"]
    for name, row in rows.items():
        mine = rows.get("tadrop " + name.removeprefix("mergekit ")) if name.startswith("mergekit") else None
        ratio = f"{row['wall_s'] / mine['wall_s']:9.1f}" if mine else f"{'':9}"
        memory = f"{row['anonymous_mb']:9.0f}" if row["anonymous_mb"] else f"{'':9}"
        lines.append(
            f"{name:34}{row['wall_s'] / base:9.2f}{ratio}{row['wall_s']:9.2f}{row['runs'][0]['wall_s']:9.2f}"
            f"{row['cpu_s']:9.2f}{memory}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=7, help="number of fine-tunes (7)")
    parser.add_argument("--dtype", choices=gpt2_directories.DTYPES, default="float32")
    parser.add_argument("--methods", default="ties", help="comma-separated; METHOD or METHOD+SPARSIFIER (ties)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the floor and of each method (3)")
    parser.add_argument("--peer", action="store_true", help="measure mergekit as well, on methods that both have")
    parser.add_argument("--peer-repeats", type=int, default=1, help="runs of mergekit; each takes minutes (1)")
    parser.add_argument("--dir", type=Path, help="keep the models there for the next run (a temporary directory)")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    facts = machine()
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        scratch = Path(temporary)
        where = options.dir or scratch
        base, models = gpt2_directories.make(where, options.models, gpt2_directories.DTYPES[options.dtype])
        inputs = [base, *models]
        floor(inputs, scratch / "floor")  # Brings the inputs into the page cache.
        rows = {"floor": summarise([floor(inputs, scratch / "floor") for _ in range(options.repeats)])}
        _remove(scratch / "floor")
        for method in filter(None, options.methods.split(",")):
            rows[f"tadrop {method}"] = summarise([ours(method, inputs, scratch) for _ in range(options.repeats)])
            if options.peer and method in PEER_PARAMETERS:
                runs = [peer(method, inputs, scratch) for _ in range(options.peer_repeats)]
                rows[f"mergekit {method}"] = summarise(runs)
    parameters = sum(math.prod(shape) for shape in gpt2_directories.shapes().values())
    print(
        f"base + {options.models} models of {parameters / 1e6:.1f} M parameters, {options.dtype}; "
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before"
    )
    print(table(rows))
    if options.json:
        setting = {"models": options.models, "parameters": parameters, "dtype": options.dtype}
        options.json.write_text(json.dumps({"machine": facts, **setting, "rows": rows}, indent=2))


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
