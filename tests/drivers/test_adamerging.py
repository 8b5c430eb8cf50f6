"""AdaMerging against the authors' step, written out in NumPy, and fusion-bench; its options, files and pictures."""

import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import tadrop_jax as tj
from tadrop_jax import plots
from tadrop_jax.drivers import common
from tadrop_jax.drivers.adamerging import compiled_step

from .conftest import TASKS, WIDTH, mlp


def as_pytorch(tree):
    """The tree of an ``mlp``, or of its coefficients, under the names and in the layout of PyTorch's Sequential."""
    layers = {"0": tree["one"], "2": tree["two"]}
    parts = {"weight": "kernel", "bias": "bias"}
    return {f"{i}.{ours}": np.array(layer[part]).T for i, layer in layers.items() for ours, part in parts.items()}


def entropy_and_gradient(z):
    """Mean softmax entropy of logits, and its gradient in them."""
    logs = z - z.max(1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    p = np.exp(logs)
    h = -(p * logs).sum(1, keepdims=True)
    return h.mean(), -p * (logs + h) / len(z)


def linear_adamerging(base, models, batches, steps, start, shared, bounds):
    """The loop of the authors' scripts for logits x @ kernel + bias, in float64."""
    names = list(base)
    raw = np.array([start] * (1 if shared else len(names)), np.float64)  # (tensors, tasks)
    first, second = np.zeros_like(raw), np.zeros_like(raw)
    losses = []
    for step in range(1, steps + 1):
        used = np.clip(raw, 0, 1) if bounds == "clip" else raw
        theta = {}
        for i, n in enumerate(names):
            row = used[0 if shared else i]
            theta[n] = base[n] + sum(row[t] * (models[t][n] - base[n]) for t in range(len(models)))
        gradient, found = np.zeros_like(raw), []
        for batch in batches:
            x = batch[(step - 1) % len(batch)].astype(np.float64)
            loss, by_logits = entropy_and_gradient(x @ theta["kernel"] + theta["bias"])
            found.append(loss)
            by_theta = {"kernel": x.T @ by_logits, "bias": by_logits.sum(0)}
            for i, n in enumerate(names):
                for t, model in enumerate(models):
                    gradient[0 if shared else i, t] += np.sum(by_theta[n] * (model[n] - base[n]))
        if bounds == "clip":
            gradient = gradient * ((raw >= 0) & (raw <= 1))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        raw = raw - 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if bounds == "project":
            raw = np.clip(raw, 0, 1)
        losses.append(found)
    used = np.clip(raw, 0, 1) if bounds == "clip" else raw
    return {n: used[0 if shared else i] for i, n in enumerate(names)}, np.array(losses)


@pytest.fixture(scope="module")
def linear(trees):
    base, models = trees
    rng = np.random.default_rng(2)
    return (
        base["one"],
        [m["one"] for m in models],
        [[rng.normal(size=(6, WIDTH)).astype(np.float32) for _ in range(2)] for _ in range(TASKS)],
    )


@pytest.mark.parametrize(
    ("granularity", "bounds", "start", "remat"),
    [
        ("tensor", "clip", (0.3, 0.3), True),
        ("tensor", "clip", (0.0, 0.98), False),  # some leave the interval, and get no gradient any more
        ("task", "project", (0.0, 0.98), True),
        ("task", None, (0.0, 0.98), False),
    ],
)
def test_the_authors_loop(linear, granularity, bounds, start, remat):
    base, models, batches = linear
    found = tj.adamerging(
        lambda p, x: x @ p["kernel"] + p["bias"],
        batches,
        base,
        models,
        granularity=granularity,
        init=start,
        steps=6,
        learning_rate=0.05,
        bounds=bounds,
        remat=remat,
    )
    as_numpy = lambda tree: {n: np.asarray(v, np.float64) for n, v in tree.items()}  # noqa: E731
    expected, losses = linear_adamerging(
        as_numpy(base), [as_numpy(m) for m in models], batches, 6, start, granularity == "task", bounds
    )
    np.testing.assert_allclose(found.losses, losses, rtol=2e-5)
    coefficients = found.coefficients if granularity == "tensor" else dict.fromkeys(expected, found.coefficients)
    for name, values in expected.items():
        np.testing.assert_allclose(coefficients[name], values, atol=2e-5)
    again = tj.with_coefficients(base, models, found.coefficients)
    chex.assert_trees_all_close(found.params, again, rtol=1e-6)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of what fusion_bench imports
@pytest.mark.parametrize(("granularity", "clip"), [("tensor", True), ("task", True), ("task", False)])
def test_fusion_bench(granularity, clip, trees, inputs):
    """Its wrappers of PyTorch modules in its own loop, at a rate that drives coefficients out of the interval."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("fusion_bench.method.adamerging.layer_wise_adamerging", exc_type=ImportError)
    from fusion_bench import BaseModelPool
    from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
    from omegaconf import DictConfig

    steps, start, rate = 5, [0.3, 0.98], 0.05
    whole = granularity == "task"
    feeds = {str(t): itertools.cycle([torch.tensor(x) for x in batches]) for t, batches in enumerate(inputs)}

    class Algorithm(TaskWiseAdaMergingAlgorithm if whole else peer.LayerWiseAdaMergingAlgorithm):
        # What it takes of lightning, on one device; the task-wise class and the other call it by two names.
        fabric = _fabric = SimpleNamespace(
            setup=lambda module, optimizer: (module, optimizer),
            backward=lambda loss, **how: loss.backward(**how),
            log_dict=lambda *_, **__: None,
        )

        def get_shuffled_test_loader_iter(self, task):
            return feeds[task] if whole else ((x,) for x in feeds[task])

        def compute_logits(self, module, batch, task):
            return module(batch)

    def module(tree):
        made = torch.nn.Sequential(torch.nn.Linear(WIDTH, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        made.load_state_dict({n: torch.tensor(x) for n, x in as_pytorch(tree).items()})
        return made

    base, models = trees
    config = {"optimizer": "adam", "lr": rate, "max_steps": steps, "weights": None, "init_values": start[0]}
    algorithm = Algorithm(DictConfig(config | {"clamp_weights": clip, "tie_weights": False, "strict": True}))
    algorithm.modelpool = BaseModelPool(
        {"_pretrained_": module(base)} | {str(t): module(model) for t, model in enumerate(models)}
    )
    build = "construct_task_wise_merged_model" if whole else "construct_layer_wise_merged_model"
    wrapper = getattr(algorithm, build)(algorithm.modelpool)
    wrapper.merge_weight.data[1] = start[1]  # its configuration has one number for all
    raw = algorithm.test_time_adaptation(wrapper).merge_weight.detach().numpy()  # (T,) or (T, tensors)
    assert raw[1].max() > 1 + rate / 2
    assert raw[0].max() < 1

    found = tj.adamerging(
        mlp,
        inputs,
        base,
        models,
        granularity=granularity,
        init=start,
        steps=steps,
        learning_rate=rate,
        bounds="clip" if clip else None,
    )
    used = np.clip(raw, 0, 1) if clip else raw
    if whole:
        np.testing.assert_allclose(found.coefficients, used, atol=2e-6)
    else:
        coefficients = as_pytorch(found.coefficients)
        for i, (name, _) in enumerate(wrapper.task_vectors[0].named_parameters()):
            np.testing.assert_allclose(coefficients[name], used[:, i], atol=2e-6, err_msg=name)
    ours = as_pytorch(found.params)
    for name, expected in wrapper.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=2e-6, err_msg=name)


def test_one_function_a_task_is_the_shared_function(trees, inputs):
    """Another function a task, and batches of other shapes, take the branching loop."""
    base, models = trees
    shared = tj.adamerging(mlp, inputs, base, models, steps=2)
    functions = [lambda p, x, t=t: mlp(p, x["inputs"] if t else x) for t in range(TASKS)]
    other = [inputs[0], [{"inputs": x} for x in inputs[1]]]
    found = tj.adamerging(functions, other, base, models, steps=2)
    np.testing.assert_allclose(found.losses, shared.losses, rtol=1e-6)
    chex.assert_trees_all_close(found.params, shared.params, rtol=1e-5)
    assert found.params["step"] == 7


def test_linen_and_nnx_modules(inputs):
    """Their parameter trees go in and come back."""
    dense = linen.Dense(3)
    first, second, third = (dense.init(jax.random.key(i), inputs[0][0])["params"] for i in range(3))
    found = tj.adamerging(lambda p, x: dense.apply({"params": p}, x), inputs, first, [second, third], steps=2)

    module = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))
    apply, state = tj.nnx_apply(module)

    def filled(params):
        return jax.tree.unflatten(jax.tree.structure(state), [params["bias"], params["kernel"]])

    other = tj.adamerging(apply, inputs, filled(first), [filled(second), filled(third)], steps=2)
    assert isinstance(other.params, nnx.State)
    np.testing.assert_allclose(other.losses, found.losses, rtol=1e-6)
    np.testing.assert_allclose(other.params["kernel"].get_value(), found.params["kernel"], rtol=1e-6)
    assert set(other.table()) == {"bias", "kernel"}


def test_any_sparsifier_and_excluded_tensors(trees, inputs):
    """AdaMerging++: what is learned on is what the sparsifier leaves; excluded tensors are the base's."""
    base, models = trees
    sparsifier = tj.dare(0.5)
    key = jax.random.key(3)
    found = tj.adamerging(mlp, inputs, base, models, steps=2, sparsifier=sparsifier, exclude="^two/bias", key=key)
    assert found.coefficients["two"]["bias"] is None
    assert found.coefficients["step"] is None
    chex.assert_trees_all_equal(found.params["two"]["bias"], base["two"]["bias"])
    stack = tj.sparsify(tj.task_vectors(base, models), sparsifier, key=key)
    c = found.coefficients["one"]["kernel"]
    expected = base["one"]["kernel"] + jnp.tensordot(c, stack["one"]["kernel"], 1)
    np.testing.assert_allclose(found.params["one"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    again = tj.with_coefficients(base, models, found.coefficients, sparsifier=sparsifier, key=key)
    chex.assert_trees_all_close(again, found.params, rtol=1e-6)


def test_bfloat16_models_stay_bfloat16(trees, inputs):
    base, models = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, trees)
    found = tj.adamerging(mlp, inputs, base, models, steps=1, granularity="task")
    assert found.params["one"]["kernel"].dtype == jnp.bfloat16
    assert found.coefficients.dtype == jnp.float32


def test_sharded_models_are_merged_where_they_lie(linear):
    """Equal to one device's, sharded alike, and no parameter crosses devices."""
    base, models, batches = linear
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    over = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    there = {"kernel": over("d", None), "bias": over()}
    spread_base, *spread = (jax.device_put(tree, there) for tree in (base, *models))
    function = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    found = tj.adamerging(function, batches, spread_base, spread, steps=2)
    chex.assert_trees_all_close(found.params, tj.adamerging(function, batches, base, models, steps=2).params, rtol=1e-6)
    assert found.params["kernel"].sharding.is_equivalent_to(there["kernel"], 2)
    problem = common.problem("adamerging", spread_base, spread)
    raw = {name: jnp.full(TASKS, 0.3) for name in base}
    step = compiled_step(problem, (function,) * TASKS, optax.sgd(1.0), "clip", True)
    arguments = (raw, optax.sgd(1.0).init(raw), problem.base, common.vectors(problem, None, None, None), {})
    text = step.lower(*arguments, tuple(b[0] for b in batches)).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_early_stop_and_own_optimizer(trees, inputs):
    """With a rate of 0 the loss never falls: patience ends it."""
    base, models = trees
    fixed = [[batches[0]] for batches in inputs]
    found = tj.adamerging(mlp, fixed, base, models, steps=50, optimizer=optax.sgd(0.0), patience=3)
    assert found.losses.shape == (4, TASKS)
    np.testing.assert_array_equal(found.table()["one/bias"], np.float32([0.3, 0.3]))


def test_batches_from_functions_and_a_progress_bar(trees, inputs, capsys):
    base, models = trees
    functions = [lambda step, b=b: b[step % 2] for b in inputs]
    found = tj.adamerging(mlp, functions, base, models, steps=3, progress=True)
    expected = tj.adamerging(mlp, inputs, base, models, steps=3)
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert "adamerging" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("granularity", ["tensor", "task"])
def test_save_and_load(granularity, format, trees, tmp_path):
    base, _ = trees
    values = jnp.array([0.25, 0.5])
    tree = jax.tree.map(lambda x: values if x.ndim else None, base)
    saved = tj.AdaMerged(None, tree if granularity == "tensor" else values, np.ones((3, 2), np.float32))
    saved.save(tmp_path / "found", format)
    loaded = tj.AdaMerged.load(tmp_path / "found", base if granularity == "tensor" else None)
    chex.assert_trees_all_equal(loaded.coefficients, saved.coefficients)
    np.testing.assert_array_equal(loaded.losses, saved.losses)
    assert loaded.table().keys() == saved.table().keys()
    assert loaded.table() != {}


def test_the_picture_is_drawn(tmp_path):
    table = {f"layer_{i}/kernel": np.linspace(0, 1, 3) for i in range(4)}
    plots.draw_coefficients(table, ("a", "b", "c"), tmp_path / "map.png", losses=np.ones((5, 3)))
    plots.draw_coefficients({"all tensors": np.ones(3)}, ("a", "b", "c"), tmp_path / "bar.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("map.png", "bar.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"granularity": "layer"}, "granularity must be one of 'tensor', 'task'"),
        ({"bounds": "box"}, "bounds must be one of"),
        ({"steps": 0}, r"steps must lie in \[1, inf\]"),
        ({"init": [0.1, 0.2, 0.3]}, "init has 3 values, one per task, but there are 2 tasks"),
        ({"learning_rate": 0.1, "optimizer": optax.sgd(1.0)}, "learning_rate is Adam's"),
        ({"patience": 0}, "patience must lie in"),
        ({"apply_fns": None}, "apply_fns must be one function, or a list of 2, got NoneType"),
        ({"apply_fns": [mlp]}, "apply_fns has 1 functions, one per task, but there are 2 tasks"),
        ({"batches": [np.ones((6, WIDTH))] * 2}, r"batches\[0\] must be an iterable of batches"),
        ({"batches": [[]] * 2}, r"batches\[0\] has no batch"),
        ({"batches": [iter([np.ones((6, WIDTH), np.float32)])] * 2}, r"batches\[1\] has no batch"),
        ({"batches": [[np.full((6, WIDTH), np.nan, np.float32)]] * 2}, "the loss at step 0 is nan"),
        ({"sparsifier": tj.average()}, "takes a sparsifier"),
        ({"exclude": "nothing"}, "matches none of"),
    ],
)
def test_refusals(change, said, trees, inputs):
    base, models = trees
    arguments = {"apply_fns": mlp, "batches": inputs, "base": base, "models": models, "steps": 2} | change
    with pytest.raises(tj.MergeError, match=said):
        tj.adamerging(**arguments)


def test_with_coefficients_refuses_others(trees):
    base, models = trees
    with pytest.raises(tj.MergeError, match="has coefficients of shape"):
        tj.with_coefficients(base, models, jnp.ones(3))
    with pytest.raises(tj.MergeError, match="are not those of the base"):
        tj.with_coefficients(base, models, {"one": jnp.ones(2)})


def test_endless_batches_begin_again():
    assert list(itertools.islice(common.endless("x", [1, 2], 0), 5)) == [1, 2, 1, 2, 1]
    ending = common.endless("x", lambda step: None if step == 2 else step, 0)
    assert list(itertools.islice(ending, 2)) == [0, 1]
    with pytest.raises(tj.MergeError, match=r"x: batches\[0\] gave None"):
        next(ending)


def test_tied_weights_stay_tied():
    rng = np.random.default_rng(0)

    def tree():
        shared = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
        return {"wte": shared, "head": shared, "bias": jnp.zeros(5)}

    def logits(params, ids):
        return params["wte"][ids] @ params["head"].T + params["bias"]

    base, models = tree(), [tree(), tree()]
    batches = [itertools.repeat(jnp.asarray(rng.integers(0, 5, 8))) for _ in models]
    sparsifier = tj.masked(tj.magnitude(0.5), exclude="head")
    found = tj.adamerging([logits, logits], batches, base, models, steps=5, learning_rate=1e-2, sparsifier=sparsifier)
    np.testing.assert_array_equal(found.params["wte"], found.params["head"])
    np.testing.assert_array_equal(found.coefficients["wte"], found.coefficients["head"])
