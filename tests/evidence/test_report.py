"""What a run leaves beside its table: which fine-tunes belong to it, and a report of each number of tasks."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from examples.evidence import belonging, experiments, pictures, report, tables
from examples.evidence.suites import Head, Part, Suite, Task, Tuned, place

ARMS = ("none", "TADrop 0.95/0.99", "uniform of 0.95/0.99", "dominance 0.5")


@pytest.fixture
def table(tmp_path):
    """Merges of b and c of two seeds, of a, b and c of one; d and other seeds were fine-tuned for something else."""
    table = tmp_path / "mine.csv"
    for seed in range(3):
        for number, name in enumerate("abcd"):
            measured = place(tmp_path, "adamw", seed, name).with_suffix(".json")
            measured.parent.mkdir(parents=True, exist_ok=True)
            measured.write_text(json.dumps({"probe": 0.1 * number, "tuned": 0.9}))
    for names, seeds in (("bc", (0, 1)), ("abc", (1,))):
        belonging.record(table, "adamw", names, bfloat16=False)
        for seed in seeds:
            belonging.write_models(table, "adamw", names, seed)
            for place_, arm in enumerate(ARMS):
                right = " ".join(f"{0.5 + 0.1 * (place_ == 1) + 0.01 * i * seed:.4f}" for i in range(len(names)))
                experiments.append(table, experiments.FIELDS, (len(names), seed, "EMR", arm, 0.7, "", 0, 0.55, right))
    return table


def test_a_table_of_models_has_the_fine_tunes_that_were_merged_and_no_others(table):
    found = [(line["seed"], line["task"]) for line in experiments.read(belonging.beside(table, "models.csv"))]
    assert found == [("0", "b"), ("0", "c"), ("1", "a"), ("1", "b"), ("1", "c")]
    said = json.loads((table.parent / "mine-tasks.json").read_text())
    assert said == {"recipe": "adamw", "bfloat16": False, "tasks": {"2": ["b", "c"], "3": ["a", "b", "c"]}}


def test_the_report_compares_each_merge_with_its_own_probes(table):
    text = report.write(table).read_text()
    two, three = text.split("## 2 tasks")[1].split("## 3 tasks")
    assert "In this order: b, c." in two
    assert "In this order: a, b, c." in three
    assert "| b | 2 | 10.0 | 90.0 | +80.0 |" in two
    assert "| a |" not in two
    assert "| TADrop 0.95/0.99 | 0.70 |" in two
    for part, gains in ((two, (0.5, 0.4, 0.5, 0.41)), (three, (0.6, 0.51, 0.42))):
        wanted = tables.interval(np.array(gains))
        assert f"| the probe | {wanted} |" in part
        assert "| uniform of 0.95/0.99 | +10.00 ± 0.00 |" in part.replace("**", "")
        assert "magnitude" not in part


def test_a_table_that_an_older_version_began_is_told_of_without_names(table):
    path = belonging.beside(table, "tasks.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": {"3": ["a", "b", "c"]}}))
    two, three = report.write(table).read_text().split("## 2 tasks")[1].split("## 3 tasks")
    assert "the probe" not in two
    assert "In this order" not in two
    assert "| the probe |" in three


def test_ratios_are_told_at_both_quantiles_and_drawn_where_there_are_layers(table, tmp_path):
    rng = np.random.default_rng(0)
    base = {"layer": {"0": {"kernel": np.zeros((60, 50), np.float32), "bias": np.zeros(40, np.float32)}}}
    part = Part(np.zeros((1, 1)), np.zeros(1))
    task = Task("x", part, part, part, 2)
    vectors = [{n: rng.laplace(size=leaf.shape).astype("f4") for n, leaf in base["layer"]["0"].items()} for _ in "ab"]
    tuned = [Tuned(task, {"layer": {"0": vector}}, Head(*2 * (np.zeros(1),)), None) for vector in vectors]
    path = belonging.beside(table, "ratios.csv")
    path.write_text("tensor,entries,ratio,sd_over_tasks,sparsity,conflict\nold,1,0,0,0,0\n")
    for seed in (0, 1, 1):
        experiments.describe(Suite(base, tuned, None), path, seed)
    lines = list(experiments.read(path))
    assert len(lines) == 2 * 2 * 2  # seeds, quantiles, tensors: none twice, and none of the old file
    for quantiles, wanted in (("0.75/0.95", np.log(0.25) / np.log(0.05)), ("0.95/0.99", np.log(0.05) / np.log(0.01))):
        here = [line for line in lines if line["quantiles"] == quantiles and line["tensor"] == "layer/0/kernel"]
        assert [float(line["ratio"]) for line in here] == pytest.approx([wanted] * 2, abs=0.05)
        assert [float(line["sparsity"]) for line in here] == pytest.approx([wanted] * 2, abs=0.05)
        shown = tables.ratios(str(path), quantiles).splitlines()
        assert f"| `layer/*/kernel` | 3,000 | {float(here[0]['ratio']):.3f} |" in shown[-1] + shown[-2]
    text = report.write(table).read_text()
    assert "## Quantile ratios, 0.95/0.99" in text
    assert "![mine-ratios](mine-ratios.svg)" in text
    assert "<svg" in (tmp_path / "mine-ratios.svg").read_text()
    assert not pictures.ratios(str(path), tmp_path / "none.svg", "0.5/0.9")  # of which the file has nothing


def test_older_files_of_ratios_are_of_the_older_quantiles():
    lines = tables.described("vision-ratios.csv")
    assert lines == tables.read("vision-ratios.csv")
    assert tables.described("vision-ratios.csv", "0.95/0.99") == []
