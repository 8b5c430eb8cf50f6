"""Puts the tables of benchmarks/results into the pages that show them: python docs/generate_benchmarks.py [--check].

A page says where with a pair of comments, `<!-- table: NAME -->` and `<!-- end -->`, or with `<!-- table: NAME a,b -->`
for some columns. To measure anew: `python -m benchmarks --out benchmarks/results`.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cost, measure  # noqa: E402

RESULTS = HERE.parent / "benchmarks" / "results"
PAGES = ("benchmarks", "cost")
# Tables that set what was measured beside what is expected: the result, and what makes columns and rows of it.
AGAINST = {
    "streamed_against_paper": ("merge_gpt2", cost.streamed_against_paper),
    "memory_against_paper": ("in_memory", cost.memory_against_paper),
}
_PLACE = re.compile(r"(<!-- table: (\w+)(?: ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables, as the results say now."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{table(found[2], found[3])}\n\n{found[4]}", text)


def table(name: str, chosen: str | None) -> str:
    """One table, and under it what was measured where."""
    name, against = AGAINST.get(name, (name, None))
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return f"*Not measured yet: `python -m benchmarks {name} --out benchmarks/results`.*"
    kept = json.loads(file.read_text())
    if against is not None:
        kept["columns"], kept["rows"] = against(kept)
    wanted = chosen.split(",") if chosen else list(kept["columns"])
    columns = {key: tuple(kept["columns"][key]) for key in wanted}
    facts = kept["machine"]
    said = [f"{key} {_plain(value)}" for key, value in kept["setting"].items()]
    if name != "cost":  # nothing was measured
        where = f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before"
        versions = [f"{package} {v}" for package, v in facts["versions"].items() if v]
        said += [where, f"Python {facts['python']}", *versions]
    return f"{measure.table(columns, kept['rows'], markdown=True)}\n\n*{'; '.join(said)}.*"


def _plain(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for page in (HERE / f"{name}.md" for name in PAGES):
        now = page.read_text()
        if "--check" in sys.argv and now != filled(now):
            sys.exit(f"{page} is not up to date: python docs/generate_benchmarks.py")
        page.write_text(filled(now))
