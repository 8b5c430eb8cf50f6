"""Jitted merges of trees in memory, against the bytes that they must move, and PEFT's functions of the same name.

    python -m benchmarks.in_memory [--rules task_arithmetic,ties] [--size 10M] [--tasks 8] [--json FILE]

The floor is one jitted pass that reads base and models and writes one model (their sum): the bytes that no merge moves
fewer of. Ours is one jitted call on the same tree, `METHOD+SPARSIFIER` as on the command line. PEFT works on task
vectors: taking the differences and adding the base count on its side, tensor by tensor, as its users do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tadrop_jax as tj
from benchmarks import gpt2_directories, measure, merges
from benchmarks.cost import build

COLUMNS = {
    "rule": ("rule", ""),
    "PEFT / ours": ("PEFT / ours", ".2f"),
    "ours / floor": ("ours / floor", ".2f"),
    "ours_ms": ("ours, ms", ".1f"),
    "rate": ("ours, GB/s of inputs and output", ".2f"),
    "floor_ms": ("floor, ms", ".1f"),
    "floor_rate": ("floor, GB/s", ".2f"),
    "temporary": ("temporary memory, models", ".2f"),
    "compile_s": ("compile, s", ".1f"),
}


def tree(size: gpt2_directories.Size, model: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Arrays of a model by name."""
    shapes = gpt2_directories.shapes(size)
    return {n: gpt2_directories.tensor(n, int(np.prod(s)), model).astype(dtype).reshape(s) for n, s in shapes.items()}


def ours(name: str) -> Callable:
    """A function of base and models."""
    step, key = build(name), jax.random.key(0)
    return lambda base, models: tj.merge(base, models, step, key=key)


def peft(name: str, base: Mapping[str, np.ndarray], models: Sequence[Mapping[str, np.ndarray]]) -> Callable | None:
    """PEFT's merge of the same trees as torch tensors; None if it has none, or is not there."""
    if name not in ("task_arithmetic", "ties", "dare_linear", "dare_ties") or not measure.has("peft", "torch"):
        return None
    import torch
    from peft.utils import merge_utils

    def to_torch(array):
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16 if array.itemsize == 2 else torch.float32)

    bases = {n: to_torch(a) for n, a in base.items()}
    tuned = [{n: to_torch(a) for n, a in model.items()} for model in models]
    weights = torch.ones(len(models))
    density = () if name == "task_arithmetic" else (merges.VALUES["density"],)
    function = getattr(merge_utils, name)

    def call():
        return {n: b + function([m[n] - b for m in tuned], weights, *density) for n, b in bases.items()}

    return call


def row(name: str, base, models, device_trees, rounds: int) -> dict[str, Any]:
    """Measures one rule."""

    def total(base, models):
        return jax.tree.map(lambda b, *ms: sum(ms, b), base, *models)

    floor, function = jax.jit(total), jax.jit(ours(name))
    compiled = []
    took = measure.timed(lambda: compiled.append(function.lower(*device_trees).compile())).wall_s
    calls = {
        "floor": lambda: jax.block_until_ready(floor(*device_trees)),
        "ours": lambda: jax.block_until_ready(compiled[0](*device_trees)),
    }
    theirs = peft(name, base, models)
    if theirs is not None:
        calls["PEFT"] = theirs
    for call in calls.values():
        call()
    runs = measure.in_turns({n: (lambda call=call: measure.timed(call)) for n, call in calls.items()}, rounds)
    model_bytes = sum(a.nbytes for a in base.values())
    moved = (len(models) + 2) * model_bytes / 1e9
    ours_s, floor_s = measure.fastest(runs["ours"]) or 0, measure.fastest(runs["floor"]) or 0
    memory = compiled[0].memory_analysis()
    return {
        "rule": name,
        "PEFT / ours": measure.ratio(runs.get("PEFT", []), runs["ours"]),
        "ours / floor": measure.ratio(runs["ours"], runs["floor"]),
        "ours_ms": 1e3 * ours_s,
        "rate": moved / ours_s,
        "floor_ms": 1e3 * floor_s,
        "floor_rate": moved / floor_s,
        "temporary": None if memory is None else memory.temp_size_in_bytes / model_bytes,
        "compile_s": took,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rules", default="task_arithmetic,ties,task_arithmetic+tadrop,emr")
    parser.add_argument("--size", choices=gpt2_directories.SIZES, help="parameters (10M; 1M with --quick)")
    parser.add_argument("--tasks", type=int, help="fine-tunes (8; 3 with --quick)")
    parser.add_argument("--dtype", choices=gpt2_directories.DTYPES, default="float32")
    options = measure.chosen(parser.parse_args(arguments), size=("10M", "1M"), tasks=(8, 3))
    size, dtype = gpt2_directories.SIZES[options.size], gpt2_directories.DTYPES[options.dtype]
    facts = measure.machine()
    base, *models = (tree(size, t, dtype) for t in range(options.tasks + 1))
    device_trees = jax.tree.map(jnp.asarray, (base, models))
    rows = [row(name, base, models, device_trees, options.rounds) for name in options.rules.split(",")]
    setting = {"parameters": size.parameters, "tasks": options.tasks, "dtype": options.dtype, "rounds": options.rounds}
    measure.show("in_memory", facts, setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
