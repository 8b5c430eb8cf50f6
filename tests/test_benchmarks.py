"""Every benchmark runs at a tiny size, prints its table, and writes what the documentation is made of."""

import importlib
import json
import math
import runpy
from pathlib import Path

import pytest

from benchmarks import __main__ as everything
from benchmarks import cost, larger_than_memory, measure, merges
from tadrop_jax import mergekit_recipe, registry, streaming
from tadrop_jax.cli import main
from tests.helpers import family, run_streamed

ROOT = Path(__file__).parents[1]
TINY = {
    "converting": ["--size", "0.1M", "--formats", "safetensors,npz"],
    "in_memory": ["--size", "0.1M", "--tasks", "2", "--rules", "task_arithmetic"],
    "larger_than_memory": ["--parameters", "1e4", "--entries", "1e5", "--tasks", "", "--methods", "emr+tadrop"],
    "linear_algebra": ["--size", "8", "--tasks", "2"],
    "merge_gpt2": ["--size", "0.1M", "--methods", "task_arithmetic,slerp"],
    "cost": ["--methods", "ties,emr+tadrop,iso_c"],
    "profiling": ["--size", "0.1M", "--methods", "ties"],
    "scaling": ["--sizes", "0.1M", "--task-size", "0.1M", "--tasks", "2"],
    "sharded_memory": ["--side", "32", "--tasks", "2"],
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


def test_a_disk_without_room_is_said_before_anything_is_made(tmp_path, capsys):
    given = ["--quick", "--parameters", "7e9", "--entries", "1e9", "--tasks", "", "--leave", "1e18"]
    larger_than_memory.main([*given, "--dir", str(tmp_path)])
    assert capsys.readouterr().out.count("needs 54 GB of disk, 0 GB are free") == 1
    assert not [*tmp_path.iterdir()]


def test_what_a_merge_writes_is_what_the_disk_is_asked_for(tmp_path):
    shapes = larger_than_memory.llama(1e4)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    inputs = larger_than_memory.make(tmp_path, 2, shapes)
    for method in ("ties", "emr"):
        request = ["--method", method, "--out", str(tmp_path / method), "--dtype", "bfloat16", "--quiet"]
        assert main(["merge", "--base", str(inputs[0]), "--models", *map(str, inputs[1:]), *request]) == 0
        there = [file for folder in (*inputs, tmp_path / method) for file in folder.rglob("*.safetensors")]
        heads = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in there)
        written = sum(file.stat().st_size for file in there) - heads
        assert written == pytest.approx(larger_than_memory.needed(method, 2, parameters), rel=0.01)


_PEERS = importlib.import_module("benchmarks.selection").PEERS


def test_ratios_are_medians_over_rounds():
    ours, floor = ([measure.Measurement(s, 0) for s in row] for row in ((2, 9, 4), (1, 3, 1)))
    assert measure.ratio(ours, floor) == 3
    assert measure.ratio(ours, floor, less=1) == pytest.approx(8 / 3)
    assert measure.ratio(ours, None) is None
    assert measure.ratio([measure.Measurement(12, 0)], ours) == 3
    assert measure.fastest(ours) == 2
    assert measure.ratio(ours, [m._replace(cpu_s=2) for m in floor], of="cpu_s") == 0


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


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "task_arithmetic+tadrop", "emr+tadrop", "della_linear"])
def test_streamed_merges_read_no_more_than_the_paper_says(method, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(streaming, "KEEP_BYTES", 0)
    base, models = family(2, {"w": (40, 50)})
    read = []
    run_streamed(base, models, cost.build(method), progress=read.append, workers=1)
    said = cost.passes(cost.build(method), 2)
    assert 0 < sum(read) <= (said.kept if kept else said.files) * 3 * base["w"].nbytes


def test_paper_of_a_rule_that_wants_whole_tensors():
    said = cost.passes(cost.build("iso_c"), 8)
    assert said.whole
    assert said.files == said.kept == 1


def test_time_on_paper_is_that_of_the_slowest_part():
    said, slow = cost.passes(cost.build("ties"), 8), cost.MACHINES[0]
    taken, bound = cost.seconds(said, slow._replace(read=1e6), 1e9, 10, 8, 2)
    assert (taken, bound) == (pytest.approx(2 * 9 * 2e9 / 1e6), "reading")


def test_pages_show_the_results():
    generate = runpy.run_path(str(ROOT / "docs" / "generate_benchmarks.py"))
    for name in generate["PAGES"]:
        text = (ROOT / "docs" / f"{name}.md").read_text()
        assert "<!-- table: " in text
        assert generate["filled"](text) == text, "python docs/generate_benchmarks.py"


def test_costs_in_the_documentation_are_those_of_the_steps(tmp_path):
    cost.main(["--json", str(tmp_path / "cost.json")])
    now, told = (json.loads(f.read_text()) for f in (tmp_path / "cost.json", ROOT / "benchmarks/results/cost.json"))
    assert now["rows"] == told["rows"], (
        "python -m benchmarks cost --out benchmarks/results, then docs/generate_benchmarks.py"
    )
