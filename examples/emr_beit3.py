"""EMR-Merging on BEiT3: one vector and a bit mask a task in place of three fine-tuned models.

    python examples/emr_beit3.py                       # tiny random models, made here; takes some seconds
    python examples/emr_beit3.py --keep some/directory # and they stay, with all that is made of them

Fine-tunes of BEiT3 do not have the same tensors: each task has a head of its own, there are as many position
embeddings as its images have patches, and classification has no last normalisation. EMR's authors merge what is alike
in all models, and take the rest from each task's own file: `tadrop merge --differing own`. It also warns of tensors
that moved by more than their own size: such a tensor was trained anew, and its difference from the base means nothing.
`--set per_task=NAME` lets it stay each task's own, too.
"""

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import converters
from converters import beit3
from converters.mapping import flatten, nest
from tadrop_jax.cli import main as command

WIDTHS = {
    "encoder_embed_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 64,
    "encoder_layers": 1,
    "patch_size": 4,
    "vocab_size": 50,
    "max_source_positions": 16,
}
BASE = "torchscale/BEiT3ForCaptioning"  # pretrained on words that are masked
TASKS = {
    "classification": (
        "torchscale/BEiT3ForImageClassification",
        {"img_size": 8, "num_classes": 10, "normalize_output": False},
    ),
    "answers": ("torchscale/BEiT3ForVisualQuestionAnswering", {"img_size": 16, "num_classes": 7}),
    "retrieval": ("torchscale/BEiT3ForRetrieval", {"img_size": 12}),
}
TRAINED_ANEW = ("retrieval", "beit3/encoder/layers/0/ffn/B/fc1/kernel")


def make_models(root: Path) -> None:
    """Writes a base and three fine-tunes, as directories with the names and axes that torchscale has."""
    rng = np.random.default_rng(0)

    def normal(shape, size):
        return (size * rng.normal(size=shape)).astype(np.float32)

    def write(task, architecture, options, start):
        """Saves a model that moved a little from where it started; what is new to it is random."""
        config = beit3.Config(**WIDTHS | options)
        model = nnx.eval_shape(lambda: beit3.MODELS[architecture](config, rngs=nnx.Rngs(0)))
        tensors = {}
        for path, leaf in flatten(nnx.state(model, nnx.Param)).items():
            before = start.get(path)
            if before is not None and before.shape == leaf.shape and (task, path) != TRAINED_ANEW:
                tensors[path] = before + normal(leaf.shape, 0.005)
            else:  # weights of a layer, a head, positions of another image size; scales of normalisations are near 1
                tensors[path] = path.endswith("scale") + normal(leaf.shape, 0.1)
        converters.save(root / task, nest(tensors), config, architecture=architecture)
        return tensors

    pretrained = write("base", BASE, {"img_size": 8}, {})
    for task, (architecture, options) in TASKS.items():
        write(task, architecture, options, pretrained)


@nnx.jit
def predict(model, tokens, images):
    """What the model of a task gives for texts and images."""
    if isinstance(model, beit3.MODELS["torchscale/BEiT3ForImageClassification"]):
        return model(images)
    if isinstance(model, beit3.MODELS["torchscale/BEiT3ForRetrieval"]):
        return jnp.concatenate(model(tokens, images), axis=-1)
    return model(tokens, images)


def outputs(directory: Path) -> np.ndarray:
    """Loads a task's model and runs it on random texts and images."""
    model, _ = converters.load(directory)
    rng = np.random.default_rng(1)
    size = model.config.img_size
    tokens = rng.integers(0, model.config.vocab_size, (4, 6))
    return np.asarray(predict(model, tokens, rng.normal(size=(4, size, size, 3)).astype(np.float32)))


def tadrop(*arguments: str | Path) -> None:
    """Runs the command `tadrop`."""
    print("$ tadrop", *arguments, flush=True)
    if code := command([str(argument) for argument in arguments]):
        raise SystemExit(code)


def run(root: Path) -> dict[str, float]:
    """Merges, rebuilds each task's model and compares what it puts out with its fine-tune: correlations by task."""
    make_models(root)
    models = [root / task for task in TASKS]
    options = ("--method", "emr", "--differing", "own", "--out", root / "bundle")
    tadrop("merge", "--base", root / "base", "--models", *models, *options)
    found = {}
    for task in TASKS:
        rebuilt = root / f"rebuilt-{task}"
        tadrop("task", root / "bundle", "--task", task, "--out", rebuilt, "--quiet")
        given, ours = converters.read_tensors(root / task), converters.read_tensors(rebuilt)
        own = [name for name in given if np.array_equal(given[name], ours[name])]
        found[task] = float(np.corrcoef(outputs(root / task).ravel(), outputs(rebuilt).ravel())[0, 1])
        print(f"{len(own)} of {len(given)} tensors are its own; correlation of the outputs: {found[task]:.3f}")
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs the example and gives the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty directory for models, bundle and rebuilt models")
    keep = parser.parse_args(arguments).keep
    if keep:
        return run(keep)
    with tempfile.TemporaryDirectory() as scratch:
        return run(Path(scratch))


if __name__ == "__main__":
    main()
