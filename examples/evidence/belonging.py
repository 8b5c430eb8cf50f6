"""Which tasks the lines of a table are of, and the fine-tunes that belong to it.

A line of TABLE.csv says how many tasks were merged, not which, and not how the models were trained and judged. Beside
it TABLE-tasks.json does, so that one table never has lines of two kinds.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.evidence import experiments
from examples.evidence.suites import place


def beside(table: Path, what: str) -> Path:
    """Where what belongs to a table lies: TABLE-WHAT."""
    return table.with_name(f"{table.stem}-{what}")


def read(table: Path) -> dict[str, Any]:
    """What is known of a table: its `recipe`, whether `bfloat16` judged it, its `tasks` by their number; {} if new."""
    path = beside(table, "tasks.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _lasting(table: Path) -> dict[str, Any]:
    """The same, unless the table was taken away to be made anew."""
    return read(table) if table.exists() else {}


def conflict(table: Path, recipe: str, names: Sequence[str], *, bfloat16: bool) -> str | None:
    """Says in which way the lines of a table are not of what is asked for; None if they are, or it has none."""
    there, file = _lasting(table), table.name
    if not there:
        return None
    if there["recipe"] != recipe:
        return f"--recipe: {file} is of models tuned by {there['recipe']}, not {recipe}; give another --table"
    if there["bfloat16"] != bfloat16:
        kinds = [{True: "bfloat16", False: "float32"}[kind] for kind in (there["bfloat16"], bfloat16)]
        return f"--bfloat16: {file} was judged in {kinds[0]}, not {kinds[1]}; give another --table"
    before = there["tasks"].get(str(len(names)), list(names))
    if before != list(names):
        of, asked = ", ".join(before), ", ".join(names)
        return f"--tasks: {file} has merges of {of}, not of {asked}; give another --table"
    return None


def record(table: Path, recipe: str, names: Sequence[str], *, bfloat16: bool) -> None:
    """Writes down what the lines are of that are about to come."""
    tasks = _lasting(table).get("tasks", {}) | {str(len(names)): list(names)}
    said = {"recipe": recipe, "bfloat16": bfloat16, "tasks": tasks}
    beside(table, "tasks.json").write_text(json.dumps(said, indent=1) + "\n")


def write_models(table: Path, recipe: str, names: Sequence[str], seed: int) -> None:
    """Collects what was measured of each fine-tune in a table: its accuracy and that of a linear probe of the base.

    Args:
        table: TABLE-models.csv is written beside it.
        recipe: of the fine-tunes.
        names: the tasks of the merge, which come first and in this order; those of the table's other merges follow.
        seed: of the merge, whose lines may not be there yet.
    """
    tasks = read(table)["tasks"]
    merged = {(int(line["seed"]), line["tasks"]) for line in experiments.read(table)} | {(seed, str(len(names)))}
    with beside(table, "models.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "task", "probe", "tuned"))
        for number in sorted({number for number, _ in merged}):
            here = {name for count in tasks if (number, count) in merged for name in tasks[count]}
            every = dict.fromkeys((*names, *(name for of in tasks.values() for name in of)))
            for name in every:
                # Of another seed not all may have been measured here, if the table was brought from elsewhere.
                found = place(table.parent, recipe, number, name).with_suffix(".json")
                if name in here and found.exists():
                    said = json.loads(found.read_text())
                    writer.writerow((number, name, f"{said['probe']:.4f}", f"{said['tuned']:.4f}"))
