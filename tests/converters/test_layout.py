"""A merge gives the same weights before and after conversion, wherever the mapping is one to one."""

import jax
import numpy as np
import pytest
from flax import nnx

import converters
import tadrop_jax as tj
from converters.mapping import Row, flatten, nest, places
from converters.names import Origin
from converters.vit import Config, ViTForImageClassification

NAME = "ViTForImageClassification"
CONFIG = Config(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_channels=3,
)
MODULE = ViTForImageClassification(CONFIG, rngs=nnx.Rngs(0))
ROWS = converters.vit.table(CONFIG, NAME)


def trees(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    state = nnx.to_pure_dict(nnx.state(MODULE, nnx.Param))
    return nest({p: rng.normal(size=leaf.shape).astype(np.float32) for p, leaf in flatten(state).items()})


FLAX = [trees(seed) for seed in range(3)]
TORCH = [converters.to_torch(tree, ROWS) for tree in FLAX]
# Few tensors: each shape is compiled.
KERNEL = r"intermediate\Wdense\W(weight|kernel)"
CONVOLUTION = r"projection\W(weight|kernel)"

METHODS = {
    "dare": (tj.average(), lambda: tj.dare(0.5)),
    "della": (tj.average(), lambda: tj.della(0.5, 0.2)),
    "n_m": (tj.average(), lambda: tj.n_m(2, 4)),
    "tadrop": (tj.task_arithmetic(0.4), tj.tadrop),
    "wudi": (tj.wudi(steps=3), lambda: None),
    "iso_c": (tj.iso_c(), lambda: None),
}


def merged(models, rule, sparsifier, layout, include=KERNEL):
    base, *models = models
    key = jax.random.key(3)
    return tj.merge(base, models, rule, sparsifier=sparsifier, include=include, layout=layout, key=key)


@pytest.mark.parametrize(("name", "include"), [*((name, KERNEL) for name in METHODS), ("n_m", CONVOLUTION)])
def test_before_or_after_conversion(name, include):
    rule, sparsifier = METHODS[name][0], METHODS[name][1]()
    before = merged(TORCH, rule, sparsifier, None, include)
    after = converters.to_torch(merged(FLAX, rule, sparsifier, converters.layout(MODULE), include), ROWS)
    assert after.keys() == before.keys()
    for tensor, want in before.items():
        np.testing.assert_allclose(after[tensor], want, rtol=1e-5, atol=1e-6, err_msg=tensor)
        np.testing.assert_array_equal(after[tensor] == TORCH[0][tensor], want == TORCH[0][tensor], err_msg=tensor)


def test_without_the_layout_the_mask_is_another():
    before = merged(TORCH, tj.average(), tj.dare(0.5), None)
    after = converters.to_torch(merged(FLAX, tj.average(), tj.dare(0.5), None), ROWS)
    kernel = "vit.encoder.layer.0.intermediate.dense.weight"
    assert not np.array_equal(before[kernel], after[kernel])


def test_a_pair_is_a_layout():
    w, turned = np.arange(6, dtype=np.float32).reshape(2, 3), (1, 0)
    for given in (("w.weight", turned), tj.Layout("w.weight", turned)):
        out = tj.merge(
            {"w": 0 * w.T},
            [{"w": w.T}],
            tj.average(),
            sparsifier=tj.dare(0.5),
            layout={"w": given},
            key=jax.random.key(0),
        )
        plain = tj.merge(
            {"w.weight": 0 * w}, [{"w.weight": w}], tj.average(), sparsifier=tj.dare(0.5), key=jax.random.key(0)
        )
        np.testing.assert_array_equal(out["w"].T, plain["w.weight"])
    vector = tj.merge(
        {"b": np.zeros(8, np.float32)},
        [{"b": np.ones(8, np.float32)}],
        tj.average(),
        sparsifier=tj.dare(0.5),
        layout={"b": ("w.bias", None)},
        key=jax.random.key(0),
    )
    assert vector["b"].shape == (8,)
    with pytest.raises(tj.MergeError, match="permutation of its 2 axes"):
        tj.merge({"w": w}, [{"w": w + 1}], tj.average(), layout={"w": ("w", (0, 0))})


def test_what_is_fused_is_told():
    rows = [Row("in_proj", ("q/kernel", "k/kernel"), converters.Transform.LINEAR), *ROWS]
    assert converters.fused(rows) == {"in_proj": ("q/kernel", "k/kernel")}
    assert converters.fused(rows, ["q/kernel", "k/kernel"]) == converters.fused(rows)
    assert converters.fused(rows, ["q/bias"]) == {}
    assert converters.fused(MODULE) == {}
    assert converters.layout(rows)("k/kernel") == ("k/kernel", (1, 0))
    assert converters.layout(MODULE)("classifier/bias") == ("classifier.bias", None)


def test_names_are_those_of_the_file():
    module, _ = nnx.split(MODULE)
    module = nnx.merge(module, nnx.state(MODULE))
    module.origin = Origin(NAME, names=(("classifier.bias", "head.bias"),))
    assert converters.layout(module)("classifier/bias") == ("head.bias", None)
    found = places(["classifier/bias"], [Row("classifier/bias", "classifier/bias")], ROWS, {"classifier.bias": "b"})
    assert found == {"classifier/bias": ("b", None)}


def test_regmean_before_or_after_conversion():
    """Its kernels lie (in, out) in Flax; the layout tells which of PyTorch's lie (out, in)."""
    path = "vit/encoder/layer/0/intermediate/dense/kernel"
    name, order = converters.layout(MODULE)(path)
    assert order == (1, 0)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(20, 8)).astype(np.float32) for _ in range(2)]
    grams = [x.T @ x / len(x) for x in inputs]
    before = tj.regmean(
        None, None, TORCH[0], TORCH[1:], grams=[{name: g} for g in grams], include=KERNEL, out_in=[f"^{name}$"]
    )
    after = tj.regmean(None, None, FLAX[0], FLAX[1:], grams=[{path: g} for g in grams], include=KERNEL)
    found = converters.to_torch(after.params, ROWS)
    np.testing.assert_allclose(found[name], before.params[name], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(found[name], TORCH[0][name])


def test_places_of_a_tree_with_names_of_its_own():
    """What is turned on the way to the module and again on the way to PyTorch is turned by both."""
    conv, linear = converters.Transform.CONV, converters.Transform.LINEAR
    file = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    rows = [Row("old/conv", "conv", conv), Row("old/a", "a", linear), Row("old/b", "b"), Row("old/f", ("q", "k"))]
    table = [Row("t.conv", "conv", conv), Row("t.a", "a"), Row("t.b", "b", linear)]
    found = places(["old/conv", "old/a", "old/b", "old/f", "other"], rows, table)
    assert found == {"old/conv": ("t.conv", (0, 1, 2, 3)), "old/a": ("t.a", (1, 0)), "old/b": ("t.b", (1, 0))}
    module = converters.to_flax({"old/conv": file}, rows)
    np.testing.assert_array_equal(converters.to_torch(module, table)["t.conv"], file.transpose(found["old/conv"][1]))
