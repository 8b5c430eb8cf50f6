"""Tensors that are not alike in all models, in the manner of EMR-Merging on BEiT3: each task keeps its own."""

import shutil

import numpy as np
import pytest

from tadrop_jax.checkpoints.opening import _without_prefix
from tadrop_jax.cli import main
from tests.helpers import family, merge, read_model, report_of, save_model

pytestmark = pytest.mark.optimised

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def root(tmp_path):
    """Positions for other image sizes, a head that one model lacks, one that only the models have."""
    base = {"layer.weight": normal(6, 4), "positions": normal(5, 4), "mlm_head": normal(3, 4)}
    save_model(tmp_path / "base", base)
    for t, size in enumerate((7, 5)):
        model = {
            "layer.weight": base["layer.weight"] + 0.1 * normal(6, 4),
            "positions": normal(size, 4),
            "head.weight": normal(2 + t, 4),
        }
        if t == 0:
            model["mlm_head"] = normal(3, 4)
        save_model(tmp_path / f"m{t}", model)
    return tmp_path


def test_differing_tensors_stay_each_tasks_own(root, capsys):
    assert merge(root, "--differing", "own", method="emr") == 0
    report = report_of(root / "out")
    for name in ("positions", "mlm_head", "head.weight"):
        assert report["tensors"][name] == {"from": "each task's own model"}
    for t in range(2):
        assert main(["task", str(root / "out"), "--task", f"m{t}", "--out", str(root / f"task{t}"), "--quiet"]) == 0
        model, own = read_model(root / f"task{t}"), read_model(root / f"m{t}")
        assert model.keys() == own.keys()
        for name in own.keys() - {"layer.weight"}:
            np.testing.assert_array_equal(model[name], own[name], err_msg=name)
        assert not np.array_equal(model["layer.weight"], own["layer.weight"])


def test_without_the_option_they_are_refused(root, capsys):
    assert merge(root, method="emr") == 2
    error = capsys.readouterr().err
    assert "head.weight" in error
    assert "--differing own" in error


def test_one_model_cannot_keep_them(root, capsys):
    assert merge(root, "--differing", "own", method="average") == 2
    assert "one model per task" in capsys.readouterr().err


def test_a_tensor_that_was_trained_anew_is_warned_of(root, capsys):
    base = read_model(root / "base")
    model = read_model(root / "m1") | {"layer.weight": 5 * base["layer.weight"]}
    (root / "m1" / "model.safetensors").unlink()
    (root / "m1").rmdir()
    save_model(root / "m1", model)
    assert merge(root, "--differing", "own", method="emr") == 0
    (line,) = report_of(root / "out")["warnings"]
    assert "m1: tensor 'layer.weight' moved by 4.0 times its own size" in line
    assert line in capsys.readouterr().err


BACKBONE = {"wte.weight": (9, 4), "h.0.weight": (6, 4), "h.0.bias": (6,), "ln_f.weight": (4,)}


@pytest.fixture(params=["base", "models"])
def backbones(request, tmp_path):
    """A backbone and classifiers on it, of which the base or the models have names without the prefix."""
    base, models = family(2, BACKBONE)
    bare = {"base": (True, False), "models": (False, True)}[request.param]

    def save(name, tree, bare, **more):
        save_model(tmp_path / name, {n if bare else f"transformer.{n}": a for n, a in tree.items()} | more)

    save("base", base, bare[0], **{"pooler.weight": normal(4, 4)})
    for t, model in enumerate(models):
        save(f"m{t}", model, bare[1], **{"score.weight": normal(2 + t, 4)})
    return tmp_path, models, "" if bare[0] else "transformer."


def test_a_prefix_of_one_side_and_heads_of_both(backbones, capsys):
    root, models, prefix = backbones
    assert merge(root, "--exclude", "^score", "--exclude", "^pooler", method="average") == 0
    merged = read_model(root / "out")
    assert merged.keys() == {f"{prefix}{n}" for n in BACKBONE} | {"pooler.weight"}
    for name in BACKBONE:
        expected = np.mean([m[name] for m in models], axis=0)
        np.testing.assert_allclose(merged[f"{prefix}{name}"], expected, atol=1e-6, err_msg=name)


def test_a_prefix_of_one_side_and_heads_that_stay(backbones, capsys):
    root, _, prefix = backbones
    options = ["--set", "per_task=^score", "--exclude", "^pooler"]
    assert merge(root, *options, method="emr", out="bundle") == 0
    assert main(["task", str(root / "bundle"), "--task", "m1", "--out", str(root / "one"), "--quiet"]) == 0
    found = read_model(root / "one")
    np.testing.assert_array_equal(found["score.weight"], read_model(root / "m1")["score.weight"])
    assert found.keys() == {f"{prefix}{n}" for n in BACKBONE} | {"pooler.weight", "score.weight"}


def test_heads_are_named_where_only_a_prefix_differs(backbones, capsys):
    assert merge(backbones[0]) == 2
    said = capsys.readouterr().err
    assert "lacks tensor 'pooler.weight' and has tensor 'score.weight', which" in said
    assert "--exclude REGEX" in said
    assert len(said.splitlines()) == 1


def test_prefixes_that_would_give_one_name_twice():
    names = {"a.w", "a.b", "w"}
    assert _without_prefix(names, {"w", "b", "c", "d"}) == {}
    assert _without_prefix({"a.w", "a.b"}, {"w", "b", "c"}) == {"a.w": "w", "a.b": "b"}
    assert _without_prefix({"w", "b"}, {"a.w", "a.b"}) == {"w": "a.w", "b": "a.b"}
    assert _without_prefix({"a/w"}, {"w"}) == {}


@pytest.fixture
def grown(tmp_path):
    """An embedding with more rows in one model, and fewer in another, than in the base."""
    base = {"wte": normal(8, 3), "layer": normal(4, 3)}
    models = [{"wte": normal(rows, 3), "layer": normal(4, 3)} for rows in (10, 7)]
    for name, tree in zip(("base", "m0", "m1"), (base, *models), strict=True):
        save_model(tmp_path / name, tree)
    return tmp_path, base, models


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"], ["--processes", "1", "--process", "0"]])
def test_vocabularies_that_grew_overlap(options, grown, capsys):
    root, base, models = grown
    assert merge(root, "--differing", "overlap", *options, method="average") == 0
    assert "wte: its first 7 rows merge, of 8 that the base has" in capsys.readouterr().err
    merged = read_model(root / "out")
    mean = np.mean([m["wte"][:7] for m in models], axis=0)
    np.testing.assert_allclose(merged["wte"], np.concatenate([mean, base["wte"][7:]]), atol=2e-3)
    np.testing.assert_allclose(merged["layer"], np.mean([m["layer"] for m in models], axis=0), atol=2e-3)
    row = report_of(root / "out")["tensors"]["wte"]
    assert (row["shape"], row["merged rows"]) == ([8, 3], 7)


def test_overlaps_that_cannot_be(grown, capsys):
    root, base, _ = grown
    assert merge(root, method="average") == 2
    said = capsys.readouterr().err
    assert "has shape [10, 3]" in said
    assert "--differing overlap merges the rows that all have" in said
    assert merge(root, "--differing", "overlap", method="emr") == 2
    assert "a method that gives one model" in capsys.readouterr().err
    shutil.rmtree(root / "m0")
    save_model(root / "m0", {**base, "wte": normal(8, 4)})
    assert merge(root, "--differing", "overlap", method="average") == 2
    said = capsys.readouterr().err
    assert "tensor 'wte' has shape [8, 4]" in said
    assert "--differing overlap" not in said
