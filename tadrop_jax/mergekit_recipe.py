"""mergekit's YAML recipes, read as ours. Imports neither mergekit nor jax.

What a recipe asks for and no rule here does is refused by name; what has no effect on the weights is left out, with a
note.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tadrop_jax.errors import MergeError

_FIELDS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_NO_EFFECT = {"int8_mask", "eps"}
_TRUTH = {"true": True, "false": False, "yes": True, "no": False}
_NEEDED = object()


class _Asked(NamedTuple):
    """A parameter of a method of mergekit's.

    Attributes:
      default: mergekit's; ``_NEEDED`` if a recipe has to give it.
      ours: the name of ours.
      each: whether models may give it, one value each.
    """

    default: Any
    ours: str
    each: bool = False


class _Reading(NamedTuple):
    """How a method of mergekit's is read.

    Attributes:
      rule: ours.
      asked: its parameters, by mergekit's names.
      settle: turns their values, by our names, into parameters of the rule.
      base: ``"needed"``, ``"optional"``, or ``"a model"`` where mergekit takes it for one more model.
    """

    rule: str
    asked: Mapping[str, _Asked]
    settle: Callable[[dict[str, Any]], dict[str, Any]] = dict
    base: str = "needed"


def _arithmetic(normalize: bool, **more: _Asked) -> dict[str, _Asked]:
    """The parameters of mergekit's family of task arithmetic."""
    return {
        "weight": _Asked(_NEEDED, "weights", each=True),
        "lambda": _Asked(1.0, "coefficient"),
        "normalize": _Asked(normalize, "normalize"),
        **more,
    }


def _sparse(normalize: bool, rescale: bool, **more: _Asked) -> dict[str, _Asked]:
    density = _Asked(1.0, "density", each=True)
    return _arithmetic(normalize, density=density, rescale=_Asked(rescale, "rescale"), **more)


def _by_l1(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"rescale": "l1" if values["rescale"] else None}


def _della(values: dict[str, Any]) -> dict[str, Any]:
    """A density of 1, the default, is none: the epsilon has no part in it."""
    values, whole = _by_l1(values), [density >= 1 for density in values["density"]]
    if any(whole) and not all(whole):
        raise MergeError("density of della is 1, its default, for some models and less for others, which is not read")
    return values | ({"density": None} if any(whole) else {})


def _ties(values: dict[str, Any]) -> dict[str, Any]:
    if values.pop("rescale"):
        raise MergeError("rescale: true of ties is not read: use dare_ties or della, or our own recipe with sparsify")
    return values | {"flavour": "mergekit", "combine": "mean" if values.pop("normalize") else "sum"}


def _linear(values: dict[str, Any]) -> dict[str, Any]:
    total = math.fsum(values["weights"])
    if not values.pop("normalize") and not math.isclose(total, 1, rel_tol=1e-6):
        raise MergeError(f"normalize: false of linear adds whole models up: the weights must sum to 1, not {total:g}")
    return values


def _nuslerp(values: dict[str, Any]) -> dict[str, Any]:
    along = "tensor" if values.pop("flatten") else "column" if values.pop("row_wise") else "row"
    values.pop("row_wise", None)
    return values | {"granularity": along}


_WEIGHT = _Asked(_NEEDED, "weights", each=True)
_GAMMA = _Asked(0.01, "gamma", each=True)
_EPSILON = _Asked(0.15, "epsilon", each=True)
_THRESHOLD = _Asked(1e-5, "threshold")

_METHODS = {
    "linear": _Reading("average", {"weight": _WEIGHT, "normalize": _Asked(True, "normalize")}, _linear, "a model"),
    "task_arithmetic": _Reading("task_arithmetic", _arithmetic(False)),
    "ties": _Reading("ties", _sparse(True, False), _ties),
    "dare_linear": _Reading("dare_linear", _sparse(False, True), _by_l1),
    "dare_ties": _Reading("dare_ties", _sparse(False, True), _by_l1),
    "breadcrumbs": _Reading(
        "breadcrumbs_merging", _sparse(False, False, gamma=_GAMMA), lambda values: values | {"flavour": "mergekit"}
    ),
    "breadcrumbs_ties": _Reading("breadcrumbs_ties", _sparse(False, False, gamma=_GAMMA)),
    "della": _Reading(
        "della_merging",
        _sparse(True, True, epsilon=_EPSILON),
        lambda values: _della(values) | {"flavour": "mergekit"},
    ),
    "della_linear": _Reading("della_linear", _sparse(False, True, epsilon=_EPSILON), _della),
    "sce": _Reading("sce", {"select_topk": _Asked(1.0, "density")}),
    "ram": _Reading("ram", {"epsilon": _THRESHOLD}),
    "ramplus_tl": _Reading(
        "ram_plus",
        {"r": _Asked(0.1, "r"), "alpha": _Asked(0.2, "alpha"), "epsilon": _THRESHOLD},
        lambda values: values | {"flavour": "mergekit"},
    ),
    "slerp": _Reading("slerp", {"t": _Asked(_NEEDED, "t")}),
    "nuslerp": _Reading(
        "nuslerp",
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": _Asked(True, "flatten"),
            "nuslerp_row_wise": _Asked(False, "row_wise"),
        },
        _nuslerp,
        "optional",
    ),
    "multislerp": _Reading(
        "multislerp", {"weight": _WEIGHT, "normalize_weights": _Asked(True, "normalize")}, base="optional"
    ),
    "karcher": _Reading("karcher", {"max_iter": _Asked(10, "max_iter"), "tol": _Asked(1e-5, "tol")}, base="a model"),
    "nearswap": _Reading("nearswap", {"t": _Asked(_NEEDED, "t")}),
    "arcee_fusion": _Reading("arcee_fusion", {}),
    "model_stock": _Reading("model_stock", {"filter_wise": _Asked(False, "filter_wise")}),
}


def read(data: Mapping[str, Any], folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """A recipe of ours that does what mergekit's does.

    Statistics are worked out in float32 whatever ``dtype`` says, and cast once. Random masks are ours: another draw of
    the same distribution.

    Args:
      data: what the YAML file holds.
      folder: that relative paths count from; those that do not exist there count from the working directory.
      tell: called with a line for all that is read otherwise than a user may expect.

    Returns:
      The fields of a recipe, see :mod:`tadrop_jax.recipe`.

    Raises:
      MergeError: for what is not read, or not understood.

    Example:
      >>> recipe = {"merge_method": "ties", "base_model": "/b", "models": [{"model": "/b"}, {"model": "/m"}],
      ...           "parameters": {"weight": 1, "density": 0.5}}
      >>> read(recipe, Path("/"), print)["models"]
      ['/m']
    """
    name = data["merge_method"]
    if not isinstance(name, str) or name not in _METHODS:
        raise MergeError(f"merge_method {name!r} is not read; of mergekit's there are {', '.join(_METHODS)}")
    reading = _METHODS[name]
    for field in sorted(data.keys() - set(_FIELDS)):
        _leave_out(field, data[field], tell)
    base = None if data.get("base_model") is None else _path(data["base_model"], folder)
    given, scopes = _inputs(data, base, folder)
    _tell_unused(name, reading, list(given.values()), scopes, tell)
    if base is None and reading.base == "needed":
        raise MergeError(f"{name} needs a base_model")
    if reading.base == "a model":
        given = given if base is None or base in given else {**given, base: {}}
    else:
        given = {path: own for path, own in given.items() if path != base}
    if not given:
        raise MergeError("there is no model to merge besides base_model")
    values = {
        asked.ours: [_value(parameter, asked, [own, *scopes], model) for model, own in given.items()]
        if asked.each
        else _value(parameter, asked, scopes, "parameters")
        for parameter, asked in reading.asked.items()
    }
    parameters = reading.settle(values)
    if reading.base == "optional" and base is None:
        parameters["space"] = "weights"
    models = list(given)
    if base is None:
        tell(f"there is no base_model: {models[0]} stands in for it, and lends no more than its other files")
    dtype = data.get("out_dtype") or data.get("dtype")
    return {
        "base": base or models[0],
        "models": models,
        "method": reading.rule,
        "parameters": parameters,
        "dtype": dtype,
    }


def _leave_out(field: str, value: Any, tell) -> None:
    """Leaves out what does not change the weights, and refuses the rest."""
    source = value.get("source") if field == "tokenizer" and isinstance(value, Mapping) else value
    alone = not isinstance(value, Mapping) or set(value) <= {"source"}
    if field in ("tokenizer", "tokenizer_source") and source == "base" and alone:
        return  # the base's files go with the result anyhow
    if field == "chat_template":
        tell("chat_template is left out: the result has the base's")
        return
    why = {
        "tokenizer": "only the base's vocabulary is kept",
        "tokenizer_source": "only the base's vocabulary is kept",
        "modules": "write models",
    }.get(field, f"there are {', '.join(_FIELDS)}")
    raise MergeError(f"{field} is not read: {why}")


def _inputs(data: Mapping[str, Any], base: str | None, folder: Path) -> tuple[dict[str, dict], list[dict]]:
    """The models with their own parameters, and the parameters of all, those that come first first."""
    scopes = [_parameters(data)]
    data = {field: value for field, value in data.items() if value is not None}
    if ("models" in data) == ("slices" in data):
        raise MergeError("a recipe has models, or slices")
    rows = data.get("models")
    if rows is None:
        slices = data["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
            raise MergeError("slices that put a model together from several are not read: write models")
        scopes.insert(0, _parameters(slices[0]))
        rows = slices[0].get("sources")
    if not isinstance(rows, list) or not rows or not all(isinstance(r, Mapping) and "model" in r for r in rows):
        raise MergeError("models must be a list of {model: PATH, parameters: {...}}")
    given: dict[str, dict] = {}
    for row in rows:
        path = _path(row["model"], folder)
        if path in given:
            raise MergeError(f"{path} is listed twice")
        if "slices" in data:
            _check_all_layers(path, row.get("layer_range"))
        given[path] = _parameters(row)
    return given, scopes


def _parameters(where: Mapping[str, Any]) -> dict[str, Any]:
    found = where.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise MergeError(f"parameters must be a mapping of names to values, got {found!r}")
    return {str(name): value for name, value in found.items()}


def _check_all_layers(path: str, layers: Any) -> None:
    """Refuses a slice that is not the whole model."""
    config = Path(path) / "config.json"
    try:
        described = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise MergeError(f"{config}: is not valid JSON: {error}") from None
    described = described if isinstance(described, Mapping) else {}
    depth = described.get("num_hidden_layers", described.get("n_layer"))
    if depth is None or layers != [0, depth]:
        raise MergeError(
            f"a slice must be the whole model, here layer_range: [0, {'?' if depth is None else depth}], "
            f"got {layers} of {path}"
        )


def _path(reference: Any, folder: Path) -> str:
    if isinstance(reference, Mapping):
        inner = reference.get("model", reference)
        reference = reference if reference.get("lora") else inner.get("path") if isinstance(inner, Mapping) else inner
    if not isinstance(reference, str) or "+" in Path(reference).name:
        raise MergeError(f"a model is the path of a checkpoint, without a LoRA adapter; got {reference!r}")
    path = folder / reference
    return reference if not path.exists() and Path(reference).exists() else str(path)


def _value(name: str, asked: _Asked, scopes: list[dict], where: str) -> Any:
    """The value that counts: the first scope that has one."""
    for scope in scopes:
        if scope.get(name) is not None:
            return _scalar(name, scope[name], asked.default)
    if asked.default is _NEEDED:
        raise MergeError(f"{name} is missing, of {where}")
    return asked.default


def _scalar(name: str, setting: Any, default: Any) -> Any:
    """One value for all tensors; a gradient or filters if they say the same everywhere."""
    settings = setting if isinstance(setting, list) else [setting]
    found = []
    for one in settings:
        value = one.get("value") if isinstance(one, Mapping) else one
        found += value if isinstance(value, list) else [value]
    filtered = all(isinstance(one, Mapping) and one.get("filter") not in (None, "*") for one in settings)
    if not found or filtered or any(value != found[0] for value in found):
        raise MergeError(
            f"{name} differs by layer or tensor (a gradient, or filters), which is not read: give one value; "
            "in Python, tj.masked restricts a rule to some tensors"
        )
    return _typed(name, found[0], default)


def _typed(name: str, value: Any, default: Any) -> Any:
    wanted = "true or false" if isinstance(default, bool) else "a number"
    if isinstance(default, bool):
        value = _TRUTH.get(value.lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool):
        try:  # YAML reads 1e-4 as text
            return int(value) if isinstance(default, int) else float(value)
        except (TypeError, ValueError):
            pass
    raise MergeError(f"{name} must be {wanted}, got {value!r}")


def _tell_unused(method: str, reading: _Reading, own: list[dict], scopes: list[dict], tell) -> None:
    """Tells of parameters that mergekit takes no notice of either."""
    for name in sorted({n for scope in (*own, *scopes) for n in scope}):
        asked = reading.asked.get(name)
        if asked is None:
            tell(f"{name} is left out: it has no effect {'here' if name in _NO_EFFECT else f'on {method}'}")
        elif not asked.each and any(name in scope for scope in own):
            tell(f"{name} of a single model is left out: one value counts for all")
