"""Trains a base and its fine-tunes, merges them in every way, writes a table; goes on where it stopped.

    python -m examples.evidence vision --data DIR --out DIR                # 8 tasks, 3 seeds
    python -m examples.evidence vision --data DIR --out DIR --count 30 --seeds 0
    python -m examples.evidence vision --fast --out DIR                    # a minute, no data needed

Each step is skipped when its result is there: take a directory away, or a line of the table, and it is made anew.
What the others took is added to hours.csv.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SUITES = ("vision", "language", "multimodal")
HOURS = "hours.csv"


def main(arguments: list[str] | None = None) -> Path:
    """Runs a suite and gives the path of its table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m examples.evidence", description=__doc__, formatter_class=form)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data sets")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where models and the table go")
    parser.add_argument("--recipe", default="adamw", help="how models are fine-tuned (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of fine-tuning")
    parser.add_argument(
        "--base-seed", type=int, default=0, metavar="N", help="of pretraining; a base wants an OUT of its own"
    )
    parser.add_argument(
        "--pretraining", type=float, default=1.0, metavar="SHARE", help="of the usual steps: a shorter, weaker base"
    )
    parser.add_argument(
        "--width", type=int, metavar="N", help="of the model, a multiple of its heads (default: the suite's)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of the model (default: the suite's)")
    parser.add_argument("--count", type=int, metavar="N", help="tasks (default: the suite's main table)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="in place of the suite's own; needs a --table")
    parser.add_argument("--table", metavar="NAME", help="of the table's file (default: the recipe's)")
    parser.add_argument("--rules", nargs="+", metavar="NAME", help="of merging (default: all that do not learn)")
    parser.add_argument("--sparsifiers", nargs="*", metavar="NAME", help="before the rules (default: all)")
    parser.add_argument("--lines", action="store_true", help="also test what lies between the base and the fine-tunes")
    parser.add_argument("--restored", action="store_true", help="also say how near EMR comes to each task vector")
    parser.add_argument(
        "--bfloat16", action="store_true", help="train and judge in mixed precision: fast on processors with AMX"
    )
    parser.add_argument("--fast", action="store_true", help="a small model, small tasks that need no --data")
    chosen = parser.parse_args(arguments)
    if chosen.data is None and not chosen.fast:
        parser.error("--data is needed, or --fast")
    if chosen.tasks and not chosen.table:
        parser.error("--tasks: give a --table of its own: a table's lines say how many tasks were merged, not which")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(chosen.out / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    from examples.evidence import experiments, lines, restored
    from examples.evidence.suites import Suite, origin

    suite = importlib.import_module(f"examples.evidence.{chosen.suite}")
    recipe, count = ("fast", min(suite.GROUPS)) if chosen.fast else (chosen.recipe, chosen.count or suite.COUNT)
    # A name that there is not would be noticed after hours of training.
    check(parser, "--recipe", [recipe], suite.RECIPES)
    check(parser, "--count", [count], suite.GROUPS)
    check(parser, "--tasks", chosen.tasks, suite.KNOWN)
    check(parser, "--rules", chosen.rules, experiments.RULES | experiments.OWN | experiments.LEARNED)
    check(parser, "--sparsifiers", chosen.sparsifiers, experiments.sparsifiers(Suite(None, [], None), None))
    names = tuple(chosen.tasks or suite.GROUPS[count])
    settings = suite.Settings.fast() if chosen.fast else suite.Settings()
    usual, size = settings, {name: getattr(chosen, name) or getattr(settings, name) for name in ("width", "layers")}
    settings = dataclasses.replace(settings, seed=chosen.base_seed, share=chosen.pretraining, **size)
    if settings.width % settings.heads:
        parser.error(f"--width: {settings.width} is not a multiple of the {settings.heads} heads")
    if (base_report := chosen.out / "base.json").exists():
        there = dataclasses.asdict(usual) | json.loads(base_report.read_text())
        for name, wanted in origin(settings).items():
            if wanted != there[name]:
                option = {"seed": "--base-seed", "share": "--pretraining"}.get(name, f"--{name}")
                parser.error(
                    f"{option}: the base in {chosen.out} is of {there[name]}, not {wanted}; give another --out"
                )
    rules = chosen.rules or [*experiments.RULES, *(experiments.OWN.keys() - experiments.RULES.keys())]
    table = chosen.out / f"{chosen.table or recipe}.csv"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        base = functools.partial(suite.pretrain, chosen.data, chosen.out, settings=settings, bfloat16=chosen.bfloat16)
        train(bar, chosen.out, "pretraining", chosen.out / "base", base)
        for seed in chosen.seeds:
            for name in names:
                tune = functools.partial(
                    suite.finetune, chosen.data, chosen.out, name, recipe, seed, bfloat16=chosen.bfloat16
                )
                title = f"{name}, {recipe}, seed {seed}"
                train(bar, chosen.out, title, suite.place(chosen.out, recipe, seed, name), tune)
            write_models(table.with_name(f"{table.stem}-models.csv"), chosen.out / recipe, names)
            models = suite.load(chosen.data, chosen.out, recipe, seed, names, bfloat16=chosen.bfloat16)
            with metered(chosen.out / HOURS, f"merging {recipe}, seed {seed}"):
                experiments.run(models, table, seed, rules, chosen.sparsifiers, told(bar, f"merging, seed {seed}"))
            experiments.describe(models, table.with_name(f"{table.stem}-ratios.csv"))
            if chosen.lines:
                lines.walk(models, table.with_name(f"{table.stem}-lines.csv"), seed, told(bar, f"between, seed {seed}"))
            if chosen.restored:
                shown, path = told(bar, f"restored, seed {seed}"), table.with_name(f"{table.stem}-restored.csv")
                restored.compare(models, path, seed, chosen.sparsifiers, shown)
    return table


def check(parser: argparse.ArgumentParser, option: str, given: Iterable | None, known: Collection) -> None:
    """Ends the program if something that was asked for is not there, and says what is."""
    for name in given or ():
        if name not in known:
            parser.error(f"{option}: there is no {name!r}; there are {', '.join(map(repr, known))}")


def write_models(path: Path, models: Path, names: Sequence[str]) -> None:
    """Collects what was measured of each fine-tune: its accuracy and that of a linear probe of the base.

    Args:
        path: the table.
        models: a directory with one for each seed.
        names: the tasks of the merge, which come first and in this order.
    """

    def order(found: Path) -> tuple:
        name = found.stem
        return found.parent.name, names.index(name) if name in names else len(names), name

    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "task", "probe", "tuned"))
        for found in sorted(models.glob("seed*/*.json"), key=order):
            said = json.loads(found.read_text())
            seed = found.parent.name.removeprefix("seed")
            writer.writerow((seed, found.stem, f"{said['probe']:.4f}", f"{said['tuned']:.4f}"))


def train(bar: Progress, out: Path, title: str, result: Path, run: Callable[..., None]) -> None:
    """Runs a training with a progress bar, unless its result is there."""
    if not result.exists():
        with metered(out / HOURS, title):
            run(progress=told(bar, title))


@contextlib.contextmanager
def metered(table: Path, step: str) -> Iterator[None]:
    """Adds to a table the hours that a step took, by the clock and of the processor, even if it is stopped."""
    began, busy = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        first = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if first:
                writer.writerow(("step", "hours", "processor hours"))
            spent = time.perf_counter() - began, time.process_time() - busy
            writer.writerow((step, *(f"{seconds / 3600:.4f}" for seconds in spent)))


def told(bar: Progress, title: str) -> Callable[[int, int], None]:
    """A row of the progress display, as a function of what is done and of all."""
    row = bar.add_task(title)
    return lambda done, all_: bar.update(row, completed=done, total=all_)


if __name__ == "__main__":
    main()
