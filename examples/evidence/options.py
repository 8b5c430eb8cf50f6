"""What can be asked of `python -m examples.evidence`, and what is refused before hours are spent on it."""

import argparse
import dataclasses
import importlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

SUITES = ("vision", "language", "multimodal")
EVERY = "all"
# What --fast merges unless asked otherwise: a minute of one core.
FAST_RULES = ("EMR", "T-Switch", "task arithmetic", "TIES")
FAST_SPARSIFIERS = ("none", "TADrop 0.95/0.99", "uniform of 0.95/0.99", "reversed of 0.95/0.99")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done: everything that was asked for is known, and goes with what is there."""

    suite: ModuleType
    data: Path | None
    out: Path
    settings: Any
    recipe: str
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    sparsifiers: tuple[str, ...]
    table: Path
    lines: bool
    restored: bool
    bfloat16: bool


def parser(about: str | None) -> argparse.ArgumentParser:
    """The command's options."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m examples.evidence", description=about, formatter_class=form)
    add = parser.add_argument
    add("suite", choices=SUITES)
    add("--data", type=Path, metavar="DIR", help="the data sets")
    add("--out", type=Path, required=True, metavar="DIR", help="where models and the table go")
    add("--recipe", metavar="NAME", help="how models are fine-tuned (default: adamw)")
    add("--seeds", type=_natural, nargs="+", metavar="N", help="of fine-tuning (default: 0 1 2; with --fast, 0)")
    add("--base-seed", type=_natural, default=0, metavar="N", help="of pretraining; a base wants an OUT of its own")
    add("--pretraining", type=_share, default=1.0, metavar="SHARE", help="of the usual steps: a shorter, weaker base")
    add("--width", type=_positive, metavar="N", help="of the model, a multiple of its heads (default: the suite's)")
    add("--layers", type=_positive, metavar="N", help="of the model (default: the suite's)")
    add("--count", type=int, metavar="N", help="tasks (default: the suite's main table)")
    add("--tasks", nargs="+", metavar="NAME", help="in place of the suite's own")
    add("--table", metavar="NAME", help="of the table's file (default: the recipe's)")
    add("--rules", nargs="+", metavar="NAME", help="of merging (default: all that do not learn; with --fast, four)")
    add(
        "--sparsifiers",
        nargs="*",
        metavar="NAME",
        help=f"before the rules; {EVERY!r} for every one (default: TADrop with its controls, and the library's others)",
    )
    add("--lines", action="store_true", help="also validate what lies between the base and the fine-tunes")
    add("--restored", action="store_true", help="also say how near EMR comes to each task vector")
    add("--bfloat16", action="store_true", help="train and judge in mixed precision: fast on processors with AMX")
    add("--fast", action="store_true", help="a small model, small tasks that need no --data, few merges")
    return parser


def plan(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> Plan:
    """What was asked for, checked; ends the program with a sentence if something is not there or does not fit.

    Args:
        parser: ends the program.
        chosen: what it parsed.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(chosen.out / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    from examples.evidence import belonging, experiments
    from examples.evidence.suites import Suite

    suite = importlib.import_module(f"examples.evidence.{chosen.suite}")
    recipe, names = _tasks(parser, chosen, suite)
    every = tuple(experiments.sparsifiers(Suite(None, [], None), None))
    check(parser, "--rules", chosen.rules, experiments.RULES | experiments.OWN | experiments.LEARNED)
    check(parser, "--sparsifiers", chosen.sparsifiers, (*every, EVERY))
    check(parser, "--seeds", chosen.seeds, chosen.seeds or ())
    _there(parser, chosen, suite, names)
    rules, sparsifiers = tuple(dict.fromkeys((*experiments.RULES, *experiments.OWN))), experiments.MAIN
    if chosen.fast:
        rules, sparsifiers = FAST_RULES, FAST_SPARSIFIERS
    if chosen.sparsifiers is not None:
        sparsifiers = every if EVERY in chosen.sparsifiers else tuple(chosen.sparsifiers)
    merges = experiments.wanted(chosen.rules or rules, sparsifiers)
    if chosen.fast and not chosen.rules:  # what rules trim of their own takes half of the time to compile
        merges = [merge for merge in merges if merge[0] != "own"]
    found = Plan(
        suite=suite,
        data=chosen.data,
        out=chosen.out,
        settings=_settings(parser, chosen, suite),
        recipe=recipe,
        names=names,
        seeds=tuple(chosen.seeds or ((0,) if chosen.fast else (0, 1, 2))),
        merges=tuple(merges),
        sparsifiers=sparsifiers,
        table=chosen.out / f"{chosen.table or recipe}.csv",
        lines=chosen.lines,
        restored=chosen.restored,
        bfloat16=chosen.bfloat16,
    )
    if not found.merges:
        parser.error("--sparsifiers: nothing is left to merge; name one")
    for path, fields in _files(found).items():
        if path.exists() and path.read_text().partition("\n")[0] != ",".join(fields):
            parser.error(f"{path} has the columns of an older version: move it away, or give another --table")
    if said := belonging.conflict(found.table, recipe, names, bfloat16=found.bfloat16):
        parser.error(said)
    return found


def _tasks(parser: argparse.ArgumentParser, chosen: argparse.Namespace, suite: ModuleType) -> tuple[str, tuple]:
    """The recipe and the tasks."""
    if chosen.fast:
        count = min(suite.GROUPS)
        for option, given, own in (("recipe", chosen.recipe, "fast"), ("count", chosen.count, count)):
            if given not in (None, own):
                parser.error(f"--{option}: --fast has its own, {own}, not {given}")
        if chosen.data is not None:
            parser.error("--data: --fast has its own data")
        check(parser, "--tasks", chosen.tasks, suite.GROUPS[count], "with --fast ")
        return "fast", tuple(chosen.tasks or suite.GROUPS[count])
    if chosen.tasks and chosen.count is not None:
        parser.error("--count: --tasks says which, and so how many")
    recipe, count = chosen.recipe or "adamw", suite.COUNT if chosen.count is None else chosen.count
    check(parser, "--recipe", [recipe], suite.RECIPES)
    check(parser, "--count", [count], suite.GROUPS)
    check(parser, "--tasks", chosen.tasks, suite.KNOWN)
    return recipe, tuple(chosen.tasks or suite.GROUPS[count])


def _there(
    parser: argparse.ArgumentParser, chosen: argparse.Namespace, suite: ModuleType, names: tuple[str, ...]
) -> None:
    """Ends the program if the data are not there."""
    if chosen.fast:
        return
    if chosen.data is None:
        parser.error("--data is needed, or --fast")
    if not chosen.data.is_dir():
        parser.error(f"--data: there is no directory {chosen.data}")
    pretraining = [] if (chosen.out / "base").exists() else [None]
    files = dict.fromkeys(file for name in (*pretraining, *names) for file in suite.files(name))
    if missing := [file for file in files if not (chosen.data / file).exists()]:
        parser.error(f"--data: {chosen.data} lacks {', '.join(missing)}")


def _settings(parser: argparse.ArgumentParser, chosen: argparse.Namespace, suite: ModuleType) -> Any:
    """The sizes of the base, which is the one that is there if one is."""
    from examples.evidence.suites import origin

    usual = suite.Settings.fast() if chosen.fast else suite.Settings()
    size = {name: getattr(chosen, name) or getattr(usual, name) for name in ("width", "layers")}
    settings = dataclasses.replace(usual, seed=chosen.base_seed, share=chosen.pretraining, **size)
    if settings.width % settings.heads:
        parser.error(f"--width: {settings.width} is not a multiple of the {settings.heads} heads")
    if (report := chosen.out / "base.json").exists():
        there = dataclasses.asdict(usual) | json.loads(report.read_text())
        for name, wanted in origin(settings).items():
            if wanted != there[name]:
                option = {"seed": "--base-seed", "share": "--pretraining"}.get(name, f"--{name}")
                parser.error(
                    f"{option}: the base in {chosen.out} is of {there[name]}, not {wanted}; give another --out"
                )
    return settings


def _files(plan: Plan) -> dict[Path, Sequence[str]]:
    """The files that lines are added to, and their columns."""
    from examples.evidence import experiments, lines, restored
    from examples.evidence.belonging import beside

    found: dict[Path, Sequence[str]] = {plan.table: experiments.FIELDS}
    found |= {beside(plan.table, "lines.csv"): lines.FIELDS} if plan.lines else {}
    return found | ({beside(plan.table, "restored.csv"): restored.FIELDS} if plan.restored else {})


def check(
    parser: argparse.ArgumentParser, option: str, given: Iterable | None, known: Collection, where: str = ""
) -> None:
    """Ends the program if something that was asked for is not there, or twice, and says what is there."""
    seen = set()
    for name in given or ():
        if name not in known:
            parser.error(f"{option}: {where}there is no {name!r}; there are {', '.join(map(repr, known))}")
        if name in seen:
            parser.error(f"{option}: {name!r} is there twice")
        seen.add(name)


def _natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def _share(text: str) -> float:
    """A number above 0."""
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return found
