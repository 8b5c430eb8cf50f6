"""Every benchmark runs at a tiny size, prints its table, and writes what the documentation is made of."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as everything
from benchmarks import measure, merges
from tadrop_jax import mergekit_recipe, registry

TINY = {
    "converting": ["--size", "0.1M", "--formats", "safetensors,npz"],
    "in_memory": ["--size", "0.1M", "--tasks", "2", "--rules", "task_arithmetic"],
    "linear_algebra": ["--size", "8", "--tasks", "2"],
    "merge_gpt2": ["--size", "0.1M", "--methods", "task_arithmetic,slerp"],
    "scaling": ["--sizes", "0.1M", "--task-size", "0.1M", "--tasks", "2"],
    "selection": ["--sizes", "1e3", "--dtypes", "bfloat16"],
    "start_up": ["--only", "import tadrop"],
}


@pytest.mark.parametrize("name", everything.NAMES)
def test_quick_version(name, tmp_path, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    module.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "result.json"), *TINY[name]])
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["benchmark"] == name
    assert kept["machine"]["cores"] > 0
    assert kept["rows"]
    columns = {key: tuple(column) for key, column in kept["columns"].items()}
    assert columns == module.COLUMNS
    assert set().union(*kept["rows"]) <= {*columns, "note"} | {f"{peer}_ms" for peer in (*columns, *_PEERS)}
    assert measure.table(columns, kept["rows"]) in capsys.readouterr().out
    if name == "merge_gpt2":
        merged, refused = kept["rows"]
        assert merged["ours / floor"] > 1
        assert "slerp: merges exactly 1 fine-tuned model" in refused["note"]


_PEERS = importlib.import_module("benchmarks.selection").PEERS


def test_ratios_are_medians_over_rounds():
    ours, floor = ([measure.Measurement(s, 0) for s in row] for row in ((2, 9, 4), (1, 3, 1)))
    assert measure.ratio(ours, floor) == 3
    assert measure.ratio(ours, floor, less_s=1) == pytest.approx(8 / 3)
    assert measure.ratio(ours, None) is None
    assert measure.ratio([measure.Measurement(12, 0)], ours) == 3
    assert measure.fastest(ours) == 2


def test_tables():
    columns = {"a": ("method", ""), "b": ("ours / floor", ".1f")}
    rows = [{"a": "ties", "b": 1.25}, {"a": "x", "b": None, "note": "skipped"}]
    plain = ["method  ours / floor  note", "ties             1.2", "x                     skipped"]
    assert measure.table(columns, rows).splitlines() == plain
    assert measure.table(columns, rows, markdown=True).splitlines()[2:] == ["| ties | 1.2 |  |", "| x |  | skipped |"]


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    with pytest.raises(RuntimeError, match="ended with -9"):
        measure.run(["sleep", "60"], {}, tmp_path / "log", limit_s=0.1)


@pytest.mark.parametrize("method", merges.PEERS)
def test_recipes_of_the_peer_are_for_the_same_rule(method):
    models = [Path(f"m{i}") for i in range(registry.METHODS[method].models[1] or 2)]
    recipe = merges.peer_recipe(method, [Path("base"), *models], "float32")
    read = mergekit_recipe.read(recipe, Path("."), lambda note: None)
    assert read["method"] == method
