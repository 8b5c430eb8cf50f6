"""Trains a base and its fine-tunes, merges them in every way, writes a table; goes on where it stopped.

    python -m examples.evidence vision --data DIR --out DIR                # 8 tasks, 3 seeds
    python -m examples.evidence vision --data DIR --out DIR --count 30 --seeds 0
    python -m examples.evidence vision --fast --out DIR                    # two minutes of one core, no data needed

Each step is skipped when its result is there: take a directory away, or a line of the table, and it is made anew.
TABLE.md says what came out; what each step took is added to hours.csv.
"""

import contextlib
import csv
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.evidence import options

HOURS = "hours.csv"


def main(arguments: list[str] | None = None) -> Path:
    """Runs a suite and gives the path of its table."""
    parser = options.parser(__doc__)
    plan = options.plan(parser, parser.parse_args(arguments))
    from examples.evidence import belonging, experiments, lines, report, restored

    beside = functools.partial(belonging.beside, plan.table)
    suite, recipe, names, bfloat16 = plan.suite, plan.recipe, plan.names, plan.bfloat16
    plan.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        base = functools.partial(suite.pretrain, plan.data, plan.out, settings=plan.settings, bfloat16=bfloat16)
        train(bar, plan.out, "pretraining", plan.out / "base", base)
        for seed in plan.seeds:
            for name in names:
                tune = functools.partial(suite.finetune, plan.data, plan.out, name, recipe, seed, bfloat16=bfloat16)
                train(bar, plan.out, f"{name}, {recipe}, seed {seed}", suite.place(plan.out, recipe, seed, name), tune)
            belonging.record(plan.table, recipe, names, bfloat16=bfloat16)
            belonging.write_models(plan.table, recipe, names, seed)
            models = suite.load(plan.data, plan.out, recipe, seed, names, bfloat16=bfloat16)
            with metered(plan.out / HOURS, f"merging {recipe}, seed {seed}"):
                shown = told(bar, f"merging, seed {seed}")
                experiments.run(models, plan.table, seed, plan.merges, shown)
            experiments.describe(models, beside("ratios.csv"), seed)
            if plan.lines:
                lines.walk(models, beside("lines.csv"), seed, told(bar, f"between, seed {seed}"))
            if plan.restored:
                shown = told(bar, f"restored, seed {seed}")
                restored.compare(models, beside("restored.csv"), seed, plan.sparsifiers, shown)
    print(report.write(plan.table))
    return plan.table


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


def stoppable() -> None:
    """Lets what is under way say what it took before SIGTERM ends the program."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    stoppable()
    main()
