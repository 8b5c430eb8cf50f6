"""EMR's bundle on disk: what the command line writes, and one task's model out of it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import tadrop_jax as tj
from tadrop_jax.cli import main
from tests.helpers import family, merge, read_model, refused, report_of, save_family, save_model

pytestmark = pytest.mark.optimised

SHAPES = {"layer/kernel": (24, 9), "layer/bias": (9,), "head.weight": (3, 9)}


@pytest.fixture
def root(tmp_path) -> Path:
    """Directories base, m0 and m1."""
    save_family(tmp_path, 2, SHAPES, config={"model_type": "vit"})
    return tmp_path


def test_emr_and_a_tasks_model(root, capsys):
    """The bundle on disk, one task's model out of it, and the bundle in memory are one."""
    (root / "m1" / "config.json").write_text('{"task": "m1"}')
    assert merge(root, "--sparsify", "tadrop", method="emr") == 0
    said = capsys.readouterr().out
    assert "times smaller" in said
    assert "tasks: m0, m1" in said
    base, *models = (read_model(root / n) for n in ("base", "m0", "m1"))
    wanted = tj.merge(base, models, tj.emr(), sparsifier=tj.tadrop())
    bundle = tj.EMRBundle.load(root / "out", like=base)
    assert bundle.tasks == ("m0", "m1")
    np.testing.assert_allclose(bundle.rescalers, wanted.rescalers, rtol=1e-6)
    for t, task in enumerate(bundle.tasks):
        assert main(["task", str(root / "out"), "--task", task, "--out", str(root / f"of {task}")]) == 0
        written = read_model(root / f"of {task}")
        for name, value in written.items():
            np.testing.assert_array_equal(value, bundle.task_params(task)[name])
            np.testing.assert_allclose(value, wanted.task_params(t)[name], rtol=2e-6, atol=1e-6)
            np.testing.assert_array_equal(bundle.mask(task)[name], wanted.mask(t)[name])
    assert (root / "of m1" / "config.json").read_text() == '{"task": "m1"}'
    assert json.loads((root / "of m0" / "config.json").read_text()) == {"model_type": "vit"}
    size = report_of(root / "out")["size"]
    assert size["bundle_bytes"] == sum(size["parts_bytes"].values())
    assert size["full_models_bytes"] == sum(f.stat().st_size for f in root.glob("m?/model.safetensors"))
    assert size["parts_bytes"]["masks"] == 2 * sum(-(-v.size // 8) for v in base.values())
    assert size["bundle_bytes"] == bundle.nbytes - bundle.rescalers.nbytes


def test_heads_of_different_shapes(tmp_path):
    base, models = family(3, SHAPES)
    del base["head.weight"]
    for t, model in enumerate(models):
        model["classifier.weight"] = np.full((t + 2, 9), t, np.float32)
        del model["head.weight"]
    base["classifier.weight"] = np.zeros((7, 9), np.float32)
    for name, tensors in zip(("base", "m0", "m1", "m2"), (base, *models), strict=True):
        save_model(tmp_path / name, tensors)
    options = ["--set", "per_task=^classifier", "--set", "rescaler=global"]
    assert merge(tmp_path, *options, method="emr", models=("m0", "m1", "m2")) == 0
    rows = report_of(tmp_path / "out")["tensors"]
    assert rows["classifier.weight"] == {"from": "each task's own model"}
    wanted = tj.merge(base, models, tj.emr("global", per_task="^classifier"))
    for t in range(3):
        task = f"m{t}"
        assert main(["task", str(tmp_path / "out"), "--task", task, "--out", str(tmp_path / f"of {task}")]) == 0
        written = read_model(tmp_path / f"of {task}")
        assert written.keys() == models[t].keys()
        np.testing.assert_array_equal(written["classifier.weight"], models[t]["classifier.weight"])
        np.testing.assert_allclose(written["layer/kernel"], wanted.task_params(t)["layer/kernel"], rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(wanted.task_params(t)["classifier.weight"], models[t]["classifier.weight"])


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--max-shard-size", "300"], ["--exclude", "bias"]])
def test_bundles_in_other_shapes(options, root):
    assert merge(root, *options, method="emr") == 0
    assert main(["task", str(root / "out"), "--task", "m1", "--out", str(root / "one")]) == 0
    bundle = tj.EMRBundle.load(root / "out", like=read_model(root / "base"))
    for name, value in read_model(root / "one").items():
        assert value.dtype == (ml_dtypes.bfloat16 if "--dtype" in options else np.float32)
        np.testing.assert_array_equal(value, bundle.task_params("m1")[name], err_msg=name)


def test_a_task_that_cannot_be_taken_out(root, capsys):
    assert merge(root, method="emr") == 0
    capsys.readouterr()
    assert main(["task", str(root / "out"), "--task", "m7", "--out", str(root / "one")]) == 2
    assert f"{root / 'out'}: has no task 'm7'; it has m0, m1" in capsys.readouterr().err
    assert main(["task", str(root / "m0"), "--task", "m0", "--out", str(root / "one")]) == 2
    assert f"{root / 'm0'}: is no bundle" in capsys.readouterr().err
    assert main(["task", str(root / "nowhere"), "--task", "m0", "--out", str(root / "one")]) == 2
    assert f"{root / 'nowhere'}: no such directory" in capsys.readouterr().err
    assert main(["task", str(root / "out"), "--task", "m0", "--out", str(root / "m1")]) == 2
    assert "is not empty" in capsys.readouterr().err
    side = root / "out" / "tasks" / "m0" / "vocab.txt"
    side.symlink_to("/proc/self/mem")  # root cannot read its beginning either
    assert main(["task", str(root / "out"), "--task", "m0", "--out", str(root / "one")]) == 2
    assert f"{side}: cannot be read: Input/output error" in capsys.readouterr().err
    (root / "out" / "bundle.json").write_text("{")
    assert main(["task", str(root / "out"), "--task", "m0", "--out", str(root / "one")]) == 2
    assert "bundle.json: is not valid JSON" in capsys.readouterr().err
    assert not (root / "one").exists()
    assert not (root / "one.partial").exists()


def test_a_tasks_values_beyond_the_dtype_are_a_warning(root, capsys):
    """Base and vector fit into float16, their sum does not; what was infinite in the bundle is not told again."""
    for name, value in (("base", 6e4), ("m0", 1e5), ("m1", 1e5)):
        tensors = read_model(root / name)
        tensors["layer/bias"][:] = value
        tensors["layer/kernel"][0, :2] = 1e6
        save_file(tensors, root / name / "model.safetensors")
    assert merge(root, "--dtype", "float16", method="emr") == 0
    capsys.readouterr()
    assert main(["task", str(root / "out"), "--task", "m0", "--out", str(root / "one")]) == 0
    assert capsys.readouterr().err == (
        "warning: layer/bias: 9 values of finite inputs overflowed float16 and became infinite or NaN; "
        "'tadrop merge' with --dtype bfloat16 or float32 holds larger ones\n"
    )


def test_a_bundle_is_no_model(root, capsys):
    assert merge(root, method="emr", out="bundle") == 0
    capsys.readouterr()
    command = f"'tadrop task {root / 'bundle'} --task NAME --out DIR'"
    words = f"{root / 'bundle'}: is a bundle, no model: {command}"
    refused(root, capsys, merge(root, models=("m0", "bundle")), words)
    assert main(["convert", str(root / "bundle"), str(root / "out"), "--to", "flax"]) == 2
    assert words in capsys.readouterr().err
    # A file of that name makes no bundle of someone else's model.
    (root / "m1" / "bundle.json").write_text("{}")
    assert merge(root) == 0


def test_single_files_of_a_cache_keep_their_names(root):
    """In the cache of Hugging Face files are links to what is named by its hash."""
    (root / "blobs").mkdir()
    for hash_, name in (("0f3c", "m0"), ("77aa", "m1")):
        (root / name / "model.safetensors").rename(root / "blobs" / hash_)
        (root / f"{name}.safetensors").symlink_to(root / "blobs" / hash_)
    assert merge(root, method="emr", models=("m0.safetensors", "m1.safetensors")) == 0
    assert report_of(root / "out")["tasks"] == ["m0", "m1"]


def test_models_of_a_cache_give_tasks_their_names(root):
    """There a model lies in models--OWNER--NAME/snapshots/COMMIT."""
    for name in ("m0", "m1"):
        place = root / f"models--someone--gpt2-{name}" / "snapshots" / "5f91d94b"
        place.parent.mkdir(parents=True)
        (root / name).rename(place)
    models = [f"models--someone--gpt2-{name}/snapshots/5f91d94b" for name in ("m0", "m1")]
    assert merge(root, method="emr", models=models) == 0
    assert report_of(root / "out")["tasks"] == ["gpt2-m0", "gpt2-m1"]


def test_a_bundle_without_a_base_gives_no_model(tmp_path, capsys):
    base, models = family(2)
    tj.merge_task_vectors(tj.task_vectors(base, models), tj.emr()).save(tmp_path / "bundle")
    assert main(["task", str(tmp_path / "bundle"), "--task", "0", "--out", str(tmp_path / "out")]) == 2
    assert "without their base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_in_orbax_is_left_to_python(root, capsys):
    base, *models = (read_model(root / n) for n in ("base", "m0", "m1"))
    bundle = root / "bundle"
    tj.merge(base, models, tj.emr()).save(bundle, format="orbax")
    words = f"{bundle}: is a bundle in Orbax's format, which Python opens: tj.Bundle.load('{bundle}')"
    refused(root, capsys, merge(root, models=("m0", "bundle")), words)
    for argv in (["task", str(bundle), "--task", "m0", "--out"], ["convert", str(bundle), "--to", "flax"]):
        assert main([*argv, str(root / "out")]) == 2
        assert words in capsys.readouterr().err
    tj.Bundle.load(bundle).save(root / "again")  # as the message says
    assert main(["task", str(root / "again"), "--task", "1", "--out", str(root / "out")]) == 0


def test_a_command_to_copy_is_quoted(root, capsys):
    assert merge(root, method="emr", out="two words") == 0
    command = f"'tadrop task '{root / 'two words'}' --task NAME --out DIR'"
    assert command in capsys.readouterr().out
    refused(root, capsys, merge(root, models=("m0", "two words")), command)


def test_nothing_but_empty_tensors(tmp_path):
    """No statistic of the tree is found then: the rescalers are 0, on disk as in memory."""
    base, models = family(2, {"w": (0, 3)})
    save_family(tmp_path, 2, {"w": (0, 3)})
    assert merge(tmp_path, method="emr") == 0
    bundle = tj.merge(base, models, tj.emr())
    for found in (bundle, tj.Bundle.load(tmp_path / "out", like=base)):
        assert np.asarray(found.rescalers).tolist() == [0, 0]
        assert found.task_params(1)["w"].shape == (0, 3)


def test_a_sparsifier_in_place_of_the_drop(root, capsys):
    """T-Switch with TADrop's densities in place of its own."""
    assert merge(root, "--sparsify", "tadrop", method="t_switch") == 0
    output = capsys.readouterr()
    assert output.err == "t_switch: its own trimming is off, since a sparsifier is given without a density\n"
    assert "signs" in output.out
    base, *models = (read_model(root / n) for n in ("base", "m0", "m1"))
    wanted = tj.merge(base, models, tj.t_switch(tj.tadrop()))
    bundle = tj.Bundle.load(root / "out", like=base)
    rows = report_of(root / "out")["tensors"]
    for t in range(2):
        for name, mask in wanted.mask(t).items():
            np.testing.assert_array_equal(bundle.mask(t)[name], mask)
            assert rows[name]["sparsity"][t] == pytest.approx(1 - float(mask.mean()), abs=1e-6)
            np.testing.assert_allclose(bundle.task_vector(t)[name], wanted.task_vector(t)[name], rtol=1e-6)


@pytest.mark.parametrize("method", ["tall", "tsv_c"])
def test_the_dtype_that_is_asked_for(method, root):
    """Values are kept in it, bits as bits; the task's model comes out of what is kept."""
    assert merge(root, "--dtype", "bfloat16", method=method) == 0
    kept = {name.partition("/")[0]: value.dtype for name, value in read_model(root / "out").items()}
    bits, values = np.dtype(np.uint8), np.dtype(ml_dtypes.bfloat16)
    parts = {
        "tall": {"unified": values, "masks": bits},
        "tsv_c": {"u": values, "s": np.dtype(np.float32), "vt": values, "vectors": values},
    }[method]
    assert kept == {"base": values} | parts
    assert main(["task", str(root / "out"), "--task", "m1", "--out", str(root / "one")]) == 0
    bundle = tj.Bundle.load(root / "out", like=read_model(root / "base"))
    for name, value in read_model(root / "one").items():
        expected = np.asarray(bundle.task_params("m1")[name], np.float32)
        np.testing.assert_allclose(value.astype(np.float32), expected, rtol=1e-2, err_msg=name)


def test_methods_that_are_not_known_here(root, capsys):
    """A bundle of a later version's method: said, and nothing is written."""
    assert merge(root, method="tall") == 0
    file = root / "out" / "bundle.json"
    file.write_text(file.read_text().replace('"tall"', '"later"'))
    assert main(["task", str(root / "out"), "--task", "m0", "--out", str(root / "one")]) == 2
    assert "there is no bundle of method 'later' (there are emr, tall, " in capsys.readouterr().err
    assert not (root / "one").exists()


def test_names_that_begin_with_params(tmp_path):
    """As of Linen variables: a file's names are kept on disk, a tree's are without it."""
    for i, name in enumerate(("base", "m0", "m1")):
        tensors = {"params/d/kernel": np.full((2, 3), i), "params/head": np.full(2, i), "batch_stats/d": np.ones(3)}
        save_model(tmp_path / name, {n: v.astype(np.float32) for n, v in tensors.items()})
    assert merge(tmp_path, "--set", "per_task=head", method="emr") == 0
    assert main(["task", str(tmp_path / "out"), "--task", "m1", "--out", str(tmp_path / "one"), "--quiet"]) == 0
    written = read_model(tmp_path / "one")
    for like in (None, {"params": {"d": {"kernel": 0}, "head": 0}, "batch_stats": {"d": 0}}):
        found = tj.Bundle.load(tmp_path / "out", like=like).task_params("m1")
        np.testing.assert_array_equal(found["params"]["d"]["kernel"], written["params/d/kernel"])
        np.testing.assert_array_equal(found["params"]["head"], written["params/head"])
        np.testing.assert_array_equal(found["batch_stats"]["d"], written["batch_stats/d"])
