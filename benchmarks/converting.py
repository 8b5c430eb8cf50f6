"""Conversion of a PyTorch checkpoint to Flax and back, against a plain copy and the safetensors library.

    python -m benchmarks.converting [--size 124M] [--dtype float32] [--formats orbax,npz] [--json FILE]

In one process, everything imported, inputs in the page cache, outputs not synced to the disk. The floor copies the
directory's files by reading and writing blocks (so that no file system can share them). The peer loads the file with
the safetensors library as NumPy arrays and writes it again, all of it in memory at once; it converts nothing.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16, which the safetensors library asks it for)
from safetensors.numpy import load_file, save_file

import converters
from benchmarks import gpt2_directories, measure, merges

BLOCK = 1 << 22
COLUMNS = {
    "to": ("to", ""),
    "format": ("format", ""),
    "library / ours": ("safetensors library / ours", ".2f"),
    "ours / copy": ("ours / copy", ".2f"),
    "rate": ("ours, GB/s", ".2f"),
    "copy_rate": ("copy, GB/s", ".2f"),
    "ours_s": ("ours, s", ".2f"),
}


def copy(source: Path, out: Path) -> None:
    """A plain copy of a directory's files."""
    out.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (out / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, BLOCK)


def rewrite(source: Path, out: Path) -> None:
    """What the safetensors library takes to read a directory and write it again."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), out / file.name)


def measured(function: Callable[[Path], Any], out: Path) -> Callable[[], measure.Measurement]:
    """Times a function that writes a directory, which is deleted after."""

    def call() -> measure.Measurement:
        try:
            return measure.timed(lambda: function(out))
        finally:
            merges.remove(out)

    return call


def row(source: Path, to: str, format: str, scratch: Path, rounds: int) -> dict[str, Any]:
    """Measures one direction and format."""
    turns = {
        "copy": measured(lambda out: copy(source, out), scratch / "copy"),
        "library": measured(lambda out: rewrite(source, out), scratch / "library"),
        "ours": measured(lambda out: converters.convert(source, out, to=to, format=format), scratch / "ours"),
    }
    if not any(source.glob("*.safetensors")):
        del turns["library"]  # an Orbax checkpoint or an archive, which it does not read
    for call in turns.values():
        call()
    runs = measure.in_turns(turns, rounds)
    size = merges.size_bytes(source) / 1e9
    ours_s, copy_s = measure.fastest(runs["ours"]) or 0, measure.fastest(runs["copy"]) or 0
    return {
        "to": to,
        "format": format,
        "library / ours": measure.ratio(runs.get("library", []), runs["ours"]),
        "ours / copy": measure.ratio(runs["ours"], runs["copy"]),
        "rate": size / ours_s,
        "copy_rate": size / copy_s,
        "ours_s": ours_s,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--size", choices=gpt2_directories.SIZES, help="parameters (124M; 10M with --quick)")
    parser.add_argument("--dtype", choices=gpt2_directories.DTYPES, default="float32")
    parser.add_argument("--formats", default="safetensors,orbax,msgpack,npz", help="of the Flax side")
    parser.add_argument("--dir", type=Path, help="where to write and delete (a temporary directory)")
    options = measure.chosen(parser.parse_args(arguments), size=("124M", "10M"))
    size, dtype = gpt2_directories.SIZES[options.size], gpt2_directories.DTYPES[options.dtype]
    facts, rows = measure.machine(), []
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        scratch = Path(temporary)
        source, _ = gpt2_directories.make(scratch, 0, dtype, size=size)
        flax = scratch / "flax"
        converters.convert(source, flax, to="flax", format="safetensors")
        for format in options.formats.split(","):
            rows.append(row(source, "flax", format, scratch, options.rounds))
        rows.append(row(flax, "torch", "safetensors", scratch, options.rounds))
    setting = {"parameters": size.parameters, "dtype": options.dtype, "rounds": options.rounds}
    measure.show("converting", facts, setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
