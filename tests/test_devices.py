"""Tensors of one tree on different devices, and merges inside the user's own shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tadrop_jax as tj
from tests.helpers import family

SHAPES = {"kernel": (16, 8), "bias": (8,)}
RULES = {"ties": lambda: tj.ties(0.3), "emr": lambda: tj.chain(tj.tadrop(), tj.emr())}


@pytest.fixture(scope="module")
def trees():
    return family(2, SHAPES)


def split(*, over: int):
    """Over the first of the devices, or over as many at the end."""
    devices = jax.devices()[over:] if over < 0 else jax.devices()[:over]
    return NamedSharding(jax.sharding.Mesh(np.array(devices), ("a",)), PartitionSpec("a"))


def of_a_task(merged):
    return merged.task_params(1) if isinstance(merged, tj.Bundle) else merged


@pytest.mark.parametrize("rule", RULES)
def test_tensors_on_different_devices(rule, trees):
    """As in a pipeline; statistics of the tree are of all of them."""
    base, models = trees
    lies = {"kernel": split(over=4), "bias": jax.sharding.SingleDeviceSharding(jax.devices()[5])}
    placed = [jax.device_put(tree, lies) for tree in (base, *models)]
    merged, expected = (of_a_task(tj.merge(b, ms, RULES[rule]())) for b, *ms in (placed, (base, *models)))
    for name, value in merged.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
        assert value.sharding.is_equivalent_to(lies[name], value.ndim), name


def test_matrices_of_one_shape_on_different_devices():
    """A rule that wants whole tensors runs those of one shape together: on each device its own."""
    base, models = family(2, dict.fromkeys("abc", (6, 4)))
    lies = {name: jax.sharding.SingleDeviceSharding(jax.devices()[i // 2]) for i, name in enumerate("abc")}
    placed = [jax.device_put(tree, lies) for tree in (base, *models)]
    merged, expected = (tj.merge(b, ms, tj.iso_c()) for b, *ms in (placed, (base, *models)))
    for name, value in merged.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert value.sharding.device_set == lies[name].device_set, name


@pytest.mark.parametrize("spread", ["base", "models"])
def test_models_on_other_devices_than_the_base(spread, trees):
    (base, models), there, one = trees, split(over=-4), jax.devices()[2]
    expected = tj.merge(base, models, tj.task_arithmetic(0.3))
    base = jax.device_put(base, there if spread == "base" else one)
    models = jax.device_put(models, one if spread == "base" else there)
    merged = tj.merge(base, models, tj.task_arithmetic(0.3))
    for name, value in merged.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
        assert value.sharding.device_set == base[name].sharding.device_set
    assert tj.explain(base, models, tj.tadrop())["kernel"]["sparsity"].shape == (2,)


@pytest.mark.parametrize("rule", [tj.ties(0.3), tj.della_linear(0.5), tj.cabs(20, 40)], ids=["ties", "della", "cabs"])
def test_inside_shard_map(rule, trees):
    """Each device merges what it holds, as if that were all; types say what varies over the mesh."""
    (base, models), lies = trees, split(over=2)
    x, y = (jax.device_put(tree["kernel"], lies) for tree in (base, models[0]))

    def merged(b, m):
        return tj.merge({"w": b}, [{"w": m}, {"w": 2 * m}], rule, key=jax.random.key(0))["w"]

    inside = jax.shard_map(merged, mesh=lies.mesh, in_specs=lies.spec, out_specs=lies.spec)(x, y)
    parts = [merged(b, m) for b, m in zip(np.split(np.asarray(x), 2), np.split(np.asarray(y), 2), strict=True)]
    np.testing.assert_allclose(inside, np.concatenate(parts), rtol=1e-6)

    def third(v):
        return tj.kth_largest_magnitude(v, 3)[None]

    found = jax.shard_map(third, mesh=lies.mesh, in_specs=lies.spec, out_specs=lies.spec)(x)
    np.testing.assert_array_equal(found, [np.sort(np.abs(part), axis=None)[-3] for part in np.split(np.asarray(x), 2)])


def test_promotions_that_the_user_forbids(trees):
    base, models = trees
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        tj.merge(base, [jax.tree.map(jnp.asarray, m) for m in models], tj.ties(0.3))
