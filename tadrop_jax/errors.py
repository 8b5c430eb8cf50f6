"""Errors that a user of the library can act on."""

import contextlib
import difflib
from collections.abc import Iterable
from typing import Any


class MergeError(ValueError):
    """A merge was asked for that cannot be done as asked.

    The message names the file or tree, the tensor's path, and the two values that disagree.
    """


class MismatchError(MergeError):
    """Two models (or a model and the base) do not have the same tensors, shapes or dtypes."""


class RowsError(MismatchError):
    """A tensor of a model has another number of rows than the base's, and is alike but for that."""


class DtypeError(MismatchError):
    """A tensor of a model has another dtype than the base's."""


class ParameterError(MergeError):
    """A method got an unknown parameter, or one outside its range."""


class ContentError(MergeError):
    """A tensor holds NaN or infinity."""


class CheckpointError(MergeError):
    """A file is missing, damaged, or not of a kind that can be read."""


class MergeWarning(UserWarning):
    """Something that is most likely not what the user wants, though it can be done."""


def meant(name: Any, names: Iterable[str]) -> str:
    """``" (did you mean 'ties'?)"`` for what is nearly one of the names, or nothing."""
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextlib.contextmanager
def checkpoint_errors():
    """Makes a :class:`CheckpointError` of what the converters say of a file."""
    from converters.errors import ConversionError

    try:
        yield
    except ConversionError as error:
        raise CheckpointError(str(error)) from error
