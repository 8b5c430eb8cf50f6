"""What the multimodal suite's base learns from, in BEiT3's manner: words that are masked, with and without a picture.

One model, three losses, summed: masked words of texts (15 %, language expert); masked words of captions given their
picture (50 %, both experts); and, in place of BEiT3's masked patches, for which a tokenizer of images would be needed,
the words of a caption given the picture alone (vision expert): the mean patch and the class token each predict them
through the same head as masked words, in no order. The first two have a second part of that kind, which BEiT3 does not
have: the class token, which classifiers look at, predicts the masked words too. Captions are made from classes and from
how pictures were composed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from converters import beit3
from examples.evidence import language_tasks, suites, training, words
from examples.evidence import multimodal_pictures as pictures
from examples.evidence import multimodal_tasks as tasks
from examples.evidence.images import augmented, normalised
from examples.evidence.mixed import mixed
from examples.evidence.suites import Part
from examples.evidence.training import Progress

CAPTIONING = "torchscale/BEiT3ForCaptioning"
MASK = "<|mask|>"
_BAG = 20  # words that a picture alone is to give, at most
_SAYINGS = ("a photo of a {}", "this is a {}", "a small picture of a {}", "what is it ? a {}")

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of everything; the defaults are those of the results. A step sees `photos` + `composed` pictures."""

    vocabulary: int = 4096
    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 2400
    photos: int = 192
    composed: int = 64
    captioned: int = 96  # the composed ones, and so many more: seen together with their captions
    texts: int = 64
    rate: float = 1.5e-3
    initial: float = 0.06  # standard deviation of the first weights; the modules' own, 0.02, is for larger widths
    move: int = 4  # pixels that an image is moved by at most
    share: float = 1.0  # of the pretraining
    seed: int = 0

    @classmethod
    def fast(cls) -> "Settings":
        """For tests: seconds, on shapes."""
        sizes = {"vocabulary": 400, "width": 32, "layers": 1, "heads": 2, "steps": 150, "photos": 16, "composed": 32}
        return cls(**sizes, captioned=32, texts=32, rate=1e-2, initial=0.15, move=0)

    def config(self, pad: int) -> beit3.Config:
        """The model's configuration."""
        return beit3.Config(
            encoder_embed_dim=self.width,
            encoder_layers=self.layers,
            encoder_attention_heads=self.heads,
            encoder_ffn_embed_dim=4 * self.width,
            img_size=32,
            patch_size=8,
            vocab_size=self.vocabulary,
            max_source_positions=tasks.LONGEST + 2,
            other={"pad_token_id": pad},
        )


def pretrain(
    data: Path | None, out: Path, *, progress: Progress, settings: Settings = Settings(), bfloat16: bool = False
) -> None:
    """Trains the base and saves it with its tokenizer as a directory `out`/base.

    Args:
        data: the directory of data sets; None for generated ones.
        out: where to.
        progress: as in `training.fit`.
        settings: the sizes of everything.
        bfloat16: train in mixed precision.
    """
    files = [out / "tokenizer" / name for name in words.FILES]
    if not files[0].exists():
        words.write(files[0].parent, _learn(data, settings))
    tokenizer = words.read(files[0].parent)
    config = settings.config(words.number(tokenizer, words.PAD))
    module = beit3.MODELS[CAPTIONING](config, rngs=nnx.Rngs(settings.seed))
    graph, params = nnx.split(mixed(module) if bfloat16 else module)
    params = jax.tree.map(lambda leaf: leaf * settings.initial / 0.02 if leaf.ndim > 1 else leaf, params)
    batch, report = _data(data, settings, tokenizer)
    steps = int(settings.share * settings.steps)

    params = training.fit(
        params,
        lambda params, batch, key: loss(nnx.merge(graph, params), batch, key, settings.move),
        batch,
        training.adamw(settings.rate, steps),
        steps,
        out=out / "pretraining",
        seed=settings.seed,
        progress=progress,
    )
    module = nnx.merge(graph, params)
    found = report(module) | suites.origin(settings)
    suites.save(out / "base", module, config, found, files=files)


def loss(module, batch: Batch, key: jax.Array, move: int) -> jax.Array:
    """The three losses' sum. Photos are mirrored and moved; composed pictures are not mirrored: left is left."""
    photos, composed = (normalised(batch[name]) for name in ("photos", "composed"))
    one, two = jax.random.split(key)
    images = jnp.concatenate(
        [augmented(photos, one, flip=True, move=move), augmented(composed, two, flip=False, move=move)]
    )
    captioned = images[-len(batch["captions"]["tokens"]) :]
    alone = jnp.mean(bag_loss(module, images, batch["bags"]))
    return alone + masked_loss(module, batch["captions"], captioned) + masked_loss(module, batch["texts"])


def masked_loss(module, texts: Batch, images: jax.Array | None = None) -> jax.Array:
    """The mean cross-entropy of masked words, each at its place and, in no order, at the first class token."""
    features, split = _encoded(module, texts, images)
    at = jnp.take_along_axis(features[:, split:], texts["places"][..., None], 1)
    scores = jax.nn.log_softmax(module.mlm_head(jnp.concatenate([features[:, :1], at], 1)))
    there = jnp.take_along_axis(scores[:, 1:], texts["words"][..., None], -1)[..., 0]
    first = jnp.take_along_axis(scores[:, 0], texts["words"], -1)
    return -jnp.sum((there + first) * texts["weights"]) / jnp.sum(texts["weights"])


def bag_loss(module, images: jax.Array, bags: jax.Array) -> jax.Array:
    """The mean cross-entropy of each picture's words (N, n), -1 where there are fewer, given the picture: (N,)."""
    scores, real = _words(module, images), bags >= 0
    return -jnp.sum(jnp.where(real, jnp.take_along_axis(scores, bags, -1), 0), -1) / jnp.sum(real, -1)


def _words(module, images: jax.Array) -> jax.Array:
    """How likely each word is, given a picture alone: logarithms (N, vocabulary)."""
    features = module.beit3(images=images).features
    seen = jnp.stack([features[:, 0], features[:, 1:].mean(1)])
    return jax.nn.log_softmax(module.mlm_head(seen)).mean(0)


def masked(found: np.ndarray, share: float, mask: int, rng: np.random.Generator) -> Batch:
    """Masks a share of each text's words, at least one.

    Args:
        found: tokens `(N, L)`; the first three of the vocabulary are no words.
        share: of the words.
        mask: the token that stands in a word's place.
        rng: says which.

    Returns:
        `tokens` (N, L), and of the masked ones `places`, `words` and `weights` (N, n), 0 where a text has fewer.
    """
    is_word = found > 2
    order = np.where(is_word, rng.random(found.shape), 2).argsort(1)
    places = order[:, : int(np.ceil(share * found.shape[1]))]
    count = np.ceil(share * is_word.sum(1, keepdims=True))
    hides = (np.arange(places.shape[1]) < count) & np.take_along_axis(is_word, places, 1)
    hidden_words = np.take_along_axis(found, places, 1)
    tokens = found.copy()
    np.put_along_axis(tokens, places, np.where(hides, mask, hidden_words), 1)
    return {"tokens": tokens, "places": places, "words": hidden_words, "weights": hides.astype(np.float32)}


def _encoded(module, texts: Batch, images: jax.Array | None) -> beit3.Encoded:
    tokens = texts["tokens"]
    return module.beit3(tokens, images, tokens == module.config.other["pad_token_id"])


def _learn(data: Path | None, settings: Settings) -> Tokenizer:
    """A tokenizer of the corpus and, so that each of its words is one token, of captions."""
    kinds, rng = tasks.things(data, "pretraining"), np.random.default_rng(0)
    seen = pictures.see(pictures.compose(kinds, 5000, rng), kinds.names)
    said = [pictures.caption(one, rng) for one in seen]
    said += [pictures.question(one, kinds.names, rng)[0] for one in seen]
    said += [f"a photo of a {name}" for name in tasks.photos(data)[2]] * 200
    tokenizer = words.learn([*language_tasks.corpus(data), *said], settings.vocabulary - 1)
    tokenizer.add_special_tokens([MASK])
    return tokenizer


def _data(
    data: Path | None, settings: Settings, tokenizer: Tokenizer
) -> tuple[Callable[[int], Batch], Callable[[Any], dict[str, float]]]:
    """The batch of a step, and what is measured of the trained model."""
    train, test, names = tasks.photos(data)
    kinds = tasks.things(data, "pretraining")
    mask = words.number(tokenizer, MASK)
    said = tasks.tokens(tokenizer, [form.format(name) for name in names for form in _SAYINGS])
    said = said.reshape(len(names), len(_SAYINGS), -1)
    called = _bags(tokenizer, list(names))
    texts, held = _texts(data, tokenizer)
    photo = training.shuffled(len(train.labels), settings.photos, seed=settings.seed)
    text = training.shuffled(len(texts), settings.texts, seed=settings.seed + 1)
    both = settings.captioned - settings.composed

    def composed(count: int, rng: np.random.Generator):
        drawn = pictures.compose(kinds, count, rng)
        seen = pictures.see(drawn, kinds.names)
        captions = tasks.tokens(tokenizer, [pictures.caption(one, rng) for one in seen])
        return drawn.images, captions, _bags(tokenizer, [pictures.listed(one) for one in seen])

    def batch(step: int) -> Batch:
        rng = np.random.default_rng((settings.seed, step))
        shown = train.take(photo(step))
        images, captions, bags = composed(settings.composed, rng)
        forms = rng.integers(0, len(_SAYINGS), both)
        captions = np.concatenate([said[shown.labels[len(shown.labels) - both :], forms], captions])
        return {
            "photos": shown.inputs,
            "composed": images,
            "bags": np.concatenate([called[shown.labels], bags]),
            "captions": masked(captions, 0.5, mask, rng),
            "texts": masked(texts[text(step)], 0.15, mask, rng),
        }

    def report(module) -> dict[str, float]:
        rng = np.random.default_rng(1)
        images, captions, _ = composed(400, rng)
        hidden = masked(captions, 0.5, mask, rng)
        return {
            "photos": _named(module, test, called),
            "words": _right(module, masked(held[:400], 0.15, mask, rng), None),
            "words_of_captions": _right(module, hidden, normalised(images)),
            "words_of_captions_without_picture": _right(module, hidden, None),
        }

    return batch, report


def _bags(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The words of texts as tokens (N, n), without the articles and commas of a list; -1 where there are fewer."""
    empty = set(tokenizer.encode("a ,").ids)
    found = [[t for t in text.ids[:-1] if t not in empty][:_BAG] for text in tokenizer.encode_batch_fast(texts)]
    return np.array([bag + [-1] * (_BAG - len(bag)) for bag in found], np.int32)


def _texts(data: Path | None, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the corpus (N, LONGEST): to train on, and every hundredth to measure by."""
    found = words.stream(tokenizer, language_tasks.corpus(data))
    length = tasks.LONGEST - 1
    windows = tasks.begun(tokenizer, found[: len(found) // length * length].reshape(-1, length))
    held = np.arange(len(windows)) % 100 == 99
    return windows[~held], windows[held]


def _named(module, test: Part, called: np.ndarray) -> float:
    """The share of photos whose own name fits best of all."""
    graph, params = nnx.split(module)

    def fits(params, images):
        scores = _words(nnx.merge(graph, params), normalised(images))
        return jnp.where(called >= 0, scores[:, called], 0).sum(-1) / (called >= 0).sum(-1)

    found = suites.features(jax.jit(fits), params, test.inputs)
    return float(np.mean(found.argmax(-1) == test.labels))


def _right(module, texts: Batch, images) -> float:
    """The share of masked words that are the most likely ones."""

    @nnx.jit
    def best(module, texts, images):
        features, split = _encoded(module, texts, images)
        at = jnp.take_along_axis(features[:, split:], texts["places"][..., None], 1)
        return module.mlm_head(at).argmax(-1)

    found = best(module, texts, images) == texts["words"]
    return float((found * texts["weights"]).sum() / texts["weights"].sum())
