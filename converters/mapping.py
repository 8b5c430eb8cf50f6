"""The machinery that every family's table runs on, in both directions.

A table is a sequence of rows `Row(torch, flax, transform)`. Both names are templates: `{i}` stands for a
number (a layer's index) and `{part:query|key|value}` for one of the listed words. What a placeholder matches
on one side is filled in on the other, so that the same rows read `to_flax` and, turned round, `to_torch`.
Where one tensor holds several (fused query, key and value), `flax` is a tuple: the tensor's first axis in PyTorch's
order is cut into that many equal parts, and put together again on the way back.

Importing this needs only numpy. Arrays keep their dtype, and a tensor that goes to Flax and back has the same
bytes.
"""

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from converters import leaves
from converters.errors import ConversionError


class Transform(enum.Enum):
    """How a tensor's axes are ordered: the value is the permutation from PyTorch's layout to Flax's, if they move."""

    IDENTITY = None  # of an empty tuple CPython 3.11.2 makes an object()
    LINEAR = (1, 0)  # torch.nn.Linear (out, in) -> flax.nnx.Linear (in, out)
    CONV = (2, 3, 1, 0)  # torch.nn.Conv2d OIHW -> flax.nnx.Conv HWIO

    def axes(self, *, forward: bool) -> tuple[int, ...]:
        """The permutation to Flax (forward) or back to PyTorch; empty where nothing moves."""
        order = self.value or ()
        return order if forward else tuple(order.index(axis) for axis in range(len(order)))


class Row(NamedTuple):
    """One line of a table: the tensor's two names and how its axes move between them.

    Attributes:
        torch: the name in the file.
        flax: the path in the module; several for the equal parts of a fused tensor.
        transform: how the axes move.
        shapes: the tensor's shape in the file and in the module, where an axis of one is several of the other.
    """

    torch: str
    flax: str | tuple[str, ...]
    transform: Transform = Transform.IDENTITY
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


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
    flat = translate(state_dict, table, forward=True, expect=expect)
    return nest({path: np.asarray(array) for path, array in flat.items()})


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
    flat = translate(arrays, table, forward=False, expect=expect)
    return {name: np.asarray(array, order="C") for name, array in flat.items()}  # scalars stay scalars


def translate(tensors: Mapping[str, Any], table: Table, *, forward: bool, expect: Any = None) -> dict[str, Any]:
    """Renames and reorders flat tensors; nothing is read or copied until a result is asked for.

    Args:
        tensors: arrays or `converters.leaves.Leaf` by PyTorch name (forward) or by Flax path.
        table: the family's rows.
        forward: from PyTorch to Flax.
        expect: as in `to_flax`.

    Returns:
        Views and leaves by Flax path (forward) or by PyTorch name.

    Raises:
        ConversionError: as `to_flax` and `to_torch`.
    """
    found, problems, paths = _translate(tensors, table, forward=forward)
    if expect is not None:
        problems += _compare(paths, expect, table)
    if problems:
        what = "PyTorch tensors to Flax" if forward else "Flax parameters to PyTorch"
        raise ConversionError(f"cannot convert {what}:", problems)
    return found


def layout(source: Any) -> Callable[[str], tuple[str, tuple[int, ...] | None] | None]:
    """Gives, for a Flax path, the tensor's PyTorch name and the permutation of its axes into PyTorch order.

    That is what `tadrop_jax.merge(layout=)` takes, so that groups, rows and random numbers follow the PyTorch tensor
    and a merge gives the same weights before and after conversion.

    Args:
        source: a module of ours, or a family's rows. Names are those of the file that a module was read from.

    Returns:
        A function of a path: (name, order), where order is None if nothing moves; None for a path that no row maps. The
        parts of a fused tensor have no tensor of their own in PyTorch, nor has one that is in another shape there:
        theirs is (path, order), and a merge by rows, groups or random numbers differs from one of the file's tensor.
        `fused` names them.

    Example:
        >>> layout(linear("fc", "fc"))("fc/kernel")
        ('fc.weight', (1, 0))
    """
    table = _rows_of(source)
    rules = _compile(table, forward=False)
    own = dict(getattr(getattr(source, "origin", None), "names", ()))

    def place(path: str) -> tuple[str, tuple[int, ...] | None] | None:
        for rule in rules:
            if match := rule.pattern.fullmatch(path):
                whole = rule.parts == 1 and rule.shapes is None
                name = rule.targets[0].format(**match.groupdict()) if whole else path
                return own.get(name, name), rule.transform.axes(forward=False) or None
        return None

    return place


def places(
    names: Iterable[str], rows: Table, table: Table, own: Mapping[str, str] | None = None
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """As `layout`, for the names of a tree's files: PyTorch's name and the permutation into its order.

    Args:
        names: as in the files.
        rows: between these names and the module's paths.
        table: between PyTorch's names and the module's paths.
        own: for names of the table those in PyTorch's files, where these differ.

    Returns:
        A pair for each name that both tables map one to one.

    Example:
        >>> places(["old/kernel"], [Row("old/kernel", "fc/kernel")], linear("fc", "fc"))
        {'old/kernel': ('fc.weight', (1, 0))}
    """
    rules, place = _compile(rows, forward=True), layout(table)
    found = {}
    for name in names:
        match, rule = next(((m, rule) for rule in rules if (m := rule.pattern.fullmatch(name))), (None, None))
        if match is None or rule is None or len(rule.targets) != 1 or rule.shapes is not None:
            continue
        (target,) = rule.targets
        path = target.format(**match.groupdict())
        given, first = place(path), rule.transform.axes(forward=True)
        if given is not None:
            order = given[1] if not first or given[1] is None else tuple(first[axis] for axis in given[1])
            found[name] = ((own or {}).get(given[0], given[0]), order if given[1] is not None else first or None)
    return found


def fused(source: Any, there: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
    """The tensors that hold several of the module's, or one in another shape: names, and paths, as templates.

    Args:
        source: a module of ours, or a family's rows.
        there: paths of the module's parameters, to leave out what a checkpoint lacks; None takes all rows.

    Returns:
        By the tensor's PyTorch name the paths in the module.

    Example:
        >>> fused([Row("in_proj", ("q", "k", "v")), Row("out", "out")])
        {'in_proj': ('q', 'k', 'v')}
    """
    rows = ((row, (row.flax,) if isinstance(row.flax, str) else row.flax) for row in _rows_of(source))
    found = {row.torch: paths for row, paths in rows if len(paths) > 1 or row.shapes}
    if there is None:
        return found
    held = list(there)
    return {
        name: paths
        for name, paths in found.items()
        if any(_pattern(path).fullmatch(one) for path in paths for one in held)
    }


def _rows_of(source: Any) -> Table:
    if not hasattr(source, "config"):
        return source
    from converters import families

    entry = families.architecture_of(source)
    return families.package_of(entry).table(source.config, entry.name)


def _compare(paths: Mapping[str, tuple[tuple[int, ...], str]], expect: Any, table: Table) -> list[str]:
    """Lines for what differs between the Flax paths found, each (shape, source name), and the model's own."""
    wanted = flatten(expect)
    rules = _compile(table, forward=False)
    problems = []
    for path, want in wanted.items():
        if path not in paths:
            names = (r.targets[0].format(**m.groupdict()) for r in rules if (m := r.pattern.fullmatch(path)))
            problems.append(f"missing: {next(names, '(no row of the table)')} (Flax {path})")
        elif paths[path][0] != want.shape:
            shape, source = paths[path]
            problems.append(f"wrong shape: {source} gives {shape} at {path}, the model has {want.shape}")
    return problems + [
        f"not in the model: {source} (Flax {path})" for path, (_, source) in paths.items() if path not in wanted
    ]


class _Rule(NamedTuple):
    """A row in one direction: a source name's pattern, and the formats of what it gives.

    Backwards, a fused tensor has a rule for each of its parts. `shapes` are those of the source and of the target.
    """

    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    transform: Transform
    part: int = 0
    parts: int = 1
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def _translate(
    tensors: Mapping[str, Any], table: Table, *, forward: bool
) -> tuple[dict[str, Any], list[str], dict[str, tuple[tuple[int, ...], str]]]:
    """Target name -> array; a line for each failure; Flax path -> (shape there, source name) of what was mapped."""
    rules = _compile(table, forward=forward)
    parts: dict[str, list[tuple[Any, str] | None]] = {}
    paths: dict[str, tuple[tuple[int, ...], str]] = {}
    problems = []
    for source, array in tensors.items():
        match, rule = next(((m, rule) for rule in rules if (m := rule.pattern.fullmatch(source))), (None, None))
        if match is None or rule is None:
            problems.append(f"unmapped: {source} {tuple(array.shape)}")
            continue
        if told := _misfit(source, array, rule):
            problems.append(told)
            continue
        pieces = leaves.split(array, len(rule.targets)) if len(rule.targets) > 1 else [array]
        for template, piece in zip(rule.targets, pieces, strict=True):
            target = template.format(**match.groupdict())
            moved = _permute(piece, rule.transform.axes(forward=forward))
            moved = moved if rule.shapes is None else moved.reshape(rule.shapes[1])
            held = parts.setdefault(target, [None] * rule.parts)
            other = held[rule.part]
            if other is not None:
                problems.append(f"mapped twice: {source} and {other[1]} both give {target}")
                continue
            held[rule.part] = (moved, source)
            paths[target if forward else source] = (tuple(moved.shape if forward else array.shape), source)
    found = {}
    for target, held in parts.items():
        there = [part for part in held if part is not None]
        alike = len({(tuple(array.shape), str(array.dtype)) for array, _ in there}) == 1
        if len(there) < len(held):
            problems.append(f"missing: {len(held) - len(there)} of the {len(held)} parts of {target}")
        elif not alike:
            shapes = ", ".join(f"{source} {tuple(array.shape)} {array.dtype}" for array, source in there)
            problems.append(f"wrong shape: the parts of {target} are not alike: {shapes}")
        else:
            found[target] = there[0][0] if len(there) == 1 else leaves.join([array for array, _ in there])
    return found, problems, paths


def _misfit(source: str, array: Any, rule: _Rule) -> str | None:
    """A line that tells why a rule cannot take an array."""
    axes, shape, count = len(rule.transform.axes(forward=True)), tuple(array.shape), len(rule.targets)
    if axes and len(shape) != axes:
        return f"wrong shape: {source} {shape}, {rule.transform.name} needs {axes} axes"
    if rule.shapes is not None and shape != rule.shapes[0]:
        return f"wrong shape: {source} {shape}, the model has {rule.shapes[0]}"
    if count > 1 and (not shape or shape[0] % count):
        return f"wrong shape: {source} {shape}, its first axis must hold {count} equal parts"
    return None


def _permute(array: Any, axes: Sequence[int]) -> Any:
    return array.transpose(axes) if len(axes) else array


def _compile(table: Table, *, forward: bool) -> list[_Rule]:
    rules = []
    for row in table:
        paths = (row.flax,) if isinstance(row.flax, str) else row.flax
        if forward:
            targets = tuple(_format(path) for path in paths)
            rules.append(_Rule(_pattern(row.torch), targets, row.transform, shapes=row.shapes))
        else:
            back = (_format(row.torch),)
            shapes = None if row.shapes is None else (row.shapes[1], row.shapes[0])
            rules += [
                _Rule(_pattern(path), back, row.transform, part, len(paths), shapes) for part, path in enumerate(paths)
            ]
    return rules


def _pattern(template: str) -> re.Pattern[str]:
    pieces, end = [], 0
    for match in _PLACEHOLDER.finditer(template):
        pieces.append(re.escape(template[end : match.start()]))
        pieces.append(f"(?P<{match[1]}>{match[2] or '[0-9]+'})")
        end = match.end()
    return re.compile("".join(pieces) + re.escape(template[end:]))


def _format(template: str) -> str:
    return _PLACEHOLDER.sub(r"{\1}", template)


def nest(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """Makes a tree of '/'-joined names: `flatten` backwards. Numbers become integer keys."""
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
