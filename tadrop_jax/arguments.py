"""What the command line takes: its commands, their options, and what ``--help`` says of them."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tadrop_jax import __version__, registry
from tadrop_jax.errors import meant


class _Help(argparse.HelpFormatter):
    """Wraps descriptions to the width of the terminal, and leaves the lines of examples as they are."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith("Examples:") else super()._fill_text(text, width, indent)


class _Command(argparse.ArgumentParser):
    """A command's parser: it refuses what it does not know with its own usage, not with that of ``tadrop``."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else args
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest[0])}")
        return found, rest

    def error(self, message):
        """Where a required option is missing, the one that is misspelt is named beside it."""
        if "are required" in message:
            for given in self._given:
                option = given.partition("=")[0]
                if given.startswith("--") and not any(
                    known.startswith(option) for known in self._option_string_actions
                ):
                    message += f"; unrecognized: {given}{self._meant(given)}"
        super().error(message)

    def _meant(self, given: str) -> str:
        return meant(given.partition("=")[0], self._option_string_actions)


def parser_of(run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
      run: for each command what is done with its options, which are given it as their `run`.
    """
    parser = argparse.ArgumentParser(
        prog="tadrop",
        description="Merge fine-tuned models into one, without training.",
        epilog="'tadrop COMMAND --help' tells more of a command, 'tadrop methods' lists what can be done.",
    )
    parser.add_argument("--version", action="version", version=f"tadrop {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Command)

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
        formatter_class=_Help,
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
    merge.set_defaults(run=run["merge"])

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
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, task by task; - is the output")
    inspect.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    inspect.set_defaults(run=run["inspect"])

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
    task.set_defaults(run=run["task"])

    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between PyTorch and Flax",
        description="Convert a checkpoint of PyTorch or Flax, whatever its format; architecture and format are found "
        "out. One tensor is in memory at a time. config.json, tokenizer and processor files travel along.",
        epilog="Examples:\n"
        "  tadrop convert gpt2 gpt2-flax --to flax\n"
        "  tadrop convert gpt2-flax gpt2-torch --to torch\n"
        "  tadrop convert clip.pt clip --to torch --architecture CLIPModel",
        formatter_class=_Help,
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
    convert.add_argument(
        "--config", type=Path, metavar="FILE", help="the model's config.json, in place of SRC's if it has one"
    )
    convert.add_argument("--max-shard-size", metavar="SIZE", help="largest file, e.g. 2GB (default 5GB)")
    convert.add_argument("--quiet", action="store_true", help="no summary")
    convert.set_defaults(run=run["convert"])

    methods = commands.add_parser(
        "methods",
        help="list sparsifiers and merge rules, with parameters and sources",
        description="List the merge rules (--method of 'tadrop merge') and the sparsifiers that may go before them "
        "(--sparsify); or tell of one what it does, its parameters with their defaults, and where it is from.",
        formatter_class=_Help,
        epilog="Examples:\n  tadrop methods\n  tadrop methods tadrop",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all of one method")
    methods.set_defaults(run=run["methods"])

    demo = commands.add_parser(
        "demo",
        help="the whole story on real data, in minutes",
        description="Pretrain a small Vision Transformer on pairs of scikit-learn's digits, fine-tune it on questions "
        "about them, merge the fine-tunes by several methods, with TADrop and without, and show what the merged models "
        "get right. Nothing is downloaded.",
    )
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="where to put models, merges and picture (default: tadrop-demo)"
    )
    demo.set_defaults(run=run["demo"])
    return parser
