"""What every kind of per-task bundle does alike: interface, round trip, sizes. Parametrised from the registry."""

import math

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tadrop_jax as tj
from tadrop_jax import registry
from tadrop_jax.cli import main
from tadrop_jax.errors import CheckpointError
from tests.helpers import DTYPES, family, merge, read_model, report_of, save_family, save_model

pytestmark = pytest.mark.optimised

KINDS = [m.name for m in registry.METHODS.values() if m.output == "one model per task"]
SHAPES = {"block/bias": (33,), "block/kernel": (7, 5), "head": (3, 5), "scale": ()}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def trees(nest):
    """Base and three models: an integer buffer, bfloat16 tensors, and a head that stays each task's own."""
    base, models = family(3, SHAPES)
    for tree in (base, *models):
        for name in ("block/bias", "block/kernel"):
            tree[name] = jnp.asarray(tree[name], jnp.bfloat16)
        tree["steps"] = np.arange(4, dtype=np.int32)
    return nest(base), [nest(m) for m in models]


@pytest.fixture(scope="module")
def bundles(trees):
    return {kind: tj.merge(*trees, registry.build(kind, {"per_task": ("^head",)})) for kind in KINDS}


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


@every_kind
def test_task_params(kind, bundles, trees):
    """Type and dtypes of the base; own head; base plus task vector in float32, rounded once."""
    base, models = trees
    for t in (0, "2"):
        params, vector = bundles[kind].task_params(t), bundles[kind].task_vector(t)
        assert jax.tree.structure(params) == jax.tree.structure(base)
        assert_equal(params["head"], models[int(t)]["head"])
        assert_equal(params["steps"], base["steps"])
        assert vector["head"] is vector["steps"] is None
        assert vector["block"]["kernel"].dtype == jnp.float32
        wanted = (np.asarray(base["block"]["kernel"], np.float32) + vector["block"]["kernel"]).astype(jnp.bfloat16)
        assert_equal(params["block"]["kernel"], wanted)


@every_kind
def test_goes_through_jit(kind, bundles, trees):
    """As an argument and as a result: kind, shapes and names are static."""
    bundle = bundles[kind]
    assert jax.tree.structure(bundle) == jax.tree.structure(jax.tree.map(lambda x: x, bundle))
    inside = jax.jit(lambda b: b.task_params(1))(bundle)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(bundle.task_params(1)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-5)


@every_kind
@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_round_trip(kind, form, bundles, trees, tmp_path):
    """Bit for bit, with names and without, in the container of the base."""
    saved, base = bundles[kind], trees[0]
    saved.save(tmp_path / "bundle", form)
    assert_equal(tj.Bundle.load(tmp_path / "bundle"), saved)
    likes = (flax.core.freeze(base), nnx.State(jax.tree.map(nnx.Param, base)))
    for like in likes if form == "safetensors" else likes[:1]:
        loaded = tj.Bundle.load(tmp_path / "bundle", like=like)
        assert (loaded.kind, loaded.tasks, loaded.shapes) == (saved.kind, ("0", "1", "2"), saved.shapes)
        params = loaded.task_params("1")
        assert type(params) is type(like)
        assert jax.tree.structure(params) == jax.tree.structure(like)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved.task_params(1)), strict=True):
            np.testing.assert_array_equal(a, b)


@every_kind
def test_without_a_base(kind, trees, tmp_path):
    bare = tj.merge_task_vectors(tj.task_vectors(*trees), registry.build(kind, {}))
    bare.save(tmp_path / "bundle")
    loaded = tj.Bundle.load(tmp_path / "bundle")
    assert_equal(loaded, bare)
    assert_equal(loaded.task_vector(2), bare.task_vector(2))
    report = bare.size_report()
    assert report["parts_bytes"]["base"] == 0
    assert report["full_models_bytes"] == 3 * 4 * sum(math.prod(s) for s in SHAPES.values())


@every_kind
def test_size_report(kind, bundles, trees):
    report = bundles[kind].size_report()
    assert report["bundle_bytes"] == bundles[kind].nbytes == sum(report["parts_bytes"].values())
    assert report["full_models_bytes"] == 3 * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(trees[0]))
    entries = {n: math.prod(s) for n, s in SHAPES.items() if n != "head"}
    bits = 3 * sum(-(-n // 8) for n in entries.values())
    wanted = {
        "emr": {"unified": 4 * sum(entries.values()), "masks": bits, "scalars": 12},
        "tall": {"unified": 4 * sum(entries.values()), "masks": bits, "scalars": 12},
        "t_switch": {"masks": bits, "signs": bits, "scales": 3 * 4 * len(entries), "scalars": 0},
        "tsv_c": {"u": 3 * 4 * 7, "s": 3 * 4, "vt": 3 * 4 * 5, "vectors": 3 * 4 * 34, "scalars": 0},
    }[kind]
    assert wanted.items() <= report["parts_bytes"].items()
    assert report["parts_bytes"]["own"] == 3 * 4 * 15


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_disk_as_in_memory(kind, dtype, tmp_path):
    """``tadrop merge``, ``tadrop task``, ``load`` and the merge in memory are one."""
    base, models = save_family(tmp_path, 2, SHAPES, DTYPES[dtype], config={"model_type": "vit"})
    assert merge(tmp_path, "--set", "per_task=^head", method=kind) == 0
    bundle = tj.Bundle.load(tmp_path / "out", like=base)
    wanted = tj.merge(base, models, registry.build(kind, {"per_task": ("^head",)}))
    assert (bundle.kind, bundle.tasks) == (wanted.kind, ("m0", "m1"))
    step = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
    for t, task in enumerate(bundle.tasks):
        for name, vector in wanted.task_vector(t).items():
            if vector is not None:
                np.testing.assert_allclose(bundle.task_vector(t)[name], vector, rtol=1e-5, atol=2e-6, err_msg=name)
        assert main(["task", str(tmp_path / "out"), "--task", task, "--out", str(tmp_path / f"of {task}")]) == 0
        written, params = read_model(tmp_path / f"of {task}"), bundle.task_params(task)
        assert written.keys() == base.keys()
        for name, value in written.items():
            assert value.dtype == base[name].dtype
            if bundle.kind.elementwise:
                np.testing.assert_array_equal(value, params[name], err_msg=name)
            numbers = (np.asarray(v, np.float32) for v in (value, params[name]))
            np.testing.assert_allclose(*numbers, rtol=step, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(written["head"], models[t]["head"])
    report = report_of(tmp_path / "out")
    if kind == "tsv_c":
        told = {"treated": "matrix", "rank": 2, "of_rank": 5}
        assert told.items() <= report["tensors"]["block/kernel"].items()
        assert report["tensors"]["block/bias"]["treated"] == "kept whole"
    size = report["size"]
    sizes = bundle.size_report()["parts_bytes"]
    assert size["parts_bytes"] == {n: b for n, b in sizes.items() if n != "scalars"}
    assert size["bundle_bytes"] == sum(size["parts_bytes"].values())


@every_kind
def test_one_task_and_a_zero_task_vector(kind):
    base, models = family(1, SHAPES)
    alone = tj.merge(base, models, registry.build(kind, {}))
    assert all(np.isfinite(v).all() for v in alone.task_params(0).values())
    same = tj.merge(base, [*models, base], registry.build(kind, {}))
    for name, value in same.task_params(1).items():
        np.testing.assert_array_equal(value, base[name], err_msg=name)


def test_bundles_of_version_1_without_names(tmp_path):
    """What was written before there were other kinds: EMR, and no list of names."""
    base, models = family(2, SHAPES)
    wanted = tj.merge(base, models, tj.emr())
    tensors = {f"base/{n}": v for n, v in base.items()}
    for name, parts in zip(sorted(base), wanted.parts, strict=True):
        tensors |= {f"unified/{name}": np.asarray(parts["unified"]), f"masks/{name}": np.asarray(parts["masks"])}
    save_model(tmp_path / "old", tensors)
    (tmp_path / "old" / "bundle.json").write_text(
        '{"format": "tadrop-bundle", "version": 1, "method": "emr", "tasks": ["a", "b"], "shapes": '
        f'{ {n: list(v.shape) for n, v in base.items()} }, "rescalers": {wanted.rescalers.tolist()}}}'.replace("'", '"')
    )
    assert_equal(tj.EMRBundle.load(tmp_path / "old", like=base).task_params("b"), wanted.task_params(1))


def test_kinds_that_are_not_in_the_registry(tmp_path):
    """A user's own rule and kind: differences rounded to 8 bits, a scale a tensor and task."""

    def parts(shape, tasks):
        return {"steps": tj.Part((tasks, *shape), "tasks and entries"), "size": tj.Part((tasks,), "tasks", "float32")}

    def apply(x, carry):
        return {"steps": jnp.round(x.stack / x.column(carry["top"])), "size": carry["top"]}

    kind = tj.Kind("eighths", parts, lambda xp, parts, scalars: parts["steps"] * parts["size"])
    top = tj.Max(lambda x, carry, n: {"top": jnp.abs(x.stack) / 8})
    base, models = family(2, SHAPES)
    bundle = tj.merge(base, models, tj.Step(apply, (top,), output="bundle", kind=kind))
    bundle.save(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="no bundle of method 'eighths'"):
        tj.Bundle.load(tmp_path / "bundle")
    assert_equal(tj.Bundle.load(tmp_path / "bundle", base, kind), bundle)
    with pytest.raises(tj.ParameterError, match="has a kind of bundle exactly if"):
        tj.Step(apply, output="bundle")
