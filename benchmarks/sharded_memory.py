"""What a sharded merge keeps on each device, against the least: python -m benchmarks.sharded_memory.

Compiles the merge of one tensor over 8 devices of the host and reads XLA's own accounting, in bytes a device; nothing
runs. The least is what comes in, base and T models: the result takes the place of a model, which is donated. A bundle
takes room of its own. What is temporary is that of one tensor at a time: "model / least" is for a model of many such
tensors. A stack is the task vectors of one tensor in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tadrop_jax as tj
from benchmarks import measure

RULES = {
    "task_arithmetic": lambda: tj.task_arithmetic(0.3),
    "ties": lambda: tj.ties(0.2),
    "tadrop + task_arithmetic": lambda: tj.chain(tj.tadrop(), tj.task_arithmetic(0.3)),
    "dare + task_arithmetic": lambda: tj.chain(tj.dare(0.5), tj.task_arithmetic(0.3)),
    "pcb": lambda: tj.pcb(),
    "tadrop + emr": lambda: tj.chain(tj.tadrop(), tj.emr()),
}
COLUMNS = {
    "rule": ("rule", ""),
    "stacks": ("temporary, stacks", ".2f"),
    "one tensor / least": ("one tensor / least", ".2f"),
    "model / least": ("model / least", ".2f"),
    "argument": ("inputs, MB", ".1f"),
    "output": ("result, MB", ".1f"),
    "in place": ("of it in place, MB", ".1f"),
    "temporary": ("temporary, MB", ".1f"),
}
DEVICES = 8


def account(rule, shape, dtype, tasks: int, mesh, spec, donate: bool) -> dict[str, int]:
    """XLA's accounting of a merge of one tensor, in bytes a device."""
    lies = NamedSharding(mesh, spec)
    tensor = {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=lies)}

    def merge(models, base):
        return tj.merge(base, models, rule, shardings={"w": lies}, key=jax.random.key(0))

    compiled = jax.jit(merge, donate_argnums=0 if donate else ()).lower([tensor] * tasks, tensor).compile()
    found: Any = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "argument": found.argument_size_in_bytes,
        "output": found.output_size_in_bytes,
        "in place": found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "all": kept + found.temp_size_in_bytes,
    }


def row(name: str, side: int, tensors: int, tasks: int, dtype, mesh) -> dict[str, Any]:
    """The account of one rule, against the least."""
    found = account(RULES[name](), (side, side), dtype, tasks, mesh, PartitionSpec("a", "b"), "emr" not in name)
    entries = side * side // mesh.size
    least = (tasks + 1) * entries * dtype.itemsize
    kept = found["all"] - found["temporary"]
    return {
        "rule": name,
        "stacks": found["temporary"] / (4 * tasks * entries),
        "one tensor / least": found["all"] / least,
        "model / least": (tensors * kept + found["temporary"]) / (tensors * least),
        **{key: found[key] / 1e6 for key in ("argument", "output", "in place", "temporary")},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rules", help=f"comma-separated, of {', '.join(RULES)} (all; task_arithmetic)")
    parser.add_argument("--side", type=int, help="rows and columns of the tensor (4096; 256)")
    parser.add_argument("--tensors", type=int, default=32, help="in the model (32)")
    parser.add_argument("--tasks", type=int, default=8, help="fine-tunes (8)")
    parser.add_argument("--dtype", default="bfloat16")
    parsed = parser.parse_args(arguments)
    options = measure.chosen(parsed, rules=(",".join(RULES), "task_arithmetic"), side=(4096, 256))
    rules = options.rules.split(",")
    if unknown := set(rules) - set(RULES):
        parser.error(f"--rules: {', '.join(sorted(unknown))}: there are {', '.join(RULES)}")
    if jax.config.jax_num_cpu_devices != DEVICES:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
    facts = measure.machine()
    mesh = jax.make_mesh((DEVICES // 2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    found = [row(name, options.side, options.tensors, options.tasks, jnp.dtype(options.dtype), mesh) for name in rules]
    setting = {"mesh": "4 x 2", "side": options.side, "dtype": options.dtype, "tasks": options.tasks}
    setting |= {"tensors in the model": options.tensors}
    measure.show("sharded_memory", facts, setting, COLUMNS, found, options.json)


if __name__ == "__main__":
    main()
