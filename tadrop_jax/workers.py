"""Threads that work side by side."""

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(fn: Callable[[Any], Any], items: Iterable, workers: int) -> list:
    """Maps over items; each of so many threads takes the next one when it is done with its own.

    Raises:
      BaseException: the first error of an item, which stops the rest.
    """
    items = list(items)
    if workers == 1 or len(items) < 2:
        return [fn(item) for item in items]
    results: list[Any] = [None] * len(items)
    counter, errors = itertools.count(), []

    def work():
        while not errors:
            i = next(counter)
            if i >= len(items):
                return
            try:
                results[i] = fn(items[i])
            except BaseException as e:
                errors.append(e)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        except BaseException as e:  # an interrupt: the workers must not go through all that is left
            errors.append(e)
            raise
    if errors:
        raise errors[0]
    return results
