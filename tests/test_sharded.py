"""Sharded over 8 devices against one device: the same selections, and no tensor crosses devices."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tadrop_jax as tj
from tadrop_jax import memory
from tests.helpers import family

SHAPES = {"kernel": (64, 48), "bias": (16,)}
# Mesh, and how each tensor lies on it. "partly": split over one axis and replicated over the other, or replicated.
LAYOUTS = {
    "8": ((8,), {"kernel": ("a",), "bias": ("a",)}),
    "4x2": ((4, 2), {"kernel": ("a", "b"), "bias": (("a", "b"),)}),
    "partly": ((4, 2), {"kernel": (None, "b"), "bias": ()}),
}
RULES = {
    "task_arithmetic": lambda: tj.task_arithmetic((0.3, 0.4)),
    "average": lambda: tj.chain(tj.tadrop(), tj.average()),
    "ties-authors": lambda: tj.ties(0.3),
    "ties-mergekit": lambda: tj.ties(0.3, weights=(1.0, 0.5), flavour="mergekit"),
    "ties-peft": lambda: tj.ties(0.3, flavour="peft"),
    "tadrop-ties": lambda: tj.chain(tj.tadrop(), tj.ties(None)),
    "uniform": lambda: tj.chain(tj.uniform(0.4, norm=1), tj.task_arithmetic(1.0)),
    "magnitude-tensor": lambda: tj.chain(tj.magnitude((0.2, 0.6)), tj.task_arithmetic(1.0)),
    "dare-inverse": lambda: tj.chain(tj.dare(0.5), tj.task_arithmetic(1.0)),
    "dare-l1": lambda: tj.chain(tj.dare(0.5, "l1"), tj.task_arithmetic(1.0)),
    "n_m": lambda: tj.chain(tj.n_m(2, 6), tj.task_arithmetic(1.0)),
    "cabs": lambda: tj.cabs(1, 4),
    "conflict_aware": lambda: tj.chain(tj.conflict_aware(tj.magnitude(0.3)), tj.task_arithmetic(1.0)),
    "karcher": lambda: tj.chain(tj.magnitude(0.5), tj.karcher()),
    "breadcrumbs": lambda: tj.breadcrumbs_merging(0.5, 0.1, flavour="mergekit"),
    "della": lambda: tj.della_linear(0.5),
    "rescale": lambda: tj.chain(tj.rescale(tj.dare(0.5, None), 1, "global"), tj.task_arithmetic(1.0)),
    "pcb": lambda: tj.pcb(0.3),
    "ram_plus": lambda: tj.ram_plus(threshold=0.1, flavour="authors"),
    "sce": lambda: tj.sce(0.3),
    "emr": lambda: tj.chain(tj.tadrop(), tj.emr()),
}
# Methods of every kind of statistic run on all layouts, the others on one.
EVERYWHERE = ("ties-authors", "dare-l1", "n_m", "emr")
CASES = [(rule, "4x2") for rule in RULES] + [(rule, layout) for rule in EVERYWHERE for layout in ("8", "partly")]


def spread(tree: dict, layout: str) -> dict:
    shape, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    return {n: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*specs[n]))) for n, v in tree.items()}


@pytest.fixture(scope="module")
def trees():
    return family(2, SHAPES)


@pytest.fixture(scope="module")
def on_one_device(trees):
    found: dict = {}

    def merged(name: str):
        if name not in found:
            found[name] = tj.merge(*trees, RULES[name](), key=jax.random.key(0))
        return found[name]

    return merged


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_one_device(name, layout, trees, on_one_device):
    base, models = trees
    placed = spread(base, layout)
    merged = tj.merge(placed, [spread(m, layout) for m in models], RULES[name](), key=jax.random.key(0))
    expected = on_one_device(name)
    if name == "emr":
        for a, b in zip(merged.packed, expected.packed, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(merged.rescalers, expected.rescalers, rtol=1e-6)
        assert merged.unified["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)
        merged, expected = merged.unified, expected.unified
        base = {n: np.zeros_like(v) for n, v in base.items()}
    for tensor, value in merged.items():
        wanted = np.asarray(expected[tensor])
        np.testing.assert_array_equal(np.asarray(value) != base[tensor], wanted != base[tensor], err_msg=tensor)
        np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=1e-6, err_msg=tensor)
        assert value.sharding.is_equivalent_to(placed[tensor].sharding, value.ndim), tensor


@pytest.mark.parametrize("make", [tj.tall, tj.t_switch, tj.tsv_c], ids=lambda make: make.__name__)
def test_bundles(make, trees):
    """Bits equal, numbers to rounding; what lies over entries keeps the sharding of the base."""
    base, models = trees
    placed = spread(base, "4x2")
    found = tj.merge(placed, [spread(m, "4x2") for m in models], make())
    expected = tj.merge(base, models, make())
    for parts, wanted in zip(found.parts, expected.parts, strict=True):
        for name in ("masks", "signs"):
            if name in wanted:
                np.testing.assert_array_equal(parts[name], wanted[name])
    for t in range(2):
        for name, value in found.task_vector(t).items():
            np.testing.assert_allclose(value, expected.task_vector(t)[name], rtol=1e-5, atol=2e-6, err_msg=name)
    if make is tj.tall:
        assert found.unified["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)


def test_models_that_lie_elsewhere_are_brought_to_the_base(trees, on_one_device):
    base, models = trees
    merged = tj.merge(spread(base, "8"), [models[0], spread(models[1], "partly")], RULES["ties-authors"]())
    np.testing.assert_allclose(merged["kernel"], on_one_device("ties-authors")["kernel"], rtol=2e-6, atol=1e-6)


def test_stacks_of_task_vectors(trees):
    """Task vectors keep the sharding of the base, and are sparsified and merged where they lie."""
    base, models = trees
    stack = tj.task_vectors(spread(base, "4x2"), [spread(m, "4x2") for m in models])
    assert len(stack["kernel"].sharding.device_set) == 8
    sparse = tj.sparsify(stack, tj.tadrop())
    wanted = tj.sparsify(tj.task_vectors(base, models), tj.tadrop())
    for tensor, value in sparse.items():
        np.testing.assert_array_equal(np.asarray(value) == 0, np.asarray(wanted[tensor]) == 0)
        np.testing.assert_allclose(value, wanted[tensor], rtol=2e-6)
    assert sparse["kernel"].sharding.is_equivalent_to(stack["kernel"].sharding, 3)


@pytest.fixture
def compiled(monkeypatch):
    """A function that gives the compiled text of each function that a merge calls on sharded tensors."""
    calls: list = []

    def recorded(make):
        def recording(site, *rest):
            fn = make(site, *rest)

            def call(*args):
                if site.mesh is not None:
                    calls.append((fn, args))
                return fn(*args)

            return call

        return recording

    # _selected is only asked for its shape, and never run.
    for name in ("_partial", "_prepared", "_counted", "_finished"):
        monkeypatch.setattr(memory, name, recorded(getattr(memory, name)))

    def texts() -> list[str]:
        # jit's cache makes the text of a function that ran already cheap; one call of each function will do.
        once = {id(fn): (fn, args) for fn, args in calls}
        return [fn.lower(*args).compile().as_text() for fn, args in once.values()]

    return texts


def operations(text: str, name: str) -> list[str]:
    """Result types of an operation in compiled text."""
    return re.findall(rf"= ([^=\n]*?)\b{name}(?:-start)?\(", text)


def entries(result_type: str) -> int:
    return sum(math.prod(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", result_type))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("ties-authors", "4x2"), ("ties-mergekit", "4x2"), ("tadrop-ties", "partly"), ("karcher", "4x2"), ("emr", "4x2")],
)
def test_only_counts_and_sums_cross_devices(name, layout, trees, compiled):
    base, models = trees
    # Only the large tensor: what crosses has to be small against a device's part of it.
    large = {"kernel": base["kernel"]}
    tj.merge(spread(large, layout), [spread({"kernel": m["kernel"]}, layout) for m in models], RULES[name]())
    texts = compiled()
    assert texts
    part = base["kernel"].size // (8 if layout == "4x2" else 2)
    for text in texts:
        for operation in ("all-gather", "all-to-all", "collective-permute"):
            assert not operations(text, operation)
    reduced = [entries(found) for text in texts for found in operations(text, "all-reduce")]
    assert reduced, "no statistic crossed devices, though the tensor is split"
    assert max(reduced) < part / 2


def test_the_check_sees_a_gather():
    """The pattern that the test above looks for does occur in a program that gathers."""
    x = spread({"kernel": np.zeros((64, 48), np.float32)}, "4x2")["kernel"]
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    text = jax.jit(lambda v: v + 1, out_shardings=everywhere).lower(x).compile().as_text()
    assert operations(text, "all-gather")
    text = jax.jit(lambda v: v.sum()).lower(x).compile().as_text()
    assert {entries(found) for found in operations(text, "all-reduce")} == {1}
