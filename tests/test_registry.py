"""The registry says what is there: names, parameters, defaults; and reads what a user types."""

import importlib
import inspect
import subprocess
import sys

import pytest

import tadrop_jax as tj
from tadrop_jax import registry, steps
from tadrop_jax.registry import METHODS, parse, parse_step

PARAMETERS = [(m, p) for m in METHODS.values() for p in m.parameters]
SPARSIFIERS = [m for m in METHODS.values() if m.role == "sparsifier"]
# What the parser makes of a text, by the parameter's kind.
TEXTS = {
    "number": [("0.25", 0.25), ("1e-3", 0.001), ("1", 1.0)],
    "numbers": [("0.25", 0.25), ("0.1,0.2", [0.1, 0.2]), ("[0.1, 0.2]", [0.1, 0.2]), ("[0.5]", [0.5])],
    "whole": [("4", 4)],
    "flag": [("true", True), ("No", False), ("1", True)],
    "order": [("[1,0,2]", [1, 0, 2]), ("2,1", [2, 1])],
    "patterns": [("^head", ("^head",)), ('["a,b", "c"]', ("a,b", "c"))],
    "text": [("affine:0.5,0.1", "affine:0.5,0.1")],
    "sparsifier": [("magnitude:density=.3;keep=exact", "magnitude:density=.3;keep=exact")],
    "rule": [("ties:density=.3", "ties:density=.3")],
    "object": [],
}
NONSENSE = {"number": "much", "numbers": "0.1,x", "whole": "1.5", "flag": "maybe", "order": "[a]", "choice": "no such"}
NONSENSE["object"] = "x"

# The upper bound of n is m; an axis is one of two.
HANGS_ON_OTHERS = {("n_m", "n", 1), ("cabs", "n", 1)} | {
    (name, "input_axis", side) for name in ("wudi", "swudi", "aswudi", "ace") for side in (-1, 1)
}


def ids(value):
    return value.name if hasattr(value, "name") else str(value)


@pytest.mark.parametrize("method", METHODS.values(), ids=ids)
def test_entry_agrees_with_the_function(method):
    """Names in their order, and defaults; a parameter that Python must be given has a default of the registry's own."""
    module, _, function = method.home.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    names = list(signature.parameters)
    if method.needs_data:  # the others are data, models, and what tj.merge takes besides the rule
        names = [n for n in names if n in {p.name for p in method.parameters}]
    assert [p.name for p in method.parameters] == names
    for parameter in method.parameters:
        default = signature.parameters[parameter.name].default
        if default is not inspect.Parameter.empty:
            assert (parameter.default, type(parameter.default)) == (default, type(default)), parameter.name


@pytest.mark.parametrize("method", METHODS.values(), ids=ids)
def test_method_is_public_and_builds_at_its_defaults(method):
    assert method.name in tj.__all__
    if method.from_python:
        with pytest.raises(tj.ParameterError, match=f"call tadrop_jax.{method.name} from Python"):
            registry.build(method.name, {}, method.role)
        return
    step = registry.build(method.name, {}, method.role)
    one = "parameters" if method.on == "weights" else "vector"
    assert steps.output_of(step) == {"task vectors": "stack", "one model": one}.get(method.output, "bundle")
    assert method.random == any(s.random for s in steps.expand(step, method.models[1] or 3))


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.from_python], ids=ids)
def test_number_of_models_is_checked(method):
    """By the rule itself, before anything is read, wherever it runs."""
    step = registry.build(method.name, {})
    least, most = method.models
    for fit in (least, least + 3 if most is None else most):
        steps.expand(step, fit)
    for unfit in [least - 1] * (least > 1) + ([] if most is None else [most + 1]):
        with pytest.raises(tj.ParameterError, match=rf"{method.name}: merges .* fine-tuned models?, got {unfit}"):
            steps.expand(step, unfit)


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.from_python], ids=ids)
def test_ranges_are_those_of_the_function(method):
    """A number outside is refused; where the registry tells no bound there is none."""
    for parameter in method.parameters:
        if parameter.kind not in ("number", "numbers", "whole"):
            continue
        far = (-(10**6), 10**6) if parameter.kind == "whole" else (-1e6, 1e6)
        for bound, side, value in zip(parameter.range, (-1, 1), far, strict=True):
            if bound is not None:
                with pytest.raises(tj.ParameterError, match=rf"{parameter.name} must lie in .*{bound:g}.*, got"):
                    registry.build(method.name, {parameter.name: bound + side})
            elif (method.name, parameter.name, side) not in HANGS_ON_OTHERS:
                registry.build(method.name, {parameter.name: value})


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.from_python], ids=ids)
def test_the_same_method_is_the_same_step(method):
    """So that what was compiled for one call serves the next, the user's own jit with a static rule as well."""
    first, second = (registry.build(method.name, {}) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("method", "name"), [(m, p.name) for m, p in PARAMETERS if p.kind == "flag" and not m.from_python], ids=ids
)
def test_a_flag_is_no_text(method, name):
    """From Python, "false" would count as true."""
    with pytest.raises(tj.ParameterError, match=rf"{method.name}: {name} must be True or False, got 'false'"):
        registry.build(method.name, {name: "false"})


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS, ids=ids)
def test_parameter_is_read_from_its_text(method, parameter):
    if parameter.kind == "choice":
        texts = [(str(option), option) for option in parameter.options]
        assert parameter.default in parameter.options or parameter.default is None
    else:
        texts = TEXTS[parameter.kind]
    texts = texts + [("none", None)] * parameter.optional
    if parameter.default not in (None, ()):
        texts = [*texts, (str(parameter.default), parameter.default)]
    for text, value in texts:
        assert parse(method, [f"{parameter.name}={text}"]) == {parameter.name: value}


@pytest.mark.parametrize(("method", "parameter"), [(m, p) for m, p in PARAMETERS if p.kind in NONSENSE], ids=ids)
def test_nonsense_is_refused_by_name(method, parameter):
    text = NONSENSE[parameter.kind]
    with pytest.raises(
        tj.ParameterError, match=rf"{method.name}: {parameter.name} must be .*'{text}'".replace("[", r"\[")
    ):
        parse(method, [f"{parameter.name}={text}"])


def test_none_is_refused_where_it_is_no_value():
    with pytest.raises(tj.ParameterError, match="coefficient must be a number, got 'none'"):
        parse(METHODS["ties"], ["coefficient=none"])
    with pytest.raises(tj.ParameterError, match="granularity must be one of tensor, global, got 'none'"):
        parse(METHODS["magnitude"], ["granularity=none"])


def test_broken_assignments_are_refused():
    with pytest.raises(tj.ParameterError, match="write NAME=VALUE, got 'density'"):
        parse(METHODS["ties"], ["density"])
    with pytest.raises(
        tj.ParameterError, match=r"no parameter 'densty' \(did you mean 'density'\?\); it has density, coeff"
    ):
        parse(METHODS["ties"], ["densty=0.2"])
    with pytest.raises(tj.ParameterError, match="ties: density is given twice"):
        parse(METHODS["ties"], ["density=.2", "density=.3"])
    with pytest.raises(tj.ParameterError, match="average has no parameter 'x'; it has weights"):
        registry.build("average", {"x": 1})


@pytest.mark.parametrize("method", SPARSIFIERS, ids=ids)
def test_step_round_trip_at_the_defaults(method):
    """A step written out in full is the step."""
    texts = {p.name: "none" if p.default is None else str(p.default) for p in method.parameters}
    name, values = parse_step(f"{method.name}:" + ",".join(f"{k}={v}" for k, v in texts.items()))
    assert (name, values) == (method.name, {p.name: p.default for p in method.parameters})
    assert parse_step(method.name) == (method.name, {})


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("tadrop:q_low=.5,q_high=.9", "tadrop", {"q_low": 0.5, "q_high": 0.9}),
        ("tadrop:mapping=affine:0.5,0.1,norm=1", "tadrop", {"mapping": "affine:0.5,0.1", "norm": 1}),
        ("uniform:sparsity=.1,.2,norm=none", "uniform", {"sparsity": [0.1, 0.2], "norm": None}),
        ("uniform:sparsity=[.1,.2];norm=none", "uniform", {"sparsity": [0.1, 0.2], "norm": None}),
        ("conflict_aware:order=[1,0,2]", "conflict_aware", {"order": [1, 0, 2]}),
        ("conflict_aware:sparsifier=uniform:sparsity=.4", "conflict_aware", {"sparsifier": "uniform:sparsity=.4"}),
    ],
)
def test_commas_belong_to_values_or_part_them(text, name, values):
    assert parse_step(text) == (name, values)
    registry.build(name, values, "sparsifier")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune", "no sparsifier 'prune'; there are tadrop, uniform, "),
        ("ties", "no sparsifier 'ties'"),
        ("magnitude:0.3", "magnitude: write NAME=VALUE, got '0.3'"),
        ("magnitude:share=0.3", "magnitude has no parameter 'share'"),
        ("magnitude:density=", "density must be a number, or a list of numbers, got ''"),
    ],
)
def test_broken_steps_are_refused(text, said):
    with pytest.raises(tj.ParameterError) as refusal:
        parse_step(text)
    assert said in str(refusal.value)


def test_unknown_methods_are_refused_by_role():
    with pytest.raises(tj.ParameterError, match=r"no merge rule 'tadrop' \(tadrop is a sparsifier\)"):
        registry.method("tadrop", "rule")
    with pytest.raises(tj.ParameterError, match="no method 'x'"):
        registry.build("x", {})


def test_values_out_of_range_are_refused_when_built():
    with pytest.raises(tj.ParameterError, match=r"density must lie in \[0, 1\], got 20.0"):
        registry.build("ties", parse(METHODS["ties"], ["density=20"]))


def test_registry_imports_no_jax():
    """So that the command line answers at once."""
    code = "import sys, tadrop_jax.registry; print([m for m in ('jax', 'flax', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_inner_sparsifier_takes_several_parameters():
    name, values = registry.parse_step("conflict_aware:sparsifier=n_m:n=1;m=3,order=[1,0]")
    assert (name, values) == ("conflict_aware", {"sparsifier": "n_m:n=1;m=3", "order": [1, 0]})
    inner = registry.build(name, values).build(2)
    assert [step.group for step in inner] == [3, 3]
