"""The whole story on real data: train a few models of one base, merge them by the command line, compare.

The data are the handwritten digits that scikit-learn ships. A small Flax Vision Transformer learns to read a
number of two digits; copies of it are fine-tuned on questions about the two digits; all are saved as Hugging
Face directories and merged by the commands that are printed. Held-out digits are never trained on, and the
merge coefficients are fixed beforehand: published ones, the same with TADrop as without.
"""

import dataclasses
import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tadrop_jax.errors import MergeError, check_installed
from tadrop_jax.plots import draw_sparsity

_LOOPS = np.array([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])
_PRIME = np.isin(np.arange(10), [2, 3, 5, 7]).astype(int)


class Task(NamedTuple):
    """A question about two digits: the number of answers, and the right one given both digits."""

    classes: int
    label: Callable[[np.ndarray, np.ndarray], np.ndarray]


PRETRAINING = Task(100, lambda left, right: 10 * left + right)
TASKS = {
    "larger": Task(2, lambda left, right: (left > right).astype(int)),
    "same": Task(2, lambda left, right: (left == right).astype(int)),
    "sum": Task(19, lambda left, right: left + right),
    "gap": Task(10, lambda left, right: abs(left - right)),
    "loops": Task(5, lambda left, right: _LOOPS[left] + _LOOPS[right]),
    "primes": Task(3, lambda left, right: _PRIME[left] + _PRIME[right]),
}

_EXCLUDE = ("--exclude", "^classifier")
# Method by method: options, and the same for use with TADrop, which replaces the rule's own trimming.
METHODS = {
    "task_arithmetic": (("--coefficient", "0.3", *_EXCLUDE), ("--coefficient", "0.3", *_EXCLUDE)),
    "ties": (("--density", "0.2", *_EXCLUDE), _EXCLUDE),
    "emr": (("--set", "per_task=^classifier"), ("--set", "per_task=^classifier")),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults give the demo that the documentation shows."""

    tasks: tuple[str, ...] = tuple(TASKS)
    hidden_size: int = 64
    layers: int = 3
    pretraining_steps: int = 1000
    tuning_steps: int = 200
    batch: int = 128
    chunk: int = 50  # steps in one compiled call
    probe_pairs: int = 3000
    test_pairs: int = 2000
    probe_iterations: int = 100


Digits = tuple[np.ndarray, np.ndarray]  # images (N, 8, 8) and what they show (N,)


class Pairs(NamedTuple):
    """Images (N, 8, 16, 1) of two digits side by side, and the digits (N,)."""

    images: np.ndarray
    left: np.ndarray
    right: np.ndarray


def run(out: Path | None = None, settings: Settings | None = None) -> dict[str, list[float]]:
    """Trains, saves, merges and compares; prints one table and draws one picture.

    Args:
        out: directory for the models and results, `tadrop-demo` if None. An earlier demo there is replaced.
        settings: how much of everything.

    Returns:
        Test accuracies by row of the table, one a task.

    Raises:
        MergeError: scikit-learn is absent, a merge fails, or `out` holds anything but an earlier demo.
    """
    check_installed("scikit-learn", "demo", module="sklearn")
    from rich.console import Console

    console = Console()
    settings = settings or Settings()
    out = _prepare(Path("tadrop-demo") if out is None else Path(out))
    train, test = _digits()
    rng = np.random.default_rng(0)
    test_pairs = _pairs(test, settings.test_pairs, rng)
    rows, features = _train_all(out, settings, train, test_pairs, console)
    for method, variants in METHODS.items():
        for options, sparsify in zip(variants, ((), ("--sparsify", "tadrop")), strict=True):
            name = "+".join((*sparsify[1:], method))
            merged = _merge(out, settings.tasks, name, method, (*options, *sparsify), console)
            rows[name] = [
                _accuracy(features(directory), out / task, TASKS[task], test_pairs)
                for task, directory in zip(settings.tasks, merged, strict=True)
            ]
    _print_table(rows, settings.tasks, console)
    (out / "results.json").write_text(json.dumps({"tasks": settings.tasks, "accuracy": rows}, indent=2) + "\n")
    _picture(out, settings.tasks, console)
    return rows


def _prepare(out: Path) -> Path:
    marker = out / ".tadrop-demo"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise MergeError(f"{out}: holds something that is not an earlier demo; choose another directory")
        shutil.rmtree(out)
    (out / "merged").mkdir(parents=True)
    marker.touch()
    return out


def _digits() -> tuple[Digits, Digits]:
    """The 1797 images in [0, 1] with their digits: 1200 to train on, 597 held out."""
    from sklearn.datasets import load_digits

    pixels, digits = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(digits))
    images, digits = (pixels[order].reshape(-1, 8, 8) / 16).astype(np.float32), digits[order]
    return (images[:1200], digits[:1200]), (images[1200:], digits[1200:])


def _pairs(data: Digits, count: int, rng, *, shift: bool = False) -> Pairs:
    """Draws pairs, three in ten of them of the same digit twice. `shift` moves images by up to a pixel."""
    images, digits = data
    left, right = rng.integers(0, len(digits), (2, count))
    for i in np.flatnonzero(rng.random(count) < 0.3):
        right[i] = rng.choice(np.flatnonzero(digits == digits[left[i]]))
    halves = [images[left], images[right]]
    if shift:
        halves = [_shifted(half, rng) for half in halves]
    return Pairs(np.concatenate(halves, axis=2)[..., None], digits[left], digits[right])


def _shifted(images: np.ndarray, rng) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows, columns = (rng.integers(0, 3, (2, len(images), 1)) + np.arange(8)).astype(int)
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _train_all(out: Path, settings: Settings, train: Digits, test: Pairs, console):
    """Pretrains, fine-tunes, saves; returns the table's first rows and a function, directory to features."""
    import jax
    from flax import nnx

    import converters
    from converters.vit import Config
    from converters.vit.model import ViTForImageClassification as Model

    config = Config(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=2 * settings.hidden_size,
        initializer_range=0.1,
        image_size=(8, 16),
        patch_size=4,
        num_channels=1,
        labels=tuple(f"{number:02d}" for number in range(PRETRAINING.classes)),
    )
    graph, params = nnx.split(nnx.jit(lambda: Model(config, rngs=nnx.Rngs(0)))())
    fit = _trainer(graph, settings)
    backbone = nnx.split(nnx.merge(graph, params).vit)[0]
    encode = jax.jit(lambda params, images: nnx.merge(backbone, params)(images)[:, 0])

    def features(directory: Path) -> np.ndarray:
        return np.asarray(encode(nnx.state(converters.load(directory)[0].vit), test.images))

    with console.status("pretraining: read the number"):
        params = fit(params, PRETRAINING, train, settings.pretraining_steps, 2e-3, seed=1)
    converters.save(out / "base", params, config)
    base = features(out / "base")
    console.print(f"base: reads {_accuracy(base, out / 'base', PRETRAINING, test):.1%} of held-out numbers")

    probe = _pairs(train, settings.probe_pairs, np.random.default_rng(2))
    probe_features = np.asarray(encode(params["vit"], probe.images))
    rows: dict[str, list[float]] = {"base, linear probe": [], "fine-tuned": []}
    for seed, name in enumerate(settings.tasks, start=10):
        task = TASKS[name]
        head = _linear_probe(probe_features, task.label(probe.left, probe.right), task, settings.probe_iterations)
        answers = task.label(test.left, test.right)
        rows["base, linear probe"].append(_share(base @ head["kernel"] + head["bias"], answers))
        with console.status(f"fine-tuning: {name}"):
            tuned = nnx.to_pure_dict(fit(_with_head(params, head), task, train, settings.tuning_steps, 1e-3, seed))
        tuned["classifier"] = {"kernel": tuned["classifier"]["kernel"][:, : task.classes]} | {
            "bias": tuned["classifier"]["bias"][: task.classes]
        }
        labels = tuple(str(i) for i in range(task.classes))
        converters.save(out / name, tuned, dataclasses.replace(config, labels=labels))
        rows["fine-tuned"].append(_accuracy(features(out / name), out / name, task, test))
        console.print(f"{name}: probe {rows['base, linear probe'][-1]:.1%}, fine-tuned {rows['fine-tuned'][-1]:.1%}")
    return rows, features


def _trainer(graph, settings: Settings):
    """Gives `fit(params, task, data, steps, peak, seed)`.

    All tasks share one compilation: their heads are as wide as the widest, and the answers that a task does
    not have are masked out of the loss.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.01)

    def loss(params, images, labels, classes):
        logits = nnx.merge(graph, params)(images)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < classes, logits, -1e9)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def several_steps(params, state, images, labels, rates, classes):
        def step(carry, batch):
            params, state = carry
            *data, rate = batch
            state.hyperparams["learning_rate"] = rate
            updates, state = optimiser.update(jax.grad(loss)(params, *data, classes), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (images, labels, rates))[0]

    def fit(params, task: Task, data: Digits, steps: int, peak: float, seed: int):
        rng = np.random.default_rng(seed)
        state = optimiser.init(params)
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        rates = np.asarray(schedule(np.arange(steps)), np.float32).reshape(-1, settings.chunk)
        for chunk in rates:
            drawn = _pairs(data, settings.chunk * settings.batch, rng, shift=True)
            images = drawn.images.reshape(settings.chunk, settings.batch, *drawn.images.shape[1:])
            labels = task.label(drawn.left, drawn.right).reshape(settings.chunk, settings.batch)
            params, state = several_steps(params, state, images, labels, chunk, task.classes)
        return params

    return fit


def _linear_probe(features: np.ndarray, labels: np.ndarray, task: Task, iterations: int) -> dict[str, np.ndarray]:
    """A linear classifier on the base's features: a row of the table, and where fine-tuned heads start."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = LogisticRegression(max_iter=iterations).fit(features, labels)
    kernel, bias = found.coef_.T, found.intercept_
    if len(found.classes_) == 2:  # one column, for the second class
        kernel, bias = np.hstack([0 * kernel, kernel]), np.append(0, bias)
    head = {
        "kernel": np.zeros((features.shape[1], task.classes), np.float32),
        "bias": np.full(task.classes, -1e3, np.float32),  # an answer that never occurs
    }
    head["kernel"][:, found.classes_], head["bias"][found.classes_] = kernel, bias
    return head


def _with_head(params, head: dict[str, np.ndarray]):
    """The parameters with a task's head in the first columns of the wide one."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    copy = jax.tree.map(jnp.copy, params)
    classes = len(head["bias"])
    wide = {name: jnp.zeros_like(a).at[..., :classes].set(head[name]) for name, a in _head(params).items()}
    nnx.replace_by_pure_dict(copy["classifier"], wide)
    return copy


def _head(params) -> dict[str, Any]:
    from flax import nnx

    return nnx.to_pure_dict(params["classifier"])


def _accuracy(features: np.ndarray, directory: Path, task: Task, test: Pairs) -> float:
    """Test accuracy of features (N, hidden) under the classifier that lies in a directory."""
    import converters

    tensors = converters.read_tensors(directory)
    logits = features @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    return _share(logits, task.label(test.left, test.right))


def _share(logits: np.ndarray, answers: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == answers).mean())


def _merge(out: Path, tasks: tuple[str, ...], name: str, method: str, options, console) -> list[Path]:
    """Runs `tadrop merge` (for EMR also `tadrop task`); returns each task's directory with its backbone."""
    models = [str(out / task) for task in tasks]
    merged = out / "merged" / name
    command = ["merge", "--base", str(out / "base"), "--models", *models, "--method", method, *options]
    _tadrop([*command, "--out", str(merged)], console)
    if method != "emr":
        return [merged] * len(tasks)
    for task in tasks:
        command = ["task", str(merged), "--task", task, "--out", f"{merged}-{task}"]
        if task == tasks[0]:
            _tadrop(command, console)
        else:
            _tadrop([*command, "--quiet"])
    console.print("  (and so for the other tasks)")
    return [Path(f"{merged}-{task}") for task in tasks]


def _tadrop(arguments: list[str], console=None) -> None:
    from tadrop_jax import cli

    if console is not None:
        console.print("$ " + shlex.join(["tadrop", *arguments]), style="bold", soft_wrap=True, markup=False)
    code = cli.main(arguments)
    if code:
        raise MergeError(f"tadrop {arguments[0]} ended with exit code {code}")


def _print_table(rows: dict[str, list[float]], tasks: tuple[str, ...], console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Accuracy on held-out digits, %", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (*tasks, "mean"):
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        cells = [f"{100 * value:.1f}" for value in (*values, np.mean(values))]
        table.add_row(name, *cells, end_section=name == "fine-tuned")
    console.print(table)
    console.print(
        "Task Arithmetic and TIES give one backbone for all tasks, EMR one a task from shared weights and "
        "masks; every row uses each task's own head. Coefficients are fixed, the same with and without TADrop."
    )


def _picture(out: Path, tasks: tuple[str, ...], console) -> None:
    """Draws TADrop's sparsity of every tensor and task, from the report that the merge wrote."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture: matplotlib is absent (pip install '.\\[demo]' in a clone)")
        return
    report = json.loads((out / "merged" / "tadrop+task_arithmetic" / "merge_report.json").read_text())
    sparsity = {name: np.asarray(said["sparsity"]) for name, said in report["tensors"].items() if "sparsity" in said}
    draw_sparsity(sparsity, tasks, out / "sparsity.png")
    console.print(f"TADrop's sparsity by tensor: {out / 'sparsity.png'}")
