"""Paired differences of what tables' lines measured, and their 95 % intervals: over tasks, over seeds, over pairs."""

from collections.abc import Sequence

import numpy as np

Lines = list[dict[str, str]]


def paired(lines: Lines, rule: str, arm: str, other: str, judged: Sequence[int] | None = None) -> np.ndarray:
    """One arm minus another, for each pair of seed and task that both have, `(N,)`; on some tasks, or on all."""
    part = slice(None) if judged is None else judged
    of = [line for line in lines if line["rule"] == rule]
    found = {(line["sparsifier"], line["seed"]): by_task(line)[part] for line in of}
    seeds = [seed for name, seed in found if name == arm and (other, seed) in found]
    return np.concatenate([np.zeros(0), *(found[arm, seed] - found[other, seed] for seed in seeds)])


def by_seed(values: np.ndarray, tasks: int) -> np.ndarray:
    """Differences `(N,)` with a row for each seed, `(seeds, tasks)`."""
    return values.reshape(len(values) // max(tasks, 1), tasks)


def established(values: np.ndarray) -> bool:
    """Whether the mean of `(seeds, tasks)` differs from zero as if tasks were drawn anew, if seeds were, and by pairs.

    Tasks of one seed share a merge, so that pairs of the two are not independent. One seed establishes nothing.
    """
    halves = (*_halves(values), 100 * half_width(values.ravel())) if min(values.shape) > 1 else ()
    return bool(halves) and all(100 * abs(values.mean()) > half for half in halves)


def emphasised(text: str, values: np.ndarray) -> str:
    """In bold, if what it says is `established`."""
    return f"**{text}**" if established(values) else text


def two_ways(values: np.ndarray) -> str:
    """The mean of `(seeds, tasks)`, and half its interval over tasks (seeds averaged) and, after it, over seeds."""
    if not values.size:
        return ""
    halves = "; ".join(f"± {half:.2f}" for half in _halves(values))
    return emphasised(f"{100 * values.mean():+.2f} {halves}".strip(), values)


def _halves(values: np.ndarray) -> list[float]:
    """Half the widths, in points, over tasks and over seeds, where there are two or more."""
    return [100 * half_width(means) for means in (values.mean(0), values.mean(1)) if len(means) > 1]


def interval(values: np.ndarray) -> str:
    """The mean of differences of any shape, in points, and half its 95 % interval over all of them; "" of none."""
    values = 100 * values.ravel()
    if not len(values):
        return ""
    return f"{values.mean():+.2f}" + (f" ± {half_width(values):.2f}" if len(values) > 1 else "")


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean of `(N,)` values, N at least 2: Student's."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def by_task(line: dict[str, str]) -> np.ndarray:
    """A line's test accuracies, one a task."""
    return numbers(line["by_task"])


def numbers(joined: str) -> np.ndarray:
    """What a table has as numbers in one cell."""
    return np.array([float(value) for value in joined.split()])
