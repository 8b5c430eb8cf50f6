"""WUDI against NumPy transcriptions of its loss, and against torch's Adam on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import merge, read_model, report_of, save_family

# Tall and wide; five tasks of rank 1 do not fill the inputs of the wide one.
TALL, WIDE = (3, 9, 6), (3, 5, 20)


def make(shape, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def gradient(m, stack):
    """Of the loss, in float64, from its definition."""
    total = np.zeros(m.shape)
    for tau in stack.astype(np.float64):
        square = (tau**2).sum()
        if square > 0:
            total += 2 * (m - tau) @ tau.T @ tau / square
    return total


def loss(m, stack):
    total = 0.0
    for tau in stack.astype(np.float64):
        square = (tau**2).sum()
        if square > 0:
            total += (((m - tau) @ tau.T) ** 2).sum() / square
    return total


def pseudo_inverse(stack, rcond=1e-9):
    """The minimiser of least norm, in float64."""
    gram, pull = np.zeros((stack.shape[2],) * 2), np.zeros(stack.shape[1:])
    for tau in stack.astype(np.float64):
        square = (tau**2).sum()
        if square > 0:
            gram, pull = gram + tau.T @ tau / square, pull + tau @ tau.T @ tau / square
    return pull @ np.linalg.pinv(gram, rcond=rcond)


def adam(stack, rate, steps):
    """Kingma and Ba's, in float64, from the sum of the task vectors."""
    m = stack.astype(np.float64).sum(axis=0)
    first, second = np.zeros(m.shape), np.zeros(m.shape)
    for i in range(1, steps + 1):
        g = gradient(m, stack)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        m = m - rate * (first / (1 - 0.9**i)) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
    return m


def run(stack, rule):
    return np.asarray(tj.merge_task_vectors({"w": jnp.asarray(stack)}, rule)["w"])


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_adam_equals_the_transcription(shape):
    stack = make(shape, scale=1e-2)
    stack[1] *= 20
    expected = adam(stack, 1e-3, 40)
    assert np.abs(expected - stack.sum(axis=0)).max() > 5e-3
    np.testing.assert_allclose(run(stack, tj.wudi(learning_rate=1e-3, steps=40)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_adam_equals_torch_on_the_authors_loss(shape):
    """300 steps at 1e-5, on float32; the authors' loss, formed as they form it, with torch's autograd and Adam."""
    torch = pytest.importorskip("torch")
    stack = make(shape, scale=1e-3)
    vectors = torch.tensor(stack)
    merged = torch.nn.Parameter(vectors.sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    squares = vectors.square().sum((1, 2), keepdim=True)
    for _ in range(300):
        optimizer.zero_grad()
        (((merged - vectors) @ vectors.mT).square() / squares).sum().backward()
        optimizer.step()
    expected = merged.detach().numpy()
    assert np.abs(expected - stack.sum(axis=0)).max() > 1e-3
    np.testing.assert_allclose(run(stack, tj.wudi()), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(("shape", "zeros"), [(TALL, ()), (WIDE, ()), (WIDE, (1,)), (TALL, (0, 1, 2))])
def test_closed_form_has_no_gradient_and_least_norm(shape, zeros):
    stack = make(shape)
    stack[list(zeros)] = 0
    merged = run(stack, tj.wudi(solver="closed"))
    np.testing.assert_allclose(gradient(merged, stack), 0, atol=3e-6)
    np.testing.assert_allclose(merged, pseudo_inverse(stack), rtol=1e-4, atol=1e-5)
    assert loss(merged, stack) <= loss(run(stack, tj.wudi(steps=3)), stack) + 1e-9


def test_closed_form_of_low_rank():
    rng = np.random.default_rng(1)
    stack = (rng.normal(size=(3, 9, 1)) @ rng.normal(size=(3, 1, 6))).astype(np.float32)
    np.testing.assert_allclose(run(stack, tj.wudi(solver="closed")), pseudo_inverse(stack), rtol=1e-4, atol=1e-5)
    # A cutoff of 1 leaves nothing but what is above the largest: zero.
    np.testing.assert_array_equal(run(stack, tj.wudi(solver="closed", cutoff=1.0)), 0)


@pytest.mark.parametrize("shape", [(2, 20, 12), (2, 5, 24)], ids=["tall", "wide"])
def test_closed_form_of_an_uneven_spectrum(shape):
    """Singular values over two decades, and directions far below the cutoff, which stay out."""
    rng = np.random.default_rng(2)
    tasks, out, inputs = shape
    u, _, vt = np.linalg.svd(rng.normal(size=(tasks * out, inputs)), full_matrices=False)
    s = np.geomspace(1, 1e-2, min(tasks * out, inputs))
    s[-3:] = 1e-5
    stack = ((u * s) @ vt).reshape(shape).astype(np.float32)
    expected = pseudo_inverse(stack, 1e-6)
    merged = run(stack, tj.wudi(solver="closed"))
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_closed_form_does_not_depend_on_the_scale():
    stack = make(TALL)
    small = run(stack * 2.0**-60, tj.wudi(solver="closed"))
    np.testing.assert_array_equal(small * 2.0**60, run(stack, tj.wudi(solver="closed")))


def test_two_tasks_with_inputs_of_their_own_keep_both():
    stack = np.zeros((2, 3, 4), np.float32)
    stack[0, :, :2], stack[1, :, 2:] = make((3, 2)), make((3, 2), 1)
    np.testing.assert_allclose(run(stack, tj.wudi(solver="closed")), stack.sum(axis=0), rtol=1e-5, atol=1e-6)
    # The sum is then the minimum already, where Adam starts.
    np.testing.assert_allclose(run(stack, tj.wudi(steps=3)), stack.sum(axis=0), atol=1e-4)


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_layouts_and_input_axis(solver):
    """torch Linear (out, in), the Flax kernel of it with its layout, and GPT-2's Conv1D give the same weights."""
    stack = make(TALL)
    rule = tj.wudi(solver=solver, steps=5, learning_rate=1e-2)
    expected = run(stack, rule)
    base = {"kernel": jnp.zeros(TALL[:0:-1])}
    models = [{"kernel": jnp.asarray(tau.T)} for tau in stack]
    flax = tj.merge(base, models, rule, layout={"kernel": (1, 0)})["kernel"]
    np.testing.assert_allclose(flax.T, expected, rtol=1e-4, atol=1e-5)
    conv1d = tj.wudi(solver=solver, steps=5, learning_rate=1e-2, input_axis=0)
    np.testing.assert_allclose(run(stack.swapaxes(1, 2), conv1d).T, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(run(stack.swapaxes(1, 2), rule).T - expected).max() > 1e-3


def test_other_tensors_get_the_mean():
    stack = {
        "w": make(TALL),
        "wte": make(TALL, 1),
        "bias": make((3, 7)),
        "conv": make((3, 2, 2, 2, 2)),
        "s": make((3,)),
    }
    merged = tj.merge_task_vectors(stack, tj.wudi(0.5, solver="closed", mean_only="^wte"))
    np.testing.assert_allclose(merged["w"], 0.5 * run(stack["w"], tj.wudi(solver="closed")), rtol=1e-6)
    for name in ("wte", "bias", "conv", "s"):
        np.testing.assert_allclose(merged[name], 0.5 * stack[name].mean(axis=0), rtol=1e-6, atol=1e-7, err_msg=name)


def test_bfloat16_is_subtracted_in_float32():
    base = {"w": jnp.ones(TALL[1:], jnp.bfloat16)}
    models = [{"w": (1 + jnp.asarray(tau)).astype(jnp.bfloat16)} for tau in make(TALL)]
    merged = tj.merge(base, models, tj.wudi(solver="closed"))["w"]
    assert merged.dtype == jnp.bfloat16
    stack = np.stack([np.asarray(m["w"], np.float32) - 1 for m in models])
    np.testing.assert_allclose(np.asarray(merged, np.float32), 1 + pseudo_inverse(stack), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("solver", ["adam", "closed"])
@pytest.mark.parametrize("kind", ["normal", "zeros", "low rank"])
def test_gradients_are_finite(solver, kind):
    stack = make(TALL)
    if kind == "zeros":
        stack[1], stack[0, 2], stack[:, :, 3] = 0, 0, 0
    elif kind == "low rank":
        stack[:] = np.outer(stack[0, :, 0], stack[0, 0])
    rule = tj.wudi(solver=solver, steps=20)

    def total(stack, coefficient):
        return coefficient * jnp.sum(tj.merge_task_vectors({"w": stack}, rule)["w"] ** 2)

    for g in jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(stack), 1.0):
        assert np.isfinite(g).all()


@pytest.mark.parametrize("shape", [TALL, (2, 3, 7)], ids=["tall", "wide"])
def test_gradient_of_the_closed_form_matches_differences(shape):
    """Also where singular values repeat: the first case has one task twice."""
    stack, step = make(shape), make(shape, 5) * 1e-3
    stack[1] = stack[0]

    def total(stack):
        return jnp.sum(jnp.sin(tj.merge_task_vectors({"w": stack}, tj.wudi(solver="closed"))["w"]))

    along = float(jnp.sum(jax.grad(total)(jnp.asarray(stack)) * step))
    np.testing.assert_allclose(along, float(total(stack + step) - total(stack - step)) / 2, rtol=2e-2, atol=1e-4)


def test_gradient_in_the_learning_rate():
    stack = jnp.asarray(make(TALL))

    def total(rate):
        return jnp.sum(tj.merge_task_vectors({"w": stack}, tj.wudi(learning_rate=rate, steps=10))["w"] ** 2)

    found = jax.grad(total)(1e-2)
    np.testing.assert_allclose(found, (total(1.1e-2) - total(0.9e-2)) / 2e-3, rtol=2e-2)


def test_one_model_is_refused():
    with pytest.raises(tj.MergeError, match="wudi"):
        tj.merge_task_vectors({"w": make((1, 4, 3))}, tj.wudi())


@pytest.mark.parametrize(
    "values",
    [
        {"solver": "sgd"},
        {"input_axis": 2},
        {"steps": -1},
        {"learning_rate": -1.0},
        {"learning_rate": [1.0, 2.0]},
        {"cutoff": 0.0},
        {"coefficient": [1.0, 2.0]},
    ],
    ids=lambda v: next(iter(v)),
)
def test_bad_values_are_refused(values):
    with pytest.raises(tj.ParameterError, match=f"wudi: {next(iter(values))}"):
        tj.wudi(**values)


def test_from_directories(tmp_path):
    shapes = {"layer.weight": (9, 6), "layer.bias": (9,), "embed.weight": (9, 6)}
    base, models = save_family(tmp_path, tasks=3, shapes=shapes)
    more = ["--set", "solver=closed", "--set", "mean_only=^embed"]
    assert merge(tmp_path, *more, method="wudi", models=("m0", "m1", "m2")) == 0
    expected = tj.merge(base, models, tj.wudi(solver="closed", mean_only="^embed"))
    for name, value in read_model(tmp_path / "out").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    rows = report_of(tmp_path / "out")["tensors"]
    assert {name: row["treated"] for name, row in rows.items()} == {
        "layer.weight": "matrix",
        "layer.bias": "mean",
        "embed.weight": "mean",
    }
    norms = [np.linalg.norm(m["layer.weight"] - base["layer.weight"]) for m in models]
    np.testing.assert_allclose(rows["layer.weight"]["norm"], norms, rtol=1e-5)
