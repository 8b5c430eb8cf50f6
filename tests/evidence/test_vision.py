"""The vision suite, fast: a base, fine-tunes that beat a probe of it, merges that know their tasks, a table."""

import csv
import json

import jax
import numpy as np
import pytest

from examples.evidence import __main__ as command
from examples.evidence import experiments, tables, vision

RULES, NAMES = ("task arithmetic", "EMR"), ("none", "TADrop 0.75/0.95", "uniform")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run of the command."""
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def run(out):
    """Runs the command once more."""
    cache = jax.config.jax_compilation_cache_dir
    arguments = ["vision", "--fast", "--seeds", "0", "--out", str(out), "--rules", *RULES, "--sparsifiers", *NAMES]
    arguments += ["--lines"]
    yield lambda: command.main(arguments)
    jax.config.update("jax_compilation_cache_dir", cache)


def test_the_table_and_what_is_not_made_twice(run, out, monkeypatch):
    table = run()
    lines = list(experiments.read(table))
    assert {(line["rule"], line["sparsifier"]) for line in lines} == {(r, n) for r in RULES for n in NAMES}
    for line in lines:
        assert float(line["test"]) == pytest.approx(np.mean([float(v) for v in line["by_task"].split()]), abs=1e-4)
        assert float(line["test"]) > 0.8
        assert (line["length"] == "") == (line["rule"] == "EMR")
    pruned = {line["sparsifier"]: float(line["sparsity"]) for line in lines}
    assert pruned["none"] == 0 < pruned["uniform"] == pytest.approx(pruned["TADrop 0.75/0.95"], abs=0.01)
    with (out / "fast-models.csv").open() as file:
        models = list(csv.DictReader(file))
    assert np.mean([float(m["tuned"]) - float(m["probe"]) for m in models]) > 0
    assert json.loads((out / "base.json").read_text())["accuracy"] > 0.6

    suite = vision.load(None, out, "fast", 0, tuple(model["task"] for model in models))
    own = experiments.accuracies(suite, [tuned.params for tuned in suite.tuned], "validation")
    between = {(line["share"], line["way"]): line["by_task"] for line in experiments.read(out / "fast-lines.csv")}
    assert between["1.0", "alone"] == experiments.joined(own)
    assert between["0.0", "alone"] == between["0.0", "together"]
    assert between["1.0", "alone"] != between["1.0", "together"]

    with (out / "hours.csv").open() as file:
        spent = list(csv.DictReader(file))
    assert [row["step"] for row in spent][::3] == ["pretraining", "merging fast, seed 0"]
    assert len(spent) == 2 + len(models)
    assert all(float(row["hours"]) >= 0 and float(row["processor hours"]) >= 0 for row in spent)
    assert float(spent[0]["hours"]) > 0

    kept = table.read_text().splitlines(keepends=True)
    table.write_text("".join(kept[:-1]))
    judged = []
    monkeypatch.setattr(experiments, "judge", lambda *given, judge=experiments.judge: judged.append(1) or judge(*given))
    assert run().read_text() == "".join(kept)
    assert len(judged) == 1

    told = (out / "fast.md").read_text()
    assert "In this order: digits_odd, digits_loops." in told
    assert "### TADrop 0.75/0.95 against others" in told
    described = list(experiments.read(out / "fast-ratios.csv"))
    assert {line["quantiles"] for line in described} == {"0.75/0.95", "0.95/0.99"}
    assert len({(line["quantiles"], line["tensor"]) for line in described}) == len(described)  # of two runs

    monkeypatch.setattr(tables, "DOCS", out)
    (out / "results").mkdir()
    for name in ("fast.csv", "fast-models.csv", "fast-ratios.csv", "fast-lines.csv"):
        (out / "results" / name).write_text((out / name).read_text())
    wanted = ("accuracies fast.csv; 2", "differences fast.csv; 2; TADrop 0.75/0.95; none; uniform")
    wanted += ("models fast-models.csv", "ratios fast-ratios.csv", "lines fast-lines.csv")
    page = "".join(f"<!-- {place} -->\nold\n<!-- end -->\n" for place in wanted)
    filled = tables.filled(page)
    assert "| TADrop 0.75/0.95 | 0.5" in filled
    assert "old" not in filled
    assert "| digits_odd | 1 |" in filled
    assert "encoder/layer/*/attention" in filled
    assert tables.filled(filled) == filled


@pytest.mark.peers
def test_fine_tunes_open_in_transformers(run, out):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not (out / "fast.csv").exists():
        run()
    import converters
    from examples.evidence.images import normalised
    from examples.evidence.vision_tasks import task

    directory = out / "fast" / "seed0" / "digits_loops"
    images = normalised(task(None, "digits_loops").test.inputs[:8])
    model = transformers.ViTForImageClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(converters.load(directory)[0](images), theirs, atol=1e-4)
