"""Controls and candidates of the experiments: the library's pruning, and the budget that they are told to keep."""

import jax
import numpy as np
import pytest

import tadrop_jax as tj
from examples.evidence import arms


@pytest.fixture(scope="module")
def stack():
    """Two task vectors with tails that differ from tensor to tensor; a few ties and zeros."""
    rng = np.random.default_rng(0)
    tree = {
        "heavy": rng.standard_t(2, (2, 40, 30)),
        "normal": rng.normal(size=(2, 30, 40)),
        "flat": rng.uniform(-1, 1, (2, 50, 10)),
        "bias": rng.normal(size=(2, 40)),
        "other": np.round(rng.normal(size=(2, 60)), 1),
    }
    return {name: leaf.astype(np.float32) for name, leaf in tree.items()}


def test_pruning_at_tadrops_shares_is_tadrop(stack):
    ours, theirs = arms.prune(stack, arms.tadrop_shares(stack, 0.75, 0.95)), tj.sparsify(stack, tj.tadrop(0.75, 0.95))
    for name in stack:
        assert np.array_equal(ours[name] != 0, np.asarray(theirs[name]) != 0), name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


@pytest.fixture(scope="module")
def sparse(stack):
    """The same with tensors that a task does not use, and one of which most is zero."""
    tree = {name: leaf.copy() for name, leaf in stack.items()}
    tree["normal"][0] = tree["bias"][1] = 0
    tree["heavy"][:, :30] = 0
    tree["flat"][0, :20] = 0
    return tree


def test_shares_of_nonzero_do_not_see_zeros(stack, sparse):
    ratios = tj.quantile_ratios({"heavy": stack["heavy"][:, 30:]}, q_low=0.75, q_high=0.95)
    found = dict(zip(sorted(sparse), arms.nonzero_shares(sparse, 0.75, 0.95), strict=True))
    np.testing.assert_allclose(found["heavy"], ratios["heavy"], rtol=1e-6)
    assert found["normal"][0] == found["bias"][1] == 0
    with_zeros = dict(zip(sorted(sparse), arms.tadrop_shares(sparse, 0.75, 0.95), strict=True))
    assert (with_zeros["heavy"] < 0.5 * found["heavy"]).all()


def test_zeros_are_no_part_of_the_budget(sparse):
    theirs = tj.sparsify(sparse, tj.tadrop(0.75, 0.95))
    shares = arms.tadrop_shares(sparse, 0.75, 0.95)
    for name, ours in arms.prune(sparse, shares).items():
        assert np.array_equal(ours != 0, np.asarray(theirs[name]) != 0), name
    wanted = sum(np.count_nonzero(np.asarray(leaf).reshape(2, -1), axis=1) for leaf in theirs.values())
    for name, spread in (arms.CONTROLS | arms.CANDIDATES).items():
        pruned = arms.prune(sparse, spread(sparse, shares))
        left = sum(np.count_nonzero(leaf.reshape(2, -1), axis=1) for leaf in pruned.values())
        np.testing.assert_allclose(left, wanted, rtol=0.02, err_msg=name)


@pytest.mark.parametrize("name", [*arms.CONTROLS, *arms.CANDIDATES])
def test_a_spread_keeps_the_budget(stack, name):
    shares = arms.tadrop_shares(stack, 0.75, 0.95)
    spread = (arms.CONTROLS | arms.CANDIDATES)[name](stack, shares)
    np.testing.assert_allclose(arms.budget(stack, spread), arms.budget(stack, shares), atol=2e-3)
    assert all(share.shape == (2,) and np.all((share >= 0) & (share <= arms.LARGEST)) for share in spread)


def test_spreads_spread_as_they_say(stack):
    shares = arms.tadrop_shares(stack, 0.75, 0.95)
    names = sorted(stack)  # the order of jax.tree.leaves
    at = dict(zip(names, shares, strict=True))
    assert np.all(at["heavy"] < at["normal"])
    assert np.all(at["normal"] < at["flat"])
    reversed_ = dict(zip(names, arms.reversed_(stack, shares), strict=True))
    assert np.all(reversed_["heavy"] > reversed_["flat"])
    wide = dict(zip(names, arms.amplified(stack, shares), strict=True))
    assert np.all(wide["flat"] - wide["heavy"] > 2 * (at["flat"] - at["heavy"]))
    energy = arms.prune(stack, arms.equal_energy(stack, shares))
    kept = [
        np.sum(np.where(energy[n] != 0, stack[n], 0) ** 2, (1, 2)) / np.sum(stack[n] ** 2, (1, 2)) for n in names[1:4]
    ]
    np.testing.assert_allclose(kept, kept[:1] * 3, atol=0.01)
    single = arms.prune(stack, arms.one_threshold(stack, shares))
    smallest = [np.min(np.abs(stack[n][0][single[n][0] != 0])) for n in names]
    assert max(smallest) < min(smallest) + 0.1
    grown = arms.scaled_only(stack, arms.prune(stack, shares))
    assert all(np.all(np.abs(grown[n]) >= np.abs(stack[n])) for n in names)
    assert jax.tree.structure(grown) == jax.tree.structure(stack)


def test_dominance_has_tadrops_budget(stack):
    shares = arms.tadrop_shares(stack, 0.75, 0.95)
    pruned = tj.sparsify(stack, tj.dominance(arms.dominance_shares(stack, shares)))
    kept = [np.concatenate([np.asarray(pruned[n][t] != 0).ravel() for n in stack]) for t in range(2)]
    most = np.minimum(arms.budget(stack, shares), 0.5)  # of two tasks, one is the larger
    np.testing.assert_allclose([1 - k.mean() for k in kept], most, atol=0.01)
