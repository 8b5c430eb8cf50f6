"""The training loop: what was interrupted goes on as if it had not been."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.evidence import suites, training

RNG = np.random.default_rng(0)


def run(out, stop=None):
    """Fits a line; `stop` is the step after which it is interrupted."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    index = training.shuffled(len(x), 8, seed=3)

    def loss(params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean(((batch + noise) @ params["w"] - batch.sum(1)) ** 2)

    def progress(done, steps):
        if done == stop:
            raise KeyboardInterrupt

    start, optimiser = {"w": np.zeros(3, np.float32)}, training.adamw(0.1, 12)
    batch = lambda step: x[index(step)]  # noqa: E731
    return training.fit(start, loss, batch, optimiser, 12, out=out, seed=1, every=4, progress=progress)["w"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice", stop=7)
    twice, once = run(tmp_path / "twice"), run(tmp_path / "once")
    assert np.array_equal(twice, once)
    assert np.all(once > 0.3)
    lines = [
        [line.split(",")[:2] for line in (tmp_path / name / "log.csv").read_text().split()]
        for name in ("once", "twice")
    ]
    assert lines[0] == lines[1]
    assert [int(step) for step, _ in lines[0]] == [4, 8, 12]


def test_every_epoch_has_an_order_of_its_own():
    index = training.shuffled(10, 5, seed=0)
    epochs = [np.concatenate([index(2 * n), index(2 * n + 1)]) for n in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert len(training.shuffled(3, 5, seed=0)(7)) == 3


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


def test_a_frozen_part_stays_as_it_is_and_the_rest_goes_on_where_it_was(tmp_path):
    graph, start = nnx.split(Classifier(nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    recipe = training.Recipe(training.adamw, 0.1, 6, weight_decay=0.1, frozen="head")

    def fit(out, stop=None):
        def progress(done, steps):
            if done == stop:
                raise KeyboardInterrupt

        def loss(params, batch, key):
            return jnp.mean((nnx.merge(graph, params)(batch) - 1) ** 2)

        return training.fit(start, loss, lambda step: x, recipe.schedule(), 6, out=out, every=2, progress=progress)

    once = fit(tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "twice", stop=5)
    twice = fit(tmp_path / "twice")
    for part, moved in (("head", False), ("body", True)):
        for name in ("kernel", "bias"):
            leaves = [np.asarray(params[part][name][...]) for params in (start, once, twice)]
            assert np.array_equal(leaves[0], leaves[1]) != moved
            assert np.array_equal(leaves[1], leaves[2])


def test_lora_moves_each_matrix_by_one_of_its_rank_and_nothing_else(tmp_path):
    graph, start = nnx.split(Classifier(nnx.Rngs(0)))
    data = suites.Part(RNG.normal(size=(40, 3)).astype(np.float32), RNG.integers(2, size=40))
    recipe = training.Recipe(training.adamw, 0.1, 20, batch=8, frozen="head", rank=1)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    tuned = training.finetune(start, loss, data, recipe, out=tmp_path, seed=0, progress=lambda done, steps: None)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), tuned, start)
    assert jax.tree.structure(tuned) == jax.tree.structure(start)
    assert np.linalg.matrix_rank(moved["body"]["kernel"][...], tol=1e-5) == 1
    assert not any(np.any(moved[part][name][...]) for part, name in (("body", "bias"), ("head", "kernel")))
    assert loss(tuned, data, None) < loss(start, data, None) - 0.01
