"""Every rule after every sparsifier: merged through the public API, tuned on validation data, reported on test data.

The coefficient is tuned the same way for every arm, and does not see how large an arm's task vectors are: the merged
vector is tried at lengths from .03 to 17 of the mean length of the task vectors before anything was pruned, and what is
best on validation data is tested. Per-task rules (EMR, T-Switch, TALL) have no coefficient.
"""

import csv
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import tadrop_jax as tj
from examples.evidence import arms, learned
from examples.evidence.arms import Stack
from examples.evidence.suites import Suite, accuracy
from examples.evidence.training import shuffled

LENGTHS = tuple(round(0.35 * 1.35**i, 3) for i in range(-8, 14))
QUANTILES = ((0.25, 0.75), (0.5, 0.9), (0.75, 0.95), (0.9, 0.99), (0.95, 0.99), (0.98, 0.998))
# TADrop's other choices that are ours, one at a time.
SETTINGS: dict[str, dict[str, Any]] = {
    "norm 1": {"norm": 1},
    "no norm": {"norm": None},
    "power 0.5": {"mapping": "power:0.5"},
    "power 2": {"mapping": "power:2"},
    "steep": {"mapping": "affine:3,-1.2"},
}
FIELDS = ("tasks", "seed", "rule", "sparsifier", "sparsity", "length", "validation", "test", "by_task")
# What is compared unless asked otherwise: TADrop with its controls, and the library's other sparsifiers.
MAIN = (
    *("none", "TADrop 0.95/0.99", "uniform of 0.95/0.99", "shuffled of 0.95/0.99", "reversed of 0.95/0.99"),
    *("scaling alone of 0.95/0.99", "TADrop 0.75/0.95", "uniform", "magnitude 0.5", "magnitude 0.2", "n:m 16:32"),
    *("DARE 0.5", "dominance 0.5", "uniform 0.7"),
)
DESCRIBED = ((0.75, 0.95), (0.95, 0.99))  # TADrop's quantiles on the page, and the library's default
RATIOS = ("tasks", "seed", "quantiles", "tensor", "entries", "ratio", "sd_over_tasks", "sparsity", "conflict")


class Arm(NamedTuple):
    """Sparsified task vectors and the share of all entries that was pruned."""

    stack: Stack
    sparsity: float


class Result(NamedTuple):
    """A merge's accuracies: on validation data (mean), on test data (mean and by task); the length that was chosen."""

    length: float | None
    validation: float
    test: float
    by_task: tuple[float, ...]


RULES: dict[str, Callable[[], Any]] = {
    "task arithmetic": lambda: tj.task_arithmetic(1.0),
    "TIES": lambda: tj.ties(density=None),
    "consensus": lambda: tj.consensus(),
    "PCB": lambda: tj.pcb(),
    "TSV-M": lambda: tj.tsv_m(),
    "Iso-C": lambda: tj.iso_c(),
    "SVC": lambda: tj.svc(tj.task_arithmetic(1.0)),
    "TIES, SVC": lambda: tj.svc(tj.ties(density=None)),
    "TSV-M, SVC": lambda: tj.svc(tj.tsv_m()),
    "EMR": lambda: tj.emr(),
    "TALL": lambda: tj.tall(),
    "T-Switch": lambda: tj.t_switch(density=None),
}
# A rule's own trimming, in place of a sparsifier.
OWN: dict[str, Callable[[], Any]] = {
    "TIES": lambda: tj.ties(0.2),
    "T-Switch": lambda: tj.t_switch(),
    "CABS": lambda: tj.cabs(),
}


def adamerging(
    suite: Suite, stack: Stack, start: float = 0.3, rate: float = 1e-2, steps: int = 100, size: int = 16
) -> Result:
    """Learns a coefficient for each tensor and task on the validation inputs, without their labels; tests.

    The authors take 500 steps of Adam at .001 on test inputs; these are 100 at .01. All coefficients begin at `start`,
    the authors' by default.
    """

    def logits(tuned):
        return lambda params, inputs: tuned.encode(params, inputs) @ tuned.head.kernel + tuned.head.bias

    def batches(tuned):
        index = shuffled(len(tuned.task.validation.labels), size, seed=0)
        return lambda step: tuned.task.validation.take(index(step)).inputs

    models = [added(suite.base, vector) for vector in unstacked(stack)]
    functions, inputs = [logits(tuned) for tuned in suite.tuned], [batches(tuned) for tuned in suite.tuned]
    found = tj.adamerging(functions, inputs, suite.base, models, init=start, steps=steps, learning_rate=rate)
    return _judged(suite, [found.params] * len(suite.tuned))


def adamerging_from_the_best(suite: Suite, stack: Stack, rates: Sequence[float] = (1e-2,)) -> Result:
    """AdaMerging from Task Arithmetic's best coefficient, at the best of some rates; both by validation labels."""
    unit = _mean_length(tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned]))
    merged = tj.merge_task_vectors(stack, tj.task_arithmetic(1.0), layout=suite.layout)
    factor = unit / _length(merged)
    length = _tuned_length(suite, merged, factor)
    found = (adamerging(suite, stack, min(length * factor, 1.0), rate) for rate in rates)
    return max(found, key=lambda result: result.validation)._replace(length=length)


# Rules that learn: of the suite and the task vectors, the result. They take as long as some hundred evaluations.
LEARNED: dict[str, Callable[[Suite, Stack], Result]] = {
    "AdaMerging": adamerging,
    "AdaMerging, tuned start": adamerging_from_the_best,
    "AdaMerging, tuned": functools.partial(adamerging_from_the_best, rates=(1e-2, 1e-3, 1e-4)),
}


def sparsifiers(
    suite: Suite, stack: Stack, quantiles: tuple[float, float] = (0.75, 0.95), seed: int = 0
) -> dict[str, Callable[[], Arm]]:
    """Every way to sparsify: the library's methods, TADrop's controls and the candidates at TADrop's budget.

    Args:
        suite: the base and the fine-tunes.
        stack: their task vectors.
        quantiles: TADrop's, which set the budget of controls and candidates; "of LOW/HIGH" has the budget of others.
        seed: of what is random: DARE's masks, and which tensor gets which sparsity where they are shuffled.
    """
    shares_of = functools.cache(functools.partial(arms.tadrop_shares, stack))
    shares = functools.partial(shares_of, *quantiles)
    controls = arms.CONTROLS | {"shuffled": functools.partial(arms.shuffled, seed=seed)}

    def library(sparsifier):
        return lambda: _counted(stack, tj.sparsify(stack, sparsifier, layout=suite.layout, key=jax.random.key(seed)))

    def spread(how, quantiles=quantiles):
        return lambda: _counted(stack, arms.prune(stack, how(stack, shares_of(*quantiles))))

    def scaled(quantiles=quantiles):
        return lambda: Arm(arms.scaled_only(stack, arms.prune(stack, shares_of(*quantiles))), 0.0)

    def of_nonzero(low, high):
        return lambda: _counted(stack, arms.prune(stack, arms.nonzero_shares(stack, low, high)))

    found = {"none": lambda: Arm(stack, 0.0)}
    found |= {f"magnitude {density}": library(tj.magnitude(density)) for density in (0.1, 0.2, 0.5)}
    found |= {f"uniform {sparsity}": library(tj.uniform(sparsity)) for sparsity in (0.3, 0.5, 0.7, 0.9)}
    found |= {f"DARE {density}": library(tj.dare(density)) for density in (0.5, 0.8)}
    found |= {"n:m 16:32": library(tj.rescale(tj.n_m(16, 32)))}
    # What CABS is made of, at its density: balanced or not, disjoint or not.
    for name, kept in {"magnitude 3/32": tj.magnitude(3 / 32), "n:m 3:32": tj.n_m(3, 32)}.items():
        found |= {name: library(kept), f"disjoint {name}": library(tj.conflict_aware(kept))}
    found |= {f"TADrop {low}/{high}": library(tj.tadrop(low, high)) for low, high in QUANTILES}
    found |= {f"TADrop {name}": library(tj.tadrop(*quantiles, **setting)) for name, setting in SETTINGS.items()}
    found |= {f"TADrop of nonzero {low}/{high}": of_nonzero(low, high) for low, high in ((0.75, 0.95), (0.95, 0.99))}
    found |= {"learned for EMR": lambda: _counted(stack, arms.prune(stack, learned.shares(suite, stack)))}
    found |= {"scaling alone": scaled()}
    found |= {"dominance": lambda: library(tj.dominance(arms.dominance_shares(stack, shares())))()}
    found |= {f"dominance {share}": library(tj.dominance(share)) for share in (0.3, 0.4, 0.5, 0.6, 0.8)}
    found |= {"dominance 0.5, no norm": library(tj.dominance(0.5, norm=None))}
    found |= {
        "uniform of dominance 0.5": lambda: _counted(stack, arms.pruned_as(stack, found["dominance 0.5"]().stack))
    }
    for other in QUANTILES:
        if other != quantiles:
            pair = f"{other[0]}/{other[1]}"
            found |= {f"{name} of {pair}": spread(how, other) for name, how in controls.items()}
            found |= {f"scaling alone of {pair}": scaled(other)}
    return found | {name: spread(how) for name, how in (controls | arms.CANDIDATES).items()}


def wanted(rules: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """The merges to make, pairs of a sparsifier and a rule: each after each, and what rules trim of their own.

    Args:
        rules: names out of `RULES`, `OWN` and `LEARNED`.
        names: of `sparsifiers`.
    """
    found = [("own", rule) for rule in rules if rule in OWN]
    return found + [(name, rule) for name in names for rule in rules if rule in RULES or rule in LEARNED]


def run(
    suite: Suite, out: Path, seed: int, merges: Sequence[tuple[str, str]], progress: Callable[[int, int], None]
) -> None:
    """Merges and judges, and appends a line for each pair of rule and sparsifier to a CSV file.

    Args:
        suite: a base and its fine-tunes.
        out: the file; lines that are there already are not computed again.
        seed: of the fine-tunes, for the table.
        merges: of `wanted`.
        progress: is told the number of merges done and of all.
    """
    there = {(line["tasks"], line["seed"], line["rule"], line["sparsifier"]) for line in read(out)}
    head = (str(len(suite.tuned)), str(seed))
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    unit, ways = _mean_length(stack), sparsifiers(suite, stack, seed=seed)
    arm_of = functools.lru_cache(1)(lambda name: ways[name]())
    for done, (name, rule) in enumerate(merges, start=1):
        if (*head, rule, name) not in there:
            arm, how = (Arm(stack, 0.0), OWN) if name == "own" else (arm_of(name), RULES)
            result = LEARNED[rule](suite, arm.stack) if rule in LEARNED else judge(suite, arm.stack, how[rule](), unit)
            line = (*head, rule, name, f"{arm.sparsity:.4f}", *_written(result))
            append(out, FIELDS, line)
        progress(done, len(merges))


def judge(suite: Suite, stack: Stack, rule: Any, unit: float) -> Result:
    """Merges by a rule, chooses the length on validation data, and tests.

    Args:
        suite: a base and its fine-tunes.
        stack: their task vectors, sparsified.
        rule: of the library, on task vectors, its coefficient 1.
        unit: of the lengths that are tried: the same for all arms, whatever is left of their task vectors.
    """
    merged = tj.merge_task_vectors(stack, rule, layout=suite.layout)
    if isinstance(merged, tj.Bundle):
        models = [added(suite.base, merged.task_vector(t)) for t in range(len(suite.tuned))]
        return _judged(suite, models)
    factor = unit / _length(merged)
    length = _tuned_length(suite, merged, factor)
    return _judged(suite, [added(suite.base, merged, length * factor)] * len(suite.tuned), length)


def _tuned_length(suite: Suite, merged, factor: float) -> float:
    """The best of `LENGTHS` on validation data, of which `factor` times a merged vector is one."""

    def value(length):
        model = added(suite.base, merged, length * factor)
        return float(np.mean(accuracies(suite, [model] * len(suite.tuned), "validation")))

    return best_length(value)


def best_length(value: Callable[[float], float]) -> float:
    """The best of `LENGTHS`: every third is tried, then those next to the best of them.

    Validation accuracies are steps of noise, in which a climb from one length to the next may stop anywhere.

    Args:
        value: of a length; it is computed once for each.
    """
    every = range(1, len(LENGTHS), 3)
    value = functools.cache(value)
    best = max(every, key=lambda i: value(LENGTHS[i]))
    near = range(max(best - 2, 0), min(best + 3, len(LENGTHS)))
    return max((LENGTHS[i] for i in near), key=value)


def read(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a CSV file, none if there is no such file."""
    if path.exists():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def append(path: Path, fields: Sequence[str], *lines: Sequence) -> None:
    """Adds lines to a CSV file; the names of their fields come first if the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(fields)
        writer.writerows(lines)


def _written(result: Result) -> tuple:
    length = "" if result.length is None else result.length
    return length, f"{result.validation:.5f}", f"{result.test:.5f}", joined(result.by_task)


def joined(values: Sequence[float]) -> str:
    """One number a task, as they stand in a table."""
    return " ".join(f"{value:.4f}" for value in values)


def accuracies(suite: Suite, models: Sequence, part: str) -> tuple[float, ...]:
    """Each task's accuracy under its model, on its "validation" or "test" data."""
    pairs = zip(suite.tuned, models, strict=True)
    return tuple(accuracy(tuned, model, getattr(tuned.task, part)) for tuned, model in pairs)


def _judged(suite: Suite, models: list, length: float | None = None) -> Result:
    validation, test = (accuracies(suite, models, part) for part in ("validation", "test"))
    return Result(length, float(np.mean(validation)), float(np.mean(test)), test)


def _counted(before: Stack, after: Stack) -> Arm:
    there = [sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree)) for tree in (before, after)]
    return Arm(after, 1 - there[1] / max(there[0], 1))


def unstacked(stack: Stack) -> list:
    """The task vectors one by one."""
    return [jax.tree.map(lambda leaf, t=t: leaf[t], stack) for t in range(len(jax.tree.leaves(stack)[0]))]


@jax.jit
def added(base, vector, factor=1.0):
    """The base plus a factor times a task vector."""
    return jax.tree.map(lambda b, v: b + factor * v, base, vector)


@jax.jit
def _lengths(stack) -> jax.Array:
    """The 2-norm of each task's whole vector, (T,)."""
    return sum(jax.numpy.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(stack)) ** 0.5


def _length(vector) -> float:
    """The 2-norm of one whole vector; never zero."""
    return max(float(_lengths(jax.tree.map(lambda leaf: leaf[None], vector))[0]), 1e-30)


def _mean_length(stack) -> float:
    """The mean over tasks of the 2-norm of a whole task vector."""
    return float(jax.numpy.mean(_lengths(stack)))


def describe(suite: Suite, out: Path, seed: int) -> None:
    """Appends each tensor's quantile ratio and what TADrop prunes of it to a CSV file, at each of `DESCRIBED`.

    Means over the tasks that change the tensor, and the ratio's standard deviation: a path that a task does not use has
    no distribution.

    Args:
        suite: a base and its fine-tunes.
        out: the file; what it has of as many tasks, the seed and the quantiles is not computed again. One that an older
            version wrote, of one pair of quantiles and an unknown seed, is replaced.
        seed: of the fine-tunes, for the table.
    """
    head = (str(len(suite.tuned)), str(seed))
    if any("quantiles" not in line for line in read(out)):
        out.unlink()
    there = {(line["tasks"], line["seed"], line["quantiles"]) for line in read(out)}
    for low, high in DESCRIBED:
        if (*head, f"{low}/{high}") in there:
            continue
        said = tj.explain(suite.base, [tuned.params for tuned in suite.tuned], tj.tadrop(low, high))
        lines = []
        for (name, row), leaf in zip(said.items(), jax.tree.leaves(suite.base), strict=True):
            used = row["norm"] > 0
            if used.any():
                ratio, sparsity = row["quantile_ratio"][used], row["sparsity"][used]
                means = (np.mean(ratio), np.std(ratio), np.mean(sparsity), np.mean(row["sign_conflict"]))
                lines.append((*head, f"{low}/{high}", name, leaf.size, *(f"{value:.4f}" for value in means)))
        append(out, RATIOS, *lines)
