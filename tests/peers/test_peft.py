"""The functions of ``peft.utils.merge_utils``, which merge task vectors. They compute in the dtype of the tensors."""

import jax.numpy as jnp
import numpy as np
import pytest

import tadrop_jax as tj
from tests import oracles
from tests.peers.trees import BFLOAT16, TENSORS, array, assert_same, tensor
from tests.sparsifiers.test_della import KEY, uniforms

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:The density")]
torch = pytest.importorskip("torch")
utils = pytest.importorskip("peft.utils.merge_utils")

TASKS = 3
WEIGHTS = {"equal": [1.0] * TASKS, "per_task": [0.5, 1.25, 2.0], "negative": [1.0, -0.5, 0.75]}
PER_TASK, NEGATIVE = WEIGHTS["per_task"], WEIGHTS["negative"]


def dare(density: float):
    return tj.dare(density, "inverse")


# Ours; PEFT's function, and what it takes after the tensors.
CASES = {
    "task_arithmetic": (tj.task_arithmetic(1.0, weights=NEGATIVE), "task_arithmetic", NEGATIVE, ()),
    **{
        f"magnitude_prune {density}": (
            tj.chain(tj.magnitude(density, keep="exact"), tj.task_arithmetic(1.0, weights=PER_TASK)),
            "magnitude_prune",
            PER_TASK,
            (density,),
        )
        for density in (0.0, 0.01, 0.5)
    },
    **{
        f"ties {density} {weights} {method}": (
            tj.ties(density, weights=WEIGHTS[weights], flavour="peft", elect=elect),
            "ties",
            WEIGHTS[weights],
            (density, method),
        )
        for density, weights, method, elect in [
            (0.2, "equal", "total", None),
            (0.5, "per_task", "frequency", "frequency"),
            (0.01, "negative", "total", None),
            (1.0, "negative", "frequency", "frequency"),
        ]
    },
    "dare_linear": (tj.chain(dare(0.5), tj.task_arithmetic(1.0, weights=PER_TASK)), "dare_linear", PER_TASK, (0.5,)),
    "dare_ties": (
        tj.chain(dare(0.25), tj.ties(None, weights=NEGATIVE, flavour="peft")),
        "dare_ties",
        NEGATIVE,
        (0.25,),
    ),
}


@pytest.fixture(autouse=True)
def stable(monkeypatch):
    """Which of several equal magnitudes stays is up to `torch.topk`; here it is the first, as in ours."""

    def topk(x, k, largest=True):
        return [found[:k] for found in torch.sort(x, descending=largest, stable=True)]

    monkeypatch.setattr(torch, "topk", topk)


def task_vectors(make_stacks, kind: str) -> dict[str, np.ndarray]:
    stacks = make_stacks(kind, TASKS)
    stacks["conv/half"] = make_stacks(kind, TASKS, seed=1)["conv/kernel"]
    return {name: stacks[name].astype(dtype) for name, dtype in TENSORS.items()}


def theirs(case, stacks, monkeypatch) -> dict:
    """What PEFT makes of each tensor, in float32, its masks drawn from our random numbers."""
    _, function, weights, arguments = case
    merged = {}
    for name, stack in stacks.items():
        drawn = iter([uniforms(name, t, stack.shape[1:]) for t in range(TASKS)])
        monkeypatch.setattr(torch, "bernoulli", lambda p, drawn=drawn: (tensor(next(drawn)) < p).to(p.dtype))
        rows = [tensor(row, np.float32) for row in stack]
        merged[name] = array(getattr(utils, function)(rows, torch.tensor(weights), *arguments))
    return merged


@pytest.mark.parametrize("name", CASES)
def test_it_is_peft(name, make_stacks, monkeypatch):
    for kind in ("exact", "normal"):
        stacks = task_vectors(make_stacks, kind)
        ours = tj.merge_task_vectors({n: jnp.asarray(x) for n, x in stacks.items()}, CASES[name][0], key=KEY)
        assert_same(ours, theirs(CASES[name], stacks, monkeypatch), rtol=2e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_oracle_is_peft(weights, make_stacks, monkeypatch):
    stacks = {n: x for n, x in task_vectors(make_stacks, "normal").items() if x.dtype != BFLOAT16}
    for density in (0.1, 0.5, 1.0):
        for method, elect in {"total": "unweighted", "frequency": "frequency"}.items():
            expected = theirs((None, "ties", WEIGHTS[weights], (density, method)), stacks, monkeypatch)
            ours = oracles.ties(stacks, density, weights=WEIGHTS[weights], flavour="peft", elect=elect)
            assert_same(ours, expected)
