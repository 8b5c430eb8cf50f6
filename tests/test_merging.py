"""What the public functions do besides running a method: explain, layouts, tied weights, steps of a user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj

pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def base():
    return {"a": np.arange(12, dtype=np.float32).reshape(3, 4) / 8, "b": np.ones(3, np.float32), "n": np.arange(2)}


@pytest.fixture(scope="module")
def models(base):
    rng = np.random.default_rng(0)

    def tuned():
        return {k: v if k == "n" else v + rng.normal(size=v.shape).astype(np.float32) for k, v in base.items()}

    return [tuned() for _ in range(3)]


def test_explain_against_numpy(base, models):
    said = tj.explain(base, models, tj.tadrop(0.5, 0.9))
    assert sorted(said) == ["a", "b"]
    for name in said:
        stack = np.stack([m[name] - base[name] for m in models]).reshape(3, -1)
        low, high = (np.quantile(np.abs(stack), q, axis=1, method="lower") for q in (0.5, 0.9))
        np.testing.assert_allclose(said[name]["quantile_ratio"], low / high, rtol=1e-6)
        np.testing.assert_allclose(said[name]["norm"], np.linalg.norm(stack, axis=1), rtol=1e-6)
        np.testing.assert_allclose(said[name]["norm_after"], said[name]["norm"], rtol=1e-6)
        conflict = np.mean((stack > 0).any(0) & (stack < 0).any(0))
        np.testing.assert_allclose(said[name]["sign_conflict"], conflict, rtol=1e-6)
        after = tj.sparsify({name: np.stack([m[name] - base[name] for m in models])}, tj.tadrop(0.5, 0.9))[name]
        np.testing.assert_allclose(said[name]["sparsity"], np.mean(np.asarray(after).reshape(3, -1) == 0, axis=1))


def test_explain_takes_any_sparsifier_and_no_rule(base, models):
    said = tj.explain(base, models, tj.magnitude(0.5))["a"]
    stack = np.stack([m["a"] - base["a"] for m in models]).reshape(3, -1)
    low, high = (np.quantile(np.abs(stack), q, axis=1, method="lower") for q in (0.95, 0.99))
    np.testing.assert_allclose(said["quantile_ratio"], low / high, rtol=1e-6)
    assert said["sparsity"].tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(tj.MergeError, match="sparsifier"):
        tj.explain(base, models, tj.average())


def test_explain_tells_the_ratio_that_tadrop_read_wherever_it_stands():
    tadrop, after = tj.tadrop(0.75, 0.9), tj.magnitude(1.0)
    stack = np.random.default_rng(0).normal(size=(3, 120)).astype(np.float32)
    base, models = {"a": np.zeros(120, np.float32)}, [{"a": row} for row in stack]
    left = np.asarray(tj.sparsify({"a": stack}, tj.conflict_aware(tadrop))["a"])
    free = np.stack([np.where((left[:t] != 0).any(0), 0, stack[t]) for t in range(3)])

    def ratios(seen):
        low, high = (np.quantile(np.abs(seen), q, axis=1, method="lower") for q in (0.75, 0.9))
        return low / high

    only_a = tj.Step(apply=after.apply, stages=after.stages, instead=lambda path, *_: tadrop if path == "a" else None)
    for sparsifier, seen in {
        tj.chain(tadrop, after): stack,
        tj.rescale(tadrop): stack,
        tj.rescale(tj.chain(tadrop, after)): stack,
        tj.conflict_aware(tadrop): free,
        tj.rescale(tj.conflict_aware(tj.chain(tadrop, after))): free,
        tj.masked(tadrop, include="a"): stack,
        only_a: stack,
    }.items():
        said = tj.explain(base, models, sparsifier)["a"]
        np.testing.assert_allclose(said["quantile_ratio"], ratios(seen), rtol=1e-6, err_msg=str(sparsifier))


def test_quantile_ratios_keep_the_tree(base, models):
    stack = tj.task_vectors(base, models)
    ratios = tj.quantile_ratios(stack, q_low=0.25, q_high=1.0)
    assert ratios["n"] is None
    values = np.abs(np.asarray(stack["a"]).reshape(3, -1))
    low, high = np.quantile(values, 0.25, axis=1, method="lower"), values.max(axis=1)
    np.testing.assert_allclose(ratios["a"], low / high, rtol=1e-6)
    assert tj.quantile_ratios({"z": jnp.zeros((2, 5))})["z"].tolist() == [0.0, 0.0]


def test_quantiles_of_ratios_are_in_order():
    """Or a ratio could lie above 1."""
    stack = {"w": jnp.array([[1.0, 2.0, 3.0]])}
    for low, high in ((0.9, 0.5), (jnp.float32(0.9), 0.5)):
        with pytest.raises(tj.ParameterError, match=r"quantile_ratios: q_low <= q_high must hold, got .* and 0\.5"):
            tj.quantile_ratios(stack, q_low=low, q_high=high)
    assert tj.quantile_ratios(stack, q_low=0.5, q_high=0.5)["w"].tolist() == [1.0]


@pytest.mark.parametrize(
    "sparsifier",
    [tj.n_m(1, 3), tj.dare(0.5), tj.magnitude(0.5, keep="exact"), tj.conflict_aware(tj.n_m(1, 3))],
    ids=["n_m", "dare", "exact", "conflict_aware"],
)
def test_a_layout_gives_the_same_weights_in_both_layouts(sparsifier):
    rng = np.random.default_rng(1)
    torch_base = {"conv": np.zeros((4, 2, 3, 5), np.float32), "linear": np.zeros((6, 4), np.float32)}
    # Few distinct values: ties go by position, which must be PyTorch's.
    torch_models = [
        {k: rng.integers(-2, 3, v.shape).astype(np.float32) for k, v in torch_base.items()} for _ in range(2)
    ]
    to_flax = {"conv": (2, 3, 1, 0), "linear": (1, 0)}

    def flax(tree):
        return {"flax": {k: v.transpose(to_flax[k]) for k, v in tree.items()}}

    def layout(path):
        name = path.removeprefix("flax/")
        return tj.Layout(name, tuple(np.argsort(to_flax[name])))

    key = jax.random.key(3)
    merged = tj.merge(torch_base, torch_models, tj.task_arithmetic(1.0), sparsifier=sparsifier, key=key)
    ours = tj.merge(
        flax(torch_base),
        [flax(m) for m in torch_models],
        tj.task_arithmetic(1.0),
        sparsifier=sparsifier,
        layout=layout,
        key=key,
    )
    for name, value in flax({k: np.asarray(v) for k, v in merged.items()})["flax"].items():
        np.testing.assert_array_equal(ours["flax"][name], value)
    without = tj.merge(
        flax(torch_base), [flax(m) for m in torch_models], tj.task_arithmetic(1.0), sparsifier=sparsifier, key=key
    )
    assert not all(np.array_equal(without["flax"][n], ours["flax"][n]) for n in to_flax)

    # The same of task vectors; here the base is zero.
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *[flax(m) for m in torch_models])
    pruned = tj.sparsify(stack, sparsifier, layout=layout, key=key)
    again = tj.merge_task_vectors(stack, tj.task_arithmetic(1.0), sparsifier=sparsifier, layout=layout, key=key)
    for name in to_flax:
        np.testing.assert_array_equal(pruned["flax"][name].sum(0), ours["flax"][name])
        np.testing.assert_array_equal(again["flax"][name], ours["flax"][name])


def test_a_layout_that_is_no_permutation_is_refused(base, models):
    with pytest.raises(tj.MergeError, match=r"'a'.*permutation"):
        tj.merge(base, models, tj.average(), layout={"a": (0, 0)})
    with pytest.raises(tj.MergeError, match=r"'a'.*permutation"):
        tj.sparsify({"a": np.ones((2, 3, 4), np.float32)}, tj.magnitude(0.5), layout={"a": (0, 1, 2)})


def test_tied_weights_count_once():
    """The threshold over the tree is that of the tree with the weight in it once."""
    rng = np.random.default_rng(2)
    wte, other = (rng.normal(size=(2, 40)).astype(np.float32) for _ in range(2))
    zeros = np.zeros(40, np.float32)
    once = tj.merge(
        {"o": zeros, "w": zeros * 1}, [{"o": o, "w": w} for o, w in zip(other, wte, strict=True)], tj.ties(0.3)
    )
    zero = zeros * 1
    tied = tj.merge(
        {"o": zeros, "w": zero, "head": zero},
        [{"o": o, "w": w, "head": w} for o, w in zip(other, list(wte), strict=True)],
        tj.ties(0.3),
    )
    np.testing.assert_array_equal(tied["w"], once["w"])
    np.testing.assert_array_equal(tied["o"], once["o"])
    np.testing.assert_array_equal(tied["head"], once["w"])


@pytest.mark.parametrize("name", ["emb", "head"])
def test_a_pattern_matches_tied_weights_by_any_of_their_names(name):
    def tree(seed):
        shared = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 4)), jnp.float32)
        return {"emb": shared, "head": shared, "k": shared + 1}

    base, models = tree(0), [tree(1), tree(2)]
    mean, pruned = tj.average(), tj.average()
    restricted = tj.merge(base, models, pruned, sparsifier=tj.masked(tj.magnitude(0.5), exclude=name))
    included = tj.merge(base, models, pruned, sparsifier=tj.masked(tj.magnitude(0.5), include=name))
    matrix = tj.merge(base, models, tj.tsv_m(mean_only=name))
    untouched, all_pruned = tj.merge(base, models, mean), tj.merge(base, models, pruned, sparsifier=tj.magnitude(0.5))
    for tied in ("emb", "head"):
        np.testing.assert_array_equal(restricted[tied], untouched[tied])
        np.testing.assert_array_equal(included[tied], all_pruned[tied])
        np.testing.assert_array_equal(matrix[tied], untouched[tied])
    np.testing.assert_array_equal(restricted["k"], all_pruned["k"])
    np.testing.assert_array_equal(included["k"], untouched["k"])


def test_a_mask_may_match_what_does_not_merge(base, models):
    """What a mask names and `exclude` takes out besides is no misspelling."""
    name = next(iter(base))
    masked = tj.masked(tj.magnitude(0.5), exclude=f"^{name}$")
    merged = tj.merge(base, models, tj.average(), sparsifier=masked, exclude=f"^{name}$")
    expected = tj.merge(base, models, tj.average(), sparsifier=tj.magnitude(0.5), exclude=f"^{name}$")
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_an_election_that_cancels_is_zero_after_weighting():
    """XLA may fuse a product into a sum, whose rounding would leave a sign where +a and -a cancel."""
    rng = np.random.default_rng(4)
    a = rng.normal(size=(64, 48)).astype(np.float32)
    stack = {"w": np.stack([a, -a])}
    merged = tj.merge_task_vectors(stack, tj.ties(1.0, weights=0.3, flavour="mergekit"))["w"]
    np.testing.assert_allclose(merged, np.abs(a), rtol=1e-6)  # undecided entries are positive


def test_a_rule_of_a_users_own():
    """Every kind of stage and scope, against NumPy."""

    def stages(scope):
        return (
            tj.Sums(lambda x, carry, n: {"sum": x.stack, "share": jnp.ones_like(x.stack) / n}, scope),
            tj.Min(lambda x, carry, n: {"min": x.stack}, scope),
            tj.Max(lambda x, carry, n: {"max": x.stack}, scope),
            # Signed order statistics, at ranks that an earlier stage decides.
            tj.Ranks(lambda x, carry: x.stack, lambda n, carry: {"median": (n - 1) // 2}, scope),
            tj.Ranks(
                lambda x, carry: x.stack,
                lambda n, carry: {"quarter": tj.floor_times(carry["share"].reshape(-1)[:2] / 4, n)},
                scope,
            ),
        )

    def spread(x, value):
        return value if value.ndim == x.stack.ndim else value.reshape((-1,) + (1,) * (x.stack.ndim - 1))

    rng = np.random.default_rng(5)
    stack = {name: rng.normal(size=(2, *shape)).astype(np.float32) for name, shape in {"a": (6, 8), "b": (16,)}.items()}
    names = ("sum", "min", "max", "median", "quarter")

    def mix(x, carry):
        return sum(spread(x, carry[n]) * 2.0**i for i, n in enumerate(names)) + 0 * x.stack

    for scope in ("tensor", "global"):
        step = tj.Step(stages=stages(scope), apply=mix)
        out = tj.sparsify(stack, step)
        for name, values in stack.items():
            tree = np.concatenate([v.reshape(2, -1) for v in stack.values()], axis=1)
            flat = values.reshape(2, -1) if scope == "tensor" else tree
            size = flat.shape[1]
            shares = np.float32(1.0 if scope == "tensor" else 2.0)  # each tensor's shares add up to 1
            ordered = np.sort(flat, axis=1)
            quarter = ordered[:, int(min(shares / 4, 1) * size)]
            parts = (flat.sum(1), flat.min(1), flat.max(1), ordered[:, (size - 1) // 2], quarter)
            expected = sum(p * 2.0**i for i, p in enumerate(parts))
            np.testing.assert_allclose(out[name].reshape(2, -1)[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_rows():
    step = tj.Step(
        stages=(
            tj.Sums(lambda x, carry, n: {"sum": x.stack}, "row"),
            tj.Ranks(lambda x, carry: x.stack, lambda n, carry: {"top": n - 1}, "row"),
        ),
        apply=lambda x, carry: x.stack - carry["sum"] + carry["top"],
        piece="row",
    )
    rng = np.random.default_rng(6)
    stack = rng.normal(size=(2, 6, 8)).astype(np.float32)
    expected = stack - stack.sum(-1, keepdims=True) + stack.max(-1, keepdims=True)
    np.testing.assert_allclose(tj.sparsify({"a": stack}, step)["a"], expected, rtol=1e-5, atol=1e-5)


def test_chains_and_masks(base, models):
    stack = {"x/kernel": np.ones((1, 4), np.float32), "x/bias": np.ones((1, 4), np.float32)}
    masked = tj.masked(tj.uniform(1.0, norm=None), include="kernel")
    zeroed = tj.sparsify(stack, masked)
    assert zeroed["x/bias"].tolist() == [[1.0] * 4]
    # Entries equal to the threshold stay, but at sparsity 1 no entry reaches it.
    assert zeroed["x/kernel"].tolist() == [[0.0] * 4]
    both = tj.masked(tj.masked(tj.uniform(1.0, norm=None), include="x"), include="bias")
    assert np.asarray(tj.sparsify(stack, both)["x/kernel"]).all()
    with pytest.raises(tj.MergeError, match="last"):
        tj.chain(tj.average(), tj.tadrop())
    for step in (tj.tadrop(), tj.conflict_aware(tj.tadrop()), tj.chain(tj.tadrop(), tj.average())):
        with pytest.raises(tj.ParameterError, match=r"'\(' is not a regular expression"):
            tj.masked(step, include="(")
    with pytest.raises(tj.MergeError, match=r"expected a rule or a sparsifier, .*; call it: tj.tadrop\(\)"):
        tj.masked(tj.tadrop, include="kernel")
    with pytest.raises(tj.MergeError, match="matches none"):
        tj.merge(base, models, tj.average(), sparsifier=tj.masked(tj.tadrop(), exclude="nothing"))


def test_float64_trees_keep_their_dtype():
    base = {"w": np.zeros(3, np.float64)}
    merged = tj.merge(base, [{"w": np.ones(3, np.float64)}], tj.average())
    assert merged["w"].dtype == np.float64
    assert merged["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [">f4", np.longdouble])
def test_floats_that_jax_does_not_have_are_refused_by_name(dtype):
    base, model = ({"a": np.full(3, v, dtype), "b": np.full(3, v, np.float32)} for v in (0, 1))
    calls = (
        lambda: tj.merge(base, [model], tj.average()),
        lambda: tj.task_vectors(base, [model]),
        lambda: tj.explain(base, [model], tj.tadrop()),
        lambda: tj.sparsify(base, tj.tadrop()),
    )
    for call in calls:
        with pytest.raises(tj.MergeError, match=f"tensor 'a' is {np.dtype(dtype)}, a dtype that JAX does not have"):
            call()
    assert tj.merge(base, [model], tj.average(), exclude="a")["a"] is base["a"]


@pytest.mark.parametrize("wide", [False, True])
def test_float64_values_that_float32_cannot_hold_are_refused(wide):
    with jax.enable_x64(wide):
        leaf = (jnp.asarray if wide else np.asarray)([1 / 3, 1e300], np.float64)
        one = {"w": leaf[:1]}
        assert tj.merge(one, [one, one], tj.average())["w"].tolist() == [float(np.float32(1 / 3))]
        for call in (
            lambda: tj.merge({"w": leaf}, [{"w": leaf}], tj.average()),
            lambda: tj.explain({"w": leaf}, [{"w": leaf}], tj.tadrop()),
            lambda: tj.sparsify({"w": leaf[None]}, tj.tadrop()),
        ):
            with pytest.raises(tj.MergeError, match="tensor 'w' holds values beyond the range of float32 in the"):
                call()
        bad = {"w": leaf * np.array([np.nan, 0])}
        with pytest.raises(tj.MergeError, match="'w' holds NaN or infinity in model 0"):
            tj.merge({"w": 0 * leaf}, [bad], tj.average())


def test_patterns_and_numbers_that_will_not_do(base, models):
    for bad in (["["], [1], 3):
        with pytest.raises(tj.MergeError, match="regular expression"):
            tj.merge(base, models, tj.average(), include=bad)
    for bad in (float("inf"), float("nan"), 1e39):
        with pytest.raises(tj.MergeError, match="coefficient"):
            tj.task_arithmetic(bad)


def test_two_tensors_of_one_name_are_refused():
    tree = {"params": {"w": jnp.zeros(1)}, "w": jnp.zeros(1)}
    with pytest.raises(tj.MergeError, match="two tensors of one tree have the name 'w'"):
        tj.merge(tree, [tree], tj.average())


def test_tied_weights_count_once_in_task_vectors_too():
    rng = np.random.default_rng(0)

    def tree(scale):
        shared = jnp.asarray(scale * rng.normal(size=20), jnp.float32)
        return {"wte": shared, "head": shared, "other": jnp.asarray(scale * rng.normal(size=20), jnp.float32)}

    base = jax.tree.map(jnp.zeros_like, tree(0))
    base["head"] = base["wte"]
    models = [tree(1), tree(3)]
    stack = tj.task_vectors(base, models)
    assert stack["wte"] is stack["head"]
    alone = tj.merge_task_vectors({n: stack[n] for n in ("wte", "other")}, tj.ties(0.3))
    for merged in (tj.merge(base, models, tj.ties(0.3)), tj.merge_task_vectors(stack, tj.ties(0.3))):
        for name, target in {"wte": "wte", "head": "wte", "other": "other"}.items():
            np.testing.assert_array_equal(merged[name], alone[target])
    said = tj.explain(base, models, tj.magnitude(0.3, granularity="global"))
    pruned = tj.sparsify({n: stack[n] for n in ("wte", "other")}, tj.magnitude(0.3, granularity="global"))
    np.testing.assert_allclose(said["head"]["sparsity"], np.mean(pruned["wte"] == 0, axis=1))


def test_what_is_excluded_need_not_be_alike_whatever_its_dtype():
    base = {"w": jnp.zeros(2), "ids": np.arange(4), "phase": np.ones(2, np.complex64)}
    model = {"w": jnp.ones(2), "ids": np.arange(8), "phase": np.ones(3, np.complex64)}
    merged = tj.merge(base, [model], tj.average(), exclude=["ids", "phase"])
    assert merged["w"].tolist() == [1.0, 1.0]
    assert merged["ids"] is base["ids"]
    assert merged["phase"] is base["phase"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tj.dare(jnp.float32(2.0)), r"density must lie in \[0, 1\]"),
        (lambda: tj.magnitude(np.array(1.5)), r"density must lie in \[0, 1\]"),
        (lambda: tj.magnitude(jnp.array([0.5, 1.5])), r"density must lie in \[0, 1\]"),
        (lambda: tj.task_arithmetic(jnp.float32(jnp.nan)), "finite"),
        (lambda: tj.tadrop(jnp.float32(0.9), jnp.float32(0.5)), "q_low <= q_high"),
        (lambda: tj.tadrop(s_max=1.0), "s_max must lie below 1"),
        (lambda: tj.iso_c(coefficient=[0.5, 1.0]), "coefficient is one number"),
        (lambda: tj.magnitude(np.array([[1.5]])), r"density must be a number, or one per task, got .* shape \(1, 1\)"),
        (lambda: tj.average(np.ones((2, 1))), r"weights must be a number, or one per task, got .* shape \(2, 1\)"),
        (lambda: tj.iso_c(np.ones((1, 1))), r"coefficient is one number, got an array of shape \(1, 1\)"),
        (lambda: tj.average([np.ones(1), 1.0]), "weights must be a number, got array"),
        (lambda: tj.average({"w": 0.3}), "weights must be a number, got {'w': 0.3}"),
        (lambda: tj.average(1j), "weights must be a number, got 1j"),
        (lambda: tj.average(np.complex64(1j)), "weights must be a number, got "),
        (lambda: tj.average(np.array(["a", "b"])), "weights must be a number, got "),
        (lambda: tj.average(jax.random.key(0)), "weights must be a number, got "),
        (lambda: tj.average(np.True_), "weights must be a number, got "),
        (lambda: tj.magnitude({"w": 0.5}), "density must be a number, got {'w': 0.5}"),
    ],
)
def test_parameters_of_a_wrong_kind_or_out_of_range_are_refused(make, said):
    with pytest.raises(tj.ParameterError, match=said):
        make()


@pytest.mark.parametrize("rule", [tj.tall(multi_task=tj.nearswap()), tj.consensus(agree=1, multi_task=tj.slerp())])
def test_rules_on_weights_inside_others_want_a_base(rule):
    with pytest.raises(TypeError, match=r"call tj\.merge"):
        tj.merge_task_vectors({"w": jnp.ones((1, 4))}, rule)


@pytest.mark.parametrize(
    ("apply", "output", "said"),
    [
        (
            lambda x, carry: x.stack,
            "vector",
            r"stack of shape \[2, 3\] a step with output='vector' makes \[3\]; .*\[2, 3\]",
        ),
        (lambda x, carry: x.stack[0], "stack", r"makes \[2, 3\]; its apply gave shape \[3\]"),
        (lambda x, carry: 0.0, "parameters", r"makes \[3\]; its apply gave a float"),
    ],
    ids=["vector", "stack", "parameters"],
)
def test_a_step_of_ones_own_that_gives_another_shape(apply, output, said):
    base = {"w": jnp.zeros(3)}
    models = [{"w": jnp.full(3, float(t))} for t in (1, 2)]
    step = tj.Step(apply=apply, output=output)
    with pytest.raises(tj.MergeError, match=said):
        tj.merge(base, models, tj.chain(step, tj.average()) if output == "stack" else step)


def test_a_step_of_ones_own_of_another_kind():
    with pytest.raises(
        tj.ParameterError, match="output must be one of stack, vector, parameters, bundle, got 'merged'"
    ):
        tj.Step(apply=lambda x, carry: x.stack, output="merged")
    with pytest.raises(tj.ParameterError, match="piece must be one of any, group, row, slice, tensor, got 'block'"):
        tj.Step(apply=lambda x, carry: x.stack, piece="block")


def test_task_arithmetic_rounds_as_numpy_does_and_opposite_vectors_cancel():
    base, *models = np.random.default_rng(5).standard_normal((4, 33, 21)).astype(np.float32)
    weights = np.float32([0.3, 0.7, 1.1])
    products = [(model - base) * weight for model, weight in zip(models, weights, strict=True)]
    wanted = base + ((products[0] + products[1]) + products[2])
    rule = tj.task_arithmetic(1.0, weights=tuple(float(w) for w in weights))
    assert np.array_equal(jax.jit(lambda b, ms: tj.merge(b, ms, rule))(base, models), wanted)
    stack = jnp.stack([models[0], -models[0]])
    assert not jnp.any(tj.merge_task_vectors(stack, tj.task_arithmetic(0.3)))


def test_a_product_has_its_gradient_at_zero_too():
    def total(stack):
        return jnp.sum(tj.merge_task_vectors(stack, tj.task_arithmetic(0.3)))

    assert jnp.all(jax.grad(total)(jnp.zeros((2, 5))) == jnp.float32(0.3))


def test_task_arithmetic_holds_no_task_vectors():
    """By XLA's account."""
    shape = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    merge = jax.jit(lambda b, ms: tj.merge(b, ms, tj.task_arithmetic(0.3)))
    assert merge.lower(shape, [shape] * 4).compile().memory_analysis().temp_size_in_bytes < 4096
