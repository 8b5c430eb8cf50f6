"""The full, serialisable description of a merge: what a recipe file holds, and what the report repeats."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tadrop_jax import mergekit_recipe, registry
from tadrop_jax.errors import MergeError, ParameterError

_FIELDS = {
    "base": "checkpoint of the base",
    "models": "list of checkpoints",
    "method": "name of a merge rule",
    "parameters": "mapping of the rule's parameters",
    "sparsify": "NAME, NAME:PARAMETER=VALUE,... or {name:, parameters:}",
    "include": "regular expression, or a list",
    "exclude": "regular expression, or a list",
    "differing": "refuse, own or overlap: what becomes of tensors that are not alike in all models",
    "seed": "whole number",
    "dtype": "float32, bfloat16 or float16",
}
_NEEDED = ("base", "models", "method")
_NUMBERS = ("number", "numbers", "whole", "flag", "order")


def load(path: Path, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Reads a recipe from YAML, ours or mergekit's. Relative paths count from the recipe's folder.

    Args:
      path: of the file.
      tell: called with a line for all that a recipe of mergekit's says and that is left out, and as by :func:`normal`.

    Raises:
      MergeError: naming the file, and what is wrong.

    Example:
      A recipe::

        base: base
        models: [parity, prime]
        method: ties
        parameters: {density: null}
        sparsify: tadrop:q_low=.5,q_high=.9
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise MergeError(f"{path}: a recipe is a mapping with {', '.join(_NEEDED)}")
    if "merge_method" in data:
        try:
            return normal(mergekit_recipe.read(data, Path(path).parent, tell))
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from None
    unknown = [k for k in data if k not in _FIELDS]
    missing = [k for k in _NEEDED if k not in data]
    if unknown or missing:
        said = [f"unknown: {', '.join(map(str, unknown))}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(
            missing
        )
        raise MergeError(f"{path}: {'; '.join(said)}. A recipe has {', '.join(_FIELDS)}")
    if not isinstance(data["models"], list) or not data["models"]:
        raise MergeError(f"{path}: models must be a list of checkpoints")
    for given in (data["base"], *data["models"]):
        if given is None or isinstance(given, (list, dict)):  # a field left empty, or written as for mergekit
            raise MergeError(f"{path}: base and models are paths of checkpoints, got {given!r}")
    folder = Path(path).parent
    data["base"] = str(folder / str(data["base"]))
    data["models"] = [str(folder / str(m)) for m in data["models"]]
    try:
        return normal(data, tell)
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from None


def normal(data: Mapping[str, Any], tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A recipe with every field and every parameter written out.

    A sparsifier without a density of the rule's own switches the rule's trimming off.

    Args:
      data: the recipe's fields.
      tell: called with a line if trimming was switched off.

    Raises:
      ParameterError: for unknown methods or parameters, or a field that is not what it should be.
    """
    rule = registry.method(str(data["method"]), "rule")
    parameters = _values(rule, _mapping("parameters", data.get("parameters")))
    sparsify = data.get("sparsify")
    sparsifier = None
    if sparsify is not None:
        if isinstance(sparsify, Mapping):
            if sparsify.keys() - {"name", "parameters"} or "name" not in sparsify:
                form = "sparsify is {name: ..., parameters: {...}} or a text as for --sparsify"
                raise ParameterError(f"{form}, got {dict(sparsify)!r}")
            name, values = str(sparsify["name"]), _mapping("parameters of sparsify", sparsify.get("parameters"))
        else:
            name, values = registry.parse_step(str(sparsify))
        found = registry.method(name, "sparsifier")
        values = _values(found, values)
        sparsifier = {"name": name, "parameters": {p.name: p.default for p in found.parameters} | values}
        if any(p.name == "density" and p.optional for p in rule.parameters) and "density" not in parameters:
            parameters["density"] = None
            tell(f"{rule.name}: its own trimming is off, since a sparsifier is given without a density")
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed must be a whole number, got {seed!r}")
    differing = data.get("differing", "refuse")
    if differing not in ("refuse", "own", "overlap"):
        raise ParameterError(f"differing must be refuse, own or overlap, got {differing!r}")
    dtype = data.get("dtype")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ParameterError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return {
        "base": str(data["base"]),
        "models": [str(m) for m in data["models"]],
        "method": rule.name,
        "parameters": {p.name: p.default for p in rule.parameters} | parameters,
        "sparsify": sparsifier,
        "include": _regexes("include", data.get("include")),
        "exclude": _regexes("exclude", data.get("exclude")),
        "differing": differing,
        "seed": seed,
        "dtype": dtype,
    }


def chain_of(recipe: Mapping[str, Any]):
    """The chain of steps of a normal recipe. Imports jax."""
    from tadrop_jax.merging import with_sparsifier

    sparsifier = recipe["sparsify"]
    step = None if sparsifier is None else registry.build(sparsifier["name"], sparsifier["parameters"], "sparsifier")
    return with_sparsifier(step, registry.build(recipe["method"], recipe["parameters"], "rule"))


def _values(method: registry.Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a method's parameters; numbers that YAML takes for texts, as 1e-5 and none, are read as by --set."""
    found = {}
    for name, value in given.items():
        as_text = method.parameter(name).kind in _NUMBERS and isinstance(value, str)
        found |= registry.parse(method, [f"{name}={value}"]) if as_text else {name: value}
    return found


def _mapping(field: str, value) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ParameterError(f"{field} must be a mapping of names to values, got {value!r}")
    return dict(value or {})


def _regexes(field: str, value) -> list[str]:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(v, str) for v in listed):
        raise ParameterError(f"{field} must be a regular expression, or a list of them, got {value!r}")
    for pattern in listed:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ParameterError(f"{field}: {pattern!r} is not a regular expression: {error}") from None
    return list(listed)
