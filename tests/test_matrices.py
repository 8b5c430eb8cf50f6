"""Rules on whole matrices and on rows: batched, in PyTorch order, streamed, reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import registry
from tadrop_jax.matrices import matrix_rule
from tadrop_jax.planning import Request
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Step, spec
from tests.helpers import family, run_streamed, save_family

pytestmark = pytest.mark.optimised

TASKS = 3
SHAPES = {
    "one/kernel": (7, 5),
    "two/kernel": (7, 5),
    "three/kernel": (5, 7),
    "embedding": (7, 5),
    "bias": (33,),
    "scale": (),
}


def by_rows(stack):
    """Depends on which axis is the row: the task whose row has the largest sum gives the row."""
    winner = jnp.argmax(jnp.sum(stack, axis=-1), axis=0)
    return jnp.take_along_axis(stack, winner[None, :, None], axis=0)[0]


def rule(**options):
    return matrix_rule("by_rows", by_rows, **options)


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=(TASKS, *s)).astype(np.float32) for n, s in SHAPES.items()}


def test_matrices_by_the_rule_and_the_rest_by_the_mean(stack):
    merged = tj.merge_task_vectors(stack, rule(coefficient=0.5, mean_only="^embedding"))
    for name, x in stack.items():
        matrix = name.endswith("kernel")
        expected = by_rows(x) if matrix else x.mean(axis=0)
        np.testing.assert_allclose(merged[name], 0.5 * np.asarray(expected), rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_pattern_that_matches_nothing_is_refused(stack):
    with pytest.raises(tj.ParameterError, match="no_such"):
        tj.merge_task_vectors(stack, rule(mean_only="no_such"))


def test_a_layout_turns_the_rows(stack):
    base = {"kernel": jnp.zeros((5, 7))}
    models = [{"kernel": jnp.asarray(x.T)} for x in stack["one/kernel"]]
    merged = tj.merge(base, models, rule(), layout={"kernel": (1, 0)})
    np.testing.assert_array_equal(merged["kernel"], by_rows(stack["one/kernel"]).T)


def test_batches_in_the_users_jit_and_grad(stack):
    step = rule()
    inside = jax.jit(lambda s: tj.merge_task_vectors(s, step))(stack)
    outside = tj.merge_task_vectors(stack, step)
    for name in stack:
        np.testing.assert_allclose(inside[name], outside[name], rtol=1e-6, err_msg=name)
    gradient = jax.grad(lambda s: sum(jnp.sum(x) for x in tj.merge_task_vectors(s, step).values()))(stack)
    assert all(np.isfinite(g).all() for g in gradient.values())


def row_step():
    """Every row divided by its own largest magnitude: a stage of rows, then of the tensor, then of the tree."""

    def apply(x, carry):
        share = jnp.max(abs(x.stack), axis=-1, keepdims=True) if x.stack.ndim > 1 else 1.0
        return jnp.where(share == 0, 0, x.stack / share) * x.column(carry["sum"] / (1 + carry["all"]))

    stages = (
        Sums(lambda x, c, n: {"sum": abs(x.stack)}),
        Sums(lambda x, c, n: {"all": abs(x.stack)}, scope="global"),
    )
    return Step(stages=stages, apply=apply, piece="row", spec=spec("row_step"))


CHAINS = {
    "matrix": lambda: rule(mean_only="^embedding"),
    "tadrop_matrix": lambda: tj.chain(tj.tadrop(), rule()),
    "rows_ties": lambda: tj.chain(row_step(), tj.ties(0.4)),
    "dare_rows": lambda: tj.chain(tj.dare(0.5), row_step(), tj.average()),
    "rows_global_trim": lambda: tj.chain(row_step(), tj.magnitude(0.3, granularity="global"), tj.average()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_streamed_equals_in_memory(name):
    base, models = family(TASKS, SHAPES)
    merged, _, _ = run_streamed(base, models, CHAINS[name](), seed=3)
    expected = tj.merge(base, models, CHAINS[name](), key=jax.random.key(3, impl="threefry2x32"))
    for tensor in base:
        np.testing.assert_allclose(merged[tensor], expected[tensor], rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_the_report_says_what_was_done_to_a_tensor(tmp_path):
    from tadrop_jax.directories import merge_directories

    save_family(tmp_path, 2, SHAPES)
    chain = tj.chain(rule(mean_only="^embedding", note=lambda shape, tasks: {"rank": min(shape) // tasks}))
    paths = [tmp_path / p for p in ("base", "m0", "m1")]
    recipe = {"method": "by_rows"}
    merge_directories(Request(base=paths[0], models=paths[1:], out=tmp_path / "out", chain=chain, recipe=recipe))
    rows = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
    assert (rows["one/kernel"]["treated"], rows["one/kernel"]["rank"]) == ("matrix", 2)
    assert rows["bias"]["treated"] == rows["embedding"]["treated"] == "mean"


def test_a_method_can_be_the_parameter_of_a_method():
    step = registry.build("conflict_aware", {"sparsifier": "magnitude:density=.3;keep=exact"})
    stack = {"w": jnp.array([[5.0, 4.0, 1.0], [9.0, 3.0, 2.0]])}
    assert (
        tj.sparsify(stack, step)["w"].tolist()
        == tj.sparsify(stack, tj.conflict_aware(tj.magnitude(0.3, keep="exact")))["w"].tolist()
    )
