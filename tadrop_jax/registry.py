"""Every method, as data: what ``tadrop methods``, the command line, recipes, the docs and the property tests read.

Imports no jax, so that the command line answers at once. Adding a method means adding its file, its test, and one entry
here.
"""

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tadrop_jax.errors import ParameterError


class Parameter(NamedTuple):
    """A parameter of a method.

    Attributes:
      name: as in Python and in ``--set NAME=VALUE``.
      kind: ``"number"``, ``"numbers"`` (one, or one per task), ``"whole"``, ``"flag"``, ``"choice"``, ``"patterns"``,
        ``"order"`` (a list of task indices) or ``"text"``.
      default: what it is if nothing is said.
      about: one line for the user.
      options: of a choice.
      optional: whether None is a value.
    """

    name: str
    kind: str
    default: Any
    about: str
    options: tuple[Any, ...] = ()
    optional: bool = False


class Method(NamedTuple):
    """A sparsifier or a merge rule.

    Attributes:
      name: its name everywhere.
      role: ``"sparsifier"`` or ``"rule"``.
      home: module and function.
      about: one line for the user.
      source: where it comes from.
      granularity: ``"entry"``, ``"group"``, ``"tensor"``, ``"global"``, or several.
      output: ``"task vectors"``, ``"one model"`` or ``"one model per task"``.
      parameters: in the order of the function.
      random: whether it draws random numbers.
      properties: what the property tests hold it to, at the defaults and at each option of its choices.
        ``"symmetric"``: the order of the tasks does not matter. ``"scales"``: task vectors times a power of two give
        the result times it. ``"zero"``: zero task vectors give zero. ``"density"``: density 0 gives zeros, density 1
        is the identity (of a rule: the rule without its trim). ``"gradients"``: gradients in coefficients, weights and
        task vectors are finite. At the defaults only: ``"local"``: another tensor in the tree changes nothing.
        ``"copies"``: T copies of one model give what one gives.
    """

    name: str
    role: str
    home: str
    about: str
    source: str
    granularity: str
    output: str
    parameters: tuple[Parameter, ...]
    random: bool = False
    properties: frozenset[str] = frozenset()

    def parameter(self, name: str) -> Parameter:
        """One parameter.

        Raises:
          ParameterError: naming the method and what parameters it has.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = ", ".join(p.name for p in self.parameters) or "none"
        raise ParameterError(f"{self.name} has no parameter {name!r}; it has {known}")


_P = Parameter
_KEEP = ("at_least_one", "floor", "floor_plus_one", "exact", "exact_at_least_one")
_NORM = _P("norm", "choice", 2, "norm to restore after pruning: 2, 1 or none", (1, 2), optional=True)
_WEIGHTS = _P("weights", "numbers", 1.0, "weight of each task")
_SMOOTH = frozenset({"symmetric", "scales", "zero", "gradients"})

_ALL = (
    Method(
        "tadrop",
        "sparsifier",
        "tadrop_jax.sparsifiers.tadrop:tadrop",
        "gives each tensor its own sparsity, read off its quantile ratio, and restores its norm",
        "arXiv 2508.06163; quantiles, mapping and norm are ours",
        "tensor",
        "task vectors",
        (
            _P("q_low", "number", 0.75, "lower quantile"),
            _P("q_high", "number", 0.95, "upper quantile"),
            _NORM,
            _P("mapping", "text", "identity", "ratio to sparsity: identity, affine:SLOPE,OFFSET or power:EXPONENT"),
            _P("s_min", "number", 0.0, "least sparsity"),
            _P("s_max", "number", 0.9, "largest sparsity"),
        ),
        properties=_SMOOTH | {"local"},
    ),
    Method(
        "uniform",
        "sparsifier",
        "tadrop_jax.sparsifiers.uniform:uniform",
        "prunes every tensor to one sparsity and restores its norm: TADrop's control",
        "ours, as a control",
        "tensor",
        "task vectors",
        (_P("sparsity", "numbers", 0.5, "share to prune"), _NORM),
        properties=_SMOOTH | {"local"},
    ),
    Method(
        "magnitude",
        "sparsifier",
        "tadrop_jax.sparsifiers.magnitude:magnitude",
        "keeps the largest magnitudes",
        "arXiv 2306.01708 (the trim of TIES)",
        "tensor or global",
        "task vectors",
        (
            _P("density", "numbers", 0.2, "share to keep"),
            _P("granularity", "choice", "tensor", "one threshold a tensor, or one for all", ("tensor", "global")),
            _P("keep", "choice", "at_least_one", "how the number to keep is rounded", _KEEP),
        ),
        properties=_SMOOTH | {"local", "density"},
    ),
    Method(
        "dare",
        "sparsifier",
        "tadrop_jax.sparsifiers.dare:dare",
        "drops entries at random and rescales the rest",
        "arXiv 2311.03099",
        "entry",
        "task vectors",
        (
            _P("density", "numbers", 0.5, "probability to keep an entry"),
            _P(
                "rescale",
                "choice",
                "inverse",
                "by 1/density, to the L1 norm, or none",
                ("inverse", "l1"),
                optional=True,
            ),
        ),
        random=True,
        properties=frozenset({"scales", "zero", "local", "density", "gradients"}),
    ),
    Method(
        "n_m",
        "sparsifier",
        "tadrop_jax.sparsifiers.n_m:n_m",
        "keeps n of every m consecutive weights",
        "arXiv 2503.01874 (balanced sparsification)",
        "group",
        "task vectors",
        (
            _P("n", "whole", 3, "kept in each group"),
            _P("m", "whole", 32, "length of a group"),
            _P("tail", "choice", "ceil", "what to do with a shorter last group", ("ceil", "drop")),
        ),
        properties=_SMOOTH | {"local"},
    ),
    Method(
        "conflict_aware",
        "sparsifier",
        "tadrop_jax.registry:_conflict_aware",
        "sparsifies one task after another on the entries that are still free: disjoint masks",
        "arXiv 2503.01874",
        "that of the inner sparsifier",
        "task vectors",
        (
            _P("sparsifier", "text", "magnitude", "the inner sparsifier, NAME or NAME:PARAMETER=VALUE;..."),
            _P("order", "order", None, "order of the tasks, e.g. [1,0,2]", optional=True),
        ),
        properties=frozenset({"local", "scales", "zero", "gradients"}),
    ),
    Method(
        "average",
        "rule",
        "tadrop_jax.rules.average:average",
        "the mean of the models",
        "arXiv 2203.05482",
        "entry",
        "one model",
        (_WEIGHTS,),
        properties=_SMOOTH | {"local", "copies"},
    ),
    Method(
        "task_arithmetic",
        "rule",
        "tadrop_jax.rules.task_arithmetic:task_arithmetic",
        "the base plus the scaled sum of the task vectors",
        "arXiv 2212.04089",
        "entry",
        "one model",
        (
            _P("coefficient", "numbers", 0.3, "multiplies the sum; one number, or one per task"),
            _WEIGHTS,
            _P("normalize", "flag", False, "divide by the sum of the weights"),
        ),
        properties=_SMOOTH | {"local"},
    ),
    Method(
        "ties",
        "rule",
        "tadrop_jax.rules.ties:ties",
        "trims, elects a sign for each entry, and averages what agrees with it",
        "arXiv 2306.01708; flavours: ties-merging, mergekit, PEFT",
        "global or tensor",
        "one model",
        (
            _P("density", "numbers", 0.2, "share that the trim keeps; none switches the trim off", optional=True),
            _P("coefficient", "number", 1.0, "multiplies the merged vector"),
            _WEIGHTS,
            _P("flavour", "choice", None, "preset", ("authors", "mergekit", "peft"), optional=True),
            _P("granularity", "choice", None, "of the trim", ("tensor", "global"), optional=True),
            _P("combine", "choice", None, "what becomes of agreeing entries", ("mean", "sum", "max"), optional=True),
            _P("elect", "choice", None, "what is summed", ("unweighted", "weighted", "frequency"), optional=True),
            _P("zero_sign", "choice", None, "sign of an undecided entry", ("majority", "positive"), optional=True),
            _P("divisor", "choice", None, "of the mean", ("count", "weights"), optional=True),
            _P("keep", "choice", None, "how the number to keep is rounded", _KEEP, optional=True),
        ),
        properties=_SMOOTH | {"copies", "density"},
    ),
    Method(
        "cabs",
        "rule",
        "tadrop_jax.rules.cabs:cabs",
        "disjoint n:m masks, one task after another, then the scaled sum",
        "arXiv 2503.01874",
        "group",
        "one model",
        (
            _P("n", "whole", 3, "kept in each group"),
            _P("m", "whole", 32, "length of a group"),
            _P("coefficient", "numbers", 1.0, "multiplies the sum; one number, or one per task"),
            _P("order", "order", None, "order of the tasks, e.g. [1,0,2]", optional=True),
            _P("tail", "choice", "ceil", "what to do with a shorter last group", ("ceil", "drop")),
        ),
        properties=frozenset({"local", "scales", "zero", "gradients"}),
    ),
    Method(
        "emr",
        "rule",
        "tadrop_jax.rules.emr:emr",
        "one unified vector, and for each task a mask of one bit an entry and one number",
        "arXiv 2405.17461",
        "global",
        "one model per task",
        (
            _P("rescaler", "choice", "tensor_mean", "the authors' code, or the paper", ("tensor_mean", "global")),
            _P("per_task", "patterns", (), "regular expression(s) of tensors that stay each task's own"),
        ),
        properties=_SMOOTH | {"copies"},
    ),
)

METHODS: Mapping[str, Method] = {m.name: m for m in _ALL}


def method(name: str, role: str | None = None) -> Method:
    """A method by name.

    Raises:
      ParameterError: with the names there are.
    """
    names = [m.name for m in _ALL if role in (None, m.role)]
    if name not in names:
        what = {"rule": "merge rule", "sparsifier": "sparsifier", None: "method"}[role]
        other = f" ({name} is a {METHODS[name].role})" if name in METHODS else ""
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
    module, _, function = found.home.partition(":")
    defaults = {p.name: p.default for p in found.parameters}
    return getattr(importlib.import_module(module), function)(**defaults | dict(values))


def parse(found: Method, assignments: Iterable[str]) -> dict[str, Any]:
    """Values from ``NAME=VALUE`` texts, as the command line gives them.

    Raises:
      ParameterError: for an unknown parameter, or a text that is no value of its kind.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ParameterError(f"{found.name}: write NAME=VALUE, got {assignment!r}")
        values[name.strip()] = _value(found, found.parameter(name.strip()), text.strip())
    return values


def parse_step(text: str) -> tuple[str, dict[str, Any]]:
    """Name and values from ``NAME[:PARAMETER=VALUE,...]``, as ``--sparsify`` takes them.

    Commas inside brackets, or before something that is no ``NAME=``, belong to the value.

    Raises:
      ParameterError: for an unknown sparsifier or parameter.

    Example:
      >>> parse_step("tadrop:q_low=.5,q_high=.9")
      ('tadrop', {'q_low': 0.5, 'q_high': 0.9})
    """
    name, _, rest = text.partition(":")
    found = method(name.strip(), "sparsifier")
    if not any(p.name == "sparsifier" for p in found.parameters):
        rest = rest.replace(";", ",")  # otherwise ';' parts the parameters of the inner sparsifier
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


def _conflict_aware(sparsifier="magnitude", order=None):
    """conflict_aware with the inner sparsifier named, for command line and recipes."""
    from tadrop_jax.sparsifiers.conflict_aware import conflict_aware

    name, values = parse_step(sparsifier.replace(";", ","))
    return conflict_aware(build(name, values, "sparsifier"), order)
