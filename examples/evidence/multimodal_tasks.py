"""The multimodal suite's tasks: images alone, texts alone, and both, and what its base is pretrained on.

- `image`: any task of `vision_tasks`.
- `text`: any task of `language_tasks`.
- `question`: `questions` about composed pictures of digits and clothes ("what is above the red bag ?"), and
  `pacs_questions` about photos, paintings and cartoons ("is it a dog ?", "what is it ?").
- `statement`: `statements` about two composed pictures, true or false.
- `choice`: `matching`, which of ten descriptions is that of a picture?

There are no captions in the data: sentences are made from classes and from how a picture was composed. The base sees
other digits and clothes than the tasks, which are tested on yet others. Without data things are shapes that are drawn
here, and `count`, a task on images, is how many there are.
"""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.evidence import language_tasks, vision_tasks, words
from examples.evidence import multimodal_pictures as pictures
from examples.evidence.images import read
from examples.evidence.multimodal_pictures import Kinds
from examples.evidence.suites import Part, Task, cut

TASKS = ("cifar10", "gtsrb", "trec", "agnews", "questions", "pacs_questions", "statements", "matching")
# Those on which fine-tunes beat a probe of the base; docs/evidence-multimodal.md says by how much.
LEARNED = ("gtsrb", "trec", "agnews", "statements", "matching")
GENERATED = ("count", "doer", "matching")  # for tests, which need no data

LENGTH = 24  # of sentences about pictures, in tokens
LONGEST = 32  # of other texts
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CLOTHES = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
_COMPOSED = ("mnist", "fashion_mnist")  # what pictures are composed of
_STYLES = {"pacs_photo": "photo", "pacs_art_painting": "painting", "pacs_cartoon": "cartoon"}
_SIZES = {"train": 9000, "test": 1000}
_FEW = {"train": 900, "test": 200}
_RARE = 20  # an answer that is given less often is left out, with its questions


def form(name: str) -> str:
    """What a task's inputs are: image, text, question, statement or choice."""
    known = {"questions": "question", "pacs_questions": "question", "statements": "statement", "matching": "choice"}
    if name in known:
        return known[name]
    return "text" if name in (*language_tasks.TASKS, *language_tasks.GENERATED) else "image"


def task(data: Path | None, name: str, tokenizer: Tokenizer) -> Task:
    """Reads a task. Its inputs are a dictionary of `images`, `second` (N, 32, 32, 3) uint8 and `tokens` (N, ..., L).

    Args:
        data: the directory of data sets; None for generated ones.
        name: one that `form` knows.
        tokenizer: of the base.
    """
    if form(name) == "text":
        found = language_tasks.task(data, name, tokenizer)
        return _with_inputs(found, lambda part: {"tokens": begun(tokenizer, part.inputs)[:, :LONGEST]})
    if name == "pacs_questions":
        assert data is not None, name
        return _pacs(data, tokenizer)
    if form(name) == "image" and data is not None:
        return _with_inputs(vision_tasks.task(data, name), lambda part: {"images": part.inputs})
    parts = [_MAKERS[name](data, split, tokenizer) for split in ("train", "test")]
    if form(name) == "question":
        parts = _numbered(*parts)
    return cut(name, *parts)


def files(name: str | None) -> list[str]:
    """The files of the data directory that a task is read from, or what the base is pretrained on if it is None."""
    composed = [f"{part}/{part}.npz" for part in _COMPOSED]
    if name is None:
        return [*vision_tasks.files(None), *language_tasks.files(None), *composed]
    if name == "pacs_questions":
        return [f"{style}/{style}.npz" for style in _STYLES]
    kind = form(name)
    return {"text": language_tasks.files, "image": vision_tasks.files}.get(kind, lambda name: composed)(name)


def tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Sentences about pictures as tokens (N, LENGTH), an `<|endoftext|>` before each and after it."""
    return begun(tokenizer, words.padded(tokenizer, np.array([(text, "") for text in texts], object), LENGTH - 1))


@functools.cache
def things(data: Path | None, split: str) -> Kinds:
    """What pictures are composed of; `split` is pretraining, train or test, and no image is in two of them."""
    if data is None:
        return pictures.shapes(400, np.random.default_rng(("pretraining", "train", "test").index(split)))
    found = []
    for number, name in enumerate(_COMPOSED):
        train, test = read(data, name)
        half = len(train.labels) // 2
        part = test if split == "test" else train.take(slice(half) if split == "pretraining" else slice(half, None))
        small = part.inputs[..., 0].reshape(-1, 16, 2, 16, 2).mean((2, 4)).astype(np.uint8)
        found.append((small, part.labels + 10 * number))
    masks, labels = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return Kinds(masks, labels, (*_DIGITS, *_CLOTHES))


def photos(data: Path | None) -> tuple[Part, Part, tuple[str, ...]]:
    """Images of one thing each, to pretrain on and to measure by, and what they show."""
    if data is not None:
        return *vision_tasks.pretraining(data), vision_tasks.pretraining_names(data)
    large = things(None, "pretraining")
    masks = large.masks.repeat(2, 1).repeat(2, 2)
    part = Part(np.stack([masks, 255 - masks, masks // 2], -1), large.labels)
    return part, part.take(slice(200)), large.names


def begun(tokenizer: Tokenizer, found: np.ndarray) -> np.ndarray:
    """Puts a token before each text: what the text is classified by."""
    return np.pad(found, ((0, 0), (1, 0)), constant_values=words.number(tokenizer, words.END))


def _with_inputs(found: Task, inputs) -> Task:
    parts = {name: Part(inputs(getattr(found, name)), getattr(found, name).labels) for name in _PARTS}
    return found._replace(**parts)


_PARTS = ("train", "validation", "test")


def _drawn(data: Path | None, split: str, seed: int, each: int = 1):
    """Random numbers, the kinds' names, and for each example `each` pictures and what is seen in them."""
    kinds = things(data, split)
    rng = np.random.default_rng((seed, split == "test"))
    count = (_FEW if data is None else _SIZES)[split]
    drawn = [pictures.compose(kinds, count, rng) for _ in range(each)]
    return rng, kinds.names, [one.images for one in drawn], [pictures.see(one, kinds.names) for one in drawn]


def _count(data: Path | None, split: str, tokenizer: Tokenizer) -> Part:
    """How many things are in a picture?"""
    _, _, [images], [seen] = _drawn(data, split, 1)
    return Part({"images": images}, np.array([len(one.things) - 2 for one in seen], np.int32))


def _questions(data: Path | None, split: str, tokenizer: Tokenizer) -> Part:
    rng, names, [images], [seen] = _drawn(data, split, 2)
    asked = [pictures.question(one, names, rng) for one in seen]
    return Part(
        {"images": images, "tokens": tokens(tokenizer, [text for text, _ in asked])},
        np.array([answer for _, answer in asked]),
    )


def _statements(data: Path | None, split: str, tokenizer: Tokenizer) -> Part:
    rng, _, images, seen = _drawn(data, split, 3, each=2)
    labels = rng.integers(0, 2, len(images[0])).astype(np.int32)
    pairs = zip(*seen, labels, strict=True)
    said = [pictures.statement(one, two, label == 1, rng) for one, two, label in pairs]
    return Part({"images": images[0], "second": images[1], "tokens": tokens(tokenizer, said)}, labels)


def _matching(data: Path | None, split: str, tokenizer: Tokenizer) -> Part:
    rng, names, [images], [seen] = _drawn(data, split, 4)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    texts = []
    for number, (one, label) in enumerate(zip(seen, labels, strict=True)):
        others = [seen[(number + far) % len(seen)] for far in rng.integers(1, len(seen), 5)]
        right, *wrong = pictures.choices(one, others, names, rng)
        texts += [*wrong[:label], right, *wrong[label:]]
    return Part({"images": images, "tokens": tokens(tokenizer, texts).reshape(len(images), 10, LENGTH)}, labels)


_MAKERS = {
    "count": _count,
    "questions": _questions,
    "statements": _statements,
    "matching": _matching,
}


def _pacs(data: Path, tokenizer: Tokenizer) -> Task:
    """Each image to train on with three questions, each other one with one of them."""
    styles = [read(data, name) for name in _STYLES]
    with np.load(data / "pacs_photo" / "pacs_photo.npz") as file:
        names = tuple(str(name) for name in file["class_names"])
    joined = [
        Part(
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.labels + len(names) * number for number, part in enumerate(parts)]),
        )
        for parts in zip(*styles, strict=True)
    ]
    found = cut("pacs_questions", *joined)
    rng = np.random.default_rng(5)
    train, validation, test = (
        _asked(part, names, tokenizer, rng, each=each)
        for part, each in zip((found.train, found.validation, found.test), (3, 1, 1), strict=True)
    )
    train, validation, test = _numbered(train, validation, test)
    return Task("pacs_questions", train, validation, test, int(train.labels.max()) + 1)


def _asked(part: Part, names: tuple[str, ...], tokenizer: Tokenizer, rng: np.random.Generator, *, each: int) -> Part:
    styles = tuple(_STYLES.values())
    texts, answers = [], []
    for label in part.labels:
        style, kind = styles[label // len(names)], names[label % len(names)]
        asked = kind if rng.random() < 0.5 else names[(label + rng.integers(1, len(names))) % len(names)]
        every = (
            (f"is it a {asked} ?", "yes" if asked == kind else "no"),
            ("what is it ?", kind),
            (f"is it a {' , a '.join(styles[:-1])} or a {styles[-1]} ?", style),
        )
        for number in rng.permutation(3)[:each]:
            texts.append(every[number][0])
            answers.append(every[number][1])
    return Part({"images": part.inputs.repeat(each, 0), "tokens": tokens(tokenizer, texts)}, np.array(answers))


def _numbered(train: Part, *others: Part) -> list[Part]:
    """Answers as numbers; questions are left out whose answer is rare in the training data."""
    given = Counter(train.labels.tolist())
    kept = sorted(answer for answer, count in given.items() if count >= _RARE)
    number = {answer: place for place, answer in enumerate(kept)}
    parts = [part.take(np.isin(part.labels, kept)) for part in (train, *others)]
    return [Part(part.inputs, np.array([number[answer] for answer in part.labels], np.int32)) for part in parts]
