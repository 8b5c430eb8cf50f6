"""`python -m examples.evidence vision --data DIR --out DIR`: trains, merges, tabulates; goes on where it stopped.

Each step is skipped when its result is there: take a directory away and it is made anew.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def main(arguments: list[str] | None = None) -> None:
    """Runs a suite."""
    parser = argparse.ArgumentParser(prog="python -m examples.evidence", description=__doc__)
    parser.add_argument("suite", choices=["vision"])
    parser.add_argument("--data", type=Path, required=True, help="the directory of data sets")
    parser.add_argument("--out", type=Path, required=True, help="where models and results go")
    parser.add_argument("--recipe", default="adamw", help="how models are fine-tuned (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of fine-tuning")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="default: the eight of the main table")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(chosen.out / "compiled"))
    from examples.evidence import vision, vision_tasks

    names = chosen.tasks or vision_tasks.EIGHT
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        train(bar, "pretraining", chosen.out / "base", functools.partial(vision.pretrain, chosen.data, chosen.out))
        for seed in chosen.seeds:
            for name in names:
                run = functools.partial(vision.finetune, chosen.data, chosen.out, name, chosen.recipe, seed)
                train(bar, f"{name}, seed {seed}", vision.place(chosen.out, chosen.recipe, seed, name), run)


def train(bar: Progress, title: str, result: Path, run: Callable[..., None]) -> None:
    """Runs a training with a progress bar, unless its result is there."""
    if result.exists():
        return
    row = bar.add_task(title)
    run(progress=lambda done, steps: bar.update(row, completed=done, total=steps))


if __name__ == "__main__":
    main()
