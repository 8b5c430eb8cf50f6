"""T-Switch, against the formulas of arXiv 2412.00054 and the counts of the authors' code, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed


def side(values: np.ndarray, density: float, empty_side: str) -> float:
    """The smallest magnitude of one side that stays."""
    count = int(len(values) * density)
    if count == 0:
        return 0.0 if empty_side == "keep" and density > 0 else np.inf
    return np.sort(np.abs(values))[::-1][count - 1]


def dropped(tau: np.ndarray, density: float, empty_side: str = "keep") -> np.ndarray:
    high, low = (side(tau[s * tau > 0], density, empty_side) for s in (1, -1))
    keep = ((tau > 0) & (tau >= high)) | ((tau < 0) & (-tau >= low))
    return np.where(keep, tau, 0)


def switched(tau: np.ndarray) -> np.ndarray:
    """Signs times the ratio of norms."""
    if not tau.any():
        return tau
    return np.sign(tau) * np.linalg.norm(tau.astype(np.float64)) / np.linalg.norm(np.sign(tau))


@pytest.mark.parametrize("empty_side", ["keep", "drop"])
@pytest.mark.parametrize(
    ("kind", "density"), [("exact", 0.4), ("normal", [0.9, 0.1, 0.03]), ("normal", 1.0), ("normal", 0.0)]
)
def test_formula(kind, density, empty_side, make_stacks, nest, flatten):
    """Ties, zeros, a zero task vector, scalars, and sides of which the density keeps no entry."""
    stacks = make_stacks(kind, 3)
    bundle = tj.merge_task_vectors(nest(stacks), tj.t_switch(density, empty_side=empty_side))
    for t in range(3):
        vector, mask = flatten(bundle.task_vector(t)), flatten(bundle.mask(t))
        for name, stack in stacks.items():
            wanted = dropped(stack[t], np.broadcast_to(density, 3)[t], empty_side)
            np.testing.assert_array_equal(mask[name], wanted != 0, err_msg=name)
            np.testing.assert_allclose(vector[name], switched(wanted), rtol=1e-6, err_msg=name)


def test_the_count_is_the_authors():
    """``int(0.3 * 10)`` is 3 in float64, where ``floor(10 * float32(0.3))`` would be 3 and the exact product 2.99."""
    tau = np.arange(1, 11, dtype=np.float32)
    for density, count in ((0.3, 3), (0.29, 2), (0.7, 7)):
        bundle = tj.merge_task_vectors({"w": tau[None]}, tj.t_switch(density))
        assert int(bundle.mask(0)["w"].sum()) == count == int(density * 10)


def test_any_sparsifier_takes_the_place_of_the_drop(make_stacks, nest, flatten):
    """As the argument, and before the rule with its own drop off."""
    stacks = nest(make_stacks("normal", 2))
    inside = tj.merge_task_vectors(stacks, tj.t_switch(tj.tadrop()))
    before = tj.merge_task_vectors(stacks, tj.t_switch(None), sparsifier=tj.tadrop())
    sparse = flatten(tj.sparsify(stacks, tj.tadrop()))
    for t in range(2):
        for name, stack in sparse.items():
            np.testing.assert_allclose(flatten(inside.task_vector(t))[name], switched(stack[t]), rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(flatten(before.task_vector(t))[name], flatten(inside.task_vector(t))[name])


@pytest.mark.parametrize("density", [0.4, None])
def test_streamed(density):
    """Bits equal, scales to rounding; blocks with a rest."""
    base, models = family(3)
    rule = tj.t_switch(density)
    found, carries, _ = run_streamed(base, models, rule)
    bundle = tj.merge(base, models, rule)
    for name, parts in zip(sorted(base), bundle.parts, strict=True):
        for bits in ("masks", "signs"):
            np.testing.assert_array_equal(found[name][bits], parts[bits], err_msg=name)
        np.testing.assert_allclose(found[name]["scales"], parts["scales"], rtol=1e-6)
        assert carries[name][-1]["share"].shape == (3,)


def test_a_density_may_be_traced(make_stacks):
    """``vmap`` over densities is a loop over them, for densities exact in float32."""
    stack = {"w": jnp.asarray(make_stacks("normal", 2)["conv/kernel"])}
    densities = jnp.float32([0.0, 0.25, 0.5])

    def vectors(density):
        return tj.merge_task_vectors(stack, tj.t_switch(density)).task_vector(1)["w"]

    together = jax.vmap(vectors)(densities)
    for density, found in zip(densities.tolist(), together, strict=True):
        np.testing.assert_allclose(found, vectors(density), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tj.t_switch(40), r"t_switch: density must lie in \[0, 1\], got 40"),
        (lambda: tj.t_switch(empty_side="no"), "t_switch: empty_side must be one of 'keep', 'drop', got 'no'"),
        (lambda: tj.t_switch(tj.average()), "t_switch takes a density or a sparsifier, not a merge rule"),
        (lambda: tj.merge_task_vectors({"w": np.ones((2, 3))}, tj.t_switch([0.5])), "density has 1 values"),
    ],
)
def test_bad_values(make, said):
    with pytest.raises(tj.MergeError, match=said):
        make()
