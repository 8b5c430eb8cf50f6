"""What becomes infinite or NaN in a merge of finite values, most likely in a narrow output dtype: counted, and told."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import few
from tadrop_jax.reading import all_finite
from tadrop_jax.report import TensorLog


class Overflow:
    """Counts such values tensor by tensor; threads may share it.

    Args:
      log: where the counts are noted, so that a resumed merge knows them; None if nothing is resumed.
    """

    def __init__(self, log: TensorLog | None = None):
        self._log = log
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def look(self, name: str, values: np.ndarray, of_finite: Callable[[], np.ndarray] | None = None) -> None:
        """Looks at values that are written of a tensor.

        Args:
          name: of the tensor.
          values: floats; anything else is passed by.
          of_finite: which of the values came of finite ones; None if all did. Called only if there is a need to know.
        """
        if values.dtype.kind in "iubc" or all_finite(values):
            return
        lost = ~np.isfinite(values.astype(np.float32, copy=False))
        if of_finite is not None:
            lost = lost & of_finite()
        with self._lock:
            self._counts[name] += int(np.count_nonzero(lost))

    def note(self, name: str) -> None:
        """Notes what was found so far in a tensor; to be called before it counts as done."""
        if self._log is not None and self._counts[name]:
            self._log.add(name, {"overflowed": self._counts[name]})

    def rows(self) -> dict[str, dict[str, int]]:
        """What was found, as the log has it."""
        return {name: {"overflowed": count} for name, count in self._counts.items()}


def warnings_of(rows: Mapping[str, Mapping[str, Any]], dtype_of: Callable[[str], np.dtype]) -> list[str]:
    """Warnings of the tensors that overflowed, of at most five and of how many more there are.

    Args:
      rows: of the log, by tensor.
      dtype_of: the dtype that a tensor is written in.
    """
    lines = []
    for name, count in ((n, row["overflowed"]) for n, row in rows.items() if row.get("overflowed")):
        dtype = dtype_of(name)
        narrow = float(ml_dtypes.finfo(dtype).max) < float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
        wider = "; 'tadrop merge' with --dtype bfloat16 or float32 holds larger ones" if narrow else ""
        values = f"{count} value{'s' * (count > 1)}"
        lines.append(f"{name}: {values} of finite inputs overflowed {dtype} and became infinite or NaN{wider}")
    return few(lines, of=" such tensors")
