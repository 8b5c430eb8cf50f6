"""`tadrop inspect`: the numbers of tj.explain, from files."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import tadrop_jax as tj
from tadrop_jax import cli, cutting, plots

pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(0)
    base = {"a.weight": rng.normal(size=(40, 30)), "a.bias": rng.normal(size=(30,)), "scale": np.ones(())}
    base = {k: np.asarray(v, np.float32) for k, v in base.items()}
    trees = {"base": base}
    for name in ("one", "two"):
        trees[name] = {k: np.asarray(v + 0.1 * rng.normal(size=v.shape), np.float32) for k, v in base.items()}
    for name, tree in trees.items():
        (root / name).mkdir()
        save_file({**tree, "steps": np.arange(3)}, root / name / "model.safetensors")
    return root, trees


def inspect(root, *options):
    models = [str(root / n) for n in ("one", "two")]
    return cli.main(["inspect", "--base", str(root / "base"), "--models", *models, *options])


SPARSIFIERS = {
    "tadrop:q_low=.5,q_high=.9": tj.tadrop(0.5, 0.9),
    "magnitude:density=.3": tj.magnitude(0.3),
    "dare:density=.5": tj.dare(0.5),
    "breadcrumbs:density=.5": tj.breadcrumbs(0.5),
    "della:density=.5": tj.della(0.5),
    "della:density=.5,granularity=tensor": tj.della(0.5, granularity="tensor"),
}


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_the_numbers_of_explain(folders, tmp_path, monkeypatch, sparsifier):
    monkeypatch.setattr(cutting, "BLOCK", 512)
    monkeypatch.setattr(cutting, "SMALL", 64)
    root, trees = folders
    assert inspect(root, "--sparsify", sparsifier, "--quiet", "--json", str(tmp_path / "said.json")) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["tasks"] == ["one", "two"]
    step, key = SPARSIFIERS[sparsifier], jax.random.key(0, impl="threefry2x32")
    expected = tj.explain(trees["base"], [trees["one"], trees["two"]], step, key=key)
    assert sorted(said["tensors"]) == sorted(expected)
    for name, row in expected.items():
        assert said["tensors"][name]["shape"] == list(trees["base"][name].shape)
        for field, value in row.items():
            np.testing.assert_allclose(said["tensors"][name][field], value, rtol=1e-5, err_msg=f"{name} {field}")


def test_numbers_for_a_pipe(folders, tmp_path, capsys):
    file = tmp_path / "said.json"
    assert inspect(folders[0], "--quiet", "--json", str(file)) == 0
    assert inspect(folders[0], "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


@pytest.mark.parametrize("sparsifier", ["tadrop", "breadcrumbs:density=.5"])
def test_table_and_plot(folders, tmp_path, capsys, sparsifier):
    root, _ = folders
    assert inspect(root, "--sparsify", sparsifier, "--exclude", "scale", "--plot", str(tmp_path / "p.png")) == 0
    out = capsys.readouterr().out
    assert "a.weight" in out
    assert "40x30" in out
    assert "scale" not in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("columns", "said"), [("200", ["a.weight", "a.bias"]), ("58", ["of a.", " weight ", " bias "])]
)
def test_what_names_begin_with_is_said_once_on_narrow_terminals(folders, capsys, monkeypatch, columns, said):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    assert inspect(folders[0], "--include", "^a") == 0
    out = " ".join(re.sub("\x1b\\[[0-9]*m", "", capsys.readouterr().out).split())
    assert all(words in out for words in said)


@pytest.mark.parametrize("columns", ["59", "30"])
def test_narrow_terminals_get_every_number(folders, capsys, monkeypatch, columns):
    assert inspect(folders[0], "--include", "^a", "--quiet", "--json", str(folders[0] / "all.json")) == 0
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert inspect(folders[0], "--include", "^a") == 0
    out = re.sub("\x1b\\[[0-9]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= int(columns)
    assert "…" not in out
    for name, row in json.loads((folders[0] / "all.json").read_text())["tensors"].items():
        norm = f"norm {np.mean(row['norm']):.3g}, after {np.mean(row['norm_after']):.3g}"
        assert name.removeprefix("a.") in out
        assert norm in " ".join(out.split())


def test_a_pipe_gets_whole_names_and_no_blanks_at_the_end_of_lines(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert inspect(folders[0], "--include", "^a") == 0
    out = capsys.readouterr().out
    assert " a.weight  40x30 " in out
    assert all(line == line.rstrip() for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sparsify", "ties"), "ties is a rule"),
        (("--include", "nothing"), "matches none"),
        (("--json", "/no/such/folder/x.json"), "parent directory"),
        (("--json", "/"), "is a directory"),
        (("--json", "/dev/full"), "tadrop inspect: /dev/full: No space left on device"),
        (("--plot", "/tmp/picture.txt"), "--plot writes a picture"),
    ],
)
def test_refusals(folders, capsys, options, said):
    assert inspect(folders[0], *options) == 2
    assert said in capsys.readouterr().err


def test_pictures_without_matplotlib(folders, capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    said = "this needs matplotlib: pip install '.[plots]'"
    assert inspect(folders[0], "--plot", str(tmp_path / "p.png")) == 2
    assert said in capsys.readouterr().err
    for draw in (
        lambda file: plots.draw_inspection({}, (), file),
        lambda file: plots.draw_coefficients({"all": np.ones(1)}, ("a",), file),
        lambda file: plots.draw_sparsity({}, (), file),
    ):
        with pytest.raises(tj.MergeError, match=re.escape(said)):
            draw(tmp_path / "p.png")
