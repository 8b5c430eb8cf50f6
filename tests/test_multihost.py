"""Real processes, joined by jax.distributed: the same merge as in one, from shards on disk to shards on disk."""

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

import tadrop_jax as tj
from examples.merge_multihost import by_rows
from tadrop_jax.checkpoints import orbax
from tadrop_jax.errors import CheckpointError, MergeError
from tests.helpers import CACHE, REPOSITORY, family
from tests.multihost_worker import METHODS

# The first is split over devices; the second is on all of them.
SHAPES = {"kernel": (4096, 48), "bias": (5,)}


@pytest.fixture(scope="module")
def trees():
    return family(2, SHAPES)


@pytest.fixture(scope="module")
def folder(trees, tmp_path_factory):
    """Base and models, as a training on four devices saves them: a chunk a shard."""
    root = tmp_path_factory.mktemp("hosts")
    mesh = jax.make_mesh((4,), ("devices",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    lies = by_rows(mesh)
    base, models = trees
    for name, tree in {"base": base, "m0": models[0], "m1": models[1]}.items():
        placed = {n: jax.device_put(v, lies(n, v.shape)) for n, v in tree.items()}
        orbax.save(root / name, {**placed, "steps": np.int32(7)})
    return root


def launch(processes: int, devices: int, folder, kind: str, methods) -> list[dict]:
    """Runs the worker in so many processes, and gives what each said of its reading."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    logs = [folder / f"log-{i}" for i in range(processes)]
    workers = []
    for i, log in enumerate(logs):
        argv = [coordinator, str(processes), str(i), str(folder), kind, *methods]
        with log.open("w") as output:
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.multihost_worker", *argv],
                env=environment,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        workers.append(worker)
    give_up = time.monotonic() + 200
    try:  # one that fails leaves the others waiting
        while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
            assert time.monotonic() < give_up, "the processes do not end"
            time.sleep(0.05)
        codes = [w.poll() for w in workers]
    finally:
        for worker in workers:
            worker.kill()  # jax takes a mere SIGTERM for a notice of preemption
            worker.wait()
    texts = [log.read_text() for log in logs]
    assert codes == [0] * processes, "\n".join(texts)
    return [json.loads(text.partition("said ")[2].splitlines()[0]) for text in texts]


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts the bytes that a process reads")
@pytest.mark.parametrize(
    ("processes", "devices", "kind", "methods"),
    [(2, 2, "Auto", ("ties", "dare", "n_m", "emr", "iso_c")), (4, 1, "Explicit", ("ties_by_tensor", "ties"))],
)
def test_processes_merge_as_one(processes, devices, kind, methods, trees, folder):
    base, models = trees
    of_each = base["kernel"].nbytes // processes
    for said in launch(processes, devices, folder, kind, methods):
        assert said["holds"] == of_each
        # Its own shards, and the few kilobytes that describe the tree; not those of the others.
        assert said["read"] < of_each + 100_000 < base["kernel"].nbytes
    for name in methods:
        rule, sparsifier = METHODS[name]()
        wanted: Any = tj.merge(base, models, rule, sparsifier=sparsifier, key=jax.random.key(0))
        saved = folder / f"{name}-{processes}"
        if name == "emr":
            bundle: Any = tj.Bundle.load(saved)
            for tensor in SHAPES:
                np.testing.assert_array_equal(bundle.mask(1)[tensor], wanted.mask(1)[tensor])
            np.testing.assert_allclose(bundle.rescalers, wanted.rescalers, rtol=1e-6)
            found, wanted = bundle.task_params(1), wanted.task_params(1)
        else:
            found = orbax.restore(saved)
        assert found["steps"] == 7
        for tensor, before in base.items():
            changed = np.asarray(wanted[tensor]) != before
            if name != "iso_c":
                np.testing.assert_array_equal(found[tensor] != before, changed, err_msg=f"{name} {tensor}")
            np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-4, atol=2e-6, err_msg=f"{name} {tensor}")


def test_restoring_and_saving(trees, folder, tmp_path):
    base, _ = trees
    mesh = jax.make_mesh((8,), ("devices",), (jax.sharding.AxisType.Auto,))
    lies = by_rows(mesh)
    found = orbax.restore(folder / "base", lies)
    again = orbax.restore(folder / "base", jax.tree.map(lambda x: x.sharding, found))
    for tensor, value in base.items():
        for tree in (found, again):
            assert tree[tensor].sharding.is_equivalent_to(lies(tensor, value.shape), value.ndim)
            np.testing.assert_array_equal(tree[tensor], value)
    with pytest.raises(CheckpointError, match="does not fit"):
        orbax.restore(folder / "base", {"kernel": lies("kernel", SHAPES["kernel"])})
    with pytest.raises(CheckpointError, match="not empty"):
        orbax.save(folder / "base", found)
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "absent", tmp_path / "other"):
        with pytest.raises(CheckpointError, match=path.name):
            orbax.restore(path)


def test_a_bundle_that_lies_on_several_hosts_is_saved_by_orbax(trees, tmp_path, monkeypatch):
    base, models = trees
    bundle = tj.merge({"bias": jax.numpy.asarray(base["bias"])}, [{"bias": m["bias"]} for m in models], tj.emr())
    monkeypatch.setattr(type(bundle.base["bias"]), "is_fully_addressable", False)
    with pytest.raises(MergeError, match=r"'base/bias' is spread over several processes.*format='orbax'"):
        bundle.save(tmp_path / "bundle")
