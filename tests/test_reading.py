"""What is looked at when blocks are read."""

import ml_dtypes
import numpy as np
import pytest

from tadrop_jax.reading import all_finite

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_not_finite_by_bits(dtype):
    dtype = np.dtype(dtype)
    limits = ml_dtypes.finfo(dtype)
    fine = np.array([0, -0.0, limits.max, limits.min, limits.tiny, -1]).astype(dtype)
    assert all_finite(fine)
    assert all_finite(fine[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        spoilt = fine.copy()
        spoilt[3] = bad
        assert np.isfinite(spoilt.astype(np.float32)).all() == all_finite(spoilt)
