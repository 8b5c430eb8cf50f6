"""The cost of a merge on paper: passes, bytes and collectives of each rule, read off its steps.

    python -m benchmarks.cost [--parameters 70e9] [--tensors 723] [--tasks 8] [--bytes 2] [--json FILE]

Nothing is measured here. A rule's stages say how often the executors look at the data: docs/cost.md derives the
formulas, and compares them with measurements. The machines are described by the few numbers of `MACHINES`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import measure, merges
from tadrop_jax import registry, selection
from tadrop_jax.advancing import in_passing
from tadrop_jax.stages import Ranks, magnitudes
from tadrop_jax.steps import AnyStep, Step, chain, expand

# Rounds of counting of a selection in memory, each one read of the keys and one all-reduce.
ROUNDS = -(-32 // selection.BITS_PER_ROUND)
FLOAT32 = 4


class Passes(NamedTuple):
    """How often a merge looks at the data.

    Attributes:
        files: reads of all input files, of tensors that are too large to keep: at most; samples apart.
        kept: the same for tensors that are kept in memory while their own stages run.
        blocks: evaluations of the chain on every entry, streamed: what the processor works on.
        kept_ranks: stages of order statistics, of a tensor or the tree, whose keys are kept from round to round.
        made_ranks: those whose keys are made anew in each: magnitudes of task vectors as they came.
        sums: stages that add up.
        whole: whether a step wants whole tensors; then its arithmetic is not counted here, nor is a sort of rows.
        bundle: bytes an entry of what a rule with one model a task leaves beside the base; 0 for rules that leave one
            model. The base goes into the bundle, for which it is read once more.
    """

    files: int
    kept: int
    blocks: int
    kept_ranks: int
    made_ranks: int
    sums: int
    whole: bool
    bundle: float

    def output_bytes(self, itemsize: int) -> float:
        """Bytes an entry that are written."""
        return self.bundle + itemsize

    def device_bytes(self, tasks: int, itemsize: int) -> float:
        """Bytes an entry that move between a device's memory and its cores, merged in memory.

        Every stage of sums and the last pass read base and models; the last writes one model. A selection writes
        the keys of all tasks in float32 once and reads them once a round; one of magnitudes of task vectors makes them
        anew from base and models in every round.
        """
        inputs = (tasks + 1) * itemsize
        kept = self.kept_ranks * (inputs + FLOAT32 * tasks * (1 + ROUNDS))
        selections = kept + self.made_ranks * ROUNDS * inputs
        return selections + (self.sums + 1) * inputs + self.output_bytes(itemsize)

    def all_reduces(self, tensors: int) -> int:
        """All-reduces of a sharded merge of so many tensors; each carries a few numbers a task.

        A stage over the tree adds up over tensors on the host, so that every tensor has its own reduction there too.
        """
        return tensors * ((self.kept_ranks + self.made_ranks) * ROUNDS + self.sums)


class Machine(NamedTuple):
    """What a merge meets; rates in bytes a second.

    Attributes:
        name: in the table.
        read: of all input files, from where they lie to where the arithmetic is.
        write: of the output file.
        memory: of what the arithmetic works in, all devices together.
        evaluations: entries a second that a pass of the chain gets through (entries of base and models count each), all
            cores together; None where memory bounds it.
        reduction_s: latency of one small all-reduce; 0 on one device.
    """

    name: str
    read: float
    write: float
    memory: float
    evaluations: float | None
    reduction_s: float


MACHINES = (
    # PCIe 4 SSD, sustained; eight cores at what two of an AMD EPYC were measured at, each.
    Machine("laptop", 5e9, 2e9, 80e9, 8 * 0.51e9, 0),
    # Tensors go over PCIe 5 x16 to the device one after another, the files in host memory or on disks as fast as that.
    Machine("H200", 50e9, 50e9, 4.8e12, None, 0),
    # 64 hosts of 4 chips, each reading its shards at 1.5 GB/s from object storage; 819 GB/s a chip.
    Machine("v5e-256", 64 * 1.5e9, 64 * 1.0e9, 256 * 819e9, None, 30e-6),
)
METHODS = ("task_arithmetic", "ties", "task_arithmetic+tadrop", "ties+tadrop", "emr", "emr+tadrop", "pcb", "t_switch")
COLUMNS = {
    "method": ("method", ""),
    "files": ("reads of the files", "d"),
    "kept": ("of kept tensors", "d"),
    "blocks": ("evaluations", "d"),
    "device": ("device bytes / entry", ".0f"),
    "over": ("/ least", ".1f"),
    "reductions": ("all-reduces", "d"),
    **{m.name: (f"{m.name}, s", ".1f") for m in MACHINES},
    **{f"{m.name}_bound": ("bound by", "") for m in MACHINES},
}


def build(method: str) -> AnyStep:
    """The chain of a method, as the command line makes it; see `merges.parts`."""
    rule, _, sparsifier = merges.parts(method)
    step = registry.build(rule, merges.parameters(method), "rule")
    return chain(registry.build(sparsifier, {}, "sparsifier"), step) if sparsifier else step


def passes(step: AnyStep, tasks: int, path: str = "weight", shape: tuple[int, ...] = (4096, 4096)) -> Passes:
    """Counts the passes of a chain over one tensor.

    Args:
        step: rule, or a chain that ends with one.
        tasks: T.
        path: of the tensor; some rules treat some tensors in another way.
        shape: of the tensor.

    Example:
        >>> passes(build("ties"), 8)[:3]
        (2, 2, 2)
        >>> passes(build("task_arithmetic+tadrop"), 8)[:3]
        (3, 1, 3)
    """
    steps = [s.for_tensor(path, shape, tasks) for s in expand(step, tasks)]
    places = [(i, j) for i, s in enumerate(steps) for j in range(len(s.stages))]
    every = [steps[i].stages[j] for i, j in places]
    # The others are served by a read for the stage before, for what the chain puts out, or for the rows of a block.
    passing = [in_passing(steps, i, j) for i, j in places]
    alone = [stage for stage, found in zip(every, passing, strict=True) if not found and stage.scope != "row"]
    stages = [stage for stage in alone if not getattr(stage, "again", False)]
    of_tree = [at for at, stage in enumerate(stages) if stage.scope == "global"]
    whole = any(s.piece == "tensor" for s in steps)
    ranks = sum(isinstance(stage, Ranks) for stage in every)
    made = sum(stage.of is magnitudes for (i, _), stage in zip(places, every, strict=True) if i == 0)
    # What a sum over the tree needs of single tensors is found in the same read; what a selection needs is read before.
    before = sum(isinstance(stages[at], Ranks) and at - 1 not in (-1, *of_tree) for at in of_tree)
    files = len(of_tree) + 1 if whole else len(stages) + 1
    kept = len(of_tree) + 1 + (0 if whole else before)
    sums = len(every) - ranks
    return Passes(files, kept, files, ranks - made, made, sums, whole, _bundle_bytes(steps[-1], tasks, shape))


def _bundle_bytes(last: Step, tasks: int, shape: tuple[int, ...]) -> float:
    parts = () if last.kind is None else last.kind.parts(shape, tasks).values()
    sizes = (math.prod(part.stored) * (1 if part.dtype == "bits" else FLOAT32) for part in parts)
    return sum(sizes) / math.prod(shape)


def seconds(found: Passes, at: Machine, parameters: float, tensors: int, tasks: int, itemsize: int):
    """Wall seconds of a merge whose reading, arithmetic and writing overlap, and what bounds it."""
    inputs = parameters * (tasks + 1) * itemsize
    # Files are read again for every stage only where they are streamed; what lies in device memory is read there.
    reads = found.files + (1 / (tasks + 1) if found.bundle else 0) if at.reduction_s == 0 else 1
    parts = {
        "reading": reads * inputs / at.read,
        "memory": parameters * found.device_bytes(tasks, itemsize) / at.memory,
        "writing": parameters * found.output_bytes(itemsize) / at.write,
        "all-reduces": found.all_reduces(tensors) * at.reduction_s,
    }
    if at.evaluations is not None:
        parts["processor"] = found.blocks * parameters * (tasks + 1) / at.evaluations
        del parts["memory"]  # blocks stay in the caches
    bound = max(parts, key=lambda part: parts[part])
    if at.reduction_s:  # loading, merging and saving come one after another
        return math.fsum(parts.values()), bound  # sum() rounds otherwise from Python 3.12 on
    return parts[bound], bound


AGAINST_COLUMNS = {
    "method": ("method", ""),
    "paper": ("on paper", ".1f"),
    "measured": ("measured", ".1f"),
    "share": ("measured / on paper", ".1f"),
}


def streamed_against_paper(merge_gpt2: dict) -> tuple[dict, list[dict]]:
    """What `merge_gpt2` measured without start-up, in passes of Task Arithmetic, beside the evaluations on paper.

    Args:
        merge_gpt2: the result of that benchmark.

    Returns:
        Columns and rows of a table.
    """
    tasks, rows = merge_gpt2["setting"]["models"], merge_gpt2["rows"]
    took = {row["method"]: row["wall_s"] - row["start_s"] for row in rows if row["wall_s"] is not None}
    unit = took.get("task_arithmetic", math.nan)
    return AGAINST_COLUMNS, [
        _compared(method, passes(build(method), tasks).blocks, wall / unit)
        for method, wall in took.items()
        if not merges.parts(method)[1]
    ]


def memory_against_paper(in_memory: dict) -> tuple[dict, list[dict]]:
    """Bytes on paper over the least there is, beside what `in_memory` measured over its floor; as the last."""
    tasks, itemsize = in_memory["setting"]["tasks"], 4 if in_memory["setting"]["dtype"] == "float32" else 2
    least = (tasks + 2) * itemsize
    return AGAINST_COLUMNS, [
        _compared(
            row["rule"],
            passes(build(row["rule"]), tasks).device_bytes(tasks, itemsize) / least,
            row["ours / floor"],
        )
        for row in in_memory["rows"]
    ]


def _compared(method: str, paper: float, measured: float) -> dict:
    return {"method": method, "paper": float(paper), "measured": measured, "share": measured / paper}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--tensors", type=int, default=723, help="of the model (723: a Llama of 80 layers)")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=2, help="of a stored number (2: bfloat16)")
    parser.add_argument("--methods", default=",".join(METHODS), help="METHOD or METHOD+SPARSIFIER, comma-separated")
    options = parser.parse_args(arguments)
    rows = []
    least = (options.tasks + 2) * options.bytes
    for method in options.methods.split(","):
        found = passes(build(method), options.tasks)
        device = found.device_bytes(options.tasks, options.bytes)
        row = {"method": method, **found._asdict(), "device": device, "over": device / least}
        row["reductions"] = found.all_reduces(options.tensors)
        for at in MACHINES:
            taken = seconds(found, at, options.parameters, options.tensors, options.tasks, options.bytes)
            row[at.name], row[f"{at.name}_bound"] = taken
        rows.append({key: row[key] for key in COLUMNS})
    setting = {"parameters": options.parameters, "tasks": options.tasks, "bytes": options.bytes}
    measure.show("cost", measure.machine(), setting, COLUMNS, rows, options.json)


if __name__ == "__main__":
    main()
