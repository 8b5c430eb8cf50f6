"""The k-th largest magnitude and a quantile of magnitudes, exact: ours beside four peers and one read of the data.

    python -m benchmarks.selection [--sizes 1e4,1e6,1e8] [--dtypes float32,bfloat16] [--json FILE]

np.partition works on a copy (the magnitudes; of bfloat16 their bit patterns, since NumPy cannot partition the type),
and so does every peer. jnp.quantile and jax.lax.top_k are compiled first. The floor is the largest bit pattern of the
array, found in one read by all cores. A candidate's turn lasts 20 ms or one call, so that a call of microseconds is
measured warm. What a peer is expected to take is told from its time on the size before; it is
skipped where that is longer than --limit.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import tadrop_jax as tj
from benchmarks import measure
from tadrop_jax.workers import cores

DENSITY, QUANTILE, TURN_S, REST_S = 0.2, 0.75, 0.02, 0.25
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PEERS = ("np.partition", "jnp.quantile", "lax.top_k", "torch.kthvalue")
COLUMNS = {
    "dtype": ("dtype", ""),
    "entries": ("entries", ".0e"),
    "of": ("of", ""),
    **{f"{peer} / ours": (f"{peer} / ours", ".2f") for peer in PEERS},
    "ours / read": ("ours / one read", ".1f"),
    "ours_ms": ("ours, ms", ".2f"),
    "read_ms": ("one read, ms", ".2f"),
}


def values(entries: int, dtype: np.dtype) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(0).standard_normal(entries, np.float32).astype(dtype)


def read(x: jax.Array, host: np.ndarray) -> Callable[[], Any]:
    """One read of the data by everything that the device has."""
    if jax.default_backend() != "cpu":
        largest = jax.jit(lambda a: jnp.max(jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")))
        return lambda: largest(x).block_until_ready()
    bits = host.view(f"uint{8 * host.itemsize}")
    parts = np.array_split(bits, cores())
    pool = ThreadPoolExecutor(cores())  # one for all calls: starting threads takes longer than to read 1e5 entries
    return lambda: max(pool.map(np.max, parts))


def candidates(of: str, x: jax.Array, host: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Ours, the peers that have such a function, and the floor, each as a call."""
    n = host.size
    k = max(int(DENSITY * n), 1)
    at = n - k if of == "k-th" else int(QUANTILE * (n - 1))

    def partition():
        magnitudes = np.abs(host) if host.dtype == np.float32 else host.view(np.uint16) & np.uint16(0x7FFF)
        return np.partition(magnitudes, at)[at]

    def ours():
        if of == "k-th":
            return tj.kth_largest_magnitude(x, k).block_until_ready()
        return tj.magnitude_quantile(x, QUANTILE).block_until_ready()

    found: dict[str, Callable[[], Any]] = {"ours": ours, "read": read(x, host), "np.partition": partition}
    if of == "k-th":
        top = jax.jit(lambda a: jax.lax.top_k(jnp.abs(a), k)[0][-1])
        found["lax.top_k"] = lambda: top(x).block_until_ready()
    else:
        quantile = jax.jit(lambda a: jnp.quantile(jnp.abs(a).astype(jnp.float32), QUANTILE))
        found["jnp.quantile"] = lambda: quantile(x).block_until_ready()
    if measure.has("torch"):
        import torch

        # torch has no NumPy array of bfloat16: it takes the bits.
        bits = torch.from_numpy(host.view(np.int16) if host.itemsize == 2 else host)
        tensor = bits.view(torch.bfloat16) if host.itemsize == 2 else bits
        found["torch.kthvalue"] = lambda: torch.kthvalue(tensor.abs(), at + 1).values
    return found


def row(of: str, host: np.ndarray, rounds: int, limit_s: float, rates: dict[str, float]) -> dict[str, Any]:
    """Measures one size; ``rates`` are seconds an entry of each candidate, on the size before."""
    x = jax.device_put(host)
    calls = candidates(of, x, host)
    expected = {name: rates.get(name, 0) * host.size for name in calls}
    skipped = {name: s for name, s in expected.items() if name in PEERS and s > limit_s}
    calls = {name: call for name, call in calls.items() if name not in skipped}
    for call in calls.values():
        call()  # compiles, and warms up

    def turn(call):
        time.sleep(REST_S)  # idle threads of the candidate before (OpenMP's, XLA's) go on spinning for a while
        return measure.timed(call, TURN_S)

    runs = measure.in_turns({name: functools.partial(turn, call) for name, call in calls.items()}, rounds)
    rates |= {name: (measure.fastest(r) or 0) / host.size for name, r in runs.items()}
    found: dict[str, Any] = {"dtype": host.dtype.name, "entries": host.size, "of": of}
    found |= {f"{p} / ours": measure.ratio(runs[p], runs["ours"]) for p in PEERS if p in runs}
    found["ours / read"] = measure.ratio(runs["ours"], runs["read"])
    for name, taken in runs.items():
        found[f"{name}_ms"] = 1e3 * (measure.fastest(taken) or 0)
    found["note"] = "; ".join(f"{name} skipped, would take {s:.0f} s" for name, s in skipped.items())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--sizes", type=measure.numbers, help="entries (1e4 to 1e8; to 1e6 with --quick)")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--limit", type=float, default=20, help="seconds of a call that is too long to wait for (20)")
    options = measure.chosen(parser.parse_args(arguments), sizes=([10**i for i in range(4, 9)], [10**4, 10**6]))
    facts, rows = measure.machine(), []
    for name in options.dtypes.split(","):
        for of in ("k-th", "quantile"):
            rates: dict[str, float] = {}
            for entries in sorted(options.sizes):
                rows.append(row(of, values(entries, DTYPES[name]), options.rounds, options.limit, rates))
    setting = {"density": DENSITY, "quantile": QUANTILE, "rounds": options.rounds}
    measure.show("selection", facts, setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
