"""How a coefficient is tuned."""

import pytest

from examples.evidence import experiments

MIDDLE = len(experiments.LENGTHS) // 2


@pytest.mark.parametrize("at", range(len(experiments.LENGTHS)))
def test_a_climb_finds_the_only_peak_and_measures_no_length_twice(at):
    seen = []

    def value(length):
        seen.append(length)
        return -abs(experiments.LENGTHS.index(length) - at)

    assert experiments.climb(value) == experiments.LENGTHS[at]
    assert len(seen) == len(set(seen)) <= abs(at - MIDDLE) + 3


def test_a_plateau_is_not_left():
    assert experiments.climb(lambda length: 0.5) == experiments.LENGTHS[MIDDLE]
