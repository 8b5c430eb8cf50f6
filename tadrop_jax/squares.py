"""Sums of squares of short runs, which BLAS leaves to the thread that asks.

It has threads of its own for vectors of more than ten thousand entries. They would wait for each other, spinning, on
cores that ours compute on.
"""

import numpy as np

# So short that two rows of a block have more than the 500 runs from which on NumPy lets other threads work meanwhile.
_RUN = 1 << 9


def of_runs(rows: np.ndarray) -> np.ndarray:
    """Squares of float32 ``(..., n)``, summed over runs of 512 entries and a shorter last one: ``(..., m)`` float32.

    Where an entry is NaN or infinite, so is the sum of its run; the squares of very large ones overflow, too.
    """
    whole = rows.shape[-1] // _RUN * _RUN
    runs, rest = rows[..., :whole].reshape(*rows.shape[:-1], -1, _RUN), rows[..., None, whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([np.vecdot(runs, runs), np.vecdot(rest, rest)], axis=-1)
