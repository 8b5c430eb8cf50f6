"""What came out of a run, beside its table: TABLE.md with accuracies, paired differences and pictures."""

import csv
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from examples.evidence import belonging, pictures, tables
from examples.evidence.experiments import DESCRIBED

DEFAULT = "0.95/0.99"  # TADrop's quantiles
CONTROLS = ("uniform", "shuffled", "reversed", "scaling alone")
OTHERS = ("magnitude 0.5", "magnitude 0.2", "n:m 16:32", "DARE 0.5", "dominance 0.5", "uniform 0.7")


def write(table: Path) -> Path:
    """Writes the report of all merges that a table has, and draws what there is to draw.

    Args:
        table: TABLE.csv, with the files beside it that the command wrote.

    Returns:
        TABLE.md.
    """
    table = table.absolute()  # tables.py would look for others in docs/results
    known = belonging.read(table)
    judged = "bfloat16" if known["bfloat16"] else "float32"
    parts = [f"# {table.stem}", f"Fine-tuned by the recipe {known['recipe']}, judged in {judged}."]
    for count, lines in sorted(tables.by_count(tables.read(str(table))).items(), key=lambda found: int(found[0])):
        parts += _merges(table, count, lines, known["tasks"].get(count, []))
    ratios = belonging.beside(table, "ratios.csv")
    if ratios.exists():
        for quantiles in (f"{low}/{high}" for low, high in DESCRIBED):
            parts += [f"## Quantile ratios, {quantiles}", tables.ratios(str(ratios), quantiles)]
        parts += [f"![{picture.stem}]({picture.name})" for picture in pictures.drawn(ratios, DEFAULT)]
    out = table.with_suffix(".md")
    out.write_text("\n\n".join(parts) + "\n")
    return out


def _merges(table: Path, count: str, lines: tables.Lines, names: list[str]) -> list[str]:
    """The part on the merges of one number of tasks; the names are unknown in a table that an older version began."""
    file, arms = str(table), list(dict.fromkeys(line["sparsifier"] for line in lines))
    parts = [f"## {count} tasks", *([f"In this order: {', '.join(names)}."] if names else [])]
    with tempfile.TemporaryDirectory() as directory:
        probes = Path(directory) / "models.csv"
        tuned = _of_merge(tables.read(str(belonging.beside(table, "models.csv"))), names, lines)
        if tuned:
            _save(probes, tuned)
            parts += ["### Fine-tunes against a linear probe of the base", tables.models(str(probes))]
        parts += ["### Test accuracy", tables.accuracies(file, count)]
        for arm in sorted((arm for arm in arms if re.fullmatch(r"TADrop [\d.]+/[\d.]+", arm)), key=_default_first):
            others = [other for other in compared(arm) if other in arms]
            if others or tuned:
                parts.append(f"### {arm} against others: points, with 95 % intervals over seeds and tasks")
                parts.append(tables.differences(file, count, arm, *others, *([str(probes)] if tuned else [])))
    found = belonging.beside(table, "restored.csv")
    if found.exists() and any(line["tasks"] == count for line in tables.read(str(found))):
        parts += ["### How near EMR comes to the task vectors", tables.restored(str(found), count, file)]
    return parts


def compared(arm: str) -> list[str]:
    """What an arm of TADrop is compared with: no pruning, the controls of its budget, the library's other ways."""
    quantiles = arm.removeprefix("TADrop ")
    controls = [name if quantiles == "0.75/0.95" else f"{name} of {quantiles}" for name in CONTROLS]
    return ["none", *controls, *OTHERS]


def _default_first(arm: str) -> tuple[bool, str]:
    return not arm.endswith(DEFAULT), arm


def _of_merge(models: tables.Lines, names: list[str], lines: tables.Lines) -> tables.Lines:
    """The fine-tunes of a merge, in its order: of each of its seeds that has them all."""
    found = {(line["seed"], line["task"]): line for line in models}
    seeds = dict.fromkeys(line["seed"] for line in lines)
    whole = (seed for seed in seeds if all((seed, name) in found for name in names))
    return [found[seed, name] for seed in whole for name in names]


def _save(path: Path, lines: Iterable[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("seed", "task", "probe", "tuned"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
