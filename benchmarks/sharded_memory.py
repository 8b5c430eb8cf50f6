"""What a sharded merge keeps on each device, against the least: python -m benchmarks.sharded_memory.

Compiles the merge of one tensor over 8 devices of the host and reads XLA's own accounting, in bytes a device. The least
is what comes in, base and T models: the result takes the place of a model, if it is donated. What is temporary is that
of one tensor at a time: "model / least" is for a model of many such tensors. Prints a JSON line for each.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tadrop_jax as tj

RULES = {
    "task_arithmetic": lambda: tj.task_arithmetic(0.3),
    "ties": lambda: tj.ties(0.2),
    "tadrop + task_arithmetic": lambda: tj.chain(tj.tadrop(), tj.task_arithmetic(0.3)),
}


def account(rule, shape, dtype, tasks: int, mesh, spec, donate: bool) -> dict[str, int]:
    """XLA's accounting of a merge of one tensor, in bytes a device."""
    lies = NamedSharding(mesh, spec)
    tensor = {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=lies)}

    def merge(models, base):
        return tj.merge(base, models, rule, shardings={"w": lies})

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


def main() -> None:
    """Measures each rule, with the models donated and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tensors", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shape, dtype = (given.rows, given.columns), jnp.dtype(given.dtype)
    least = (given.tasks + 1) * given.rows * given.columns * dtype.itemsize // mesh.size
    for name, make in RULES.items():
        for donate in (False, True):
            found = account(make(), shape, dtype, given.tasks, mesh, PartitionSpec("a", "b"), donate)
            kept = found["all"] - found["temporary"]
            model = (given.tensors * kept + found["temporary"]) / (given.tensors * least)
            line = {"rule": name, "donate": donate, "one tensor / least": round(found["all"] / least, 2)}
            line |= {"model / least": round(model, 2), **found}
            print(json.dumps({**line, "least": least, "tasks": given.tasks, "dtype": given.dtype}))


if __name__ == "__main__":
    main()
