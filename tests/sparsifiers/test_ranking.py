"""Ranks in rows against NumPy's stable sort."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tadrop_jax.sparsifiers.ranking import between_ranks, row_ranks

RNG = np.random.default_rng(5)
VALUES = {
    "distinct": RNG.normal(size=(2, 5, 300)),
    "of the same upper half": 1 + RNG.integers(0, 1 << 16, (2, 5, 300)) * 2.0**-23,
    "tied": RNG.integers(-4, 5, (2, 5, 300)) / 8,
    "equal": np.ones((2, 5, 300)),
    "long rows": RNG.integers(-9000, 9000, (1, 2, (1 << 16) + 3)),
    "one entry": RNG.normal(size=(3, 4, 1)),
}


def ranks_of(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


@pytest.mark.parametrize("name", VALUES)
def test_ranks_are_those_of_a_stable_sort(name):
    values = VALUES[name].astype(np.float32)
    np.testing.assert_array_equal(jax.jit(row_ranks)(values), ranks_of(values))


@pytest.mark.parametrize("name", VALUES)
def test_what_lies_between_two_ranks(name):
    values = VALUES[name].astype(np.float32)
    tasks, columns, ranks = len(values), values.shape[-1], ranks_of(values)
    few, most = columns // 7, columns - columns // 5
    for start, stop in ((0, columns), (few, most), (few, few), (0, 1), (columns - 1, columns), (columns, columns)):
        np.testing.assert_array_equal(between_ranks(values, start, stop), (ranks >= start) & (ranks < stop))
    starts = tuple(few + t for t in range(tasks)) if columns > 1 else (0,) * tasks
    found = between_ranks(values, starts, most)
    np.testing.assert_array_equal(found, (ranks >= np.reshape(starts, (-1, 1, 1))) & (ranks < most))


@given(
    hnp.arrays(np.float32, (1, 2, 9), elements=st.sampled_from([0.0, 1e-45, 1.0, 1.5, 3e38])),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_any_ties(values, start, stop):
    ranks = ranks_of(values)
    np.testing.assert_array_equal(row_ranks(values), ranks)
    np.testing.assert_array_equal(between_ranks(values, start, stop), (ranks >= start) & (ranks < stop))
