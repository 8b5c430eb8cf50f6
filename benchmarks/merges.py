"""One merge of directories on disk, by us, by mergekit, and the floor: what the benchmarks of streamed merges share."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import measure
from tadrop_jax import registry
from tadrop_jax.checkpoints.safetensors import open_source
from tadrop_jax.workers import cores

BLOCK = 1 << 20
# What a method is run with where it has the parameter; everything else keeps its default.
VALUES = {"density": 0.2}
# mergekit's name of a rule, what a recipe gives each model, and what it gives the merge.
_WEIGHED: dict[str, Any] = {"weight": 1.0}
_TRIMMED = {"weight": 1.0, "density": VALUES["density"]}
PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "average": ("linear", _WEIGHED, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}, {}),
    "ties": ("ties", _TRIMMED, {}),
    "dare_linear": ("dare_linear", _TRIMMED, {}),
    "dare_ties": ("dare_ties", _TRIMMED, {}),
    "breadcrumbs_merging": ("breadcrumbs", _TRIMMED | {"gamma": 0.006}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", _TRIMMED | {"gamma": 0.01}, {}),
    "della_merging": ("della", _TRIMMED | {"epsilon": 0.05}, {}),
    "della_linear": ("della_linear", _TRIMMED | {"epsilon": 0.15}, {}),
    "sce": ("sce", {}, {"select_topk": VALUES["density"]}),
    "multislerp": ("multislerp", _WEIGHED, {}),
    "karcher": ("karcher", {}, {}),
    "model_stock": ("model_stock", {}, {}),
    "nuslerp": ("nuslerp", _WEIGHED, {}),
    "slerp": ("slerp", {}, {"t": 0.5}),
    "nearswap": ("nearswap", {}, {"t": 1e-4}),
    "arcee_fusion": ("arcee_fusion", {}, {}),
    "ram": ("ram", {}, {}),
}


def rules(models: int) -> list[str]:
    """Every merge rule of the registry that files and options can run on so many models."""
    return [
        m.name
        for m in registry.METHODS.values()
        if m.role == "rule" and not m.from_python and m.models[0] <= models <= (m.models[1] or models)
    ]


def floor(inputs: Sequence[Path], out: Path) -> measure.Measurement:
    """Reads every entry of every input once and writes one model's bytes: what no merge can be faster than.

    Args:
        inputs: directories of equal structure, the base first.
        out: file to write; not synced to the disk, and removed.

    Returns:
        The measurement; memory is not measured.
    """
    threads = cores()
    sources = [open_source(path) for path in inputs]
    tensors, places, end = sources[0].tensors.values(), {}, 0
    for info in tensors:
        places[info.name], end = end, end + info.nbytes
    blocks = [(info, at) for info in tensors for at in range(0, info.size, BLOCK)]
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def work(thread: int) -> None:
        buffers = {info.dtype: np.empty(BLOCK, info.dtype) for info in tensors}
        for info, at in blocks[thread::threads]:
            for source in sources:
                block = source.read(info.name, at, min(at + BLOCK, info.size), buffers[info.dtype])
            os.pwrite(fd, block.view(np.uint8).data, places[info.name] + at * info.dtype.itemsize)

    def everything() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        os.close(fd)

    taken = measure.timed(everything)
    for source in sources:
        source.close()
    remove(out)
    return taken


def parts(method: str) -> tuple[str, str, str]:
    """Rule, flavour and sparsifier of ``METHOD@FLAVOUR+SPARSIFIER``: a preset, and what goes before; "" for none."""
    named, _, sparsifier = method.partition("+")
    rule, _, flavour = named.partition("@")
    return rule, flavour, sparsifier


def parameters(method: str) -> dict[str, Any]:
    """What the rule of a method is run with; a sparsifier takes the place of its own trimming."""
    rule, flavour, sparsifier = parts(method)
    known = {parameter.name for parameter in registry.method(rule, "rule").parameters}
    values = {name: None if sparsifier else value for name, value in VALUES.items() if name in known}
    return values | ({"flavour": flavour} if flavour else {})


def options(method: str) -> list[str]:
    """Options of `tadrop merge` for a method; see `parts`."""
    rule, _, sparsifier = parts(method)
    # Without a value for its density, the rule's own trimming is off as soon as there is a sparsifier.
    given = [w for n, v in parameters(method).items() if v is not None for w in ("--set", f"{n}={v}")]
    return ["--method", rule, *given, *(["--sparsify", sparsifier] if sparsifier else [])]


def ours(
    method: str, inputs: Sequence[Path], scratch: Path, limit_s: float | None = None, more: Sequence[str] = ()
) -> measure.Measurement:
    """One run of `tadrop merge`.

    Args:
        method: see `parts`.
        inputs: the base and its fine-tunes.
        scratch: where to write.
        limit_s: seconds after which it is stopped.
        more: further options.
    """
    base, *models = map(str, inputs)
    command = [sys.executable, "-m", "tadrop_jax.cli", "merge", "--base", base, "--models", *models]
    command += [*options(method), *more, "--out", str(scratch / "ours")]
    try:
        return measure.run(command, {}, scratch / "ours.log", limit_s)
    finally:
        remove(scratch / "ours", scratch / "ours.partial")


def peer(
    method: str, inputs: Sequence[Path], scratch: Path, dtype: str, limit_s: float | None = None
) -> measure.Measurement:
    """One run of mergekit on its recipe for the same."""
    recipe = peer_recipe(method, inputs, dtype)
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [str(peer_program()), str(scratch / "recipe.yaml"), str(scratch / "peer"), "--no-write-model-card"]
    try:
        taken = measure.run(command, {"HF_HUB_OFFLINE": "1"}, scratch / "peer.log", limit_s)
        wanted, written = size_bytes(inputs[0]), size_bytes(scratch / "peer")
        if written < 0.9 * wanted:
            raise RuntimeError(f"{command[0]} ended\nwrote {written:,} bytes, a model has {wanted:,}")
        return taken
    finally:
        remove(scratch / "peer")


def add_peer_options(parser: argparse.ArgumentParser, limit_s: int = 3600) -> None:
    """Options of benchmarks that set mergekit beside ours; a run is stopped after ``limit_s`` seconds."""
    parser.add_argument("--peer", action="store_true", help="measure mergekit as well, on methods that both have")
    parser.add_argument("--peer-rounds", type=int, default=1, help="runs of mergekit; each takes minutes (1)")
    parser.add_argument(
        "--limit", type=float, default=limit_s, help=f"seconds after which a run is stopped ({limit_s})"
    )


def check_peer(options: argparse.Namespace) -> None:
    """Ends the program if mergekit is asked for and is not there."""
    if options.peer and not peer_program().exists():
        raise SystemExit(f"{peer_program()} does not exist; --peer needs mergekit in this environment.")


def beside_peer(
    method: str, inputs: Sequence[Path], scratch: Path, dtype: str, ours: list[measure.Measurement] | None, options
) -> dict[str, Any]:
    """What a row says of mergekit: nothing where it is not asked for, or lacks the method; a note where it fails.

    Args:
        method: see `parts`.
        inputs: the base and its fine-tunes.
        scratch: where to write.
        dtype: of the result.
        ours: our runs.
        options: those of `add_peer_options`.
    """
    runs, note = [], ""
    if options.peer and ours and parts(method)[0] in PEERS and not parts(method)[2]:
        turns = {"mergekit": lambda: peer(method, inputs, scratch, dtype, options.limit)}
        try:
            runs = measure.in_turns(turns, options.peer_rounds)["mergekit"]
        except RuntimeError as error:
            note = f"mergekit: {last_line(error)}"
    return {
        "mergekit / ours": measure.ratio(runs, ours),
        "mergekit_s": measure.fastest(runs),
        "mergekit_mb": measure.memory(runs),
        "note": note,
    }


def last_line(error: RuntimeError) -> str:
    """The last thing that a program said that was run and failed."""
    command, *said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1] if said else "ended" + command.rpartition(" ended")[2].rstrip(":")


def peer_recipe(method: str, inputs: Sequence[Path], dtype: str) -> dict[str, Any]:
    """mergekit's recipe for a rule of ours."""
    theirs, each, whole = PEERS[parts(method)[0]]
    models = [{"model": str(model), **({"parameters": each} if each else {})} for model in inputs[1:]]
    if theirs in ("slerp", "linear", "karcher"):  # to them the base is a model like the others
        models = [{**models[0], "model": str(inputs[0])}, *models]
    recipe = {"merge_method": theirs, "models": models, "dtype": dtype, "parameters": whole}
    if theirs not in ("linear", "karcher"):
        recipe["base_model"] = str(inputs[0])
    return recipe


def peer_program() -> Path:
    """The command of mergekit in this environment, which may not exist."""
    return Path(sys.executable).with_name("mergekit-yaml")


def size_bytes(path: Path) -> int:
    """Bytes of a directory's files."""
    return sum(file.stat().st_size for file in path.iterdir())


def remove(*paths: Path) -> None:
    """Deletes files and directories that exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
