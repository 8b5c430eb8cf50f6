"""Checks of method parameters. What is traced is taken as it is, what is not as Python's numbers."""

import numbers
from typing import Any

import numpy as np

from tadrop_jax.errors import ParameterError
from tadrop_jax.trees import is_traced

_LARGEST = float(np.finfo(np.float32).max)


def _concrete(value) -> bool:
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Whether a value is one real number, of Python, NumPy or JAX, also a traced one."""
    if getattr(value, "ndim", None) == 0:
        return getattr(value.dtype, "kind", None) in {"i", "u", "f", "V"}  # V: bfloat16 and its like
    return _concrete(value)


def known(value) -> Any:
    """The number that a parameter is, also as an array; None if it cannot be seen."""
    if _concrete(value):
        return value
    return float(value) if getattr(value, "ndim", None) == 0 and _is_seen(value) else None


def per_task(value: Any) -> Any:
    """One number; a list, tuple or vector of one number per task as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if getattr(value, "ndim", 0) == 1:
        return tuple(value.tolist() if _is_seen(value) else (_plain(value[i]) for i in range(value.shape[0])))
    return _plain(value)


def _plain(value: Any) -> Any:
    """A scalar of NumPy or JAX as a Python number, which compares by value and leaves arithmetic in float32.

    What is traced stays so, in float32 at most.
    """
    if getattr(value, "ndim", None) != 0 or not _is_number(value):
        return value
    if _is_seen(value):
        return value.item()
    return value.astype(np.float32) if value.dtype == np.float64 else value


def _is_seen(array) -> bool:
    """Whether the values of an array are at hand."""
    return not is_traced(array) and getattr(array, "is_fully_addressable", True)


def lengths(**values: Any) -> tuple[tuple[str, int], ...]:
    """Names and lengths of the parameters that were given one per task."""
    return tuple((name, len(value)) for name, value in values.items() if isinstance(value, tuple))


def number(method: str, name: str, value: Any, low: float = -float("inf"), high: float = float("inf")) -> Any:
    """A number in [low, high], or one per task; concrete arrays and scalars as Python numbers.

    Raises:
      ParameterError: naming method, parameter, value and range.
    """
    value = per_task(value)
    if getattr(value, "ndim", 0) > 1:
        raise ParameterError(f"{method}: {name} must be a number, or one per task, got an array of shape {value.shape}")
    for v in value if isinstance(value, tuple) else (value,):
        if not _is_number(v):
            raise ParameterError(f"{method}: {name} must be a number, got {v!r}")
        bounded, seen = low > -_LARGEST or high < _LARGEST, known(v)
        if seen is not None and bounded and not low <= seen <= high:  # also refuses NaN
            raise ParameterError(f"{method}: {name} must lie in [{low:g}, {high:g}], got {v}")
        if seen is not None and not abs(seen) <= _LARGEST:
            raise ParameterError(f"{method}: {name} must be a finite number of float32, got {v}")
    if isinstance(value, tuple) and not value:
        raise ParameterError(f"{method}: {name} is an empty list")
    return value


def single(method: str, name: str, value: Any, low: float = -float("inf"), high: float = float("inf")) -> Any:
    """A number in [low, high], and not one per task.

    Raises:
      ParameterError: naming method, parameter, value and range.
    """
    if getattr(value, "ndim", 0):
        raise ParameterError(f"{method}: {name} is one number, got an array of shape {value.shape}")
    value = number(method, name, value, low, high)
    if isinstance(value, tuple):
        raise ParameterError(f"{method}: {name} is one number, got {len(value)}")
    return value


def ordered(method: str, low: Any, high: Any, names: str) -> None:
    """Refuses a lower bound above its upper one, where both can be seen.

    Raises:
      ParameterError: naming method, bounds (``names``, as ``"q_low <= q_high"``) and values.
    """
    if known(low) is not None and known(high) is not None and known(low) > known(high):
        raise ParameterError(f"{method}: {names} must hold, got {low} and {high}")


def fixed(method: str, name: str, value: Any, low: float, high: float) -> float:
    """One number in [low, high] that shapes depend on, so that it cannot be traced.

    Raises:
      ParameterError: naming method, parameter, value and range.
    """
    value = single(method, name, value, low, high)
    if not _concrete(value):
        raise ParameterError(f"{method}: {name} decides on shapes and cannot be traced, got {value!r}")
    return float(value)


def whole(method: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer in [low, high].

    Raises:
      ParameterError: naming method, parameter, value and range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ParameterError(f"{method}: {name} must be a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ParameterError(f"{method}: {name} must lie in [{low}, {'inf' if high is None else high}], got {value}")
    return int(value)


def flag(method: str, name: str, value: Any) -> bool:
    """True or False, and not a text that says so.

    Raises:
      ParameterError: naming method, parameter and value.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ParameterError(f"{method}: {name} must be True or False, got {value!r}")
    return bool(value)


def choice(method: str, name: str, value: Any, options: tuple) -> Any:
    """One of a few options.

    Raises:
      ParameterError: naming method, parameter, value and the options.
    """
    if value not in options:
        raise ParameterError(f"{method}: {name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value
