"""TALL masks and Consensus merging, against the formulas of arXiv 2405.07813 written out in NumPy."""

import numpy as np
import pytest

import tadrop_jax as tj
from tests.helpers import family, run_streamed


def masks_of(stack: np.ndarray, lambdas) -> np.ndarray:
    """m_t = |tau_t| > lambda_t |tau - tau_t|, entry by entry, in float32."""
    total = np.zeros(stack.shape[1:], np.float32)
    for tau in stack:
        total = total + tau
    masks = np.zeros(stack.shape, bool)
    for t, tau in enumerate(stack):
        masks[t] = np.abs(tau) > np.float32(np.broadcast_to(lambdas, len(stack))[t]) * np.abs(total - tau)
    return masks


@pytest.mark.parametrize(
    ("kind", "tasks", "lambdas"), [("exact", 3, 0.4), ("normal", 3, [0.2, 0.6, 1.0]), ("exact", 1, 0.4)]
)
def test_tall(kind, tasks, lambdas, make_stacks, nest, flatten):
    """Sum, masks and task vectors; T = 1, zeros, opposite entries and a zero task vector among them."""
    stacks = make_stacks(kind, tasks)
    bundle = tj.merge_task_vectors(nest(stacks), tj.tall(lambdas))
    np.testing.assert_array_equal(bundle.rescalers, np.ones(tasks, np.float32))
    for t in range(tasks):
        found, vector = flatten(bundle.mask(t)), flatten(bundle.task_vector(t))
        for name, stack in stacks.items():
            mask, total = masks_of(stack, lambdas)[t], np.sum(stack, axis=0)
            np.testing.assert_array_equal(found[name], mask, err_msg=name)
            np.testing.assert_allclose(flatten(bundle.unified)[name], total, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(vector[name], np.where(mask, total, 0), rtol=1e-6, atol=1e-6)


def test_tall_is_strict(nest):
    """Where both sides are equal the mask is 0: two equal tasks at lambda 1, and an entry that is 0 everywhere."""
    bundle = tj.merge_task_vectors({"w": np.float32([[2, 0, 3], [2, 0, -1]])}, tj.tall(1.0))
    assert bundle.mask(0)["w"].tolist() == [False, False, True]
    assert bundle.mask(1)["w"].tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("agree", "lambdas", "coefficient"), [(2, 0.4, 1.0), (0, 0.4, 0.3), (1, [0.2, 0.6, 0.4], -0.5), (3, 0.2, 2.0)]
)
def test_consensus(agree, lambdas, coefficient, make_stacks, nest, flatten):
    for kind in ("exact", "normal"):
        stacks = make_stacks(kind, 3)
        merged = flatten(tj.merge_task_vectors(nest(stacks), tj.consensus(agree, lambdas, coefficient)))
        for name, stack in stacks.items():
            kept = masks_of(stack, lambdas).sum(axis=0) >= agree
            wanted = coefficient * np.where(kept, stack.sum(axis=0), 0)
            np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_consensus_of_no_masks_is_task_arithmetic(make_stacks, nest, flatten):
    stacks = nest(make_stacks("normal", 3))
    merged = flatten(tj.merge_task_vectors(stacks, tj.consensus(0, coefficient=0.3)))
    for name, value in flatten(tj.merge_task_vectors(stacks, tj.task_arithmetic(0.3))).items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["tall", "consensus"])
def test_another_vector_in_place_of_the_sum(rule, make_stacks, nest, flatten):
    """The authors' use_ties: the vector of TIES, masks from the task vectors before its trim."""
    stacks = make_stacks("exact", 3)
    ties = tj.ties(0.3, combine="sum")
    inner = flatten(tj.merge_task_vectors(nest(stacks), ties))
    step = {"tall": tj.tall, "consensus": tj.consensus}[rule](tall_lambda=[0.2, 0.4, 0.6], multi_task=ties)
    found = tj.merge_task_vectors(nest(stacks), step)
    for name, stack in stacks.items():
        lambdas = np.float32([0.2, 0.4, 0.6]).reshape(3, *(1,) * (stack.ndim - 1))
        masks = np.abs(stack) > lambdas * np.abs(inner[name] - stack)
        if rule == "consensus":
            np.testing.assert_array_equal(flatten(found)[name], np.where(masks.sum(axis=0) >= 2, inner[name], 0))
            continue
        np.testing.assert_array_equal(flatten(found.unified)[name], inner[name])
        for t in range(3):
            np.testing.assert_array_equal(flatten(found.mask(t))[name], masks[t])
    base, models = family(3)
    streamed, _, _ = run_streamed(base, models, step)
    wanted = tj.merge(base, models, step)
    for i, name in enumerate(sorted(base)):
        if rule == "tall":
            np.testing.assert_array_equal(streamed[name]["masks"], wanted.parts[i]["masks"])
        else:
            np.testing.assert_allclose(streamed[name], wanted[name], rtol=2e-6, atol=1e-6)


def test_consensus_streamed():
    base, models = family(3)
    rule = tj.consensus(tall_lambda=[0.2, 0.4, 0.6])
    merged, _, _ = run_streamed(base, models, rule)
    wanted = tj.merge(base, models, rule)
    for name, value in merged.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(value != base[name], np.asarray(wanted[name]) != base[name])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tj.tall(-0.1), r"tall: tall_lambda must lie in \[0, inf\], got -0.1"),
        (lambda: tj.tall(per_task="("), "is not a regular expression"),
        (lambda: tj.consensus(-1), r"consensus: agree must lie in \[0, inf\], got -1"),
        (lambda: tj.consensus(1.5), "consensus: agree must be a whole number, got 1.5"),
        (lambda: tj.consensus(tall_lambda="x"), "consensus: tall_lambda must be a number, got 'x'"),
        (lambda: tj.consensus(coefficient=[1, 2]), "consensus: coefficient is one number"),
    ],
)
def test_bad_values(make, said):
    with pytest.raises(tj.ParameterError, match=said):
        make()


@pytest.mark.parametrize("make", [tj.tall, tj.consensus])
def test_a_vector_takes_a_rule(make):
    for wrong in (tj.tadrop(), tj.emr()):
        with pytest.raises(tj.MergeError, match=f"{make.__name__}: multi_task takes a merge rule that gives one model"):
            make(multi_task=wrong)


def test_what_the_number_of_tasks_decides():
    stack = {"w": np.ones((2, 3), np.float32)}
    with pytest.raises(tj.ParameterError, match="consensus: merges at least 3 fine-tuned models, got 2"):
        tj.merge_task_vectors(stack, tj.consensus(3))
    with pytest.raises(tj.ParameterError, match="tall_lambda has 3 values, one per task, but there are 2 tasks"):
        tj.merge_task_vectors(stack, tj.tall([0.2, 0.3, 0.4]))
