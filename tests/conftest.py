"""Settings for all tests, and the trees that they share."""

import os
import tempfile

import hypothesis
import jax
import numpy as np
import pytest

# One cache of compiled functions for all workers of a session: the first one sets it, the others inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Before anything initialises a backend: several test files shard over these devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of the time: without XLA's optimiser, in one part, and with its older emitters a third of it. jax
# 0.12 no longer has those, and ends at a flag that it does not know; 0.11 was not tried.
HURRY = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []),
]

hypothesis.settings.register_profile(
    "tests",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Compiles in a hurry where that is asked for, here and in the processes that tests start."""
    if config.option.markexpr == "not optimised":
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *HURRY])


def pytest_ignore_collect(collection_path, config):
    """Leaves out files with no test of the mark that was asked for: importing them all takes 15 s in every worker."""
    if config.option.markexpr != "optimised" or not collection_path.match("test_*.py"):
        return None
    return None if "mark.optimised" in collection_path.read_text() else True


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_functions():
    """Compiled functions of a file's steps are of no use to the next one, and thousands of them take gigabytes."""
    yield
    jax.clear_caches()


# Few and shared: every new shape costs a compilation.
SHAPES = {"block/bias": (33,), "block/kernel": (7, 5), "conv/kernel": (3, 3, 2, 4), "scale": ()}


def exact_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64: many ties and zeros, and every sum is exact in float32."""
    values = rng.integers(-48, 49, size=shape) * (rng.random(shape) < 0.9)
    return (values / 64).astype(np.float32)


def normal_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """No two magnitudes are equal."""
    return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="session")
def make_stacks():
    """A function that returns random task vectors, as a dict from '/'-joined name to a (T, *shape) stack.

    "exact" has ties, zeros, opposite entries that cancel, a tensor that is mostly zero, and, from T = 3 on, a
    task vector that is zero; "normal" has no ties.
    """

    def make(kind: str, tasks: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, tasks])
        values = {"exact": exact_values, "normal": normal_values}[kind]
        stacks = {name: values(rng, (tasks, *shape)) for name, shape in SHAPES.items()}
        if kind == "exact":
            stacks["block/bias"][0, 1:] = 0
            if tasks > 1:
                opposite = rng.random(SHAPES["conv/kernel"]) < 0.3
                stacks["conv/kernel"][:2, opposite] = [[1], [-1]] * np.abs(stacks["conv/kernel"][0, opposite])
                stacks["conv/kernel"][2:, opposite] = 0
            if tasks > 2:
                for stack in stacks.values():
                    stack[2] = 0
        return stacks

    return make


@pytest.fixture
def small_blocks(monkeypatch):
    """Streamed blocks of a thousandth of the usual size, and as little for a search to collect."""
    from tadrop_jax import cutting, sampling, streaming

    monkeypatch.setattr(cutting, "BLOCK", 128)
    monkeypatch.setattr(cutting, "SMALL", 128)
    monkeypatch.setattr(streaming, "KEEP_BYTES", 1 << 14)
    monkeypatch.setattr(sampling, "_COLLECT", 300)
    monkeypatch.setattr(sampling, "_SHARE", 4)
    monkeypatch.setattr(sampling, "_MOST", 2000)
    monkeypatch.setattr(sampling, "_SAMPLES", 4)


@pytest.fixture(scope="session")
def nest():
    """A function from a dict of '/'-joined names to the nested dict."""

    def function(flat: dict) -> dict:
        tree: dict = {}
        for name, value in flat.items():
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return tree

    return function


@pytest.fixture(scope="session")
def flatten():
    """A function from a tree to a dict from '/'-joined name to NumPy array; `None` is left out."""

    def function(tree) -> dict[str, np.ndarray]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        return {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    return function
