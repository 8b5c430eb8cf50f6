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

DOCS = Path(__file__).parents[2] / "docs"
WAYS = ("alone", "together")
_PLACE = re.compile(r"(<!-- (\w+) ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Lines = list[dict[str, str]]


def read(name: str) -> Lines:
    """The lines of a file of docs/results, or of any other whose whole path is given."""
    with (DOCS / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def accuracies(file: str, tasks: str) -> str:
    """Test accuracies: a row for each sparsifier, a column for each rule, the mean over seeds.

    The number of seeds stands in brackets where it is smaller than the table's. Bold is the best of a column, of the
    cells that have as many seeds as any.
    """
    lines = [line for line in read(file) if line["tasks"] == tasks]
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

    Differences are paired: the same fine-tunes, the same images. The interval is Student's over pairs of seed and task.
    The number of seeds stands in brackets where it is smaller than the table's. A file of `models` among the others
    stands for their probes; its tasks are in the order of the merge.
    """
    lines = [line for line in read(file) if line["tasks"] == tasks]
    rules = _ordered(line["rule"] for line in lines)
    merges = lines + [line for name in others if name.endswith(".csv") for line in _probes(name, int(tasks), rules)]
    names = {other: "the probe" if other.endswith(".csv") else other for other in others}
    seeds = len({line["seed"] for line in lines})

    def cell(rule: str, other: str) -> str:
        values = paired(merges, rule, arm, other)
        count = len(values) // int(tasks)
        return interval(values) + f" ({count})" * (0 < count < seeds)

    columns = {rule: [cell(rule, other) for other in others] for rule in rules}
    columns = {rule: cells for rule, cells in columns.items() if any(cells)}  # others were not compared
    rows = [[names[other], *cells] for other, *cells in zip(others, *columns.values(), strict=True)]
    return markdown([f"{arm} minus", *columns], rows) + "\n\n" + _seeds(lines)


def over_tasks(file: str, tasks: str, rule: str, arm: str, *others: str) -> str:
    """The same for one rule with the seeds' mean of each task: intervals over tasks, as if new tasks were drawn."""
    lines = [line for line in read(file) if line["tasks"] == tasks]
    rows = []
    for other in others:
        means = paired(lines, rule, arm, other).reshape(-1, int(tasks)).mean(0).round(6)
        rows.append([other, interval(means), f"{np.sum(means > 0)}", f"{np.sum(means < 0)}"])
    return markdown([f"{arm} minus", rule, "tasks ahead", "behind"], rows) + "\n\n" + _seeds(lines)


def suites(rule: str, *arguments: str) -> str:
    """Differences for one rule in several suites, each judged as if new tasks were drawn and over pairs, see above.

    Args:
        rule: its name.
        arguments: suites, `FILE TASKS`, and comparisons, `ARM minus OTHER`.
    """
    files = [argument.split() for argument in arguments if " minus " not in argument]
    rows = []
    for arm, other in (argument.split(" minus ") for argument in arguments if " minus " in argument):
        row = [f"{arm} minus {other}"]
        for file, tasks in files:
            lines = [line for line in read(file) if line["tasks"] == tasks]
            values = paired(lines, rule, arm, other)
            count, seeds = len(values) // int(tasks), len({line["seed"] for line in lines})
            if not count:
                row.append("")
                continue
            means = values.reshape(count, -1).mean(0)
            row.append(f"{interval(means)}; ± {100 * half_width(values):.2f}" + f" ({count})" * (count < seeds))
        rows.append(row)
    return markdown([f"before {rule}", *(file.removesuffix(".csv") for file, _ in files)], rows)


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
    """The same for one rule, by the number of tasks that are merged; with `arm`'s own accuracies in the first row.

    Judged on all tasks, if `which` is "all"; on the first ones, if it is a number; if it is a file of `models` with the
    tasks in the order of the merges, on those whose fine-tunes are two points better than the probe.
    """
    merges = {count: (lines, _judged(which, count)) for count, lines in by_count(read(file)).items()}

    def mean(lines: Lines, judged: list[int]) -> str:
        of = [line for line in lines if (line["rule"], line["sparsifier"]) == (rule, arm)]
        return f"{100 * np.mean([_by_task(line)[judged] for line in of]):.1f}" if of and judged else ""

    rows = [[f"{arm}, accuracy", *(mean(*merge) for merge in merges.values())]]
    for other in others:
        cells = (interval(paired(lines, rule, arm, other, judged)) for lines, judged in merges.values())
        rows.append([f"minus {other}", *cells])
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
        found[line["share"]][line["way"]].append(100 * float(np.mean(_by_task(line))))
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


def paired(lines: Lines, rule: str, arm: str, other: str, judged: Sequence[int] | None = None) -> np.ndarray:
    """One arm minus another, for each pair of seed and task that both have, `(N,)`; on some tasks, or on all."""
    part = slice(None) if judged is None else judged
    of = [line for line in lines if line["rule"] == rule]
    found = {(line["sparsifier"], line["seed"]): _by_task(line)[part] for line in of}
    seeds = [seed for name, seed in found if name == arm and (other, seed) in found]
    return np.concatenate([np.zeros(0), *(found[arm, seed] - found[other, seed] for seed in seeds)])


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
        kind = re.sub(r"(^|/)\d+/", r"\1*/", line["tensor"])
        kinds[kind].append((int(line["entries"]), float(line["ratio"]), float(line["sd_over_tasks"])))
    rows = []
    for kind, found in kinds.items():
        entries, means, spread = np.array(found).T
        rows.append([f"`{kind}`", f"{int(entries.sum()):,}", f"{means.mean():.3f}", f"{means.std():.3f}"])
        rows[-1].append(f"{spread.mean():.3f}")
    return markdown(["tensors", "entries", "ratio", "s.d. over layers", "s.d. over tasks"], rows)


def restored(file: str, tasks: str, merges: str) -> str:
    """How near EMR comes to the task vectors after each sparsifier, beside its accuracy; means over tasks and seeds."""
    lines = [line for line in read(file) if line["tasks"] == tasks]
    judged = [line for line in read(merges) if line["tasks"] == tasks and line["rule"] == "EMR"]
    rows = []
    for name in _ordered(line["sparsifier"] for line in lines):
        here = [line for line in lines if line["sparsifier"] == name]
        error, cosine = (np.mean([_numbers(line[key]) for line in here]) for key in ("error", "cosine"))
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
    "growth": growth,
    "lines": lines,
    "over_tasks": over_tasks,
    "suites": suites,
    "validation": validation,
    "models": models,
    "ratios": ratios,
    "restored": restored,
}


def interval(values: np.ndarray) -> str:
    """The mean of differences `(N,)`, in points, and half the width of its 95 % confidence interval; "" of none."""
    if not len(values):
        return ""
    values = 100 * values
    if len(values) < 2:
        return f"{values.mean():+.2f}"
    half = half_width(values)
    text = f"{values.mean():+.2f} ± {half:.2f}"
    return f"**{text}**" if abs(values.mean()) > half else text


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean of `(N,)` values, N at least 2: Student's."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


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


def _by_task(line: dict[str, str]) -> np.ndarray:
    return _numbers(line["by_task"])


def _numbers(joined: str) -> np.ndarray:
    return np.array([float(value) for value in joined.split()])


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
