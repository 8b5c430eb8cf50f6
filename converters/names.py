"""Between the names in a file and those of a family's table: other spellings, tied copies, computed buffers."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from converters.errors import ConversionError
from converters.families import Architecture, offered


class Origin(NamedTuple):
    """What a loaded module remembers of its file.

    Attributes:
        architecture: its name in `converters.families.ARCHITECTURES`.
        stored: (name, dtype) of each tied copy and buffer that the file stored besides the parameters.
        names: (name in the table, name in the file) where these differ: another spelling, or that of a tied copy that
            was stored without the tensor it is a copy of.
    """

    architecture: str
    stored: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    @classmethod
    def noted(cls, architecture: str, note: Mapping[str, Any], where: Any) -> "Origin":
        """What :meth:`note` wrote.

        Raises:
            ConversionError: it is something else.
        """
        try:
            stored, names = (tuple((str(a), str(b)) for a, b in note.get(key, ())) for key in ("stored", "names"))
        except (TypeError, ValueError):
            raise ConversionError(f"{where}: stored and names must hold pairs") from None
        if len({own for _, own in names}) < len(names):
            raise ConversionError(f"{where}: gives two tensors one name")
        return cls(architecture, stored, names)

    def note(self) -> dict[str, Any]:
        """For a JSON file beside a Flax tree."""
        return self._asdict()

    def spelled_as(self, spelling: Mapping[str, str]) -> "Origin":
        """The same with the names of a file, as `spelled` gives them."""
        return self._replace(names=tuple((name, own) for name, own in sorted(spelling.items()) if name != own))


def spelled(tensors: Mapping[str, Any], package: Any, entry: Architecture) -> tuple[dict[str, Any], dict[str, str]]:
    """Renames tensors to the spelling that the family's table has.

    Returns:
        The tensors, and for each of their names the one in the file.

    Raises:
        ConversionError: two names give the same.
    """
    rules = [(re.compile(pattern), new) for pattern, new in offered(package, "aliases", (), entry.name)]
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems = []
    for source, array in tensors.items():
        name = source
        for pattern, new in rules:
            name = pattern.sub(new, name)
        if name in found:
            problems.append(f"mapped twice: {source} and {origin[name]} are both {name}")
        found[name], origin[name] = array, source
    if problems:
        raise ConversionError("cannot tell the tensors apart:", problems)
    return found, origin


def learned(
    tensors: Mapping[str, Any], spelling: Mapping[str, str], package: Any, entry: Architecture, config: Any
) -> tuple[dict[str, Any], Origin, list[str]]:
    """Separates the learned parameters from tied copies and buffers, which are checked.

    Args:
        tensors: arrays or leaves, as `spelled` gives them.
        spelling: their names in the file, likewise.
        package: the family's.
        entry: the architecture.
        config: the family's Config.

    Returns:
        The parameters, what has to be remembered, and a line for each copy or buffer that is not what it must be.
    """
    copies = offered(package, "tied", {}, config, entry.name)
    buffers = _buffers(package, entry, config)
    kept, stored, problems = {}, [], []
    names = dict(spelling)
    for name, array in tensors.items():
        make, match = _buffer(buffers, name)
        if name in copies:
            first = copies[name]
            other = tensors.get(first, kept.get(first))
            if other is None:
                kept[first], names[first] = array, names.pop(name)
                continue
            if not _same_bytes(array, other):
                problems.append(f"tied to {first} by the configuration, but differs from it: {name}")
            stored.append((name, str(array.dtype)))
        elif match is not None:
            want = np.asarray(make(match))
            if tuple(array.shape) != want.shape or not np.array_equal(np.asarray(array), want.astype(array.dtype)):
                problems.append(f"not the buffer that the model computes: {name} {tuple(array.shape)}")
            stored.append((name, str(array.dtype)))
        else:
            kept[name] = array
    return kept, Origin(entry.name, tuple(sorted(stored))).spelled_as(names), problems


def restored(
    tensors: Mapping[str, Any], package: Any, entry: Architecture, config: Any, origin: Origin
) -> dict[str, Any]:
    """Puts the copies and buffers back that the file had, and its own names: what `learned` and `spelled` took out.

    A file of another architecture tells nothing.
    """
    if origin.architecture != entry.name:
        return dict(tensors)
    copies = offered(package, "tied", {}, config, entry.name)
    buffers = _buffers(package, entry, config)
    result = dict(tensors)
    for name, dtype in origin.stored:
        make, match = _buffer(buffers, name)
        if name in copies:
            result[name] = tensors[copies[name]]
        elif match is not None:
            result[name] = np.asarray(make(match)).astype(_dtype(dtype), order="C")
    own = dict(origin.names)
    found = {own.get(name, name): tensor for name, tensor in result.items()}
    if len(found) < len(result):
        raise ConversionError(
            "two tensors would have one name: those of the file that the model was read from do not fit"
        )
    return found


def _buffers(package: Any, entry: Architecture, config: Any) -> list[tuple[re.Pattern[str], Any]]:
    given = offered(package, "buffers", {}, config, entry.name)
    return [(re.compile(pattern), make) for pattern, make in given.items()]


def _buffer(buffers: list[tuple[re.Pattern[str], Any]], name: str) -> tuple[Any, re.Match[str] | None]:
    for pattern, make in buffers:
        if match := pattern.fullmatch(name):
            return make, match
    return None, None


def _same_bytes(a: Any, b: Any) -> bool:
    if (tuple(a.shape), a.dtype) != (tuple(b.shape), b.dtype):
        return False
    one, other = (np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(one, other)


def _dtype(name: str) -> np.dtype:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)

    return np.dtype(name)
