"""Exact order statistics over blocks: against a full sort, on data that makes brackets miss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tadrop_jax import sampling
from tadrop_jax.sampling import Selection


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small enough that samples are taken, brackets are used, and some are given up."""
    monkeypatch.setattr(sampling, "_COLLECT", 200)
    monkeypatch.setattr(sampling, "_MOST", 3000)
    monkeypatch.setattr(sampling, "_SAMPLES", 4)


def select(rows: np.ndarray, ranks, block: int = 128, length: int = 16) -> tuple[np.ndarray, int]:
    """As the streamed executor drives the search: the keys, and how many passes it took."""
    search = at_ranks(rows.shape[1], ranks)
    if search.wants_sample:
        search.bracket([rows[:, s : s + length] for s in search.sample_starts(length)])
    passes = run_passes(search, rows, block)
    assert passes <= 3
    return search.found[0], passes


def at_ranks(n: int, ranks) -> Selection:
    return Selection(n, [lambda found: np.asarray(ranks, np.int64)])


def run_passes(search: Selection, rows: np.ndarray, block: int) -> int:
    passes = 0
    while not search.settled:
        search.update([search.count(rows[:, s : s + block]) for s in range(0, rows.shape[1], block)])
        passes += 1
    return passes


def check(rows: np.ndarray, ranks, **how) -> int:
    rows, ranks = np.asarray(rows, np.uint32), np.asarray(ranks, np.int64)
    keys, passes = select(rows, ranks, **how)
    ordered = np.concatenate([np.sort(rows, axis=1), np.full((len(rows), 1), 2**32 - 1, np.uint32)], axis=1)
    np.testing.assert_array_equal(keys, ordered[np.arange(len(rows)), ranks])
    return passes


def keys_of(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def ranks_of(n: int, tasks: int) -> np.ndarray:
    """First, last, middle and quantiles of each row, and the bound that no entry reaches."""
    each = [0, 1, n // 4, n // 2, int(0.95 * n), n - 2, n - 1, n]
    return np.repeat(np.array(each)[:, None], tasks, axis=1)


N = 5000
RNG = np.random.default_rng(0)
NORMAL = np.abs(RNG.normal(size=(2, N)))
DATA = {
    "normal": keys_of(NORMAL),
    "all 32 bits": RNG.integers(0, 2**32, size=(2, N), dtype=np.uint32),
    "many ties": keys_of(np.round(NORMAL * 4) / 4),
    "mostly zero": keys_of(NORMAL * (RNG.random((2, N)) < 0.05)),
    "all zero": np.zeros((2, N), np.uint32),
    "all the same": np.full((2, N), 0x3F800000, np.uint32),
    "the largest key": np.full((2, N), 2**32 - 1, np.uint32),
    "two values": np.where(RNG.random((2, N)) < 0.5, 7, 2**31).astype(np.uint32),
    "ascending": np.sort(keys_of(NORMAL), axis=1),
    "descending": np.sort(keys_of(NORMAL), axis=1)[:, ::-1],
    "one upper half": (0x12340000 + RNG.integers(0, 2**16, size=(2, N))).astype(np.uint32),
    "rows unlike": np.stack([np.zeros(N, np.uint32), np.arange(N, dtype=np.uint32) << 16]),
}


@pytest.mark.parametrize("name", DATA)
def test_against_a_sort(name):
    check(DATA[name], ranks_of(N, 2))


def test_a_good_bracket_takes_one_pass(monkeypatch):
    monkeypatch.setattr(sampling, "_MOST", 1 << 24)
    monkeypatch.setattr(sampling, "_SAMPLES", 64)
    assert check(DATA["normal"], [[N // 2, N // 3]]) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sample_that_lies(sign):
    """What the sample sees is far below (above) everything else: the bracket misses, and histograms find the rank."""
    rows = RNG.integers(2**30, 2**31, size=(1, N)).astype(np.uint32)
    for start in at_ranks(N, [[0]]).sample_starts(16):
        rows[0, start : start + 16] = 5 if sign == 1 else 2**32 - 6
    assert check(rows, [[N // 2]]) == 3


def test_a_bracket_that_holds_too_much():
    """A constant fills every bracket; it is given up, and two histograms settle it."""
    assert check(DATA["all the same"], [[N // 2, N // 2]]) == 3


def test_what_is_given_up_keeps_no_block_in_memory():
    search = at_ranks(N, [[N // 2, N // 2]])
    parts = [search.count(DATA["normal"][:, s : s + 128]) for s in range(0, N, 128)]
    assert search.collected > sampling._MOST
    assert not any(np.shares_memory(inside, DATA["normal"]) for part in parts for _, inside in part.values())


def test_little_data_is_collected_in_one_pass():
    rows = RNG.integers(0, 2**32, size=(3, 150), dtype=np.uint32)
    assert not at_ranks(150, [[0, 0, 0]]).wants_sample
    assert check(rows, [[0, 75, 149], [150, 3, 3]]) == 1


def test_rank_n_needs_no_pass():
    assert check(DATA["normal"], [[N, N]]) == 0


def test_each_row_has_its_own_rank():
    check(DATA["normal"], [[0, N], [N - 1, 3], [17, N // 2]])


@pytest.mark.parametrize("block", [16, 100, N, 2 * N])
def test_blocks_do_not_matter(block):
    for name in ("normal", "many ties", "mostly zero"):
        check(DATA[name], ranks_of(N, 2), block=block)


@given(data=st.data())
def test_any_data(data):
    n = data.draw(st.integers(1, 900), "n")
    seed = data.draw(st.integers(0, 2**32), "seed")
    bits = data.draw(st.sampled_from([0, 1, 4, 16, 20, 32]), "bits")
    shift = data.draw(st.integers(0, 32 - bits), "shift")
    rows = np.random.default_rng(seed).integers(0, 2**bits, size=(2, n)).astype(np.uint64) << np.uint64(shift)
    if data.draw(st.booleans(), "sorted"):
        rows = np.sort(rows, axis=1)
    ranks = data.draw(st.lists(st.lists(st.integers(0, n), min_size=2, max_size=2), min_size=1, max_size=3), "ranks")
    check(rows.astype(np.uint32), ranks, block=data.draw(st.integers(1, n), "block"))


def test_a_value_that_many_entries_have_is_only_counted():
    """Nothing is collected, and no histogram is needed, where a bracket holds one value."""
    rows = keys_of(NORMAL * (RNG.random((2, N)) < 0.05))
    search = at_ranks(N, [[N // 2, N // 2]])
    search.bracket([rows[:, s : s + 256] for s in search.sample_starts(256)])
    assert all(low == high for low, high in search.brackets.values())
    assert run_passes(search, rows, 128) == 1
    assert search.collected == 0


def test_histograms_are_added_up_as_blocks_come():
    """However many blocks there are, one histogram a rank is held."""
    search = at_ranks(N, [[N // 3, N // 2]])
    search.missed = {(0, 0, t): (None, 0) for t in range(2)}
    rows = DATA["all 32 bits"]
    assert [search.count(rows[:, s : s + 16]) for s in range(0, N, 16)][-1] == {}
    assert {at: (b.size, b.sum()) for at, b in search.bins.items()} == {(0, 0, t): (1 << 16, N) for t in range(2)}


def dependent(n: int, tasks: int) -> list:
    """As TADrop's: two quantiles, then a rank that hangs on them."""

    def first(found):
        return np.repeat(np.array([int(0.75 * n), int(0.95 * n)])[:, None], tasks, axis=1)

    def second(found):
        low, high = found[0].view(np.float32)
        with np.errstate(all="ignore"):
            share = np.nan_to_num(low / high, nan=0.0, posinf=0.0, neginf=0.0)
        return np.floor(np.clip(share, 0, 1) * n).astype(np.int64)[None]

    return [first, second]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("sampled", ["in memory", "runs", "not at all"])
def test_ranks_that_hang_on_others(name, sampled, monkeypatch):
    monkeypatch.setattr(sampling, "_SHARE", 8)
    rows = DATA[name].copy()
    search = Selection(N, dependent(N, 2))
    if sampled == "in memory":
        search.settle_among(rows)
        assert search.settled
    elif sampled == "runs":
        search.bracket([rows[:, s : s + 128] for s in search.sample_starts(128)])
    assert run_passes(search, rows, 512) <= 5
    ordered = np.concatenate([np.sort(rows, axis=1), np.full((2, 1), 2**32 - 1, np.uint32)], axis=1)
    for round_, found in zip(dependent(N, 2), search.found, strict=True):
        np.testing.assert_array_equal(found, ordered[np.arange(2), round_(search.found)])


def test_one_pass_finds_dependent_ranks_too(monkeypatch):
    monkeypatch.setattr(sampling, "_MOST", 1 << 24)
    search = Selection(N, dependent(N, 2))
    search.bracket([DATA["normal"][:, ::4]])
    assert run_passes(search, DATA["normal"], 512) == 1


@pytest.mark.parametrize("power", [None, 1, 2])
@pytest.mark.parametrize("rank", [0, 1, N // 2, N - 1, N])
@pytest.mark.parametrize("name", ["normal", "many ties", "mostly zero", "all zero", "all the same"])
def test_sums_of_what_reaches_an_order_statistic(name, rank, power):
    """Those of the definition, which the other executors evaluate."""
    values = DATA[name].view(np.float32)
    search = Selection(N, [lambda found: np.array([[N // 3] * 2]), lambda found: np.array([[rank] * 2])])
    rows = values.view(np.uint32) | np.uint32(1 << 31)
    search.settle_among(rows)
    cuts = search.found[1][0]
    found = sampling.tails(rows, search.places, cuts, power)
    ordered = np.concatenate([np.sort(values, axis=1), np.full((2, 1), np.inf, np.float32)], axis=1)
    stay = values >= ordered[:, [rank]]
    expected = {"count": np.mean(stay & (values != 0), axis=1)}
    if power is not None:
        powers = values.astype(np.float64) ** power
        expected |= {"all": powers.sum(1), "kept": np.where(stay, powers, 0).sum(1)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6)
        assert found[key].dtype == np.float32


def test_keys_that_are_placed_are_not_looked_for_again():
    row = RNG.permutation(100)
    known = [-1, 100]
    for rank in (40, 3, 40, 99, 0, 41):
        assert sampling.place(row, known, rank) == rank
    assert known == [-1, 0, 3, 40, 41, 99, 100]
    assert sorted(row[:40]) == list(range(40))


def test_a_narrow_bracket_that_misses_is_widened(monkeypatch):
    """By another pass over its own row, without histograms."""
    monkeypatch.setattr(sampling, "_MOST", 1 << 24)
    n = 1 << 16
    values = np.sort(np.abs(RNG.normal(size=(2, n))), axis=1)
    values[1, ::4] *= 1.05  # what the sample sees of the second row is a little too large
    rows = keys_of(values)
    search = at_ranks(n, [[n // 2, n // 2]])
    search.bracket([rows[:, ::4]], narrow=True)
    search.update([search.count(rows)])
    assert list(search.brackets) == [(0, 0, 1)]
    assert not search.missed
    assert run_passes(search, rows, 1000) == 1
    np.testing.assert_array_equal(search.found[0][0], np.sort(rows, axis=1)[:, n // 2])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7), st.data())
def test_ties_are_parted_by_position(row, block, data):
    """What is kept is what a stable sort from the top puts before the rank, the rank included."""
    keys = np.array(row, np.uint32)
    rank = data.draw(st.integers(0, keys.size - 1))
    order = np.argsort(-keys.astype(np.int64), kind="stable")
    cut = keys[order[rank]]
    blocks = [keys[start : start + block] for start in range(0, keys.size, block)]
    at = sampling.tie_at(np.array([sampling.reaching(b[None], cut[None])[0] for b in blocks]), rank)
    if isinstance(at, tuple):
        at = at[0] * block + np.flatnonzero(blocks[at[0]] == cut)[at[1]] + 1
    kept = (keys > cut) | ((keys == cut) & (np.arange(keys.size) < at))
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(order[: rank + 1]))
