"""Writes docs/methods.md from the registry: python docs/generate_methods.py [--check]."""

import sys
from pathlib import Path

from tadrop_jax.registry import METHODS, Method, Parameter

PAGE = Path(__file__).with_name("methods.md")
HEAD = """# Methods

<!-- Written by docs/generate_methods.py from tadrop_jax/registry.py. Change the registry, then run it. -->

Every sparsifier goes before every merge rule. On the command line parameters are given as `--set NAME=VALUE`, those of
a sparsifier as `--sparsify NAME:NAME=VALUE,...`; in Python they are the arguments of the function of the same name,
such as `tj.tadrop`. `tadrop methods` prints the same. What is our choice and not the source's is on the page
[Our choices](choices.md).
"""
ROLES = {"sparsifier": "Sparsifiers", "rule": "Merge rules"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for role, title in ROLES.items():
        methods = [m for m in METHODS.values() if m.role == role]
        rows = [(f"[`{m.name}`](#{m.name})", m.about, m.granularity, m.output, m.source) for m in methods]
        parts.append(f"## {title}\n\n" + _table(("name", "what it does", "granularity", "result", "source"), rows))
        parts += [_section(m) for m in methods]
    return "\n".join(parts)


def _section(method: Method) -> str:
    rows = [(f"`{p.name}`", f"`{_value(p, p.default)}`", _values(p), p.about) for p in method.parameters]
    told = f"### `{method.name}` {{ #{method.name} }}\n\n" + _table(("parameter", "default", "values", "meaning"), rows)
    random = "Draws random numbers: `--seed`, or `key=jax.random.key(seed)`.\n\n" if method.random else ""
    return f"{told}\n{random}Properties that hold and are tested: {', '.join(sorted(method.properties))}.\n"


def _values(parameter: Parameter) -> str:
    named = {"numbers": "a number, or one per task", "whole": "a whole number", "flag": "`true`, `false`"}
    named |= {"number": "a number", "order": "a list of tasks", "patterns": "regular expressions", "text": "text"}
    said = ", ".join(f"`{o}`" for o in parameter.options) or named[parameter.kind]
    return said + ", `none`" * parameter.optional


def _value(parameter: Parameter, value) -> str:
    return "none" if value in (None, ()) else str(value).lower() if parameter.kind == "flag" else str(value)


def _table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.read_text() == page() else "docs/methods.md is not up to date: python docs/generate_methods.py"
        )
    PAGE.write_text(page())
