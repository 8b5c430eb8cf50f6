"""The command line: ``tadrop merge``, ``inspect``, ``task``, ``convert``, ``methods`` and ``demo``.

jax, rich and yaml are imported inside the commands, so that ``tadrop --help`` answers at once.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tadrop_jax import __version__, console, processors, registry, writing
from tadrop_jax.errors import ContentError, DtypeError, MergeError, MismatchError, RowsError, checkpoint_errors

_PICTURES = (".png", ".svg", ".pdf")
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
    parser = _parser()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tadrop",
        description="Merge fine-tuned models into one, without training.",
        epilog="'tadrop COMMAND --help' tells more of a command, 'tadrop methods' lists what can be done.",
    )
    parser.add_argument("--version", action="version", version=f"tadrop {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    merge = commands.add_parser(
        "merge",
        help="merge checkpoints on disk",
        description="Merge fine-tunes of one base (safetensors files or Hugging Face directories; also torch pickles, "
        "Orbax checkpoints, msgpack and npz files) into a directory that transformers opens. Models are read block by "
        "block: they need not fit in memory.",
        epilog="Examples:\n"
        "  tadrop merge --base gpt2 --models cola sst2 mrpc --method ties --density 0.2 --out merged\n"
        "  tadrop merge --base vit --models a b --method emr --sparsify tadrop --set per_task=^classifier --out emr\n"
        "  tadrop merge recipe.yaml --out merged",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument(
        "recipe", nargs="?", type=Path, metavar="RECIPE.yaml", help="recipe file, in place of the options"
    )
    merge.add_argument("--base", metavar="DIR", help="the pretrained model")
    merge.add_argument("--models", nargs="+", metavar="DIR", help="the fine-tuned models")
    merge.add_argument("--method", metavar="NAME", help="merge rule; 'tadrop methods' lists them")
    merge.add_argument("--density", metavar="X", help="share that the rule's own trimming keeps, 0 to 1, or none")
    merge.add_argument("--coefficient", metavar="X", help="multiplies the merged task vector")
    merge.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the rule; may be repeated",
    )
    merge.add_argument(
        "--sparsify",
        metavar="NAME[:P=V,...]",
        help="sparsifier before the rule, e.g. tadrop or tadrop:q_low=.5,q_high=.9",
    )
    merge.add_argument("--include", action="append", metavar="REGEX", help="merge these tensors only; may be repeated")
    merge.add_argument(
        "--exclude", action="append", metavar="REGEX", help="take these tensors from the base; may be repeated"
    )
    merge.add_argument(
        "--differing",
        choices=("refuse", "own", "overlap"),
        help="tensors that a model lacks, or has in another shape: refuse (default), or let them stay each task's own "
        "(methods that give one model per task), or merge the rows that all have (vocabularies that grew)",
    )
    merge.add_argument("--seed", type=int, metavar="N", help="seed of random methods (default 0)")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the result (default: the base's)"
    )
    merge.add_argument("--max-shard-size", metavar="SIZE", help="largest file, e.g. 2GB (default 5GB)")
    merge.add_argument("--resume", action="store_true", help="go on from what an interrupted merge left in DIR.partial")
    merge.add_argument("--allow-nonfinite", action="store_true", help="let NaN and infinity in the inputs pass")
    merge.add_argument(
        "--digests", action="store_true", help="put SHA-256 digests of the inputs into the report (slow)"
    )
    merge.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core)")
    merge.add_argument("--processes", type=int, metavar="N", help="share the work: N processes run this command, each")
    merge.add_argument("--process", type=int, metavar="I", help="with a number of its own, 0 to N - 1")
    merge.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="new directory, or a .safetensors file")
    merge.set_defaults(run=_merge)

    inspect = commands.add_parser(
        "inspect",
        help="tell what a sparsifier would do to each tensor",
        description="Quantile ratio, sparsity, norm and sign conflict of every tensor, as means over the tasks. "
        "Nothing is written but what --plot and --json ask for.",
    )
    inspect.add_argument("--base", required=True, metavar="DIR", help="the pretrained model")
    inspect.add_argument("--models", required=True, nargs="+", metavar="DIR", help="the fine-tuned models")
    inspect.add_argument("--sparsify", default="tadrop", metavar="NAME[:P=V,...]", help="sparsifier (default: tadrop)")
    inspect.add_argument("--include", action="append", metavar="REGEX", help="these tensors only; may be repeated")
    inspect.add_argument("--exclude", action="append", metavar="REGEX", help="not these tensors; may be repeated")
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random methods (default 0)")
    inspect.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios and sparsities (png, pdf or svg)")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, task by task")
    inspect.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    inspect.set_defaults(run=_inspect)

    task = commands.add_parser(
        "task",
        help="take one task's full model out of a bundle",
        description="Rebuild one task's full model from a bundle that 'tadrop merge' wrote by a method with one model "
        f"per task: {', '.join(m.name for m in registry.METHODS.values() if m.output == 'one model per task')}.",
    )
    task.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory of the bundle")
    task.add_argument("--task", required=True, metavar="NAME", help="the task: the name of its model's directory")
    task.add_argument("--max-shard-size", metavar="SIZE", help="largest file, e.g. 2GB (default 5GB)")
    task.add_argument("--quiet", action="store_true", help="no summary")
    task.add_argument("--out", required=True, type=Path, metavar="DIR", help="new directory")
    task.set_defaults(run=_task)

    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between PyTorch and Flax",
        description="Convert a checkpoint of PyTorch or Flax, whatever its format; architecture and format are found "
        "out. One tensor is in memory at a time. config.json, tokenizer and processor files travel along.",
        epilog="Examples:\n"
        "  tadrop convert gpt2 gpt2-flax --to flax\n"
        "  tadrop convert gpt2-flax gpt2-torch --to torch\n"
        "  tadrop convert clip.pt clip --to torch --architecture CLIPModel",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="directory, or a file")
    convert.add_argument("out", type=Path, metavar="DST", help="new directory")
    convert.add_argument("--to", required=True, choices=("flax", "torch"), help="whose names and axes to write")
    convert.add_argument(
        "--format",
        choices=("orbax", "safetensors", "msgpack", "npz"),
        help="of the files (default: orbax for flax, safetensors for torch)",
    )
    convert.add_argument(
        "--architecture", metavar="NAME", help="write the layout of this architecture (default: that of SRC)"
    )
    convert.add_argument("--config", type=Path, metavar="FILE", help="the model's config.json, if SRC has none")
    convert.add_argument("--max-shard-size", metavar="SIZE", help="largest file, e.g. 2GB (default 5GB)")
    convert.add_argument("--quiet", action="store_true", help="no summary")
    convert.set_defaults(run=_convert)

    methods = commands.add_parser("methods", help="list sparsifiers and merge rules, with parameters and sources")
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all of one method")
    methods.set_defaults(run=_methods)

    demo = commands.add_parser("demo", help="the whole story on real data, in minutes")
    demo.add_argument("--out", type=Path, metavar="DIR", help="where to put models, merges and picture")
    demo.set_defaults(run=_demo)
    return parser


def _merge(options) -> int:
    from tadrop_jax import recipe as recipes

    told: list[str] = []
    described = _recipe(options, told.append)
    if options.recipe is None and options.sparsify and options.density is None:
        rule = registry.method(described["method"])
        if any(p.name == "density" for p in rule.parameters) and described["parameters"]["density"] is None:
            told.append(f"{rule.name}: its own trimming is off, since --sparsify is given without --density")
    process, processes = options.process, options.processes
    if (process is None) != (processes is None) or (processes is not None and not 0 <= process < processes):
        raise MergeError("--process I and --processes N go together, and I is 0 to N - 1")
    # Of several processes others may have begun, or be done.
    out = _checked_out(options.out, options.resume, alone=processes in (None, 1))
    left = out.with_name(out.name + ".partial")
    if left.exists() and not options.resume and processes in (None, 1):
        told.append(f"{left}: the work of an interrupted merge is begun anew; --resume would have gone on with it")
    size = console.shard_size(options.max_shard_size, out)
    if options.workers is not None and options.workers < 1:
        raise MergeError(f"--workers must be at least 1, got {options.workers}")
    _start_jax()
    from tadrop_jax.directories import DTYPES, MergeFailed, Request, merge_directories

    chain = recipes.chain_of(described)
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
    if not options.quiet:
        console.print_summary(report, out, time.perf_counter() - began)
        if not out.exists():
            print(f"process {process} of {processes} is done; {out} appears with the last one")
    return 0


def _inspect(options) -> int:
    name, values = registry.parse_step(options.sparsify)
    for file in (options.plot, options.json):
        if file is not None and not file.resolve().parent.is_dir():
            raise MergeError(f"{file}: its parent directory does not exist")
        if file is not None and file.is_dir():
            raise MergeError(f"{file}: is a directory, not a file to write")
    if options.plot is not None and options.plot.suffix not in _PICTURES:
        raise MergeError(f"--plot writes a picture, {' or '.join(_PICTURES)}, got {str(options.plot)!r}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MergeError("--plot needs matplotlib: pip install '.[plots]' in a clone")
    _start_jax()
    from tadrop_jax.directories import Request, inspect_directories
    from tadrop_jax.planning import task_names

    models = tuple(Path(m) for m in options.models)
    request = Request(
        base=Path(options.base),
        models=models,
        out=Path(),
        chain=registry.build(name, values, "sparsifier"),
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
        with writing.asked_for(options.json):
            options.json.write_text(json.dumps({"tasks": tasks, "tensors": told}, indent=1))
    if options.plot is not None:
        from tadrop_jax.plots import draw_inspection

        with writing.asked_for(options.plot):
            draw_inspection(rows, tasks, options.plot)
    if not options.quiet:
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
            }
        )
    return described


def _task(options) -> int:
    _checked_out(options.out, resume=False)
    _start_jax()
    from tadrop_jax.checkpoints.bundles import write_task

    size = write_task(
        options.bundle, options.task, options.out, console.shard_size(options.max_shard_size, options.out)
    )
    if not options.quiet:
        print(f"{options.out}: the model of task {options.task!r}, {console.size(size)}")
    return 0


def _convert(options) -> int:
    _checked_out(options.out, resume=False)
    size = console.shard_size(
        options.max_shard_size, options.out, options.format or ("orbax" if options.to == "flax" else "safetensors")
    )
    _start_jax()
    import converters

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


def _start_jax() -> None:
    """Sets jax up for files: on the CPU, with compiled functions kept from one run to the next."""
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


def _checked_out(out: Path, resume: bool, alone: bool = True) -> Path:
    """Refuses an output that is there already, before anything is read."""
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
