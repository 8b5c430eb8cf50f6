"""How long commands and imports take before they work: each a process of its own, beside a bare Python and mergekit.

    python -m benchmarks.start_up [--json FILE]

The merges are of three models of 0.1 M parameters: the first with an empty compilation cache, then with a full one.
The floor is `python -c pass`; what the imports of others take is shown for comparison.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import gpt2_directories, measure, merges

COLUMNS = {
    "command": ("command", ""),
    "/ python": ("/ bare Python", ".1f"),
    "wall_s": ("wall, s", ".2f"),
    "cpu_s": ("cpu, s", ".2f"),
    "anonymous_mb": ("anonymous MB", ".0f"),
}
BARE = "python -c pass"


def commands(scratch: Path, inputs: Sequence[Path], method: str) -> dict[str, Callable[[], measure.Measurement]]:
    """What is measured, by what it is called."""

    def python(code: str) -> Callable[[], measure.Measurement]:
        return lambda: measure.run([sys.executable, "-c", code], {}, scratch / "log")

    def tadrop(*words: str) -> Callable[[], measure.Measurement]:
        return lambda: measure.run([sys.executable, "-m", "tadrop_jax.cli", *words], {}, scratch / "log")

    def merge(cache: Path) -> measure.Measurement:
        base, *models = map(str, inputs)
        words = ["merge", "--base", base, "--models", *models, "--method", method, "--out", str(scratch / "out")]
        try:
            command = [sys.executable, "-m", "tadrop_jax.cli", *words]
            # As the command itself sets its cache in the user's directory.
            told = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
            return measure.run(command, told, scratch / "log")
        finally:
            merges.remove(scratch / "out")

    def cold() -> measure.Measurement:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            return merge(Path(cache))

    found = {
        BARE: python("pass"),
        "import numpy": python("import numpy"),
        "import jax": python("import jax"),
        "import tadrop_jax": python("import tadrop_jax"),
        "import converters": python("import converters"),
        "tadrop --help": tadrop("--help"),
        "tadrop methods": tadrop("methods"),
        f"tadrop merge --method {method}, empty cache": cold,
        f"tadrop merge --method {method}, full cache": lambda: merge(scratch / "cache"),
    }
    if measure.has("torch"):
        found["import torch"] = python("import torch")
    if merges.peer_program().exists():
        found["mergekit-yaml --help"] = lambda: measure.run(
            [str(merges.peer_program()), "--help"], {"HF_HUB_OFFLINE": "1"}, scratch / "log"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--method", default="ties", help="of the merges (ties)")
    parser.add_argument(
        "--only", help="a part of the names of the commands to measure; the bare Python is measured too"
    )
    options = measure.chosen(parser.parse_args(arguments), rounds=(5, 1))
    facts = measure.machine()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        base, models = gpt2_directories.make(
            scratch, 2, gpt2_directories.DTYPES["float32"], size=gpt2_directories.SIZES["0.1M"]
        )
        turns = commands(scratch, [base, *models], options.method)
        turns = {n: call for n, call in turns.items() if n == BARE or (options.only or "") in n}
        for call in turns.values():
            call()  # files come into the page cache, and compiled functions into theirs
        runs = measure.in_turns(turns, options.rounds)
    rows = [
        {
            "command": name,
            "/ python": measure.ratio(taken, runs[BARE]),
            "wall_s": measure.fastest(taken),
            "cpu_s": measure.processor(taken),
            "anonymous_mb": measure.memory(taken),
        }
        for name, taken in runs.items()
    ]
    measure.show("start_up", facts, {"rounds": options.rounds}, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
