"""The one error of the converters."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = 5


class ConversionError(ValueError):
    """Weights or a configuration cannot be converted.

    What is wrong is listed at once, one line a tensor: of each kind (what stands before a line's colon) the first few.
    All lines are kept in `problems`.

    Args:
        summary: what was being converted.
        problems: one line for each tensor that is wrong; none where the summary says it all.
    """

    def __init__(self, summary: str, problems: Iterable[str] = ()):
        self.problems = tuple(problems)
        kinds: dict[str, list[str]] = {}
        for line in self.problems:
            kinds.setdefault(line.partition(":")[0], []).append(line)
        lines = (few(found, f"{kind}: ") for kind, found in kinds.items())
        super().__init__("\n  ".join((summary, *itertools.chain(*lines))))


def few(lines: Sequence[str], prefix: str = "", of: str = "") -> list[str]:
    """The first five, and how many more there are; that line has a prefix, and may say of what."""
    return [*lines[:_SHOWN], *[f"{prefix}and {len(lines) - _SHOWN} more{of}"] * (len(lines) > _SHOWN)]


@contextlib.contextmanager
def reading(path: Any):
    """Makes a `ConversionError` of what the system says of a file, or of `path` where it names none."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def configuring(where: Any, name: str):
    """Makes a `ConversionError` of what a configuration's values break, such as a text in place of a number.

    Args:
        where: the file, for the message.
        name: of the architecture, likewise.
    """
    try:
        yield
    except ConversionError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        said = " ".join(str(error).split())
        raise ConversionError(f"{where}: a field has a value that no {name} can have: {said}") from error


def advice(config: str) -> str:
    """Tells how to say what the files do not tell.

    Args:
        config: the contents of a `config.json`.
    """
    return f"pass config={config}, or put that into a config.json beside the file (tadrop convert takes --config FILE)"
