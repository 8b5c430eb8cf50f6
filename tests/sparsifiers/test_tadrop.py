"""TADrop's mappings from ratio to sparsity; the rest is in `tests/test_sparsifiers_against_oracles.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles

TASKS = 3
# Powers of two, so that rounding does not move a rank.
MAPPINGS = {
    "affine": ("affine:0.5,0.25", lambda r: np.float32(0.5) * r + np.float32(0.25)),
    "affine_above_1": ("affine:2,0.5", lambda r: np.float32(2) * r + np.float32(0.5)),
    "affine_below_0": ("affine:-1,0.25", lambda r: np.float32(0.25) - r),
    "power": ("power:2", lambda r: r * r),
    "root": ("power:0.5", np.sqrt),
    "function": (lambda r: jnp.where(r < 0.5, 0.125, 0.75), lambda r: np.float32(0.125 if r < 0.5 else 0.75)),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_mapping(name, make_stacks, nest, flatten):
    ours, theirs = MAPPINGS[name]
    step = tj.tadrop(mapping=ours, s_max=0.75)
    for kind in ("exact", "normal"):
        stacks = {k: v for k, v in make_stacks(kind, TASKS).items() if k in ("block/bias", "block/kernel")}
        out = flatten(tj.sparsify(nest(stacks), step))
        for tensor, expected in oracles.tadrop(stacks, mapping=theirs, s_max=0.75).items():
            np.testing.assert_array_equal(out[tensor] != 0, expected != 0, err_msg=tensor)
            np.testing.assert_allclose(out[tensor], expected, rtol=1e-5, atol=1e-6, err_msg=tensor)


@pytest.mark.optimised
@pytest.mark.parametrize("mapping", ["affine:0.3,0.1", "affine:-0.7,0.9", "power:3", "power:0.5"])
def test_ranks_are_alike_compiled_or_not(mapping):
    """Compiled in memory, not compiled from files: where XLA fuses or rewrites the map, large tensors tell."""
    ratios = np.random.default_rng(0).random(1000, np.float32)
    found = {"low": jnp.asarray(ratios), "high": jnp.ones(1000)}
    cut = tj.tadrop(mapping=mapping).stages[1].at
    ranks = [at(found)["cut"] for at in (lambda c: cut(1 << 40, c), jax.jit(lambda c: cut(1 << 40, c)))]
    for eager, compiled in zip(*ranks, strict=True):
        np.testing.assert_array_equal(eager, compiled)


@pytest.mark.parametrize("mapping", ["affine:0.5", "affine:a,b", "power", "power:1,2", "identity:1", "square", ""])
def test_unknown_mappings_are_refused(mapping):
    with pytest.raises(tj.ParameterError, match="tadrop: mapping must be 'identity', 'affine:SLOPE,OFFSET'"):
        tj.tadrop(mapping=mapping)


@pytest.mark.parametrize("mapping", ["affine:nan,1", "affine:inf,-inf", "power:nan", "affine:1,1e39"])
def test_mappings_are_of_finite_numbers(mapping):
    with pytest.raises(tj.ParameterError, match="tadrop: mapping must be a finite number of float32, got "):
        tj.tadrop(mapping=mapping)
