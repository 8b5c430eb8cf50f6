"""Every method, as data: what ``tadrop methods``, the command line, recipes, the docs and the property tests read.

Imports no jax, so that the command line answers at once. Adding a method means adding its file, its test, and one entry
in the file of its group here.
"""

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tadrop_jax.errors import ParameterError, meant
from tadrop_jax.registry import lora, matrix_rules, per_task, rules, sparsifiers, weight_rules, with_data
from tadrop_jax.registry.schema import Method, Parameter

__all__ = ["METHODS", "Method", "Parameter", "build", "method", "parse", "parse_step"]

_GROUPS = (sparsifiers, rules, matrix_rules, weight_rules, lora, per_task, with_data)
_ALL = tuple(entry for group in _GROUPS for entry in group.ENTRIES)
# Kinds of parameters that are methods themselves.
_ROLES = ("sparsifier", "rule")

METHODS: Mapping[str, Method] = {m.name: m for m in _ALL}


def method(name: str, role: str | None = None) -> Method:
    """A method by name.

    Raises:
      ParameterError: with the names there are.
    """
    names = [m.name for m in _ALL if role in (None, m.role)]
    if name not in names:
        what = {"rule": "merge rule", "sparsifier": "sparsifier", None: "method"}[role]
        other = f" ({name} is a {METHODS[name].role})" if name in METHODS else meant(name, names)
        raise ParameterError(f"there is no {what} {name!r}{other}; there are {', '.join(names)}")
    return METHODS[name]


def build(name: str, values: Mapping[str, Any], role: str | None = None):
    """Makes the step of a method. Imports jax.

    Args:
      name: of the method.
      values: parameters by name; the others keep their defaults.
      role: ``"sparsifier"`` or ``"rule"``, if only one will do.

    Raises:
      ParameterError: for an unknown method or parameter, or a value out of range.
    """
    found = method(name, role)
    for parameter in values:
        found.parameter(parameter)
    if found.from_python:
        raise ParameterError(f"{name} {found.from_python}: call tadrop_jax.{name} from Python")
    module, _, function = found.home.partition(":")
    given = {p.name: p.default for p in found.parameters} | dict(values)
    for parameter in found.parameters:
        inner = given[parameter.name]
        if parameter.kind in _ROLES and isinstance(inner, str):
            given[parameter.name] = build(*parse_step(inner.replace(";", ","), parameter.kind), parameter.kind)
    return getattr(importlib.import_module(module), function)(**given)


def parse(found: Method, assignments: Iterable[str]) -> dict[str, Any]:
    """Values from ``NAME=VALUE`` texts, as the command line gives them.

    Raises:
      ParameterError: for an unknown parameter, one that is given twice, or a text that is no value of its kind.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ParameterError(f"{found.name}: write NAME=VALUE, got {assignment!r}")
        name = name.strip()
        if name in values:
            raise ParameterError(f"{found.name}: {name} is given twice")
        values[name] = _value(found, found.parameter(name), text.strip())
    return values


def parse_step(text: str, role: str = "sparsifier") -> tuple[str, dict[str, Any]]:
    """Name and values from ``NAME[:PARAMETER=VALUE,...]``, as ``--sparsify`` takes them.

    Commas inside brackets, or before something that is no ``NAME=``, belong to the value.

    Raises:
      ParameterError: for an unknown method or parameter.

    Example:
      >>> parse_step("tadrop:q_low=.5,q_high=.9")
      ('tadrop', {'q_low': 0.5, 'q_high': 0.9})
    """
    name, _, rest = text.partition(":")
    found = method(name.strip(), role)
    if not any(p.kind in _ROLES for p in found.parameters):
        rest = rest.replace(";", ",")  # otherwise ';' parts the parameters of the inner method
    parts: list[str] = []
    for part in rest.split(",") if rest else []:
        if "=" in part.split(":")[0] and (not parts or parts[-1].count("[") == parts[-1].count("]")):
            parts.append(part)
        elif parts:
            parts[-1] += "," + part
        else:
            raise ParameterError(f"{found.name}: write NAME=VALUE, got {part!r}")
    return found.name, parse(found, parts)


def _value(found: Method, parameter: Parameter, text: str) -> Any:
    def wrong(expected: str) -> ParameterError:
        return ParameterError(f"{found.name}: {parameter.name} must be {expected}, got {text!r}")

    if text.lower() in ("none", "null") and (parameter.optional or parameter.default is None):
        return None
    kind = parameter.kind
    if kind == "object":
        raise wrong("given from Python")
    try:
        if kind == "number":
            return float(text)
        if kind == "numbers":
            listed = text.strip("[]()")
            return [float(v) for v in listed.split(",")] if text[:1] in "[(" or "," in text else float(text)
        if kind == "whole":
            return int(text)
        if kind == "order":
            return [int(v) for v in text.strip("[]()").split(",")]
    except ValueError:
        kinds = {"number": "a number", "numbers": "a number, or a list of numbers", "whole": "a whole number"}
        raise wrong(kinds.get(kind, "a list of whole numbers")) from None
    if kind == "flag":
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise wrong("true or false")
        return text.lower() in ("true", "yes", "1")
    if kind == "choice":
        for option in parameter.options:
            if text == str(option):
                return option
        options = [str(o) for o in parameter.options] + ["none"] * parameter.optional
        raise wrong(f"one of {', '.join(options)}")
    if kind == "patterns":
        if text.startswith("["):
            try:
                return tuple(json.loads(text))
            except ValueError:
                raise wrong("a regular expression, or a JSON list of them") from None
        return (text,)
    return text
