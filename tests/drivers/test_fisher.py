"""Fisher averaging against the closed form for softmax regression and the authors' average, in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj

from .conftest import CLASSES, TASKS, WIDTH, mlp

NAMES = ("bias", "kernel")


def logits(params, x):
    return x @ params["kernel"] + params["bias"]


@pytest.fixture(scope="module")
def softmax(inputs):
    """Softmax regression: base, models."""
    rng = np.random.default_rng(4)
    base, *models = (
        {"kernel": rng.normal(size=(WIDTH, CLASSES)), "bias": rng.normal(size=CLASSES)} for _ in range(TASKS + 1)
    )
    as_arrays = lambda tree: {n: jnp.asarray(v, jnp.float32) for n, v in tree.items()}  # noqa: E731
    return as_arrays(base), [as_arrays(m) for m in models]


def probabilities(model, x):
    z = np.asarray(x, np.float64) @ np.asarray(model["kernel"], np.float64) + np.asarray(model["bias"], np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def closed_form(model, batches):
    """The Fisher of softmax regression: p (1 - p), times the square of the input."""
    x = np.concatenate(batches).astype(np.float64)
    variance = (p := probabilities(model, x)) * (1 - p)
    return {"kernel": (x**2).T @ variance / len(x), "bias": variance.mean(0)}


def with_labels(model, batches, labels):
    """Mean squared gradients of the log-likelihood of given labels."""
    x = np.concatenate(batches).astype(np.float64)
    score = np.eye(CLASSES)[labels] - probabilities(model, x)
    return {"kernel": (x**2).T @ score**2 / len(x), "bias": (score**2).mean(0)}


def authors_average(models, fishers, weights, floor, normalize, first):
    """mmatena/model_merging, _merge_with_coeffs, in NumPy; and norms by tensor."""
    out = {}
    for name in NAMES:
        above = below = 0
        for t, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
            over = NAMES if normalize == "model" else (name,)
            norm = np.sqrt(sum((fisher[n] ** 2).sum() for n in over)) if normalize else 1.0
            diagonal = np.maximum(fisher[name], floor) if t == 0 or not first else fisher[name]
            above = above + weights[t] / norm * diagonal * np.asarray(model[name], np.float64)
            below = below + weights[t] / norm * diagonal
        out[name] = above / below
    return out


@pytest.mark.parametrize(
    ("normalize", "floor_on", "floor", "chunk"),
    [("model", "first", 0.05, 1), ("tensor", "all", 0.05, 4), (None, "first", 1e-6, 6)],
)
def test_closed_form_and_the_authors_average(softmax, inputs, normalize, floor_on, floor, chunk):
    base, models = softmax
    found = tj.fisher(
        logits,
        inputs,
        base,
        models,
        weights=[1.0, 2.0],
        normalize=normalize,
        floor=floor,
        floor_on=floor_on,
        chunk=chunk,
    )
    fishers = [closed_form(m, b) for m, b in zip(models, inputs, strict=True)]
    for t in range(TASKS):
        chex.assert_trees_all_close(found.fishers[t], fishers[t], rtol=1e-5)
    expected = authors_average(models, fishers, (1, 2), floor, normalize, floor_on == "first")
    chex.assert_trees_all_close(found.params, expected, rtol=1e-5, atol=1e-6)
    again = tj.fisher(
        None,
        None,
        base,
        models,
        fishers=found.fishers,
        weights=[1.0, 2.0],
        normalize=normalize,
        floor=floor,
        floor_on=floor_on,
    )
    chex.assert_trees_all_equal(again.params, found.params)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of what fusion_bench imports
@pytest.mark.parametrize("normalize", ["model", None])
def test_fusion_bench(normalize, softmax, inputs):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("fusion_bench.method.fisher_merging.fisher_merging", exc_type=ImportError)
    base, models = softmax
    found = tj.fisher(
        logits, inputs, base, models, weights=[1.0, 2.0], normalize=normalize, floor=0.05, floor_on="added"
    )
    tensors = lambda trees: [{n: torch.tensor(np.array(v)) for n, v in tree.items()} for tree in trees]  # noqa: E731
    values = {n: [tree[n] for tree in tensors(models)] for n in NAMES}
    theirs = peer.merging_with_fisher_weights(
        values, tensors(found.fishers), torch.tensor([1.0, 2.0]), normalize is not None, 0.05
    )
    chex.assert_trees_all_close(found.params, {n: v.numpy() for n, v in theirs.items()}, rtol=1e-5, atol=1e-6)


def test_given_and_likeliest_labels(softmax, inputs):
    _, (model, _) = softmax
    labels = [np.arange(6) % CLASSES, np.arange(6)[::-1] % CLASSES]
    batches = list(zip(inputs[0], labels, strict=True))
    found = tj.fisher_diagonal(logits, model, batches, labels="given", chunk=2)
    chex.assert_trees_all_close(found, with_labels(model, inputs[0], np.concatenate(labels)), rtol=1e-5)
    likeliest = probabilities(model, np.concatenate(inputs[0])).argmax(1)
    found = tj.fisher_diagonal(logits, model, inputs[0], labels="argmax")
    chex.assert_trees_all_close(found, with_labels(model, inputs[0], likeliest), rtol=1e-5)


def test_sampled_labels_approach_the_expectation(softmax, inputs):
    _, (model, _) = softmax
    many = [np.concatenate([inputs[0][0]] * 100)] * 2
    found = tj.fisher_diagonal(logits, model, many, labels="sampled", chunk=50, key=jax.random.key(0))
    chex.assert_trees_all_close(found, closed_form(model, [inputs[0][0]]), rtol=0.3, atol=0.02)
    once = tj.fisher_diagonal(logits, model, inputs[0], labels="sampled", key=jax.random.key(0))
    other = tj.fisher_diagonal(logits, model, inputs[0], labels="sampled", key=jax.random.key(1))
    assert not np.allclose(once["bias"], other["bias"])


def test_the_expected_loss_has_no_gradient(softmax, inputs):
    """Why `fisher_variant: soft` of dataless-model-merging, which squares this gradient, says nothing."""
    _, (model, _) = softmax

    def loss(model):
        logs = jax.nn.log_softmax(logits(model, inputs[0][0]))
        return -jnp.mean(jnp.sum(jax.lax.stop_gradient(jnp.exp(logs)) * logs, axis=-1))

    chex.assert_trees_all_close(jax.grad(loss)(model), jax.tree.map(jnp.zeros_like, model), atol=1e-6)


def test_positions_add_up(softmax, inputs):
    """Logits of several positions: the joint likelihood's Fisher is the sum of theirs."""
    _, (model, _) = softmax
    x = np.concatenate(inputs[0]).reshape(4, 3, WIDTH)  # four examples of three positions
    found = tj.fisher_diagonal(logits, model, [x])
    expected = jax.tree.map(lambda v: 3 * v, closed_form(model, inputs[0]))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_what_no_fisher_speaks_of(softmax):
    """An input that is always 0: its weights are the first model's (the floor), or without a floor the mean."""
    base, models = softmax
    x = np.ones((2, WIDTH), np.float32)
    x[:, 0] = 0
    filled = tj.fisher(logits, [[x], [x]], base, models).params
    np.testing.assert_allclose(filled["kernel"][0], models[0]["kernel"][0], rtol=1e-6)
    mean = tj.fisher(logits, [[x], [x]], base, models, floor=0.0, weights=[1.0, 3.0]).params
    expected = (models[0]["kernel"][0] + 3 * models[1]["kernel"][0]) / 4
    np.testing.assert_allclose(mean["kernel"][0], expected, rtol=1e-5)
    silent = tj.fisher(logits, [[0 * x], [x]], base, models, exclude="bias", floor=0.0).params
    np.testing.assert_allclose(silent["kernel"][1:], models[1]["kernel"][1:], rtol=1e-5)
    chex.assert_trees_all_equal(silent["bias"], base["bias"])


def test_trees_with_integers_and_a_remainder(trees, inputs, capsys):
    base, models = trees
    found = tj.fisher(mlp, inputs, base, models, chunk=4, progress=True)
    whole = tj.fisher(mlp, inputs, base, models, chunk=6)
    chex.assert_trees_all_close(found.params, whole.params, rtol=1e-5)
    assert found.params["step"] == 7
    assert found.fishers[0]["step"] is None
    assert "fisher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": "hard"}, "labels must be one of"),
        ({"labels": "given"}, r"takes batches of \(inputs, labels\)"),
        ({"labels": "sampled"}, "pass key="),
        ({"normalize": "all"}, "normalize must be one of"),
        ({"floor": -1.0}, r"floor must lie in \[0, inf\]"),
        ({"floor_on": "last"}, "floor_on must be one of"),
        ({"chunk": 0}, "chunk must lie in"),
        ({"weights": [0.0, 0.0]}, "weights are all 0"),
        ({"weights": [1.0]}, "weights has 1 values"),
        ({"batches": [[], []]}, r"batches\[0\] has no example"),
        ({"batches": [[np.full((2, WIDTH), np.inf, np.float32)]] * 2}, "Fisher of .* of model 0 is not finite"),
        ({"fishers": [{}, {}]}, "fishers= stands in place"),
        ({"fishers": [{}, {}], "apply_fns": None, "batches": None}, "has shape none"),
    ],
)
def test_refusals(change, said, softmax, inputs):
    base, models = softmax
    arguments = {"apply_fns": logits, "batches": inputs, "base": base, "models": models} | change
    with pytest.raises(tj.MergeError, match=said):
        tj.fisher(**arguments)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_models_stay_arrays_of_jax(dtype, softmax):
    base, models = jax.tree.map(lambda x: x.astype(dtype), softmax)
    given = [jax.tree.map(jnp.ones_like, m) for m in models]

    def merged(models):
        return tj.fisher(None, None, base, models, fishers=given).params

    found = merged(models)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == dtype for leaf in found.values())
    chex.assert_trees_all_close(jax.jit(merged)(models), found, rtol=1e-2)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_given_fishers_are_looked_at(wrong, softmax):
    base, models = softmax
    given = [jax.tree.map(jnp.ones_like, m) for m in models]
    given[1]["bias"] = given[1]["bias"].at[0].set(wrong)
    with pytest.raises(tj.MergeError, match="Fisher of 'bias' holds NaN, infinity or a negative number"):
        tj.fisher(None, None, base, models, fishers=given)
