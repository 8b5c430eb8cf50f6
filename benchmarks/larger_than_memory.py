"""Streamed merges of inputs of any size: memory against the size of the model, of one tensor, and the number of models.

    python -m benchmarks.larger_than_memory                             # 0.1 and 0.5 G parameters, minutes
    python -m benchmarks.larger_than_memory --parameters 7e9 --entries 1e9 --json FILE

Directories of Llama's structure (32 layers, several files and their index; 7e9 gives that of the 7-B model), one tensor
alone, and many small models, all made here in bfloat16 and deleted afterwards. A fine-tune is the base plus noise;
values repeat every four million entries. The floor reads the inputs once and writes one model, in the same run: inputs
that do not fit in the page cache come from the disk in both, and a rule with statistics of the tree reads them again.
"""

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import gpt2_directories, measure, merges
from tadrop_jax.checkpoints.safetensors import open_sink

DTYPE = np.dtype(ml_dtypes.bfloat16)
COLUMNS = {
    "input": ("input", ""),
    "method": ("method", ""),
    "parameters": ("parameters", ".2e"),
    "largest": ("largest tensor", ".1e"),
    "tasks": ("tasks", "d"),
    "gigabytes": ("inputs, GB", ".1f"),
    "anonymous_mb": ("anonymous MB", ".0f"),
    "ours / floor": ("ours / floor", ".2f"),
    "mergekit / ours": ("mergekit / ours", ".1f"),
    "wall_s": ("ours, s", ".1f"),
    "cpu_s": ("ours, cpu s", ".1f"),
    "mergekit_s": ("mergekit, s", ".1f"),
    "mergekit_mb": ("mergekit MB", ".0f"),
    "floor_s": ("floor, s", ".1f"),
}
Shapes = dict[str, tuple[int, ...]]


def llama(parameters: float) -> Shapes:
    """Shapes of 32 layers with at most about so many parameters, in the proportions of the 7-B model.

    Example:
        >>> sum(math.prod(shape) for shape in llama(7e9).values())
        6738415616
    """
    width = math.sqrt(parameters / 401.7)
    step = 2.0 ** max(math.floor(math.log2(width)) - 3, 0)
    width = max(int(width // step * step), 16)
    inner, vocabulary = width * 43 // 16, width * 125 // 16
    block = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in block.items()}
    outside = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    return outside | layers | {"model.norm.weight": (width,)}


def make(folder: Path, models: int, shapes: Shapes) -> list[Path]:
    """Writes a base and its fine-tunes."""
    base = np.random.default_rng(0).standard_normal(gpt2_directories.DRAWN, np.float32) * gpt2_directories.BASE_SCALE
    described = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": DTYPE.name})
    plan = {name: (DTYPE, shape) for name, shape in shapes.items()}
    paths = [folder / name for name in ("base", *(f"model_{i}" for i in range(1, models + 1)))]
    for number, path in enumerate(paths):
        noise = np.random.default_rng(number).standard_normal(base.size, np.float32) * gpt2_directories.TUNING_SCALE
        values = (base + noise * (number > 0)).astype(DTYPE)
        with open_sink(path, plan) as sink:
            for name, shape in shapes.items():
                size = math.prod(shape)
                for start in range(0, size, values.size):
                    sink.write(name, start, values[: size - start])
                sink.mark_done(name)
            sink.add_file("config.json", described.encode())
            sink.finish()
    return paths


def needed(method: str, models: int, parameters: int) -> int:
    """Bytes on disk of the inputs and of what a merge of them writes."""
    out = parameters * DTYPE.itemsize
    # A bundle holds the base, one model more, and bits of each task.
    bundle = out + parameters * models // 8 if method.startswith("emr") else 0
    return (models + 1) * parameters * DTYPE.itemsize + out + bundle


def rows(kind: str, shapes: Shapes, models: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the methods on one kind of input; what the disk has no room for is left out, with a note."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    about = {"input": kind, "parameters": sum(sizes), "largest": max(sizes), "tasks": models}
    about |= {"gigabytes": (models + 1) * sum(sizes) * DTYPE.itemsize / 1e9}
    room = shutil.disk_usage(options.dir or tempfile.gettempdir()).free - options.leave
    wanted = {method: needed(method, models, sum(sizes)) for method in options.methods.split(",")}
    refused = {
        method: f"needs {size / 1e9:.0f} GB of disk, {max(room, 0) / 1e9:.0f} GB are free"
        for method, size in wanted.items()
        if size > room
    }
    found = [{**about, "method": method, "note": note} for method, note in refused.items()]
    if refused.keys() == wanted.keys():
        return found
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        scratch = Path(temporary)
        inputs = make(scratch, models, shapes)
        for method in [name for name in wanted if name not in refused]:
            turns: dict[str, Any] = {
                "floor": lambda: merges.floor(inputs, scratch / "floor"),
                "ours": lambda method=method: merges.ours(
                    method, inputs, scratch, options.limit, ("--dtype", DTYPE.name)
                ),
            }
            runs = measure.in_turns(turns, options.rounds)
            row = {
                **about,
                "method": method,
                "anonymous_mb": measure.memory(runs["ours"]),
                "ours / floor": measure.ratio(runs["ours"], runs["floor"]),
                "wall_s": measure.fastest(runs["ours"]),
                "cpu_s": measure.processor(runs["ours"]),
                "floor_s": measure.fastest(runs["floor"]),
                **merges.beside_peer(method, inputs, scratch, DTYPE.name, runs["ours"], options),
            }
            found.append(measure.said(row))
    return sorted(found, key=lambda row: list(wanted).index(row["method"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--methods", help="METHOD or METHOD+SPARSIFIER (ties, TADrop before two rules)")
    parser.add_argument("--parameters", type=measure.numbers, help="sizes of Llama's structure (1e8,5e8; 1e6)")
    parser.add_argument("--models", type=int, default=2, help="fine-tunes while the size grows (2)")
    parser.add_argument("--entries", type=measure.numbers, help="of one tensor alone (1e8; 1e6)")
    parser.add_argument("--tasks", type=measure.numbers, help="numbers of fine-tunes (30; 3)")
    parser.add_argument("--task-parameters", type=float, help="size of each of many models (1e7; 1e6)")
    parser.add_argument("--leave", type=float, default=5e9, help="bytes of the disk that stay free (5e9)")
    merges.add_peer_options(parser)
    parser.add_argument("--dir", type=Path, help="where inputs are made and deleted (a temporary directory)")
    options = measure.chosen(
        parser.parse_args(arguments),
        rounds=(1, 1),
        methods=("ties,task_arithmetic+tadrop,emr+tadrop", "ties"),
        parameters=([100_000_000, 500_000_000], [1_000_000]),
        entries=([100_000_000], [1_000_000]),
        tasks=([30], [3]),
        task_parameters=(1e7, 1e6),
    )
    merges.check_peer(options)
    # What was made is deleted then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    facts, found = measure.machine(), []
    for parameters in options.parameters:
        found += rows("a Llama", llama(parameters), options.models, options)
    for entries in options.entries:
        found += rows("one tensor", {"weight": (entries // 1000, 1000)}, options.models, options)
    for tasks in options.tasks:
        found += rows("small Llamas", llama(options.task_parameters), tasks, options)
    setting = {"dtype": DTYPE.name, "rounds": options.rounds}
    measure.show("larger_than_memory", facts, setting, COLUMNS, found, options.json)


if __name__ == "__main__":
    main()
