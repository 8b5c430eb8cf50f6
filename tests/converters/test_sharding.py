"""A module of each family on a mesh: its rules cut its kernels, and it gives what it gives on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import converters
from converters import families
from converters.loading import abstract
from converters.mapping import flatten
from tests.converters.test_trust import case

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.array([[3, 5, 9, 1], [2, 7, 8, 10]])
# One architecture with all that its family has, and what it is called with.
CALLED = {
    "GPT2LMHeadModel": (TOKENS,),
    "ViTForImageClassification": (IMAGES,),
    "timm/VisionTransformerDistilled": (IMAGES,),
    "BeitForImageClassification": (IMAGES,),
    "CLIPModel": (TOKENS, IMAGES),
    "torchscale/BEiT3ForRetrieval": (TOKENS, IMAGES),
}


def test_every_family_is_here():
    packages = {families.architecture(name).package for name in CALLED}
    assert packages == {entry.package for entry in families.ARCHITECTURES.values()}


@pytest.mark.parametrize("name", CALLED)
def test_a_mesh_changes_nothing(name):
    chosen = case(name)
    graph, state = nnx.split(abstract(chosen.package, chosen.config, chosen.entry))
    state = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape) * 0.3, jnp.float32), state)
    module = nnx.merge(graph, state)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = converters.shard(module, mesh)

    cut = {path for path, leaf in flatten(placed).items() if not leaf.sharding.is_fully_replicated}
    wide = {p for p, leaf in flatten(module).items() if p.endswith("kernel") and leaf.ndim == 2 and leaf.size > 32}
    assert wide <= cut
    for path, leaf in flatten(placed).items():
        assert "data" not in leaf.sharding.spec, path
    assert all(len(leaf.sharding.device_set) == 1 for leaf in flatten(module).values())

    run = nnx.jit(lambda module, inputs: module(*inputs))
    batches = [jax.device_put(inputs, NamedSharding(mesh, P("data"))) for inputs in CALLED[name]]
    got, want = run(placed, batches), run(module, [jnp.asarray(inputs) for inputs in CALLED[name]])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
