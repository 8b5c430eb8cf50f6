"""Opening the models of a merge: whatever their formats, with the base's names and axes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from tadrop_jax.checkpoints.safetensors import Source, open_source
from tadrop_jax.errors import CheckpointError, checkpoint_errors


def open_models(stack: contextlib.ExitStack, paths: Sequence[Path]) -> list[Source]:
    """Opens base and models.

    A model that is a Flax tree where the base is of PyTorch, or the other way round, or whose tensors have names of
    another version or layout, is renamed and turned into the base's layout if the converters know its architecture.

    Args:
        stack: closes what was opened.
        paths: the base, then the models: a file or a directory each.

    Returns:
        A source each; those of the models have the names of the base's layout.

    Raises:
        CheckpointError: if one cannot be read, or cannot be brought into the base's layout.
    """
    sources = [stack.enter_context(open_model(path)) for path in paths]
    base = sources[0]
    at = [k for k, source in enumerate(sources) if k and _differs(source, base)]
    if not at:
        return sources
    with checkpoint_errors():
        from converters.loading import open_all

        opened = dict(zip((0, *at), open_all([paths[k] for k in (0, *at)]), strict=True))
        for k in at:
            sources[k] = stack.enter_context(_in_layout_of(opened[k], opened[0]))
    return sources


def pytorch_places(source: Source) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Where the tensors of a Flax tree lie in PyTorch: names there, and permutations of axes (None: as they are).

    Groups, rows and random numbers go by these, so that a merge gives the same weights before and after conversion.

    Returns:
        A pair for each tensor that is one tensor in PyTorch; empty for PyTorch's own files, and for a tree that the
        converters do not know.
    """
    if not any("/" in name for name in source.tensors):
        return {}
    from converters.errors import ConversionError
    from converters.loading import open_model as known
    from converters.mapping import places

    try:
        base = known(source.path)
    except ConversionError:
        return {}
    table = base.package.table(base.config, base.entry.name)
    return places(source.tensors, base.rows, table, dict(base.origin.names))


def open_model(path: Path) -> Source:
    """Opens a checkpoint of any format.

    Raises:
        CheckpointError: if it cannot be read, or is a pickle that holds code.
    """
    from converters.files import open_tensors
    from tadrop_jax.checkpoints.leaves import LeafSource

    try:
        with checkpoint_errors():
            stored = open_tensors(path)
        return open_source(path) if stored.format == "safetensors" else LeafSource(stored)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _differs(source: Source, base: Source) -> bool:
    """Whether names are of another layout: a tree's against a module's, or hardly any in common."""
    trees = [any("/" in name for name in s.tensors) for s in (source, base)]
    common = len(source.tensors.keys() & base.tensors.keys())
    return trees[0] != trees[1] or 2 * common < min(len(source.tensors), len(base.tensors))


def _in_layout_of(model, base) -> Source:
    from converters.saving import in_layout_of
    from tadrop_jax.checkpoints.leaves import LeafSource

    return LeafSource(model.stored, in_layout_of(model, base))
