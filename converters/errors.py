"""The one error of the converters."""

import contextlib
from collections.abc import Iterable
from typing import Any


class ConversionError(ValueError):
    """Weights or a configuration cannot be converted.

    Everything that is wrong is listed at once, one line a tensor, and kept in `problems`.

    Args:
        summary: what was being converted.
        problems: one line for each tensor that is wrong; none where the summary says it all.
    """

    def __init__(self, summary: str, problems: Iterable[str] = ()):
        self.problems = tuple(problems)
        super().__init__("\n  ".join((summary, *self.problems)))


@contextlib.contextmanager
def reading(path: Any):
    """Makes a `ConversionError` of what the system says of a file, or of `path` where it names none."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def advice(config: str) -> str:
    """Tells how to say what the files do not tell.

    Args:
        config: the contents of a `config.json`.
    """
    return f"pass config={config}, or put that into a config.json beside the file (tadrop convert takes --config FILE)"
