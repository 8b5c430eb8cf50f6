"""Opening the models of a merge: whatever their formats, with the base's names and axes."""

import contextlib
from collections.abc import Sequence, Set
from pathlib import Path

from tadrop_jax.checkpoints.safetensors import Source, open_source
from tadrop_jax.errors import CheckpointError, checkpoint_errors


def open_models(stack: contextlib.ExitStack, paths: Sequence[Path]) -> list[Source]:
    """Opens base and models.

    A model that is a Flax tree where the base is of PyTorch, or the other way round, or whose tensors have names of
    another version or layout, is renamed and turned into the base's layout if the converters know its architecture.
    Names of PyTorch that differ by what stands before them all (`transformer.`, `vit.`), since the base is a bare
    backbone or the models are, need no architecture.

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
    for source in sources[1:]:
        if renamed := _without_prefix(source.tensors.keys(), base.tensors.keys()):
            source.rename(renamed)
    at = [k for k, source in enumerate(sources) if k and _differs(source, base)]
    if not at:
        return sources
    k = at[0]  # the one that does not fit, if one does not
    try:
        with checkpoint_errors():
            from converters.loading import open_all

            opened = dict(zip((0, *at), open_all([paths[k] for k in (0, *at)]), strict=True))
            for k in at:
                sources[k] = stack.enter_context(_in_layout_of(opened[k], opened[0]))
    except CheckpointError as error:
        if all(sources[other].tensors.keys() == base.tensors.keys() for other in at):
            return sources  # of an architecture that is not known: which tensor does not fit is told later
        names = " and ".join(repr(next(iter(source.tensors), "none")) for source in (sources[k], base))
        both = f"{paths[k]}: its tensors have other names or axes than those of {paths[0]}, such as {names}"
        raise CheckpointError(f"{both}, and cannot be brought into one layout: {error}") from error
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
        CheckpointError: if it cannot be read, is a pickle that holds code, or is no model.
    """
    from converters.files import open_tensors
    from tadrop_jax.checkpoints import bundles
    from tadrop_jax.checkpoints.leaves import LeafSource

    try:
        bundles.refuse(path)
        with checkpoint_errors():
            stored = open_tensors(path)
            told = stored.why_no_model
        if told:
            python = ", or merge LoRA adapters from Python (tj.knots, tj.core_space)" * stored.is_adapter
            raise CheckpointError(f"{path}: {told}{python}")
        return open_source(path) if stored.format == "safetensors" else LeafSource(stored)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _without_prefix(names: Set[str], base: Set[str]) -> dict[str, str]:
    """The base's names for tensors that are called the same but for a prefix which one side has and the other lacks."""
    least = min(len(names), len(base)) / 2
    if len(names & base) >= least or any("/" in name for name in names | base):
        return {}
    theirs, ours = ({name.partition(".")[0] + "." for name in side} for side in (names, base))
    ways = [{n: n.removeprefix(prefix) for n in names} for prefix in theirs]
    ways += [{n: prefix + n for n in names} for prefix in ours]
    best = max(({n: to for n, to in way.items() if to in base} for way in ways), key=len)
    return best if len(best) >= least and not names & set(best.values()) else {}


def _differs(source: Source, base: Source) -> bool:
    """Whether names are of another layout: a tree's against a module's, or hardly any in common; or axes are.

    Two trees of one model have the same names, whichever their axes: transformers 4 wrote some kernels turned.
    """
    trees = [any("/" in name for name in s.tensors) for s in (source, base)]
    common = source.tensors.keys() & base.tensors.keys()
    shapes = [(source.tensors[name].shape, base.tensors[name].shape) for name in common]
    turned = all(trees) and any(one != other and sorted(one) == sorted(other) for one, other in shapes)
    return trees[0] != trees[1] or turned or 2 * len(common) < min(len(source.tensors), len(base.tensors))


def _in_layout_of(model, base) -> Source:
    from converters.saving import in_layout_of
    from tadrop_jax.checkpoints.leaves import LeafSource

    return LeafSource(model.stored, in_layout_of(model, base))
