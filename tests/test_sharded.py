"""Sharded over 8 devices against one device: the same selections, and no tensor crosses devices."""

import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tadrop_jax as tj
from benchmarks.sharded_memory import account
from tadrop_jax import bundles, memory
from tadrop_jax.errors import MergeError
from tests.helpers import family

pytestmark = pytest.mark.optimised

SHAPES = {"kernel": (64, 48), "bias": (16,)}
EXPLICIT = AxisType.Explicit
# Mesh, and how each tensor lies on it. "partly": split over one axis and replicated over the other, or replicated.
LAYOUTS = {
    "8": ((8,), {"kernel": ("a",), "bias": ("a",)}),
    "4x2": ((4, 2), {"kernel": ("a", "b"), "bias": (("a", "b"),)}),
    "partly": ((4, 2), {"kernel": (None, "b"), "bias": ()}),
}
RULES = {
    "task_arithmetic": lambda: tj.task_arithmetic((0.3, 0.4)),
    "average": lambda: tj.average(),
    "ties-authors": lambda: tj.ties(0.3),
    "ties-mergekit": lambda: tj.ties(0.3, weights=(1.0, 0.5), flavour="mergekit"),
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
    "breadcrumbs-rows": lambda: tj.chain(tj.breadcrumbs(0.5, 0.1), tj.average()),
    "della": lambda: tj.della_linear(0.5),
    "della-rows": lambda: tj.chain(tj.della(0.5, rescale="l1"), tj.average()),
    "overlapping": lambda: tj.cabs(3, 4, overlap="exact"),
    "model_stock-rows": lambda: tj.model_stock(filter_wise=True),
    "rescale": lambda: tj.chain(tj.rescale(tj.dare(0.5, None), 1, "global"), tj.task_arithmetic(1.0)),
    "pcb": lambda: tj.pcb(0.3),
    "ram_plus": lambda: tj.ram_plus(threshold=0.1, flavour="authors"),
    "sce": lambda: tj.sce(0.3),
    "emr": lambda: tj.chain(tj.tadrop(), tj.emr()),
}
# Methods of every kind of statistic run on all layouts, the others on one.
EVERYWHERE = ("ties-authors", "n_m")
ROWS = ("breadcrumbs-rows", "della-rows", "model_stock-rows")
CASES = [(rule, "4x2") for rule in RULES if rule not in (*ROWS, "average")] + [(rule, "8") for rule in ROWS]
CASES += [(rule, layout) for rule in EVERYWHERE for layout in ("8", "partly")]


def spread(tree: dict, layout: str, kind: AxisType = AxisType.Auto) -> dict:
    shape, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(kind,) * len(shape))
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


@pytest.fixture
def compiled(monkeypatch):
    """A function that gives the compiled text of each function that a merge calls on the sharded kernel.

    Only of the large tensor: what crosses devices has to be small against a device's part of it.
    """
    calls: list = []

    def recorded(make):
        def recording(site, *rest):
            fn = make(site, *rest)

            def call(*args):
                if site.mesh is not None and site.shape == SHAPES["kernel"]:
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


def check_crossings(texts, part: int) -> None:
    """No tensor crosses devices, and what is summed over them is small against a device's part of a tensor."""
    assert texts
    for text in texts:
        for operation in ("all-gather", "all-to-all", "collective-permute"):
            assert not operations(text, operation)
    reduced = [entries(found) for text in texts for found in operations(text, "all-reduce")]
    assert max(reduced, default=0) < part / 2


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_one_device(name, layout, trees, on_one_device, compiled):
    """The same merge, and only counts and sums cross devices."""
    base, models = trees
    placed = spread(base, layout)
    merged = tj.merge(placed, [spread(m, layout) for m in models], RULES[name](), key=jax.random.key(0))
    check_equal(name, base, placed, merged, on_one_device(name))
    if (name, layout) == ("della", "4x2"):  # its rows are split: gathered, by declaration
        assert not compiled()
        return
    texts = compiled()
    check_crossings(texts, base["kernel"].size // (2 if layout == "partly" else 8))
    if name in ("ties-authors", "tadrop-ties", "emr"):
        assert any(operations(text, "all-reduce") for text in texts), "no statistic crossed devices"


def check_equal(name, base, placed, merged, expected):
    """The same selections, values to rounding, and results that lie as the base does."""
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


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_bits_are_spread_as_well(kind):
    """Of one axis without communication; of two axes brought together, packed, and spread again; else on all."""
    masks = np.random.default_rng(0).random((2, 64, 24)) < 0.5
    wanted = np.packbits(masks.reshape(2, -1), axis=1)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    for spec, each in (((None, ("a", "b")), 24), ((None, "a"), 48), ((None, "a", "b"), 24), ((None, None, "b"), 96)):
        placed = jax.device_put(masks, NamedSharding(mesh, PartitionSpec(*spec)))
        bits = bundles.pack(placed)
        np.testing.assert_array_equal(bits, wanted)
        assert bits.sharding.shard_shape(bits.shape) == (2, each), spec
        np.testing.assert_array_equal(bundles.unpack(bits[1], (64, 24)), masks[1])
    odd = jax.device_put(masks[:, :, :9], NamedSharding(mesh, PartitionSpec(None, ("a", "b"))))
    np.testing.assert_array_equal(bundles.pack(odd), np.packbits(masks[:, :, :9].reshape(2, -1), axis=1))
    alone = jax.device_put(masks, NamedSharding(mesh, PartitionSpec(None, "a")))
    if kind == EXPLICIT:  # on other axes a traced array does not tell how it lies
        assert not operations(jax.jit(bundles.pack).lower(alone).compile().as_text(), "all-gather")


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


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("average", "della", *ROWS)])
def test_explicit_meshes(name, trees, on_one_device, compiled):
    """Every method that selects or works on single entries, where the types of arrays say how they lie.

    On the mesh of two axes that was compiled for above: what is compiled is the same.
    """
    base, models = trees
    placed, others = spread(base, "4x2", EXPLICIT), [spread(m, "4x2", EXPLICIT) for m in models]
    merged = tj.merge(placed, others, RULES[name](), key=jax.random.key(0))
    check_crossings(compiled(), base["kernel"].size // 8)
    check_equal(name, base, placed, merged, on_one_device(name))


def test_inside_jit_on_an_explicit_mesh(trees, on_one_device):
    """The types of traced tensors say how they lie; a bundle rebuilds its models there."""
    base, models = trees
    placed, others = spread(base, "4x2", EXPLICIT), [spread(m, "4x2", EXPLICIT) for m in models]
    merged = jax.jit(lambda b, *m: tj.merge(b, list(m), RULES["emr"]()))(placed, *others)
    check_equal("emr", base, placed, merged, on_one_device("emr"))
    with jax.set_mesh(placed["kernel"].sharding.mesh):
        rebuilt, wanted = merged.task_params(1), on_one_device("emr").task_params(1)
    for tensor, value in rebuilt.items():
        np.testing.assert_allclose(value, wanted[tensor], rtol=2e-6, atol=1e-6)


def test_gathered_inside_jit_on_an_explicit_mesh(trees):
    """A step that wants whole tensors: each is gathered, and its result lies as the base does."""
    base, models = trees
    placed, others = spread(base, "8", EXPLICIT), [spread(m, "8", EXPLICIT) for m in models]
    found = jax.jit(lambda b, *m: tj.merge(b, list(m), tj.iso_c()))(placed, *others)
    for tensor, value in tj.merge(base, models, tj.iso_c()).items():
        np.testing.assert_allclose(found[tensor], value, rtol=1e-4, atol=1e-5)
        assert found[tensor].sharding.is_equivalent_to(placed[tensor].sharding, value.ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_inside_jit_nothing_crosses_either(kind, trees, on_one_device):
    """On an explicit mesh by itself, on another where ``shardings`` says how the tensors lie."""
    base, models = trees
    placed, others = spread(base, "4x2", kind), [spread(m, "4x2", kind) for m in models]
    shardings = jax.tree.map(lambda x: x.sharding, placed) if kind == AxisType.Auto else None

    @jax.jit
    def merge(base, *models):
        return tj.merge(base, list(models), RULES["tadrop-ties"](), shardings=shardings)

    run = merge.lower(placed, *others).compile()
    check_crossings([run.as_text()], base["kernel"].size // 8)
    check_equal("tadrop-ties", base, placed, run(placed, *others), on_one_device("tadrop-ties"))


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_gradients_inside_jit(kind, trees):
    """Of a coefficient that is closed over, and of the models, through sums that cross devices."""
    base, models = trees

    def loss(coefficient, models, base, shardings=None):
        rule = tj.chain(tj.tadrop(), tj.task_arithmetic(coefficient))
        merged = tj.merge(base, models, rule, shardings=shardings)
        return sum(jnp.sum(jnp.sin(v)) for v in merged.values())

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.3, models, base)
    placed, others = spread(base, "partly", kind), [spread(m, "partly", kind) for m in models]
    shardings = jax.tree.map(lambda x: x.sharding, placed) if kind == AxisType.Auto else None
    found = jax.jit(jax.grad(lambda *args: loss(*args, shardings), argnums=(0, 1)))(0.3, others, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_shardings_place_arrays_of_the_host(trees, on_one_device):
    base, models = trees
    to = jax.tree.map(lambda x: x.sharding, spread(base, "4x2"))
    merged = tj.merge(base, models, RULES["ties-authors"](), shardings={"kernel": to["kernel"], "bias": None})
    np.testing.assert_allclose(merged["kernel"], on_one_device("ties-authors")["kernel"], rtol=2e-6, atol=1e-6)
    assert merged["kernel"].sharding.is_equivalent_to(to["kernel"], 2)
    assert merged["bias"].sharding.is_fully_replicated
    for wrong, said in (
        ({"other": to["bias"]}, "'other'"),
        ({"bias": to["kernel"]}, r"'bias' of shape \[16\]"),
        ({"bias": PartitionSpec("a")}, "NamedSharding"),
    ):
        with pytest.raises(MergeError, match=said):
            tj.merge(base, models, RULES["average"](), shardings=wrong)


def test_rows_and_groups_in_pytorch_order(trees):
    """A kernel ``(in, out)`` whose rows in PyTorch are its columns: they are whole where ``out`` is split."""
    base, models = trees
    kernel, others = {"kernel": base["kernel"]}, [{"kernel": m["kernel"]} for m in models]
    layout = {"kernel": (1, 0)}
    for rule in (tj.breadcrumbs(0.5, 0.1), tj.rescale(tj.chain(tj.n_m(2, 6), tj.breadcrumbs(0.5, 0.1)))):
        whole = tj.chain(rule, tj.average())
        merged = tj.merge(spread(kernel, "partly"), [spread(m, "partly") for m in others], whole, layout=layout)
        wanted = tj.merge(kernel, others, whole, layout=layout)["kernel"]
        np.testing.assert_array_equal(merged["kernel"] != base["kernel"], wanted != base["kernel"])
        np.testing.assert_allclose(merged["kernel"], wanted, rtol=2e-6, atol=1e-6)


def test_statistics_of_rows_lie_with_their_rows(trees):
    """A step of one's own with a stage of scope "row"."""
    base, models = trees
    top = tj.Sums(lambda x, c, n: {"sum": x.stack}, scope="row")
    step = tj.Step(apply=lambda x, c: jnp.where(c["sum"] > 0, x.stack, 0), stages=(top,), piece="row")
    rule = tj.chain(step, tj.ties(0.3, flavour="mergekit"))
    wanted = tj.merge(base, models, rule)
    for layout in ("8", "4x2"):
        merged = tj.merge(spread(base, layout), [spread(m, layout) for m in models], rule)
        np.testing.assert_allclose(merged["kernel"], wanted["kernel"], rtol=2e-6, atol=1e-6)


def test_one_tensor_at_a_time_is_gathered(monkeypatch):
    """Of three tensors that a step wants whole, two are never held on every device at once."""
    base, models = family(2, {f"k{i}": (16, 8) for i in range(3)})
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    put = dict.fromkeys(base, NamedSharding(mesh, PartitionSpec("a")))
    held: list[weakref.ref] = []
    most = 0
    place = memory.place

    def watched(leaf, to):
        nonlocal most
        found = place(leaf, to)
        if to.is_fully_replicated:
            held.append(weakref.ref(found))
            most = max(most, sum(r() is not None for r in held))
        return found

    monkeypatch.setattr(memory, "place", watched)
    whole = tj.Step(apply=lambda x, carry: x.stack[0], piece="tensor", output="vector")
    tj.merge(jax.device_put(base, put), [jax.device_put(m, put) for m in models], whole)
    assert len(held) == 3 * 3
    assert most == 3


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
def test_what_was_gathered_goes_back(kind):
    """Of parameters, of task vectors, and of the one vector that is made of those."""
    trees = [spread({"kernel": w}, "4x2", kind) for w in np.ones((3, 64, 48), np.float32)]
    whole = tj.Step(apply=lambda x, carry: x.stack[0], piece="tensor", output="vector")
    lies = trees[0]["kernel"].sharding
    stack = jax.device_put(
        tj.task_vectors(trees[0], trees[1:]), NamedSharding(lies.mesh, PartitionSpec(None, *lies.spec))
    )
    for merged in (tj.merge(trees[0], trees[1:], whole), tj.merge_task_vectors(stack, whole)):
        assert merged["kernel"].sharding.is_equivalent_to(lies, 2)


@pytest.mark.parametrize("name", ["tadrop-ties", "emr", "n_m"])
def test_donated_models(name, trees, on_one_device):
    """The result takes the place of the first model, and nothing is left of the others; the base stays."""
    base, models = trees
    placed, others = spread(base, "4x2"), [spread(m, "4x2") for m in models]
    shared = others[0]["bias"] = others[1]["bias"]
    at = [p.unsafe_buffer_pointer() for p in (s.data for s in others[0]["kernel"].addressable_shards)]
    merged = tj.merge(placed, others, RULES[name](), donate=True)
    assert all(m["kernel"].is_deleted() for m in others)
    assert not shared.is_deleted()
    assert not placed["kernel"].is_deleted()
    if name == "emr":
        wanted = on_one_device(name).unified["kernel"]
        np.testing.assert_allclose(merged.unified["kernel"] != 0, wanted != 0)
        return
    np.testing.assert_allclose(merged["kernel"], on_one_device(name)["kernel"], rtol=2e-6, atol=1e-6)
    assert [s.data.unsafe_buffer_pointer() for s in merged["kernel"].addressable_shards] == at


def test_arrays_that_share_memory_are_not_donated():
    """A frozen tensor that was put on all devices three times: three arrays, with one buffer where it lay before."""
    frozen = jnp.ones(16)
    base, *models = ({"moved": jnp.full((16, 8), float(i)), "frozen": frozen} for i in range(3))
    everywhere = NamedSharding(jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,)), PartitionSpec())
    base, *models = jax.device_put((base, *models), everywhere)
    places = {tree["frozen"].addressable_shards[0].data.unsafe_buffer_pointer() for tree in (base, *models)}
    assert len(places) == 1
    merged = tj.merge(base, models, tj.average(), donate=True)
    np.testing.assert_array_equal(merged["frozen"], np.ones(16))
    np.testing.assert_array_equal(base["frozen"], frozen)
    np.testing.assert_array_equal(merged["moved"], np.full((16, 8), 1.5))
    assert all(model["moved"].is_deleted() for model in models)


def test_memory_of_a_donated_merge():
    """By XLA's account the result takes no room of its own; what is temporary goes with the part, not the tensor."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    part = 4 * 64 * 48 // 8
    found = account(RULES["tadrop-ties"](), (64, 48), np.float32, 2, mesh, PartitionSpec("a", "b"), True)
    assert found["argument"] == 3 * part
    assert found["in place"] == found["output"] == part
    assert found["temporary"] < 3 * 2 * part + 2048


def test_donation_is_refused_inside_jit(trees):
    base, models = trees
    with pytest.raises(MergeError, match="donate the arguments of your own jit"):
        jax.jit(lambda b, *m: tj.merge(b, list(m), tj.average(), donate=True))(base, *models)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["4x2", "partly"])
def test_selections_of_a_sharded_array(kind, layout):
    x = np.random.default_rng(0).normal(size=SHAPES["kernel"]).astype(np.float32)
    placed, sizes = spread({"kernel": x}, layout, kind)["kernel"], np.abs(x)
    selections = {
        "k-th": (lambda x: tj.kth_largest_magnitude(x, 100), np.sort(sizes, axis=None)[-100]),
        "of rows": (lambda x: tj.kth_largest_magnitude(x, 7, axis=1), np.sort(sizes)[:, -7]),
        "quantile": (lambda x: tj.magnitude_quantile(x, 0.75, "lower"), np.quantile(sizes, 0.75, method="lower")),
    }
    for name, (select, expected) in selections.items():
        np.testing.assert_array_equal(select(placed), expected, err_msg=name)
        compiled = jax.jit(select).lower(placed).compile()
        np.testing.assert_array_equal(compiled(placed), expected, err_msg=name)
        assert not operations(compiled.as_text(), "all-gather") + operations(compiled.as_text(), "all-to-all"), name


def test_the_check_sees_a_gather():
    """The pattern that the test above looks for does occur in a program that gathers."""
    x = spread({"kernel": np.zeros((64, 48), np.float32)}, "4x2")["kernel"]
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    text = jax.jit(lambda v: v + 1, out_shardings=everywhere).lower(x).compile().as_text()
    assert operations(text, "all-gather")
    text = jax.jit(lambda v: v.sum()).lower(x).compile().as_text()
    assert {entries(found) for found in operations(text, "all-reduce")} == {1}
