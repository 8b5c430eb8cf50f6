"""Threads that work side by side."""

import collections
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(fn: Callable[[Any], Any], items: Iterable, workers: int, *, from_both_ends: bool = False) -> list:
    """Maps over items; each of so many threads takes the next one when it is done with its own.

    Args:
      fn: of an item.
      items: to be mapped over.
      workers: threads.
      from_both_ends: whether one thread begins with the last item. Of items that grow smaller, the last ones are
        little but Python, which one thread at a time can run: better beside what is not than beside each other.

    Raises:
      BaseException: the first error of an item, which stops the rest.
    """
    items = list(items)
    if workers == 1 or len(items) < 2:
        return [fn(item) for item in items]
    results: list[Any] = [None] * len(items)
    left, errors = collections.deque(range(len(items))), []
    ends = [left.popleft] * workers
    if from_both_ends:
        ends[-1] = left.pop

    def work(take):
        while not errors:
            try:
                i = take()
            except IndexError:
                return
            try:
                results[i] = fn(items[i])
            except BaseException as e:
                errors.append(e)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(work, take) for take in ends]:
                future.result()
        except BaseException as e:  # an interrupt: the workers must not go through all that is left
            errors.append(e)
            raise
    if errors:
        raise errors[0]
    return results
