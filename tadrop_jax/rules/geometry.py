"""What the geometric rules share: inner products as one stage, angles and norms with finite gradients.

A tensor's T vectors are known up to a rotation by their T x T inner products, which add up over pieces. So the rules
work out coefficients of the vectors from those, and never need a tensor in one piece."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from tadrop_jax.errors import MergeError, ParameterError
from tadrop_jax.parameters import number
from tadrop_jax.stages import Sums
from tadrop_jax.steps import Piece, over_tasks, safe_ratio

_COLLINEAR = 1e-6


def weights_of(x: Piece) -> jax.Array:
    """The weights of the models, ``(T, *S)``: base plus what a sparsifier left of the task vectors."""
    if x.base is None:
        raise MergeError("this rule works on weights: call tj.merge(base, models, rule)")
    return x.base + x.stack


def task_vectors_of(x: Piece) -> jax.Array:
    """The task vectors, ``(T, *S)``."""
    return x.stack


def inner_products(of: Callable[[Piece], jax.Array]) -> Sums:
    """All inner products of the vectors ``of(x)`` over a tensor, as a stage; :func:`gram` reads them."""

    def products(x, carry, n):
        vectors = of(x)
        at, axes = jnp.arange(vectors.shape[0]), tuple(range(1, vectors.ndim))
        # One matrix product, many times faster than a sum of products for each pair. What pads a piece is 0.
        found = jnp.tensordot(vectors, vectors, axes=(axes, axes), precision="highest")
        return {f"lag_{d}": found[at, (at + d) % at.size] for d in range(at.size // 2 + 1)}

    return Sums(products)


def gram(carry: Mapping[str, jax.Array]) -> jax.Array:
    """The ``(T, T)`` inner products that :func:`inner_products` found."""
    tasks = carry["lag_0"].shape[0]
    at = jnp.arange(tasks)
    matrix = jnp.zeros((tasks, tasks), jnp.float32)
    for d in range(tasks // 2 + 1):
        other = (at + d) % tasks
        matrix = matrix.at[at, other].set(carry[f"lag_{d}"]).at[other, at].set(carry[f"lag_{d}"])
    return matrix


def root(square: jax.Array) -> jax.Array:
    """Square root, 0 below 0; the gradient at 0 is 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def cosines(products: jax.Array) -> jax.Array:
    """Inner products ``(..., T, T)`` as cosines in [-1, 1]; 0 beside a zero vector."""
    norms = root(jnp.diagonal(products, axis1=-2, axis2=-1))
    return jnp.clip(safe_ratio(products, norms[..., :, None] * norms[..., None, :]), -1, 1)


def angle(cosine: jax.Array) -> jax.Array:
    """Angle of a cosine; its gradient at 1 and -1 is 0. NaN, which overflow leaves, stays NaN."""
    inside = jnp.abs(cosine) < 1
    outside = jnp.where(cosine > 0, 0, jnp.where(cosine < 0, jnp.pi, jnp.nan))
    return jnp.where(inside, jnp.arccos(jnp.where(inside, cosine, 0)), outside)


def collinear(cosine: jax.Array) -> jax.Array:
    """Whether vectors are parallel or opposite: rounding of float32 sums would decide the angle."""
    return 1 - jnp.abs(cosine) <= _COLLINEAR


def arc(cosine: jax.Array, t, linear: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coefficients of both ends of an arc, for a point at the share t of its angle; of the chord where ``linear``."""
    whole = angle(jnp.where(linear, 0, cosine))
    first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * whole) / jnp.sin(whole))
    return first, jnp.where(linear, t, jnp.sin(t * whole) / jnp.sin(whole))


def combined(x: Piece, vectors: jax.Array, coefficients: jax.Array) -> jax.Array:
    """The sum of the vectors ``(T, *S)`` times one coefficient each, ``(T,)``."""
    return over_tasks(jnp.add, vectors * x.column(coefficients))


def shares(x: Piece) -> jax.Array:
    """The step's weights, one a task, ``(T,)``, divided by their sum."""
    given = weights_per_task(x)
    return safe_ratio(given, jnp.sum(given))


def weights_per_task(x: Piece) -> jax.Array:
    """The step's ``"weights"`` (:attr:`tadrop_jax.steps.Step.numbers`), one a task, ``(T,)``."""
    return jnp.broadcast_to(jnp.reshape(x.per_task(x.numbers["weights"]), (-1,)), (len(x.tasks),))


def weights_with_sum(method: str, weights):
    """Weights, a number or one per task, whose sum divides.

    Raises:
      ParameterError: for what is no number, or a sum of 0.
    """
    weights = number(method, "weights", weights)
    each = weights if isinstance(weights, tuple) else (weights,)
    if all(isinstance(w, (int, float)) for w in each) and not abs(sum(each)) > 1e-6:
        raise ParameterError(f"{method}: the sum of weights divides and must not be 0, got {list(each)}")
    return weights
