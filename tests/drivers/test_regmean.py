"""RegMean against the authors' formula and the least-squares optimum; inputs of Linen and nnx layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tadrop_jax as tj

from .conftest import HIDDEN, TASKS, WIDTH, mlp


def capture(params, x):
    """The inputs of both layers of the toy model."""
    hidden = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"])
    return {"one/kernel": x, "two/kernel": hidden}


def layer_inputs(model, batches):
    """The same in NumPy, all batches together."""
    x = np.concatenate(batches).astype(np.float64)
    layer = {n: np.asarray(v, np.float64) for n, v in model["one"].items()}
    return {"one": x, "two": np.tanh(x @ layer["kernel"] + layer["bias"])}


def regmean(kernels, inputs, weights, scale):
    """dataless-model-merging, regmean_mean_params, in float64: kernels (in, out), one for each task."""
    total, right = 0, 0
    for kernel, x, weight in zip(kernels, inputs, weights, strict=True):
        gram = x.T @ x / len(x)
        gram = weight * (scale * gram + (1 - scale) * np.diag(np.diag(gram)))
        total = total + gram
        right = right + gram @ np.asarray(kernel, np.float64)
    return np.linalg.inv(total) @ right


@pytest.mark.parametrize(("scale", "weights"), [(0.9, (1, 1)), (0.6, (1, 3))])
def test_the_authors_formula(trees, inputs, scale, weights):
    base, models = trees
    found = tj.regmean(capture, inputs, base, models, scale=scale, weights=weights, ridge=0.0)
    seen = [layer_inputs(m, b) for m, b in zip(models, inputs, strict=True)]
    for layer in ("one", "two"):
        expected = regmean([m[layer]["kernel"] for m in models], [s[layer] for s in seen], weights, scale)
        np.testing.assert_allclose(found.params[layer]["kernel"], expected, rtol=1e-4, atol=1e-5)
        mean = np.average([m[layer]["bias"] for m in models], axis=0, weights=weights)
        np.testing.assert_allclose(found.params[layer]["bias"], mean, rtol=1e-5, atol=1e-6)
    assert found.params["step"] == 7
    gram = seen[1]["two"].T @ seen[1]["two"] / 12
    np.testing.assert_allclose(found.grams[1]["two/kernel"], gram, rtol=1e-4, atol=1e-6)
    again = tj.regmean(None, None, base, models, grams=found.grams, scale=scale, weights=weights, ridge=0.0)
    chex.assert_trees_all_equal(again.params, found.params)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of what fusion_bench imports
def test_fusion_bench(trees, inputs):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("fusion_bench.method.regmean.regmean", exc_type=ImportError)
    base, models = trees
    found = tj.regmean(capture, inputs, base, models, scale=0.6, ridge=0.0)
    values = {
        f"{layer}.{theirs}": [torch.tensor(np.array(m[layer][ours].T)) for m in models]
        for layer in ("one", "two")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    grams = [{n.removesuffix("/kernel"): torch.tensor(np.array(g)) for n, g in own.items()} for own in found.grams]
    theirs = peer.merging_with_regmean_weights(values, grams, 0.6)
    for layer in ("one", "two"):
        np.testing.assert_allclose(found.params[layer]["kernel"].T, theirs[f"{layer}.weight"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.params[layer]["bias"], theirs[f"{layer}.bias"], rtol=1e-5, atol=1e-6)


def test_least_squares_optimum(inputs):
    """Unscaled, it is what lstsq finds for the outputs of all tasks together."""
    rng = np.random.default_rng(5)
    base, *models = ({"kernel": rng.normal(size=(WIDTH, 3)).astype(np.float32)} for _ in range(3))
    found = tj.regmean(lambda p, x: {"kernel": x}, inputs, base, models, scale=1.0, ridge=0.0)
    x = [np.concatenate(b).astype(np.float64) for b in inputs]
    y = [one @ m["kernel"] for one, m in zip(x, models, strict=True)]
    expected = np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0]
    np.testing.assert_allclose(found.params["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_pytorch_layout(trees, inputs):
    """Kernels that lie (out, in) give the transposed result; so do kernels of several axes, flattened."""
    base, models = trees
    found = tj.regmean(capture, inputs, base, models)

    def turned(tree):
        one, two = tree["one"], tree["two"]
        return tree | {
            "one": {"kernel": one["kernel"].T, "bias": one["bias"]},
            "two": {"kernel": two["kernel"].reshape(HIDDEN, 3, 1), "bias": two["bias"]},
        }

    other = tj.regmean(None, None, turned(base), [turned(m) for m in models], grams=found.grams, out_in="^one/kernel")
    chex.assert_trees_all_close(other.params, turned(found.params), rtol=1e-6)


def test_directions_without_inputs_get_the_mean(trees):
    """An input that is always 0 has a singular Gram matrix; the ridge gives its weights the mean."""
    base, models = trees
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    x[:, 0] = 0
    found = tj.regmean(capture, [[x], [x]], base, models, weights=[1.0, 3.0])
    mean = (models[0]["one"]["kernel"] + 3 * models[1]["one"]["kernel"]) / 4
    np.testing.assert_allclose(found.params["one"]["kernel"][0], mean[0], rtol=1e-3, atol=1e-4)
    silent = tj.regmean(capture, [[0 * x], [0 * x]], base, models, weights=[1.0, 3.0], include="one")
    np.testing.assert_allclose(silent.params["one"]["kernel"], mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(tj.MergeError, match="one/kernel' is singular in float32: raise ridge"):
        tj.regmean(capture, [[x], [x]], base, models, scale=1.0, ridge=0.0)


class Linen(linen.Module):
    """A layer that runs twice, and one that contracts two axes."""

    @linen.compact
    def __call__(self, x):
        square = linen.Dense(WIDTH, name="square")
        x = square(jnp.tanh(square(x)))
        x = linen.DenseGeneral((2, 3), name="heads")(x)
        return linen.DenseGeneral(3, axis=(-2, -1), name="out")(jnp.tanh(x))


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.square = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.heads = nnx.LinearGeneral(WIDTH, (2, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = self.square(jnp.tanh(self.square(x)))
        return self.out(jnp.tanh(self.heads(x)))


def test_inputs_of_linen_and_nnx_layers(inputs):
    model = Linen()
    params = [model.init(jax.random.key(i), inputs[0][0])["params"] for i in range(TASKS + 1)]
    captured = tj.linen_inputs(model)
    grams = tj.gram_matrices(captured, params[0], inputs[0])
    assert {n: g.shape for n, g in grams.items()} == {
        "square/kernel": (4, 4),
        "heads/kernel": (4, 4),
        "out/kernel": (6, 6),
    }
    x = np.concatenate(inputs[0])
    square = params[0]["square"]
    both = np.concatenate([x, np.tanh(x @ square["kernel"] + square["bias"])])
    np.testing.assert_allclose(grams["square/kernel"], both.T @ both / len(both), rtol=1e-5, atol=1e-6)

    module = Nnx(nnx.Rngs(0))
    apply, state = tj.nnx_apply(module)

    def filled(tree):
        leaves = [tree[layer][part] for layer in sorted(tree) for part in sorted(tree[layer])]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    states = [filled(tree) for tree in params]
    np.testing.assert_allclose(apply(states[0], x), model.apply({"params": params[0]}, x), rtol=1e-5, atol=1e-6)
    ours = tj.regmean(captured, inputs, params[0], params[1:])
    theirs = tj.regmean(tj.nnx_inputs(module), inputs, states[0], states[1:])
    assert isinstance(theirs.params, nnx.State)
    chex.assert_trees_all_close(jax.tree.leaves(theirs.params), jax.tree.leaves(ours.params), rtol=1e-5, atol=1e-6)
    assert type(module.square) is nnx.Linear  # the user's module is left alone


def test_axes_of_a_kernel_lie_as_those_of_the_inputs():
    """Flax sorts the axes that a layer contracts: their order says nothing of the kernel's."""
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    model = linen.DenseGeneral(4, axis=(-1, -2))
    flat = x.reshape(5, 6)
    found = tj.gram_matrices(tj.linen_inputs(model), model.init(jax.random.key(0), x), [x])
    np.testing.assert_allclose(found["kernel"], flat.T @ flat / 5, rtol=1e-5, atol=1e-6)
    module = nnx.LinearGeneral((2, 3), 4, axis=(-1, -2), rngs=nnx.Rngs(0))
    found = tj.gram_matrices(tj.nnx_inputs(module), tj.nnx_apply(module)[1], [x])
    np.testing.assert_allclose(found["kernel"], flat.T @ flat / 5, rtol=1e-5, atol=1e-6)


def test_inputs_may_be_given_by_their_name():
    class Named(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3, name="named")(inputs=x)

    x = np.ones((2, 4), np.float32)
    assert list(tj.linen_inputs(Named())(Named().init(jax.random.key(0), x), x)) == ["named/kernel"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": 1.5}, r"scale must lie in \[0, 1\]"),
        ({"ridge": -1.0}, r"ridge must lie in \[0, inf\]"),
        ({"out_in": "nothing"}, "matches none of"),
        ({"capture_fns": lambda p, x: {}}, "gave no inputs of a linear layer"),
        ({"capture_fns": lambda p, x: {"three/kernel": x}}, "inputs for 'three/kernel', but no such tensor"),
        ({"capture_fns": lambda p, x: {"two/kernel": x}}, r"shape \[4, 4\], which does not fit the kernel \[5, 3\]"),
        ({"out_in": "one"}, r"'one/kernel' .* kernel \[4, 5\] read as \(out, in\)"),
        ({"capture_fns": [capture, lambda p, x: {"one/kernel": x}]}, "'two/kernel' has a Gram matrix for some tasks"),
        ({"batches": [[], []]}, "gave no inputs"),
        ({"grams": [{}, {}]}, "grams= stands in place"),
        ({"grams": {}, "capture_fns": None, "batches": None}, "grams must be a list, one dictionary per task"),
    ],
)
def test_refusals(change, said, trees, inputs):
    base, models = trees
    arguments = {"capture_fns": capture, "batches": inputs, "base": base, "models": models} | change
    with pytest.raises(tj.MergeError, match=said):
        tj.regmean(**arguments)


def test_it_keeps_outputs_closer_than_the_mean(trees, inputs):
    base, models = trees
    found = tj.regmean(capture, inputs, base, models, progress=False)
    mean = tj.merge(base, models, tj.average())

    def error(params):
        return sum(
            float(jnp.mean((x @ (params["one"]["kernel"] - m["one"]["kernel"])) ** 2))
            for m, batches in zip(models, inputs, strict=True)
            for x in batches
        )

    assert error(found.params) < error(mean)
    assert mlp(found.params, inputs[0][0]).shape == (6, 3)


def test_a_tied_kernel_goes_by_any_of_its_names():
    def tree(value):
        shared = jnp.full((2, 2), value)
        return {"embed": shared, "head": shared}

    base, models = tree(0.0), [tree(1.0), tree(3.0)]
    x = [[jnp.array([[1.0, 0.0]])], [jnp.array([[0.0, 1.0]])]]  # each task sees one input

    def merged(capture, **options):
        return tj.regmean(capture, x, base, models, ridge=0.0, **options)

    first, second = merged(lambda p, x: {"embed": x}), merged(lambda p, x: {"head": x})
    assert first.params["head"].tolist() == [[1.0, 1.0], [3.0, 3.0]]
    chex.assert_trees_all_equal(second.params, first.params)
    turned = merged(lambda p, x: {"head": x}, out_in="head").params
    np.testing.assert_array_equal(turned["embed"], first.params["embed"].T)
    both = merged(lambda p, x: {"embed": x, "head": 2 * x})
    np.testing.assert_array_equal(both.grams[0]["embed"], [[2.5, 0.0], [0.0, 0.0]])
    with pytest.raises(tj.MergeError, match="'head' and 'embed' are tied: give one Gram matrix for both"):
        tj.regmean(None, None, base, models, grams=[{"embed": jnp.eye(2), "head": jnp.eye(2)}] * 2)
