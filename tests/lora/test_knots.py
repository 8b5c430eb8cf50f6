"""KnOTS against a dense float64 transcription, and what every merge of LoRA pairs takes and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj

SIZES = {"q": (8, 6), "mlp": (5, 9)}
RANKS = (2, 1, 2)


def pair(rng, out: int, inputs: int, rank: int) -> dict[str, np.ndarray]:
    return {
        "lora_A": rng.normal(size=(rank, inputs)).astype(np.float32),
        "lora_B": rng.normal(size=(out, rank)).astype(np.float32),
    }


def make_adapters(seed: int = 0, ranks=RANKS, sizes=SIZES) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{name: pair(rng, *size, rank) for name, size in sizes.items()} for rank in ranks]


def dense(adapters, scaling=None) -> dict[str, np.ndarray]:
    """Stacks of the dense changes, in float64."""
    scaling = scaling or [1.0] * len(adapters)
    return {
        name: np.stack(
            [s * a[name]["lora_B"].astype(float) @ a[name]["lora_A"] for a, s in zip(adapters, scaling, strict=True)]
        )
        for name in adapters[0]
    }


def coordinates(stack, shared="output"):
    """U and the S V_t^T of the joint SVD."""
    tasks = list(stack) if shared == "output" else [tau.T for tau in stack]
    u, s, vt = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    kept = s > 1e-5
    parts = np.split(s[kept, None] * vt[kept], len(tasks), axis=1)
    return u[:, kept], np.stack(parts)


def ties(parts: dict, share: float, coefficient: float) -> dict:
    """TIES of ties-merging on the flattened coordinates of all weights: one threshold, one majority."""
    flat = np.stack([np.concatenate([p[t].ravel() for p in parts.values()]) for t in range(len(RANKS))])
    count = flat.shape[1]
    cut = np.sort(np.abs(flat), axis=1)[:, count - int(count * share) - 1, None]
    flat = np.where(np.abs(flat) >= cut, flat, 0)
    sign = np.sign(flat.sum(axis=0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agree = np.where(sign > 0, flat > 0, flat < 0)
    merged = coefficient * (flat * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    sizes = np.cumsum([p[0].size for p in parts.values()])[:-1]
    return {n: m.reshape(p.shape[1:]) for (n, p), m in zip(parts.items(), np.split(merged, sizes), strict=True)}


@pytest.mark.parametrize("shared", ["output", "input"])
def test_knots_ties_equals_the_transcription(shared):
    adapters = make_adapters()
    found = {name: coordinates(stack, shared) for name, stack in dense(adapters).items()}
    merged = ties({name: parts for name, (_, parts) in found.items()}, 0.2, 0.6)
    got = tj.knots(adapters, tj.ties(0.2, 0.6), shared=shared)
    for name, (u, _) in found.items():
        expected = u @ merged[name]
        expected = expected if shared == "output" else expected.T
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_linear_rules_lose_nothing():
    adapters, scaling = make_adapters(), [0.5, 2.0, 1.0]
    got = tj.knots(adapters, tj.task_arithmetic(0.4), scaling=scaling)
    for name, stack in dense(adapters, scaling).items():
        np.testing.assert_allclose(got[name], 0.4 * stack.sum(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "given"),
    [(tj.knots, {}), (tj.knots, {"shared": "input"}), (tj.core_space, {})],
    ids=["knots", "knots input", "core_space"],
)
def test_factored_result_is_an_adapter(method, given):
    adapters = make_adapters()
    whole = method(adapters, tj.ties(0.3), scaling=2.0, **given)
    factors = method(adapters, tj.ties(0.3), scaling=2.0, factored=True, **given)
    assert jax.tree.structure(factors) == jax.tree.structure(adapters[0])
    for name, (out, inputs) in SIZES.items():
        a, b = factors[name]["lora_A"], factors[name]["lora_B"]
        assert a.shape == (b.shape[1], inputs)
        assert b.shape[0] == out
        assert b.shape[1] <= sum(RANKS)
        np.testing.assert_allclose(b @ a, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [tj.knots, tj.core_space])
def test_names_of_peft_and_of_flax(method):
    adapters = make_adapters()
    expected = method(adapters, tj.ties(0.3))
    dotted = [
        {f"base_model.model.{n}.{half}{end}": value for n, p in a.items() for half, value in p.items()}
        for a, end in zip(adapters, (".weight", ".default.weight", ".weight"), strict=True)
    ]
    got = method(dotted, tj.ties(0.3))
    assert sorted(got) == ["base_model.model.mlp.weight", "base_model.model.q.weight"]
    for name in SIZES:
        np.testing.assert_allclose(got[f"base_model.model.{name}.weight"], expected[name], rtol=1e-5, atol=1e-6)
    flax = [{n: {"lora_a": p["lora_A"].T, "lora_b": p["lora_B"].T} for n, p in adapter.items()} for adapter in adapters]
    got = method(flax, tj.ties(0.3))
    for name in SIZES:
        np.testing.assert_allclose(got[name].T, expected[name], rtol=1e-5, atol=1e-6)
    factors = method(flax, tj.ties(0.3), factored=True)["q"]
    np.testing.assert_allclose(factors["lora_a"] @ factors["lora_b"], got["q"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(method([a["q"] for a in adapters], tj.average()).shape, (8, 6))


@pytest.mark.parametrize("method", [tj.knots, tj.core_space])
def test_a_fresh_adapter_changes_nothing_and_gradients_are_finite(method):
    """PEFT starts B at zero."""
    adapters = make_adapters(ranks=(2, 2, 2), sizes={"q": (8, 6)})
    adapters[1]["q"]["lora_B"][:] = 0
    rule = tj.task_arithmetic(1.0)
    np.testing.assert_allclose(method(adapters, rule)["q"], dense(adapters)["q"].sum(axis=0), rtol=1e-4, atol=1e-5)

    def total(adapters):
        return jnp.sum(method(adapters, rule)["q"] ** 2)

    slopes = jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, adapters))
    assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    # Away from zero it is the gradient of the sum of products.
    adapters = jax.tree.map(jnp.asarray, make_adapters(ranks=(1, 2), sizes={"q": (8, 6)}))
    expected = jax.grad(lambda ps: jnp.sum(sum(p["q"]["lora_B"] @ p["q"]["lora_A"] for p in ps) ** 2))(adapters)
    slopes = jax.jit(jax.grad(total))(adapters)
    for got, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", [tj.knots, tj.core_space])
def test_sparsifiers_and_keys(method):
    adapters = make_adapters()
    first = method(adapters, tj.ties(None), sparsifier=tj.dare(0.5), key=jax.random.key(1))
    again = method(adapters, tj.ties(None), sparsifier=tj.dare(0.5), key=jax.random.key(1))
    other = method(adapters, tj.ties(None), sparsifier=tj.dare(0.5), key=jax.random.key(2))
    np.testing.assert_array_equal(first["q"], again["q"])
    assert np.abs(first["q"] - other["q"]).max() > 1e-3
    with pytest.raises(tj.MergeError, match="key"):
        method(adapters, tj.average(), sparsifier=tj.dare(0.5))


@pytest.mark.peers
def test_sum_equals_peft_svd():
    """`add_weighted_adapter(svd)` of full rank is the dense sum; so is KnOTS with Task Arithmetic."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, adapter_name="first")
    wrapped.add_adapter("second", config)
    layer = wrapped.base_model.model[0]
    for name in ("first", "second"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
    wrapped.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=6)
    expected = (layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight * layer.scaling["sum"]).detach().numpy()
    adapters = [
        {"lora_A": layer.lora_A[n].weight.detach().numpy(), "lora_B": layer.lora_B[n].weight.detach().numpy()}
        for n in ("first", "second")
    ]
    got = tj.knots(adapters, tj.task_arithmetic(1.0), scaling=layer.scaling["first"])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def without(tree, *path):
    return {k: (v if k != path[0] else without(v, *path[1:])) for k, v in tree.items() if (k,) != path}


@pytest.mark.parametrize("method", [tj.knots, tj.core_space])
def test_refusals(method):
    adapters, name = make_adapters(), method.__name__
    rule = tj.average()
    for given, error, words in [
        ([], tj.MergeError, "list of at least one"),
        (adapters[0], tj.MergeError, "list of at least one"),
        ([adapters[0], without(adapters[1], "q")], tj.MismatchError, "adapter 1 lacks tensor 'q'"),
        ([adapters[0], without(adapters[1], "q", "lora_B")], tj.MergeError, "q lacks lora_B"),
        ([{**adapters[0], "head": np.ones(3, np.float32)}], tj.MergeError, "'head' is no LoRA factor"),
        ([{"q": {**adapters[0]["q"], "lora_A": np.ones((3, 6), np.float32)}}], tj.MismatchError, "do not go together"),
        ([{"q": adapters[0]["q"]}, {"q": adapters[1]["mlp"]}], tj.MismatchError, r"\[5, 9\] in adapter 1"),
    ]:
        with pytest.raises(error, match=f"{name}.*{words}"):
            method(given, rule)
    with pytest.raises(tj.MergeError, match="scaling has 2 values"):
        method(adapters, rule, scaling=[1.0, 2.0])
    with pytest.raises(tj.MergeError, match="one for each task"):
        method(adapters, tj.emr())
    with pytest.raises(tj.ParameterError, match="scaling must be a number"):
        method(adapters, rule, scaling="large")


def test_bad_values_are_refused():
    for values in ({"shared": "both"}, {"cutoff": -1.0}):
        with pytest.raises(tj.ParameterError, match=f"knots: {next(iter(values))}"):
            tj.knots(make_adapters(), tj.average(), **values)


def test_cutoff_leaves_directions_out():
    adapters = [{"q": {"lora_A": np.eye(2, 4, dtype=np.float32), "lora_B": np.diag([1.0, 1e-6]).astype(np.float32)}}]
    assert tj.knots(adapters, tj.average(), factored=True)["q"]["lora_B"].shape == (2, 1)
    assert tj.knots(adapters, tj.average(), cutoff=0.0, factored=True)["q"]["lora_B"].shape == (2, 2)
