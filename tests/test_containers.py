"""The same merge in every container: the type that goes in comes out, and names are the same in all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import tadrop_jax as tj

TASKS = 2
NAMES = ["body/0/bias", "body/0/kernel", "head/bias", "head/kernel", "scale"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
    body: list
    head: dict
    scale: jax.Array


class Linear(nnx.Module):
    def __init__(self, kernel, bias):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)


class Model(nnx.Module):
    def __init__(self, tree: dict):
        self.body = nnx.List([Linear(**tree["body"]["0"])])
        self.head = Linear(**tree["head"])
        self.scale = nnx.Param(tree["scale"])


def nested(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layers = [{"kernel": normal(7, 5), "bias": normal(5)} for _ in range(2)]
    return {"body": {"0": layers[0]}, "head": layers[1], "scale": normal()}


# name -> (from the nested dict, back to the nested dict, type)
CONTAINERS = {
    "dict": (lambda tree: tree, lambda tree: tree, dict),
    "frozen": (FrozenDict, lambda tree: tree.unfreeze(), FrozenDict),
    "nnx_state": (
        lambda tree: nnx.split(Model(tree), nnx.Param)[1],
        lambda state: {**nnx.to_pure_dict(state), "body": {"0": nnx.to_pure_dict(state)["body"][0]}},
        nnx.State,
    ),
    "linen": (lambda tree: {"params": tree}, lambda tree: tree["params"], dict),
    "list": (
        lambda tree: {**tree, "body": [tree["body"]["0"]]},
        lambda tree: {**tree, "body": {"0": tree["body"][0]}},
        dict,
    ),
    "tuple": (
        lambda tree: {**tree, "body": (tree["body"]["0"],)},
        lambda tree: {**tree, "body": {"0": tree["body"][0]}},
        dict,
    ),
    "dataclass": (
        lambda tree: Params([tree["body"]["0"]], tree["head"], tree["scale"]),
        lambda tree: {"body": {"0": tree.body[0]}, "head": tree.head, "scale": tree.scale},
        Params,
    ),
}


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


@pytest.fixture(scope="module")
def models():
    return [nested(seed) for seed in range(TASKS)]


@pytest.fixture(scope="module")
def base():
    return nested(100)


def assert_equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for value, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert value.dtype == other.dtype
        np.testing.assert_array_equal(value, other)


RULES = {
    "ties": lambda: tj.ties(0.3),
    "dare_average": lambda: tj.chain(tj.dare(0.5), tj.average()),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_type_that_goes_in_comes_out(rule, container, base, models):
    make, back, kind = container
    key = jax.random.key(0)
    expected = tj.merge(base, models, RULES[rule](), key=key)
    merged = tj.merge(make(base), [make(model) for model in models], RULES[rule](), key=key)
    assert type(merged) is kind
    assert jax.tree.structure(merged) == jax.tree.structure(make(base))
    assert_equal(back(merged), expected)


def test_emr_gives_the_type_too(container, base, models):
    make, back, kind = container
    expected = tj.merge(base, models, tj.emr()).task_params(1)
    params = tj.merge(make(base), [make(model) for model in models], tj.emr()).task_params(1)
    assert type(params) is kind
    assert_equal(back(params), expected)


def test_task_vectors_and_sparsify_keep_the_container(container, base, models):
    make, back, kind = container
    stack = tj.task_vectors(make(base), [make(model) for model in models])
    assert type(stack) is kind
    expected = tj.task_vectors(base, models)
    assert_equal(back(stack), expected)
    sparse = tj.sparsify(stack, tj.tadrop())
    assert type(sparse) is kind
    assert_equal(back(sparse), tj.sparsify(expected, tj.tadrop()))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_same_in_all(name, container, base, models):
    """A pattern that is anchored at both ends hits exactly that tensor."""
    make, back, _ = container
    merged = back(tj.merge(make(base), [make(m) for m in models], tj.average(), include=f"^{name}$"))
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), merged, base)
        )
        if not same
    ]
    assert changed == [name]


def test_exclude_beats_include(container, base, models):
    make, back, _ = container
    merged = tj.merge(make(base), [make(m) for m in models], tj.average(), include="kernel", exclude="^head/kernel$")
    merged = back(merged)
    np.testing.assert_array_equal(merged["head"]["kernel"], base["head"]["kernel"])
    assert np.all(np.asarray(merged["body"]["0"]["kernel"]) != np.asarray(base["body"]["0"]["kernel"]))


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(where, container, base, models):
    make, _, _ = container
    for pattern in ("nowhere", "^params/", "/value$"):
        with pytest.raises(tj.MergeError, match=pattern.strip("^$")):
            tj.merge(make(base), [make(m) for m in models], tj.average(), **{where: pattern})


def test_a_masked_pattern_that_matches_nothing_is_refused(base, models):
    with pytest.raises(tj.MergeError, match="nowhere"):
        tj.sparsify(tj.task_vectors(base, models), tj.masked(tj.tadrop(), include="nowhere"))


def test_masks_of_masks_may_begin_with_flags(base, models):
    stack = tj.task_vectors(base, models)
    inner = tj.masked(tj.uniform(1.0, norm=None), include="(?i)KERNEL")
    pruned = tj.sparsify(stack, tj.masked(inner, include="head"))
    assert not np.any(pruned["head"]["kernel"])
    untouched = {"head": {"kernel": stack["head"]["kernel"]}}
    assert_equal(pruned | {"head": pruned["head"] | untouched["head"]}, stack)


def test_other_linen_collections_keep_their_name(base, models):
    """Only a leading `params/` is left out of a name."""

    def variables(tree):
        return {"params": tree, "batch_stats": {"mean": tree["head"]["bias"]}}

    merged = tj.merge(variables(base), [variables(m) for m in models], tj.average(), include="^batch_stats/mean$")
    assert_equal(merged["params"], base)
    np.testing.assert_allclose(
        merged["batch_stats"]["mean"], np.mean([m["head"]["bias"] for m in models], axis=0), rtol=1e-6
    )


def test_task_vectors_are_float32_with_none_for_integers(base, models):
    half = [{"w": jnp.asarray(m["head"]["kernel"], jnp.bfloat16), "n": jnp.arange(3)} for m in [base, *models]]
    stack = tj.task_vectors(half[0], half[1:])
    assert stack["n"] is None
    assert stack["w"].dtype == jnp.float32
    assert stack["w"].shape == (TASKS, 7, 5)
    expected = [np.asarray(m["w"], np.float32) - np.asarray(half[0]["w"], np.float32) for m in half[1:]]
    np.testing.assert_array_equal(stack["w"], np.stack(expected))


# What is refused


def changed(model: dict, change) -> dict:
    model = jax.tree.map(lambda x: x, model)
    change(model)
    return model


def cast_bias(model: dict) -> None:
    model["head"]["bias"] = model["head"]["bias"].astype(jnp.bfloat16)


def grow_kernel(model: dict) -> None:
    model["head"]["kernel"] = jnp.zeros((9, 5))


BROKEN = {
    "missing": (lambda m: m["head"].pop("bias"), ["head/bias"]),
    "extra": (lambda m: m["head"].update(extra=jnp.zeros(3)), ["head/extra"]),
    "shape": (grow_kernel, ["head/kernel", "7, 5", "9, 5"]),
    "dtype": (cast_bias, ["head/bias", "float32", "bfloat16"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_differs_in_structure_is_refused(name, base, models):
    change, words = BROKEN[name]
    with pytest.raises(tj.MergeError) as caught:
        tj.merge(base, [models[0], changed(models[1], change)], tj.average())
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(tj.MismatchError) as again:
        tj.task_vectors(base, [models[0], changed(models[1], change)])
    assert str(again.value) == str(caught.value)


def test_structure_is_checked_under_jit_too(base, models):
    grown = changed(models[1], grow_kernel)
    with pytest.raises(tj.MergeError, match="head/kernel"):
        jax.jit(lambda b, m: tj.merge(b, m, tj.average()))(base, [models[0], grown])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "model"])
def test_values_that_are_not_finite_are_refused(bad, where, base, models):
    def spoil(model: dict) -> None:
        model["head"]["kernel"] = model["head"]["kernel"].at[3, 2].set(bad)

    trees = [base, *models]
    position = 0 if where == "base" else 2
    trees[position] = changed(trees[position], spoil)
    with pytest.raises(tj.MergeError, match="head/kernel"):
        tj.merge(trees[0], trees[1:], tj.average())


def test_no_models_are_refused(base):
    with pytest.raises(tj.MergeError, match="no models to merge were given"):
        tj.merge(base, [], tj.average())


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan"), [0.5, 1.5]], ids=str)
@pytest.mark.parametrize("method", ["ties", "magnitude", "dare"])
def test_a_density_out_of_range_is_refused(method, density, base, models):
    if method == "dare" and np.ndim(density):
        density = density[1]

    def attempt():
        step = getattr(tj, method)(density)
        if method == "ties":
            return tj.merge(base, models, step)
        return tj.sparsify(tj.task_vectors(base, models), step, key=jax.random.key(0))

    with pytest.raises(tj.MergeError, match="density"):
        attempt()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: tj.tadrop(q_low=1.2), "q_low"),
        (lambda: tj.tadrop(q_high=-0.1), "q_high"),
        (lambda: tj.tadrop(q_low=0.9, q_high=0.5), "q_low"),
        (lambda: tj.tadrop(s_max=1.5), "s_max"),
        (lambda: tj.tadrop(norm=3), "norm"),
        (lambda: tj.uniform(-0.5), "sparsity"),
        (lambda: tj.n_m(9, 8), "9"),
        (lambda: tj.n_m(0, 0), "m"),
        (lambda: tj.n_m(2, 8, tail="round"), "round"),
        (lambda: tj.magnitude(0.5, granularity="row"), "row"),
        (lambda: tj.dare(0.5, rescale="l3"), "l3"),
        (lambda: tj.ties(0.5, flavour="nobody"), "nobody"),
        (lambda: tj.ties(0.5, combine="median"), "median"),
        (lambda: tj.ties(0.5, keep="some"), "some"),
        (lambda: tj.emr(rescaler="none"), "none"),
    ],
)
def test_a_parameter_out_of_range_is_refused(make, word):
    with pytest.raises(tj.MergeError, match=word):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tj.task_arithmetic([0.1, 0.2, 0.3]),
        lambda: tj.ties([0.1, 0.2, 0.3]),
        lambda: tj.ties(0.5, weights=[0.1, 0.2, 0.3]),
        lambda: tj.chain(tj.magnitude([0.1, 0.2, 0.3]), tj.average()),
        lambda: tj.chain(tj.conflict_aware(tj.n_m(1, 2), order=[0, 1, 2]), tj.average()),
    ],
    ids=["coefficient", "density", "weights", "magnitude", "order"],
)
def test_three_values_for_two_tasks_are_refused(make, base, models):
    with pytest.raises(tj.ParameterError, match=r"has 3 values, one per task, but there are 2 tasks|order must be"):
        tj.merge(base, models, make())


def test_a_sparsifier_is_not_a_rule(base, models):
    with pytest.raises(tj.MergeError, match="a merge needs a merge rule"):
        tj.merge(base, models, tj.tadrop())


def test_a_rule_is_not_a_sparsifier(base, models):
    with pytest.raises(tj.MergeError, match="sparsify takes a sparsifier, not a merge rule"):
        tj.sparsify(tj.task_vectors(base, models), tj.average())


def test_rules_on_weights_need_the_base(base, models):
    def first_model(x, carry):
        return x.base + x.stack[0]

    rule = tj.Step(apply=first_model, output="parameters")
    with pytest.raises(TypeError, match=r"tj\.merge\b"):
        tj.merge_task_vectors(tj.task_vectors(base, models), rule)
    merged = tj.merge(base, models, rule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, models[0])


def test_a_model_that_equals_the_base_is_warned_of(base, models):
    with pytest.warns(tj.MergeWarning, match="model 1"):
        tj.merge(base, [models[0], base], tj.average())


@pytest.mark.parametrize(
    ("rule", "sparsifier", "said"),
    [
        ("ties", None, "expected a rule or a sparsifier.*got 'ties'"),
        (tj.ties, None, r"call it: tj\.ties\(\)"),
        (tj.average(), tj.tadrop, r"call it: tj\.tadrop\(\)"),
    ],
)
def test_what_is_no_method(rule, sparsifier, said):
    tree = {"w": np.ones(3)}
    with pytest.raises(tj.MergeError, match=said):
        tj.merge(tree, [tree], rule, sparsifier=sparsifier)


def test_arrays_of_another_library_are_named():
    class Foreign:
        dtype, shape = type("float32", (), {})(), (3,)

    with pytest.raises(tj.MergeError, match=r"arrays of JAX or NumPy, got .*Foreign .converters\.load"):
        tj.merge({"w": Foreign()}, [{"w": Foreign()}], tj.average())
