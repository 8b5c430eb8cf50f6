"""All benchmarks, one after another: python -m benchmarks [--quick] [--out DIR] [NAME ...].

Each is a process of its own, so that what one has loaded does not burden the next.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import merges

NAMES = (
    *("start_up", "selection", "in_memory", "merge_gpt2", "scaling", "larger_than_memory"),
    *("profiling", "sharded_memory", "converting", "linear_algebra", "cost"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--quick", action="store_true", help="the small version of each")
    parser.add_argument("--out", type=Path, help="write NAME.json of each into this directory")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", *["--quick"] * options.quick]
        if options.out:
            command += ["--json", str(options.out / f"{name}.json")]
        if name == "merge_gpt2":
            # What is asked of streaming, and mergekit where it is installed; with --quick one merge of each.
            methods = (
                "ties" if options.quick else "task_arithmetic,ties,ties@mergekit,task_arithmetic+tadrop,emr+tadrop"
            )
            command += ["--methods", methods]
        if name in ("merge_gpt2", "scaling", "larger_than_memory") and merges.peer_program().exists():
            command += ["--peer"]
        print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
