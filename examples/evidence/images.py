"""Image sets as arrays: `(N, 32, 32, 3)` uint8, read from the files that `--data` holds.

The directory has one folder a set with one `.npz` in it: grey sets with `x_train, y_train, x_test, y_test`, others with
JPEG bytes (`train_bytes`, image i at `train_offsets[i]` to `train_offsets[i + 1]`, `train_labels`; the same for test).
docs/results.md says where each set comes from.
"""

import io
import itertools
from pathlib import Path

import numpy as np

from examples.evidence.suites import Part

SIDE = 32


def read(data: Path, name: str) -> tuple[Part, Part]:
    """A set's train and test images, squeezed to 32 x 32 pixels of three channels: `(N, 32, 32, 3)` uint8.

    Raises:
        FileNotFoundError: the set is not there.
    """
    with np.load(data / name / f"{name}.npz") as file:
        if "x_train" in file:
            parts = [(list(file[f"x_{part}"]), file[f"y_{part}"]) for part in ("train", "test")]
        else:
            parts = [(list(_jpegs(file, part)), file[f"{part}_labels"]) for part in ("train", "test")]
    train, test = (
        Part(np.stack([_square(image) for image in images]), labels.astype(np.int32)) for images, labels in parts
    )
    return train, test


def _jpegs(file, part: str):
    from PIL import Image

    content, offsets = file[f"{part}_bytes"].tobytes(), file[f"{part}_offsets"]
    for start, end in itertools.pairwise(offsets):
        yield Image.open(io.BytesIO(content[start:end]))


def _square(image) -> np.ndarray:
    from PIL import Image

    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.convert("RGB")
    return np.asarray(image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BOX))


def normalised(images):
    """uint8 pixels as floats in [-1, 1], as Hugging Face's ViT takes them."""
    return images.astype(np.float32) / 127.5 - 1


def augmented(images, key, *, flip: bool, move: int = 4):
    """Images moved by some pixels, brighter or darker, and half of them mirrored. Traces inside `jit`.

    Args:
        images: `(N, 32, 32, 3)` float.
        key: a random key.
        flip: whether a mirror image has the same label (not of digits, letters and traffic signs).
        move: by how many pixels at most.

    Returns:
        As `images`.
    """
    import jax
    import jax.numpy as jnp

    count = len(images)
    place, mirror, light = jax.random.split(key, 3)
    padded = jnp.pad(images, ((0, 0), (move, move), (move, move), (0, 0)), mode="edge")
    row, column = jax.random.randint(place, (2, count), 0, 2 * move + 1)
    rows, columns = (start[:, None] + jnp.arange(SIDE) for start in (row, column))
    images = padded[jnp.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        images = jnp.where(jax.random.bernoulli(mirror, shape=(count, 1, 1, 1)), images[:, :, ::-1], images)
    return images * jax.random.uniform(light, (count, 1, 1, 1), minval=0.8, maxval=1.2)
