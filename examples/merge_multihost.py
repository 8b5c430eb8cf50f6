"""Merge a model that is spread over the devices of many hosts: each process reads, merges and writes its own shards.

Base and fine-tunes are Orbax checkpoints on a disk, or in a bucket, that all hosts see. Every process runs this script
with the same arguments, started by a launcher that is there anyway; the page "Many hosts" of the documentation has the
commands for a TPU pod slice, a GPU cluster, and processes on one machine.

    srun python examples/merge_multihost.py --base base --models a b --method ties:density=0.2 --out merged
"""

import argparse
import resource
import time
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tadrop_jax as tj
from tadrop_jax import registry
from tadrop_jax.checkpoints import orbax


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes one machine of all processes: from here on `jax.devices()` are the devices of all of them.

    Without arguments jax asks the launcher: SLURM, Open MPI, Kubernetes, the metadata of a Cloud TPU.
    """
    jax.distributed.initialize(coordinator, processes, process)


def by_rows(mesh: jax.sharding.Mesh):
    """How tensors are to lie: the first axis that the devices divide is split; what has none is on every device.

    Any other rule will do, a tensor-parallel one for instance: `converters.partition_specs` has those of its models.
    Statistics cross devices, tensors do not. Split first axes suit methods that want whole rows or groups.
    """

    def lies(name: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = next((a for a, length in enumerate(shape) if length and length % mesh.size == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "devices")
        return NamedSharding(mesh, spec)

    return lies


def merge(base, models: Sequence, out, rule, sparsifier=None, seed: int = 0, axis: AxisType = AxisType.Auto) -> None:
    """Restores, merges and saves: the same lines as on one device, but for the shardings. Any type of axis will do."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(axis,))
    began = time.perf_counter()
    start, *tuned = (orbax.restore(path, by_rows(mesh)) for path in (base, *models))
    restored = time.perf_counter()
    key = jax.random.key(seed)  # the same in every process
    merged = tj.merge(start, tuned, rule, sparsifier=sparsifier, key=key, donate=True)
    jax.block_until_ready(merged)
    done = time.perf_counter()
    if isinstance(merged, tj.Bundle):  # one model per task: base, shared vector, masks
        merged.save(out, format="orbax")
    else:
        orbax.save(out, merged)
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of {mesh.size} devices: "
        f"restored in {restored - began:.1f} s, merged in {done - restored:.1f} s, "
        f"saved in {time.perf_counter() - done:.1f} s; "
        f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory",
        flush=True,
    )


def main() -> None:
    """Reads the command line, joins the other processes, and merges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="Orbax checkpoint of the pretrained parameters")
    parser.add_argument("--models", nargs="+", required=True, help="those of the fine-tunes")
    parser.add_argument("--method", required=True, help="merge rule, NAME[:PARAMETER=VALUE,...]")
    parser.add_argument("--sparsify", help="sparsifier before it, the same way")
    parser.add_argument("--seed", type=int, default=0, help="of random methods")
    parser.add_argument("--out", required=True, help="new directory")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, if no launcher tells it")
    parser.add_argument("--processes", type=int, help="how many there are, if no launcher tells it")
    parser.add_argument("--process", type=int, help="which of them this is, from 0, if no launcher tells it")
    given = parser.parse_args()
    join(given.coordinator, given.processes, given.process)
    rule = registry.build(*registry.parse_step(given.method, "rule"), "rule")
    sparsifier = given.sparsify and registry.build(*registry.parse_step(given.sparsify), "sparsifier")
    merge(given.base, given.models, given.out, rule, sparsifier, given.seed)


if __name__ == "__main__":
    main()
