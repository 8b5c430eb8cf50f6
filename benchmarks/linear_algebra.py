"""Cheaper routes to the decompositions that the matrix rules need, against the plain SVD: time and error, in float32.

    python -m benchmarks.linear_algebra [--size 768] [--tasks 8] [--rounds 3] [--json FILE]

Three problems that the rules pose: the thin SVD of a long narrow matrix, the SVD of a square one (a task vector of a
transformer block), and the polar factor of the singular vectors of several tasks side by side (TSV-M, Iso-CTS), for
tasks that share nothing, half of their directions, or one direction exactly. Errors are against NumPy in float64:
``error`` is the largest deviation of what the rules use (the product of the factors, or the polar factor),
``orthogonality`` the largest entry of :math:`U^T U - I` (where the rank is full: a partial isometry has 1 there).

Seconds are processor seconds of all threads, which other load on the machine changes little; for a comparison across
devices measure the wall.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from tadrop_jax import linalg

COLUMNS = {
    "problem": ("problem", ""),
    "route": ("route", ""),
    "ratio": ("/ plain", ".2f"),
    "seconds": ("cpu, s", ".4f"),
    "error": ("error", ".1e"),
    "orthogonality": ("orthogonality", ".1e"),
}


def plain(a):
    """LAPACK's divide and conquer on the matrix as it is."""
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return u, s, vt


def by_gram(a):
    """Eigen-decomposition of the small Gram matrix: singular values are square roots, so half of the digits go."""
    values, v = jnp.linalg.eigh(a.T @ a)
    s, v = jnp.sqrt(jnp.maximum(values[::-1], 0)), v[:, ::-1]
    return a @ v / jnp.maximum(s, linalg.NULL * s[0]), s, v.T


def by_qr(a):
    """QR first, then the SVD of the small triangle: what :func:`tadrop_jax.linalg.svd` does with long matrices."""
    q, r = jnp.linalg.qr(a)
    u, s, vt = plain(r)
    return q @ u, s, vt


def polar_by_gram(a):
    """``A (A^T A)^(-1/2)`` by the eigen-decomposition of the small Gram matrix."""
    values, v = jnp.linalg.eigh(a.T @ a)
    return a @ ((v * jnp.maximum(values, 1e-30) ** -0.5) @ v.T)


def polar_by_newton_schulz(a):
    """Newton-Schulz steps ``X <- X (15 - 10 X^T X + 3 (X^T X)^2) / 8``, products alone, until they change nothing."""
    start = a / jnp.linalg.norm(a)
    one = jnp.eye(a.shape[1])

    def step(state):
        x, _, count = state
        gram = x.T @ x
        after = x @ (15 * one - 10 * gram + 3 * gram @ gram) / 8
        return after, jnp.max(jnp.abs(after - x)), count + 1

    return jax.lax.while_loop(lambda s: (s[1] > 1e-6) & (s[2] < 60), step, (start, jnp.float32(1), 0))[0]


def problems(size: int, tasks: int) -> dict[str, np.ndarray]:
    """Matrices in float64, by what they stand for."""
    rng = np.random.default_rng(0)

    def decaying(m, n):
        left, right = (np.linalg.qr(rng.normal(size=(k, min(m, n))))[0] for k in (m, n))
        return (left * 0.99 ** np.arange(min(m, n)) * np.geomspace(1, 1e-4, min(m, n))) @ right.T

    rank = size // tasks
    long = 4 * size
    own = [np.linalg.qr(rng.normal(size=(size, rank)))[0] for _ in range(tasks)]
    common = own[0][:, : rank // 2]
    shared = [np.concatenate([common + 0.01 * rng.normal(size=common.shape), o[:, rank // 2 :]], axis=1) for o in own]
    same = [np.concatenate([own[0][:, :1], o[:, 1:]], axis=1) for o in own]
    return {
        f"svd {long} x {rank}": decaying(long, rank),
        f"svd {long} x {size}": decaying(long, size),
        f"svd {size} x {size}": decaying(size, size),
        f"polar {size} x {rank * tasks}, nothing shared": np.concatenate(own, axis=1),
        f"polar {size} x {rank * tasks}, half shared": np.concatenate(shared, axis=1),
        f"polar {size} x {rank * tasks}, one the same": np.concatenate(same, axis=1),
    }


def routes(problem: str) -> dict[str, Callable]:
    """The functions that solve a problem, the plain one first."""
    if problem.startswith("polar"):
        return {"plain": linalg.polar, "Gram": polar_by_gram, "Newton-Schulz": polar_by_newton_schulz}
    return {"plain": plain, "Gram": by_gram, "QR first": by_qr}


def cheapest(function: Callable, a: jax.Array, rounds: int) -> tuple[float, Any]:
    """The best of several runs in processor seconds, after one to compile, and the result."""
    compiled = jax.jit(function)
    result = jax.block_until_ready(compiled(a))
    runs = [measure.timed(lambda: jax.block_until_ready(compiled(a))) for _ in range(rounds)]
    return measure.processor(runs) or 0.0, result


def errors(problem: str, exact: np.ndarray, result) -> tuple[float, float]:
    """Largest error of what the rules use, and largest deviation from orthonormal columns."""
    if problem.startswith("polar"):
        u, s, vt = np.linalg.svd(exact, full_matrices=False)
        factor = np.asarray(result, np.float64)
        return np.max(np.abs(factor - (u * (s > 1e-10)) @ vt)), _skew(factor)
    u, s, vt = (np.asarray(part, np.float64) for part in result)
    return np.max(np.abs(u * s @ vt - exact)), _skew(u)


def _skew(u):
    return np.max(np.abs(u.T @ u - np.eye(u.shape[1])))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON where asked."""
    parser = measure.parser(__doc__)
    parser.add_argument("--size", type=int, help="width of the model (768; 96 with --quick)")
    parser.add_argument("--tasks", type=int, default=8)
    options = measure.chosen(parser.parse_args(arguments), rounds=(3, 1), size=(768, 96))
    facts, rows = measure.machine(), []
    for problem, exact in problems(options.size, options.tasks).items():
        a, baseline = jnp.asarray(exact, jnp.float32), None
        for route, function in routes(problem).items():
            seconds, result = cheapest(function, a, options.rounds)
            baseline = baseline or seconds
            error, skew = errors(problem, exact, result)
            row = {"problem": problem, "route": route, "seconds": seconds, "ratio": seconds / baseline}
            rows.append(row | {"error": float(error), "orthogonality": float(skew)})
    setting = {"size": options.size, "tasks": options.tasks, "rounds": options.rounds}
    measure.show("linear_algebra", facts, setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
