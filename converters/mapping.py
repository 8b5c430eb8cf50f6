"""The machinery that every family's table runs on, in both directions.

A table is a sequence of rows `Row(torch, flax, transform)`. Both names are templates: `{i}` stands for a
number (a layer's index) and `{part:query|key|value}` for one of the listed words. What a placeholder matches
on one side is filled in on the other, so that the same rows read `to_flax` and, turned round, `to_torch`.

Importing this needs only numpy. Arrays keep their dtype, and a tensor that goes to Flax and back has the same
bytes.
"""

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from converters.errors import ConversionError


class Transform(enum.Enum):
    """How a tensor's axes are ordered: the value is the permutation from PyTorch's layout to Flax's."""

    IDENTITY = ()
    LINEAR = (1, 0)  # torch.nn.Linear (out, in) -> flax.nnx.Linear (in, out)
    CONV = (2, 3, 1, 0)  # torch.nn.Conv2d OIHW -> flax.nnx.Conv HWIO

    def axes(self, *, forward: bool) -> tuple[int, ...]:
        """The permutation to Flax (forward) or back to PyTorch; empty where nothing moves."""
        order = self.value
        return order if forward else tuple(order.index(axis) for axis in range(len(order)))


class Row(NamedTuple):
    """One line of a table: the tensor's two names and how its axes move between them."""

    torch: str
    flax: str
    transform: Transform = Transform.IDENTITY


Table = Sequence[Row]

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def linear(torch: str, flax: str) -> list[Row]:
    """Rows of a fully connected layer: a transposed kernel and a bias."""
    return [Row(f"{torch}.weight", f"{flax}/kernel", Transform.LINEAR), Row(f"{torch}.bias", f"{flax}/bias")]


def conv(torch: str, flax: str) -> list[Row]:
    """Rows of a two-dimensional convolution: an OIHW <-> HWIO kernel and a bias."""
    return [Row(f"{torch}.weight", f"{flax}/kernel", Transform.CONV), Row(f"{torch}.bias", f"{flax}/bias")]


def norm(torch: str, flax: str) -> list[Row]:
    """Rows of a normalisation layer: scale and bias."""
    return [Row(f"{torch}.weight", f"{flax}/scale"), Row(f"{torch}.bias", f"{flax}/bias")]


def flatten(tree: Any) -> dict[str, Any]:
    """Names a tree's leaves by their '/'-joined paths, the names that a table's `flax` column matches.

    Takes nested mappings, `nnx.State`, `nnx.Module` and Linen variables alike: the `value` step that NNX adds
    to a path and Linen's `params` are left out.
    """
    import jax

    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").replace(".", "/").strip("/")
        flat[name.removesuffix("/value").removeprefix("params/")] = leaf
    return flat


def to_flax(state_dict: Mapping[str, np.ndarray], table: Table, *, expect: Any = None) -> dict[Any, Any]:
    """Turns PyTorch-named tensors into a Flax tree.

    Args:
        state_dict: tensors by PyTorch name.
        table: the family's rows.
        expect: a tree of arrays or `jax.ShapeDtypeStruct` that the Flax side must agree with, tensor for
            tensor and shape for shape; None takes whatever the table maps.

    Returns:
        Nested dictionaries of numpy arrays in the input's dtypes. Numbers in paths are integer keys, as in
        `nnx.to_pure_dict`.

    Raises:
        ConversionError: names every tensor that no row maps, that is missing, or that has the wrong shape.

    Example:
        >>> to_flax({"fc.weight": np.zeros((3, 2))}, linear("fc", "fc"))["fc"]["kernel"].shape
        (2, 3)
    """
    flat, problems = _translate(state_dict, table, forward=True)
    if expect is not None:
        paths = {path: (array.shape, source) for path, (array, source) in flat.items()}
        problems += _compare(paths, expect, table)
    if problems:
        raise ConversionError("cannot convert PyTorch tensors to Flax:", problems)
    return _nest({path: array for path, (array, _) in flat.items()})


def to_torch(tree: Any, table: Table, *, expect: Any = None) -> dict[str, np.ndarray]:
    """Turns a Flax tree into PyTorch-named tensors: `to_flax` backwards, from the same table.

    Args:
        tree: nested dictionaries, `nnx.State`, `nnx.Module` or Linen variables.
        table: the family's rows.
        expect: as in `to_flax`.

    Returns:
        C-contiguous numpy arrays by PyTorch name, in the tree's dtypes.

    Raises:
        ConversionError: names every parameter that no row maps, that is missing, or that has the wrong shape.

    Example:
        >>> to_torch({"fc": {"kernel": np.zeros((2, 3))}}, linear("fc", "fc"))["fc.weight"].shape
        (3, 2)
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    flat, problems = _translate(arrays, table, forward=False)
    if expect is not None:
        mapped = {source for _, source in flat.values()}
        paths = {path: (array.shape, path) for path, array in arrays.items() if path in mapped}
        problems += _compare(paths, expect, table)
    if problems:
        raise ConversionError("cannot convert Flax parameters to PyTorch:", problems)
    return {name: np.ascontiguousarray(array) for name, (array, _) in flat.items()}


def layout(table: Table) -> Callable[[str], tuple[int, ...] | None]:
    """Gives, for a Flax path, the permutation of its axes into PyTorch order, or None where nothing moves.

    Example:
        >>> layout(linear("fc", "fc"))("fc/kernel")
        (1, 0)
    """
    rules = _compile(table, forward=False)

    def permutation(path: str) -> tuple[int, ...] | None:
        for pattern, _, transform in rules:
            if pattern.fullmatch(path):
                return transform.axes(forward=False) or None
        return None

    return permutation


def _compare(paths: Mapping[str, tuple[tuple[int, ...], str]], expect: Any, table: Table) -> list[str]:
    """Lines for what differs between the Flax paths found, each (shape, source name), and the model's own."""
    wanted = flatten(expect)
    names = {path: name for name, (_, path) in _translate(wanted, table, forward=False)[0].items()}
    problems = []
    for path, want in wanted.items():
        if path not in paths:
            problems.append(f"missing: {names.get(path, '(no row of the table)')} (Flax {path})")
        elif paths[path][0] != want.shape:
            shape, source = paths[path]
            problems.append(f"wrong shape: {source} gives {shape} at {path}, the model has {want.shape}")
    return problems + [
        f"not in the model: {source} (Flax {path})" for path, (_, source) in paths.items() if path not in wanted
    ]


def _translate(
    tensors: Mapping[str, Any], table: Table, *, forward: bool
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Renames and reorders; returns target name -> (array, source name), and a line for each failure."""
    rules = _compile(table, forward=forward)
    found: dict[str, tuple[Any, str]] = {}
    problems = []
    for source, array in tensors.items():
        match, fill, transform = next(
            ((m, fill, t) for pattern, fill, t in rules if (m := pattern.fullmatch(source))), (None, "", None)
        )
        if match is None or transform is None:
            problems.append(f"unmapped: {source} {tuple(array.shape)}")
            continue
        target = fill.format(**match.groupdict())
        if target in found:
            problems.append(f"mapped twice: {source} and {found[target][1]} both give {target}")
        elif transform.value and len(array.shape) != len(transform.value):
            needs = f"{transform.name} needs {len(transform.value)} axes"
            problems.append(f"wrong shape: {source} {tuple(array.shape)}, {needs}")
        else:
            found[target] = (_permute(array, transform.axes(forward=forward)), source)
    return found, problems


def _permute(array: Any, axes: Sequence[int]) -> Any:
    # Abstract arrays (a model's expected shapes) have no transpose; only their names matter here.
    return array.transpose(axes) if len(axes) and hasattr(array, "transpose") else array


def _compile(table: Table, *, forward: bool) -> list[tuple[re.Pattern[str], str, Transform]]:
    """Turns each row into (pattern of the source name, format of the target name, transform)."""
    return [
        (
            _pattern(row.torch if forward else row.flax),
            _format(row.flax if forward else row.torch),
            row.transform,
        )
        for row in table
    ]


def _pattern(template: str) -> re.Pattern[str]:
    pieces, end = [], 0
    for match in _PLACEHOLDER.finditer(template):
        pieces.append(re.escape(template[end : match.start()]))
        pieces.append(f"(?P<{match[1]}>{match[2] or '[0-9]+'})")
        end = match.end()
    return re.compile("".join(pieces) + re.escape(template[end:]))


def _format(template: str) -> str:
    return _PLACEHOLDER.sub(r"{\1}", template)


def _nest(flat: Mapping[str, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, last = _keys(path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _keys(parts: Iterable[str]) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in parts]
