"""EMR's bundle: a pytree, and the same on disk as in memory."""

import json

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tadrop_jax as tj
from tadrop_jax.errors import CheckpointError, MergeError
from tests.helpers import family, read_model

SHAPES = {"block/kernel": (5, 7), "block/bias": (9,), "scale": ()}


@pytest.fixture(scope="module")
def trees(nest):
    """Base and three models as nested dicts, with an integer buffer and a bfloat16 tensor."""
    base, models = family(3, SHAPES)
    for tree in (base, *models):
        tree["block/bias"] = jnp.asarray(tree["block/bias"], jnp.bfloat16)
        tree["steps"] = np.arange(4, dtype=np.int32)
    return nest(base), [nest(m) for m in models]


@pytest.fixture(scope="module")
def bundle(trees):
    return tj.merge(*trees, tj.emr())


@pytest.fixture(scope="module")
def own(trees, nest):
    """A bundle in which the scale stays each task's own."""
    return tj.merge(*trees, tj.emr(per_task="^scale"))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_is_a_pytree(bundle):
    leaves, treedef = jax.tree.flatten(bundle)
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert (again.shapes, again.tasks) == (bundle.shapes, bundle.tasks)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, bundle)
    np.testing.assert_array_equal(doubled.rescalers, 2 * bundle.rescalers)
    np.testing.assert_array_equal(doubled.unified["block"]["kernel"], 2 * bundle.unified["block"]["kernel"])


def test_goes_through_jit(bundle):
    """A task's parameters inside a user's function; the bundle is an argument, its shapes are static."""
    inside = jax.jit(lambda b: b.task_params(1))(bundle)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(bundle.task_params(1)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2)


@pytest.mark.parametrize("rule", [tj.emr(), tj.tall(), tj.t_switch(0.5), tj.tsv_c(), tj.emr(per_task="^scale")])
def test_the_task_may_be_traced(rule, trees):
    """By vmap, scan and jit; also where a tensor stays each task's own."""
    bundle = tj.merge(*trees, rule)
    wanted = [bundle.task_params(t) for t in range(3)]
    mapped = jax.vmap(bundle.task_params)(jnp.arange(3))
    scanned = jax.lax.scan(lambda carry, t: (carry, bundle.task_params(t)), 0, jnp.arange(3))[1]
    last = jax.jit(lambda b, t: b.task_params(t))(bundle, -1)
    pairs = [(jax.tree.map(lambda leaf, t=t: leaf[t], many), wanted[t]) for many in (mapped, scanned) for t in range(3)]
    for found, ours in (*pairs, (last, wanted[-1])):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-6)


def test_a_traced_task_that_cannot_be(bundle):
    base = {"head": np.ones(2, np.float32), "w": np.ones(3, np.float32)}
    models = [{"head": np.ones(2 + t, np.float32), "w": base["w"] + 1} for t in range(2)]
    own = tj.merge(base, models, tj.emr(per_task="head"))
    with pytest.raises(MergeError, match="'head' is not alike in all tasks"):
        jax.jit(own.task_params)(0)
    with pytest.raises(MergeError, match="a task is a whole number or a name"):
        jax.jit(bundle.task_params)(1.0)


def test_comes_out_of_jit(trees, bundle):
    base, models = trees
    made = jax.jit(lambda b, m: tj.merge(b, m, tj.emr()))(base, models)
    assert made.packed[0].dtype == np.uint8
    for a, b in zip(made.packed, bundle.packed, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(made.rescalers, bundle.rescalers, rtol=1e-6)


def test_the_formula(trees, bundle, flatten):
    """Against NumPy: unified vector, masks, rescalers and parameters."""
    base, models = trees
    stack = flatten(tj.task_vectors(base, models))
    own_sum = unified_sum = 0
    for name, tau in stack.items():
        sign = np.where(tau.sum(axis=0) > 0, 1, -1)
        mask = tau * sign > 0
        unified = sign * np.max(np.where(mask, np.abs(tau), 0), axis=0)
        np.testing.assert_array_equal(flatten(bundle.unified)[name], unified)
        for t in range(3):
            np.testing.assert_array_equal(flatten(bundle.mask(t))[name], mask[t])
        axes = tuple(range(1, tau.ndim))
        own_sum = own_sum + np.abs(tau).mean(axis=axes)
        unified_sum = unified_sum + (mask * np.abs(unified)).mean(axis=axes)
    np.testing.assert_allclose(bundle.rescalers, own_sum / unified_sum, rtol=1e-6)
    for t in range(3):
        params, vector = bundle.task_params(t), bundle.task_vector(t)
        wanted = flatten(base)["block/kernel"] + flatten(vector)["block/kernel"]
        np.testing.assert_allclose(params["block"]["kernel"], wanted, rtol=1e-6)
        assert params["block"]["bias"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params["steps"], base["steps"])


def test_masks_are_packed_row_major(bundle):
    for name, packed, shape in zip(
        ["block/bias", "block/kernel", "scale", "steps"], bundle.packed, bundle.shapes, strict=True
    ):
        if name == "steps":
            assert packed is None
            assert shape is None
            continue
        for t in range(3):
            mask = bundle.mask(t)
            for part in name.split("/"):
                mask = mask[part]
            assert mask.dtype == bool
            assert mask.shape == shape
            bits = np.unpackbits(np.asarray(packed[t]), count=mask.size).astype(bool)
            np.testing.assert_array_equal(np.ravel(mask), bits)


def test_nbytes(trees, bundle):
    base, _ = trees
    floats = [leaf for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    masks = 3 * sum(-(-leaf.size // 8) for leaf in floats)
    wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) + sum(4 * leaf.size for leaf in floats) + masks + 12
    assert bundle.nbytes == wanted


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
@pytest.mark.parametrize("which", ["bundle", "own"])
def test_saved_and_loaded(form, which, tmp_path, trees, request):
    saved = request.getfixturevalue(which)
    saved.save(tmp_path / "bundle", form)
    for like in (None, trees[0]):
        loaded = tj.EMRBundle.load(tmp_path / "bundle", like=like)
        assert loaded.tasks == ("0", "1", "2")
        assert loaded.shapes == saved.shapes
        assert_equal(loaded.rescalers, saved.rescalers)
        for t in range(3):
            assert_equal(loaded.mask(t), saved.mask(t))
            assert_equal(loaded.task_vector(t), saved.task_vector(t))
            assert_equal(loaded.task_params(t), saved.task_params(t))
            assert_equal(loaded.task_params(str(t)), saved.task_params(t))
    if which == "own":
        np.testing.assert_array_equal(loaded.task_params(2)["scale"], trees[1][2]["scale"])


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_tensor_without_entries(form, tmp_path):
    base, model = ({"w": np.full(3, x, np.float32), "none": np.zeros((0, 2), jnp.bfloat16)} for x in (0, 1))
    saved = tj.merge(base, [model], tj.emr())
    saved.save(tmp_path / "bundle", form)
    assert_equal(tj.Bundle.load(tmp_path / "bundle").task_params(0), saved.task_params(0))


def test_names_on_disk(tmp_path, own):
    own.save(tmp_path / "bundle")
    tensors = read_model(tmp_path / "bundle")
    merged = {f"{part}/block/{leaf}" for part in ("unified", "masks", "base") for leaf in ("kernel", "bias")}
    assert set(tensors) - {"base/scale"} == merged | {f"own/{t}/scale" for t in range(3)} | {"base/steps"}
    np.testing.assert_array_equal(tensors["masks/block/kernel"], own.packed[1])
    described = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert described["rescalers"] == [float(r) for r in own.rescalers]


@pytest.mark.parametrize("container", ["frozen", "nnx"])
def test_loaded_in_the_type_of_the_base(container, tmp_path, trees, bundle, flatten):
    base, _ = trees
    like = flax.core.freeze(base) if container == "frozen" else nnx.State(jax.tree.map(nnx.Param, base))
    bundle.save(tmp_path / "bundle")
    loaded = tj.EMRBundle.load(tmp_path / "bundle", like=like)
    params = loaded.task_params(0)
    assert type(params) is type(like)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(bundle.task_params(0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bundle_of_task_vectors(trees, bundle, tmp_path):
    """Without a base: vectors and masks as with it, saved and loaded; parameters are refused."""
    stack = tj.task_vectors(*trees)
    bare = tj.merge_task_vectors(stack, tj.emr())
    bare.save(tmp_path / "bundle")
    for one in (bare, tj.EMRBundle.load(tmp_path / "bundle")):
        assert one.base is None
        np.testing.assert_allclose(one.rescalers, bundle.rescalers, rtol=1e-6)
        vectors, wanted = one.task_vector(1)["block"], bundle.task_vector(1)["block"]
        for name, vector in vectors.items():
            np.testing.assert_allclose(vector, wanted[name], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(one.mask(1)["block"]["kernel"], bundle.mask(1)["block"]["kernel"])
        with pytest.raises(MergeError, match="has no base"):
            one.task_params(0)


def test_task_vectors_that_stay_each_tasks_own(trees, tmp_path):
    stack = tj.task_vectors(*trees)
    bundle = tj.merge_task_vectors(stack, tj.emr(per_task="^scale"))
    bundle.save(tmp_path / "bundle")
    for found in (bundle, tj.Bundle.load(tmp_path / "bundle")):
        for t in range(3):
            np.testing.assert_array_equal(found.task_vector(t)["scale"], stack["scale"][t])
    with pytest.raises(tj.ParameterError, match="nowhere"):
        tj.merge_task_vectors(stack, tj.emr(per_task="nowhere"))


def test_of_tied_weights_one_name_may_stay_each_tasks_own():
    """The other merges, of task vectors as of parameters."""
    trees = [{"copy": w, "kernel": w} for w in np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)]
    base, models, rule = trees[0], trees[1:], tj.emr(per_task="copy")
    found = tj.merge_task_vectors(tj.task_vectors(base, models), rule).task_vector(1)
    np.testing.assert_array_equal(found["copy"], models[1]["copy"] - base["copy"])
    np.testing.assert_array_equal(found["kernel"], tj.merge(base, models, rule).task_vector(1)["kernel"])


def test_buffers_keep_their_dtype_on_disk(tmp_path):
    base = {"w": np.zeros(3, np.float32), "far": np.array([1 << 40]), "wide": np.full(2, 0.1)}
    models = [{**base, "w": np.ones(3, np.float32)} for _ in range(2)]
    bundle = tj.merge(base, models, tj.emr(per_task="wide"))
    bundle.save(tmp_path / "bundle")
    found = tj.Bundle.load(tmp_path / "bundle").task_params(1)
    for name in ("far", "wide"):
        assert found[name].dtype == base[name].dtype
        np.testing.assert_array_equal(found[name], base[name])


def test_a_tree_of_empty_tensors():
    base = {"w": jnp.zeros((0, 3))}
    assert tj.merge(base, [base, base], tj.emr()).task_params(0)["w"].shape == (0, 3)


def test_tasks_that_are_not_there(bundle):
    assert_equal(bundle.task_params(-1), bundle.task_params(2))
    for t in (3, -4):
        with pytest.raises(MergeError, match=f"3 tasks, there is no task {t}"):
            bundle.task_params(t)
    with pytest.raises(MergeError, match="no task 'mnist'"):
        bundle.mask("mnist")


def test_the_dtypes_of_the_base_also_where_jax_has_none():
    base = {"number": 1.0, "wide": np.full(3, 0.5, np.float64)}
    models = [{"number": 2.0, "wide": np.ones(3)}, {"number": 1.0, "wide": np.full(3, 0.25)}]
    found = tj.merge(base, models, tj.emr()).task_params(0)
    assert float(found["number"]) == 2.0
    assert found["wide"].dtype == np.float64
    np.testing.assert_allclose(found["wide"], 1.0)


def test_refusals(bundle, trees, tmp_path):
    with pytest.raises(MergeError, match="'safetensors' or 'orbax', got 'pickle'"):
        bundle.save(tmp_path / "bundle", "pickle")
    with pytest.raises(CheckpointError, match="must be a directory"):
        bundle.save(tmp_path / "bundle.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    for form in ("safetensors", "orbax"):
        with pytest.raises(CheckpointError, match="not empty"):
            bundle.save(tmp_path / "full", form)
    for path in ("absent", "full"):
        with pytest.raises(CheckpointError, match=path):
            tj.EMRBundle.load(tmp_path / path)
    bundle.save(tmp_path / "bundle")
    with pytest.raises(MergeError, match="like="):
        tj.EMRBundle.load(tmp_path / "bundle", like={"other": 0})
    file = tmp_path / "bundle" / "bundle.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="no bundle of version 1"):
        tj.EMRBundle.load(tmp_path / "bundle")
