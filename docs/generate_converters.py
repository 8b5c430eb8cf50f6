"""Writes docs/converters.md from the registry: python docs/generate_converters.py [--check]."""

import sys
from pathlib import Path

from converters.families import ARCHITECTURES

PAGE = Path(__file__).with_name("converters.md")
HEAD = """# Supported models

<!-- Written by docs/generate_converters.py from converters/families.py. Change the registry, then run it. -->

What `converters.load`, `converters.save` and `tadrop convert` read and write, in both directions. An architecture is
named as `config.json` names it; what stands before a `/` says whose tensor names the files have. Where no `config.json`
names the architecture, the names of the tensors tell it for those marked so.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for package in dict.fromkeys(entry.package for entry in ARCHITECTURES.values()):
        entries = [entry for entry in ARCHITECTURES.values() if entry.package == package]
        rows = [(f"`{e.name}`", e.layout, e.head, "yes" if e.marks else "no") for e in entries]
        title = f"## `{package}`\n\n"
        parts.append(title + _table(("architecture", "names of", "gives", "told by its tensors"), rows))
    return "\n".join(parts)


def _table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    if "--check" in sys.argv:
        stale = PAGE.read_text() != page()
        sys.exit("docs/converters.md is not up to date: python docs/generate_converters.py" if stale else 0)
    PAGE.write_text(page())
