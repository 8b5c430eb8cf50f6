"""Core Space against a dense float64 transcription; what it takes and refuses is in test_knots.py."""

import numpy as np
import pytest

import tadrop_jax as tj
from tests.lora.test_knots import RANKS, dense, make_adapters, ties


def cores(adapters, name):
    """U, V and the T cores."""
    b = np.concatenate([a[name]["lora_B"].astype(float) for a in adapters], axis=1)
    a = np.concatenate([a[name]["lora_A"].astype(float) for a in adapters], axis=0)
    u = np.linalg.svd(b, full_matrices=False)[0]
    v = np.linalg.svd(a, full_matrices=False)[2].T
    return u, v, np.stack([u.T @ x[name]["lora_B"] @ x[name]["lora_A"] @ v for x in adapters])


@pytest.mark.parametrize("rule", [tj.task_arithmetic(0.4), tj.average()], ids=["sum", "mean"])
def test_linear_rules_lose_nothing(rule):
    adapters = make_adapters()
    got = tj.core_space(adapters, rule)
    expected = tj.merge_task_vectors({n: x.astype(np.float32) for n, x in dense(adapters).items()}, rule)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_ties_on_the_cores_equals_the_transcription():
    adapters = make_adapters()
    got = tj.core_space(adapters, tj.ties(0.2, 0.6, granularity="tensor"))
    for name in got:
        u, v, stack = cores(adapters, name)
        expected = u @ ties({name: stack}, 0.2, 0.6)[name] @ v.T
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_more_ranks_than_outputs_is_still_lossless():
    adapters = make_adapters(ranks=(4, 4, 4))
    got = tj.core_space(adapters, tj.task_arithmetic(1.0), factored=True)
    for name, stack in dense(adapters).items():
        a, b = got[name]["lora_A"], got[name]["lora_B"]
        assert b.shape[1] <= stack.shape[1]
        np.testing.assert_allclose(b @ a, stack.sum(axis=0), rtol=1e-4, atol=1e-4)


def test_one_task_is_itself():
    (adapter,) = make_adapters(ranks=RANKS[:1])
    got = tj.core_space([adapter], tj.average(), scaling=0.5)
    for name, stack in dense([adapter], [0.5]).items():
        np.testing.assert_allclose(got[name], stack[0], rtol=1e-4, atol=1e-5)


def test_iso_c_sees_the_cores_as_matrices():
    adapters = make_adapters()
    got = tj.core_space(adapters, tj.iso_c())
    for name in got:
        u, v, stack = cores(adapters, name)
        left, s, right = np.linalg.svd(stack.sum(axis=0))
        expected = u @ (s.mean() * left @ right) @ v.T
        np.testing.assert_allclose(got[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)
