"""The streamed executor against the in-memory one, with blocks so small that everything takes several."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tadrop_jax import blocks, cutting, streaming
from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.merging import with_sparsifier
from tadrop_jax.steps import expand
from tests.helpers import DTYPES, family, run_streamed, streams_of

SPARSIFIERS = {
    "none": lambda: None,
    "tadrop": tj.tadrop,
    "uniform": lambda: tj.uniform(0.4, norm=1),
    "magnitude-tensor": lambda: tj.magnitude((0.2, 0.5, 0.9)),
    "magnitude-global": lambda: tj.magnitude(0.3, "global"),
    "dare-inverse": lambda: tj.dare(0.5),
    "dare-l1": lambda: tj.dare(0.5, "l1"),
    "n_m-ceil": lambda: tj.n_m(2, 6),
    "n_m-drop": lambda: tj.n_m(1, 4, "drop"),
    "conflict_aware": lambda: tj.conflict_aware(tj.magnitude(0.3), [2, 0, 1]),
}
RULES = {
    "task_arithmetic": lambda trim: tj.task_arithmetic((0.3, 0.4, 0.5)),
    "average": lambda trim: tj.average(),
    "ties-authors": lambda trim: tj.ties(trim, flavour="authors"),
    "ties-mergekit": lambda trim: tj.ties(trim, weights=(1.0, 0.5, 2.0), flavour="mergekit"),
    "ties-peft": lambda trim: tj.ties(trim, flavour="peft"),
    "cabs": lambda trim: tj.cabs(1, 4, 0.7),
    "emr": lambda trim: tj.emr("global" if trim is None else "tensor_mean"),
}
# Every sparsifier before a rule without statistics, and before one with statistics of the tree; every rule with and
# without a sparsifier: each pair costs a second of compilation.
PAIRS = [(s, r) for s in SPARSIFIERS for r in ("task_arithmetic", "emr")]
PAIRS += [(s, r) for r in RULES for s in ("none", "tadrop") if (s, r) not in PAIRS]
PAIRS += [("magnitude-global", "ties-authors"), ("n_m-ceil", "ties-mergekit")]


pytestmark = [pytest.mark.usefixtures("small_blocks"), pytest.mark.optimised]


@functools.cache
def sparsified(name: str, dtype: str):
    """In memory, one compilation a sparsifier: what a rule makes of the result is what the chain has to give."""
    stack = tj.task_vectors(*family(3, dtype=DTYPES[dtype]))
    step = SPARSIFIERS[name]()
    return stack if step is None else tj.sparsify(stack, step, key=jax.random.key(0))


def assert_same(actual: dict, expected: dict, base: dict, rtol=2e-6):
    """Bit-identical selection, values to float tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        value, wanted = np.asarray(value, np.float32), np.asarray(expected[name], np.float32)
        start = np.asarray(base[name], np.float32)
        np.testing.assert_array_equal(value != start, wanted != start, err_msg=name)
        np.testing.assert_allclose(value, wanted, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("sparsifier", "rule"), PAIRS)
def test_equals_in_memory(sparsifier, rule):
    dtype = list(DTYPES)[PAIRS.index((sparsifier, rule)) % 3]
    base, models = family(3, dtype=DTYPES[dtype])
    trim = 0.3 if sparsifier == "none" else None
    chain = with_sparsifier(SPARSIFIERS[sparsifier](), RULES[rule](trim))
    merged, _, outcome = run_streamed(base, models, chain, dtype=np.dtype(np.float32))
    expected = tj.merge_task_vectors(sparsified(sparsifier, dtype), RULES[rule](trim))
    assert outcome.differs == (True, True, True)
    if rule == "emr":
        rescalers = np.asarray(outcome.carry["own"]) / np.asarray(outcome.carry["unified"])
        np.testing.assert_allclose(rescalers, expected.rescalers, rtol=1e-5)
        for (name, found), packed in zip(sorted(merged.items()), expected.packed, strict=True):
            np.testing.assert_array_equal(found["masks"], packed, err_msg=name)
            unified = np.ravel(expected.unified[name])
            np.testing.assert_allclose(found["unified"], unified, rtol=2e-6, err_msg=name)
    else:
        whole = {n: np.asarray(b, np.float32) + np.asarray(expected[n]) for n, b in base.items()}
        assert_same(merged, whole, base)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tadrop", "bfloat16"),
        ("magnitude-global", "float16"),
        ("dare-inverse", "float32"),
        ("dare-inverse", "bfloat16"),
    ],
)
def test_equals_merge_in_the_storage_dtype(name, dtype):
    """A chain as a whole, with the sum rounded to 16 bits: what is not equal differs by one step of the format."""
    base, models = family(3, dtype=DTYPES[dtype])
    step, rule = SPARSIFIERS[name](), tj.task_arithmetic(0.3)
    merged, _, _ = run_streamed(base, models, with_sparsifier(step, rule), seed=3)
    expected = tj.merge(base, models, rule, sparsifier=step, key=jax.random.key(3))
    assert {n: v.dtype for n, v in merged.items()} == dict.fromkeys(base, np.dtype(DTYPES[dtype]))
    assert_same(merged, expected, base, rtol={"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}[dtype])


def tied_values(rng, shape):
    """Multiples of 1/8 with many zeros: all sums are exact, most thresholds fall on a tie."""
    return (rng.integers(-12, 13, size=shape) * (rng.random(shape) < 0.7) / 8).astype(np.float32)


@pytest.mark.parametrize(
    "rule",
    [
        tj.ties(0.2),
        tj.ties(0.3, flavour="peft"),
        tj.ties(0.3, flavour="mergekit"),
        tj.ties((1.0, 0.5, 0.0)),
        tj.chain(tj.magnitude(0.4, keep="exact"), tj.task_arithmetic(1.0)),
        tj.chain(tj.tadrop(norm=None), tj.ties(None)),
        tj.chain(tj.uniform(0.9, norm=None), tj.cabs(1, 4)),
    ],
    ids=lambda r: None,
)
def test_ties_and_zeros_bit_for_bit(rule):
    rng = np.random.default_rng(0)
    base = {"a": tied_values(rng, (3, 333)), "b": tied_values(rng, (40,)), "zero": np.zeros(5, np.float32)}
    models = [{n: v + tied_values(rng, v.shape) * (n != "zero") for n, v in base.items()} for _ in range(3)]
    merged, _, _ = run_streamed(base, models, rule)
    expected = tj.merge(base, models, rule)
    for name in base:
        np.testing.assert_array_equal(merged[name], expected[name], err_msg=name)


CHAINS = {
    "tadrop ties": tj.chain(tj.tadrop(), tj.ties(None)),
    "dare n_m": tj.chain(tj.dare(0.5), tj.n_m(2, 6), tj.task_arithmetic(0.3)),
    "emr": tj.chain(tj.magnitude(0.3, "global"), tj.emr()),
}


def flat(value) -> dict[str, np.ndarray]:
    return value if isinstance(value, dict) else {"merged": value}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("block", [99, 4096])
def test_the_block_size_does_not_matter(name, block, monkeypatch):
    base, models = family(3)
    reference, _, _ = run_streamed(base, models, CHAINS[name])
    monkeypatch.setattr(cutting, "BLOCK", block)
    monkeypatch.setattr(cutting, "SMALL", min(block, 512))
    merged, _, _ = run_streamed(base, models, CHAINS[name])
    for tensor in base:
        for part, value in flat(merged[tensor]).items():
            wanted = flat(reference[tensor])[part]
            if part == "masks":
                np.testing.assert_array_equal(value, wanted)
            elif part == "merged":
                assert_same({tensor: value}, {tensor: wanted}, base)
            else:
                np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("tasks", [1, 8, 9, 144, 1000])
def test_blocks_of_many_tasks_are_computed_no_wider_than_they_are(tasks, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 1 << 17)
    monkeypatch.setattr(cutting, "SMALL", 1 << 13)
    small, full = cutting.widths(100 << 14, None, 1, tasks)
    assert small <= full
    assert (tasks + 1) * full <= 9 << 17


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("workers", [1, 7])
def test_workers_do_not_change_a_byte(name, workers):
    base, models = family(3)
    reference, rows, outcome = run_streamed(base, models, CHAINS[name], workers=2)
    merged, other_rows, other_outcome = run_streamed(base, models, CHAINS[name], workers=workers)
    for tensor in base:
        for part, value in flat(merged[tensor]).items():
            assert value.tobytes() == flat(reference[tensor])[part].tobytes()
    assert rows.keys() == other_rows.keys() == base.keys()
    jax.tree.map(np.testing.assert_array_equal, rows, {n: other_rows[n] for n in rows})
    jax.tree.map(np.testing.assert_array_equal, outcome, other_outcome)


def test_what_does_not_fit_is_read_again(monkeypatch):
    base, models = family(3)
    kept, _, _ = run_streamed(base, models, CHAINS["tadrop ties"])
    monkeypatch.setattr(streaming, "KEEP_BYTES", 0)
    again, _, _ = run_streamed(base, models, CHAINS["tadrop ties"])
    for tensor in base:
        assert kept[tensor].tobytes() == again[tensor].tobytes()


@pytest.mark.parametrize("room", [0, -1])
def test_what_is_held_counts_its_keys(room, monkeypatch):
    base, models = family(2, {"w": (40, 50)}, dtype=jnp.bfloat16)
    raw, keys = 3 * base["w"].nbytes, 2 * 4 * base["w"].size
    monkeypatch.setattr(streaming, "KEEP_BYTES", raw + keys + room)
    read = []
    run_streamed(base, models, tj.chain(tj.tadrop(), tj.task_arithmetic(1.0)), progress=read.append, workers=1)
    assert (sum(read) == raw) == (room == 0)


def test_the_order_of_tensors_does_not_matter():
    base, models = family(3)
    merged, _, _ = run_streamed(base, models, CHAINS["dare n_m"])
    turned, _, _ = run_streamed(dict(reversed(base.items())), models, CHAINS["dare n_m"])
    for tensor in base:
        assert merged[tensor].tobytes() == turned[tensor].tobytes()


@pytest.mark.parametrize("name", ["tadrop ties", "emr"])
def test_streams_that_are_there_already_still_count(name):
    """A resumed run writes only what is missing, and the statistics of the tree are those of all tensors."""
    base, models = family(3)
    whole, _, outcome = run_streamed(base, models, CHAINS[name])
    rest, some, again = run_streamed(base, models, CHAINS[name], skip=[0])
    assert next(iter(base)) not in some
    assert set(some) == set(list(base)[1:])
    for tensor in some:
        for part, value in flat(rest[tensor]).items():
            assert value.tobytes() == flat(whole[tensor])[part].tobytes()
    jax.tree.map(np.testing.assert_array_equal, outcome.carry, again.carry)


def test_a_tree_of_many_tensors_of_any_size():
    """Sizes around the block and around a byte of masks, and an empty tensor."""
    shapes = {f"t{n}": (n,) for n in (0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 2047, 2048, 2049)}
    base, models = family(2, shapes)
    merged, _, _ = run_streamed(base, models, tj.task_arithmetic(0.5))
    for name, start in base.items():
        wanted = start + 0.5 * sum(m[name] - start for m in models)
        np.testing.assert_allclose(merged[name], wanted, rtol=2e-6, atol=1e-6)
    bundle, _, _ = run_streamed(base, models, tj.emr())
    for name, start in base.items():
        change = np.stack([m[name] - start for m in models])
        mask = np.where(change.sum(0) > 0, change > 0, change < 0)
        np.testing.assert_array_equal(bundle[name]["masks"], np.packbits(mask, axis=1))


def own_step() -> tj.Step:
    """A user's rule with extremes, a signed order statistic of the tree, and a sum that uses both."""

    def apply(x, c):
        middle = jnp.reshape(c["median"], (-1,) + (1,) * (x.stack.ndim - 1))
        scale = (c["top"] - c["bottom"]) / c["all"]
        inside = jnp.where(x.stack > middle, x.stack, 0) * jnp.reshape(scale, middle.shape)
        return jnp.sum(inside, axis=0)

    return tj.Step(
        stages=(
            tj.Max(lambda x, c, n: {"top": x.stack}),
            tj.Min(lambda x, c, n: {"bottom": x.stack}, scope="global"),
            tj.Ranks(lambda x, c: x.stack, at=lambda n, c: {"median": n // 2}, scope="global"),
            tj.Sums(lambda x, c, n: {"all": jnp.abs(x.stack) + c["top"].reshape(-1, *(1,) * (x.stack.ndim - 1)) / n}),
        ),
        apply=apply,
        output="vector",
    )


def test_a_step_of_the_users_own():
    base, models = family(3)
    # The padding of a block is zero: it must not pass for a minimum or a maximum.
    models = [{n: v + 5 for n, v in m.items()} for m in models]
    rule = own_step()
    merged, rows, _ = run_streamed(base, models, rule)
    assert_same(merged, tj.merge(base, models, rule), base, rtol=1e-5)
    lowest = [min((m[n] - base[n]).min() for n in base) for m in models]
    np.testing.assert_allclose(rows["bias"][0]["bottom"], lowest, rtol=1e-6)


def test_other_coefficients_find_the_compiled_functions():
    base, models = family(3)
    chain = [with_sparsifier(tj.tadrop(), tj.ties(None, c, weights=[1.0, c, 0.5])) for c in (0.5, 0.25)]
    run_streamed(base, models, chain[0])
    before = blocks.compiled.cache_info().misses
    merged, _, _ = run_streamed(base, models, chain[1])
    assert blocks.compiled.cache_info().misses == before
    assert_same(merged, tj.merge(base, models, chain[1]), base)


def test_masked_steps():
    base, models = family(3)
    chain = tj.chain(tj.masked(tj.tadrop(), exclude="bias|scale"), tj.masked(tj.ties(0.3), include=["wide", "bias"]))
    merged, rows, _ = run_streamed(base, models, chain)
    assert_same(merged, tj.merge(base, models, chain), base)
    assert merged["scale"] == base["scale"]
    assert not rows["scale"][0]
    assert set(rows["wide/kernel"][0]) >= {"low", "high", "cut"}


def test_statistics_are_those_of_the_whole_tensor():
    base, models = family(2)
    _, rows, _ = run_streamed(base, models, tj.chain(tj.tadrop(), tj.task_arithmetic(1.0)))
    sizes = np.sort([np.abs(np.ravel(m["wide/kernel"] - base["wide/kernel"])) for m in models], axis=1)
    low, high = (sizes[:, int(q * (sizes.shape[1] - 1))] for q in (0.95, 0.99))
    np.testing.assert_array_equal(rows["wide/kernel"][0]["low"], low)
    np.testing.assert_array_equal(rows["wide/kernel"][0]["high"], high)


def test_progress_counts_every_byte():
    base, models = family(2)
    lock, seen = threading.Lock(), [0]

    def progress(n):
        with lock:
            seen[0] += n

    run_streamed(base, models, tj.task_arithmetic(1.0), progress=progress)
    assert seen[0] == 3 * sum(v.nbytes for v in base.values())


@pytest.mark.parametrize(("outweighs", "again"), [(1, 0), (-1, 1)], ids=["positive", "negative"])
def test_a_majority_takes_no_pass_of_its_own(outweighs, again):
    """TIES reads all once; if the majority is negative, those blocks again where the tasks' entries cancel."""
    base = {"a": np.zeros(990, np.float32), "b": np.zeros(7, np.float32)}
    one = {"a": np.full(990, outweighs, np.float32), "b": np.ones(7, np.float32)}
    other = {"a": np.full(990, outweighs, np.float32), "b": np.full(7, -2, np.float32)}
    other["a"][1] *= -1
    read, rule = [], tj.ties(None)
    merged, rows, outcome = run_streamed(base, [one, other], rule, progress=read.append)
    expected = tj.merge(base, [one, other], rule)
    for name in base:
        np.testing.assert_array_equal(merged[name], expected[name], err_msg=name)
    assert merged["a"][1] == outweighs
    assert rows.keys() == base.keys()
    assert float(outcome.carry["majority"][0]) == outweighs * 989 - 7
    once = 3 * sum(v.nbytes for v in base.values())
    assert (sum(read) > once) == again
    assert sum(read) < 2 * once


@pytest.mark.parametrize("rule", [tj.task_arithmetic(1.0), tj.ties(0.2)], ids=["no stage", "a stage of the tree"])
@pytest.mark.parametrize(("row", "who"), [(0, "the base"), (2, "model 1")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(bad, row, who, rule):
    base, models = family(2, dtype=DTYPES["bfloat16"])
    [base, *models][row]["wide/kernel"][30, 7] = bad
    with pytest.raises(tj.ContentError, match="wide/kernel") as found:
        run_streamed(base, models, rule)
    assert who in str(found.value)
    assert (found.value.row, found.value.name, found.value.entry) == (row, "wide/kernel", [30, 7])
    np.testing.assert_equal(found.value.value, bad)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_contents_are_looked_at_where_no_rank_is_searched_for(granularity, monkeypatch):
    """A density of 0 has ranks that no entry has: the first pass over the files is a later one."""
    monkeypatch.setattr(streaming, "KEEP_BYTES", 0)
    base, models = family(2)
    rule = tj.chain(tj.magnitude(0.0, granularity), tj.task_arithmetic(1.0))
    _, _, outcome = run_streamed(base, models, rule)
    assert outcome.differs == (True, True)
    models[1]["wide/kernel"][30, 7] = np.nan
    with pytest.raises(tj.ContentError, match="wide/kernel"):
        run_streamed(base, models, rule)


def test_large_numbers_are_no_infinity():
    """The check sums: a sum that overflows is looked at again."""
    base = {"w": np.full(300, 3e38, np.float32)}
    merged, _, _ = run_streamed(base, [{"w": np.full(300, -1e38, np.float32)}], tj.task_arithmetic(0.0))
    assert merged["w"].shape == (300,)


def test_not_finite_may_pass():
    base, models = family(2)
    models[0]["wide/kernel"][0, 0] = np.inf
    merged, _, _ = run_streamed(base, models, tj.task_arithmetic(1.0), check_finite=False)
    assert np.isinf(merged["wide/kernel"][0, 0])
    assert np.isfinite(merged["wide/kernel"][1:]).all()


def test_models_that_equal_the_base_are_named():
    base, models = family(2)
    _, _, outcome = run_streamed(base, [models[0], base, models[1]], tj.task_arithmetic(1.0))
    assert outcome.differs == (True, False, True)


def test_the_first_error_stops_the_rest():
    base, models = family(2)
    seen = []

    def write(k, start, value):
        seen.append(start)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        streaming.run(
            (tj.task_arithmetic(1.0),),
            streams_of(base, models),
            2,
            write,
            lambda k, c: None,
            streaming.Settings(workers=2),
        )
    assert 1 <= len(seen) <= 2


def test_a_mask_matches_a_tied_tensor_by_any_of_its_names():
    base, models = family(2)
    streams = [s._replace(aliases=(f"tied to {s.name}",)) for s in streams_of(base, models)]
    chosen = streams[0].name
    steps = expand(tj.chain(tj.masked(tj.magnitude(0.0), exclude=f"tied to {chosen}$"), tj.average()), 2)
    found = {s.name: 0.0 for s in streams}

    def write(k, start, value):
        found[streams[k].name] += float(np.abs(value - np.ravel(base[streams[k].name])[start:][: value.size]).sum())

    streaming.run(steps, streams, 2, write, lambda k, c: None, streaming.Settings(workers=1))
    assert {name for name, moved in found.items() if moved} == {chosen}


def test_refusals():
    base, models = family(2)
    with pytest.raises(MergeError, match="random"):
        streaming.run(
            (tj.dare(0.5), tj.average()), streams_of(base, models), 2, print, print, streaming.Settings(key=None)
        )
    with pytest.raises(ParameterError, match="3 values"):
        run_streamed(base, models, tj.task_arithmetic((1.0, 2.0, 3.0)))
    with pytest.raises(ParameterError, match="1 values"):
        run_streamed(base, models, tj.task_arithmetic((1.0,)))


def test_blocks_of_many_models_are_smaller():
    """Thirty models take a quarter of the entries at once, and merge alike."""
    base, models = family(30, {"w": (40, 50)})
    read = []
    merged, *_ = run_streamed(base, models, tj.task_arithmetic(0.1), progress=read.append, workers=1)
    assert max(read) == 31 * 32 * 4
    assert_same(merged, tj.merge(base, models, tj.task_arithmetic(0.1)), base)


def test_two_random_steps_draw_alike_in_memory():
    base, models = family(2)
    rule = tj.chain(tj.dare(0.5), tj.dare_linear(0.5))
    streamed, *_ = run_streamed(base, models, rule, seed=3)
    for name, value in tj.merge(base, models, rule, key=jax.random.key(3)).items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
