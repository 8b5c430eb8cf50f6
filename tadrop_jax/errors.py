"""Errors that a user of the library can act on."""

import contextlib
import difflib
import importlib.util
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


def check_installed(package: str, extra: str, module: str = "") -> None:
    """Refuses what needs a package that is not there.

    Args:
      package: its name.
      extra: of ours, that brings it.
      module: what it is imported by, if not by its name.

    Raises:
      MergeError: telling how to install it.
    """
    if importlib.util.find_spec(module or package) is None:
        raise MergeError(f"this needs {package}: pip install '.[{extra}]' in a clone")


@contextlib.contextmanager
def checkpoint_errors():
    """Makes a :class:`CheckpointError` of what the converters say of a file."""
    from converters.errors import ConversionError

    try:
        yield
    except ConversionError as error:
        raise CheckpointError(str(error)) from error
