"""The vision suite: a small ViT pretrained on Tiny ImageNet, and its fine-tunes on up to 30 tasks."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import converters
from converters.vit import Config, ViTForImageClassification
from examples.evidence import suites, training, vision_tasks
from examples.evidence.images import augmented, normalised
from examples.evidence.mixed import mixed
from examples.evidence.suites import Head, Suite, Tuned, class_names, place
from examples.evidence.training import Progress


@dataclasses.dataclass(frozen=True)
class Recipe(training.Recipe):
    """How models are fine-tuned; `move` is by how many pixels images are moved at most."""

    move: int = 4


GROUPS, KNOWN, files = vision_tasks.GROUPS, vision_tasks.KNOWN, vision_tasks.files
COUNT = 8  # tasks of the main table
RECIPES = {
    "fast": Recipe(training.adamw, 1e-3, 100, batch=50, move=0),
    "adamw": Recipe(training.adamw, 7e-4, 1200, weight_decay=0.05, batch=32, move=2),
    "sgd": Recipe(training.sgd, 3e-2, 1200, batch=32, move=2),
}
RECIPES["frozen-head"] = dataclasses.replace(RECIPES["adamw"], frozen="classifier")
RECIPES["low-rate"] = dataclasses.replace(RECIPES["frozen-head"], rate=1e-4)
RECIPES["lora"] = dataclasses.replace(RECIPES["frozen-head"], rate=5e-3, weight_decay=0.0, rank=8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of everything; the defaults are those of the results."""

    width: int = 192
    layers: int = 6
    heads: int = 3
    patch: int = 8
    batch: int = 256
    epochs: int = 14
    rate: float = 1e-3
    initial: float = 0.02  # standard deviation of the first weights
    move: int = 4  # pixels that an image is moved by at most
    share: float = 1.0  # of the pretraining
    seed: int = 0

    @classmethod
    def fast(cls) -> "Settings":
        """For tests: seconds, on digits."""
        return cls(width=32, layers=1, heads=2, patch=8, batch=50, epochs=12, rate=3e-3, initial=0.1, move=0)

    def config(self, classes: int) -> Config:
        """The model's configuration with a head for so many classes."""
        return Config(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            initializer_range=self.initial,
            image_size=32,
            patch_size=self.patch,
            labels=class_names(classes),
        )


def pretrain(
    data: Path | None, out: Path, *, progress: Progress, settings: Settings = Settings(), bfloat16: bool = False
) -> None:
    """Trains the base on 140 classes of Tiny ImageNet and saves it as a Hugging Face directory `out`/base."""
    train, test = vision_tasks.pretraining(data)
    config = settings.config(int(train.labels.max()) + 1)
    module = ViTForImageClassification(config, rngs=nnx.Rngs(settings.seed))
    apply = encode(module)
    graph, params = nnx.split(mixed(module) if bfloat16 else module)
    steps = int(settings.share * settings.epochs * (len(train.labels) // settings.batch))

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(
            augmented(normalised(batch.inputs), key, flip=data is not None, move=settings.move)
        )
        wanted = optax.smooth_labels(jax.nn.one_hot(batch.labels, logits.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    index = training.shuffled(len(train.labels), settings.batch, seed=settings.seed)
    params = training.fit(
        params,
        loss,
        lambda step: train.take(index(step)),
        training.adamw(settings.rate, steps),
        steps,
        out=out / "pretraining",
        seed=settings.seed,
        progress=progress,
    )
    head = _head(params)
    found = suites.features(apply, params["vit"], test.inputs)
    accuracy = suites.share_right(found, head, test.labels)
    report = {"accuracy": accuracy} | suites.origin(settings)
    suites.save(out / "base", params, config, report)


def finetune(
    data: Path | None, out: Path, name: str, recipe: str, seed: int, *, progress: Progress, bfloat16: bool = False
) -> None:
    """Fine-tunes the base on a task, from a linear probe's head on; saves `out`/RECIPE/seedSEED/NAME."""
    directory = place(out, recipe, seed, name)
    task, how = vision_tasks.task(data, name), RECIPES[recipe]
    module, params = converters.load(out / "base")
    apply = encode(module)
    seen = [suites.features(apply, params["vit"], part.inputs) for part in task[1:4]]
    head = suites.probe(seen[0], task.train.labels, seen[1], task.validation.labels, task.classes)
    calm = suites.calmed(head, seen[0])
    params["classifier"]["kernel"], params["classifier"]["bias"] = (nnx.Param(jax.numpy.asarray(part)) for part in calm)
    graph = nnx.graphdef(mixed(module) if bfloat16 else module)

    def loss(params, batch, key):
        images = augmented(normalised(batch.inputs), key, flip=vision_tasks.mirrored(name), move=how.move)
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    steps = directory.with_suffix(".training")
    params = training.finetune(params, loss, task.train, how, out=steps, seed=seed, progress=progress)
    tuned = suites.features(apply, params["vit"], task.test.inputs)
    report = {
        "probe": suites.share_right(seen[2], head, task.test.labels),
        "tuned": suites.share_right(tuned, _head(params), task.test.labels),
    }
    suites.save(directory, params, dataclasses.replace(module.config, labels=class_names(task.classes)), report)
    shutil.rmtree(steps)


def load(
    data: Path | None, out: Path, recipe: str, seed: int, names: tuple[str, ...], *, bfloat16: bool = False
) -> Suite:
    """Reads the base and its fine-tunes, as anyone would read Hugging Face directories."""
    module, base = converters.load(out / "base")
    apply = encode(mixed(module) if bfloat16 else module)
    tuned = []
    for name in names:
        _, params = converters.load(place(out, recipe, seed, name))
        tuned.append(Tuned(vision_tasks.task(data, name), params["vit"], _head(params), apply))
    layout = converters.layout(module)
    return Suite(base["vit"], tuned, lambda path: layout(f"vit/{path}"))


def encode(module: ViTForImageClassification) -> suites.Encode:
    """Gives the jitted function of a backbone's parameters and images (N, 32, 32, 3) uint8: features (N, hidden)."""
    graph = nnx.graphdef(module.vit)
    return jax.jit(lambda params, images: nnx.merge(graph, params)(normalised(images))[:, 0])


def _head(params: nnx.State) -> Head:
    return Head(*(np.asarray(params["classifier"][name][...]) for name in ("kernel", "bias")))
