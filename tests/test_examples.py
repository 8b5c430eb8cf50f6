"""The examples run, offline and in seconds, and give what they promise."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np

import converters

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_emr_on_beit3(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "emr_beit3.py"))
    found = example["main"](["--keep", str(tmp_path)])
    assert all(0.9 < correlation < 1 for correlation in found.values())
    said = capsys.readouterr()
    assert "retrieval: tensor 'beit3.encoder.layers.0.ffn.B.fc1.weight' moved by 1." in said.err
    assert said.err.count("warning") == 1
    report = json.loads((tmp_path / "bundle" / "merge_report.json").read_text())
    for task in example["TASKS"]:
        given, ours = (converters.read_tensors(tmp_path / name) for name in (task, f"rebuilt-{task}"))
        assert given.keys() == ours.keys()
        own = {name for name in given if report["tensors"][name] == {"from": "each task's own model"}}
        assert "beit3.encoder.embed_positions.A.weight" in own
        assert len(own) < len(given) / 2
        for name, array in given.items():
            assert ours[name].shape == array.shape
            assert np.array_equal(ours[name], array) == (name in own), name


def test_merging_flax_models_and_handing_one_to_pytorch(capsys):
    runpy.run_path(str(EXAMPLES / "merge_flax.py"))
    said = capsys.readouterr().out
    assert "TIES + TADrop    mean squared error" in said
    assert "saved for PyTorch: config.json, model.safetensors" in said
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        (line,) = [line for line in said.splitlines() if line.startswith("opened in transformers")]
        assert float(line.split()[-3]) < 1e-5
