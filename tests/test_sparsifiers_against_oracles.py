"""Every sparsifier against its plain NumPy transcription."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax.sparsifiers.n_m import group_counts
from tests import oracles

TASKS = 5


@pytest.fixture(params=["exact", "normal"])
def stacks(request, make_stacks):
    return make_stacks(request.param, TASKS)


def assert_same_stacks(actual: dict, expected: dict) -> None:
    """The same entries are zero, exactly; the values agree to rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == np.float32, name
        assert actual[name].shape == value.shape, name
        np.testing.assert_array_equal(actual[name] != 0, value != 0, err_msg=name)
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# Sparsifiers: name -> (a function that makes ours, the oracle)

SPARSIFIERS = {
    "tadrop": (lambda: tj.tadrop(), oracles.tadrop),
    "tadrop_l1": (
        lambda: tj.tadrop(q_low=0.5, q_high=0.9, norm=1),
        lambda x: oracles.tadrop(x, q_low=0.5, q_high=0.9, norm=1),
    ),
    "tadrop_no_norm": (lambda: tj.tadrop(norm=None), lambda x: oracles.tadrop(x, norm=None)),
    "tadrop_s_max": (lambda: tj.tadrop(s_max=0.375), lambda x: oracles.tadrop(x, s_max=0.375)),
    "tadrop_s_min": (
        lambda: tj.tadrop(q_low=0.1, s_min=0.625),
        lambda x: oracles.tadrop(x, q_low=0.1, s_min=0.625),
    ),
    "tadrop_equal_quantiles": (
        lambda: tj.tadrop(q_low=0.95),
        lambda x: oracles.tadrop(x, q_low=0.95),
    ),
    "uniform": (lambda: tj.uniform(0.6), lambda x: oracles.uniform(x, 0.6)),
    "uniform_l1": (lambda: tj.uniform(0.2, norm=1), lambda x: oracles.uniform(x, 0.2, 1)),
    "uniform_no_norm": (lambda: tj.uniform(0.9, norm=None), lambda x: oracles.uniform(x, 0.9, None)),
    "magnitude": (
        lambda: tj.magnitude(0.3, granularity="tensor"),
        lambda x: oracles.magnitude(x, 0.3),
    ),
    "magnitude_global": (
        lambda: tj.magnitude(0.3, granularity="global"),
        lambda x: oracles.magnitude(x, 0.3, "global"),
    ),
    "magnitude_at_least_one": (
        lambda: tj.magnitude(0.001, granularity="global"),
        lambda x: oracles.magnitude(x, 0.001, "global"),
    ),
    "n_m": (lambda: tj.n_m(3, 8), lambda x: oracles.n_m(x, 3, 8)),
    "n_m_drop": (lambda: tj.n_m(3, 8, tail="drop"), lambda x: oracles.n_m(x, 3, 8, "drop")),
    "n_m_wide": (lambda: tj.n_m(5, 16), lambda x: oracles.n_m(x, 5, 16)),
    "n_m_long": (lambda: tj.n_m(13, 48), lambda x: oracles.n_m(x, 13, 48)),
    "n_m_long_drop": (lambda: tj.n_m(40, 48, tail="drop"), lambda x: oracles.n_m(x, 40, 48, "drop")),
    "n_m_long_nothing": (lambda: tj.n_m(0, 48), lambda x: oracles.n_m(x, 0, 48)),
    "conflict_aware_n_m_long": (
        lambda: tj.conflict_aware(tj.n_m(13, 48)),
        lambda x: oracles.conflict_aware(x, lambda y: oracles.n_m(y, 13, 48)),
    ),
    "conflict_aware_n_m": (
        lambda: tj.conflict_aware(tj.n_m(2, 8)),
        lambda x: oracles.conflict_aware(x, lambda y: oracles.n_m(y, 2, 8)),
    ),
    "conflict_aware_tadrop": (
        lambda: tj.conflict_aware(tj.tadrop(), order=[3, 0, 4, 1, 2]),
        lambda x: oracles.conflict_aware(x, oracles.tadrop, [3, 0, 4, 1, 2]),
    ),
    "conflict_aware_global": (
        lambda: tj.conflict_aware(tj.magnitude(0.2, granularity="global")),
        lambda x: oracles.conflict_aware(x, lambda y: oracles.magnitude(y, 0.2, "global")),
    ),
}


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_sparsifier(name, make_stacks, nest, flatten):
    make, oracle = SPARSIFIERS[name]
    step = make()
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        out = tj.sparsify(nest(stacks), step)
        assert_same_stacks(flatten(out), oracle(stacks))


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", ["tadrop", "magnitude_global", "conflict_aware_n_m"])
def test_sparsifier_of_few_tasks(name, tasks, make_stacks, nest, flatten):
    make, oracle = SPARSIFIERS[name]
    stacks = make_stacks("exact", tasks)
    assert_same_stacks(flatten(tj.sparsify(nest(stacks), make())), oracle(stacks))


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_magnitude_with_one_density_per_task(granularity, stacks, nest, flatten):
    density = [0.1, 0.5, 1.0, 0.0, 0.25]
    out = tj.sparsify(nest(stacks), tj.magnitude(density, granularity=granularity))
    assert_same_stacks(flatten(out), oracles.magnitude(stacks, density, granularity))


@pytest.mark.parametrize(
    "make",
    [
        lambda d: tj.magnitude(d, granularity="tensor"),
        lambda d: tj.magnitude(d, granularity="global"),
        lambda d: tj.dare(d),
        lambda d: tj.dare(d, rescale="l1"),
        lambda d: tj.dare(d, rescale=None),
    ],
    ids=["magnitude", "magnitude_global", "dare", "dare_l1", "dare_none"],
)
def test_density_0_and_1(make, make_stacks, nest, flatten):
    stacks = make_stacks("exact", TASKS)
    key = jax.random.key(0)
    for name, value in flatten(tj.sparsify(nest(stacks), make(0.0), key=key)).items():
        np.testing.assert_array_equal(value, np.zeros_like(stacks[name]), err_msg=name)
    for name, value in flatten(tj.sparsify(nest(stacks), make(1.0), key=key)).items():
        np.testing.assert_allclose(value, stacks[name], rtol=1e-6, err_msg=name)


def test_masked_leaves_the_other_tensors_alone(stacks, nest, flatten):
    step = tj.masked(tj.tadrop(), include="kernel", exclude="conv")
    out = flatten(tj.sparsify(nest(stacks), step))
    expected = oracles.tadrop(stacks)
    assert_same_stacks(out, stacks | {"block/kernel": expected["block/kernel"]})


def test_masked_global_statistics_are_over_the_chosen_tensors(stacks, nest, flatten):
    step = tj.masked(tj.magnitude(0.3, granularity="global"), include="kernel")
    out = flatten(tj.sparsify(nest(stacks), step))
    chosen = {name: stack for name, stack in stacks.items() if "kernel" in name}
    assert_same_stacks(out, stacks | oracles.magnitude(chosen, 0.3, "global"))


def test_quantile_ratios(stacks, nest, flatten):
    ratios = flatten(tj.quantile_ratios(nest(stacks), q_low=0.5, q_high=0.9))
    for name, stack in stacks.items():
        a = np.abs(stack.reshape(TASKS, -1))
        high = [oracles.quantile_lower(row, 0.9) for row in a]
        expected = [oracles.quantile_lower(row, 0.5) / h if h else 0.0 for row, h in zip(a, high, strict=True)]
        np.testing.assert_allclose(ratios[name], expected, rtol=1e-6, err_msg=name)


def test_chain_is_one_after_the_other(stacks, nest, flatten):
    both = tj.chain(tj.tadrop(), tj.magnitude(0.3, granularity="global"))
    expected = oracles.magnitude(oracles.tadrop(stacks), 0.3, "global")
    assert_same_stacks(flatten(tj.sparsify(nest(stacks), both)), expected)


# DARE

RESCALES = ["inverse", "l1", None]


@pytest.mark.parametrize("rescale", RESCALES, ids=str)
def test_dare_given_its_mask(rescale, stacks, nest, flatten):
    out = flatten(tj.sparsify(nest(stacks), tj.dare(0.4, rescale=rescale), key=jax.random.key(1)))
    masks = {name: value != 0 for name, value in out.items()}
    assert_same_stacks(out, oracles.dare(stacks, masks, 0.4, rescale))


def dare_mask(shape: tuple[int, ...], name: str = "kernel", seed: int = 0, density: float = 0.4, tasks: int = 2):
    stacks = {name: jnp.ones((tasks, *shape), jnp.float32)}
    return np.asarray(tj.sparsify(stacks, tj.dare(density), key=jax.random.key(seed))[name]) != 0


def test_dare_keeps_the_share_it_should():
    for density in (0.1, 0.4, 0.9):
        mask = dare_mask((64, 48), density=density)
        for row in mask:
            sd = np.sqrt(density * (1 - density) / row.size)
            assert abs(row.mean() - density) < 4 * sd


def test_dare_masks_are_independent_of_each_other():
    mask = dare_mask((64, 48))
    others = [mask[1], dare_mask((64, 48), name="other")[0], dare_mask((64, 48), seed=1)[0]]
    for other in others:
        both = (mask[0] & other).mean()
        assert abs(both - 0.16) < 4 * np.sqrt(0.16 * 0.84 / other.size)
    assert abs((mask[0][:, 1:] & mask[0][:, :-1]).mean() - 0.16) < 0.03
    assert abs((mask[0][1:] & mask[0][:-1]).mean() - 0.16) < 0.03


def test_a_seed_gives_the_same_dare_mask():
    mask = dare_mask((64, 48))
    np.testing.assert_array_equal(mask, dare_mask((64, 48)))
    # Counted by position: the shape does not matter, nor how many tasks there are.
    np.testing.assert_array_equal(mask.reshape(2, -1), dare_mask((64 * 48,)))
    np.testing.assert_array_equal(mask[:1], dare_mask((64, 48), tasks=1))


def test_dare_does_not_depend_on_other_tensors(make_stacks, nest, flatten):
    stacks = make_stacks("normal", TASKS)
    key = jax.random.key(3)
    alone = {"block/kernel": stacks["block/kernel"]}
    full = flatten(tj.sparsify(nest(stacks), tj.dare(0.4), key=key))
    np.testing.assert_array_equal(
        flatten(tj.sparsify(nest(alone), tj.dare(0.4), key=key))["block/kernel"], full["block/kernel"]
    )


def test_dare_l1_with_every_entry_dropped_is_zero():
    stacks = {"scale": jnp.ones((16,), jnp.float32)}  # 16 tasks of one entry each
    out = np.asarray(tj.sparsify(stacks, tj.dare(0.4, rescale="l1"), key=jax.random.key(0))["scale"])
    assert set(np.unique(out)) == {0.0, 1.0}


def test_dare_needs_a_key(make_stacks, nest):
    with pytest.raises(tj.MergeError, match="key"):
        tj.sparsify(nest(make_stacks("normal", 2)), tj.dare(0.5))


def test_random_steps_of_a_chain_draw_numbers_of_their_own():
    stack, key, half = {"w": jnp.ones((2, 5000))}, jax.random.key(0), tj.dare(0.5, None)

    def kept(step):
        return np.asarray(tj.sparsify(stack, step, key=key)["w"]) != 0

    one, two, three = (kept(tj.chain(*[half] * n)) for n in (1, 2, 3))
    assert abs(two.mean() - 0.25) < 0.02
    assert abs(three.mean() - 0.125) < 0.02
    np.testing.assert_array_equal(one, kept(half))
    assert not np.any(two & ~one)
    np.testing.assert_array_equal(two, kept(tj.rescale(tj.chain(half, half))))
    np.testing.assert_array_equal(three, kept(tj.chain(tj.rescale(tj.chain(half, half)), half)))
    np.testing.assert_array_equal(three, kept(tj.chain(half, tj.rescale(tj.chain(half, half), granularity="global"))))
    first, then = kept(tj.conflict_aware(tj.chain(half, half)))
    np.testing.assert_array_equal(first, two[0])
    np.testing.assert_array_equal(then, two[1] & ~first)


def test_what_takes_the_place_of_a_random_step_draws_in_its_place():
    stack, half = {"v": jnp.ones((1, 5000)), "w": jnp.ones((1, 5000))}, tj.dare(0.5, None)
    other = dataclasses.replace(half, instead=lambda path, shape, tasks: tj.dare(0.5, None) if path == "v" else None)
    for name, value in tj.sparsify(stack, tj.chain(half, other), key=jax.random.key(0)).items():
        assert abs(np.mean(np.asarray(value) != 0) - 0.25) < 0.02, name


def test_groups_of_tensors_beyond_31_bits():
    half = 1 << 30
    for valid in (2 * half + 5, jnp.uint32(2 * half + 5)):
        assert group_counts(4, valid, 2, half, "ceil").tolist() == [2, 2, 1, 0]
        assert group_counts(4, valid, 2, half, "drop").tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("kept", [33_333, 50_000, 99_999])
def test_the_share_of_a_long_tail_is_exact(kept):
    whole, tail = 100_000, 65_537  # their products do not fit 32 bits
    expected = [kept, -(-tail * kept // whole), 0]
    for valid in (whole + tail, jnp.uint32(whole + tail)):
        assert group_counts(3, valid, kept, whole, "ceil").tolist() == expected
