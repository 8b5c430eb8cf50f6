"""Steps that want rows or slices, streamed in blocks of whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import cutting, streaming
from tadrop_jax.steps import expand
from tests.helpers import family, run_streamed, streams_of

SHAPES = {
    "matrix": (50, 33),
    "even": (64, 8),
    "kernel": (6, 5, 3, 3),
    "long": (2, 300),
    "bias": (33,),
    "scale": (),
    "empty": (0, 4),
}
RULES = {
    "della, authors": tj.chain(tj.della(0.5, 0.2), tj.task_arithmetic(0.3)),
    "della, mergekit": tj.chain(tj.della(0.5, 0.2, flavour="mergekit"), tj.task_arithmetic(0.3)),
    "breadcrumbs": tj.chain(tj.breadcrumbs(0.3, 0.1), tj.ties(None)),
    "after ranks, before a bundle": tj.chain(tj.tadrop(), tj.della(0.5), tj.emr()),
    "before ranks of the tree": tj.chain(tj.breadcrumbs(0.6), tj.ties(0.3)),
    "with groups": tj.chain(tj.rescale(tj.chain(tj.n_m(2, 6), tj.breadcrumbs(0.9, 0.01))), tj.average()),
    "model_stock": tj.model_stock(filter_wise=True),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 40)
    monkeypatch.setattr(cutting, "SMALL", 16)


def assert_alike(found, wanted, name):
    np.testing.assert_array_equal(found != 0, wanted != 0, err_msg=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", RULES)
def test_equals_in_memory(name, small_blocks):
    bundle = name == "after ranks, before a bundle"
    base, models = family(3, {n: shape for n, shape in SHAPES.items() if not (bundle and n == "empty")})
    found, _, _ = run_streamed(base, models, RULES[name], seed=2)
    expected = tj.merge(base, models, RULES[name], key=jax.random.key(2))
    if bundle:
        for (tensor, parts), packed in zip(sorted(found.items()), expected.packed, strict=True):
            np.testing.assert_array_equal(parts["masks"], packed, err_msg=tensor)
            assert_alike(parts["unified"], np.ravel(expected.unified[tensor]), tensor)
        return
    for tensor, start in base.items():
        assert_alike(found[tensor] - start, np.asarray(expected[tensor]) - start, tensor)


@pytest.mark.parametrize("rule", [tj.arcee_fusion(), tj.nuslerp(granularity="row")], ids=["arcee_fusion", "nuslerp"])
def test_rules_of_a_few_models(rule, small_blocks):
    base, models = family(1 if rule == tj.arcee_fusion() else 2, SHAPES)
    found, _, _ = run_streamed(base, models, rule)
    expected = tj.merge(base, models, rule)
    for tensor, start in base.items():
        assert_alike(found[tensor] - start, np.asarray(expected[tensor]) - start, tensor)


def largest_of_rows() -> tj.Step:
    """A user's sparsifier: statistics of rows, then one of the tensor that uses them."""

    def relative(x, c, n):
        return {"all": jnp.abs(x.stack) / c["top"]}

    return tj.Step(
        stages=(tj.Max(lambda x, c, n: {"top": jnp.abs(x.stack) + 1}, scope="row"), tj.Sums(relative)),
        apply=lambda x, c: x.stack / c["top"] * x.column(c["all"]),
    )


def test_statistics_of_rows(small_blocks):
    base, models = family(2, SHAPES)
    rule = tj.chain(largest_of_rows(), tj.task_arithmetic(1.0))
    found, _, _ = run_streamed(base, models, rule)
    for tensor, start in base.items():
        wanted = np.zeros(start.shape)
        for model in models:
            change = (model[tensor] - start).astype(np.float64)
            size = np.abs(change)
            relative = change / (size.max(axis=-1, keepdims=True, initial=0) + 1 if change.ndim else size + 1)
            wanted += relative * np.abs(relative).sum()
        np.testing.assert_allclose(found[tensor] - start, wanted, rtol=1e-4, atol=1e-4, err_msg=tensor)


@pytest.mark.parametrize("method", [tj.della(0.5), tj.della(0.5, flavour="mergekit"), tj.breadcrumbs(0.5)])
def test_no_more_is_read_at_once_than_a_block(method, monkeypatch):
    """Memory does not grow with the tensor: what a thread holds is a block, or one row where that is longer."""
    monkeypatch.setattr(cutting, "BLOCK", 64)
    monkeypatch.setattr(cutting, "SMALL", 16)
    monkeypatch.setattr(streaming, "KEEP_BYTES", 0)
    base, models = family(2, {"tall": (500, 8), "long": (16, 100)})
    read: dict[str, int] = {}

    def spied(stream):
        def spy(row, start, stop, out):
            read[stream.name] = max(read.get(stream.name, 0), stop - start)
            return stream.read(row, start, stop, out)

        return stream._replace(read=spy)

    streams = [spied(s) for s in streams_of(base, models)]
    steps = expand(tj.chain(method, tj.task_arithmetic(0.3)), 2)
    settings = streaming.Settings(key=jax.random.key(0))
    streaming.run(steps, streams, 2, lambda *_: None, lambda *_: None, settings)
    # Starts of blocks are multiples of 8, for packed masks: of rows of 100 that is two.
    assert read == {"tall": 64, "long": 200}


def test_one_compilation_a_step_whatever_the_shapes():
    """Of blocks: the small ones and the others. Of rows: the same for each length of a row."""
    traced: list[tuple] = []

    def apply(x, carry):
        traced.append(x.stack.shape)
        return x.stack

    def run(piece, shapes):
        traced.clear()
        step = tj.Step(apply=apply, piece=piece, spec=("counted", piece))
        base, models = family(2, shapes)
        run_streamed(base, models, tj.chain(step, tj.task_arithmetic(0.5)))
        return {(piece, len(shapes), shape) for shape in traced}  # two threads may trace the same at once

    flat = {f"t{n}": (n, 100) for n in (1, 7, 80, 82, 83, 500, 3000)}
    assert len(run("any", flat)) == 2
    assert len(run("row", flat)) == 2
    assert len(run("row", flat | {f"u{n}": (n, 40) for n in (3, 5, 7)})) == 1  # the others are known already
