"""The command line: ``tadrop merge``, ``inspect``, ``task``, ``convert``, ``methods`` and ``demo``.

jax, rich and yaml are imported inside the commands, so that ``tadrop --help`` answers at once.
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tadrop_jax import console, processors, registry, writing
from tadrop_jax.arguments import parser_of
from tadrop_jax.errors import (
    ContentError,
    DtypeError,
    MergeError,
    MismatchError,
    RowsError,
    check_installed,
    checkpoint_errors,
)

_PICTURES = (".png", ".svg", ".pdf")
_FILES = (".bin", ".ckpt", ".msgpack", ".npz", ".pkl", ".pt", ".pth")  # names that a directory would not have
_EXCLUDE = " (--exclude REGEX takes such tensors from the base, for instance heads of different tasks"
_OWN = "; with a method that gives one model per task --differing own lets them stay each task's own"
_OVERLAP = (
    "; with one that gives one model --differing overlap merges the rows that all have, as of vocabularies that grew"
)
_ADVICE = {
    ("merge", ContentError): " (--allow-nonfinite lets it pass)",
    ("merge", MismatchError): f"{_EXCLUDE}{_OWN})",
    ("merge", RowsError): f"{_EXCLUDE}{_OWN}{_OVERLAP})",
    ("merge", DtypeError): " (bring all models to one dtype first, for instance with transformers: "
    "model.to(dtype).save_pretrained(DIR); --dtype is that of the result)",
    ("inspect", MismatchError): f"{_EXCLUDE})",
    ("inspect", RowsError): f"{_EXCLUDE})",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments without the program's name; None takes them from the command line.

    Returns:
      0 if it is done; 2 if the request or its inputs are wrong (then nothing was written); 1 if it failed midway, or
      what it has to say cannot be written to the standard output.
    """
    return writing.speaking(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> int:
    """Runs a command. What it says of a file that cannot be read or written has its name; other errors are raised."""
    parser = parser_of(_COMMANDS)
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except MergeError as error:
        print(f"tadrop {options.command}: {error}{_ADVICE.get((options.command, type(error)), '')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tadrop {options.command}: interrupted", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"tadrop {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _merge(options) -> int:
    from tadrop_jax import recipe as recipes

    told: list[str] = []
    described = _recipe(options, told.append)
    process, processes = options.process, options.processes
    if (process is None) != (processes is None) or (processes is not None and not 0 <= process < processes):
        raise MergeError("--process I and --processes N go together, and I is 0 to N - 1")
    # Of several processes others may have begun, or be done.
    out = _checked_out(options.out, options.resume, alone=processes in (None, 1))
    left = out.with_name(out.name + ".partial")
    if (left / "journal.jsonl").exists() and not options.resume and processes in (None, 1):
        told.append(f"{left}: the work of an interrupted merge is begun anew; --resume would have gone on with it")
    size = console.shard_size(options.max_shard_size, out)
    if options.workers is not None and options.workers < 1:
        raise MergeError(f"--workers must be at least 1, got {options.workers}")
    _start_jax()
    from tadrop_jax.directories import DTYPES, MergeFailed, Request, merge_directories
    from tadrop_jax.processes import of_another_merge

    chain = recipes.chain_of(described)
    _share_cores(chain, len(described["models"]))
    for line in told if not options.quiet else []:
        print(line, file=sys.stderr)
    request = Request(
        base=Path(described["base"]),
        models=tuple(Path(m) for m in described["models"]),
        out=out,
        chain=chain,
        recipe=described,
        include=tuple(described["include"]),
        exclude=tuple(described["exclude"]),
        differing=described["differing"],
        seed=described["seed"],
        dtype=None if described["dtype"] is None else DTYPES[described["dtype"]],
        max_shard_size=size,
        resume=options.resume,
        check_finite=not options.allow_nonfinite,
        digests=options.digests,
        workers=options.workers,
        process=process or 0,
        processes=processes or 1,
    )
    began = time.perf_counter()
    try:
        with console.Progress(options.quiet, "merging") as progress:
            report = merge_directories(request, progress)
    except (MergeFailed, KeyboardInterrupt) as error:
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"tadrop merge: {said}", file=sys.stderr)
        if Path(f"{out}.partial").exists():
            print(f"The work so far is in {out}.partial; the same command with --resume goes on.", file=sys.stderr)
        return 1
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    for share in of_another_merge(request, report["fingerprint"]) if not out.exists() else []:
        print(f"warning: {share}: is of another merge; process {share.name} has to run again", file=sys.stderr)
    if not options.quiet:
        console.print_summary(report, out, time.perf_counter() - began)
        if not out.exists():
            print(f"process {process} of {processes} is done; {out} appears with the last one")
    return 0


def _inspect(options) -> int:
    name, values = registry.parse_step(options.sparsify)
    piped = options.json == Path("-")
    for file in (options.plot, options.json):
        if file is not None and not file.resolve().parent.is_dir():
            raise MergeError(f"{file}: its parent directory does not exist")
        if file is not None and file.is_dir():
            raise MergeError(f"{file}: is a directory, not a file to write")
    if options.plot is not None and options.plot.suffix not in _PICTURES:
        raise MergeError(f"--plot writes a picture, {' or '.join(_PICTURES)}, got {str(options.plot)!r}")
    if options.plot is not None:
        check_installed("matplotlib", "plots")
    _start_jax()
    from tadrop_jax.directories import Request, inspect_directories
    from tadrop_jax.planning import task_names

    models = tuple(Path(m) for m in options.models)
    chain = registry.build(name, values, "sparsifier")
    _share_cores(chain, len(models))
    request = Request(
        base=Path(options.base),
        models=models,
        out=Path(),
        chain=chain,
        recipe={},
        include=tuple(options.include or ()),
        exclude=tuple(options.exclude or ()),
        seed=options.seed,
    )
    with console.Progress(options.quiet, "reading") as progress:
        rows = inspect_directories(request, progress)
    tasks = task_names(models)
    if options.json is not None:
        told = {n: {k: list(v) if k == "shape" else v.tolist() for k, v in row.items()} for n, row in rows.items()}
        text = json.dumps({"tasks": tasks, "tensors": told}, indent=1)
        if piped:
            print(text)
        else:
            with writing.asked_for(options.json):
                options.json.write_text(text)
    if options.plot is not None:
        from tadrop_jax.plots import draw_inspection

        with writing.asked_for(options.plot):
            draw_inspection(rows, tasks, options.plot)
    if not options.quiet and not piped:
        console.print_inspection(rows, tasks, options.sparsify)
    return 0


def _recipe(options, tell) -> dict:
    from tadrop_jax import recipe as recipes

    if options.recipe is not None:
        given = [
            f"--{n}" for n in ("base", "models", "method", "density", "coefficient", "sparsify") if getattr(options, n)
        ]
        given += ["--set"] * bool(options.set)
        if given:
            at = f"{str(options.recipe)!r} is taken for a recipe, which says what to merge"
            raise MergeError(f"{at}: leave it out, or {', '.join(given)}")
        if options.recipe.is_dir():
            told = f"{str(options.recipe)!r} is taken for a recipe, a file, and is a directory"
            raise MergeError(f"{told}: --base DIR and --models DIR ... name checkpoints")
        described = recipes.load(options.recipe, tell)
        for field in ("include", "exclude", "differing", "seed", "dtype"):
            value = getattr(options, field)
            described[field] = described[field] if value is None else value
    else:
        missing = [f"--{n}" for n in ("base", "models", "method") if not getattr(options, n)]
        if missing:
            raise MergeError(f"{', '.join(missing)} must be given (or a recipe file)")
        rule = registry.method(options.method, "rule")
        texts = list(options.set)
        for field in ("density", "coefficient"):
            if getattr(options, field) is not None:
                if any(text.partition("=")[0] == field for text in texts):
                    raise MergeError(f"{field} is given twice: by --{field} and by --set")
                texts.append(f"{field}={getattr(options, field)}")
        described = recipes.normal(
            {
                "base": options.base,
                "models": options.models,
                "method": rule.name,
                "parameters": registry.parse(rule, texts),
                "sparsify": options.sparsify,
                "include": options.include,
                "exclude": options.exclude,
                "differing": options.differing or "refuse",
                "seed": options.seed or 0,
                "dtype": options.dtype,
            },
            tell,
        )
    return described


def _task(options) -> int:
    _checked_out(options.out, resume=False)
    _start_jax()
    from tadrop_jax.checkpoints.bundles import write_task
    from tadrop_jax.overflow import Overflow, warnings_of

    shard, overflow = console.shard_size(options.max_shard_size, options.out), Overflow()
    written = write_task(options.bundle, options.task, options.out, shard, overflow.look)
    for line in warnings_of(overflow.rows(), lambda name: written[name].dtype):
        print(f"warning: {line}", file=sys.stderr)
    size = sum(info.nbytes for info in written.values())
    if not options.quiet:
        print(f"{options.out}: the model of task {options.task!r}, {console.size(size)}")
    return 0


def _convert(options) -> int:
    _checked_out(options.out, resume=False, single=False)
    size = console.shard_size(
        options.max_shard_size, options.out, options.format or ("orbax" if options.to == "flax" else "safetensors")
    )
    _start_jax()
    import converters
    from tadrop_jax.checkpoints import bundles

    bundles.refuse(options.source)
    try:
        with checkpoint_errors():
            config = None if options.config is None else converters.read_config(options.config)
            opened = converters.convert(
                options.source,
                options.out,
                to=options.to,
                format=options.format,
                architecture=options.architecture,
                config=config,
                max_shard_size=size,
            )
    except OSError as error:
        print(f"tadrop convert: {options.out}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    if not options.quiet:
        console.print_conversion(opened, options.out, options.to)
    return 0


def _methods(options) -> int:
    console.print_methods(options.name)
    return 0


def _demo(options) -> int:
    from tadrop_jax import demo

    demo.run(options.out)
    return 0


_COMMANDS = {
    "merge": _merge,
    "inspect": _inspect,
    "task": _task,
    "convert": _convert,
    "methods": _methods,
    "demo": _demo,
}


def _allow_many_files() -> None:
    """Lets as many files be open as the system lets a process ask for: all shards of all models are."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _start_jax() -> None:
    """Sets jax up for files: on the CPU, with compiled functions kept from one run to the next."""
    _allow_many_files()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    processors.prefer_avx2()
    # What an import brings stays: to look through it for garbage takes a tenth of the start-up.
    gc.disable()
    import jax

    gc.freeze()
    gc.enable()

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tadrop_jax" / "compiled"
        with contextlib.suppress(OSError):  # without a place to write to, each run compiles anew
            cache.mkdir(parents=True, exist_ok=True)
            if os.access(cache, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # A merge takes dozens of functions, most of them small: compiled anew, they are half of the start-up.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _share_cores(chain, tasks: int) -> None:
    """Leaves the cores to the threads that each compute on blocks, unless whole tensors want several at a time.

    Raises:
      MergeError: if the chain is not for so many tasks.
    """
    from tadrop_jax.steps import expand

    if all(step.piece != "tensor" for step in expand(chain, tasks)):
        processors.compute_in_calling_threads()


def _checked_out(out: Path, resume: bool, alone: bool = True, single: bool = True) -> Path:
    """Refuses an output that is there already, or is to be a file of a kind not written, before anything is read."""
    if out.suffix in _FILES or (out.suffix == ".safetensors" and not single):
        what = "a directory, or one .safetensors file" if single else "a directory"
        raise MergeError(f"{out}: what is written is {what}, and no {out.suffix} file")
    # The unfinished work lies beside what a link leads to.
    out = out.resolve() if out.name in ("", "..") or out.is_symlink() else out
    if alone and out.exists() and (out.is_file() or any(out.iterdir())):
        raise MergeError(f"{out}: exists already{'' if out.is_file() else ' and is not empty'}; nothing is overwritten")
    if not out.resolve().parent.is_dir():
        raise MergeError(f"{out}: its parent directory does not exist")
    if alone and resume and not out.with_name(out.name + ".partial").is_dir():
        raise MergeError(f"{out}.partial: there is nothing to resume")
    return out


if __name__ == "__main__":
    sys.exit(main())
