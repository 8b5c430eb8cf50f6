"""Streamed merges against the size of the model (10 M to 1 G parameters) and the number of tasks (2 to 30).

    python -m benchmarks.scaling [--methods task_arithmetic,ties] [--sizes 10M,100M,1G] [--tasks 2,8,30] [--peer]

Random models in bfloat16, inputs in the page cache. Each merge stands beside the floor (reading the inputs, writing one
model) in the same rounds, start-up apart: a merge of 0.1 M parameters of as many models; with --peer beside mergekit
as well. Sizes run with --models fine-tunes, tasks at --task-size.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpt2_directories, measure, merges

COLUMNS = {
    "method": ("method", ""),
    "parameters": ("parameters", ".1e"),
    "tasks": ("tasks", "d"),
    "mergekit / ours": ("mergekit / ours", ".1f"),
    "ours / floor": ("ours / floor", ".2f"),
    "without": ("without start-up / floor", ".2f"),
    "cpu": ("the same, cpu", ".2f"),
    "wall_s": ("ours, s", ".2f"),
    "start_s": ("start-up, s", ".2f"),
    "rate": ("without start-up, GB/s", ".2f"),
    "anonymous_mb": ("anonymous MB", ".0f"),
    "mergekit_s": ("mergekit, s", ".1f"),
    "mergekit_mb": ("mergekit MB", ".0f"),
    "floor_s": ("floor, s", ".3f"),
    "floor_rate": ("floor, GB/s", ".2f"),
}


def rows(size: str, tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one size and number of tasks; the models are made, and deleted after."""
    kind = gpt2_directories.DTYPES[options.dtype]
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        scratch = Path(temporary)
        made = {}
        for name in (size, "0.1M"):
            base, models = gpt2_directories.make(scratch / name, tasks, kind, size=gpt2_directories.SIZES[name])
            made[name] = [base, *models]
        inputs, tiny = made[size], made["0.1M"]
        merges.floor(inputs, scratch / "floor")  # brings the inputs into the page cache
        methods = options.methods.split(",")
        return [measure.said(_row(method, size, tasks, inputs, tiny, scratch, options)) for method in methods]


def _row(method, size, tasks, inputs, tiny, scratch, options) -> dict[str, Any]:
    merges.ours(method, tiny, scratch)  # the compilation cache fills
    turns: dict[str, Any] = {
        "floor": lambda: merges.floor(inputs, scratch / "floor"),
        "start": lambda: merges.ours(method, tiny, scratch),
        "ours": lambda: merges.ours(method, inputs, scratch),
    }
    runs = measure.in_turns(turns, options.rounds)
    start, wall = measure.fastest(runs["start"]) or 0, measure.fastest(runs["ours"]) or 0
    moved = sum(map(merges.size_bytes, inputs)) + merges.size_bytes(inputs[0])
    floor = measure.fastest(runs["floor"]) or 0
    return {
        "method": method,
        "parameters": gpt2_directories.SIZES[size].parameters,
        "tasks": tasks,
        "ours / floor": measure.ratio(runs["ours"], runs["floor"]),
        "without": measure.ratio(runs["ours"], runs["floor"], less=start),
        "cpu": measure.ratio(runs["ours"], runs["floor"], less=measure.processor(runs["start"]), of="cpu_s"),
        "wall_s": wall,
        "start_s": start,
        "rate": moved / 1e9 / (wall - start) if wall > start else None,
        "anonymous_mb": measure.memory(runs["ours"]),
        "floor_s": floor,
        "floor_rate": moved / 1e9 / floor,
        **merges.beside_peer(method, inputs, scratch, options.dtype, runs["ours"], options),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--methods", help="comma-separated; METHOD or METHOD+SPARSIFIER (task_arithmetic,ties)")
    parser.add_argument("--sizes", help=f"of {', '.join(gpt2_directories.SIZES)} (10M to 1G; 1M with --quick)")
    parser.add_argument("--models", type=int, help="fine-tunes while the size grows (2)")
    parser.add_argument("--tasks", type=measure.numbers, help="numbers of fine-tunes (2 to 30; 3 with --quick)")
    parser.add_argument("--task-size", choices=gpt2_directories.SIZES, help="while tasks grow (30M; 1M with --quick)")
    parser.add_argument("--dtype", choices=gpt2_directories.DTYPES, default="bfloat16")
    merges.add_peer_options(parser)
    parser.add_argument("--dir", type=Path, help="where the models are made and deleted (a temporary directory)")
    options = measure.chosen(
        parser.parse_args(arguments),
        rounds=(3, 1),
        methods=("task_arithmetic,ties", "task_arithmetic"),
        sizes=("10M,30M,100M,300M,1G", "1M"),
        models=(2, 2),
        tasks=([2, 4, 8, 16, 30], [3]),
        task_size=("30M", "1M"),
    )
    unknown = set(options.sizes.split(",")) - set(gpt2_directories.SIZES)
    if unknown:
        parser.error(f"--sizes: {', '.join(sorted(unknown))}: there are {', '.join(gpt2_directories.SIZES)}")
    cases = [(size, options.models) for size in options.sizes.split(",")]
    cases += [(options.task_size, tasks) for tasks in options.tasks]
    merges.check_peer(options)
    facts, found = measure.machine(), []
    for size, tasks in dict.fromkeys(cases):
        found += rows(size, tasks, options)
    setting = {"dtype": options.dtype, "rounds": options.rounds}
    measure.show("scaling", facts, setting, COLUMNS, found, options.json)


if __name__ == "__main__":
    main()
