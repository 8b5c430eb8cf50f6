"""The text tasks, in the manner of GLUE, from `text/NAME.tsv.gz` (split, label, text1, text2) in `--data`.

Sentiment (sst2, mr, cr, mpqa), kinds of questions, news and requests (trec, agnews, clinc150), irony, grammar (cola),
pairs (sick, mrpc, qnli, rte). docs/results.md says where each comes from. Without `--data` a small grammar makes
sentences and two tasks, for the tests.
"""

import functools
import gzip
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.evidence import words
from examples.evidence.suites import Part, Task, cut

TASKS = (
    *("sst2", "trec", "agnews", "mr", "cr", "mpqa", "sick", "clinc150", "tweet_irony"),
    *("mrpc", "cola", "qnli", "rte"),
)
OPINIONS = ("sst2", "mr", "cr", "mpqa")  # one question, favourable or not, of sentences, reviews, products and phrases
GENERATED = ("doer", "first")
GROUPS = {2: GENERATED, 4: OPINIONS, 9: TASKS[:9], 13: TASKS}

# SST-2 is made of MR's sentences, whole and in parts: two thirds of its test data are training data of MR.
_SAME_SENTENCES = ("sst2", "mr")
_CORPUS = "lm_corpus/lm_corpus.txt.gz"


def task(data: Path | None, name: str, tokenizer: Tokenizer) -> Task:
    """Reads a task; its inputs are tokens `(N, length)` int32, padded at the end.

    Args:
        data: the directory of data sets; None for the generated ones.
        name: one of `TASKS`, or of `GENERATED`.
        tokenizer: of `words`.
    """
    found = _texts(data, name)
    if name in _SAME_SENTENCES:
        others = [_texts(data, other) for other in _SAME_SENTENCES]
        held = [text for other in others for part in (other.validation, other.test) for text in part.inputs[:, 0]]
        found = found._replace(train=found.train.take(_unlike(found.train.inputs[:, 0], held)))
    length = words.length(tokenizer, found.train.inputs)
    parts = [Part(words.padded(tokenizer, part.inputs, length), part.labels) for part in found[1:4]]
    return Task(name, *parts, classes=found.classes)


def files(name: str | None) -> list[str]:
    """The files of the data directory that a task is read from, or what the base is pretrained on if it is None."""
    if name is None:
        return [_CORPUS]
    return [f"text/{read}.tsv.gz" for read in (_SAME_SENTENCES if name in _SAME_SENTENCES else (name,))]


def corpus(data: Path | None) -> list[str]:
    """The texts to pretrain on: paragraphs, and lines that end a sentence; generated ones if data is None."""
    if data is None:
        rng = np.random.default_rng(0)
        return [_sentence(rng)[0] for _ in range(2000)]
    with gzip.open(data / _CORPUS, "rt", encoding="utf-8") as file:
        parts = re.split(r"(?<=[.!?])[ \t]*\n|\n\s*\n", file.read())
    texts = [" ".join(part.split()) for part in parts]
    return [text for text in texts if text]


@functools.cache
def _texts(data: Path | None, name: str) -> Task:
    """A task whose inputs are strings (N, 2)."""
    return cut(name, *(_generated(name) if data is None else _read(data, name)))


def _read(data: Path, name: str) -> tuple[Part, Part]:
    with gzip.open(data / "text" / f"{name}.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = np.array([line.rstrip("\n").split("\t") for line in file][1:], object)
    labels = np.unique(rows[:, 1].astype(str), return_inverse=True)[1].astype(np.int32)
    train, test = (Part(rows[rows[:, 0] == split, 2:], labels[rows[:, 0] == split]) for split in ("train", "test"))
    return train, test


def _unlike(texts: np.ndarray, held: list[str]) -> np.ndarray:
    """Marks the texts that are not within one of `held`, and have none within them; below four words all are."""
    texts_, held_ = ([words.plain(text) for text in some] for some in (texts, held))
    long = [text for text in held_ if len(text.split()) > 3]
    all_held = "\n".join(held_)
    return np.array(
        [len(text.split()) < 4 or not (text in all_held or any(part in text for part in long)) for text in texts_]
    )


_DOERS = (("fox", "crow", "hare", "mole"), ("miller", "smith", "nurse", "clerk"), ("storm", "frost", "flood", "wind"))
_VERBS = (("takes", "took"), ("finds", "found"), ("breaks", "broke"), ("brings", "brought"), ("hides", "hid"))
_THINGS = ("rope", "lamp", "wheel", "coat", "letter", "ladder")
_LOOKS = ("old", "small", "green", "heavy", "quiet", "strange")
_PLACES = ("in the yard", "at the river", "behind the mill", "near the bridge", "on the hill")


def _sentence(rng: np.random.Generator) -> tuple[str, int, int]:
    """A sentence, what kind of doer it has, and whether it is of the past."""

    def one(some):
        return some[rng.integers(len(some))]

    doer, past = int(rng.integers(3)), int(rng.integers(2))
    verb = one(_VERBS)[past]
    thing = f"the {one(_LOOKS)} {one(_THINGS)}"
    return f"The {one(_LOOKS)} {one(_DOERS[doer])} {verb} {thing} {one(_PLACES)}.", doer, past


def _generated(name: str) -> tuple[Part, Part]:
    """Training and test data: who does it (three kinds), and is the first of two sentences of the past?"""
    rng = np.random.default_rng(1 + GENERATED.index(name))
    drawn = [(_sentence(rng), _sentence(rng)) for _ in range(900)]
    texts = np.array([(one, other if name == "first" else "") for (one, *_), (other, *_) in drawn], object)
    labels = np.array([kind if name == "doer" else past for (_, kind, past), _ in drawn], np.int32)
    every = Part(texts, labels)
    return every.take(slice(700)), every.take(slice(700, None))
