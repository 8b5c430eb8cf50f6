"""Writes docs/methods.md and tadrop_jax/__init__.pyi from the registry: python docs/generate_methods.py [--check]."""

import sys
from pathlib import Path

import tadrop_jax
from tadrop_jax.registry import METHODS, Method, Parameter

PAGE = Path(__file__).with_name("methods.md")
STUB = Path(tadrop_jax.__file__).with_suffix(".pyi")
HEAD = """# Methods

<!-- Written by docs/generate_methods.py from tadrop_jax/registry/. Change the registry, then run it. -->

Every sparsifier goes before every merge rule. On the command line parameters are given as `--set NAME=VALUE`, those of
a sparsifier as `--sparsify NAME:NAME=VALUE,...`; in Python they are the arguments of the function of the same name,
such as `tj.tadrop`. `tadrop methods` prints the same. What is our choice and not the source's is on the page
[Our choices](choices.md).

Sections of methods that the command line runs end with the properties that hold and are tested:

- `symmetric`: the order of the tasks does not matter.
- `scales`: task vectors times a power of two give the result times it.
- `zero`: zero task vectors give zero.
- `density`: density 0 gives zeros; with density 1 a sparsifier changes nothing, and a rule does not trim.
- `gradients`: gradients in coefficients, weights and task vectors are finite.
- `local`: at the defaults, another tensor in the tree changes nothing.
- `copies`: at the defaults, T copies of one model give what one gives.
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


def stub() -> str:
    """What type checkers read of the package: the lazy names, spelt out."""
    homes = sorted((f"tadrop_jax.{module}", name) for name, module in tadrop_jax.HOMES.items())
    lines = [f"from {module} import {name} as {name}" for module, name in homes]
    return "\n".join(["# Written by docs/generate_methods.py.", *lines, "", "__version__: str", ""])


def _section(method: Method) -> str:
    rows = [(f"`{p.name}`", f"`{_value(p, p.default)}`", _values(p), p.about) for p in method.parameters]
    table = _table(("parameter", "default", "values", "meaning"), rows) if rows else "It has no parameters.\n"
    told = f"### `{method.name}` {{ #{method.name} }}\n\n{table}"
    models = {(1, None): "", (1, 1): "Takes the base and one model.\n\n"}.get(method.models)
    if models is None:
        least, most = method.models
        models = f"Takes {'exactly' if least == most else 'at least'} {least} models.\n\n"
    random = "Draws random numbers: `--seed`, or `key=jax.random.key(seed)`.\n\n" if method.random else ""
    why = method.from_python
    data = f"{why[0].upper()}{why[1:]}: from Python only.\n\n" if why else ""
    held = f"Properties: {', '.join(sorted(method.properties))}.\n\n" if method.properties else ""
    return f"{told}\n{models}{data}{random}{held}".rstrip("\n") + "\n"


def _values(parameter: Parameter) -> str:
    named = {"numbers": "a number, or one per task", "whole": "a whole number", "flag": "`true`, `false`"}
    named |= {"number": "a number", "order": "a list of tasks", "patterns": "regular expressions", "text": "text"}
    named |= {"object": "from Python"}
    named |= {role: f"a {role}: `NAME[:NAME=VALUE;...]`" for role in ("sparsifier", "rule")}
    said = ", ".join(f"`{o}`" for o in parameter.options) or named[parameter.kind]
    within = f", {parameter.bounds()}" if parameter.bounds() else ""
    return said + within + ", `none`" * parameter.optional


def _value(parameter: Parameter, value) -> str:
    return "none" if value in (None, ()) else str(value).lower() if parameter.kind == "flag" else str(value)


def _table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    written = {PAGE: page(), STUB: stub()}
    if "--check" in sys.argv:
        old = [file.name for file, text in written.items() if file.read_text() != text]
        sys.exit(f"not up to date: {', '.join(old)}; run python docs/generate_methods.py" if old else 0)
    for file, text in written.items():
        file.write_text(text)
