"""The methods that fusion-bench has, as it runs them on modules, or its own functions on their tensors.

What Fisher, RegMean and AdaMerging find in data is compared in ``tests/drivers``.
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests.peers.trees import array, assert_same, family, tensor
from tests.sparsifiers.test_della import KEY, uniforms

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
methods = pytest.importorskip("fusion_bench.method", exc_type=ImportError)

TASKS = 3
WEIGHTS = [0.5, 1.25, 2.0]


def module(tree):
    """A module that holds a tree's tensors in float32."""
    found = torch.nn.Module()
    for name, value in tree.items():
        found.register_parameter(name, torch.nn.Parameter(tensor(value, np.float32)))
    return found


def pool(base, models):
    from fusion_bench import BaseModelPool

    tuned = {f"model {t}": module(model) for t, model in enumerate(models)}
    return BaseModelPool({"_pretrained_": module(base)} | tuned)


def vectors_of(base, models) -> list[dict]:
    return [{n: tensor(m[n], np.float32) - tensor(b, np.float32) for n, b in base.items()} for m in models]


def in_numpy(tree) -> dict:
    return {n: array(x) for n, x in tree.items()}


def ties_of(how: str, scaling: float = 0.3):
    return lambda: methods.TiesMergingAlgorithm(scaling, 20, [], how)


DARE = tj.dare(0.5, "inverse")
# Ours, and the algorithm.
CASES = {
    "simple_average": (tj.average(), lambda: methods.SimpleAverageAlgorithm()),
    "weighted_average": (tj.average(WEIGHTS), lambda: methods.WeightedAverageAlgorithm(True, WEIGHTS)),
    "task_arithmetic": (tj.task_arithmetic(0.3), lambda: methods.TaskArithmeticAlgorithm(0.3)),
    **{f"ties {how}": (tj.ties(0.2, 0.3, combine=how), ties_of(how)) for how in ("mean", "sum", "max")},
    "dare_average": (tj.chain(DARE, tj.average()), lambda: methods.DareSimpleAverage(0.5, False)),
    "dare": (tj.chain(DARE, tj.task_arithmetic(0.3)), lambda: methods.DareTaskArithmetic(0.3, 0.5, False)),
    "dare_ties": (
        tj.chain(DARE, tj.ties(0.2, 0.3, combine="sum")),
        lambda: methods.DareTiesMerging(0.5, False, True, 0.3, 20, [], "sum"),
    ),
    "model_stock": (tj.model_stock("angle"), lambda: methods.ModelStock()),
}


@pytest.mark.parametrize("kind", ["exact", "normal"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_fusion_bench(name, kind, make_stacks, monkeypatch):
    rule, algorithm = CASES[name]
    base, models = family(make_stacks, kind, TASKS)
    drawn = iter([uniforms(n, t, x.shape) for t in range(TASKS) for n, x in base.items()])
    # It keeps what is drawn above the sparsity, ours what is drawn below the density.
    monkeypatch.setattr(torch, "rand_like", lambda x: 1 - tensor(next(drawn)))
    merged = algorithm().run(pool(base, models))
    # Of scalars its cosines fall short of 1 by rounding and by the 1e-8 in their divisor, and the angles show it.
    rtol = 5e-4 if name == "model_stock" else 2e-5
    assert_same(tj.merge(base, models, rule, key=KEY), in_numpy(merged.state_dict()), rtol=rtol)


@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_slerp(kind, make_stacks):
    from fusion_bench.method.slerp.slerp_utils import slerp

    base, (model,) = family(make_stacks, kind, 1)
    theirs = {n: array(slerp(0.3, tensor(x), tensor(model[n]))) for n, x in base.items()}
    assert_same(tj.merge(base, [model], tj.slerp(0.3)), theirs)


@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_emr(kind, make_stacks):
    """Its rescaler of a zero task vector is 0 / 0, and 0 in ours."""
    from fusion_bench.method.emr_merging.utils import emr_merge

    base, models = family(make_stacks, kind, TASKS)
    ours = tj.merge(base, models, tj.emr())
    unified, masks, rescalers = emr_merge(vectors_of(base, models))
    # A bundle keeps the vector in the base's dtype.
    assert_same(ours.unified, in_numpy(unified))
    for t in range(TASKS):
        for name, mask in ours.mask(t).items():
            np.testing.assert_array_equal(mask, masks[name][t].numpy(), err_msg=name)
    zero = 2 if kind == "exact" else None
    for t, (mine, other) in enumerate(zip(ours.rescalers, rescalers.numpy(), strict=True)):
        np.testing.assert_allclose(mine, 0 if t == zero else other, rtol=1e-5)
        assert np.isnan(other) == (t == zero)


@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_tall_masks_and_consensus(kind, make_stacks, monkeypatch):
    """The functions on flat vectors, which are those of TALL's authors."""
    from fusion_bench.method.tall_mask import utils

    base, models = family(make_stacks, kind, TASKS)
    flat = lambda tree: torch.cat([tensor(x, np.float32).ravel() for x in tree.values()])  # noqa: E731
    start, tuned = flat(base), torch.stack([flat(m) for m in models])
    masks = utils.generate_task_masks(tuned - start, tuned, start, tall_mask_lambda=0.4)
    ours = tj.merge(base, models, tj.tall(0.4))
    for t, expected in enumerate(masks):
        found = np.concatenate([np.ravel(x) for x in ours.mask(t).values()])
        where = {n: np.ravel(x).size for n, x in ours.mask(t).items()}
        split = dict(zip(base, torch.split(expected, [x.size for x in base.values()]), strict=True))
        np.testing.assert_array_equal(found, np.concatenate([split[n].numpy() for n in where]))
    named = [dict(zip(base, torch.split(m, [x.size for x in base.values()]), strict=True)) for m in masks]
    monkeypatch.setattr(utils, "load_tall_mask", lambda *_: dict(enumerate(named)))
    agreed = utils.construct_consensus_mask(named[0], 2, SimpleNamespace())  # in the order of sorted names
    names = sorted(base)
    agreed = dict(zip(names, torch.split(agreed, [base[n].size for n in names]), strict=True))
    total = {n: sum(v[n] for v in vectors_of(base, models)) for n in base}
    expected = {n: x.astype(np.float32) + array(total[n] * agreed[n].reshape(x.shape)) for n, x in base.items()}
    assert_same(tj.merge(base, models, tj.consensus(2, 0.4)), expected)


def test_wudi(make_stacks):
    from fusion_bench.method.wudi import wudi_merging

    base, models = family(make_stacks, "normal", TASKS)
    small = [{n: 1e-3 * x for n, x in v.items()} for v in vectors_of(base, models)]
    stack = {n: jnp.asarray(np.stack([array(v[n]) for v in small])) for n in base}
    assert_same(tj.merge_task_vectors(stack, tj.wudi()), in_numpy(wudi_merging(small, accelerator="cpu")), 1e-4, 2e-7)


def test_pruning(make_stacks):
    """Its rows are the tensor here, and the groups of four entries lie in it row by row."""
    from fusion_bench.method.pruning import prune_utils

    stacks = {n: make_stacks("normal", TASKS)[n] for n in ("conv/kernel", "block/kernel")}
    uniform = tj.sparsify(stacks, tj.uniform(0.7, norm=None))
    for name, stack in stacks.items():
        flat = tensor(stack.reshape(TASKS, -1))
        expected = prune_utils.unstructured_magnitude_prune_(flat, torch.abs, 0.7)
        np.testing.assert_array_equal(uniform[name].reshape(TASKS, -1), expected)
    groups = tensor(stacks["conv/kernel"].reshape(-1, 4))
    expected = prune_utils.semistructured_magnitude_prune_(groups, torch.abs, 3, 4)
    ours = tj.sparsify({"conv": stacks["conv/kernel"]}, tj.n_m(1, 4))["conv"]
    np.testing.assert_array_equal(ours.reshape(-1, 4), expected)


@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_singular_values(kind, make_stacks):
    """Without a zero task vector, of which theirs keeps directions: see the table of differences."""
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.singular_value_calibration import utils as calibration
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    base, models = family(make_stacks, kind, 2)
    vectors = vectors_of(base, models)
    # A kernel by another name, to be excluded.
    vectors = [v | {"embedding": v["block/kernel"].flip(0)} for v in vectors]
    stack = {n: np.stack([array(v[n]) for v in vectors]) for n in vectors[0]}
    how, only = {"accelerator": "cpu", "exclude_keys": ["embedding"]}, {"mean_only": "embedding"}
    pairs = [
        (iso_utils.iso_c(vectors, **how), tj.iso_c(**only)),
        (iso_utils.iso_cts(vectors, 0.4, **how), tj.iso_cts(0.4, **only)),
        (TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, **how), tj.tsv_m(**only)),
    ]
    for theirs, rule in pairs:
        assert_same(tj.merge_task_vectors(stack, rule), in_numpy(theirs), rtol=1e-4, atol=2e-5)
    kernels = [v["block/kernel"] for v in vectors]
    theirs = calibration.subspace_consistency_spectral_calibration_accelerated(
        torch.zeros(7, 5), kernels, 0.3 * sum(kernels), alpha=1 / 2, accelerator="cpu"
    )
    ours = tj.merge_task_vectors({"w": stack["block/kernel"]}, tj.svc(tj.task_arithmetic(0.3)))
    assert_same(ours, {"w": array(theirs)}, rtol=1e-4, atol=2e-5)


def test_knots():
    """Its basis, and its TIES in it."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    rng = np.random.default_rng(0)
    pairs = [{"lora_A": rng.normal(size=(2, 6)), "lora_B": rng.normal(size=(5, 2))} for _ in range(2)]
    pairs = [{n: x.astype(np.float32) for n, x in pair.items()} for pair in pairs]
    u, s, parts = subspace_alignment([tensor(p["lora_B"] @ p["lora_A"]) for p in pairs])
    merged = ties_merging(torch.stack([(s[:, None] * part).ravel() for part in parts]), 50, "mean")
    ours = tj.knots([{"q": pair} for pair in pairs], tj.ties(0.5))
    np.testing.assert_allclose(ours["q"], u @ merged.reshape(len(s), -1), rtol=1e-4, atol=1e-5)


def test_its_masks_of_state_dicts_compare_weights_with_a_task_vector():
    """TALL's first difference is that of base and fine-tune; there it is that of base and task vector."""
    from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks

    base, models = {"w": np.ones(2, np.float32)}, [{"w": np.float32([2, 1])}, {"w": np.float32([1, 2])}]
    ours = tj.merge(base, models, tj.tall(0.4))
    vectors = vectors_of(base, models)
    total = {"w": vectors[0]["w"] + vectors[1]["w"]}
    for t, vector in enumerate(vectors):
        theirs = generate_task_masks(total, vector, {"w": tensor(base["w"])}, tall_mask_lambda=0.4)["w"]
        np.testing.assert_array_equal(ours.mask(t)["w"], models[t]["w"] == 2)
        np.testing.assert_array_equal(theirs.numpy() > 0, models[t]["w"] == 1)


@pytest.mark.parametrize("normalize", ["model", None])
@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_fisher(kind, normalize, make_stacks):
    """Its norms of a model cannot take a scalar."""
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    base, models = family(make_stacks, kind, TASKS, without=("scale",) if normalize else ())
    rng = np.random.default_rng(0)
    squares = [{n: np.asarray(rng.integers(0, 9, x.shape) / 4, np.float32) for n, x in base.items()} for _ in models]
    floors = {"floor": 0.05, "floor_on": "added"}
    ours = tj.fisher(None, None, base, models, fishers=squares, weights=WEIGHTS, normalize=normalize, **floors)
    values = {n: [tensor(m[n], np.float32) for m in models] for n in base}
    weights = [{n: tensor(x) for n, x in own.items()} for own in squares]
    theirs = merging_with_fisher_weights(values, weights, torch.tensor(WEIGHTS), normalize is not None, 0.05)
    assert_same(ours.params, in_numpy(theirs))


@pytest.mark.parametrize("kind", ["exact", "normal"])
def test_regmean(kind, make_stacks):
    """Its least squares of the matrix, and the mean of all others."""
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    base, models = family(make_stacks, kind, TASKS)
    name, rng = "block/kernel", np.random.default_rng(0)
    inputs = [rng.normal(size=(64, len(base[name]))).astype(np.float32) for _ in models]
    grams = [x.T @ x for x in inputs]
    ours = tj.regmean(None, None, base, models, scale=0.6, ridge=0.0, grams=[{name: g} for g in grams])
    values = {n: [tensor(m[n], np.float32) for m in models] for n in base if n != name}
    values["block.weight"] = [tensor(m[name], np.float32).T for m in models]
    theirs = merging_with_regmean_weights(values, [{"block": tensor(g)} for g in grams], 0.6)
    found = in_numpy(theirs)
    assert_same(ours.params, {name: found.pop("block.weight").T} | found, rtol=1e-4, atol=1e-5)
