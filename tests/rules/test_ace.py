"""ACE-Merging against a float64 transcription of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.rules.test_wudi import TALL, WIDE, make, run


def transcription(stack, epsilon=1e-2, threshold=0.3, share=0.3):
    stack = stack.astype(np.float64)
    tasks, out, inputs = stack.shape
    squares = np.array([np.trace(tau.T @ tau) for tau in stack])
    logs = np.log(squares + 1e-12)
    differ = tasks > 1 and np.var(logs, ddof=1) / (np.mean(logs) ** 2 + 1e-12) > threshold
    covariances, regular, weighted = [], 0.0, 0.0
    for tau in stack:
        centred = tau - tau.mean(axis=0, keepdims=True)
        cov, e = centred.T @ centred, epsilon
        if differ:
            trace = np.trace(cov)
            # A task vector without a trace has no floor; the authors divide by 1e-12.
            cov, e = cov / (trace + 1e-12), epsilon / (trace + 1e-12) if trace > 0 else 0.0
        covariances.append(cov)
        regular = regular + cov + e * np.eye(inputs)
        weighted = weighted + centred @ (cov + e * np.eye(inputs))
    bar = sum(covariances).mean(axis=0, keepdims=True)
    if differ:
        bar = bar / (squares.mean() + 1e-12)
    merged = weighted @ np.linalg.inv(regular + bar)
    k = int(share * min(out, inputs))
    if differ and k:
        fit = merged + sum(tau @ (cov - regular / tasks) for tau, cov in zip(stack, covariances, strict=True))
        u, s, vt = np.linalg.svd(fit, full_matrices=False)
        merged = merged + s[:k].mean() * u[:, :k] @ vt[:k]
    return merged, differ


def sized(shape, sizes):
    return make(shape) * np.asarray(sizes, np.float32)[:, None, None]


ALIKE, UNLIKE = (1.0, 0.8, 1.2), (1.0, 8.0, 0.1)


@pytest.mark.parametrize(
    ("shape", "sizes", "values"),
    [
        (TALL, ALIKE, {}),
        (WIDE, ALIKE, {}),
        (TALL, UNLIKE, {}),
        (WIDE, UNLIKE, {"epsilon": 0.5, "share": 0.6}),
        (TALL, UNLIKE, {"share": 0.1}),  # k is 0
        (TALL, ALIKE, {"threshold": 0.0}),
        (WIDE, UNLIKE, {"epsilon": 0.5, "threshold": 100.0}),
    ],
)
def test_equals_the_transcription(shape, sizes, values):
    stack = sized(shape, sizes)
    assert transcription(stack)[1] == (sizes == UNLIKE)
    expected, _ = transcription(stack, **values)
    merged = run(stack, tj.ace(**values))
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_one_task_and_two():
    for tasks in (1, 2):
        stack = make((tasks, *TALL[1:]))
        np.testing.assert_allclose(run(stack, tj.ace()), transcription(stack)[0], rtol=1e-3, atol=1e-4)


def test_a_zero_task_vector_does_not_drown_the_others():
    stack = sized(TALL, ALIKE)
    stack[1] = 0
    expected, differ = transcription(stack)
    assert differ
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(run(stack, tj.ace()), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(run(np.zeros(TALL, np.float32), tj.ace()), 0)


@pytest.mark.parametrize("kind", ["low rank", "constant columns", "one constant"])
def test_degenerate_updates_and_their_gradients_are_finite(kind):
    stack = sized(TALL, UNLIKE)
    if kind == "low rank":
        stack[:] = stack[:, :, :1] * stack[:, :1]
    elif kind == "constant columns":
        stack[:] = stack[:, :1]
    else:
        stack[0] = stack[0, :1]

    def total(stack, epsilon):
        return jnp.sum(tj.merge_task_vectors({"w": stack}, tj.ace(epsilon))["w"] ** 2)

    value, slopes = jax.jit(jax.value_and_grad(total, (0, 1)))(jnp.asarray(stack), 1e-2)
    assert np.isfinite(value)
    assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("sizes", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_gradient_matches_differences(sizes):
    def total(stack):
        return jnp.sum(jnp.sin(tj.merge_task_vectors({"w": stack}, tj.ace(0.1))["w"]))

    stack, step = sized(TALL, sizes), sized(TALL, sizes)[:, ::-1] * 1e-3
    along = float(jnp.sum(jax.jit(jax.grad(total))(jnp.asarray(stack)) * step))
    np.testing.assert_allclose(along, float(total(stack + step) - total(stack - step)) / 2, rtol=2e-2, atol=1e-4)


def test_input_axis_and_means():
    stack = sized(TALL, UNLIKE)
    conv1d = run(stack.swapaxes(1, 2), tj.ace(input_axis=0))
    np.testing.assert_allclose(conv1d.T, run(stack, tj.ace()), rtol=1e-4, atol=1e-5)
    merged = tj.merge_task_vectors({"text_projection": stack, "b": stack[:, 0]}, tj.ace(0.1, 2.0, mean_only="^text"))
    np.testing.assert_allclose(merged["text_projection"], 2 * stack.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged["b"], 2 * stack[:, 0].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [{"epsilon": 0.0}, {"threshold": -1.0}, {"share": 2.0}, {"input_axis": 5}], ids=str)
def test_bad_values_are_refused(values):
    with pytest.raises(tj.ParameterError, match=f"ace: {next(iter(values))}"):
        tj.ace(**values)
