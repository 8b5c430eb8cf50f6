"""What the command line shows: tables, a progress bar, a summary. rich is imported where it is used."""

import os
import shlex
import sys
from pathlib import Path

from tadrop_jax import registry
from tadrop_jax.errors import MergeError

_NUMBERS = 54  # columns of the terminal that an inspection needs beside the names of tensors
_NARROW = 72  # with fewer, names stand above the numbers
_COLUMNS = ("ratio", "sparsity", "norm", "after", "conflict")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _show(console, *what, **how) -> None:
    """Prints; where no terminal is, without the blanks that fill up lines."""
    if console.is_terminal:
        console.print(*what, **how)
        return
    with console.capture() as held:
        console.print(*what, **how)
    lines = held.get().split("\n")
    print("\n".join(line.rstrip() for line in lines), end="")


def print_methods(name: str | None) -> None:
    """Prints the registry: of all methods what they do, or of one what each parameter means."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    chosen = [registry.method(name)] if name else registry.METHODS.values()
    for role, title in (("sparsifier", "Sparsifiers (--sparsify NAME)"), ("rule", "Merge rules (--method NAME)")):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for m in (m for m in chosen if m.role == role):
            facts = f"{m.granularity}; gives {m.output}; {m.source}" + "; from Python only" * bool(m.from_python)
            given = [] if name else [", ".join(map(_default, m.parameters))]
            table.add_row(m.name, Text.assemble(m.about, "\n", (facts, "dim"), *(f"\n{g}" for g in given if g), "\n"))
        if table.row_count:
            _show(console, *[] if name else [title, ""], table, sep="\n", end="")
    if name is None:
        console.print("'tadrop methods NAME' tells what each parameter means.")
        return
    parameters = Table.grid(padding=(0, 2, 0, 0))
    parameters.add_column(no_wrap=True)
    parameters.add_column()
    for p in registry.method(name).parameters:
        parameters.add_row(_default(p), _meaning(p))
    _show(console, parameters)


def _default(parameter: registry.Parameter) -> str:
    return f"{parameter.name} = {'none' if parameter.default in (None, ()) else parameter.default}"


def _meaning(parameter: registry.Parameter) -> str:
    options = [str(o) for o in parameter.options] + [parameter.bounds()] * bool(parameter.bounds())
    options += ["none"] * (parameter.optional and bool(options))
    return parameter.about + (f" ({', '.join(options)})" if options else "")


def print_inspection(rows: dict, tasks: tuple[str, ...], sparsifier: str) -> None:
    """Prints what `tadrop inspect` found, a line a tensor; into a file or a pipe whole names, however long."""
    from rich.console import Console

    console = Console()
    title = f"{sparsifier} on {len(tasks)} task vectors (means over tasks)"
    shared, longest = "", max(map(len, rows), default=0)
    if console.is_terminal and longest > console.width - _NUMBERS:  # what names begin with is said once
        alike = os.path.commonprefix(list(rows))  # noqa: RUF071 (cut to whole parts in the next line)
        shared = alike[: max(alike.rfind("."), alike.rfind("/")) + 1]
        title += f"; tensors of {shared}" * bool(shared)
    cells = []
    for name, row in rows.items():
        shape = "x".join(map(str, row["shape"])) or "scalar"
        means = (row[k].mean() for k in ("quantile_ratio", "sparsity", "norm", "norm_after", "sign_conflict"))
        cells.append([name.removeprefix(shared), shape, *(f"{mean:.3g}" for mean in means)])
    narrow = console.is_terminal and console.width < _NARROW
    shown = _inspection_lines(title, cells) if narrow else _inspection_table(title, cells)
    _show(console if console.is_terminal else Console(width=longest + 2 * _NUMBERS), shown)
    _show(
        console,
        "ratio: quantile ratio of the magnitudes; norm, after: before and after the sparsifier; conflict: share of "
        "entries whose tasks differ in sign",
        highlight=False,
    )


def _inspection_table(title: str, cells: list[list[str]]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for row in cells:
        table.add_row(*row)
    return table


def _inspection_lines(title: str, cells: list[list[str]]):
    """The same where a table would cut numbers off: under each name what was found."""
    from rich.text import Text

    text = Text(f"{title}\n\n")
    for name, shape, *numbers in cells:
        said = ", ".join(f"{column} {number}" for column, number in zip(_COLUMNS, numbers, strict=True))
        text.append(name, "bold").append(f"\n{shape}, {said}\n\n")
    text.right_crop(1)
    return text


class Progress:
    """A progress bar over bytes, on a terminal only."""

    def __init__(self, quiet: bool, what: str):
        self.bar, self.what = None, what
        if not quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task(what, total=None)

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)


def print_summary(report: dict, out: Path, seconds: float) -> None:
    """Prints what a merge did, and for a bundle how large it is."""
    merged = sum("dtype" in row for row in report["tensors"].values())
    kept = sum(row.get("from") == "base" for row in report["tensors"].values())
    sparsity = [s for row in report["tensors"].values() for s in row.get("sparsity", ())]
    line = f"{out}: {merged} tensors merged, {kept} from the base, in {seconds:.1f} s"
    if sparsity:
        line += f"; sparsity {min(sparsity):.2f} to {max(sparsity):.2f}, mean {sum(sparsity) / len(sparsity):.2f}"
    print(line)
    if "size" in report:
        bundle, full = report["size"]["bundle_bytes"], report["size"]["full_models_bytes"]
        parts = ", ".join(f"{k} {size(v)}" for k, v in report["size"]["parts_bytes"].items() if v)
        share = f"{full / bundle:.1f} times smaller" if full > bundle > 0 else f"{bundle / full:.1f} times as large"
        print(f"bundle {size(bundle)} ({parts}) against {size(full)} for {len(report['tasks'])} full models: {share}")
        command = f"tadrop task {shlex.quote(str(out))} --task NAME --out DIR"
        print(f"tasks: {', '.join(report['tasks'])}; '{command}' writes one's model")
    flax = any("/" in name for name in report["tensors"])
    config = out.with_suffix(".config.json") if out.suffix == ".safetensors" else out / "config.json"
    if out.exists() and "size" not in report and not flax and not config.exists():
        print("there was no config.json beside the base: transformers opens the result only with one")
    if flax:
        print("names are Flax's, as the base's are: 'tadrop convert FROM DIR --to torch' makes what transformers opens")


def size(n: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n} bytes"


def print_conversion(opened, out: Path, to: str) -> None:
    """What was converted, and which of its tensors merge otherwise in Flax than in PyTorch."""
    count, nbytes = len(opened.leaves), sum(leaf.nbytes for leaf in opened.leaves.values())
    print(f"{out}: {opened.entry.name} from {opened.stored.format} for {to}, {count} parameters, {size(nbytes)}")
    from converters import fused

    flax = to == "flax" or opened.stored.is_tree
    if names := ", ".join(fused(opened.rows, opened.leaves)) if flax else "":
        print(
            f"fused in PyTorch and apart in Flax: {names}; methods that go by rows, groups, ranks within a tensor or "
            "random numbers give other weights for these in Flax"
        )


def shard_size(text: str | None, out: Path, format: str = "safetensors") -> int:
    """The size that ``--max-shard-size`` names, in bytes; 5 GB if it is not given.

    Args:
      text: what was given.
      out: where the result goes.
      format: of its files.

    Raises:
      MergeError: if it names no size, or there would be no shards.
    """
    size = _bytes_in("5GB" if text is None else text)
    if text is not None and (format != "safetensors" or out.suffix == ".safetensors"):
        what = f"{out} is one file" if out.suffix == ".safetensors" else f"{format} has no shards of a size"
        raise MergeError(f"--max-shard-size is for directories of safetensors files, and {what}")
    return size


def _bytes_in(text: str) -> int:
    number, unit = text.strip().upper(), 1
    for suffix, factor in _UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
            break
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise MergeError(f"--max-shard-size must be a size such as 500MB or 5GB, got {text!r}")
    return size
