"""The image tasks: eight of different kinds, and up to 30 with parts of the sets and new questions about them.

What is what: whole sets; parts of GTSRB's, KMNIST's and Caltech-101's classes, and of Tiny ImageNet's that the base
never saw (`tiny_0` to `tiny_5`); questions about digits (`odd`, `loops`: how many closed loops?) and about PACS
(`pacs_domain`: photo, painting or cartoon?); `turned_...` (by how many quarter turns was the image turned?) and
`swapped_...` (were its left and right halves exchanged, the upper and lower ones, both, or none?). What fine-tunes
hardly do better than a probe of the base is in no group: parts of Tiny ImageNet, textures, PACS' domains.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.evidence.images import SIDE, read
from examples.evidence.suites import Part, Task, cut

EIGHT = (
    *("mnist", "kmnist", "cifar10", "gtsrb", "caltech101"),
    *("turned_fashion_mnist", "turned_scenes", "turned_cifar10"),
)
FOURTEEN = (*EIGHT, "gtsrb_danger", "caltech_4", "swapped_scenes", "turned_mnist", "kmnist_0", "pacs_cartoon")
TWENTY = (
    *FOURTEEN,
    *("gtsrb_mandatory", "mnist_loops", "turned_pacs_photo", "swapped_cifar10", "caltech_3", "scenes"),
)
THIRTY = (
    *TWENTY,
    *("gtsrb_priority", "gtsrb_speed", "kmnist_1", "mnist_odd", "turned_kmnist", "turned_pacs_cartoon"),
    *("swapped_fashion_mnist", "pacs_photo", "caltech_0", "turned_gtsrb"),
)

# One question of different images, as texts of opinion have one: of photos, and of drawings and letters too.
TURNED_PHOTOS = ("turned_scenes", "turned_cifar10", "turned_gtsrb", "turned_pacs_photo")
TURNS = (
    *("turned_fashion_mnist", "turned_scenes", "turned_cifar10", "turned_mnist"),
    *("turned_kmnist", "turned_gtsrb", "turned_pacs_photo"),
)
FAST = ("digits_odd", "digits_loops")  # of scikit-learn's digits, for tests
GROUPS = {2: FAST, 4: TURNED_PHOTOS, 7: TURNS, 8: EIGHT, 14: FOURTEEN, 20: TWENTY, 30: THIRTY}

PRETRAINING_CLASSES = 140  # of Tiny ImageNet's 200; the others are tasks
_SIGNS = {"speed": range(9), "priority": range(9, 18), "danger": range(18, 32), "mandatory": range(33, 41)}
_QUESTIONS = {"odd": np.arange(10) % 2, "loops": np.array([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])}  # of digits
_DOMAINS = ("pacs_photo", "pacs_art_painting", "pacs_cartoon")
_NO_MIRROR = ("mnist", "kmnist", "gtsrb", "turned", "digits")


def task(data: Path | None, name: str) -> Task:
    """Reads a task; GTSRB's neighbours are frames of one film.

    Args:
        data: the directory of image sets; `FAST` needs none.
        name: one of `KNOWN`.
    """
    return cut(name, *_labelled(data, name), by_order=name.startswith("gtsrb"))


def files(name: str | None) -> list[str]:
    """The files of the data directory that a task is read from, or what the base is pretrained on if it is None."""
    return [f"{found}/{found}.npz" for found in (("tiny_imagenet32",) if name is None else _sets(name))]


def _sets(name: str) -> tuple[str, ...]:
    how, _, whole = name.partition("_")
    kind, _, part = name.rpartition("_")
    if kind == "digits":
        return ()
    if name == "pacs_domain":
        return _DOMAINS
    if how in _CHANGES:
        name = whole
    elif part in (*_QUESTIONS, *_SIGNS) or part.isdigit():
        name = kind
    return ({"tiny": "tiny_imagenet32", "caltech": "caltech101"}.get(name, name),)


def mirrored(name: str) -> bool:
    """Whether a mirror image has the same label: not of digits, letters and traffic signs."""
    return not name.startswith(_NO_MIRROR)


def pretraining(data: Path | None) -> tuple[Part, Part]:
    """What the base is trained on, train and test images: classes of Tiny ImageNet; without data, digits."""
    if data is None:
        return _digits()
    chosen = _tiny_order()[:PRETRAINING_CLASSES]
    train, test = _read(data, "tiny_imagenet32")
    return _only(train, chosen), _only(test, chosen)


def pretraining_names(data: Path) -> tuple[str, ...]:
    """What these classes are called: the first name that each has."""
    with np.load(data / "tiny_imagenet32" / "tiny_imagenet32.npz") as file:
        names = file["class_names"][_tiny_order()[:PRETRAINING_CLASSES]]
    return tuple(str(name).partition(" ")[2].partition(",")[0].lower() for name in names)


def _labelled(data: Path | None, name: str) -> tuple[Part, Part]:
    kind, _, part = name.rpartition("_")
    if data is None and kind != "digits":
        raise ValueError(f"{name} needs the directory of image sets")
    if part in _QUESTIONS:
        train, test = _digits() if data is None or kind == "digits" else _read(data, kind)
        return Part(train.inputs, _QUESTIONS[part][train.labels]), Part(test.inputs, _QUESTIONS[part][test.labels])
    if kind == "tiny":
        start = PRETRAINING_CLASSES + 10 * int(part)
        return _parts(data, "tiny_imagenet32", _tiny_order()[start : start + 10])
    if kind == "caltech":
        return _parts(data, "caltech101", np.arange(20 * int(part), 20 * int(part) + 20))
    if kind == "kmnist":
        return _parts(data, kind, np.arange(5 * int(part), 5 * int(part) + 5))
    if kind == "gtsrb":
        return _parts(data, kind, np.array(_SIGNS[part]))
    if name == "pacs_domain":
        return _domains(data)
    how, _, whole = name.partition("_")
    if how in _CHANGES:
        train, test = _unseen(data) if whole == "tiny" else _read(data, whole)
        return _changed(train, _CHANGES[how], seed=1), _changed(test, _CHANGES[how], seed=2)
    return _read(data, name)


_read = functools.cache(read)


def _digits() -> tuple[Part, Part]:
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    grey = (pixels[order].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    whole = Part(grey[..., None].repeat(3, 3), labels[order].astype(np.int32))
    return whole.take(slice(0, 1400)), whole.take(slice(1400, None))


def _tiny_order() -> np.ndarray:
    return np.random.default_rng(0).permutation(200)


def _parts(data: Path, name: str, classes: np.ndarray) -> tuple[Part, Part]:
    train, test = _read(data, name)
    return _only(train, classes), _only(test, classes)


def _only(all_: Part, classes: np.ndarray) -> Part:
    """The images of some classes, their labels counted anew."""
    number = np.full(int(all_.labels.max()) + 1, -1, np.int32)
    number[classes] = np.arange(len(classes))
    labels = number[all_.labels]
    return Part(all_.inputs[labels >= 0], labels[labels >= 0])


def _domains(data: Path) -> tuple[Part, Part]:
    sets = [_read(data, name) for name in _DOMAINS]
    train, test = (
        Part(
            np.concatenate([part.inputs for part in parts]),
            np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.labels) for part in parts]),
        )
        for parts in zip(*sets, strict=True)
    )
    return train, test


def _unseen(data: Path) -> tuple[Part, Part]:
    """The classes of Tiny ImageNet that the base never saw."""
    return _parts(data, "tiny_imagenet32", _tiny_order()[PRETRAINING_CLASSES:])


def _swapped(image: np.ndarray, way: int) -> np.ndarray:
    """The halves of the image exchanged: left and right if `way` is odd, upper and lower if it is 2 or 3."""
    return np.roll(image, (way // 2 * SIDE // 2, way % 2 * SIDE // 2), axis=(0, 1))


_CHANGES = {"turned": np.rot90, "swapped": _swapped}

_WHOLE = (
    *("mnist", "kmnist", "fashion_mnist", "cifar10", "gtsrb", "caltech101", "dtd10", "scenes"),
    *("pacs_photo", "pacs_art_painting", "pacs_cartoon"),
)
# Every task that there is, in a group or not.
KNOWN = (
    *(*FAST, *_WHOLE, "pacs_domain"),
    *(f"{how}_{whole}" for how in _CHANGES for whole in (*_WHOLE, "tiny")),
    *(f"mnist_{question}" for question in _QUESTIONS),
    *(f"gtsrb_{kind}" for kind in _SIGNS),
    *(f"{whole}_{i}" for whole, parts in {"tiny": 6, "kmnist": 2, "caltech": 5}.items() for i in range(parts)),
)


def _changed(all_: Part, change: Callable[[np.ndarray, int], np.ndarray], seed: int) -> Part:
    """Each image changed in one of four ways, which is its label."""
    ways = np.random.default_rng(seed).integers(0, 4, len(all_.labels)).astype(np.int32)
    return Part(np.stack([change(image, way) for image, way in zip(all_.inputs, ways, strict=True)]), ways)
