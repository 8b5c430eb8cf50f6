"""Exact order statistics of data that is read block by block: a sampled bracket, then counting.

After Floyd and Rivest: a small sample brackets each wanted rank; one pass counts what lies below the bracket and
collects what lies inside; the rank is then found among the few collected. If a bracket misses, or holds too much (many
equal values), two passes of 2^16-bin histograms settle the upper and then the lower half of the key. Always exact.
"""

import threading

import numpy as np

# Up to this many entries a pass simply collects everything.
_COLLECT = 1 << 20
# What all brackets together may collect (in entries, of 4 bytes) before they are given up for histograms.
_MOST = 1 << 24
_SAMPLES = 32
# A sample is about this part of the data, within that number of runs.
_SHARE = 64


class Selection:
    """The search for R ranks of T rows of uint32 keys, over blocks.

    Attributes:
      keys: uint32 ``(R, T)``, the keys found, once ``settled``.
      settled: whether they are.
    """

    def __init__(self, n: int, ranks: np.ndarray):
        """Begins the search.

        Args:
          n: entries of each row.
          ranks: int64 ``(R, T)``, ascending from 0; rank n stands for a key above all others.
        """
        self.n, self.ranks = n, ranks
        self.keys = np.full(ranks.shape, 2**32 - 1, np.uint32)
        self.open = ranks < n
        self.low = np.zeros(ranks.shape, np.uint32)
        self.high = np.full(ranks.shape, 2**32 - 1, np.uint32)
        self.prefix: np.ndarray | None = None
        self.below = np.zeros(ranks.shape, np.int64)
        self.histogram = False
        self.collected = 0
        # One histogram for each open rank, added up as blocks come: a histogram a block would outgrow the data.
        self.bins: dict[tuple[int, int], np.ndarray] = {}
        self.lock = threading.Lock()

    @property
    def settled(self) -> bool:
        """Whether all ranks are found."""
        return not self.open.any()

    @property
    def wants_sample(self) -> bool:
        """Whether a sample helps."""
        return self.n > _COLLECT and not self.settled

    def sample_starts(self, length: int) -> list[int]:
        """Where runs of ``length`` entries, spread over the data, should be sampled."""
        count = min(max(self.n // (_SHARE * length), 4), _SAMPLES, self.n // length)
        return [int(i) for i in np.linspace(0, self.n - length, count)]

    def bracket(self, samples: list[np.ndarray]) -> None:
        """Brackets each rank by a sample: arrays ``(T, m_i)`` of keys."""
        rows = np.sort(np.concatenate(samples, axis=1), axis=1)
        m = rows.shape[1]
        share = np.clip(self.ranks / max(self.n - 1, 1), 0, 1)
        # Entries of a run are alike, so the bracket is wider than for independent samples.
        slack = 8 * np.sqrt(share * (1 - share) / m) + 16 / m
        first = np.floor((share - slack) * m).astype(np.int64)
        last = np.ceil((share + slack) * m).astype(np.int64)
        for r, t in np.argwhere(self.open):
            if first[r, t] > 0:
                self.low[r, t] = rows[t, first[r, t]]
            if last[r, t] < m - 1:
                self.high[r, t] = rows[t, last[r, t]]

    def count(self, keys: np.ndarray) -> list:
        """Counts one block of keys ``(T, B)``; called from any thread."""
        if self.histogram:
            for r, t in np.argwhere(self.open):
                self._add_bins(keys[t], r, t)
            return []
        found = []
        for r, t in np.argwhere(self.open):
            row, low, high = keys[t], self.low[r, t], self.high[r, t]
            if low == high:  # one value that many entries have, zero most likely: counting them is enough
                found.append((int(np.count_nonzero(row < low)), int(np.count_nonzero(row == low))))
                continue
            if self.collected > _MOST:
                found.append((0, row[:0]))  # the bracket is given up: no need to collect more
                continue
            # Unsigned: what lies below the bracket wraps around, and is not inside either.
            inside = row[np.flatnonzero((row - low) <= (high - low))]
            self.collected += inside.size  # a rough count will do: threads may lose an update
            found.append((int(np.count_nonzero(row < low)), inside))
        return found

    def _add_bins(self, row, r, t):
        half = row >> 16 if self.prefix is None else row[(row >> 16) == self.prefix[r, t]] & 0xFFFF
        counts = np.bincount(half, minlength=1 << 16)
        with self.lock:
            self.bins[r, t] = self.bins[r, t] + counts if (r, t) in self.bins else counts

    def update(self, parts: list[list]) -> None:
        """Draws the conclusions of a pass: what :meth:`count` gave for each block."""
        wanted = np.argwhere(self.open)
        if self.histogram:
            self._narrow(wanted)
            return
        self.histogram = True
        for i, (r, t) in enumerate(wanted):
            at = int(self.ranks[r, t]) - sum(part[i][0] for part in parts)
            inside = [part[i][1] for part in parts]
            if self.low[r, t] == self.high[r, t]:
                if 0 <= at < sum(inside):
                    self.keys[r, t], self.open[r, t] = self.low[r, t], False
            elif self.collected <= _MOST and 0 <= at < sum(a.size for a in inside):
                self.keys[r, t], self.open[r, t] = np.partition(np.concatenate(inside), at)[at], False

    def _narrow(self, wanted):
        first = self.prefix is None
        prefix = np.zeros(self.ranks.shape, np.uint32) if self.prefix is None else self.prefix
        for r, t in wanted:
            ends = np.cumsum(self.bins[r, t])
            at = self.ranks[r, t] - self.below[r, t]
            found = int(np.searchsorted(ends, at, side="right"))
            if first:
                prefix[r, t] = found
                self.below[r, t] = ends[found - 1] if found else 0
            else:
                self.keys[r, t] = (int(prefix[r, t]) << 16) | found
                self.open[r, t] = False
        self.prefix, self.bins = prefix, {}
