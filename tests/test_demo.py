"""The demo in small: it trains, saves and merges by the command line, and reports what the files give."""

import importlib.util
import json

import numpy as np
import pytest

import converters
from tadrop_jax import demo
from tadrop_jax.errors import MergeError

pytestmark = pytest.mark.optimised

pytest.importorskip("sklearn")

SMALL = demo.Settings(
    tasks=("larger", "loops"),
    hidden_size=32,
    layers=1,
    pretraining_steps=900,
    tuning_steps=400,
    batch=64,
    chunk=50,
    probe_pairs=1000,
    test_pairs=500,
    probe_iterations=30,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out, SMALL)


def test_every_arm_is_in_the_table_and_fine_tuning_learns(result):
    out, rows = result
    arms = {f"{prefix}{method}" for method in demo.METHODS for prefix in ("", "tadrop+")}
    assert rows.keys() == {"base, linear probe", "fine-tuned"} | arms
    assert all(len(values) == len(SMALL.tasks) for values in rows.values())
    assert np.mean(rows["fine-tuned"]) > np.mean(rows["base, linear probe"]) + 0.02
    assert rows["fine-tuned"][0] > 0.72  # always answering "not larger" is right in .69 of the pairs
    assert json.loads((out / "results.json").read_text())["accuracy"] == rows
    assert (out / "sparsity.png").stat().st_size > 10_000


def test_merged_directories_hold_what_the_commands_say(result):
    out, _ = result
    base = converters.read_tensors(out / "base")
    plain, sparse = (converters.read_tensors(out / "merged" / n) for n in ("task_arithmetic", "tadrop+task_arithmetic"))
    np.testing.assert_array_equal(plain["classifier.weight"], base["classifier.weight"])
    models = [converters.read_tensors(out / task) for task in SMALL.tasks]
    name = "vit.encoder.layer.0.output.dense.weight"
    want = base[name] + np.float32(0.3) * sum(model[name] - base[name] for model in models)
    np.testing.assert_allclose(plain[name], want, rtol=1e-5, atol=1e-6)
    assert np.abs(sparse[name] - want).max() > 1e-3
    for task in SMALL.tasks:
        module, _ = converters.load(out / "merged" / f"emr-{task}")
        own = converters.read_tensors(out / task)["classifier.weight"]
        np.testing.assert_array_equal(np.asarray(module.classifier.kernel[...]).T, own)


def test_an_earlier_demo_is_replaced_and_other_directories_are_not(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MergeError, match="not an earlier demo"):
        demo.run(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    (tmp_path / ".tadrop-demo").touch()
    demo._prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tadrop-demo", "merged"]


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(MergeError, match=r"pip install '\.\[demo\]' in a clone"):
        demo.run(tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_held_out_digits_are_not_trained_on():
    (train, _), (test, _) = demo._digits()
    assert (len(train), len(test)) == (1200, 597)
    seen = {image.tobytes() for image in train}
    assert sum(image.tobytes() in seen for image in test) == 0


def test_pairs_and_labels_agree():
    rng = np.random.default_rng(0)
    images = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((1, 8, 8), np.float32)
    pairs = demo._pairs((images, np.arange(10)), 400, rng)
    assert pairs.images.shape == (400, 8, 16, 1)
    np.testing.assert_array_equal(pairs.images[:, 0, 0, 0], pairs.left)
    np.testing.assert_array_equal(pairs.images[:, 7, 15, 0], pairs.right)
    assert 0.3 < (pairs.left == pairs.right).mean() < 0.45
    for task in (demo.PRETRAINING, *demo.TASKS.values()):
        labels = task.label(pairs.left, pairs.right)
        assert labels.min() >= 0
        assert labels.max() < task.classes


def test_shifting_moves_whole_images_by_at_most_a_pixel():
    image = np.zeros((200, 8, 8), np.float32)
    image[:, 3, 4] = 1
    moved = demo._shifted(image, np.random.default_rng(0))
    np.testing.assert_array_equal(moved.sum(axis=(1, 2)), 1)
    rows, columns = np.nonzero(moved)[1:]
    assert set(rows) == {2, 3, 4}
    assert set(columns) == {3, 4, 5}
