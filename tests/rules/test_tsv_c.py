"""TSV-Compress, against the formula of arXiv 2412.00081 written out in NumPy."""

import numpy as np
import pytest

import tadrop_jax as tj


def truncated(tau: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    return sum((s[i] * np.outer(u[:, i], vt[i]) for i in range(rank)), np.zeros(tau.shape))


@pytest.mark.parametrize(
    ("tasks", "share", "rank"), [(2, None, 2), (3, None, 1), (1, None, 5), (3, 0.7, 3), (3, 0.0, 1)]
)
def test_formula(tasks, share, rank, make_stacks, nest, flatten):
    """Matrices by their leading triples, at least one; what is no matrix whole."""
    stacks = make_stacks("normal", tasks)
    bundle = tj.merge_task_vectors(nest(stacks), tj.tsv_c(share=share))
    for t in range(tasks):
        for name, vector in flatten(bundle.task_vector(t)).items():
            wanted = truncated(stacks[name][t], rank) if name == "block/kernel" else stacks[name][t]
            np.testing.assert_allclose(vector, wanted, atol=2e-6, err_msg=name)
    kept = bundle.parts[1]
    assert {n: v.shape for n, v in kept.items()} == {"u": (tasks, 7, rank), "s": (tasks, rank), "vt": (tasks, rank, 5)}


def test_more_tasks_than_the_rank(make_stacks, nest):
    """The authors' rank would be int(5 / 7) = 0; a matrix is never lost."""
    stack = np.random.default_rng(0).normal(size=(7, 7, 5)).astype(np.float32)
    bundle = tj.merge_task_vectors({"w": stack}, tj.tsv_c())
    for t in range(7):
        np.testing.assert_allclose(bundle.task_vector(t)["w"], truncated(stack[t], 1), atol=5e-6)


def test_the_layout_does_not_matter(make_stacks):
    stack = make_stacks("normal", 2)["block/kernel"]
    here = tj.merge_task_vectors({"w": stack}, tj.tsv_c())
    there = tj.merge_task_vectors({"w": np.swapaxes(stack, 1, 2)}, tj.tsv_c())
    np.testing.assert_allclose(here.task_vector(1)["w"], there.task_vector(1)["w"].T, atol=5e-6)


def test_zero_task_vectors_stay_zero(make_stacks, nest, flatten):
    stacks = make_stacks("exact", 3)  # the third is zero
    bundle = tj.merge_task_vectors(nest(stacks), tj.tsv_c())
    assert not any(v.any() for v in flatten(bundle.task_vector(2)).values())


def test_has_neither_masks_nor_a_shared_vector(make_stacks, nest):
    bundle = tj.merge_task_vectors(nest(make_stacks("normal", 2)), tj.tsv_c())
    for name in ("unified", "rescalers", "packed"):
        with pytest.raises(AttributeError, match="a bundle of tsv_c has no"):
            getattr(bundle, name)
    with pytest.raises(AttributeError, match="a bundle of tsv_c has no masks"):
        bundle.mask(0)


@pytest.mark.parametrize(
    ("share", "said"), [(1.5, r"share must lie in \[0, 1\], got 1.5"), ([0.5, 0.5], "share is one number, got 2")]
)
def test_bad_values(share, said):
    with pytest.raises(tj.ParameterError, match=said):
        tj.tsv_c(share=share)
