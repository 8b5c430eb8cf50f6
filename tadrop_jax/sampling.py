"""Exact order statistics of data that is read block by block: a sampled bracket, then counting.

After Floyd and Rivest: a small sample brackets each wanted rank; one pass counts what lies below the bracket and
collects what lies inside; the rank is then found among the few collected. Ranks that depend on other order statistics
of the same data are bracketed with them, from what the sample says of those, so that they share the pass. Where another
pass is cheap, brackets are narrow, since what lies inside is costly to collect, and the few that miss are widened. If a
bracket misses even so, or holds too much, two passes of 2^16-bin histograms settle the upper and then the lower half
of the key. Data in memory are partitioned instead. Always exact. Everything here is NumPy, which leaves the
interpreter's lock to other threads.
"""

import bisect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tadrop_jax import squares

# Up to this many entries a pass over files simply collects everything.
_COLLECT = 1 << 20
# What all brackets together may collect (in entries, of 4 bytes) before they are given up for histograms.
_MOST = 1 << 24
_SAMPLES = 128
_PIECE = 1 << 17
# A sample is about this part of the data, within that number of runs.
_SHARE = 64
# How far a bracket reaches to either side, in standard errors of the sample.
_WIDE, _NARROW = 6, 2.5
_TOP = np.uint32(2**32 - 1)
_ZERO = np.uint32(1 << 31)  # the key of 0.0; a positive number's is this and its bits

# From the keys that the rounds before found, one array (R, T) a round, to int64 ranks (R, T).
Round = Callable[[list[np.ndarray]], np.ndarray]


class Selection:
    """The search for ranks of T rows of keys, uint32 or narrower, over blocks.

    Attributes:
      found: for each round that is settled the keys, uint32 ``(R, T)``.
      places: of data in memory: for each row the ranks whose keys are in their places (see :func:`place`).
    """

    def __init__(self, n: int, rounds: Sequence[Round]):
        """Begins the search.

        Args:
          n: entries of each row.
          rounds: each gives ranks, ascending from 0; rank n stands for a key above all others.
        """
        self.n, self.rounds = n, tuple(rounds)
        self.found: list[np.ndarray] = []
        self.places: list[list[int]] = []
        self.collected = 0
        self.lock = threading.Lock()
        # By round, rank and row: bracket (both ends belong to it); entries below it, and those inside: all of them, or
        # one key and how often it is there.
        self.brackets: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        self.inside: dict[tuple[int, int, int], tuple[int, np.ndarray | tuple[Any, int]]] = {}
        # The wide brackets of ranks that were given narrow ones.
        self.spare: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        # What brackets missed, with the upper half of its key (None: not known yet), the entries below that, and one
        # histogram, added up as blocks come: a histogram a block would outgrow the data.
        self.missed: dict[tuple[int, int, int], tuple[int | None, int]] = {}
        self.bins: dict[tuple[int, int, int], np.ndarray] = {}
        ranks = self.rounds[0](self.found)
        # Without a sample, everything is inside.
        self.brackets |= {(0, r, t): (np.uint32(0), _TOP) for r, t in np.argwhere(ranks < n)}
        if not self.brackets:
            self._settle()

    @property
    def settled(self) -> bool:
        """Whether all ranks are found."""
        return len(self.found) == len(self.rounds)

    @property
    def wants_sample(self) -> bool:
        """Whether a sample of data in files helps."""
        return self.n > _COLLECT and not self.settled

    def sample_starts(self, length: int) -> list[int]:
        """Where runs of ``length`` entries, spread over the data, should be sampled."""
        count = min(max(self.n // (_SHARE * length), 4), _SAMPLES, self.n // length)
        return [int(i) for i in np.linspace(0, self.n - length, count)]

    def settle_among(self, rows: np.ndarray) -> None:
        """Finds all ranks in rows ``(T, n)`` of all keys, which are in memory and are reordered."""
        known = self.places = [[-1, self.n] for _ in rows]
        while not self.settled:
            ranks = self.rounds[len(self.found)](self.found)
            keys = np.full(ranks.shape, _TOP)
            for r, t in np.argwhere(ranks < self.n):
                keys[r, t] = place(rows[t], known[t], int(ranks[r, t]))
            self.found.append(keys)

    def bracket(self, samples: Sequence[np.ndarray], narrow: bool = False) -> None:
        """Brackets each rank by a sample.

        Args:
          samples: runs ``(T, m_i)`` of keys; if they are all keys, the ranks are found.
          narrow: whether a bracket may miss its rank now and then, since another pass over its row is cheap.
        """
        runs = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=1)
        rows, m = np.sort(runs, axis=1), runs.shape[1]
        starts = np.cumsum([0, *(s.shape[1] for s in samples[:-1])])
        lengths = np.array([s.shape[1] for s in samples])
        guesses: list[np.ndarray] = []
        self.brackets = {}
        for i, ranks_of in enumerate(self.rounds):
            ranks = ranks_of(guesses)
            if m == self.n:
                guesses.append(_at(rows, ranks))
                continue
            share = np.clip(ranks / max(self.n - 1, 1), 0, 1)
            guess = _at(rows, np.rint(share * (m - 1)).astype(np.int64))
            for r, t in np.argwhere(ranks < self.n):
                error = np.sqrt(share[r, t] * (1 - share[r, t]) / m)
                if len(samples) > 1:  # entries of a run are alike: the runs say how far they are from each other
                    below = np.add.reduceat(runs[t] <= guess[r, t], starts, dtype=np.int64) / lengths
                    error = max(error, np.sqrt(np.mean(np.diff(below) ** 2) / 2 / len(samples)))
                # A rank that hangs on others errs with them.
                wide, slack = ((sure * (1 + i / 2)) * error + 16 / m for sure in (_WIDE, _NARROW if narrow else _WIDE))
                if narrow:
                    self.spare[i, r, t] = _ends(rows[t], float(share[r, t]), wide)
                if any(abs(share[r, t] - share[q, t]) < slack / 8 for q in range(r) if (i, q, t) in self.brackets):
                    continue  # the bracket of its neighbour will do
                self.brackets[i, r, t] = _ends(rows[t], float(share[r, t]), slack)
            guesses.append(guess)
        if m == self.n:
            self.found = guesses

    def count(self, keys: np.ndarray) -> dict:
        """Counts one block of keys ``(T, B)``; called from any thread."""
        for at, (prefix, _) in self.missed.items():
            self._add_bins(keys[at[2]], at, prefix)
        if self.missed:
            return {}
        found: dict[tuple[int, int, int], tuple[int, Any]] = {}
        wide: dict[tuple[int, int], dict[int, tuple[Any, Any]]] = {}
        for (i, r, t), (low, high) in self.brackets.items():
            if low == high:  # one value that many entries have, zero most likely: counting them is enough
                found[i, r, t] = int(np.count_nonzero(keys[t] < low)), int(np.count_nonzero(keys[t] == low))
            elif self.collected > _MOST:
                # The brackets are given up: no need to collect more. Not a view, which would keep the block.
                found[i, r, t] = 0, np.empty(0, keys.dtype)
            else:
                wide.setdefault((i, r), {})[t] = low, high
        for (i, r), brackets in wide.items():
            for t, (below, inside) in _collect(keys, brackets).items():
                found[i, r, t] = below, inside
                with self.lock:
                    self.collected += inside.size
        return found

    def _add_bins(self, row, at, prefix):
        half = row >> 16 if prefix is None else row[(row >> 16) == prefix] & 0xFFFF
        counts = np.bincount(half, minlength=1 << 16)
        with self.lock:
            self.bins[at] = self.bins[at] + counts if at in self.bins else counts

    def update(self, parts: Sequence[dict]) -> None:
        """Draws the conclusions of a pass: what :meth:`count` gave for each block."""
        if self.missed:
            self._narrow()
        else:
            for at, (low, _) in self.brackets.items():
                below, inside = sum(part[at][0] for part in parts), [part[at][1] for part in parts]
                if isinstance(inside[0], int):
                    self.inside[at] = below, (low, sum(inside))
                elif self.collected <= _MOST:
                    self.inside[at] = below, np.concatenate(inside)
        self._settle()

    def _settle(self) -> None:
        """Goes through the rounds as far as what was collected answers them."""
        while not self.settled:
            i = len(self.found)
            ranks = self.rounds[i](self.found)
            keys = np.full(ranks.shape, _TOP)
            missing = []
            for r, t in np.argwhere(ranks < self.n):
                key = self._answer((i, r, t), int(ranks[r, t]))
                if key is None:
                    missing.append((i, r, t))
                else:
                    keys[r, t] = key
            again = [at for at in missing if at in self.spare] if self.collected <= _MOST else []
            if again:
                self.brackets = {at: self.spare.pop(at) for at in again}
                return
            self.missed = {at: self.missed.get(at, (None, 0)) for at in missing}
            if self.missed:
                return
            self.found.append(keys)

    def _answer(self, at, rank: int) -> np.uint32 | None:
        """The key at a rank of a row, if what was collected of the row, first of all for this rank, tells it."""
        for other in (at, *(o for o in self.inside if o[2] == at[2])):
            below, inside = self.inside.get(other, (0, (_TOP, 0)))
            place, size = rank - below, inside[1] if isinstance(inside, tuple) else inside.size
            if 0 <= place < size:
                return inside[0] if isinstance(inside, tuple) else np.partition(inside, place)[place]
        return None

    def _narrow(self):
        i = len(self.found)
        ranks = self.rounds[i](self.found)
        for at, (prefix, below) in list(self.missed.items()):
            ends = np.cumsum(self.bins[at])
            bin_ = int(np.searchsorted(ends, ranks[at[1:]] - below, side="right"))
            if prefix is None:
                self.missed[at] = bin_, below + int(ends[bin_ - 1] if bin_ else 0)
                continue
            key = np.uint32((prefix << 16) | bin_)
            del self.missed[at]
            self.inside[at] = int(ranks[at[1:]]), (key, 1)
        self.bins = {}


def place(row: np.ndarray, known: list[int], rank: int) -> np.generic:
    """The key at a rank of a row, which is partitioned for it.

    Args:
      row: keys, reordered in place.
      known: ascending, the ranks whose keys are in their places already, between -1 and the length of the row; the new
        one is added. NumPy finds one after another many times faster than several at once.
      rank: from 0.
    """
    i = bisect.bisect_left(known, rank)
    if known[i] != rank:
        start, end = known[i - 1] + 1, known[i]
        if rank == start:  # a neighbour, as in quantiles that are interpolated: a minimum is found several times faster
            least = start + int(row[start:end].argmin())
            row[rank], row[least] = row[least], row[rank]
        else:
            row[start:end].partition(rank - start)
        known.insert(i, rank)
    return row[rank]


def tails(rows: np.ndarray, places: Sequence[list[int]], cuts: np.ndarray, power: int | None) -> dict[str, np.ndarray]:
    """What :class:`tadrop_jax.stages.Tail` asks for, of rows that were partitioned.

    Args:
      rows: ``(T, n)`` keys of non-negative float32 numbers.
      places: for each row the ranks whose keys are in their places, that of the cut among them.
      cuts: ``(T,)`` keys.
      power: 1 or 2; None for the count alone.
    """
    found: dict[str, list[float]] = {"count": []} if power is None else {"count": [], "all": [], "kept": []}
    for row, known, cut in zip(rows, places, cuts, strict=True):
        # From here on, everything reaches the cut; before it, what equals it.
        start = min((i for i in known[1:-1] if row[i] >= cut), default=row.size)
        ties = sum(int(np.count_nonzero(piece >= cut)) for piece in _pieces(row[:start]))
        zeros = int(np.count_nonzero(row == _ZERO)) if cut == _ZERO else 0
        found["count"].append((row.size - start + ties - zeros) / row.size)
        if power is not None:
            before, after = (_power(half, power) for half in np.split(row, [start]))
            equal = ties * float((cut ^ _ZERO).view(np.float32)) ** power if ties else 0.0
            found["all"].append(before + after)
            found["kept"].append(equal + after)
    return {name: np.array(values, np.float32) for name, values in found.items()}


def reaching(rows: np.ndarray, cuts: np.ndarray) -> list[tuple[int, int]]:
    """How many keys of each of T rows lie above the row's cut, and how many equal it."""
    # Row by row: counting along an axis takes NumPy three times as long.
    return [
        (int(np.count_nonzero(row > cut)), int(np.count_nonzero(row == cut)))
        for row, cut in zip(rows, cuts, strict=True)
    ]


def tie_at(counts: np.ndarray, rank: int) -> tuple[int, int] | np.uint32:
    """Where the entry of a rank lies if ties at a cut come in order of position, after what lies above the cut.

    Args:
      counts: ``(B, 2)``, what :func:`reaching` gives of one row for each block.
      rank: from 0, the first above the cut.

    Returns:
      Block and number, from 0, among the block's ties; or a key that parts the ties as it does, if one is known: 0
      before all of them, one that no position reaches after the last.
    """
    above, ties = counts.sum(0)
    if rank < above or rank >= above + ties - 1:
        return np.uint32(0) if rank < above else _TOP - np.uint32(1)
    ends = np.cumsum(counts[:, 1])
    block = int(np.searchsorted(ends, rank - above, side="right"))
    return block, int(rank - above - ends[block] + counts[block, 1])


def _power(keys: np.ndarray, power: int) -> float:
    """The sum of powers of the numbers that keys stand for."""
    negated = keys.view(np.float32)  # the key of a number that is not negative has the bits of its opposite
    return float(np.sum(squares.of_runs(negated), dtype=np.float64) if power == 2 else -np.sum(negated))


def _pieces(row: np.ndarray) -> Iterator[np.ndarray]:
    """A row in pieces that stay in a core's cache, with what is made of them."""
    return (row[start : start + _PIECE] for start in range(0, row.size, _PIECE))


def _collect(keys: np.ndarray, brackets: Mapping[int, tuple[Any, Any]]) -> dict[int, tuple[int, np.ndarray]]:
    """How many keys of some rows of ``(T, B)`` lie below the row's bracket, and those inside.

    All rows at once: threads hand over the interpreter's lock with each call, which takes as long as a row does.
    """
    nothing = 1, 0  # the bracket of the other rows
    ends = np.array([brackets.get(t, nothing) for t in range(len(keys))], keys.dtype)
    # Masks are a quarter of the keys: two comparisons cost less than one after a subtraction.
    under, inside = keys < ends[:, :1], keys <= ends[:, 1:]
    places = np.flatnonzero(np.logical_xor(under, inside, out=inside))
    values = np.split(keys.reshape(-1)[places], np.searchsorted(places, keys.shape[1] * np.arange(1, len(keys))))
    return {t: (int(np.count_nonzero(under[t])), values[t]) for t in brackets}


def _ends(row: np.ndarray, share: float, slack: float) -> tuple[Any, Any]:
    """What a sorted sample gives for a share less and more the slack: the ends of a bracket, which belong to it."""
    m, top = row.size, row.dtype.type(np.iinfo(row.dtype).max)
    first, last = int((share - slack) * m), int(np.ceil((share + slack) * m))
    return row[first] if first > 0 else row.dtype.type(0), row[last] if last < m - 1 else top


def values(keys: np.ndarray, dtype) -> np.ndarray:
    """:func:`tadrop_jax.selection.from_ordered_bits` on the host: float32, or the keys themselves."""
    sign = np.uint32(1 << 31)
    return keys if dtype == np.uint32 else np.where(keys >= sign, keys ^ sign, ~keys).view(np.float32)


def _at(rows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The keys at ranks (R, T) of sorted rows, and the largest key at a rank that is none."""
    n = rows.shape[1]
    found = np.take_along_axis(rows, np.minimum(ranks, n - 1).T, axis=1).T
    return np.where(ranks < n, found, _TOP)
