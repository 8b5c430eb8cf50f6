"""The multimodal suite: a small BEiT3 pretrained on words and pictures, and its fine-tunes of five forms.

Fine-tunes do not have the same tensors: heads and poolers are each task's own, and classification and question
answering have no last normalisation. As under EMR's rule for BEiT3 (`tadrop merge --differing own`), the suite's shared
part is what the base and all tasks have in one shape; the rest stays each task's own. What a form does not use (an
image task: the language expert) is not trained, as in PyTorch, where it has no gradient: its task vector is zero.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import converters
from converters import beit3
from converters.mapping import flatten, nest
from examples.evidence import multimodal_tasks, suites, training, vision_tasks, words
from examples.evidence.images import augmented, normalised
from examples.evidence.mixed import mixed
from examples.evidence.multimodal_pretraining import Settings, pretrain
from examples.evidence.suites import Head, Suite, Task, Tuned, place
from examples.evidence.training import Progress
from examples.evidence.vision import Recipe

__all__ = [
    "COUNT",
    "GROUPS",
    "KNOWN",
    "RECIPES",
    "Settings",
    "encode",
    "files",
    "finetune",
    "load",
    "place",
    "pretrain",
]

GROUPS = {3: multimodal_tasks.GENERATED, 5: multimodal_tasks.LEARNED, 8: multimodal_tasks.TASKS}
COUNT = 5
files = multimodal_tasks.files
KNOWN = tuple(dict.fromkeys((*multimodal_tasks.GENERATED, *multimodal_tasks.TASKS)))
RECIPES = {
    "adamw": Recipe(training.adamw, 5e-4, 400, weight_decay=0.05, batch=96),
    "sgd": Recipe(training.sgd, 3e-2, 400, batch=96),
    "fast": Recipe(training.adamw, 3e-3, 150, batch=64, move=0),
}
Tensors = dict[str, jax.Array]  # by their paths in the module


class Form(NamedTuple):
    """How tasks of a form are modelled: see torchscale's and its authors' models of these names.

    Attributes:
        architecture: of `converters.beit3`. Texts are classified as questions are that have no picture.
        normalised: whether the encoder has its last normalisation.
        norm: what takes its place otherwise, and starts as it.
        head: the last linear layer; None where the answer is what fits best.
        unused: parts of paths of tensors that have no gradient.
    """

    architecture: str
    normalised: bool
    norm: tuple[str, str] | None
    head: str | None
    unused: tuple[str, ...] = ()


_ANSWERS = "torchscale/BEiT3ForVisualQuestionAnswering"
FORMS = {
    "image": Form("torchscale/BEiT3ForImageClassification", False, ("fc_norm", "A"), "head", ("B", "text_embed")),
    "text": Form(_ANSWERS, False, ("pooler/norm", "B"), "head/last", ("A", "vision_embed")),
    "question": Form(_ANSWERS, False, ("pooler/norm", "A"), "head/last"),
    "statement": Form("torchscale/BEiT3ForVisualReasoning", True, None, "head/dense2"),
    "choice": Form("torchscale/BEiT3ForRetrieval", True, None, None),
}


def finetune(
    data: Path | None, out: Path, name: str, recipe: str, seed: int, *, progress: Progress, bfloat16: bool = False
) -> None:
    """Fine-tunes the base on a task; saves `out`/RECIPE/seedSEED/NAME."""
    directory, how = place(out, recipe, seed, name), RECIPES[recipe]
    base, _ = converters.load(out / "base")
    task = multimodal_tasks.task(data, name, words.read(out / "base"))
    kind = multimodal_tasks.form(name)
    module = started(base, kind, task.classes, seed)
    graph, params, rest = nnx.split(
        mixed(module) if bfloat16 else module, lambda path, _: not set(FORMS[kind].unused) & set(path), ...
    )
    flip = name == "pacs_questions" or (kind == "image" and data is not None and vision_tasks.mirrored(name))

    def measured(params, batch, key):
        inputs = prepared(batch.inputs, lambda images: augmented(images, key, flip=flip, move=how.move))
        return loss(kind, nnx.merge(graph, params, rest), inputs, batch.labels)

    steps = directory.with_suffix(".training")
    params = training.finetune(params, measured, task.train, how, out=steps, seed=seed, progress=progress)
    module = nnx.merge(graph, params, rest)
    own = tensors(module)
    tuned = Tuned(task, own, head_of(kind, own), encode(kind, module.config, own))
    report = {"probe": probe(base, task, kind), "tuned": suites.accuracy(tuned, {}, task.test)}
    files = [out / "base" / name for name in words.FILES]
    suites.save(directory, module, module.config, report, files=files)
    shutil.rmtree(steps)


def load(
    data: Path | None, out: Path, recipe: str, seed: int, names: tuple[str, ...], *, bfloat16: bool = False
) -> Suite:
    """Reads the base and its fine-tunes; `base` and `params` are what all have in one shape."""
    module, found = converters.load(out / "base")
    base, tokenizer = flatten(found), words.read(out / "base")
    models = [converters.load(place(out, recipe, seed, name)) for name in names]
    trees = [flatten(params) for _, params in models]
    shared = [path for path, leaf in base.items() if all(path in t and t[path].shape == leaf.shape for t in trees)]
    tuned = []
    for name, (model, _), tree in zip(names, models, trees, strict=True):
        kind = multimodal_tasks.form(name)
        own = {path: leaf for path, leaf in tree.items() if path not in shared}
        tuned.append(
            Tuned(
                multimodal_tasks.task(data, name, tokenizer),
                nest({path: tree[path] for path in shared}),
                head_of(kind, tree),
                encode(kind, model.config, own, bfloat16),
            )
        )
    return Suite(nest({path: base[path] for path in shared}), tuned, converters.layout(module))


def encode(kind: str, config: beit3.Config, own: Tensors, bfloat16: bool = False) -> suites.Encode:
    """Gives the jitted function of the shared parameters and inputs: features (N, F) for the task's head.

    Args:
        kind: one of `FORMS`.
        config: the model's.
        own: the task's own tensors by their paths; they may be all.
        bfloat16: whether to multiply in mixed precision.
    """
    if head := FORMS[kind].head:  # features are what the model gives if its head changes nothing
        size = own[f"{head}/kernel"].shape[0]
        own = own | {f"{head}/kernel": jnp.eye(size), f"{head}/bias": jnp.zeros(size)}
    return functools.partial(_applied(kind, config, bfloat16), own)


@functools.cache
def _applied(kind: str, config: beit3.Config, bfloat16: bool) -> Callable[[Tensors, Any, Any], jax.Array]:
    """Tasks of a form and their seeds share a function, which is compiled once."""
    make = beit3.MODELS[FORMS[kind].architecture]
    module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(mixed(module) if bfloat16 else module)

    @jax.jit
    def apply(own, params, inputs):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, nest(own | flatten(params)))
        return logits(kind, nnx.merge(graph, filled), prepared(inputs))

    return apply


def probe(base: Any, task: Task, kind: str) -> float:
    """What a linear probe of the base gets right in a task's test data.

    Logistic regression on the class token, the mean patch and the mean word (of both pictures); where a description is
    to be chosen, the linear map of pictures' features to those of their descriptions, and the nearest one.
    """
    graph, params = nnx.split(base)

    @jax.jit
    def describe(params, inputs):
        module, inputs = nnx.merge(graph, params), prepared(inputs)
        tokens, found = inputs.get("tokens"), []
        for images in [inputs[name] for name in ("images", "second") if name in inputs] or [None]:
            found += _described(module, tokens, images)
        return jnp.concatenate(found, -1)

    def seen(inputs) -> np.ndarray:
        return suites.features(describe, params, inputs)

    parts = (task.train, task.validation, task.test)
    if kind != "choice":
        train, validation, test = (seen(part.inputs) for part in parts)
        head = suites.probe(train, task.train.labels, validation, task.validation.labels, task.classes)
        return suites.share_right(test, head, task.test.labels)
    pictures = [seen({"images": part.inputs["images"]}) for part in (task.train, task.test)]
    right = np.take_along_axis(task.train.inputs["tokens"], task.train.labels[:, None, None], 1)[:, 0]
    texts, choices = seen({"tokens": right}), task.test.inputs["tokens"]
    found = seen({"tokens": choices.reshape(-1, choices.shape[-1])}).reshape(*choices.shape[:2], -1)
    mean = texts.mean(0)
    (shown, *_), middle = np.linalg.lstsq(pictures[0] - pictures[0].mean(0), texts - mean), pictures[0].mean(0)
    guess, found = (pictures[1] - middle) @ shown, found - mean
    nearest = np.einsum("nd,ncd->nc", guess, found) / np.linalg.norm(found, axis=-1)
    return float(np.mean(nearest.argmax(-1) == task.test.labels))


def _described(module, tokens, images) -> list[jax.Array]:
    padding = None if tokens is None else tokens == module.config.other["pad_token_id"]
    features, split = module.beit3(tokens, images, padding)
    found = [] if images is None else [features[:, 0], features[:, 1:split].mean(1)]
    if padding is not None:
        real = ~padding[..., None]
        text = features[:, split:]
        found += [text[:, 0], jnp.sum(text * real, 1) / jnp.sum(real, 1)]
    return found


def started(base: Any, kind: str, classes: int, seed: int) -> Any:
    """A model of that form with the base's weights; its head is random."""
    form = FORMS[kind]
    config = dataclasses.replace(base.config, num_classes=classes, normalize_output=form.normalised)
    module = beit3.MODELS[form.architecture](config, rngs=nnx.Rngs(seed))
    start = tensors(base)
    if form.norm:
        new, old = form.norm
        start |= {f"{new}/{part}": start[f"beit3/encoder/layer_norm/{old}/{part}"] for part in ("scale", "bias")}
    filled = {path: start.get(path, leaf) for path, leaf in tensors(module).items()}
    nnx.update(module, _state(module, filled))
    return module


def _state(module: Any, filled: Tensors) -> nnx.State:
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, nest(filled))
    return state


def tensors(module: Any) -> Tensors:
    """A module's tensors by their paths."""
    return flatten(nnx.state(module, nnx.Param))


def head_of(kind: str, tree: Tensors) -> Head:
    name = FORMS[kind].head
    if name is None:  # ten descriptions' fit, and the best one is the answer
        return Head(np.eye(10, dtype=np.float32), np.zeros(10, np.float32))
    return Head(*(np.asarray(tree[f"{name}/{part}"]) for part in ("kernel", "bias")))


def prepared(inputs: dict[str, Any], change: Callable = lambda images: images) -> dict[str, Any]:
    """Inputs with images as the model takes them."""
    return {name: array if name == "tokens" else change(normalised(array)) for name, array in inputs.items()}


def logits(kind: str, module: Any, inputs: dict[str, Any]) -> jax.Array:
    """What a model gives: logits of classes, or how well each description fits."""
    images = inputs.get("images")
    if kind == "image":
        return module(images)
    tokens = inputs["tokens"]
    padding = tokens == module.config.other["pad_token_id"]
    if kind == "statement":
        return module(tokens, images, inputs["second"], padding)
    if kind != "choice":
        return module(tokens, images, padding)
    flat = tokens.reshape(-1, tokens.shape[-1])
    found = module(flat, images, padding.reshape(flat.shape))
    texts = found.text.reshape(*tokens.shape[:2], -1)
    return jnp.exp(module.logit_scale) * jnp.einsum("nd,ncd->nc", found.image, texts)


def loss(kind: str, module: Any, inputs: dict[str, Any], labels: Any) -> jax.Array:
    """Cross-entropy; where descriptions are chosen, of each picture among the batch's right ones, and the reverse."""
    measure = optax.softmax_cross_entropy_with_integer_labels
    if kind != "choice":
        return measure(logits(kind, module, inputs), labels).mean()
    tokens = jnp.take_along_axis(inputs["tokens"], labels[:, None, None], 1)[:, 0]
    found = module(tokens, inputs["images"], tokens == module.config.other["pad_token_id"])
    fits = jnp.exp(module.logit_scale) * found.image @ found.text.T
    same = jnp.arange(len(fits))
    return (measure(fits, same) + measure(fits.T, same)).mean() / 2
