"""Sparsities that are learned without labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from examples.evidence import arms, experiments, learned
from examples.evidence.suites import Head, Part, Suite, Task, Tuned

WIDTH = 6


def _encode(params, inputs):
    return jnp.tanh(inputs @ params["kernel"]) @ params["out"]


def _suite(tasks: int = 3) -> Suite:
    rng = np.random.default_rng(0)
    base = {"kernel": jnp.zeros((WIDTH, 8)), "out": jnp.eye(8, WIDTH)}
    tuned = []
    for number in range(tasks):
        params = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), base)
        part = Part(rng.normal(size=(40, WIDTH)).astype(np.float32), np.zeros(40, np.int32))
        head = Head(rng.normal(size=(WIDTH, 4)).astype(np.float32), np.zeros(4, np.float32))
        tuned.append(Tuned(Task(str(number), part, part, part, 4), params, head, jax.jit(_encode)))
    return Suite(base, tuned, None)


def _entropy(suite, shares, stack):
    pruned = arms.prune(stack, shares)
    bundle, total = tj.merge_task_vectors(pruned, tj.emr()), 0.0
    for number, tuned in enumerate(suite.tuned):
        params = jax.tree.map(jnp.add, suite.base, bundle.task_vector(number))
        answers = jax.nn.log_softmax(tuned.encode(params, tuned.task.validation.inputs) @ tuned.head.kernel)
        total -= float(jnp.sum(jnp.exp(answers) * answers, 1).mean())
    return total


def test_models_become_surer_of_their_answers():
    suite = _suite()
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    start = [np.full(3, 0.5) for _ in jax.tree.leaves(stack)]
    found = learned.shares(suite, stack, size=40, steps=40)
    assert all(share.shape == (3,) and (share >= 0).all() and (share <= arms.LARGEST).all() for share in found)
    assert _entropy(suite, found, stack) < _entropy(suite, start, stack)


def test_zeros_are_nothing_to_prune():
    """What is learned is the share of the entries that are not zero, as for all arms."""
    leaf = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    leaf[0, :600] = 0
    table = jnp.asarray(learned._quantiles(leaf[0]))[None]
    _, there = learned._softly(jnp.asarray(leaf), table, jnp.array([0.5]))
    kept = arms.prune({"w": leaf}, [np.array([0.5])])["w"] != 0
    np.testing.assert_array_equal((np.asarray(there) >= 0.5)[0, 600:], kept[0, 600:])
    assert not kept[0, :600].any()


def test_a_task_without_a_task_vector_breaks_nothing():
    suite = _suite()
    stack = tj.task_vectors(suite.base, [suite.base, *(tuned.params for tuned in suite.tuned[1:])])
    assert all(np.isfinite(share).all() for share in learned.shares(suite, stack, steps=3))


def test_where_all_is_there_the_vectors_are_the_librarys():
    suite = _suite()
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    found = learned.emr([(leaf, jnp.ones_like(leaf)) for leaf in jax.tree.leaves(stack)])
    bundle = tj.merge_task_vectors(stack, tj.emr())
    for number in range(3):
        for ours, theirs in zip(found, jax.tree.leaves(bundle.task_vector(number)), strict=True):
            np.testing.assert_allclose(ours[number], theirs, rtol=1e-5, atol=1e-6)


def test_adamerging_begins_at_the_model_that_is_best_for_task_arithmetic(monkeypatch):
    """Before it learns it is that model, and its accuracies are the same."""
    suite = _suite()
    rng = np.random.default_rng(1)
    labelled = [
        tuned._replace(task=tuned.task._replace(validation=tuned.task.validation._replace(labels=labels)))
        for tuned, labels in zip(suite.tuned, rng.integers(0, 4, (3, 40)).astype(np.int32), strict=True)
    ]
    suite = suite._replace(tuned=labelled)
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    total = jax.tree.map(lambda leaf: leaf.sum(0), stack)

    def begun(suite, _, start, rate):
        assert rate == 1e-2
        return experiments._judged(suite, [experiments.added(suite.base, total, start)] * len(suite.tuned))

    monkeypatch.setattr(experiments, "adamerging", begun)
    found = experiments.adamerging_from_the_best(suite, stack)
    wanted = experiments.judge(suite, stack, tj.task_arithmetic(1.0), experiments._mean_length(stack))
    assert found.length == wanted.length
    assert found.validation == pytest.approx(wanted.validation)
    assert found.by_task == pytest.approx(wanted.by_task)


def test_the_rate_of_adamerging_is_what_validation_says(monkeypatch):
    suite = _suite()
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    right = {1e-2: 0.2, 1e-3: 0.6, 1e-4: 0.4}

    def learnt(suite, stack, start, rate):
        return experiments.Result(None, right[rate], 1 - right[rate], ())

    monkeypatch.setattr(experiments, "adamerging", learnt)
    found = experiments.LEARNED["AdaMerging, tuned"](suite, stack)
    assert (found.validation, found.test) == (0.6, 0.4)
