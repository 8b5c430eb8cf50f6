"""How near what EMR-Merging restores for a task is to the task's own vector: what is lost before anything is judged."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import tadrop_jax as tj
from examples.evidence import experiments
from examples.evidence.suites import Suite

FIELDS = ("tasks", "seed", "sparsifier", "length", "error", "cosine")


def compare(suite: Suite, out: Path, seed: int, names: Sequence[str], progress: Callable[[int, int], None]) -> None:
    """Restores each task's vector after each sparsifier, and appends a line to a CSV file.

    By task: the 2-norm of its own vector, as a share of the base's; that of what is restored less its own, as a share
    of its own; the cosine between the two.

    Args:
        suite: a base and its fine-tunes.
        out: the file; lines that are there already are not computed again.
        seed: of the fine-tunes, for the table, and of what is random.
        names: of `experiments.sparsifiers`.
        progress: is told the number of lines done and of all.
    """
    there = {(line["tasks"], line["seed"], line["sparsifier"]) for line in experiments.read(out)}
    head = (str(len(suite.tuned)), str(seed))
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    own = [_flat(vector) for vector in experiments.unstacked(stack)]
    norm = np.linalg.norm(_flat(suite.base))
    ways = experiments.sparsifiers(suite, stack, seed=seed)
    for done, name in enumerate(names, start=1):
        if (*head, name) not in there:
            bundle = tj.merge_task_vectors(ways[name]().stack, tj.emr(), layout=suite.layout)
            found = [_flat(bundle.task_vector(t)) for t in range(len(own))]
            columns = (
                [np.linalg.norm(vector) / norm for vector in own],
                [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, own, strict=True)],
                [a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) for a, b in zip(found, own, strict=True)],
            )
            experiments.append(out, FIELDS, (*head, name, *map(experiments.joined, columns)))
        progress(done, len(names))


def _flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
