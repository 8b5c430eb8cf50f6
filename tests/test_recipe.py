"""Recipes: what is written out, what options mean, and a round trip through YAML."""

import json

import pytest
import yaml

from tadrop_jax import recipe, registry
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.steps import expand

MINIMAL = {"base": "b", "models": ["m"], "method": "ties"}


def test_every_field_and_parameter_is_written_out():
    described = recipe.normal(MINIMAL)
    assert described == {
        "base": "b",
        "models": ["m"],
        "method": "ties",
        "parameters": {p.name: p.default for p in registry.method("ties").parameters},
        "sparsify": None,
        "include": [],
        "exclude": [],
        "differing": "refuse",
        "seed": 0,
        "dtype": None,
    }
    assert json.loads(json.dumps(described))["parameters"]["density"] == 0.2


@pytest.mark.parametrize("name", [m.name for m in registry.METHODS.values() if m.role == "rule" and not m.from_python])
def test_a_normal_recipe_stays_as_it_is(name, tmp_path):
    """It may be put into a file, as the report holds it, and read again."""
    described = recipe.normal({**MINIMAL, "method": name, "sparsify": "tadrop:q_low=.5", "exclude": "bias$"})
    assert recipe.normal(described) == described
    report = json.loads(json.dumps(described))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(report))
    again = json.loads(json.dumps(recipe.load(tmp_path / "recipe.yaml")))
    assert again == {**report, "base": str(tmp_path / "b"), "models": [str(tmp_path / "m")]}
    tasks = registry.method(name).models[1] or 3
    assert expand(recipe.chain_of(again), tasks) == expand(recipe.chain_of(described), tasks)


def test_a_sparsifier_switches_the_trim_off():
    assert recipe.normal({**MINIMAL, "sparsify": "tadrop"})["parameters"]["density"] is None
    kept = recipe.normal({**MINIMAL, "sparsify": "tadrop", "parameters": {"density": 0.5}})
    assert kept["parameters"]["density"] == 0.5
    assert "density" not in recipe.normal({**MINIMAL, "method": "average", "sparsify": "tadrop"})["parameters"]


@pytest.mark.parametrize(
    "sparsify",
    [
        "tadrop:q_low=.5,norm=1",
        {"name": "tadrop", "parameters": {"q_low": 0.5, "norm": 1}},
    ],
    ids=["text", "mapping"],
)
def test_two_ways_to_name_a_sparsifier(sparsify):
    found = recipe.normal({**MINIMAL, "sparsify": sparsify})["sparsify"]
    assert found["name"] == "tadrop"
    assert found["parameters"] == {
        "q_low": 0.5,
        "q_high": 0.99,
        "norm": 1,
        "mapping": "identity",
        "s_min": 0.0,
        "s_max": 0.9,
    }


def test_relative_paths_count_from_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{base: ../base, models: [a, /abs/b], method: average, include: kernel}")
    found = recipe.load(tmp_path / "recipe.yaml")
    assert found["base"] == str(tmp_path / "../base")
    assert found["models"] == [str(tmp_path / "a"), "/abs/b"]
    assert found["include"] == ["kernel"]


def test_chains():
    chain = recipe.chain_of(recipe.normal({**MINIMAL, "sparsify": "tadrop", "parameters": {"flavour": "peft"}}))
    assert [s.spec[0] for s in expand(chain, 2)] == ["tadrop", "ties"]
    chain = recipe.chain_of(recipe.normal({**MINIMAL, "parameters": {"density": 0.5}}))
    assert [s.spec[0] for s in expand(chain, 2)] == ["magnitude", "ties"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tise"}, "no merge rule 'tise'"),
        ({"parameters": {"densty": 1}}, "no parameter 'densty'"),
        ({"parameters": "density"}, "parameters must be a mapping"),
        ({"sparsify": "drop"}, "no sparsifier 'drop'"),
        ({"sparsify": {"name": "tadrop", "q_low": 1}}, r"sparsify is \{name: ..., parameters"),
        ({"sparsify": {"parameters": {}}}, r"sparsify is \{name: ..., parameters"),
        ({"include": [1]}, "include must be a regular expression"),
        ({"exclude": "("}, r"'\(' is not a regular expression"),
        ({"seed": True}, "seed must be a whole number"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v),
)
def test_refusals(change, message):
    with pytest.raises(ParameterError, match=message):
        recipe.normal({**MINIMAL, **change})


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{base: b, models: [m], method: tise}")
    with pytest.raises(MergeError, match=r"recipe\.yaml: there is no merge rule 'tise'"):
        recipe.load(tmp_path / "recipe.yaml")


def test_numbers_that_yaml_takes_for_texts():
    given = {"base": "b", "models": ["m"], "method": "ram", "parameters": {"threshold": "1e-5"}}
    assert recipe.normal(given)["parameters"]["threshold"] == 1e-5
    given = {"base": "b", "models": ["m"], "method": "ties", "parameters": {"density": "none"}}
    assert recipe.normal(given)["parameters"]["density"] is None
    given = {**given, "sparsify": {"name": "tadrop", "parameters": {"q_low": "5e-1"}}}
    assert recipe.normal(given)["sparsify"]["parameters"]["q_low"] == 0.5
    with pytest.raises(ParameterError, match="density must be a number"):
        recipe.normal({**given, "parameters": {"density": "much"}})
