"""Small checkpoints on disk, and what the streamed executor makes of arrays."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tadrop_jax import streaming
from tadrop_jax.cli import main
from tadrop_jax.steps import expand

REPOSITORY = Path(__file__).parents[1]
# The command line keeps compiled functions in the user's cache; tests keep theirs to themselves.
CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]  # conftest.py made it

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# A scalar, one entry, several blocks of 64 with a rest that is no multiple of 8.
SHAPES = {"wide/kernel": (37, 29), "bias": (1,), "scale": ()}


def weights(seed: int, shapes: Mapping[str, tuple] = SHAPES, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def family(tasks: int = 3, shapes: Mapping[str, tuple] = SHAPES, dtype=np.float32) -> tuple[dict, list[dict]]:
    """A base and its fine-tunes, whose task vectors have zeros and heavy tails."""
    base = weights(0, shapes, np.float32)
    models = []
    for t in range(tasks):
        rng = np.random.default_rng(t + 1)
        change = {n: rng.standard_t(3, size=v.shape) * (rng.random(v.shape) < 0.9) / 8 for n, v in base.items()}
        models.append({n: np.asarray(v + change[n]).astype(dtype) for n, v in base.items()})
    return {n: v.astype(dtype) for n, v in base.items()}, models


def save_model(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, config: dict | None = None) -> Path:
    """A directory as transformers writes it: one file, or several and their index."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {}
        for s in range(shards):
            file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
            save_file({n: tensors[n] for n in names[s::shards]}, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names[s::shards], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_family(root: Path, tasks: int = 2, shapes: Mapping[str, tuple] = SHAPES, dtype=np.float32, **how):
    """Directories base, m0, m1, ... under root; gives base and models as arrays."""
    base, models = family(tasks, shapes, dtype)
    save_model(root / "base", base, **how)
    for t, model in enumerate(models):
        save_model(root / f"m{t}", model, **how)
    return base, models


def read_model(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, or of all files of a directory, by the safetensors library."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a directory but the report, whose rows come in the order in which tensors were finished."""
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.is_file() and f.name != "merge_report.json"
    }


def streams_of(base: Mapping[str, np.ndarray], models: Sequence[Mapping[str, np.ndarray]]) -> list[streaming.Stream]:
    rows = [base, *models]

    def reader(name):
        flat = [np.ravel(row[name]) for row in rows]

        def read(row, start, stop, out):
            out[:] = flat[row][start:stop]

        return read

    return [streaming.Stream(n, v.shape, v.dtype, reader(n)) for n, v in base.items()]


def run_streamed(base, models, chain, seed: int = 0, skip=(), **settings):
    """Runs a chain over arrays block by block.

    Returns:
      The merged arrays by name (for a bundle a dict of its parts, bits packed and what lies over entries flat), the
      statistics of each stream, and the outcome.
    """
    streams, tasks = streams_of(base, models), len(models)
    steps = expand(chain, tasks)
    kind = steps[-1].kind
    bundle = kind is not None
    dtype = settings.get("dtype")
    merged: dict = {}
    parts_of = {} if kind is None else {s.name: kind.parts(s.shape, tasks) for s in streams}
    for s in streams:
        if bundle:
            kept = {"values": dtype or np.float32, "float32": np.float32, "bits": np.uint8}
            arrays = {n: np.zeros(p.stored, kept[p.dtype]) for n, p in parts_of[s.name].items()}
            flat = {"entries": (-1,), "tasks and entries": (tasks, -1)}
            merged[s.name] = {
                n: a.reshape(flat.get(parts_of[s.name][n].over, a.shape)) if s.size else a for n, a in arrays.items()
            }
        else:
            merged[s.name] = np.full(s.size, np.nan, dtype or s.dtype)

    def write(k, start, value):
        name = streams[k].name
        if bundle:
            for part, array in value.items():
                if parts_of[name][part].over == "tasks":
                    merged[name][part][...] = array
                    continue
                first = start // 8 if parts_of[name][part].dtype == "bits" else start
                merged[name][part][..., first : first + array.shape[-1]] = array
        else:
            merged[name][start : start + value.size] = value

    found: dict = {}

    def done(k, carries):
        assert streams[k].name not in found
        found[streams[k].name] = carries

    key = jax.random.key(seed, impl="threefry2x32")
    outcome = streaming.run(steps, streams, tasks, write, done, streaming.Settings(key=key, **settings), skip)
    for s in streams:
        if not bundle:
            merged[s.name] = merged[s.name].reshape(s.shape)
    return merged, found, outcome


def merge(root: Path, *more: str, out: str = "out", method: str = "task_arithmetic", models=("m0", "m1")) -> int:
    """Runs ``tadrop merge`` on directories under root in this process, and gives its exit code."""
    given = [str(root / m) for m in models]
    base, out = str(root / "base"), str(root / out)
    return main(["merge", "--base", base, "--models", *given, "--method", method, "--out", out, *more])


def command(*argv: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``tadrop`` in a process of its own; what the environment says of a cache replaces ours."""
    cache = {} if "XDG_CACHE_HOME" in environment else {"JAX_COMPILATION_CACHE_DIR": CACHE}
    return subprocess.run(
        [sys.executable, "-m", "tadrop_jax.cli", *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **cache, **environment},
    )


def report_of(out: Path) -> dict:
    return json.loads((out / "merge_report.json").read_text())


def refused(root: Path, capsys, code: int, *words: str) -> None:
    """Exit code 2, one line on stderr that holds the words, and neither OUT nor OUT.partial."""
    output = capsys.readouterr()
    assert code == 2, output
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("tadrop merge: ")
    assert "Traceback" not in output.err
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    assert not (root / "out").exists()
    assert not (root / "out.partial").exists()
