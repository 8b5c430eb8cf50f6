"""Every rule, alone and after a sparsifier, against its plain NumPy transcription."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.test_sparsifiers_against_oracles import SPARSIFIERS

TASKS = 5
# Powers of two and sums of few of them, so that weighted sums of "exact" trees stay exact.
WEIGHTS = [0.5, 1.0, 2.0, 0.25, 1.5]


@pytest.fixture(params=["exact", "normal"])
def stacks(request, make_stacks):
    return make_stacks(request.param, TASKS)


def assert_close(actual: dict, expected: dict, atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(
            actual[name].astype(np.float32), value.astype(np.float32), rtol=1e-5, atol=atol, err_msg=name
        )


# Rules that give one task vector

RULES = {
    "average": (lambda: tj.average(), oracles.average),
    "task_arithmetic": (lambda: tj.task_arithmetic(0.3), lambda x: oracles.task_arithmetic(x, 0.3)),
    "task_arithmetic_per_task": (
        lambda: tj.task_arithmetic(WEIGHTS),
        lambda x: oracles.task_arithmetic(x, WEIGHTS),
    ),
    "task_arithmetic_weights": (
        lambda: tj.task_arithmetic(0.4, weights=WEIGHTS),
        lambda x: oracles.task_arithmetic(x, 0.4, WEIGHTS),
    ),
    "cabs": (lambda: tj.cabs(2, 8, 0.6), lambda x: oracles.cabs(x, 2, 8, 0.6)),
    "cabs_per_task": (lambda: tj.cabs(1, 16, WEIGHTS), lambda x: oracles.cabs(x, 1, 16, WEIGHTS)),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name, make_stacks, nest, flatten):
    make, oracle = RULES[name]
    rule = make()
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        assert_close(flatten(tj.merge_task_vectors(nest(stacks), rule)), oracle(stacks))


TIES = {
    "default": {},
    "authors": {"flavour": "authors", "density": 0.3, "coefficient": 0.7},
    "mergekit": {"flavour": "mergekit", "density": 0.3, "weights": WEIGHTS},
    "peft": {"flavour": "peft", "density": 0.3, "weights": WEIGHTS},
    "peft_frequency": {"flavour": "peft", "density": 0.6, "elect": "frequency"},
    "sum": {"combine": "sum", "density": 0.5, "coefficient": 0.3},
    "max": {"combine": "max", "density": 0.5},
    "max_weights": {"combine": "max", "density": 0.5, "weights": WEIGHTS, "elect": "weighted"},
    "sum_weights": {"combine": "sum", "density": 0.9, "weights": WEIGHTS},
    "floor": {"keep": "floor", "density": 0.4},
    "floor_tensor": {"keep": "floor", "density": 0.4, "granularity": "tensor", "zero_sign": "positive"},
    "floor_plus_one_tensor": {"density": 0.4, "granularity": "tensor"},
    "at_least_one_tensor": {"keep": "at_least_one", "density": 0.02, "granularity": "tensor"},
    "authors_weighted": {"elect": "weighted", "divisor": "weights", "weights": WEIGHTS, "density": 0.8},
    "authors_divisor": {"divisor": "weights", "weights": WEIGHTS, "density": 0.8},
    "mergekit_count": {"flavour": "mergekit", "divisor": "count", "weights": WEIGHTS, "density": 0.7},
    "mergekit_majority": {"flavour": "mergekit", "zero_sign": "majority", "density": 0.7},
    "peft_global": {"flavour": "peft", "granularity": "global", "keep": "floor", "density": 0.35},
    "frequency_majority": {"elect": "frequency", "density": 0.9},
    "density_per_task": {"density": [0.1, 0.5, 1.0, 0.0, 0.25]},
    "density_per_task_mergekit": {"flavour": "mergekit", "density": [0.1, 0.5, 1.0, 0.0, 0.25]},
    "no_trim": {"density": None, "weights": WEIGHTS},
    "no_trim_mergekit": {"flavour": "mergekit", "density": None, "weights": WEIGHTS},
    "no_trim_peft": {"flavour": "peft", "density": None},
}


def ties_oracle(stacks: dict, parameters: dict) -> dict:
    expected = oracles.ties(stacks, **parameters)
    if parameters.get("flavour") == "mergekit":
        expected["scale"] = None  # mergekit keeps one entry where int(density * n) is 0; tests/peers checks it
    return {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize("name", TIES)
def test_ties(name, make_stacks, nest, flatten):
    rule = tj.ties(**TIES[name])
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, TASKS)
        expected = ties_oracle(stacks, TIES[name])
        out = flatten(tj.merge_task_vectors(nest(stacks), rule))
        assert_close({key: out[key] for key in expected}, expected)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", ["default", "mergekit_count", "peft_frequency"])
def test_ties_of_few_tasks(name, tasks, make_stacks, nest, flatten):
    stacks = make_stacks("exact", tasks)
    parameters = {key: value for key, value in TIES[name].items() if key != "weights"}
    out = flatten(tj.merge_task_vectors(nest(stacks), tj.ties(**parameters)))
    expected = ties_oracle(stacks, parameters)
    assert_close({key: out[key] for key in expected}, expected)


@pytest.mark.parametrize("flavour", ["authors", "mergekit", "peft"])
def test_ties_at_density_0_and_1(flavour, stacks, nest, flatten):
    zero = flatten(tj.merge_task_vectors(nest(stacks), tj.ties(0.0, flavour=flavour)))
    assert not any(value.any() for value in zero.values())
    full = flatten(tj.merge_task_vectors(nest(stacks), tj.ties(1.0, flavour=flavour)))
    assert_close(full, oracles.ties(stacks, None, flavour=flavour))


def test_zeros_take_the_majority_of_the_whole_vector(nest, flatten):
    """The cancelling entry lies in one tensor, the majority (negative) in another."""
    stacks = {
        "a": np.array([[1.0, 2.0], [-1.0, 2.0]], np.float32),
        "b": np.array([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]], np.float32),
    }
    out = flatten(tj.merge_task_vectors(stacks, tj.ties(1.0)))
    np.testing.assert_array_equal(out["a"], [-1.0, 2.0])
    out = flatten(tj.merge_task_vectors(stacks, tj.ties(1.0, zero_sign="positive")))
    np.testing.assert_array_equal(out["a"], [1.0, 2.0])


@pytest.mark.parametrize(("combine", "expected"), [("mean", [-1.0, -2.0]), ("sum", [-1.0, -2.0]), ("max", [0.0, 0.0])])
def test_a_majority_of_0_takes_the_negative_entries(combine, expected):
    """`disjoint_merge` of ties-merging: `torch.where(sign > 0, tensor > 0, tensor < 0)`."""
    stacks = {"a": np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)}
    np.testing.assert_array_equal(tj.merge_task_vectors(stacks, tj.ties(1.0, combine=combine))["a"], expected)
    np.testing.assert_array_equal(oracles.ties(stacks, 1.0, combine=combine)["a"], expected)


def test_an_exact_count_over_the_whole_tree_is_refused():
    """It would break ties by a position that no tensor has."""
    with pytest.raises(tj.MergeError, match="exact"):
        tj.ties(0.4, keep="exact", granularity="global")


def test_a_flavour_may_be_made_global(make_stacks):
    """Any parameter of a preset may be overridden: the exact count of PEFT then keeps its ties."""
    stacks = make_stacks("normal", 3)
    ours = tj.merge_task_vectors(stacks, tj.ties(0.4, flavour="peft", granularity="global"))
    size = sum(v[0].size for v in stacks.values())
    trimmed = {}
    for name, stack in stacks.items():
        every = np.concatenate([np.abs(v).reshape(3, -1) for v in stacks.values()], axis=1)
        cuts = np.sort(every, axis=1)[:, size - int(0.4 * size)]
        kept = np.abs(stack) >= cuts.reshape((3,) + (1,) * (stack.ndim - 1))
        trimmed[name] = np.where(kept, stack, 0)
    expected = tj.merge_task_vectors(trimmed, tj.ties(None, flavour="peft"))
    for name in stacks:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-6, atol=1e-7)


# EMR


def base_and_models(stacks: dict, nest) -> tuple[dict, list[dict], dict]:
    """A base, its models, and the task vectors as float32 arithmetic gives them back."""
    rng = np.random.default_rng(11)
    base = {k: (rng.integers(-64, 65, size=v.shape[1:]) / 64).astype(np.float32) for k, v in stacks.items()}
    tasks = oracles.number_of_tasks(stacks)
    models = [{k: base[k] + stacks[k][t] for k in base} for t in range(tasks)]
    deltas = {k: np.stack([model[k] - base[k] for model in models]) for k in base}
    return nest(base), [nest(model) for model in models], deltas


@pytest.mark.parametrize("rescaler", ["tensor_mean", "global"])
@pytest.mark.parametrize("tasks", [1, 2, TASKS])
def test_emr(rescaler, tasks, make_stacks, nest, flatten):
    rule = tj.emr(rescaler=rescaler)
    for kind in ("exact", "normal"):
        base, models, deltas = base_and_models(make_stacks(kind, tasks), nest)
        bundle = tj.merge(base, models, rule)
        unified, masks, rescalers = oracles.emr(deltas, rescaler)
        assert_close(flatten(bundle.unified), unified)
        np.testing.assert_allclose(bundle.rescalers, rescalers, rtol=1e-5)
        assert np.asarray(bundle.rescalers).shape == (tasks,)
        for t in range(tasks):
            for name, mask in flatten(bundle.mask(t)).items():
                assert mask.dtype == np.bool_
                np.testing.assert_array_equal(mask, masks[name][t], err_msg=name)
            vector = oracles.emr_task_vector(deltas, t, rescaler)
            expected = {name: value + vector[name] for name, value in flatten(base).items()}
            assert_close(flatten(bundle.task_params(t)), expected)
        if kind == "exact" and tasks > 2:
            assert rescalers[2] == 0  # a zero task vector
            assert_close(flatten(bundle.task_params(2)), flatten(base), atol=0)


def test_emr_bundle_is_small(nest):
    stacks = {"kernel": np.random.default_rng(0).normal(size=(TASKS, 64, 48)).astype(np.float32)}
    base, models, _ = base_and_models(stacks, nest)
    model_bytes = 64 * 48 * 4
    # The base, the unified task vector and one bit an entry for each task.
    assert 0 < tj.merge(base, models, tj.emr()).nbytes <= (2 + TASKS / 32) * model_bytes + 200


def test_emr_of_task_vectors(stacks, nest, flatten):
    bundle = tj.merge_task_vectors(nest(stacks), tj.emr())
    unified, _, rescalers = oracles.emr(stacks)
    assert_close(flatten(bundle.unified), unified)
    np.testing.assert_allclose(bundle.rescalers, rescalers, rtol=1e-5)


def test_emr_per_task_tensors(make_stacks, nest, flatten):
    base, models, deltas = base_and_models(make_stacks("normal", 2), nest)
    bundle = tj.merge(base, models, tj.emr(per_task="block/bias"))
    del deltas["block/bias"]
    for t in range(2):
        params = flatten(bundle.task_params(t))
        np.testing.assert_array_equal(params["block/bias"], flatten(models[t])["block/bias"])
        vector = oracles.emr_task_vector(deltas, t)
        expected = {name: flatten(base)[name] + vector[name] for name in vector}
        assert_close({name: params[name] for name in vector}, expected)


@pytest.mark.parametrize("t", [-3, 2])
def test_emr_refuses_a_task_that_is_not_there(t, make_stacks, nest):
    base, models, _ = base_and_models(make_stacks("normal", 2), nest)
    with pytest.raises((tj.MergeError, IndexError), match=str(t)):
        tj.merge(base, models, tj.emr()).task_params(t)


# A sparsifier before a rule

PAIRED_SPARSIFIERS = ["tadrop", "magnitude_global", "conflict_aware_n_m"]
PAIRED_RULES = {
    "task_arithmetic": RULES["task_arithmetic"],
    "ties": (lambda: tj.ties(density=None), lambda x: oracles.ties(x, None)),
    "ties_trimmed": (lambda: tj.ties(density=0.5), lambda x: oracles.ties(x, 0.5)),
    "cabs": RULES["cabs"],
}


@pytest.mark.parametrize("rule", PAIRED_RULES)
@pytest.mark.parametrize("sparsifier", PAIRED_SPARSIFIERS)
def test_sparsifier_before_rule(sparsifier, rule, make_stacks, nest, flatten):
    stacks = make_stacks("normal", TASKS)
    make, oracle = SPARSIFIERS[sparsifier]
    make_rule, rule_oracle = PAIRED_RULES[rule]
    out = tj.merge_task_vectors(nest(stacks), make_rule(), sparsifier=make())
    assert_close(flatten(out), rule_oracle(oracle(stacks)))


@pytest.mark.parametrize("sparsifier", PAIRED_SPARSIFIERS)
def test_sparsifier_before_emr(sparsifier, make_stacks, nest, flatten):
    """Unified vector, masks and rescalers all come from the pruned task vectors."""
    make, oracle = SPARSIFIERS[sparsifier]
    base, models, deltas = base_and_models(make_stacks("normal", TASKS), nest)
    bundle = tj.merge(base, models, tj.emr(), sparsifier=make())
    unified, masks, rescalers = oracles.emr(oracle(deltas))
    assert_close(flatten(bundle.unified), unified)
    np.testing.assert_allclose(bundle.rescalers, rescalers, rtol=1e-5)
    for name, mask in flatten(bundle.mask(1)).items():
        np.testing.assert_array_equal(mask, masks[name][1], err_msg=name)


def test_a_chain_that_ends_in_a_rule_is_a_rule(stacks, nest, flatten):
    chained = tj.chain(tj.tadrop(), tj.task_arithmetic(0.3))
    expected = oracles.task_arithmetic(oracles.tadrop(stacks), 0.3)
    assert_close(flatten(tj.merge_task_vectors(nest(stacks), chained)), expected)


# Whole models

MERGES = {
    "average": RULES["average"],
    "task_arithmetic": RULES["task_arithmetic"],
    "ties": (lambda: tj.ties(), oracles.ties),
    "cabs": RULES["cabs"],
}


@pytest.mark.parametrize("name", MERGES)
def test_merge_adds_the_base(name, stacks, nest, flatten):
    base, models, deltas = base_and_models(stacks, nest)
    make, oracle = MERGES[name]
    merged = oracle(deltas)
    expected = {key: value + merged[key] for key, value in flatten(base).items()}
    assert_close(flatten(tj.merge(base, models, make())), expected)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in MERGES), ("ties", "float16")])
def test_half_precision_models(name, dtype, make_stacks, nest, flatten):
    """Differences in float32 (those of the stored values), one rounding at the end."""
    dtype = jnp.dtype(dtype)
    stacks = make_stacks("normal", TASKS, seed=1)
    base, models, _ = base_and_models(stacks, nest)
    base, *models = jax.tree.map(lambda x: x.astype(dtype), [base, *models])
    before = {key: value.astype(np.float32) for key, value in flatten(base).items()}
    deltas = {k: np.stack([flatten(m)[k].astype(np.float32) - before[k] for m in models]) for k in before}
    rounded = {k: d.astype(dtype).astype(np.float32) for k, d in deltas.items()}
    assert any(np.any(rounded[k] != deltas[k]) for k in deltas)  # a difference in `dtype` would be another
    for key, stack in flatten(tj.task_vectors(base, models)).items():
        assert stack.dtype == np.float32
        np.testing.assert_array_equal(stack, deltas[key])
    make, oracle = MERGES[name]
    merged = oracle(deltas)
    out = flatten(tj.merge(base, models, make()))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for key, value in out.items():
        assert value.dtype == dtype
        exact = before[key] + merged[key]
        np.testing.assert_allclose(value.astype(np.float32), exact, rtol=0.51 * eps, atol=1e-6, err_msg=key)


def test_integers_and_booleans_come_from_the_base(make_stacks, nest, flatten):
    base, models, deltas = base_and_models(make_stacks("normal", 2), nest)
    base |= {"steps": np.array([3, 4], np.int32), "flag": np.array(True)}
    models = [model | {"steps": np.array([9, 9], np.int32), "flag": np.array(False)} for model in models]
    stack = tj.task_vectors(base, models)
    assert stack["steps"] is None
    assert stack["flag"] is None
    rule = tj.ties(0.3)
    merged = tj.merge(base, models, rule)
    np.testing.assert_array_equal(merged["steps"], base["steps"])
    assert merged["steps"].dtype == np.int32
    np.testing.assert_array_equal(merged["flag"], base["flag"])
    assert merged["flag"].dtype == np.bool_
    vector = flatten(tj.merge_task_vectors(stack, rule))  # the integers do not count in global statistics
    assert_close(vector, oracles.ties(deltas, 0.3))
    bundle = tj.merge(base, models, tj.emr())
    np.testing.assert_array_equal(bundle.task_params(1)["steps"], base["steps"])


@pytest.mark.parametrize("name", ["ties", "task_arithmetic"])
def test_excluded_tensors_come_from_the_base_and_leave_the_statistics(name, stacks, nest, flatten):
    base, models, deltas = base_and_models(stacks, nest)
    make, oracle = MERGES[name]
    out = flatten(tj.merge(base, models, make(), include="block|scale", exclude="bias"))
    merged = oracle({key: deltas[key] for key in ("block/kernel", "scale")})
    for key, value in flatten(base).items():
        expected = value + merged[key] if key in merged else value
        np.testing.assert_allclose(out[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)
