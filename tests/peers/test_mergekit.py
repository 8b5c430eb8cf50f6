"""Every method that mergekit has, against its own function.

Its task vectors and statistics are of the checkpoint's dtype, ours are float32. So bfloat16 tensors are compared with
what its function makes of the same numbers in float32; and, within the stated share of the largest entry, with what it
makes of them in bfloat16.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.peers.trees import BFLOAT16, array, assert_same, family, tensor
from tests.sparsifiers.test_della import KEY, uniforms

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
registry = pytest.importorskip("mergekit.merge_methods.registry")

WEIGHTS = [0.5, 1.25, 2.0, 0.75, 1.0]
MIXED = [0.2, 0.5, 1.0]


class Case(NamedTuple):
    """A rule of ours, and mergekit's method with its parameters.

    Attributes:
      rule: ours.
      method: the name in mergekit's registry.
      parameters: its parameters; a list has one value a model.
      tasks: how many models.
      base: whether mergekit gets the base.
      native: how far its result in bfloat16 may lie from ours, as a share of the largest entry; None where it selects
        other entries, because what it compares is rounded.
      without: tensors that it cannot take.
      rtol: relative tolerance in float32.
    """

    rule: Any
    method: str
    parameters: dict[str, Any]
    tasks: int = 3
    base: bool = True
    native: float | None = 2.0**-6
    without: tuple[str, ...] = ()
    rtol: float = 1e-5


def arithmetic(rule, method: str, weights, tasks: int = 3, native: float | None = 2.0**-6, **parameters) -> Case:
    """A method of mergekit's family of task arithmetic; a number that models have of their own is repeated."""
    given = {
        k: oracles.per_task(v, tasks) if k in ("density", "gamma", "epsilon") else v for k, v in parameters.items()
    }
    without = ("scale",) if method.startswith("della") else ()
    return Case(rule, method, {"weight": weights, **given}, tasks, native=native, without=without)


W = WEIGHTS[:3]
NEGATIVE, BALANCED = [1.0, -0.5, 0.75], [1.0, -1.0, 0.0]
CASES = {
    "linear": Case(tj.average(W), "linear", {"weight": W}, base=False),
    "task_arithmetic": arithmetic(tj.task_arithmetic(0.7, weights=NEGATIVE), "task_arithmetic", NEGATIVE, lambda_=0.7),
    "task_arithmetic balanced": arithmetic(
        tj.task_arithmetic(1.0, weights=BALANCED, normalize=True), "task_arithmetic", BALANCED, normalize=True
    ),
    "ties": arithmetic(tj.ties(0.3, 0.75, weights=W, flavour="mergekit"), "ties", W, density=0.3, lambda_=0.75),
    "ties of densities": arithmetic(tj.ties(MIXED, weights=W, flavour="mergekit"), "ties", W, density=MIXED),
    # int(density * n) is 0: one entry stays.
    "ties of one entry": arithmetic(tj.ties(0.01, weights=W, flavour="mergekit"), "ties", W, density=0.01),
    "ties negative": arithmetic(
        tj.ties(0.5, weights=NEGATIVE, flavour="mergekit", combine="sum"),
        "ties",
        NEGATIVE,
        density=0.5,
        normalize=False,
    ),
    "ties balanced": arithmetic(tj.ties(1.0, weights=BALANCED, flavour="mergekit"), "ties", BALANCED, density=1.0),
    "ties of one model": arithmetic(tj.ties(0.3, weights=[0.7], flavour="mergekit"), "ties", [0.7], 1, density=0.3),
    "breadcrumbs": arithmetic(
        tj.breadcrumbs_merging(0.5, 0.2, 0.75, weights=W, flavour="mergekit"),
        "breadcrumbs",
        W,
        density=0.5,
        gamma=0.2,
        lambda_=0.75,
    ),
    "breadcrumbs rescaled": arithmetic(
        tj.breadcrumbs_merging(0.9, 0.25, 1.0, weights=W, normalize=True, rescale=True, flavour="mergekit"),
        "breadcrumbs",
        W,
        density=0.9,
        gamma=0.25,
        normalize=True,
        rescale=True,
    ),
    "breadcrumbs_ties": arithmetic(
        tj.breadcrumbs_ties(0.5, 0.2, weights=W), "breadcrumbs_ties", W, density=0.5, gamma=0.2
    ),
    "della": arithmetic(
        tj.della_merging(0.5, 0.15, 0.75, weights=W, flavour="mergekit"),
        "della",
        W,
        density=0.5,
        epsilon=0.15,
        lambda_=0.75,
        native=None,
    ),
    "della_linear": arithmetic(
        tj.della_linear(0.5, 0.15, weights=W, rescale=None),
        "della_linear",
        W,
        density=0.5,
        epsilon=0.15,
        rescale=False,
        native=None,
    ),
    "dare_linear": arithmetic(tj.dare_linear(0.5, 0.75, weights=W), "dare_linear", W, density=0.5, lambda_=0.75),
    "dare_ties": arithmetic(
        tj.dare_ties(0.5, weights=W, normalize=True), "dare_ties", W, density=0.5, normalize=True, native=None
    ),
    "sce": Case(tj.sce(0.4), "sce", {"select_topk": 0.4}, native=2.0**-5),
    "sce of all": Case(tj.sce(1.0), "sce", {"select_topk": 1.0}, tasks=2, native=2.0**-5),
    "ram": Case(tj.ram(0.3), "ram", {"epsilon": 0.3}),
    "ram_plus": Case(tj.ram_plus(0.3, 0.5, threshold=0.3), "ramplus_tl", {"r": 0.3, "alpha": 0.5, "epsilon": 0.3}),
    "slerp": Case(tj.slerp(0.3), "slerp", {"t": 0.3}, tasks=1),
    "slerp to the model": Case(tj.slerp(1.0), "slerp", {"t": 1.0}, tasks=1),
    # Rows of three and four entries are nearly opposite here and there, where float32 holds an angle less well.
    "nuslerp": Case(tj.nuslerp([0.3, 0.9]), "nuslerp", {"weight": [0.3, 0.9]}, tasks=2, native=2.0**-5),
    "nuslerp of rows": Case(
        tj.nuslerp([0.3, 0.9], granularity="row"),
        "nuslerp",
        {"weight": [0.3, 0.9], "nuslerp_flatten": False},
        tasks=2,
        native=None,
        rtol=1e-3,
    ),
    "nuslerp of columns": Case(
        tj.nuslerp([2.0, -1.0], granularity="column", space="weights"),
        "nuslerp",
        {"weight": [2.0, -1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        tasks=2,
        base=False,
        native=None,
        rtol=1e-3,
    ),
    # The signs of the scalar balance out to rounding, which mergekit takes for a direction.
    "multislerp": Case(
        tj.multislerp(WEIGHTS), "multislerp", {"weight": WEIGHTS}, tasks=5, native=2.0**-5, without=("scale",)
    ),
    "multislerp of weights": Case(
        tj.multislerp([0.3, 0.9], space="weights", normalize=False),
        "multislerp",
        {"weight": [0.3, 0.9], "normalize_weights": False},
        tasks=2,
        base=False,
        native=2.0**-5,
    ),
    "karcher": Case(tj.karcher(), "karcher", {}, tasks=5, base=False, native=2.0**-5),
    "nearswap": Case(tj.nearswap(0.25), "nearswap", {"t": 0.25}, tasks=1),
    "nearswap of nothing": Case(tj.nearswap(1e-7), "nearswap", {"t": 1e-7}, tasks=1),
    "arcee_fusion": Case(tj.arcee_fusion(), "arcee_fusion", {}, tasks=1, native=None),
    "model_stock": Case(tj.model_stock(), "model_stock", {}, tasks=5, native=2.0**-5),
    # The rows that it wants have an axis.
    "model_stock of rows": Case(
        tj.model_stock(filter_wise=True),
        "model_stock",
        {"filter_wise": True},
        native=None,
        without=("scale",),
        rtol=1e-4,
    ),
}


@pytest.fixture(autouse=True)
def stable(monkeypatch):
    """Which of equal magnitudes stays is up to mergekit's sorts; with stable ones it is the first, as in ours."""
    sort = torch.sort

    def topk(x, k, dim=-1, largest=True):
        return (found[..., :k] for found in sort(x, dim=dim, descending=largest, stable=True))

    monkeypatch.setattr(torch, "topk", topk)
    monkeypatch.setattr(torch, "sort", lambda x, dim=-1, **how: sort(x, dim=dim, stable=True, **how))
    monkeypatch.setattr(torch, "argsort", lambda x, dim=-1, **how: sort(x, dim=dim, stable=True, **how).indices)


def theirs(case: Case, base, models, monkeypatch, dtype=None) -> dict:
    """What mergekit makes of each tensor, its masks drawn from our random numbers."""
    from mergekit.merge_methods.base import TensorGroup

    merged = {}
    for name in base:
        drawn = iter([uniforms(name, t, base[name].shape) for t in range(len(models))])

        def bernoulli(p, drawn=drawn):
            return (tensor(next(drawn)).reshape(p.shape) < p).to(p.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        rows = [tensor(row[name], dtype) for row in ([base] if case.base else []) + models]
        group = TensorGroup.from_tensors(rows, base_index=0 if case.base else None)
        parameters = {k.rstrip("_"): v for k, v in case.parameters.items()}
        merged[name] = array(registry.get(case.method)([group], parameters=parameters)[0])
    return merged


@pytest.mark.parametrize("kind", ["exact", "normal"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_mergekit(name, kind, make_stacks, monkeypatch):
    case = CASES[name]
    base, models = family(make_stacks, kind, case.tasks, case.without)
    merged = tj.merge(base, models, case.rule, key=KEY)
    in_float32 = theirs(case, base, models, monkeypatch, np.float32)
    assert_same(merged, in_float32, rtol=case.rtol)
    if case.native is None:
        return
    half = {n: x for n, x in base.items() if x.dtype == BFLOAT16}
    for tensor_name, expected in theirs(case, half, models, monkeypatch).items():
        atol = case.native * float(np.abs(expected).max())
        np.testing.assert_allclose(
            np.asarray(merged[tensor_name], np.float32), expected, atol=atol, err_msg=tensor_name
        )


def test_every_method_of_mergekit_is_compared():
    """A method that mergekit gains has to be looked at."""
    names = {method.spec.name for method in registry.registered_methods()}
    assert names - {case.method for case in CASES.values()} == {"passthrough"}


@pytest.mark.parametrize("weights", [W, NEGATIVE])
def test_the_oracle_is_mergekit(weights, make_stacks, monkeypatch):
    # Of a scalar mergekit keeps the entry where int(density * n) is 0; the oracle has the count of the formula.
    base, models = family(make_stacks, "exact", 3, without=("block/bias", "conv/half", "scale"))
    deltas = {name: np.stack([model[name] - base[name] for model in models]) for name in base}
    for density in (0.3, 1.0, MIXED):
        case = arithmetic(None, "ties", weights, density=density, lambda_=0.75)
        merged = theirs(case, base, models, monkeypatch)
        ours = oracles.ties(deltas, density, 0.75, weights=weights, flavour="mergekit")
        assert_same({name: base[name] + ours[name] for name in ours}, merged)
