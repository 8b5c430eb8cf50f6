"""One of several processes that restore, merge and save together, started by test_multihost.py."""

import json
import sys
from pathlib import Path

import jax

import tadrop_jax as tj
from examples.merge_multihost import by_rows, join, merge
from tadrop_jax.checkpoints import orbax

METHODS = {
    "ties": lambda: (tj.ties(0.3), None),
    "ties_by_tensor": lambda: (tj.ties(0.3, flavour="mergekit"), None),
    "dare": lambda: (tj.average(), tj.dare(0.5)),
    "n_m": lambda: (tj.task_arithmetic(1.0), tj.n_m(2, 6)),
    "emr": lambda: (tj.emr(), tj.tadrop()),
    "iso_c": lambda: (tj.iso_c(), None),
}


def bytes_read() -> int:
    """What this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main(coordinator: str, processes: str, process: str, root: str, kind: str, *methods: str) -> None:
    join(coordinator, int(processes), int(process))
    axis = jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(axis,))
    folder = Path(root)
    orbax.restore(folder / "m0", by_rows(mesh))  # reads the modules that restoring takes
    before = bytes_read()
    tree = orbax.restore(folder / "base", by_rows(mesh))
    said = {"read": bytes_read() - before, "holds": sum(s.data.nbytes for s in tree["kernel"].addressable_shards)}
    print("said", json.dumps(said), flush=True)
    models = [folder / "m0", folder / "m1"]
    for name in methods:
        merge(folder / "base", models, folder / f"{name}-{processes}", *METHODS[name](), axis=axis)


if __name__ == "__main__":
    main(*sys.argv[1:])
