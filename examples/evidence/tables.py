"""What the CSV files of the suites say, as Markdown tables and pictures: `python -m examples.evidence.tables`.

It fills docs/results.md and docs/evidence-*.md, where a pair of comments says what goes there: `<!-- NAME FILE ... -->`
and `<!-- end -->`, NAME being a function of `TABLES` and FILE a file of docs/results.
"""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from examples.evidence.intervals import (
    Lines,
    by_seed,
    by_task,
    emphasised,
    established,
    interval,
    numbers,
    paired,
    two_ways,
)

DOCS = Path(__file__).parents[2] / "docs"
WAYS = ("alone", "together")
_PLACE = re.compile(r"(<!-- (\w+) ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_SUITE = re.compile(r"(\S+)\s+(\d+)(?:\s+without\s+(\S+)\s+of\s+(\S+))?(?:\s+as\s+(.+))?", re.DOTALL)


def read(name: str) -> Lines:
    """The lines of a file of docs/results, or of any other whose whole path is given."""
    with (DOCS / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def accuracies(file: str, tasks: str, *names: str) -> str:
    """Test accuracies: a row for each sparsifier, or for those of some names, a column for each rule that has any.

    They are means over seeds, whose number stands in brackets where it is smaller than the table's. Bold is the best of
    a column, of the cells that have as many seeds as any.
    """
    lines = [line for line in read(file) if line["tasks"] == tasks and (not names or line["sparsifier"] in names)]
    rules = _ordered(line["rule"] for line in lines)
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        cells[line["sparsifier"], line["rule"]].append(100 * float(line["test"]))
    sparsity = defaultdict(list)
    for line in lines:
        sparsity[line["sparsifier"]].append(float(line["sparsity"]))
    seeds = len({line["seed"] for line in lines})
    means = {key: f"{np.mean(values):.1f}" for key, values in cells.items()}
    most = {rule: max(len(values) for (_, r), values in cells.items() if r == rule) for rule in rules}
    whole = [key for key, values in cells.items() if len(values) == most[key[1]]]
    best = {rule: max((means[key] for key in whole if key[1] == rule), key=float) for rule in rules}

    def cell(name: str, rule: str) -> str:
        if (name, rule) not in means:
            return ""
        mean, count = means[name, rule], len(cells[name, rule])
        text = f"**{mean}**" if (name, rule) in whole and mean == best[rule] else mean
        return text if count == seeds else f"{text} ({count})"

    rows = []
    for name in _ordered(line["sparsifier"] for line in lines):
        pruned = "" if name == "own" else f"{np.mean(sparsity[name]):.2f}"
        rows.append([name, pruned, *(cell(name, rule) for rule in rules)])
    return markdown(["sparsifier", "pruned", *rules], rows) + "\n\n" + _seeds(lines)


def differences(file: str, tasks: str, arm: str, *others: str) -> str:
    """One arm minus others, in points: the mean over seeds and tasks, and its 95 % confidence interval.

    Differences are paired: the same fine-tunes, the same images. The interval is Student's over pairs of seed and task;
    bold is what is `established`, which wants more. The number of seeds stands in brackets where it is smaller than the
    table's. A file of `models` among the others stands for their probes; its tasks are in the order of the merge.
    """
    lines = [line for line in read(file) if line["tasks"] == tasks]
    rules = _ordered(line["rule"] for line in lines)
    merges = lines + [line for name in others if name.endswith(".csv") for line in _probes(name, int(tasks), rules)]
    names = {other: "the probe" if other.endswith(".csv") else other for other in others}
    seeds = len({line["seed"] for line in lines})

    def cell(rule: str, other: str) -> str:
        values = by_seed(paired(merges, rule, arm, other), int(tasks))
        return emphasised(interval(values), values) + f" ({len(values)})" * (0 < len(values) < seeds)

    columns = {rule: [cell(rule, other) for other in others] for rule in rules}
    columns = {rule: cells for rule, cells in columns.items() if any(cells)}  # others were not compared
    rows = [[names[other], *cells] for other, *cells in zip(others, *columns.values(), strict=True)]
    return markdown([f"{arm} minus", *columns], rows) + "\n\n" + _seeds(lines)


def over_tasks(file: str, tasks: str, rule: str, arm: str, *others: str) -> str:
    """The same for one rule with both intervals of `two_ways`, and how many tasks are ahead in the mean over seeds."""
    lines = [line for line in read(file) if line["tasks"] == tasks]
    rows = []
    for other in others:
        values = by_seed(paired(lines, rule, arm, other), int(tasks))
        means = values.mean(0).round(6)
        rows.append([other, two_ways(values), f"{np.sum(means > 0)}", f"{np.sum(means < 0)}"])
    return markdown([f"{arm} minus", rule, "tasks ahead", "behind"], rows) + "\n\n" + _seeds(lines)


def suites(rule: str, *arguments: str) -> str:
    """Differences for one rule, a row for each suite that has any and a column for each comparison; see `two_ways`.

    Args:
        rule: its name.
        arguments: suites, `FILE TASKS [without TASK,TASK of MODELS] [as NAME]`, and comparisons, `ARM minus OTHER`.
    """
    compared = [tuple(argument.split(" minus ")) for argument in arguments if " minus " in argument]
    rows = []
    for argument in arguments:
        if " minus " in argument:
            continue
        found = _SUITE.fullmatch(argument)
        if not found:
            raise ValueError(f"not a suite: {argument!r}")
        file, tasks, left_out, named, title = found.groups()
        lines = [line for line in read(file) if line["tasks"] == tasks]
        names = _ordered(line["task"] for line in read(named))[: int(tasks)] if named else [""] * int(tasks)
        judged = [i for i, name in enumerate(names) if not left_out or name not in left_out.split(",")]
        cells = [by_seed(paired(lines, rule, arm, other, judged), len(judged)) for arm, other in compared]
        most = max(map(len, cells))
        if most:
            name = " ".join((title or file.removesuffix(".csv")).split())
            marks = (f" ({len(values)})" * (0 < len(values) < most) for values in cells)
            rows.append([name, str(most), *(two_ways(v) + mark for v, mark in zip(cells, marks, strict=True))])
    arms, others = (_ordered(side) for side in zip(*compared, strict=True))
    if len(arms) == 1:
        head, columns = f"{rule}: {arms[0]} minus", others
    elif len(others) == 1:
        head, columns = f"{rule}: minus {others[0]}", arms
    else:
        head, columns = rule, [" minus ".join(pair) for pair in compared]
    return markdown([head, "seeds", *columns], rows)


def rules(*arguments: str) -> str:
    """Differences with both intervals of `two_ways`: a row for each rule, a column for each suite and comparison.

    Args:
        arguments: as of `suites`; nothing can be left out.
    """
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for argument in arguments:
        found = _SUITE.fullmatch(argument)
        if not found or " minus " in argument:
            continue
        lines = [line for line in read(found[1]) if line["tasks"] == found[2]]
        for rule in _ordered(line["rule"] for line in lines):
            for arm, other in (argument.split(" minus ") for argument in arguments if " minus " in argument):
                if said := two_ways(by_seed(paired(lines, rule, arm, other), int(found[2]))):
                    cells[f"{found[5]}: {arm} minus {other}"][rule] = said
    named = _ordered(rule for column in cells.values() for rule in column)
    return markdown(["", *cells], [[rule, *(column.get(rule, "") for column in cells.values())] for rule in named])


def standing(*compared: str) -> str:
    """What is `established` in any file of merges, before any rule; then how many comparisons there were.

    Args:
        compared: `ARM minus OTHER`.
    """
    rows, counts = [], dict.fromkeys(compared, 0)
    for path in sorted((DOCS / "results").glob("*.csv")):
        lines = read(path.name)
        if "rule" not in lines[0]:
            continue
        for tasks, merges in by_count(lines).items():
            for rule in _ordered(line["rule"] for line in merges):
                for what in compared:
                    arm, other = what.split(" minus ")
                    values = by_seed(paired(merges, rule, arm, other), int(tasks))
                    counts[what] += len(values) > 1
                    if established(values):
                        rows.append([path.stem, tasks, str(len(values)), rule, what, two_ways(values)])
    said = ", ".join(f"{what}: {count}" for what, count in counts.items())
    head = ["table", "tasks", "seeds", "rule", "compared", "difference"]
    return markdown(head, rows) + f"\n\n*Pairs of table and rule with two seeds or more: {said}.*"


def lengths(*files: str) -> str:
    """Which lengths validation data chose, of the rules that have one: the shortest and the longest, and how often.

    Args:
        files: `FILE TASKS`.
    """
    rows = []
    for file, tasks in (file.split() for file in files):
        chosen = [float(line["length"]) for line in read(file) if line["length"] and line["tasks"] == tasks]
        ends = [(end, str(chosen.count(end))) for end in (min(chosen), max(chosen))]
        rows.append([file.removesuffix(".csv"), tasks, str(len(chosen)), *(f"{x:g}, {n}" for x, n in ends)])
    return markdown(["table", "tasks", "merges", "shortest chosen, by how many", "longest chosen"], rows)


def validation(rule: str, *files: str) -> str:
    """Validation accuracies by TADrop's quantiles, one column a suite, each the mean over seeds, and their mean.

    Args:
        rule: its name.
        files: suites, `FILE TASKS`; what is only a part of a suite's arms may lie in several, `FILE+FILE TASKS`.
    """
    columns: list[dict[str, float]] = []
    for names, tasks in (file.split() for file in files):
        found: dict[str, list[float]] = defaultdict(list)
        for line in {str(line): line for name in names.split("+") for line in read(name)}.values():
            if (line["tasks"], line["rule"]) == (tasks, rule) and re.fullmatch(
                r"TADrop [\d.]+/[\d.]+", line["sparsifier"]
            ):
                found[line["sparsifier"].removeprefix("TADrop ")].append(100 * float(line["validation"]))
        columns.append({name: float(np.mean(values)) for name, values in found.items()})
    rows = []
    for name in sorted(columns[0], key=lambda name: [float(part) for part in name.split("/")]):
        cells = [f"{column[name]:.1f}" if name in column else "" for column in columns]
        mean = f"{np.mean([column[name] for column in columns]):.1f}" if all(cells) else ""
        rows.append([name, *cells, mean])
    heads = (names.split("+")[0].removesuffix(".csv") for names, _ in (file.split() for file in files))
    return markdown(["quantiles", *heads, "mean"], rows)


def growth(file: str, rule: str, which: str, arm: str, *others: str) -> str:
    """For one rule, by the number of tasks that are merged; with `arm`'s own accuracies in the first row.

    The interval is over pairs of seed and task; of one seed it is over tasks.

    Judged on all tasks, if `which` is "all"; on the first ones, if it is a number; if it is a file of `models` with the
    tasks in the order of the merges, on those whose fine-tunes are two points better than the probe.
    """
    merges = {count: (lines, _judged(which, count)) for count, lines in by_count(read(file)).items()}

    def mean(lines: Lines, judged: list[int]) -> str:
        of = [line for line in lines if (line["rule"], line["sparsifier"]) == (rule, arm)]
        return f"{100 * np.mean([by_task(line)[judged] for line in of]):.1f}" if of and judged else ""

    rows = [[f"{arm}, accuracy", *(mean(*merge) for merge in merges.values())]]
    for other in others:
        found = [by_seed(paired(lines, rule, arm, other, part), len(part)) for lines, part in merges.values()]
        rows.append([f"minus {other}", *(emphasised(interval(values), values) for values in found)])
    return markdown([f"before {rule}", *(f"{count} tasks" for count in merges)], rows)


def _probes(file: str, tasks: int, rules: Iterable[str]) -> Lines:
    """What the probes of a file of `models` have on the first tasks, those of the merge, as if each rule had it."""
    by_seed: dict[str, list[str]] = defaultdict(list)
    for line in read(file):
        by_seed[line["seed"]].append(line["probe"])
    return [
        {"rule": rule, "sparsifier": file, "seed": seed, "by_task": " ".join(probes[:tasks])}
        for rule in rules
        for seed, probes in by_seed.items()
    ]


def lines(file: str, *_: str) -> str:
    """Accuracies between the base and its fine-tunes: the mean over tasks, each alone and all at once, by the share."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in read(file):
        found[line["share"]][line["way"]].append(100 * float(np.mean(by_task(line))))
    rows = [[f"{float(share):g}", *(f"{np.mean(found[share][way]):.1f}" for way in WAYS)] for share in found]
    return markdown(["share of the task vectors", *WAYS], rows)


def by_count(lines: Lines) -> dict[str, Lines]:
    """The lines of each number of tasks."""
    counts = _ordered(line["tasks"] for line in lines)
    return {count: [line for line in lines if line["tasks"] == count] for count in counts}


def _judged(which: str, count: str) -> list[int]:
    if which.endswith(".csv"):
        gains = [round(float(line["tuned"]) - float(line["probe"]), 4) for line in read(which)[: int(count)]]
        return [i for i, gain in enumerate(gains) if gain >= 0.02]
    return list(range(int(count) if which == "all" else int(which)))


def models(file: str, *_: str) -> str:
    """The fine-tunes: a linear probe of the base against the fine-tuned model, by task, the mean over seeds."""
    lines = read(file)
    rows = []
    for name in _ordered(line["task"] for line in lines):
        here = [line for line in lines if line["task"] == name]
        means = [100 * np.mean([float(line[key]) for line in here]) for key in ("probe", "tuned")]
        rows.append([name, str(len(here)), *(f"{mean:.1f}" for mean in means), f"{means[1] - means[0]:+.1f}"])
    return markdown(["task", "seeds", "probe", "fine-tuned", "gain"], rows)


def described(file: str, quantiles: str = "0.75/0.95") -> Lines:
    """The tensors of a file of `ratios` at these quantiles: of the first merge that it has.

    An older file is of .75/.95 and does not say so.
    """
    lines = [line for line in read(file) if line.get("quantiles", "0.75/0.95") == quantiles]
    return [line for line in lines if all(line.get(key) == lines[0].get(key) for key in ("tasks", "seed"))]


def ratios(file: str, quantiles: str = "0.75/0.95") -> str:
    """Quantile ratios by kind of tensor: mean over layers and tasks, spread over tensors and over tasks."""
    kinds: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for line in described(file, quantiles):
        kinds[_kind(line)].append((int(line["entries"]), float(line["ratio"]), float(line["sd_over_tasks"])))
    rows = []
    for kind, found in kinds.items():
        entries, means, spread = np.array(found).T
        rows.append([f"`{kind}`", f"{int(entries.sum()):,}", f"{means.mean():.3f}", f"{means.std():.3f}"])
        rows[-1].append(f"{spread.mean():.3f}")
    return markdown(["tensors", "entries", "ratio", "s.d. over layers", "s.d. over tasks"], rows)


def _kind(line: dict[str, str]) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"(^|/)\d+/", r"\1*/", line["tensor"])


def kinds(*files: str) -> str:
    """Quantile ratios by kind of tensor, the mean over layers and tasks: a column for each file."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        for line in read(file):
            found[_kind(line)][file].append(float(line["ratio"]))
    rows = [
        [f"`{kind}`", *(f"{np.mean(ratios[file]):.2f}" if file in ratios else "" for file in files)]
        for kind, ratios in found.items()
    ]
    return markdown(["tensors", *(file.removesuffix("-ratios.csv") for file in files)], rows)


def each_task(models: str, file: str, tasks: str, rule: str, *names: str) -> str:
    """Accuracies by task, means over seeds: of probes, of fine-tunes, of a rule after each of some sparsifiers.

    The tasks of the file of `models` have to be in the order of the merge.
    """
    lines = read(models)
    titles = _ordered(line["task"] for line in lines)[: int(tasks)]

    def row(head: str, values: Sequence[float]) -> list[str]:
        return [head, *(f"{100 * value:.1f}" for value in (*values, np.mean(values)))]

    rows = []
    for head, key in (("probe", "probe"), ("fine-tuned", "tuned")):
        measured = ([float(line[key]) for line in lines if line["task"] == title] for title in titles)
        rows.append(row(head, [float(np.mean(values)) for values in measured]))
    for name in names:
        found = [
            by_task(line)
            for line in read(file)
            if (line["tasks"], line["rule"], line["sparsifier"]) == (tasks, rule, name)
        ]
        rows.append(row(f"{rule}, {name}", np.mean(found, 0).tolist()))
    return markdown(["", *titles, "mean"], rows)


def restored(file: str, tasks: str, merges: str) -> str:
    """How near EMR comes to the task vectors after each sparsifier, beside its accuracy; means over tasks and seeds."""
    lines = [line for line in read(file) if line["tasks"] == tasks]
    judged = [line for line in read(merges) if line["tasks"] == tasks and line["rule"] == "EMR"]
    rows = []
    for name in _ordered(line["sparsifier"] for line in lines):
        here = [line for line in lines if line["sparsifier"] == name]
        error, cosine = (np.mean([numbers(line[key]) for line in here]) for key in ("error", "cosine"))
        tests = [100 * float(line["test"]) for line in judged if line["sparsifier"] == name]
        rows.append([name, f"{cosine:.2f}", f"{error:.2f}", f"{np.mean(tests):.1f}" if tests else ""])
    return markdown(["before EMR", "cosine", "error", "accuracy"], rows) + "\n\n" + _seeds(lines)


def by_rule(table: Callable[..., str]) -> Callable[..., str]:
    """A table whose columns are rules, with a row for each of them instead: where there are many."""

    def turned(*arguments: str) -> str:
        text, _, rest = table(*arguments).partition("\n\n")
        columns = [line[2:-2].split(" | ") for line in text.splitlines()]
        head, *rows = [list(row) for row in zip(columns[0], *columns[2:], strict=True)]
        return markdown(head, rows) + "\n\n" + rest

    return turned


TABLES: dict[str, Callable[..., str]] = {
    "accuracies": accuracies,
    "accuracies_by_rule": by_rule(accuracies),
    "differences": differences,
    "differences_by_rule": by_rule(differences),
    "each_task": each_task,
    "growth": growth,
    "kinds": kinds,
    "lengths": lengths,
    "lines": lines,
    "over_tasks": over_tasks,
    "rules": rules,
    "standing": standing,
    "suites": suites,
    "validation": validation,
    "models": models,
    "ratios": ratios,
    "restored": restored,
}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str) -> str:
    """The page, with its tables as the files say now."""

    def table(found: re.Match) -> str:
        arguments = [part.strip() for part in found[3].split(";")]
        return f"{found[1]}\n{TABLES[found[2]](*arguments)}\n\n{found[4]}"

    return _PLACE.sub(table, text)


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _seeds(lines: Lines) -> str:
    count = len({line["seed"] for line in lines})
    return f"*{lines[0]['tasks']} tasks, {count} seed{'s' if count > 1 else ''} of fine-tuning.*"


def main() -> None:
    """Fills the pages; with --check, fails if that changes one."""
    for page in (DOCS / "results.md", *sorted(DOCS.glob("evidence-*.md"))):
        now = page.read_text()
        if "--check" in sys.argv and now != filled(now):
            sys.exit(f"{page} is not up to date: python -m examples.evidence.tables")
        page.write_text(filled(now))


if __name__ == "__main__":
    main()
