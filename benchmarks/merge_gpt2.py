"""Streamed merges of directories of GPT-2's structure, beside bare reading and writing, and mergekit.

    python -m benchmarks.merge_gpt2                                   # TIES of 7 models of GPT-2-small size
    python -m benchmarks.merge_gpt2 --peer --methods ties,ties+tadrop,emr --json result.json
    python -m benchmarks.merge_gpt2 --models 2 --methods all          # every rule that merges 2 models

Everything is measured in the same run and in turns, from outside the process, start-up included, with all inputs in
the page cache (the floor excepted, which runs in this process). Start-up is a merge of 0.1 M parameters by the same
method; what is left without it is set beside the floor as well. `METHOD+SPARSIFIER` puts a sparsifier before a rule;
`ties@mergekit` is TIES with the results of mergekit's own, which trims each tensor to an exact number of entries and
does without the majority's sign.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpt2_directories, measure, merges

COLUMNS = {
    "method": ("", ""),
    "mergekit / ours": ("mergekit / ours", ".1f"),
    "ours / floor": ("ours / floor", ".2f"),
    "without": ("without start-up / floor", ".2f"),
    "cpu": ("the same, cpu", ".2f"),
    "wall_s": ("ours, s", ".2f"),
    "start_s": ("start-up, s", ".2f"),
    "cpu_s": ("ours, cpu s", ".2f"),
    "anonymous_mb": ("anonymous MB", ".0f"),
    "mergekit_s": ("mergekit, s", ".1f"),
    "mergekit_mb": ("mergekit MB", ".0f"),
    "floor_s": ("floor, s", ".2f"),
}


def row(method: str, inputs: Sequence[Path], tiny: Sequence[Path], scratch: Path, options) -> dict[str, Any]:
    """Measures one method: the floor, start-up and ours in turns, and mergekit between them where asked."""
    turns: dict[str, Any] = {
        "floor": lambda: merges.floor(inputs, scratch / "floor"),
        "start": lambda: merges.ours(method, tiny, scratch, options.limit),
        "ours": lambda: merges.ours(method, inputs, scratch, options.limit),
    }
    runs: dict[str, list[measure.Measurement]] = {}
    note = ""
    try:
        merges.ours(method, tiny, scratch, options.limit)  # the compilation cache fills
        runs = measure.in_turns(turns, options.rounds)
    except RuntimeError as error:
        note = merges.last_line(error)
    peer = merges.beside_peer(method, inputs, scratch, options.dtype, runs.get("ours"), options)
    start = measure.fastest(runs.get("start"))
    return {
        "method": method,
        "ours / floor": measure.ratio(runs.get("ours", []), runs.get("floor")),
        "without": measure.ratio(runs.get("ours", []), runs.get("floor"), less=start),
        "cpu": measure.ratio(
            runs.get("ours", []), runs.get("floor"), less=measure.processor(runs.get("start")), of="cpu_s"
        ),
        "wall_s": measure.fastest(runs.get("ours")),
        "start_s": start,
        "cpu_s": measure.processor(runs.get("ours")),
        "anonymous_mb": measure.memory(runs.get("ours")),
        "floor_s": measure.fastest(runs.get("floor")),
        **peer,
        "note": note or peer["note"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--models", type=int, choices=range(1, 31), metavar="N", help="fine-tunes (7; 2 with --quick)")
    parser.add_argument("--size", choices=gpt2_directories.SIZES, help="parameters (124M; 1M with --quick)")
    parser.add_argument("--dtype", choices=gpt2_directories.DTYPES, default="float32")
    parser.add_argument(
        "--methods", default="ties", help="comma-separated; METHOD, METHOD+SPARSIFIER, METHOD@FLAVOUR or all (ties)"
    )
    merges.add_peer_options(parser, limit_s=900)
    parser.add_argument("--dir", type=Path, help="keep the models there for the next run (a temporary directory)")
    options = measure.chosen(parser.parse_args(arguments), rounds=(3, 1), models=(7, 2), size=("124M", "1M"))
    merges.check_peer(options)
    methods = merges.rules(options.models) if options.methods == "all" else options.methods.split(",")
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    facts = measure.machine()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        rows = _rows(methods, Path(temporary), options)
    size = gpt2_directories.SIZES[options.size]
    setting = {"models": options.models, "parameters": size.parameters, "dtype": options.dtype}
    measure.show("merge_gpt2", facts, setting | {"rounds": options.rounds}, COLUMNS, rows, options.json)


def _rows(methods: Sequence[str], scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    made = []
    for folder, size in ((options.dir or scratch, options.size), (scratch / "tiny", "0.1M")):
        dtype = gpt2_directories.DTYPES[options.dtype]
        base, models = gpt2_directories.make(folder, options.models, dtype, size=gpt2_directories.SIZES[size])
        made.append([base, *models])
    inputs, tiny = made
    merges.floor(inputs, scratch / "floor")  # brings the inputs into the page cache
    return [measure.said(row(method, inputs, tiny, scratch, options)) for method in methods]


if __name__ == "__main__":
    main()
