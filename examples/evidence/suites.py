"""What the suites have in common: tasks with a head each on one shared backbone, and how they are judged."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import converters

Params = Any  # a pytree of arrays: the part of the model that all tasks share
Inputs = Any  # what the backbone takes: a pytree of arrays (N, ...)
Encode = Callable[[Params, Inputs], jax.Array]
MOST = (200, 1000)  # at most so many to validate and to test a task on


class Part(NamedTuple):
    """Inputs, a pytree of arrays `(N, ...)`, and their labels `(N,)`."""

    inputs: Inputs
    labels: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Part":
        """Some of them, in that order."""
        return Part(jax.tree.map(lambda array: array[index], self.inputs), self.labels[index])


class Task(NamedTuple):
    """A classification task: what to train on, to choose coefficients by, to report on; the number of classes."""

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int


def cut(name: str, train: Part, test: Part, *, by_order: bool = False) -> Task:
    """Cuts validation data from the training data; draws what is validated and tested on once and for all.

    Args:
        name: of the task.
        train: to cut from.
        test: to report on.
        by_order: hold out the last fifth of each class, where neighbours are alike, and not a tenth at random.
    """
    rng = np.random.default_rng(0)
    validation = _held_out(train.labels, rng, by_order=by_order)
    parts = (train.take(~validation), train.take(validation), test)
    few = [part.take(rng.permutation(len(part.labels))[:m]) for part, m in zip(parts[1:], MOST, strict=True)]
    return Task(name, parts[0], *few, classes=int(max(part.labels.max() for part in parts)) + 1)


def _held_out(labels: np.ndarray, rng: np.random.Generator, *, by_order: bool) -> np.ndarray:
    """Marks a tenth of each class, or its last fifth."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if by_order:
            held[places[-max(1, len(places) // 5) :]] = True
        else:
            held[rng.choice(places, max(1, len(places) // 10), replace=False)] = True
    return held


class Head(NamedTuple):
    """A linear classifier: kernel `(features, classes)` and bias `(classes,)`."""

    kernel: np.ndarray
    bias: np.ndarray


class Tuned(NamedTuple):
    """A fine-tuned model: its backbone, its head, its task, and how its task's inputs become features `(N, F)`."""

    task: Task
    params: Params
    head: Head
    encode: Encode


class Suite(NamedTuple):
    """A base and its fine-tunes. `layout` is what `tj.merge` takes: tensors' axes in PyTorch order."""

    base: Params
    tuned: list[Tuned]
    layout: Callable | None


def features(encode: Encode, params: Params, inputs: Inputs, size: int = 200) -> np.ndarray:
    """Features `(N, F)` of inputs, computed in batches of one size, so that one compilation serves all tasks.

    Args:
        encode: jitted; of the parameters and a batch.
        params: the backbone.
        inputs: a pytree of arrays `(N, ...)`.
        size: of a batch.
    """
    count = len(jax.tree.leaves(inputs)[0])
    found = []
    for start in range(0, count, size):
        index = np.arange(start, start + size) % count  # the last batch is filled up from the start
        batch = jax.tree.map(lambda array, index=index: array[index], inputs)
        found.append(np.asarray(encode(params, batch)))
    return np.concatenate(found)[:count]


def accuracy(tuned: Tuned, params: Params, part: Part) -> float:
    """The share of right answers that a backbone gives under a task's own head."""
    return share_right(features(tuned.encode, params, part.inputs), tuned.head, part.labels)


def share_right(found: np.ndarray, head: Head, labels: np.ndarray) -> float:
    """The share of features `(N, F)` whose largest logit is that of their label `(N,)`."""
    return float(np.mean((found @ head.kernel + head.bias).argmax(-1) == labels))


def probe(train: np.ndarray, labels: np.ndarray, validation: np.ndarray, held: np.ndarray, classes: int) -> Head:
    """A linear probe: logistic regression on the base's features, its penalty chosen on validation data.

    Args:
        train: features `(N, F)`.
        labels: `(N,)`, every class at least once.
        validation: features `(M, F)`.
        held: their labels `(M,)`.
        classes: the number of classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    heads = []
    mean, scale = train.mean(0), train.std(0) + 1e-6
    with threadpool_limits(2), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a hundred iterations are near enough
        for penalty in (0.01, 0.1, 1.0):
            found = LogisticRegression(C=penalty, max_iter=100, tol=1e-3).fit((train - mean) / scale, labels)
            kernel, bias = found.coef_.T, found.intercept_
            if classes == 2:  # one column, for the second class
                kernel, bias = np.hstack([0 * kernel, kernel]), np.append(0, bias)
            kernel = kernel / scale[:, None]
            heads.append(Head(kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)))
    return max(heads, key=lambda head: share_right(validation, head, held))


def calmed(head: Head, seen: np.ndarray) -> Head:
    """The head with logits of standard deviation one on features `(N, F)`; its answers are the same.

    A probe's own logits are so large that the first steps of a fine-tuning have gradients of norm 50, which undo the
    base before the task is learned.
    """
    scale = float((seen @ head.kernel + head.bias).std())
    return Head(head.kernel / scale, head.bias / scale)


def place(out: Path, recipe: str, seed: int, name: str) -> Path:
    """Where a fine-tune lies: a Hugging Face directory."""
    return out / recipe / f"seed{seed}" / name


def save(directory: Path, model: Any, config: Any, measured: dict[str, float], *, files: Sequence[Path] = ()) -> None:
    """Writes what was measured (`directory`.json), then the model: where the model is, all is.

    Args:
        directory: where to.
        model: what `converters.save` takes.
        config: its configuration.
        measured: numbers by name.
        files: to be copied beside the model.
    """
    part = directory.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    converters.save(part, model, config)
    for file in files:
        shutil.copy(file, part)
    directory.with_suffix(".json").write_text(json.dumps(measured) + "\n")
    part.rename(directory)


def origin(settings: Any) -> dict[str, float]:
    """What a base was made by, as options of the command can say it: another is not taken for it."""
    return {name: getattr(settings, name) for name in ("seed", "share", "width", "layers")}


def class_names(classes: int) -> tuple[str, ...]:
    """The names that Hugging Face gives classes that have none."""
    return tuple(f"LABEL_{i}" for i in range(classes))
