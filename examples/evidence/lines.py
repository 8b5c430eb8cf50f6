"""Accuracy between a base and its fine-tunes, which says whether one model for all tasks can be had at all.

On the straight line from the base to a fine-tune, its own task should not become worse first, or the fine-tune has left
the base's basin; with the task vectors of all tasks added, a task should not lose more than its own brings.

Measured on validation data, since recipes and tasks are chosen by it. Files without the column `part`, those of
docs/results among them, are older and of test data.
"""

from collections.abc import Callable
from pathlib import Path

import jax

import tadrop_jax as tj
from examples.evidence import experiments
from examples.evidence.suites import Suite
from examples.evidence.tables import WAYS

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
FIELDS = ("tasks", "seed", "share", "way", "part", "by_task")
PART = "validation"


def walk(suite: Suite, out: Path, seed: int, progress: Callable[[int, int], None]) -> None:
    """Tests each task at shares of its own task vector, and of the sum of all; appends to a CSV file.

    Args:
        suite: a base and its fine-tunes.
        out: the file; lines that are there already are not computed again.
        seed: of the fine-tunes, for the table.
        progress: is told the number of lines done and of all.
    """
    there = {(line["tasks"], line["seed"], float(line["share"]), line["way"]) for line in experiments.read(out)}
    head = (str(len(suite.tuned)), str(seed))
    stack = tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned])
    vectors = experiments.unstacked(stack)
    total = jax.tree.map(lambda leaf: leaf.sum(0), stack)
    wanted = [(share, way) for share in SHARES for way in WAYS]
    for done, (share, way) in enumerate(wanted, start=1):
        if (*head, share, way) not in there:
            moves = vectors if way == "alone" else [total] * len(vectors)
            models = [experiments.added(suite.base, move, share) for move in moves]
            accuracies = experiments.accuracies(suite, models, PART)
            experiments.append(out, FIELDS, (*head, share, way, PART, experiments.joined(accuracies)))
        progress(done, len(wanted))
