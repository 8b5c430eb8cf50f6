"""The one error of the converters."""

from collections.abc import Iterable


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
